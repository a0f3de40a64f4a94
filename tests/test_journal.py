"""A journal that any moment may have cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from gps_guidance.photos.journal import Journal

SETTINGS = {"min_size": 64}
RESULTS = {"a.jpg": {"row": {"id": "1", "caption": "Größe \n 東京"}},
           "b.jpg": {"rejected": ["x", ""]}, "\udcff.jpg": {"row": {"id": "3"}}}


def written(path: Path) -> bytes:
    with Journal(path, SETTINGS) as journal:
        for key, result in RESULTS.items():
            journal.add(key, result)
            assert journal.get(key) == result
        assert journal.get("c.jpg") is None
    return path.read_bytes()


def test_results_are_read_back(tmp_path: Path) -> None:
    written(tmp_path / "j")
    with Journal(tmp_path / "j", SETTINGS) as journal:
        assert {key: journal.get(key) for key in RESULTS} == RESULTS


def test_a_journal_cut_anywhere_goes_on(tmp_path: Path) -> None:
    whole = written(tmp_path / "j")
    for end in range(len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:end])
        with Journal(path, SETTINGS) as journal:
            for key, result in RESULTS.items():
                assert journal.get(key) in (None, result)
                if journal.get(key) is None:
                    journal.add(key, result)
            assert {key: journal.get(key) for key in RESULTS} == RESULTS
        assert path.read_bytes() == whole


@pytest.mark.parametrize("settings", [{"min_size": 65}, {}])
def test_other_settings_begin_anew(tmp_path: Path, settings: dict[str, int]) -> None:
    written(tmp_path / "j")
    with Journal(tmp_path / "j", settings) as journal:
        assert journal.get("a.jpg") is None
    with Journal(tmp_path / "j", SETTINGS) as journal:
        assert journal.get("a.jpg") is None

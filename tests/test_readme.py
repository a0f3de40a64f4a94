"""The commands of the README run (at two steps), those of the other pages are understood.

Installing and testing are left out: they are what runs this file.
"""

import re
import shlex

import pytest
import small_runs

from gps_guidance import cli
from gps_guidance.lift import engine
from gps_guidance.lift.config import find_config
from gps_guidance.miniature.photographer import take_photos
from gps_guidance.miniature.tower import TOWER
from gps_guidance.photos.ingest import ingest

ROOT = small_runs.ROOT
README = ROOT / "README.md"
FOLDERS = ("docs", "custom", "pipelines", "benchmarks", "examples", "gps_guidance")
PAGES = [*sorted(ROOT.glob("*.md")),
         *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
SHELLS = ("sh", "bash", "shell", "console")


def blocks(page, languages):
    """The texts of a page's fenced blocks in these languages."""
    found = re.findall(r"^ *```(\w+)[^\n]*\n(.*?)^ *```", page.read_text("utf-8"), re.S | re.M)
    return [text for language, text in found if language in languages]


def commands(page):
    """Every command of a page's shell blocks as a list of words, ``a && b`` being two."""
    for block in blocks(page, SHELLS):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while "&&" in words:
                cut = words.index("&&")
                yield words[:cut]
                words = words[cut + 1 :]
            if words:
                yield words


def launches(page):
    return list(dict.fromkeys(tuple(w[2:]) for w in commands(page)
                              if w[:2] == ["python", "launch.py"]))


def verbs(page):
    return [w[1:] for w in commands(page) if w[0] == "gps-guidance"]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Where the README's commands run, one after another."""
    return tmp_path_factory.mktemp("clone")


@pytest.mark.parametrize("argv", launches(README), ids=" ".join)
def test_launch_commands_of_the_readme_run(argv, clone, monkeypatch, tiny_angle_model,
                                           tiny_sd_model):
    monkeypatch.chdir(clone)
    args = engine.parser().parse_intermixed_args(list(argv))
    if args.photos:
        take_photos(clone / "raw", 3, 0, 1)
        ingest([clone / "raw"], clone / args.photos, landmark=TOWER.name, center=TOWER.center,
               progress=False)
    models = {"gps-sds-guidance": tiny_angle_model, "stable-diffusion-guidance": tiny_sd_model}
    few = small_runs.overrides(find_config(args.config), models, tuple(args.overrides))
    before = set(clone.glob("outputs/*/*/report.html"))
    assert small_runs.launch(*argv, *few) == 0
    if args.mode == "train":
        assert set(clone.glob("outputs/*/*/report.html")) - before


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_every_page_are_understood(page, monkeypatch, capsys):
    for argv in launches(page):
        engine.parser().parse_intermixed_args(list(argv))
    understood = []
    for verb, (add_arguments, _, help_text) in dict(cli.VERBS).items():
        monkeypatch.setitem(cli.VERBS, verb, (add_arguments, understood.append, help_text))
    for argv in verbs(page):
        assert cli.main(argv) == 0, f"gps-guidance {shlex.join(argv)}: {capsys.readouterr().err}"
    assert len(understood) == len(verbs(page))


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in blocks(README, ("python",)):
        exec(compile(text, str(README), "exec"), {})


def test_the_readme_has_the_two_commands():
    assert ("--config", "gps-sds-pisa.yaml", "--train") in launches(README)
    assert ["pip", "install", "-e", "."] in list(commands(README))

"""A trained model as a small folder to give away: what makes and describes it, nothing twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from gps_guidance.hub import check_finished, shareable_files
from gps_guidance.parts import INDEX, PARTS, SHARED, beside, missing_parts, part_folder

# Not what a part is, but who wrote it and how it was called: loaded and saved again it is the same.
WRITERS = ("_name_or_path", "_diffusers_version", "transformers_version", "is_local",
           "local_files_only", "max_length", "padding", "truncation")
DEFAULTS = {"pad_to_multiple_of": None, "pad_token_type_id": 0, "padding_side": "right",
            "stride": 0, "truncation_side": "right", "truncation_strategy": "longest_first"}


def bundle(folder: str | Path, out: str | Path, share_with: Sequence[str] = ()) -> Path:
    """Write a finished model's folder anew as ``out``, and return it.

    It gets what :func:`gps_guidance.hub.push` uploads, without paths of this machine; of the sample
    pictures the last alone, as ``samples.png``, and no report, which shows them again.
    ``share_with`` names models beside ``out``: a part that one of them has is left out, and
    ``model_index.json`` says where it is. ValueError if ``folder`` holds no finished model, if one
    of those has not all parts, or if there is something at ``out``.
    """
    folder, out = Path(folder), Path(out)
    check_finished(folder)
    if out.exists():
        raise ValueError(f"There is something at {out}: remove it, or give another folder.")
    files = shareable_files(folder)
    files.pop("train_report.html", None)
    samples = sorted(name for name in files if name.startswith("samples-"))
    for name in samples[:-1]:
        del files[name]
    if samples:
        files["samples.png"] = files.pop(samples[-1])
    shared = _share(files, [beside(out, name) for name in share_with])
    if shared:
        index = json.loads(_read(files[INDEX])) | {SHARED: shared}
        files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    stage = out.with_name(f".{out.name}.part")
    try:
        for name, content in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_bytes(_read(content))
        os.replace(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return out


def _share(files: dict[str, Path | bytes], bases: Sequence[Path]) -> dict[str, str]:
    """Take parts that bases have out of ``files``; their names -> the names of those folders."""
    shared = {}
    for base in bases:
        if missing := missing_parts(base):
            raise ValueError(f"{base} is no model to share with: {', '.join(missing)} missing.")
    for part in PARTS:
        own = {name: _read(files[name]) for name in files if name.startswith(f"{part}/")}
        for there in [part_folder(base, part) for base in bases]:
            if _same(own, {f"{part}/{path.relative_to(there).as_posix()}": path.read_bytes()
                           for path in there.rglob("*") if path.is_file()}):
                shared[part] = there.parent.name
                for name in own:
                    del files[name]
                break
    return shared


def _same(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> bool:
    """Whether two parts have the same files: to the byte, or with equal settings."""
    return one.keys() == other.keys() and all(
        content == other[name] or (name.endswith(("config.json", "tokenizer.json"))
                                   and _settings(content) == _settings(other[name]))
        for name, content in one.items())


def _settings(content: bytes) -> dict[str, object]:
    return {key: value for key, value in json.loads(content).items()
            if key not in WRITERS and (key not in DEFAULTS or value != DEFAULTS[key])}


def _read(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()

"""Where the parts of a model folder are: in it, or in a model beside it that has the same.

Models with a common base need to hold its parts once. ``model_index.json`` of a folder that leaves
some out names the folders which have them: ``"_shared": {"vae": "miniature-pisa"}``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
INDEX, SHARED = "model_index.json", "_shared"


def part_folder(folder: Path, part: str) -> Path:
    """The folder of a part, one of PARTS, of a model; it need not exist.

    ValueError as in :func:`shared_parts`.
    """
    own = folder / part
    return own if own.is_dir() else shared_parts(folder).get(part, own)


def missing_parts(folder: Path) -> list[str]:
    """The parts that a model has neither in its folder nor in one beside it."""
    return [part for part in PARTS if not part_folder(folder, part).is_dir()]


def shared_parts(folder: Path) -> dict[str, Path]:
    """The parts that a model folder leaves to others -> the folders in which they are.

    ValueError if one is not there, or is looked for anywhere but in a folder beside this one.
    """
    path, found = folder / INDEX, {}
    for part, name in _named(path).items():
        if part not in PARTS:
            raise ValueError(f"{path}: {SHARED} names {part!r}, which is none of the parts "
                             f"{', '.join(PARTS)}.")
        if (folder / part).is_dir():
            continue
        found[part] = beside(folder, name) / part
        if not found[part].is_dir():
            raise ValueError(f"{folder} has no {part} of its own: it is that of the model {name}, "
                             f"and there is no {found[part]}. Keep both folders side by side.")
    return found


def components_beside(folder: Path, load: Callable[..., Any], names: Iterable[str],
                      options: dict[str, Any]) -> dict[str, Any]:
    """The components of a pipeline that its folder leaves to models beside it, by name.

    diffusers looks only within a folder: pass them to its ``from_pretrained``. ``load`` is that of
    the pipeline's class, ``names`` are all its components, ``options`` the arguments of the call;
    what is given in them is not loaded.
    """
    wanted = {name: at for name, at in shared_parts(folder).items() if name not in options}
    found: dict[str, Any] = {}
    for model in sorted({at.parent for at in wanted.values()}):
        here = [name for name, at in wanted.items() if at.parent == model]
        absent = {name: None for name in names if name not in here}
        loaded = load(model, **(options | absent))
        found |= {name: getattr(loaded, name) for name in here}
    return found


def beside(folder: Path, name: Any) -> Path:
    """The folder ``name`` next to ``folder``; ValueError if ``name`` is a path or no text."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{folder} may share parts only with a folder beside it, of which the "
                         f"name alone is given, such as 'miniature-pisa', but not {name!r}.")
    return folder.resolve().parent / name


def _named(path: Path) -> dict[str, Any]:
    """What ``model_index.json`` says of shared parts."""
    if not path.is_file():
        return {}
    try:
        named = json.loads(path.read_text("utf-8")).get(SHARED, {})
        return dict(named)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as what diffusers wrote, with {SHARED} as parts "
                         f"and names of folders: {error}") from error

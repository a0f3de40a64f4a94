"""``gps-guidance install-extension``: our folder in a clone of threestudio, and what that lacks."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from gps_guidance.lift.threestudio import clone

SOURCE = Path(__file__).parents[1] / "custom" / "threestudio-gps"
OLDEST = "0.2.0"  # the first threestudio with custom/
LIBIGL = "2.5.1"  # newer ones lack functions that threestudio imports

# What threestudio imports as it starts and this package does not bring: module -> for pip
NEEDED = {
    "nerfacc": "nerfacc", "igl": f"libigl=={LIBIGL}", "jaxtyping": "jaxtyping",
    "typeguard": "typeguard", "einops": "einops", "cv2": "opencv-python-headless",
}
REPLACED = {  # as above, and launch.py --threestudio does without
    "tinycudann": "git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch",
    "nvdiffrast": "git+https://github.com/NVlabs/nvdiffrast.git",
    "envlight": "git+https://github.com/ashawkey/envlight.git",
    "IPython": "ipython", "controlnet_aux": "controlnet_aux", "torchvision": "torchvision",
    "wandb": "wandb",
}


def install_extension(threestudio: str | Path, copy: bool = False) -> Path:
    """Link our folder into the ``custom/`` of a clone of threestudio, or copy it; where it is then.

    Doing it again changes nothing, but a copy is brought up to date. ValueError where the clone is
    none or too old, where this package has no ``custom/`` beside it, and where something else has
    the folder's name.
    """
    folder = clone(threestudio)
    version = re.search(r'__version__ = "([\d.]+)', _text(folder / "threestudio" / "__init__.py"))
    found = version[1] if version else "older"
    if not version or _numbers(found) < _numbers(OLDEST):
        raise ValueError(f"{folder} is threestudio {found}; its custom/ came with {OLDEST}. "
                         "Update it: git pull in that folder.")
    if not (SOURCE / "__init__.py").is_file():
        raise ValueError(f"There is no {SOURCE}: this package was installed without its "
                         "repository. Clone gps-guidance and run `pip install -e .` in the clone.")
    target = folder / "custom" / SOURCE.name
    if target.is_symlink() or target.exists():
        _check_ours(target)
    if copy:
        if target.is_symlink():
            target.unlink()
        shutil.copytree(SOURCE, target, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
    elif not target.exists():
        target.symlink_to(SOURCE, target_is_directory=True)
    return target


def _check_ours(target: Path) -> None:
    """ValueError if what is there is neither a link to our folder nor a copy of it."""
    ours = target.resolve() == SOURCE.resolve() if target.is_symlink() else (
        "gps-sds-guidance" in _text(target / "__init__.py"))
    if not ours:
        raise ValueError(f"{target} is something else already (or a link to another clone of "
                         "gps-guidance): move it away and run the command again.")


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.strip(".").split("."))


def missing(packages: Mapping[str, str]) -> dict[str, str]:
    """Those of ``packages`` (module -> for pip) that this Python does not have; of libigl also
    another version than the one that works."""
    absent = {module: package for module, package in packages.items()
              if importlib.util.find_spec(module) is None}
    if "igl" in packages and "igl" not in absent and metadata.version("libigl") != LIBIGL:
        absent["igl"] = packages["igl"]
    return absent


def advice() -> list[str]:
    """One sentence each: what threestudio lacks in this Python, and the command that mends it."""
    needed, replaced = missing(NEEDED), missing(REPLACED)
    said = []
    if needed:
        said.append(f"threestudio lacks {', '.join(needed.values())}. Run: "
                    f"{pip_install(needed.values())}")
    if replaced:
        said.append(f"Not installed, and not needed with launch.py --threestudio: "
                    f"{', '.join(replaced)}. threestudio's own launch.py needs: "
                    f"{pip_install(replaced.values())}")
    return said


def pip_install(packages: Iterable[str]) -> str:
    """The command that installs these for the running Python."""
    quoted = (f'"{package}"' if re.search(r"[=#]", package) else package for package in packages)
    return " ".join([sys.executable, "-m pip install", *quoted])

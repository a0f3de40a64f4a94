"""Version check, and registration that may run twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import threestudio
from packaging.version import Version

OLDEST_THREESTUDIO = "0.2.0"  # the first with custom/
OLDEST_PACKAGE = "0.1.0"


def install_command() -> str:
    """The command that installs ``gps_guidance`` from the clone that this folder belongs to."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "gps_guidance" / "geo.py").is_file():
        return f"{sys.executable} -m pip install -e <your clone of gps-guidance>"
    return f'{sys.executable} -m pip install -e "{clone}"'


def package_version() -> str | None:
    """The version of ``gps_guidance`` that Python imports, or None."""
    try:
        import gps_guidance
    except ImportError:
        return None
    return gps_guidance.__version__


def check_requirements(names: Sequence[str]) -> None:
    """ImportError, with the remedy, where threestudio or ``gps_guidance`` is missing or too old."""
    found = getattr(threestudio, "__version__", "0.1.0")
    if Version(found) < Version(OLDEST_THREESTUDIO):
        refuse(names, f"threestudio-gps needs threestudio >= {OLDEST_THREESTUDIO}, this is "
                      f"{found}. Update it: git pull in its folder.")
    ours = package_version()
    if ours is None:
        refuse(names, "threestudio-gps needs the Python package gps-guidance, which is not "
                      f"installed. Run: {install_command()}")
    if Version(ours) < Version(OLDEST_PACKAGE):
        refuse(names, f"threestudio-gps needs gps-guidance >= {OLDEST_PACKAGE}, this is {ours}. "
                      f"Run: {install_command()}")


def refuse(names: Sequence[str], message: str) -> NoReturn:
    """Raise ImportError, now and again when a config asks for one of ``names``.

    threestudio prints what a custom module raises and goes on; the config that needs it would
    otherwise end in a bare KeyError.
    """

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(message)

    for name in names:
        threestudio.__modules__.setdefault(name, refused)
    raise ImportError(message)


def fit_to_lightning() -> None:
    """Make threestudio's renderer know by itself whether it trains.

    Its ``train()`` and ``eval()`` note that in ``randomized``. Lightning >= 2.2 calls neither
    before the first step nor ``train()`` after a validation, so that ``estimator: importance``
    would stop with an AttributeError and the others would cease to jitter their samples.
    """
    from threestudio.models.renderers.nerf_volume_renderer import NeRFVolumeRenderer

    if not hasattr(NeRFVolumeRenderer, "randomized"):
        NeRFVolumeRenderer.randomized = property(
            lambda self: self.training and self.cfg.randomized, lambda self, value: None
        )


def fit_to_torch() -> None:
    """Make ``torch.cross`` take the last dimension where none is named, as torch says it will.

    It takes the first of size 3: threestudio's cameras, which name none, look somewhere else in a
    batch of three, and a test of three views ends in an error.
    """
    import torch

    given = torch.cross

    def cross(input: Any, other: Any, dim: int | None = -1, *, out: Any = None) -> Any:
        return given(input, other, dim=-1 if dim is None else dim, out=out)

    torch.cross = cross


def register(name: str) -> Callable[[type], type]:
    """``threestudio.register``, but a second copy of this extension finds the first one's class.

    A class of another extension under the same name is still refused by threestudio.
    """

    def decorator(cls: type) -> type:
        known = threestudio.__modules__.get(name)
        if known is not None and known.__qualname__ == cls.__qualname__:
            return known
        if known is not None and not isinstance(known, type):  # what `refuse` left behind
            del threestudio.__modules__[name]
        return threestudio.register(name)(cls)

    return decorator

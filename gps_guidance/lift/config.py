"""The YAML of a 3D run: threestudio's keys, resolvers and meaning, with every key checked.

A file is read with OmegaConf (``${...}`` and ``???`` as usual), overrides ``key=value`` are merged
on top, and each section becomes the dataclass of the class it configures (:func:`structured`). A
key that the class does not have, or a value of another type, raises ValueError with the full
dotted key. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
CONFIG_FOLDER = "threestudio_configs"


@dataclass
class ExperimentConfig:
    """Top level of a config. ``exp_dir``, ``trial_name`` and ``trial_dir`` are derived, never set.

    ``data`` and ``system`` are typed later, by the classes that ``data_type`` and the system's
    ``*_type`` keys name; ``trainer`` and ``checkpoint`` are arguments of Lightning's Trainer and
    ModelCheckpoint.
    """

    name: str = "default"
    description: str = ""
    tag: str = ""
    seed: int = 0
    use_timestamp: bool = True
    timestamp: str | None = None
    exp_root_dir: str = "outputs"
    exp_dir: str = "outputs/default"
    trial_name: str = "exp"
    trial_dir: str = "outputs/default/exp"
    n_gpus: int = 1
    resume: str | None = None
    data_type: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    system_type: str = ""
    system: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tag and not self.use_timestamp:
            raise ValueError("tag is empty and use_timestamp is false: give one of them, so that "
                             "the trial folder has a name, for example tag=first.")
        if self.timestamp is None:
            now = datetime.now().strftime("@%Y%m%d-%H%M%S")
            self.timestamp = now if self.use_timestamp else ""
        self.set_timestamp(self.timestamp)

    def set_timestamp(self, timestamp: str) -> None:
        """Name the trial folder ``exp_root_dir/name/tag + timestamp``."""
        self.timestamp = timestamp
        self.trial_name = self.tag + timestamp
        self.exp_dir = os.path.join(self.exp_root_dir, self.name)
        self.trial_dir = os.path.join(self.exp_dir, self.trial_name)


@dataclass
class SystemConfig:
    """Keys of ``dreamfusion-system``: optimisation, the parts by type name, and the exporter."""

    loggers: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    weights: str | None = None
    weights_ignore_modules: list[str] | None = None
    cleanup_after_validation_step: bool = False
    cleanup_after_test_step: bool = False
    geometry_type: str = ""
    geometry: dict[str, Any] = field(default_factory=dict)
    geometry_convert_from: str | None = None
    geometry_convert_inherit_texture: bool = False
    geometry_convert_override: dict[str, Any] = field(default_factory=dict)
    material_type: str = ""
    material: dict[str, Any] = field(default_factory=dict)
    background_type: str = ""
    background: dict[str, Any] = field(default_factory=dict)
    renderer_type: str = ""
    renderer: dict[str, Any] = field(default_factory=dict)
    guidance_type: str = ""
    guidance: dict[str, Any] = field(default_factory=dict)
    prompt_processor_type: str = ""
    prompt_processor: dict[str, Any] = field(default_factory=dict)
    exporter_type: str = "mesh-exporter"
    exporter: dict[str, Any] = field(default_factory=dict)


def largest(value: Any) -> float:
    """The largest value that a scalar or a schedule list takes (threestudio's ``C_max``)."""
    if isinstance(value, (int, float)):
        return value
    numbers = list(value)
    if len(numbers) == 3:
        return max(numbers[0], numbers[1])
    return max(numbers[1], *numbers[2::2])


RESOLVERS: dict[str, Any] = {
    "calc_exp_lr_decay_rate": lambda factor, n: factor ** (1.0 / n),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "basename": os.path.basename,
    "rmspace": lambda text, substitute: text.replace(" ", substitute),
    "tuple2": lambda number: [float(number), float(number)],
    "gt0": lambda number: number > 0,
    "cmaxgt0": lambda value: largest(value) > 0,
    "not": lambda flag: not flag,
    "cmaxgt0orcmaxgt0": lambda a, b: largest(a) > 0 or largest(b) > 0,
}


def closest(name: object, known: Iterable[str]) -> str:
    """``Did you mean ...?`` where one of ``known`` is near, else the list of what exists."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(names) or 'none'}."


def check_keys(values: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key of ``values`` that is not in ``known``."""
    known = list(known)
    for key, value in values.items():
        if key not in known:
            dotted = f"{where}.{key}" if where else str(key)
            raise ValueError(f"Unknown key {dotted} = {value!r}. {closest(key, known)}")


def structured(cls: type[T], values: Mapping[str, Any] | None, where: str = "") -> T:
    """An instance of dataclass ``cls`` from plain values, each key and type checked.

    ``where`` is the dotted key of the section, for messages. Ints are accepted where floats are
    wanted, lists where tuples are; ``Any`` takes everything (schedules).
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass.")
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; it must be a section of keys and values.")
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    check_keys(values, known, where)
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    return cls(**{k: _coerce(v, hints[k], prefix + k) for k, v in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as type ``hint``, or ValueError naming ``where``."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, typing.get_args(hint), hint, where)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        allowed = ", ".join(repr(a) for a in typing.get_args(hint))
        raise ValueError(f"{where} is {value!r}; it must be one of {allowed}.")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else structured(hint, value, where)
    container = origin or hint
    if container in (list, tuple, Sequence):
        return _coerce_sequence(value, hint, container, where)
    if container in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
        raise _mismatch(value, "a section of keys and values", where)
    return _coerce_scalar(value, hint, where)


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, (int, float)) and not is_bool:
        return float(value)
    if hint is int and not is_bool and (isinstance(value, int) or
                                        isinstance(value, float) and value.is_integer()):
        return int(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not is_bool):
        return value
    raise _mismatch(value, getattr(hint, "__name__", str(hint)), where)


def _coerce_union(value: Any, options: tuple[Any, ...], hint: Any, where: str) -> Any:
    for option in options:  # an exact type wins: 3 stays an int in int | float
        if isinstance(option, type) and type(value) is option:
            return value
    for option in options:
        try:
            return _coerce(value, option, where)
        except ValueError:
            continue
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise _mismatch(value, names.replace("NoneType", "null"), where)


def _coerce_sequence(value: Any, hint: Any, container: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(value, "a list", where)
    kinds = typing.get_args(hint)
    if container is tuple and kinds and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise _mismatch(value, f"a list of {len(kinds)} values", where)
        return tuple(_coerce(v, k, f"{where}[{i}]")
                     for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    kind = kinds[0] if kinds else Any
    items = [_coerce(v, kind, f"{where}[{i}]") for i, v in enumerate(value)]
    return tuple(items) if container is tuple else items


def _mismatch(value: Any, wanted: str, where: str) -> ValueError:
    return ValueError(f"{where} is {value!r}; it must be {wanted}.")


def find_config(name_or_path: str) -> Path:
    """A config file by path, or by bare name.

    A name is looked for in the current folder, in its ``threestudio_configs/``, and in that of the
    clone that this package belongs to. ValueError lists the names that exist.
    """
    given = Path(name_or_path).expanduser()
    stem = given.name.removesuffix(".yaml")
    folders = [Path.cwd() / CONFIG_FOLDER, Path(__file__).parents[2] / CONFIG_FOLDER]
    candidates = [given]
    if given.parent == Path("."):
        candidates += [folder / f"{stem}.yaml" for folder in (Path.cwd(), *folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    known, near = closest("", names), closest(stem, names)
    hint = known if near == known else f"{near} {known}"
    raise ValueError(f"--config {name_or_path}: there is no such file. {hint}")


def register_resolvers() -> None:
    """Make ``${add:...}`` and the others known to OmegaConf, unless threestudio has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # renamed in OmegaConf 2.4; both names work
        for name, function in RESOLVERS.items():
            if not OmegaConf.has_resolver(name):
                OmegaConf.register_new_resolver(name, function)


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read, merge, resolve and check a config; raises ValueError for anything that is wrong."""
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ValueError(f"{override!r} is neither a flag nor an override. Overrides look like "
                             "system.guidance.guidance_scale=20 (no dashes, no spaces).")
    register_resolvers()
    path = find_config(name_or_path)
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(list(overrides)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{missing[0]} is required (??? in {path.name}): add "
                             f"{missing[0]}=... to the command.")
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path.name}: {_first_line(error)}") from error
    except Exception as error:
        if isinstance(error, (ValueError, OSError)):
            raise
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values at its top level.")
    return structured(ExperimentConfig, typing.cast("dict[str, Any]", values))


def _first_line(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    line = str(error).strip().splitlines()[0]
    return f"{key}: {line}" if key else line


def dump_config(cfg: ExperimentConfig) -> str:
    """The resolved config as YAML; reading it back continues the same trial."""
    container: DictConfig = OmegaConf.create(dataclasses.asdict(cfg))
    return OmegaConf.to_yaml(container)

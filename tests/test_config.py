"""Configs: resolvers and overrides as in threestudio, every wrong key or type named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import gps_guidance
from gps_guidance.lift.config import (
    ExperimentConfig,
    SystemConfig,
    dump_config,
    find_config,
    largest,
    load_config,
    structured,
)

YAML = """
name: tower
tag: "${rmspace:${system.prompt_processor.prompt},_}"
use_timestamp: false
data_type: random-camera-datamodule
data:
  width: 8
  height: ${data.width}
system_type: dreamfusion-system
system:
  prompt_processor:
    prompt: ???
  loss:
    lambda_sds: [0, 1.0, 2.0, 10]
trainer:
  max_steps: 100
checkpoint:
  every_n_train_steps: ${idiv:${trainer.max_steps},3}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tower.yaml"
    path.write_text(YAML)
    return path


@dataclass
class Inner:
    size: int = 1


@dataclass
class Sample:
    radius: float = 1.0
    steps: int = 3
    span: tuple[float, float] = (0.0, 1.0)
    sizes: int | list[int] = 4
    name: str | None = None
    on: bool = False
    mode: Literal["a", "b"] = "a"
    schedule: Any = 0.5
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, Any] = field(default_factory=dict)


def test_interpolation_resolvers_and_overrides(config):
    prompt = "system.prompt_processor.prompt=a leaning tower"
    cfg = load_config(str(config), [prompt, "data.width=9"])
    assert cfg.data == {"width": 9, "height": 9}
    assert cfg.tag == "a_leaning_tower"
    assert cfg.trial_dir.replace("\\", "/") == "outputs/tower/a_leaning_tower"
    assert cfg.checkpoint == {"every_n_train_steps": 33}
    assert cfg.system["loss"]["lambda_sds"] == [0, 1.0, 2.0, 10]


def test_missing_value_is_named(config):
    with pytest.raises(ValueError, match=r"system\.prompt_processor\.prompt is required"):
        load_config(str(config))


def test_unknown_top_level_key_is_named_with_the_closest(config):
    with pytest.raises(ValueError, match=r"Unknown key trainr\.?.*Did you mean 'trainer'"):
        load_config(str(config), ["system.prompt_processor.prompt=x", "trainr.max_steps=1"])


@pytest.mark.parametrize("override", ["--resume", "resume", "-x=1"])
def test_something_that_is_no_override_is_refused(config, override):
    with pytest.raises(ValueError, match="neither a flag nor an override"):
        load_config(str(config), [override])


def test_bad_interpolation_and_bad_yaml(config, tmp_path):
    with pytest.raises(ValueError, match="data.height"):
        load_config(str(config), ["system.prompt_processor.prompt=x", "data.height=${data.none}"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\nb: }")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(broken))


def test_config_by_name_and_the_closest_name(monkeypatch, tmp_path):
    folder = tmp_path / "threestudio_configs"
    folder.mkdir()
    (folder / "gps-tower.yaml").write_text("name: tower\n")
    monkeypatch.chdir(tmp_path)
    assert find_config("gps-tower") == folder / "gps-tower.yaml"
    assert find_config("gps-tower.yaml") == folder / "gps-tower.yaml"
    with pytest.raises(ValueError, match="Did you mean 'gps-tower'"):
        find_config("gps-towr")
    with pytest.raises(ValueError, match="no such file"):
        find_config(str(tmp_path / "else" / "gps-tower.yaml"))


def test_a_shipped_config_is_found_by_name_from_any_folder(monkeypatch, tmp_path):
    shipped = Path(gps_guidance.__file__).parents[1] / "threestudio_configs"
    monkeypatch.chdir(tmp_path)
    for name in ("gps-sds-pisa", "gps-sds-pisa.yaml"):
        assert find_config(name) == shipped / "gps-sds-pisa.yaml"
    with pytest.raises(ValueError) as caught:
        find_config("no-such-thing")
    for path in shipped.glob("*.yaml"):
        assert path.stem in str(caught.value)
    with pytest.raises(ValueError, match="Did you mean 'gps-sds-pisa'.*Known: .*dreamfusion-sd"):
        find_config("gps-sds-pissa.yaml")


def test_the_current_folder_comes_before_the_shipped_configs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "threestudio_configs").mkdir()
    nearer = tmp_path / "threestudio_configs" / "gps-sds-pisa.yaml"
    nearer.write_text("name: mine\n")
    assert find_config("gps-sds-pisa") == nearer
    nearest = tmp_path / "gps-sds-pisa.yaml"
    nearest.write_text("name: mine\n")
    for name in ("gps-sds-pisa", "gps-sds-pisa.yaml", str(nearest)):
        assert find_config(name).resolve() == nearest.resolve()


def test_trial_folder_needs_a_name():
    with pytest.raises(ValueError, match="tag is empty"):
        ExperimentConfig(use_timestamp=False)
    assert ExperimentConfig(tag="a", use_timestamp=True).trial_name.startswith("a@")
    assert ExperimentConfig(tag="a", timestamp="@1").trial_name == "a@1"


def test_parsed_yaml_reads_back_as_the_same_trial(config, tmp_path):
    cfg = load_config(str(config), ["system.prompt_processor.prompt=x", "use_timestamp=true"])
    parsed = tmp_path / "parsed.yaml"
    parsed.write_text(dump_config(cfg))
    assert load_config(str(parsed)) == cfg


def test_structured_coerces_what_yaml_cannot_say():
    got = structured(Sample, {"radius": 2, "span": [0, 1], "sizes": [4, 8], "steps": 1e3,
                              "inner": {"size": 5}, "schedule": [0, 1, 2, 3], "name": None})
    assert got.radius == 2.0 and isinstance(got.radius, float)
    assert got.span == (0.0, 1.0) and got.sizes == [4, 8] and got.steps == 1000
    assert got.inner == Inner(5) and got.schedule == [0, 1, 2, 3]
    assert isinstance(structured(Sample, {"sizes": 3}).sizes, int)


@pytest.mark.parametrize("values, message", [
    ({"radus": 1}, r"Unknown key s\.radus = 1\. Did you mean 'radius'"),
    ({"radius": "wide"}, r"s\.radius is 'wide'; it must be float"),
    ({"radius": True}, r"s\.radius is True"),
    ({"steps": 1.5}, r"s\.steps is 1\.5"),
    ({"steps": float("inf")}, r"s\.steps is inf"),
    ({"span": [1]}, r"s\.span is \[1\]; it must be a list of 2"),
    ({"span": [1, "x"]}, r"s\.span\[1\] is 'x'"),
    ({"sizes": ["x"]}, r"s\.sizes is \['x'\]"),
    ({"name": 3}, r"s\.name is 3; it must be str or null"),
    ({"on": 1}, r"s\.on is 1; it must be bool"),
    ({"mode": "c"}, r"s\.mode is 'c'; it must be one of 'a', 'b'"),
    ({"inner": {"sze": 1}}, r"Unknown key s\.inner\.sze"),
    ({"inner": 4}, r"s\.inner is 4; it must be a section"),
    ({"extra": [1]}, r"s\.extra is \[1\]; it must be a section"),
])
def test_structured_names_the_dotted_key_and_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        structured(Sample, values, "s")


def test_system_keys_are_threestudios():
    with pytest.raises(ValueError, match=r"system\.geometri_type.*Did you mean 'geometry_type'"):
        structured(SystemConfig, {"geometri_type": "x"}, "system")


@pytest.mark.parametrize("value, top", [(3, 3), ([0.1, 0.9, 100], 0.9), ([0, 0.9, 0.1, 100], 0.9),
                                        ([0, 0.1, 0.2, 10, 0.7, 20, 0.3, 30], 0.7)])
def test_largest_value_of_a_schedule(value, top):
    assert largest(value) == top

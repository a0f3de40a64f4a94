"""custom/threestudio-gps, loaded as threestudio loads it.

threestudio needs compiled CUDA packages, so that these tests run against a small stand-in for the
parts of it that the extension touches: the registry, ``BaseObject``, ``BaseModule``, structured
configs and the loader of ``custom/``. Where THREESTUDIO_PATH names a real clone, the same checks
run against it as well (slow), with stand-ins for what is not compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTENSION = ROOT / "custom" / "threestudio-gps"

STAND_IN = {
    "threestudio/__init__.py": '''
import os

__version__ = os.environ.get("STAND_IN_VERSION", "0.2.3")
__modules__ = {}


def register(name):
    def keep(cls):
        if name in __modules__:
            raise ValueError(f"{name} is registered twice")
        __modules__[name] = cls
        return cls
    return keep


def find(name):
    return __modules__[name]


info = print
''',
    "threestudio/utils/__init__.py": "",
    "threestudio/utils/config.py": '''
from omegaconf import OmegaConf


def parse_structured(cls, cfg):
    return OmegaConf.structured(cls(**cfg))
''',
    "threestudio/utils/base.py": '''
from dataclasses import dataclass
from typing import Optional

import torch

from threestudio.utils.config import parse_structured


class Updateable:
    def do_update_step(self, epoch, global_step, on_load_weights=False):
        for name in dir(self):
            part = None if name.startswith("_") else getattr(self, name, None)
            if isinstance(part, Updateable):
                part.do_update_step(epoch, global_step, on_load_weights=on_load_weights)
        self.update_step(epoch, global_step, on_load_weights=on_load_weights)

    def update_step(self, epoch, global_step, on_load_weights=False):
        pass


class BaseObject(Updateable):
    @dataclass
    class Config:
        pass

    def __init__(self, cfg=None, *args, **kwargs):
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self.device = torch.device("cpu")
        self.configure(*args, **kwargs)


class BaseModule(torch.nn.Module, Updateable):
    @dataclass
    class Config:
        weights: Optional[str] = None

    def __init__(self, cfg=None, *args, **kwargs):
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self.device = torch.device("cpu")
        self.configure(*args, **kwargs)
''',
    "threestudio/models/__init__.py": "",
    "threestudio/models/geometry/__init__.py": "",
    "threestudio/models/geometry/base.py": '''
from dataclasses import dataclass
from typing import Union

import torch

from threestudio.utils.base import BaseModule


class BaseImplicitGeometry(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        radius: float = 1.0
        isosurface: bool = True
        isosurface_method: str = "mt"
        isosurface_resolution: int = 128
        isosurface_threshold: Union[float, str] = 0.0

    def configure(self):
        box = torch.tensor([[-self.cfg.radius] * 3, [self.cfg.radius] * 3])
        self.register_buffer("bbox", box)
''',
    "threestudio/models/renderers/__init__.py": "",
    "threestudio/models/renderers/nerf_volume_renderer.py": '''
from dataclasses import dataclass

from threestudio.utils.base import BaseModule


class NeRFVolumeRenderer(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        randomized: bool = True

    def configure(self):
        pass

    def train(self, mode=True):
        self.randomized = mode and self.cfg.randomized
        return super().train(mode)
''',
    "launch.py": '''
import importlib.util
import os
import sys
import traceback


def load_custom_modules():
    for name in sorted(os.listdir("custom")):
        path = os.path.join("custom", name)
        spec = importlib.util.spec_from_file_location(name, os.path.join(path, "__init__.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception:
            print(traceback.format_exc())
''',
}

PREPARE = '''
from gps_guidance.nocompile import host

host.prepare()
'''

BUILD = '''
import dataclasses, json, sys

import torch
from omegaconf import OmegaConf

import launch

launch.load_custom_modules()
import threestudio
first = {n: c for n, c in threestudio.__modules__.items() if n.startswith("gps-")}
launch.load_custom_modules()
assert all(threestudio.__modules__[n] is c for n, c in first.items()), "registered twice"

from gps_guidance.lift.cameras import c2w_from_bearing, camera_batch
from gps_guidance.lift.field import PyramidGrid
from gps_guidance.lift.guidance import GPSGuidance, GPSGuidanceConfig
from gps_guidance.lift.prompts import GPSPromptProcessorConfig

yaml, model = sys.argv[1:]
cfg = OmegaConf.load(yaml)
cfg.system.guidance.pretrained_model_name_or_path = model
OmegaConf.resolve(cfg)
system = cfg.system
system.guidance.min_step_percent = [0, 0.98, 0.02, 8000]
system.guidance.max_step_percent = [0, 0.98, 0.5, 8000]
out = {"names": sorted(first)}

build = lambda kind: threestudio.find(system[f"{kind}_type"])(system[kind])
geometry, prompts, guidance = build("geometry"), build("prompt_processor"), build("guidance")
device = guidance.device
geometry.to(device)
for name in (k for k in system.optimizer.params if k.startswith("geometry.")):
    part = geometry
    for step in name.split(".")[1:]:
        part = getattr(part, step)
    assert isinstance(part, torch.nn.Parameter), name
out["parameters"] = [n for n, _ in geometry.named_parameters()]
out["state"] = sorted(geometry.state_dict())

def keys(config):
    return {f.name for f in dataclasses.fields(config)}

def own(config, ours):
    return keys(ours) <= keys(config)

out["fields"] = [own(first["gps-sds-guidance"].Config, GPSGuidanceConfig),
                 own(first["gps-prompt-processor"].Config, GPSPromptProcessorConfig),
                 own(first["gps-pyramid-grid"].Config, PyramidGrid.Config)]
defaults = first["gps-pyramid-grid"].Config()
out["threshold"] = defaults.isosurface_threshold
out["schedule"] = []
for step in (0, 2000, 8000):
    guidance.do_update_step(0, step)
    out["schedule"].append([guidance.guidance.min_step, guidance.guidance.max_step])
guidance.do_update_step(0, 0)

one = torch.ones(2, device=device)
c2w = c2w_from_bearing(torch.tensor([10.0, 130.0]), -15 * torch.ones(2), 3 * torch.ones(2))
batch = camera_batch(c2w.to(device), 0.76 * one, 32, 32)
points = batch["rays_o"] + 2.6 * batch["rays_d"]
geometry.do_update_step(0, 0)
values = geometry(points.reshape(-1, 3), output_normal=True)
rgb = values["features"].sigmoid().reshape(2, 32, 32, 3) * values["density"].reshape(2, 32, 32, 1)
rgb = rgb.clamp(0, 1)
torch.manual_seed(5)
result = guidance(rgb, prompts(), **batch, rgb_as_latents=False)
result["loss_sds"].backward()
out["scalars"] = [k for k, v in result.items() if torch.as_tensor(v).numel() == 1]
out["gradients"] = [bool(p.grad.abs().sum() > 0) for p in geometry.parameters()]

direct = GPSGuidance(GPSGuidanceConfig(**OmegaConf.to_container(system.guidance)), device)
torch.manual_seed(5)
again = direct(rgb.detach(), prompts(), **batch, rgb_as_latents=False)
out["same"] = all(torch.equal(torch.as_tensor(again[k]), torch.as_tensor(result[k])) for k in again)

far = torch.tensor([[0.0, 0.0, 1.5], [2.0, 0.0, 0.0]], device=device)
near = torch.zeros(1, 3, device=device)
out["outside"] = geometry.forward_density(far).sum().item() + geometry(far)["density"].sum().item()
out["inside"] = geometry.forward_density(near).item()
field, deformation = geometry.forward_field(near)
out["level"] = geometry.forward_level(field, field.item() - 1.0).item()
out["export"] = list(geometry.export(near)["features"].shape)
geometry.double()
out["moved"] = geometry.field.start.dtype == geometry.levels[0].dtype == torch.float64

out["errors"] = []
for name in first:
    try:
        threestudio.find(name)(OmegaConf.create({"no_such_key": 1}))
    except TypeError as error:
        out["errors"].append("no_such_key" in str(error))

from threestudio.models.renderers.nerf_volume_renderer import NeRFVolumeRenderer
out["renderer"] = isinstance(NeRFVolumeRenderer.__dict__.get("randomized"), property)
print("RESULT", json.dumps(out))
'''

REFUSE = '''
import importlib, json, sys

import launch, threestudio

if "--without-package" in sys.argv:
    sys.modules["gps_guidance"] = None
launch.load_custom_modules()
out = {"torch": "torch" in sys.modules}
try:
    threestudio.find("gps-sds-guidance")({})
except ImportError as error:
    out["message"] = str(error)

register = importlib.import_module("threestudio-gps.requirements").register
out["replaced"] = register("gps-sds-guidance")(int) is threestudio.find("gps-sds-guidance") is int
out["second"] = register("gps-sds-guidance")(type("int", (), {})) is int
try:
    register("gps-sds-guidance")(float)
except ValueError as error:
    out["conflict"] = str(error)
print("RESULT", json.dumps(out))
'''


def run(folder, script, *args, **environment):
    """Run a script in a folder of threestudio with our package importable; its JSON."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, args)], cwd=folder, text=True,
        capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stdout + done.stderr
    return json.loads(lines[-1].removeprefix("RESULT ")), done.stdout


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder as threestudio's, with the extension linked in twice under different names."""
    folder = tmp_path_factory.mktemp("threestudio")
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "custom").mkdir()
    for name in ("threestudio-gps", "threestudio-gps-again"):
        (folder / "custom" / name).symlink_to(EXTENSION, target_is_directory=True)
    return folder


def check_build(found):
    """What the extension must do, whatever threestudio it is loaded by."""
    assert found["names"] == ["gps-prompt-processor", "gps-pyramid-grid", "gps-sds-guidance"]
    assert found["parameters"] == [f"levels.{k}" for k in range(4)]
    assert found["state"] == ["bbox", *found["parameters"]]
    assert found["fields"] == [True, True, True]
    assert found["threshold"] == 10.0  # the field's own default, not threestudio's
    assert found["schedule"] == [[980, 980], [740, 860], [20, 500]]
    assert {"loss_sds", "loss_sds_img", "grad_norm", "nan_grads"} <= set(found["scalars"])
    assert found["gradients"] == [True] * 4
    assert found["same"]
    assert found["outside"] == 0.0 < found["inside"]
    assert found["level"] == pytest.approx(-1.0)
    assert found["export"] == [1, 3]
    assert found["moved"]
    assert found["errors"] == [True] * 3
    assert found["renderer"]


def test_the_shipped_config_builds_and_trains(stand_in, tiny_angle_model):
    yaml = ROOT / "threestudio_configs" / "gps-sds-pisa.yaml"
    found, _ = run(stand_in, BUILD, yaml, tiny_angle_model)
    check_build(found)


@pytest.mark.slow
def test_a_real_threestudio(tmp_path, tiny_angle_model):
    """A twin of the clone, which stays as it is: its files by links, but for ``custom/``."""
    folder = os.environ.get("THREESTUDIO_PATH")
    if not folder:
        pytest.skip("THREESTUDIO_PATH is not set: tested against the stand-in only")
    twin = tmp_path / "threestudio"
    (twin / "custom").mkdir(parents=True)
    for path in Path(folder).resolve().iterdir():
        if path.name != "custom":
            (twin / path.name).symlink_to(path)
    (twin / "custom" / "threestudio-gps").symlink_to(EXTENSION, target_is_directory=True)
    yaml = ROOT / "threestudio_configs" / "gps-sds-pisa.yaml"
    found, _ = run(twin, PREPARE + BUILD, yaml, tiny_angle_model)
    check_build(found)


def test_a_missing_package_is_named_with_its_remedy_and_again_when_it_is_needed(stand_in):
    found, printed = run(stand_in, REFUSE, "--without-package")
    wanted = f'-m pip install -e "{ROOT}"'
    assert wanted in found["message"] and wanted in printed
    assert not found["torch"]
    assert found["replaced"] and found["second"]
    assert "gps-sds-guidance" in found["conflict"]


def test_an_old_threestudio_is_refused(stand_in):
    found, _ = run(stand_in, REFUSE, STAND_IN_VERSION="0.1.0")
    assert "threestudio >= 0.2.0, this is 0.1.0" in found["message"]

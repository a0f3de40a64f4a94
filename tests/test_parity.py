"""The portable engine against real threestudio, number by number, from one field.

    THREESTUDIO_PATH=clone pytest -m slow tests/test_parity.py

The clone stays as it is; its packages are those of ``pip install "gps-guidance[threestudio]"``.
Both draw random numbers in the same order, but for where samples lie along a ray: ours are put
where threestudio's are.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from gps_guidance.lift.cameras import bearing_from_c2w
from gps_guidance.lift.config import load_config
from gps_guidance.lift.plan import build_system, make_plan
from gps_guidance.lift.sds import schedule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOW = (2, 150)  # epoch and step at which everything is compared
SEEDS = (0, 1, 2, 3)
SHADINGS = ("albedo", "textureless", "diffuse")
SCHEDULES = [0.3, [0.1, 0.9, 200], [100, 1.0, 0.2, 300], [0, 0.0, 1.0, 3.0],
             [0, 0.1, 0.5, 100, 0.9, 200], [10, 0.98, 0.5, 100, 0.1, 200, 0.3, 400]]
WHEN = [(0, 0), (0, 50), (1, 100), (2, 150), (3, 201), (5, 1000)]
VIEWS = [[10.0, 70.0, -15.0], [0.0, 20.0, 170.0], [3.0, 3.0, 3.0]]  # elevation, azimuth, distance


@pytest.fixture(scope="module")
def clone() -> Path:
    folder = os.environ.get("THREESTUDIO_PATH")
    if not folder:
        pytest.skip("THREESTUDIO_PATH does not name a clone of threestudio")
    return Path(folder).resolve()


def config(guidance: str, estimator: str) -> dict[str, Any]:
    """Everything that an engine can differ in, small: 12 x 16 pixels."""
    ours = guidance == "gps-sds-guidance"
    return {
        "name": "parity", "tag": "t", "use_timestamp": False, "exp_root_dir": "out", "seed": 0,
        "data_type": "random-camera-datamodule",
        "data": {"batch_size": 3, "width": 16, "height": 16, "eval_width": 16, "eval_height": 16,
                 "camera_distance_range": [2.4, 3.0], "elevation_range": [-20, 30],
                 "fovy_range": [40, 50], "n_val_views": 2, "n_test_views": 3,
                 "eval_camera_distance": 2.7, "eval_fovy_deg": 45.0},
        "system_type": "dreamfusion-system",
        "system": {
            "geometry_type": "implicit-volume",
            "geometry": {
                "radius": 1.2, "normal_type": "pred", "density_bias": "blob_magic3d",
                "density_blob_scale": 5.0, "density_blob_std": 0.8,
                "pos_encoding_config": {"otype": "ProgressiveBandFrequency", "n_frequencies": 4,
                                        "n_masking_step": 300},
                "mlp_network_config": {"otype": "VanillaMLP", "activation": "ReLU",
                                       "output_activation": "none", "n_neurons": 16,
                                       "n_hidden_layers": 2},
            },
            "material_type": "diffuse-with-point-light-material",
            "material": {"ambient_only_steps": 100},
            "background_type": "neural-environment-map-background",
            "background": {"dir_encoding_config": {"otype": "ProgressiveBandFrequency",
                                                   "n_frequencies": 2}},
            "renderer_type": "nerf-volume-renderer",
            "renderer": {"radius": 1.2, "num_samples_per_ray": 32, "estimator": estimator,
                         "num_samples_per_ray_importance": 16, "near_plane": 0.2,
                         "far_plane": 5.4, "grid_prune": False},
            "prompt_processor_type": "gps-prompt-processor" if ours else
                                     "stable-diffusion-prompt-processor",
            "prompt_processor": {
                "pretrained_model_name_or_path":
                    "${system.guidance.pretrained_model_name_or_path}",
                "prompt": "A photo" if ours else "a", "use_cache": False, "spawn": False},
            "guidance_type": guidance,
            "guidance": {
                "pretrained_model_name_or_path": "???", "guidance_scale": 7.5,
                "half_precision_weights": False, "grad_clip": [0, 2.0, 8.0, 1000],
                "min_step_percent": [0, 0.98, 0.02, 400], "max_step_percent": [0, 0.98, 0.5, 400],
                "use_img_loss": ours,
            },
            "loss": {"lambda_sds": 1.0, "lambda_orient": [0, 10.0, 1000.0, 500],
                     "lambda_sparsity": 1.0, "lambda_opaque": 0.5, "lambda_z_variance": 0.3}
                    | ({"lambda_sds_img": 0.1} if ours else {}),
            "optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        },
        "trainer": {"max_steps": 10, "precision": "32-true"}, "checkpoint": {},
    }


class Compared:
    """One config in both engines: what threestudio found, and our system with the same field."""

    def __init__(self, clone: Path, folder: Path, guidance: str, estimator: str,
                 model: Path) -> None:
        self.guidance = guidance
        path = folder / "parity.yaml"
        path.write_text(yaml.safe_dump(config(guidance, estimator)))
        overrides = [f"system.guidance.pretrained_model_name_or_path={model}",
                     f"exp_root_dir={folder}"]
        # threestudio's own guidance works at 512 pixels whatever the model
        at_512 = ["system.guidance.resolution=512"] if guidance.startswith("stable") else []
        plan = make_plan(load_config(str(path), [*overrides, *at_512]))
        self.system, (data, cfg) = build_system(plan), plan.parts["data"]
        self.data = data(cfg)
        job = {"config": str(path), "overrides": overrides, "schedules": SCHEDULES, "when": WHEN,
               "seeds": SEEDS, "now": NOW, "shadings": SHADINGS, "views": VIEWS}
        (folder / "job.json").write_text(json.dumps(job))
        field = {part: [p.detach() for p in getattr(self.system, part).parameters()]
                 for part in ("geometry", "background")}
        torch.save(field, folder / "field.pt")
        host = Path(__file__).with_name("parity_host.py")
        done = subprocess.run([sys.executable, str(host), str(folder)], cwd=clone,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        self.found = load_file(folder / "found.safetensors")
        self.system.on_fit_start()
        self.system._restored = NOW  # what `weight` takes for the present
        self.system.update_parts(*NOW)
        self.system.renderer.wants_normals = True

    def cameras(self, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return self.data.sample(*NOW)

    def use_samples(self, prefix: str, rays: int) -> None:
        """Put our samples where threestudio's of one forward pass are."""
        ray = self.found[f"{prefix}.ray_indices"]
        middle = self.found[f"{prefix}.t_points"][:, 0]
        half = self.found[f"{prefix}.t_intervals"][:, 0] / 2
        counts = torch.bincount(ray, minlength=rays)
        edges = torch.zeros(rays, int(counts.max()) + 1)
        for k in range(rays):
            own = ray == k
            if own.any():
                ends = torch.cat([(middle - half)[own][:1], (middle + half)[own]])
                edges[k, : len(ends)], edges[k, len(ends):] = ends, ends[-1]
        self.system.renderer._edges = lambda origins, directions: edges

    def close(self, name: str, ours: Any, tolerance: float = 1e-4) -> None:
        theirs = self.found[name].float()
        mine = torch.as_tensor(ours).detach().float().reshape(theirs.shape)
        scale = float(theirs.abs().max().clamp_min(1.0))
        worst = float((mine - theirs).abs().max())
        assert worst <= tolerance * scale, f"{name}: off by {worst:g} of {scale:g}"


@pytest.fixture(scope="module", params=["gps-sds-guidance", "stable-diffusion-guidance"])
def compared(request: Any, clone: Path, tmp_path_factory: Any, tiny_angle_model: Path) -> Compared:
    estimator = "importance" if request.param == "gps-sds-guidance" else "occgrid"
    return Compared(clone, tmp_path_factory.mktemp("parity"), request.param, estimator,
                    tiny_angle_model)


def test_schedules(compared):
    for k, value in enumerate(SCHEDULES):
        compared.close(f"schedule.{k}", [schedule(value, epoch, step) for epoch, step in WHEN])


def test_random_cameras(compared):
    for seed in SEEDS:
        batch = compared.cameras(seed)
        names = {key.split(".", 2)[2] for key in compared.found if key.startswith(f"train.{seed}.")}
        assert names >= {"rays_o", "rays_d", "c2w", "mvp_mtx", "fovy", "light_positions"}
        for name in names:
            compared.close(f"train.{seed}.{name}", batch[name])


def test_views_of_validation_and_test(compared):
    for split in ("val", "test"):
        loader = getattr(compared.data, f"{split}_dataloader")()
        for k, batch in enumerate(loader):
            for key in compared.found:
                if key.startswith(f"{split}.{k}."):
                    compared.close(key, batch[key.split(".", 2)[2]])


def test_the_model_is_told_where_the_rendered_cameras_stand(compared):
    """Not where they were asked to stand: threestudio perturbs them."""
    if compared.guidance != "gps-sds-guidance":
        assert "received" not in compared.found
        return
    c2w = compared.found[f"train.{SEEDS[0]}.c2w"]
    seen = torch.rad2deg(torch.atan2(c2w[:, 0, 3], c2w[:, 1, 3])) % 360
    compared.close("received", 10 * (seen / 10).round() % 360)
    asked = (90 - compared.found[f"train.{SEEDS[0]}.azimuth"]) % 360
    assert not torch.allclose(seen, asked, atol=0.1)
    assert torch.allclose(bearing_from_c2w(c2w), seen, atol=1e-3)


@pytest.mark.parametrize("shading", SHADINGS)
def test_renders_losses_and_gradients(compared, shading):
    system, found = compared.system, compared.found
    batch = compared.cameras(SEEDS[0])
    compared.use_samples(f"{shading}.out", 3 * 16 * 16)
    system.train()
    system.zero_grad()
    forward = system.material.forward
    system.material.forward = lambda *a, **k: forward(*a, **k | {"shading": shading})
    try:
        out = system(batch)
    finally:
        system.material.forward = forward
    for name in ("comp_rgb", "comp_rgb_fg", "comp_rgb_bg", "opacity", "depth", "z_variance"):
        compared.close(f"{shading}.out.{name}", out[name])
    torch.manual_seed(7)
    terms, facts = system.guidance_terms(out, batch)
    terms |= system.regularisers(out)
    assert {f"{shading}.train/loss_{name}" for name in terms} <= found.keys()
    for name, value in terms.items():
        compared.close(f"{shading}.train/loss_{name}", value)
        weight = system.weight(f"lambda_{name}")
        compared.close(f"{shading}.train_params/lambda_{name}", weight)
    for name in ("grad_norm", "min_step", "max_step"):
        compared.close(f"{shading}.train/{name}", facts[name])
    loss = sum(value * system.weight(f"lambda_{name}") for name, value in terms.items())
    compared.close(f"{shading}.loss", loss)
    loss.backward()
    for part in ("geometry", "background"):
        for k, parameter in enumerate(getattr(system, part).parameters()):
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            compared.close(f"{shading}.grad.{part}.{k}", grad)


def test_the_prompts(compared):
    embedded: Tensor = compared.system.prompt_processor().get_text_embeddings(
        *(torch.tensor(values) for values in VIEWS), True)
    compared.close("text", embedded)


# --- twenty steps by each engine's own launch.py --------------------------------------------------


@pytest.mark.parametrize("engine", ["portable", "threestudio"])
def test_twenty_steps_by_its_own_launch(engine, clone, tmp_path, tiny_angle_model):
    where = ["--threestudio", str(clone)] if engine == "threestudio" else []
    small = ["trainer.max_steps=20", "trainer.val_check_interval=10",
             "trainer.log_every_n_steps=1", "data.width=16", "data.height=16", "data.batch_size=1",
             "data.resolution_milestones=[]", "data.eval_width=16", "data.eval_height=16",
             "data.n_val_views=1", "data.n_test_views=3", "use_timestamp=false",
             f"exp_root_dir={tmp_path}",
             f"system.guidance.pretrained_model_name_or_path={tiny_angle_model}"]
    before = sorted(path.name for path in (clone / "custom").iterdir())
    done = subprocess.run(
        [sys.executable, "launch.py", "--config", "gps-sds-pisa", "--train", "--engine", engine,
         *where, *small], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    trial = tmp_path / "gps-sds-pisa" / "miniature"
    for name in ("cmd.txt", "configs/parsed.yaml", "ckpts/last.ckpt", "save/it20-test.mp4",
                 "save/it20-test/2.png", "save/it10-0.png"):
        assert (trial / name).is_file(), name
    (log,) = trial.glob("csv_logs/*/metrics.csv")
    with open(log, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss_sds")]
    assert len(rows) == 20
    assert all(float(row["train/loss_sds"]) >= 0 for row in rows)
    assert sorted(path.name for path in (clone / "custom").iterdir()) == before

"""The portable engine end to end on a tiny real model: training, resuming, refusals, exit codes."""

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gps_guidance import geo
from gps_guidance.lift import engine, system
from gps_guidance.lift.config import ExperimentConfig, load_config
from gps_guidance.lift.plan import find_resume, make_plan
from gps_guidance.lift.threestudio import absolute_paths, choose_engine
from gps_guidance.miniature.photographer import take_photos
from gps_guidance.photos.ingest import ingest

ROOT = Path(__file__).parents[1]


def tiny_config(model: Path) -> dict:
    """8 x 8 renders of a 4 + 8 grid, 8 samples a ray, two test views."""
    return {
        "name": "tiny", "tag": "t", "use_timestamp": False, "exp_root_dir": "out", "seed": 3,
        "data_type": "random-camera-datamodule",
        "data": {
            "batch_size": 2, "width": 8, "height": 8, "eval_width": 8, "eval_height": 8,
            "n_val_views": 1, "n_test_views": 2, "camera_distance_range": [2.5, 2.5],
            "fovy_range": [40, 40], "elevation_range": [-20, 0], "camera_perturb": 0.0,
            "center_perturb": 0.0, "up_perturb": 0.0,
        },
        "system_type": "dreamfusion-system",
        "system": {
            "geometry_type": "gps-pyramid-grid",
            "geometry": {"radius": 1.0, "levels": [4, 8], "isosurface_resolution": 12,
                         "isosurface_threshold": "auto"},
            "material_type": "no-material",
            "material": {"requires_normal": True},
            "background_type": "solid-color-background",
            "background": {},
            "renderer_type": "nerf-volume-renderer",
            "renderer": {"radius": 1.0, "num_samples_per_ray": 8},
            "guidance_type": "gps-sds-guidance",
            "guidance": {"pretrained_model_name_or_path": str(model), "guidance_scale": 3.0,
                         "max_step_percent": [0, 0.98, 0.5, 6]},
            "prompt_processor_type": "gps-prompt-processor",
            "prompt_processor": {"pretrained_model_name_or_path": str(model)},
            "loss": {"lambda_sds": 1.0, "lambda_orient": [0, 0.1, 1.0, 6], "lambda_sparsity": 0.1,
                     "lambda_opaque": 0.1},
            "optimizer": {"name": "Adam", "args": {"lr": 0.05, "betas": [0.9, 0.99]},
                          "params": {"geometry.levels.0": {"lr": 0.05},
                                     "geometry.levels.1": {"lr": 0.01}}},
            "scheduler": {"name": "ExponentialLR", "interval": "step", "args": {"gamma": 0.9}},
            "exporter": {"fmt": "glb"},
        },
        "trainer": {"max_steps": 6, "val_check_interval": 3, "num_sanity_val_steps": 0,
                    "log_every_n_steps": 1, "enable_progress_bar": False},
        "checkpoint": {"save_last": True, "save_top_k": -1, "every_n_train_steps": 3},
    }


@pytest.fixture
def config(tmp_path, tiny_angle_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_angle_model)))
    return path


def record_losses(monkeypatch):
    """(global step, loss) of every training step from now on, in order."""
    seen = []
    original = system.DreamFusionSystem.training_step

    def recorded(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        seen.append((self.global_step, loss.item()))
        return loss

    monkeypatch.setattr(system.DreamFusionSystem, "training_step", recorded)
    return seen


@pytest.fixture
def losses(monkeypatch):
    return record_losses(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_angle_model):
    """An uninterrupted run of six steps: (its losses, its trial folder)."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tiny_angle_model)))
        seen = record_losses(patch)
        assert run(path, "train") == 0
    return seen, folder / "out" / "tiny" / "t"


@pytest.fixture
def messages(caplog):
    """Warnings and errors of the package, as the user reads them."""
    caplog.set_level(logging.INFO, logger="gps_guidance")
    return lambda: "\n".join(r.getMessage() for r in caplog.records)


def run(config, mode, *overrides):
    return engine.launch(["--config", str(config), f"--{mode}", "--gpu", "cpu", "--engine",
                          "portable", *overrides])


def test_training_writes_threestudios_trial_folder(straight):
    losses, trial = straight
    assert [step for step, _ in losses] == list(range(6))
    assert all(math.isfinite(loss) for _, loss in losses)
    for name in ("cmd.txt", "configs/raw.yaml", "configs/parsed.yaml", "ckpts/last.ckpt",
                 "ckpts/epoch=0-step=3.ckpt", "ckpts/epoch=0-step=6.ckpt", "save/it3-0.png",
                 "save/it6-0.png", "save/it6-test/0.png", "save/it6-test/1.png",
                 "save/it6-test.mp4", "save/it6-test-grid.png", "csv_logs/version_0/metrics.csv"):
        assert (trial / name).is_file(), name
    assert not (trial / "code").exists()  # photos beside the code must not leak into a trial
    saved = torch.load(trial / "ckpts/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert {k.split(".")[0] for k in saved["state_dict"]} <= {
        "geometry", "material", "background", "renderer"}
    header = (trial / "csv_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert {"train/loss_sds", "train/loss_orient", "train_params/lambda_orient"} <= set(
        header.split(","))


def test_a_stopped_and_resumed_run_repeats_the_losses_bit_for_bit(config, losses, straight):
    assert run(config, "train", "trainer.max_steps=3") == 0
    assert run(config, "train", "resume=last") == 0
    assert losses == straight[0]
    ends = [torch.load(trial / "ckpts/last.ckpt", weights_only=True)
            for trial in (straight[1], Path("out/tiny/t"))]
    for key, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][key]), key
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert not list(Path("out/tiny/t/ckpts").glob("last-v*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_that_resumes_exactly(
        config, losses, straight, monkeypatch, messages, number):
    original = system.DreamFusionSystem.on_train_batch_start

    def signalled(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.global_step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(system.DreamFusionSystem, "on_train_batch_start", signalled)
    before = signal.getsignal(signal.SIGINT)
    assert run(config, "train") == 130
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(system.DreamFusionSystem, "on_train_batch_start", original)
    assert len(losses) == 4  # the step in which the signal came was finished
    checkpoint = os.path.join("out", "tiny", "t", "ckpts", "last.ckpt")
    parsed = os.path.join("out", "tiny", "t", "configs", "parsed.yaml")
    assert f"python launch.py --config {parsed} --train resume={checkpoint}" in messages()
    assert run(parsed, "train", f"resume={checkpoint}") == 0
    assert losses == straight[0]


def test_a_signal_during_validation_also_resumes_exactly(config, losses, straight, monkeypatch):
    original = system.DreamFusionSystem.validation_step

    def signalled(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(system.DreamFusionSystem, "validation_step", signalled)
    assert run(config, "train") == 130
    assert len(losses) == 3
    monkeypatch.setattr(system.DreamFusionSystem, "validation_step", original)
    assert run(config, "train", "resume=last") == 0
    assert losses == straight[0]


def test_ctrl_c_in_a_real_process_leaves_no_traceback(config):
    code = (
        "import os, signal, sys\n"
        "from gps_guidance.lift import engine, system\n"
        "step = system.DreamFusionSystem.training_step\n"
        "def signalled(self, batch, index):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self, batch, index)\n"
        "system.DreamFusionSystem.training_step = signalled\n"
        "sys.exit(engine.launch(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(config), "--train", "--gpu", "cpu"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "Resume with: python launch.py" in done.stderr


def test_seconds_add_up_over_a_resume(config):
    assert run(config, "train", "trainer.max_steps=2", "checkpoint.every_n_train_steps=1") == 0
    saved = torch.load("out/tiny/t/ckpts/last.ckpt", weights_only=True)
    saved["gps_guidance"]["seconds"] = 1000.0
    torch.save(saved, "out/tiny/t/ckpts/last.ckpt")
    assert run(config, "train", "trainer.max_steps=3", "resume=last",
               "checkpoint.every_n_train_steps=1") == 0
    assert 1000 < torch.load("out/tiny/t/ckpts/last.ckpt", weights_only=True)[
        "gps_guidance"]["seconds"] < 1100


def test_validate_test_and_export_use_the_checkpoints_step(config):
    assert run(config, "train", "trainer.max_steps=3") == 0
    checkpoint = "resume=out/tiny/t/ckpts/epoch=0-step=3.ckpt"
    save = Path("out/tiny/t/save")
    trained = (save / "it3-test/1.png").read_bytes()
    (save / "it3-0.png").unlink()
    (save / "it3-test/1.png").unlink()
    assert run(config, "validate", checkpoint) == 0
    assert (save / "it3-0.png").is_file()
    assert run(config, "test", checkpoint) == 0
    assert (save / "it3-test/1.png").read_bytes() == trained
    assert run(config, "export", checkpoint) == 0
    assert (save / "it3-export/model.glb").is_file()


def test_weights_start_another_run_without_its_optimiser(config, losses):
    assert run(config, "train", "trainer.max_steps=3") == 0
    assert run(config, "train", "tag=second", "trainer.max_steps=1",
               "system.weights=out/tiny/t/ckpts/last.ckpt") == 0
    assert [step for step, _ in losses] == [0, 1, 2, 0]


def test_milestones_change_the_render_size(config, monkeypatch):
    sizes = []
    original = system.DreamFusionSystem.guidance_terms

    def recorded(self, out, batch):
        sizes.append(tuple(out["comp_rgb"].shape[:3]))
        return original(self, out, batch)

    monkeypatch.setattr(system.DreamFusionSystem, "guidance_terms", recorded)
    assert run(config, "train", "data.height=[4,8]", "data.width=[4,8]", "data.batch_size=[2,1]",
               "data.resolution_milestones=[2]", "trainer.max_steps=4") == 0
    assert sizes == [(2, 4, 4), (2, 4, 4), (1, 8, 8), (1, 8, 8)]


@pytest.mark.parametrize("override, message", [
    ("system.geometry_type=gps-pyramid-gird", "Did you mean 'gps-pyramid-grid'"),
    ("data_type=nothing-like-it", "data_type is 'nothing-like-it'"),
    ("system.geometry.radus=1", "Unknown key system.geometry.radus = 1. Did you mean 'radius'"),
    ("system.renderer.num_samples_per_ray=many", "system.renderer.num_samples_per_ray is 'many'"),
    ("system.losss.lambda_sds=1", "Unknown key system.losss"),
    ("system.loss.lambda_sparse=1", "Did you mean 'lambda_sparsity'"),
    ("system.loss.lambda_sds=[1,2]", "system.loss.lambda_sds is [1, 2]"),
    ("trainer.max_step=1", "Unknown key trainer.max_step = 1. Did you mean 'max_steps'"),
    ("trainer.devices=2", "trainer.devices is set by the engine"),
    ("checkpoint.every_n_steps=2", "Unknown key checkpoint.every_n_steps"),
    ("system.optimizer.name=Adm", "Did you mean 'Adam'"),
    ("system.optimizer.args.learning_rate=1", "system.optimizer (Adam)"),
    ("system.optimizer.params.geometri={lr: 0.1}", "Did you mean 'geometry'"),
    ("system.scheduler.name=ExponentialLRs", "Did you mean 'ExponentialLR'"),
    ("system.geometry_convert_from=a.ckpt", "system.geometry_convert_from"),
    ("system.guidance.pretrained_model_name_or_path=nowhere", "no model folder 'nowhere'"),
    ("system.weights=nowhere.ckpt", "nowhere.ckpt"),
    ("resume=nowhere.ckpt", "resume=nowhere.ckpt: there is no such file"),
    ("resume=last", "there is no checkpoint"),
    ("trainer.max_steps=-1", "trainer.max_steps is missing"),
    ("system.exporter.fmt=fbx", "system.exporter.fmt is 'fbx'"),
])
def test_what_is_wrong_is_one_line_and_exit_2(config, messages, capfd, override, message):
    assert run(config, "train", override) == 2
    assert message in messages()
    assert "Traceback" not in capfd.readouterr().err


def test_a_loss_of_the_guidance_without_a_lambda_is_refused(config, messages):
    values = yaml.safe_load(config.read_text())
    values["system"]["guidance"]["use_img_loss"] = True
    config.write_text(yaml.safe_dump(values))
    assert run(config, "train") == 2
    assert "system.loss.lambda_sds_img is missing" in messages()
    del values["system"]["loss"]["lambda_orient"]
    config.write_text(yaml.safe_dump(values))
    assert run(config, "train") == 2
    assert "system.loss.lambda_orient is missing" in messages()


def test_a_damaged_or_foreign_checkpoint_is_refused(config, messages):
    Path("bad.ckpt").write_bytes(b"not a checkpoint")
    assert run(config, "train", "resume=bad.ckpt") == 2
    assert run(config, "test", "resume=bad.ckpt") == 2
    assert messages().count("bad.ckpt is not a checkpoint") == 2
    assert run(config, "train", "trainer.max_steps=3") == 0
    assert run(config, "test", "resume=last", "system.geometry.levels=[4,6]") == 2
    assert "another geometry" in messages()
    assert run(config, "train", "resume=last", "system.geometry.levels=[4,6]") == 2
    assert run(config, "train", "resume=last", "system.geometry.levels=[4,8,8]") == 2


def test_flags(config, messages, capfd):
    assert engine.launch(["--config", str(config)]) == 2
    assert engine.launch(["--help"]) == 0
    assert engine.launch(["--config", str(config), "--train", "--gradio"]) == 2
    assert engine.launch(["--config", str(config), "--train", "--gpu", "0,1"]) == 2
    assert engine.launch(["--config", str(config), "--train", "--engine", "threestudio"]) == 2
    assert engine.launch(["--config", "nowhere", "--train"]) == 2
    said = messages()
    for part in ("--gradio", "runs on one device", "threestudio is not importable", "no such file"):
        assert part in said
    assert "report.html" in said and "gps-guidance demo" not in said
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def threestudio(tmp_path, monkeypatch):
    """A stand-in for a clone of threestudio: its launch.py writes down how it was called."""
    clone = tmp_path / "clone"
    (clone / "threestudio").mkdir(parents=True)
    (clone / "threestudio" / "__init__.py").touch()
    (clone / "launch.py").write_text(
        "import json, os, sys\n"
        "json.dump([os.getcwd(), *sys.argv[1:]], open('called.json', 'w'))\n"
        "sys.exit(7)\n")
    monkeypatch.syspath_prepend(str(clone))
    return clone


def test_threestudio_gets_the_same_command_in_its_own_folder(config, threestudio, messages):
    code = engine.launch(["--config", "tiny", "--train", "--engine", "threestudio", "--gpu", "1",
                          "--photos", "my-photos", "seed=5"])
    assert code == 7
    called = json.loads((threestudio / "called.json").read_text())
    assert Path(called[0]).samefile(threestudio)
    model = load_config(str(config)).system["guidance"]["pretrained_model_name_or_path"]
    assert called[1:] == ["--config", str(config.resolve()), "--train", "--gpu", "1", "seed=5",
                          f"exp_root_dir={Path.cwd() / 'out'}",
                          f"system.guidance.pretrained_model_name_or_path={model}",
                          f"system.prompt_processor.pretrained_model_name_or_path={model}"]
    assert "Engine: threestudio" in messages()
    assert "--photos my-photos is not used" in messages()


def test_relative_paths_hold_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/tower").mkdir(parents=True)
    Path("a.yaml").write_text("system:\n  weights: ???\n  guidance:\n"
                              "    pretrained_model_name_or_path: models/tower\n")
    assert absolute_paths(Path("a.yaml"), ["resume=none.ckpt", "exp_root_dir=here"]) == [
        f"exp_root_dir={tmp_path / 'here'}",
        f"system.guidance.pretrained_model_name_or_path={tmp_path / 'models' / 'tower'}"]


def test_threestudio_without_the_extension_is_not_chosen_by_itself(threestudio):
    assert choose_engine("auto") is None
    assert choose_engine("threestudio") == threestudio


def test_a_clone_within_our_own_is_not_taken_for_what_is_around_it(tmp_path, monkeypatch):
    """Python sees its folder, without __init__.py, as a package beside our launch.py."""
    (tmp_path / "threestudio").mkdir()
    (tmp_path / "launch.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choose_engine("auto") is None


def test_a_named_clone_is_used_or_refused(threestudio, tmp_path):
    assert choose_engine("auto", str(threestudio)) == threestudio.resolve()
    with pytest.raises(ValueError, match="no launch.py .* git clone"):
        choose_engine("threestudio", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="leave it out"):
        choose_engine("portable", str(threestudio))


def test_photos_are_checked_before_a_long_run(config, messages, losses, tmp_path):
    assert run(config, "train", "--photos", "nowhere") == 2
    assert "nowhere is not a dataset folder" in messages()
    take_photos(tmp_path / "raw", 2, 0, 1)
    ingest([tmp_path / "raw"], tmp_path / "city", bounds=geo.Bounds(43, 10, 44, 11),
           progress=False)
    assert run(config, "train", "--photos", "city") == 2
    assert "--photos city: its photos have no bearings" in messages()
    assert not losses


def test_the_command_that_resumes_keeps_the_flags(config, messages, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run(config, "train", "trainer.max_steps=3") == 0
    monkeypatch.setattr(system.export, "write_video", full)
    assert run(config, "test", "resume=last", "--no-report") == 1
    said = messages()
    assert "--test resume=" in said
    assert said.rstrip().endswith("--gpu cpu --engine portable --no-report")


def test_engine_device_and_model_are_logged(config, messages, tiny_angle_model):
    assert run(config, "validate") == 0
    assert f"Engine: portable. Device: cpu. Model: {tiny_angle_model}" in messages()


def test_a_full_disk_is_one_message_and_leaves_the_old_checkpoint(config, messages, monkeypatch):
    assert run(config, "train", "trainer.max_steps=3") == 0
    before = Path("out/tiny/t/ckpts/last.ckpt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gps_guidance.lift.callbacks.torch.save", full)
    assert run(config, "train", "resume=last") == 1
    assert "The disk is full" in messages() and "Resume with" in messages()
    assert Path("out/tiny/t/ckpts/last.ckpt").read_bytes() == before
    assert not list(Path("out/tiny/t/ckpts").glob(".*"))


@pytest.mark.parametrize("requested, device, used", [
    ("16-mixed", "cpu", "32-true"), (16, "cpu", "32-true"), ("16-mixed", "mps", "32-true"),
    ("16-mixed", "cuda", "16-mixed"), ("bf16-mixed", "cpu", "bf16-mixed"),
    ("bf16-mixed", "mps", "32-true"), (None, "cpu", "32-true"), (32, "cuda", 32),
])
def test_precision_falls_back_where_the_device_lacks_it(requested, device, used):
    assert engine.choose_precision(requested, device) == used


def test_half_precision_configs_train_on_a_cpu(config, messages, losses):
    assert run(config, "train", "trainer.precision=16-mixed", "trainer.max_steps=1") == 0
    assert "trainer.precision 16-mixed does not work on cpu" in messages()


def test_every_shipped_3d_config_is_accepted_as_it_is():
    for path in sorted((ROOT / "threestudio_configs").glob("*.yaml")):
        raw = yaml.safe_load(path.read_text())
        extra = []
        if raw["system"]["prompt_processor"].get("prompt") == "???":
            extra.append("system.prompt_processor.prompt=a tower")
        if raw["system"]["guidance"].get("pretrained_model_name_or_path") == "???":
            extra.append("system.guidance.pretrained_model_name_or_path=somewhere")
        make_plan(load_config(str(path), extra))


def test_the_bar_counts_steps_of_an_endless_loader(config, capfd):
    assert run(config, "train", "trainer.enable_progress_bar=true", "trainer.max_steps=3") == 0
    shown = capfd.readouterr().out
    assert "3/3" in shown and "loss=" in shown


def test_run_is_reported(straight):
    metrics = json.loads((straight[1] / "metrics.json").read_text())
    assert metrics["engine"] == "portable" and metrics["device"] == "cpu"
    assert metrics["seconds"] >= 0 and metrics["peak_memory_bytes"] > 1e7


@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_report_can_be_left_out(config, messages, mode):
    assert run(config, mode, "trainer.max_steps=1", "--no-report") == 0
    left = {path.name for path in Path("out/tiny/t").iterdir()}
    assert "save" in left and not left & {"metrics.json", "mesh.glb", "report.html", "report.png"}
    assert "Scores" not in messages()


def test_resume_goes_on_in_the_trial_that_the_checkpoint_belongs_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in ((30, "t@1"), (10, "t@2"), (0, "tower@3")):
        path = Path("out/tiny", name, "ckpts", "last.ckpt")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))

    def resumed(resume):
        cfg = ExperimentConfig(name="tiny", tag="t", exp_root_dir="out", resume=resume)
        find_resume(cfg)
        return Path(cfg.resume), Path(cfg.trial_dir).name

    newest = Path("out/tiny/t@2/ckpts/last.ckpt")
    assert resumed("last") == (newest, "t@2")
    older = "out/tiny/t@1/ckpts/last.ckpt"
    assert resumed(older) == (Path(older), "t@1")
    other = "out/tiny/tower@3/ckpts/last.ckpt"  # another tag: a new trial starts from it
    assert resumed(other)[1].startswith("t@2")  # the year
    with pytest.raises(ValueError, match="There is out"):
        resumed("out/tiny/t@1/ckpts/missing.ckpt")

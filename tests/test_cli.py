"""The command line: every verb, and errors that are one line and an exit code."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import quicken
from PIL import Image

from gps_guidance import checkpoints, cli, train
from gps_guidance.models import load_angle_model
from gps_guidance.photos.manifest import load_manifest
from gps_guidance.recipe import KINDS, as_written, load_recipe
from gps_guidance.sampling import sample_angles
from gps_guidance.scorers import AngleClassifier

CENTER = "43.722952,10.396597"
TINY = ["base=tiny", "resolution=16", "vae_steps=2", "vae_batch_size=2", "train_batch_size=2",
        "max_train_steps=4", "checkpointing_steps=2", "with_prior_preservation=false",
        "validation_steps=0", "crops_per_photo=1"]


def fails(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2, *, alone: bool = True
) -> str:
    """Run ``argv``, check its exit code, and return its one line of error.

    ``alone``: nothing else is on stderr (elsewhere a progress bar may come before it).
    """
    capsys.readouterr()
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = re.split(r"[\r\n]+", err.strip())
    said = [line for line in lines if line.startswith("gps-guidance: ")]
    assert len(said) == 1 and lines[-1] == said[0]
    if alone:
        assert lines == said
    return said[0].removeprefix("gps-guidance: ")


# --- verbs -----------------------------------------------------------------------------------


def test_miniature_then_ingest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["miniature", "--out", str(tmp_path / "p"), "--count", "3", "--seed", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p")
    assert len(list((tmp_path / "p").glob("*.jpg"))) == 3
    assert cli.main(["ingest", str(tmp_path / "p"), "--out", str(tmp_path / "d"), "--landmark",
                     "Miniature Tower of Pisa", "--center", CENTER, "--image-size", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 photos in {tmp_path / 'd'}"
    assert lines[1].split() == ["rejected", "1", "not_an_image"]  # truth.json
    bins = [line.split() for line in lines[2:38]]
    rows = load_manifest(tmp_path / "d").rows.to_pylist()
    counts = np.bincount([row["bin"] for row in rows], minlength=36)
    assert [(float(b[0]), int(b[2])) for b in bins] == [(10.0 * k, n) for k, n in enumerate(counts)]
    assert [len(b) > 3 for b in bins] == [n > 0 for n in counts]  # a bar where there are photos
    empty = ", ".join(str(10 * k) for k in np.flatnonzero(counts == 0))
    assert lines[38].startswith(f"No photo in the bins around {empty} degrees")
    assert max(rows[0]["width"], rows[0]["height"]) == 80


def test_ingest_options_reach_the_filters(
    miniature_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At -33.8, 151.2 there is no photo: the argument is read as a place, not as an option."""
    out = str(tmp_path / "d")
    error = fails(capsys, ["ingest", str(miniature_photos), "--out", out, "--landmark", "Opera",
                           "--center", "-33.8,151.2", "--max-distance", "1000"], alone=False)
    assert "12 x too_far" in error and "--max-distance" in error
    error = fails(capsys, ["ingest", str(miniature_photos), "--out", out, "--bbox",
                           "-34,151,-33,152"], alone=False)
    assert "12 x outside_bounds" in error
    assert cli.main(["ingest", str(miniature_photos), "--out", out, "--bbox", "43,10,44,11"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"12 photos in {out}",
                                                    "  rejected      1  not_an_image"]


def test_sample_writes_the_contact_sheet_of_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert cli.main(["sample", "miniature-pisa", "--steps", "2", "--bearing", "0", "-90", "180",
                     "--seed", "3", "--guidance-scale", "1.5", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        sheet = np.asarray(image.convert("RGB"))
    assert sheet.shape == (64, 3 * 64, 3)
    images = sample_angles(load_angle_model("miniature-pisa"), [0.0, -90.0, 180.0], 1.5, 2, 3)
    expected = torch.cat(list(images), dim=2).permute(1, 2, 0).numpy() * 255
    assert np.abs(sheet - expected).max() <= 1.0


def test_train_stops_at_ctrl_c_goes_on_and_gets_a_judge(
    miniature_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quicken(monkeypatch)
    out = tmp_path / "m"
    command = ["train", "angle", str(miniature_dataset), "--out", str(out), *TINY]
    loss = train.denoising_loss

    def press_ctrl_c(*args: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "denoising_loss", press_ctrl_c)
        said = fails(capsys, command, 130, alone=False)
    assert said == "stopped; the same command goes on from here."
    assert [p.name for p in (out / "checkpoints").glob("angle-*")] == ["angle-0000000"]

    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == f"model: {out}"
    assert load_angle_model(out).angle.size == (16, 16)
    assert "finished" in fails(capsys, command)

    from gps_guidance import scorers

    fit = scorers.fit_angle_classifier
    monkeypatch.setattr(scorers, "fit_angle_classifier",
                        lambda *args, **options: fit(*args, steps=2, batch_size=2, **options))
    assert cli.main(["train", "classifier", str(miniature_dataset), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == f"classifier: {out / 'angle_classifier'}"
    assert AngleClassifier.from_pretrained(out / "angle_classifier").config.num_bins == 36


@pytest.mark.parametrize(("flags", "plain"), [
    (["--train_batch_size", "8", "--gradient_checkpointing", "--condition_dropout=0.05"],
     ["train_batch_size=8", "gradient_checkpointing=true", "condition_dropout=0.05"]),
    (["--axis_embedding", "false", "--use_8bit_adam", "True", "--random_flip=true"],
     ["axis_embedding=false", "use_8bit_adam=true", "random_flip=true"]),
    (["--seed", "-3", "--resolution", "[96,64]", "--lora_target_modules=[to_q,to_v]"],
     ["seed=-3", "resolution=[96,64]", "lora_target_modules=[to_q,to_v]"]),
    (["--snr_gamma", "5", "--gps_learning_rate=1e-5", "--lora_rank=4", "--cache_dir", "null"],
     ["snr_gamma=5", "gps_learning_rate=1e-5", "lora_rank=4", "cache_dir=null"]),
])
def test_settings_in_the_style_of_diffusers(flags: list[str], plain: list[str]) -> None:
    """Wherever they stand, between the options that were there before."""
    common = ["--out", "m", "--recipe", "miniature-city"]
    wanted = load_recipe("miniature-city", plain, "gps")
    assert wanted != load_recipe("miniature-city", [], "gps")
    for words in ([*flags, "data", *common], ["data", *flags, *common], ["data", *common, *flags]):
        args = cli._parse(["train", "gps", *words])
        assert (args.kind, args.dataset, args.out, args.recipe) == (
            "gps", "data", "m", "miniature-city")
        assert load_recipe(args.recipe, args.overrides, args.kind) == wanted
    for name in ("--class-data-dir", "--class_data_dir"):
        args = cli._parse(["train", "angle", "data", "--out", "m", "--seed=1", name, "prior"])
        assert (args.class_data_dir, args.overrides) == ("prior", ["seed=1"])


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for kind in KINDS.values():
        for key, value in asdict(kind()).items():
            assert f"{key}={as_written(value)}" in text, key


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in cli.VERBS:
        assert re.search(rf"^ +{verb}\b", text, re.MULTILINE)
        assert cli.main([verb, "--help"]) == 0


# --- errors ----------------------------------------------------------------------------------


def test_a_missing_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, ["sample", str(tmp_path / "none"), "--out", str(tmp_path / "a.png")])
    assert f"no model folder '{tmp_path / 'none'}'" in error and "miniature-pisa" in error
    assert not (tmp_path / "a.png").exists()


def test_a_gps_model_where_an_angle_model_is_needed(
    tiny_gps_model: Path, miniature_dataset: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in (["sample", str(tiny_gps_model), "--out", str(tmp_path / "a.png")],
                 ["train", "classifier", str(miniature_dataset), "--out", str(tiny_gps_model)]):
        error = fails(capsys, argv)
        assert "GPS model of a city" in error and "angle model" in error


def test_an_unknown_recipe_or_key_or_value(
    miniature_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "angle", str(miniature_dataset), "--out", str(tmp_path / "m")]
    assert "'max_train_steps'?" in fails(capsys, [*command, "max_train_step=4"])
    assert "tiny-landmark" in fails(capsys, [*command, "--recipe", "no-such"])
    assert "Integer" in fails(capsys, [*command, "--recipe", "tiny-landmark", "seed=x"])
    assert "unrecognized arguments: seed" in fails(capsys, [*command, "seed"])
    error = fails(capsys, [*command, "--sede=3"])
    assert "unrecognized arguments: --sede=3. Did you mean --seed? See" in error
    error = fails(capsys, [*command, "--train-batch-size", "3"])
    assert "--train-batch-size 3. Did you mean --train_batch_size?" in error
    assert "--seed needs a value" in fails(capsys, [*command, "--seed"])
    assert "--seed needs a value" in fails(capsys, [*command, "--seed", "--dither_bins"])
    assert "key of `train gps`" in fails(capsys, [*command, "--gps_dropout", "0.1"])
    assert not (tmp_path / "m").exists()
    classifier = ["train", "classifier", str(miniature_dataset), "--out", str(tmp_path / "m")]
    assert "no recipe" in fails(capsys, [*classifier, "seed=3"])


def test_photos_without_gps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p").mkdir()
    for index in range(2):
        Image.new("RGB", (80, 80), (index, 0, 0)).save(tmp_path / "p" / f"{index}.jpg")
    error = fails(capsys, ["ingest", str(tmp_path / "p"), "--out", str(tmp_path / "d"),
                           "--landmark", "pisa"], alone=False)
    assert str(tmp_path / "p") in error and "2 x no_gps" in error and "originals" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--landmark", "Opera", "--center", "151.2,-33.8"], "latitude.*swap lat and lon?"),
        (["--landmark", "Opera", "--center", "43.7"], "'43.7' is not LAT,LON"),
        (["--landmark", "Opera", "--center", "nan,10"], "not finite"),
        (["--landmark", "Opera"], "'Opera' is not one of pisa.*--center LAT,LON"),
        (["--bbox", "44,10,43,11"], "south, west, north, east"),
        (["--bbox", "43,10,44"], "south,west,north,east"),
        (["--bbox", "43,10,44,11", "--center", CENTER], "--landmark"),
        (["--bbox", "43,10,44,11", "--max-distance", "50"], "--landmark"),
        ([], "--landmark --bbox --bounds is required"),
        (["--landmark", "pisa", "--min-size", "0"], "'0' is not a whole number of at least 1"),
        (["--landmark", "pisa", "--min-size", "many"], "'many' is not a whole number"),
        (["--landmark", "pisa", "a=b", "--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_a_wrong_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    error = fails(capsys, ["ingest", str(tmp_path), "--out", str(tmp_path / "d"), *options])
    assert re.search(message, error)


def test_a_place_that_cannot_be_written(
    miniature_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    error = fails(capsys, ["ingest", str(miniature_photos), "--out", str(tmp_path / "file"),
                           "--landmark", "pisa"])
    assert str(tmp_path / "file") in error


def test_a_full_disk_while_ingesting(
    miniature_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    error = fails(capsys, ["ingest", str(miniature_photos), "--out", str(tmp_path / "d"),
                           "--landmark", "pisa"], 1, alone=False)
    assert "disk is full" in error and "Make room" in error


def test_a_full_disk_while_training(
    miniature_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quicken(monkeypatch)

    def fail(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    error = fails(capsys, ["train", "angle", str(miniature_dataset), "--out", str(tmp_path / "m"),
                           *TINY, "vae_steps=5"], 1, alone=False)
    assert "disk is full" in error and "same command again" in error
    assert list((tmp_path / "m" / "checkpoints").iterdir()) == []


def test_a_log_file_gets_few_lines_of_progress(tmp_path):
    command = [sys.executable, "-m", "gps_guidance.cli", "miniature", "--world", "city",
               "--count", "300", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1 <= done.stderr.count("photo/s") <= 4

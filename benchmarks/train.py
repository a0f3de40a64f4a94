"""Images a second in training: ours against diffusers' own text-to-image script.

    python benchmarks/train.py [DIFFUSERS]   (or DIFFUSERS_PATH=DIFFUSERS)

DIFFUSERS is a checkout of huggingface/diffusers that fits the installed release; its
``examples/text_to_image/train_text_to_image.py`` runs as it is, and needs `pip install datasets
torchvision`. Both train the miniature's UNet in processes of their own, as a user would start them:
the same photos, captions, frozen VAE and text encoder, 64 pixels, batches of 16, AdamW, float32,
TensorBoard, neither moving average nor checkpoints.

Three lengths take the start-up away: hardly anything, one epoch and several. Theirs encodes each
photo and each caption whenever it comes by, ours once. The first epoch is the fair comparison
without a cache: either side encodes each photo once, and filling the cache counts. The epochs after
it are those with the cache. The two take turns, and a ratio is the median over the rounds.

What a cache saves is the VAE's share. Encoding a photo takes Stable Diffusion 0.46 of the
operations of its UNet's three passes (``train_flops.py``, 512 pixels). The goals are for a VAE that
is wide enough for that share beside this UNet, ``train.*``; the miniature's own, whose share is
0.16, is reported as ``train.small_vae_*``. Prints JSON lines {"name", "value", "goal", "ok"};
nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from stages import ROOT, line

SCRIPT = Path("examples/text_to_image/train_text_to_image.py")
PHOTOS, SIDE, BATCH, EPOCHS, ROUNDS = 512, 64, 16, 3, 5
RATE = 1e-4
VAES = {"": (32, 64, 96), "small_vae_": (16, 32, 64)}  # widths, by the prefix of their results
GOALS = {"first_epoch": 1.0, "cached": 1.4}


class Length(NamedTuple):
    """How much a run trains on: a dataset of so many photos, for so many steps."""

    photos: int
    steps: int


START = Length(BATCH, 1)
FIRST = Length(PHOTOS, PHOTOS // BATCH)
ALL = Length(PHOTOS, EPOCHS * PHOTOS // BATCH)


def write_photos(folder: Path, count: int) -> None:
    """The same photos twice: ``<count>`` as our dataset, ``<count>-images`` as an imagefolder."""
    from gps_guidance.miniature import city
    from gps_guidance.miniature.city_photographer import take_city_photos
    from gps_guidance.photos.ingest import ingest
    from gps_guidance.photos.manifest import load_manifest

    taken = take_city_photos(folder / f"{count}-taken", count)
    ingest([taken], folder / str(count), bounds=city.BOUNDS,
           keep_near_duplicates=True, progress=False)
    manifest = load_manifest(folder / str(count))
    images = folder / f"{count}-images"
    images.mkdir()
    with open(images / "metadata.jsonl", "w", encoding="utf-8") as table:
        for row in manifest.rows.select(["id", "file", "caption"]).to_pylist():
            path = manifest.root / row["file"]
            shutil.copy(path, images / path.name)
            table.write(json.dumps({"file_name": path.name, "text": row["caption"]}) + "\n")


def write_bases(folder: Path) -> None:
    """Untrained text models of the miniature's size that know the captions' words, one a VAE."""
    import torch

    from gps_guidance.dataset import load_photos
    from gps_guidance.miniature.nets import tiny_model, tiny_vae

    photos = load_photos(folder / str(PHOTOS), (SIDE, SIDE), need_bearings=False, in_memory=False)
    for name, widths in VAES.items():
        torch.manual_seed(0)
        model = tiny_model(sorted({caption or "" for caption in photos.captions}))
        model.vae = tiny_vae(widths)
        model.save_pretrained(folder / f"{name}base")


def vae_share(widths: tuple[int, ...]) -> float:
    """Operations of encoding a photo, as a share of those of training the UNet on it."""
    import torch
    from train_flops import forward_flops

    from gps_guidance.miniature.nets import MAX_TOKENS, TEXT_DIM, tiny_unet, tiny_vae

    with torch.device("meta"), torch.no_grad():
        encoding = forward_flops(tiny_vae(widths).encode, torch.zeros(1, 3, SIDE, SIDE))
        passing = forward_flops(tiny_unet(), torch.zeros(1, 4, SIDE // 4, SIDE // 4),
                                torch.zeros(1), torch.zeros(1, MAX_TOKENS, TEXT_DIM))
    return encoding / (3 * passing)


def our_command(base: Path, out: Path, length: Length) -> list[str]:
    return [
        "-m", "gps_guidance.cli", "train", "text", str(base.parent / str(length.photos)),
        "--out", str(out), f"base={base}", f"resolution={SIDE}",
        f"max_train_steps={length.steps}", f"train_batch_size={BATCH}", f"learning_rate={RATE}",
        "condition_dropout=0", "crops_per_photo=1", "min_zoom=1", "validation_steps=0",
        "checkpointing_steps=0", "report_to=tensorboard",
    ]


def their_command(script: Path, base: Path, out: Path, length: Length) -> list[str]:
    return [
        str(script), f"--pretrained_model_name_or_path={base}",
        f"--train_data_dir={base.parent / f'{length.photos}-images'}", f"--output_dir={out}",
        f"--resolution={SIDE}", f"--max_train_steps={length.steps}",
        f"--train_batch_size={BATCH}", f"--learning_rate={RATE}", "--lr_warmup_steps=0",
        "--mixed_precision=no", "--checkpointing_steps=1000000",
    ]


def seconds(command: list[str], out: Path) -> float:
    """Of one training, which is removed afterwards."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                                "HF_HOME": str(out.parent / "home")}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, env=environment,
                          stderr=subprocess.STDOUT, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    shutil.rmtree(out)
    return took


def speeds(took: dict[Length, float]) -> tuple[float, float]:
    """Images a second in the first epoch, and in those after it."""
    first = (FIRST.steps - START.steps) * BATCH / (took[FIRST] - took[START])
    return first, (ALL.steps - FIRST.steps) * BATCH / (took[ALL] - took[FIRST])


def compare(script: Path, base: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The ``speeds`` of both sides, ``ours`` and ``theirs``, in each round."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for turn in range(rounds):
        took: dict[str, dict[Length, float]] = {"ours": {}, "theirs": {}}
        for length in (START, FIRST, ALL):
            for side in sorted(took, reverse=bool(turn % 2)):
                out = base.parent / side
                command = (our_command(base, out, length) if side == "ours"
                           else their_command(script, base, out, length))
                took[side][length] = seconds(command, out)
        for side, times in took.items():
            found[side].append(speeds(times))
            shown = ", ".join(f"{value:.1f} s" for value in times.values())
            print(f"{base.name}, round {turn}, {side}: {shown}", file=sys.stderr)
    return found


def report(prefix: str, found: dict[str, list[tuple[float, float]]], with_goals: bool) -> bool:
    """Print medians over the rounds; whether the goals are met."""
    line(f"train.{prefix or 'vae_'}share", vae_share(VAES[prefix]))
    good = []
    for k, (name, goal) in enumerate(GOALS.items()):
        name = f"train.{prefix}{name}"
        for side, pairs in found.items():
            line(f"{name}_images_a_second_{side}", median(pair[k] for pair in pairs))
        ratios = [ours[k] / theirs[k] for ours, theirs in zip(*found.values(), strict=True)]
        good.append(line(f"{name}_speed_over_diffusers", median(ratios),
                         goal if with_goals else None))
    return all(good)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("diffusers", nargs="?", type=Path, help="a checkout of diffusers",
                        default=os.environ.get("DIFFUSERS_PATH"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if args.diffusers is None or not (Path(args.diffusers) / SCRIPT).is_file():
        raise SystemExit(f"{args.diffusers} is no checkout of diffusers: give its path, or set "
                         "DIFFUSERS_PATH.")
    missing = [name for name in ("datasets", "torchvision")
               if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"diffusers' script imports {' and '.join(missing)}: pip install "
                         f"{' '.join(missing)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (START.photos, PHOTOS):
            write_photos(folder, count)
        write_bases(folder)
        script = Path(args.diffusers) / SCRIPT
        good = [report(name, compare(script, folder / f"{name}base", args.rounds), not name)
                for name in VAES]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

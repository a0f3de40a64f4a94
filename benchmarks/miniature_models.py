"""The bundled models and judges of the miniature worlds, all from nothing.

    python benchmarks/miniature_models.py

Photographs the worlds, ingests, trains and bundles into ``outputs/miniature-models/bundled``, from
where the folders are copied to ``gps_guidance/miniature/models``. Hours on two CPU cores; a stage
that is finished is not run again, and one that was stopped goes on. Prints JSON lines {"name",
"value", "goal", "ok"}: minutes of one core for what the city's models take, and megabytes.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages import ROOT, line, stage

OUT = ROOT / "outputs" / "miniature-models"
CLI = ["-m", "gps_guidance.cli"]
CITY_BOX = "46.9955,15.9934,47.0045,16.0066"
TOWER = ["--landmark", "Miniature Tower of Pisa", "--center", "43.722952,10.396597"]
ARCH = ["--landmark", "Miniature Arc de Triomphe", "--center", "48.873792,2.295028"]
SMALL_JUDGE = ["base=tiny", "resolution=64", "max_train_steps=1500", "train_batch_size=128",
               "learning_rate=1e-3", "lr_warmup_steps=50", "save_dtype=float16"]
SCENE_JUDGE = ("import sys; from gps_guidance.miniature.scene_judge import train_scene_judge; "
               "train_scene_judge(sys.argv[1])")
BUNDLE = "import sys; from gps_guidance.bundles import bundle; bundle(*sys.argv[1:3], sys.argv[3:])"
# What shares parts comes after what it shares them with.
BUNDLES = {"miniature-pisa": [], "miniature-city-base": [],
           "miniature-city": ["miniature-city-base"],
           "miniature-city-address": ["miniature-city-base"],
           "miniature-monuments": ["miniature-pisa"],
           "miniature-arch": ["miniature-monuments", "miniature-pisa"],
           "miniature-arch-no-prior": ["miniature-monuments", "miniature-pisa"]}
MOST_MB, MOST_CITY_MINUTES = 15, 180


def at(name: str) -> str:
    return str(OUT / name)


def photograph(world: str, count: int, seed: int) -> float:
    return stage(OUT, f"photos-{world}-{seed}", [
        *CLI, "miniature", "--world", world, "--count", str(count), "--seed", str(seed),
        "--out", at(f"photos/{world}-{seed}")])


def ingest(name: str, albums: list[str], place: list[str]) -> float:
    return stage(OUT, f"dataset-{name}", [
        *CLI, "ingest", *(at(f"photos/{album}") for album in albums), *place,
        "--keep-near-duplicates", "--out", at(f"data/{name}")])


def train(kind: str, data: str, name: str, *words: str) -> float:
    return stage(OUT, name, [*CLI, "train", kind, at(f"data/{data}"), "--out", at(name), *words])


def base(name: str) -> str:
    return f"base={at(name)}"


def city() -> None:
    """The city's models; then those who judge them, on photos of every pair."""
    seconds = photograph("city", 6000, 0) + ingest("city", ["city-0"], [f"--bbox={CITY_BOX}"])
    seconds += train("text", "city", "miniature-city-base", "--recipe", "miniature-city-base")
    seconds += train("gps", "city", "miniature-city", "--recipe", "miniature-city",
                     base("miniature-city-base"))
    line("miniature_models.city_minutes", seconds / 60, MOST_CITY_MINUTES, below=True)
    cache = at("addresses.sqlite")
    stage(OUT, "addresses", [*CLI, "miniature", "--world", "city", "--count", "1", "--out",
                             at("photos/one"), "--addresses", cache])
    stage(OUT, "geocode", [*CLI, "geocode", at("data/city"), "--cache", cache, "--offline"])
    train("gps", "city", "miniature-city-address", "--recipe", "miniature-city-address",
          f"pretrained_vae_model_name_or_path={at('miniature-city-base')}")
    photograph("city-every-pair", 6000, 1000)
    ingest("judges", ["city-every-pair-1000"], [f"--bbox={CITY_BOX}"])
    train("gps-clip", "judges", "miniature-gps-clip", *SMALL_JUDGE)
    train("clip", "judges", "miniature-clip", "max_train_steps=2000", "save_dtype=float16")
    stage(OUT, "miniature-scene-judge", ["-c", SCENE_JUDGE, at("miniature-scene-judge")])


def landmarks() -> None:
    """The tower's model; the text model of monuments, and the arch's from it, both ways."""
    for world, count, seed in (("landmark", 3000, 0), ("landmark", 1000, 23), ("arch", 2000, 22),
                               ("monuments", 2000, 21)):
        photograph(world, count, seed)
    ingest("tower", ["landmark-0"], TOWER)
    ingest("arch", ["arch-22"], ARCH)
    ingest("monuments", ["arch-22", "landmark-23", "monuments-21"], ["--bbox=40,0,50,20"])
    train("angle", "tower", "miniature-pisa", "--recipe", "miniature-pisa")
    train("text", "monuments", "miniature-monuments", "--recipe", "miniature-monuments",
          f"pretrained_vae_model_name_or_path={at('miniature-pisa')}")
    arch = ["--recipe", "miniature-arch", base("miniature-monuments")]
    train("angle", "arch", "miniature-arch", *arch)
    train("angle", "arch", "miniature-arch-no-prior", *arch, "with_prior_preservation=false",
          "angle_dropout=0.1")
    for name, data in (("miniature-pisa", "tower"), ("miniature-arch", "arch")):
        stage(OUT, f"{name}-classifier", [*CLI, "train", "classifier", at(f"data/{data}"),
                                          "--out", at(name)])
    train("clip", "monuments", "miniature-clip-landmarks", "save_dtype=float16")


def main() -> int:
    with ThreadPoolExecutor(2) as pool:  # a core for each
        for done in [pool.submit(city), pool.submit(landmarks)]:
            done.result()
    (OUT / "bundled").mkdir(exist_ok=True)
    met = []
    for name, others in BUNDLES.items():
        stage(OUT, f"bundle-{name}", ["-c", BUNDLE, at(name), at(f"bundled/{name}"), *others])
        size = sum(path.stat().st_size for path in Path(at(f"bundled/{name}")).rglob("*")
                   if path.is_file())
        met.append(line(f"miniature_models.megabytes.{name}", size / 1e6, MOST_MB, below=True))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())

"""COLMAP followed by NeRF on tourists' photos: the baseline that is "all or nothing" (Sec. 4.5).

    pip install "gps-guidance[colmap]"
    python examples/nerf_from_photos.py PHOTOS --landmark "Space Needle"
    python examples/nerf_from_photos.py PHOTOS --center 59.9409,30.2966 --height 4.5
    python examples/nerf_from_photos.py --miniature "Miniature Tower of Pisa"

PHOTOS is a dataset or a folder of geotagged image files. --miniature takes photos of an invented
landmark itself, four times as large as those that the small models train on, and scores against
the truth. Writes metrics.json and, if COLMAP finds the poses, field.safetensors, place.json,
views.png and mesh.glb.
"""

import argparse
import json
import logging
from pathlib import Path

import torch

from gps_guidance.lift.nerf import nerf_from_photos
from gps_guidance.miniature.photographer import LANDMARKS, take_photos


def pair(text: str) -> tuple[float, float]:
    lat, lon = map(float, text.split(","))
    return lat, lon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="?", help="a dataset or a folder of geotagged photos")
    parser.add_argument("--miniature", choices=sorted(LANDMARKS), metavar="NAME",
                        help=f"photograph one of {', '.join(sorted(LANDMARKS))}")
    parser.add_argument("--count", type=int, default=80, help="photos of the miniature")
    parser.add_argument("--scale", type=int, default=4, help="times 96 x 128 pixels")
    parser.add_argument("--landmark", help="its name, if it is one of the paper's six")
    parser.add_argument("--center", type=pair, metavar="LAT,LON")
    parser.add_argument("--height", type=float, metavar="METRES")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=-1, help="of COLMAP; 1 to repeat exactly")
    parser.add_argument("--extreme", action="store_true", help="COLMAP's features of that preset")
    parser.add_argument("--out", type=Path, default=Path("nerf"))
    args = parser.parse_args()
    if (args.photos is None) == (args.miniature is None):
        parser.error("give either a folder of photos or --miniature NAME")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.miniature is not None:
        args.photos = take_photos(args.out / "photos", args.count, args.seed, name=args.miniature,
                                  scale=args.scale)
    scores = nerf_from_photos(
        args.photos, args.out, args.miniature or args.landmark, args.center, args.height,
        steps=args.steps, seed=args.seed, threads=args.threads, extreme=args.extreme,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()

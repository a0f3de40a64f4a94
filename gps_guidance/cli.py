"""``gps-guidance VERB``: one command per verb. Heavy imports happen inside the verb that runs."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from gps_guidance import geo


def _pair(text: str) -> geo.LatLon:
    """``LAT,LON`` in degrees."""
    try:
        lat, lon = map(float, text.split(","))
        geo.check_lat_lon((lat, lon))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not LAT,LON in degrees. {error}") from error
    return lat, lon


def _box(text: str) -> geo.Bounds:
    """``SOUTH,WEST,NORTH,EAST`` in degrees."""
    try:
        south, west, north, east = map(float, text.split(","))
        return geo.Bounds(south, west, north, east)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give south,west,north,east. {error}") from error


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="folders or files of photos")
    parser.add_argument("--out", required=True, metavar="DATASET", help="folder to write")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--landmark", help="its name; the six of the paper are known with centre")
    place.add_argument("--bbox", type=_box, metavar="S,W,N,E", help="keep photos of this box")
    parser.add_argument("--center", type=_pair, metavar="LAT,LON", help="centre of the landmark")
    parser.add_argument("--min-distance", type=float, default=0.0, metavar="M")
    parser.add_argument("--max-distance", type=float, default=math.inf, metavar="M")
    parser.add_argument("--min-size", type=int, default=64, metavar="PX", help="smallest side kept")
    parser.add_argument("--image-size", type=int, default=768, metavar="PX", help="largest side kept")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="part held out as val")


def _ingest(args: argparse.Namespace) -> None:
    from gps_guidance.photos import ingest

    summary = ingest(
        args.sources, args.out, landmark=args.landmark, center=args.center, bounds=args.bbox,
        min_distance_m=args.min_distance, max_distance_m=args.max_distance, min_size=args.min_size,
        image_size=args.image_size, val_fraction=args.val_fraction,
    )
    print(f"{summary.kept} photos in {summary.out}")
    for reason, count in summary.rejected.most_common():
        print(f"  rejected {count:6d}  {reason}")
    if summary.bins is not None:
        top = max(1, int(summary.bins.max()))
        for index, count in enumerate(summary.bins):
            print(f"  {geo.bin_bearing_deg(index):5.0f} deg {count:6d}  {'#' * (40 * count // top)}")
    if summary.empty:
        print("No photo in the bins around " + ", ".join(f"{b:.0f}" for b in summary.empty)
              + " degrees: a model has to guess these sides.")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["angle", "classifier"],
                        help="angle: the diffusion model; classifier: a judge of bearings for it")
    parser.add_argument("dataset", help="folder written by `gps-guidance ingest`")
    parser.add_argument("--out", required=True, metavar="MODEL",
                        help="folder to write; for a classifier that of the angle model")
    parser.add_argument("--recipe", help="a YAML file, or a bundled one such as tiny-landmark")
    parser.add_argument("--class-data-dir", help="prior preservation images, kept for reuse")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")


def _train(args: argparse.Namespace) -> None:
    if args.kind == "classifier":
        from gps_guidance.scorers import train_angle_classifier

        print(f"classifier: {train_angle_classifier(args.dataset, args.out)}")
        return
    from gps_guidance.train import load_recipe, train_angle

    recipe = load_recipe(args.recipe, args.overrides)
    print(f"model: {train_angle(args.dataset, args.out, recipe, args.class_data_dir)}")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of an angle model, or miniature-pisa")
    parser.add_argument("--bearing", type=float, nargs="+", metavar="DEG",
                        default=[30.0 * k for k in range(12)], help="default: twelve around")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="w of Eq. 7")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="FILE.png", help="contact sheet to write")


def _sample(args: argparse.Namespace) -> None:
    from gps_guidance.lift.export import image_grid, to_uint8, write_png
    from gps_guidance.models import load_angle_model
    from gps_guidance.sampling import sample_angles

    model = load_angle_model(args.model)
    images = sample_angles(model, args.bearing, args.guidance_scale, args.steps, args.seed)
    pictures = [to_uint8(image.permute(1, 2, 0)) for image in images]
    print(write_png(args.out, image_grid(pictures, columns=min(6, len(pictures)))))


def _add_miniature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)


def _miniature(args: argparse.Namespace) -> None:
    from gps_guidance.miniature.photographer import take_photos

    print(take_photos(Path(args.out), args.count, args.seed, args.processes))


VERBS = {
    "ingest": (_add_ingest, _ingest, "photos with GPS tags -> a clean dataset"),
    "train": (_add_train, _train, "a dataset -> a diffusion model"),
    "sample": (_add_sample, _sample, "images of a landmark by bearing"),
    "miniature": (_add_miniature, _miniature, "let tourists photograph the procedural tower"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0 done, 2 something given is wrong (one line says what), 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="gps-guidance", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, (add_arguments, _, help_text) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=help_text, description=help_text))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("gps_guidance").setLevel(logging.INFO)
    try:
        VERBS[args.verb][1](args)
    except ValueError as error:
        print(f"gps-guidance: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gps-guidance: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

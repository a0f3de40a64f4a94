"""``gps-guidance VERB``: one command per verb. Heavy imports happen inside the verb that runs."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NoReturn

from gps_guidance import geo

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        self.exit(WRONG, f"gps-guidance: error: {message}{end} See {self.prog} --help.\n")


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
        message = f"{text!r}: give south,west,north,east. {error}"
        raise argparse.ArgumentTypeError(message) from error


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _day(text: str) -> date:
    """``YYYY-MM-DD``."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day, such as 2019-05-31") from error


def _part(text: str) -> tuple[int, int]:
    """``K/N``: the K-th of N parts."""
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        k, n = 0, 0
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 <= K <= N")
    return k, n


def _metres(text: str) -> float:
    """A finite number of metres, at least 0."""
    try:
        metres = float(text)
    except ValueError:
        metres = math.nan
    if not 0 <= metres < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of metres")
    return metres


def _fraction(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        part = float(text)
    except ValueError:
        part = math.nan
    if not 0 <= part < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return part


def _add_harvest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("provider", choices=["flickr", "commons"],
                        help="flickr: needs a key in the environment variable FLICKR_API_KEY; "
                        "commons: Wikimedia Commons, needs --contact")
    parser.add_argument("--bbox", type=_box, required=True, metavar="S,W,N,E",
                        help="where the photos were taken")
    parser.add_argument("--from", type=_day, dest="first", metavar="DAY",
                        help="the first day of taking, as 2019-05-31")
    parser.add_argument("--to", type=_day, dest="last", metavar="DAY", help="the last one")
    parser.add_argument("--licences", nargs="+", metavar="NAME",
                        help="such as \"CC BY-NC\", or any; default: those that let everybody use "
                        "and change a photo")
    parser.add_argument("--contact", help="your e-mail address or page, told to the site")
    parser.add_argument("--endpoint", metavar="URL", help="another server with the same API")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")


def _harvest(args: argparse.Namespace) -> None:
    from gps_guidance.photos.harvest import harvest

    summary = harvest(
        args.provider, args.bbox, args.out, first=args.first, last=args.last,
        licences=args.licences, contact=args.contact, endpoint=args.endpoint,
    )
    print(f"{summary.photos} photos in {summary.records}")


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="folders of photos; CSV, Parquet, JSONL, GeoJSON, Flickr JSON with "
                        "their paths or addresses; datasets to merge (docs/formats.md)")
    parser.add_argument("--out", required=True, metavar="DATASET", help="folder to write")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--landmark", help="its name; the six of the paper are known with centre")
    place.add_argument("--bbox", type=_box, metavar="S,W,N,E", help="keep photos of this box")
    place.add_argument("--bounds", metavar="FILE.geojson", help="keep photos of this outline")
    parser.add_argument("--center", type=_pair, metavar="LAT,LON", help="centre of the landmark")
    parser.add_argument("--min-distance", type=_metres, default=0.0, metavar="M")
    parser.add_argument("--max-distance", type=_metres, default=math.inf, metavar="M")
    parser.add_argument("--min-size", type=_count, default=64, metavar="PX",
                        help="photos with a smaller side are left out")
    parser.add_argument("--image-size", type=_count, default=768, metavar="PX",
                        help="larger photos are shrunk to it")
    parser.add_argument("--records-only", action="store_true",
                        help="read and download no image: clean a table first")
    clean = parser.add_argument_group("cleaning")
    clean.add_argument("--keep-near-duplicates", action="store_true",
                       help="keep what is the same picture again, resized or saved anew")
    clean.add_argument("--max-per-owner", type=_count, metavar="N",
                       help="of one owner in one cell")
    clean.add_argument("--cell", type=_metres, default=100.0, metavar="M",
                       help="side of a cell for the limits on owners; default 100")
    split = parser.add_argument_group("splits")
    split.add_argument("--val-fraction", type=_fraction, default=0.0, help="part held out as val")
    split.add_argument("--split-by", default="place", metavar="WHAT",
                       help="what falls on one side as a whole: photo, place (the default), owner, "
                       "or place,owner")
    split.add_argument("--block", type=_metres, default=100.0, metavar="M",
                       help="side of a place; default 100")
    privacy = parser.add_argument_group("privacy (docs/privacy.md)")
    privacy.add_argument("--min-owners-per-cell", type=_count, default=1, metavar="K",
                         help="leave out cells with photos of fewer owners")
    privacy.add_argument("--blur-position", type=_metres, default=0.0, metavar="M",
                         help="move positions to the middle of cells of this side")
    scale = parser.add_argument_group("scale")
    scale.add_argument("--part", type=_part, metavar="K/N",
                       help="read the K-th of N parts; merge the folders by another ingest")
    scale.add_argument("--shards", type=_count, metavar="MB",
                       help="also write WebDataset shards of this size")
    scale.add_argument("--processes", type=_count, default=os.cpu_count() or 1, metavar="N",
                       help="default: one a core")


def _ingest(args: argparse.Namespace) -> None:
    from gps_guidance.photos.ingest import ingest

    summary = ingest(
        args.sources, args.out, landmark=args.landmark, center=args.center,
        bounds=args.bbox or args.bounds, min_distance_m=args.min_distance,
        max_distance_m=args.max_distance, min_size=args.min_size, image_size=args.image_size,
        records_only=args.records_only, part=args.part, shard_mb=args.shards,
        processes=args.processes, keep_near_duplicates=args.keep_near_duplicates,
        max_per_owner=args.max_per_owner, cell_m=args.cell, val_fraction=args.val_fraction,
        split_by=args.split_by, block_m=args.block, min_owners_per_cell=args.min_owners_per_cell,
        blur_m=args.blur_position,
    )
    print(f"{summary.kept} photos in {summary.out}")
    for reason, count in summary.rejected.most_common():
        print(f"  rejected {count:6d}  {reason}")
    if summary.bins is not None:
        top = max(1, int(summary.bins.max()))
        for index, count in enumerate(summary.bins):
            bar = "#" * (40 * int(count) // top)
            print(f"  {geo.bin_bearing_deg(index):5.0f} deg {count:6d}  {bar}")
    if summary.empty:
        print("No photo in the bins around " + ", ".join(f"{b:.0f}" for b in summary.empty)
              + " degrees: a model has to guess these sides.")


def _add_takedown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder written by `gps-guidance ingest`")
    parser.add_argument("owners", nargs="+", metavar="OWNER", help="ids in its column owner")


def _takedown(args: argparse.Namespace) -> None:
    from gps_guidance.photos.privacy import take_down

    print(f"{take_down(args.dataset, args.owners)} photos removed from {args.dataset}")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder written by `gps-guidance ingest`")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; default DATASET/inspect")
    parser.add_argument("--with-positions", action="store_true",
                        help="show positions even where --out lies outside the dataset")


def _inspect(args: argparse.Namespace) -> None:
    from gps_guidance.photos.inspection import inspect

    page, found = inspect(args.dataset, args.out, with_positions=args.with_positions)
    for sentence in found:
        print(f"- {sentence}")
    print(page)


def _add_caption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder written by `gps-guidance ingest`")
    parser.add_argument("--model", required=True, help="a captioner, by folder or name on the "
                        "Hugging Face Hub, such as Salesforce/blip-image-captioning-large")
    parser.add_argument("--prompt", help="how every caption begins, such as 'a photo of'")
    parser.add_argument("--batch-size", type=_count, default=8)
    parser.add_argument("--num-beams", type=_count, default=3, help="of the beam search; 1: greedy")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="auto: bfloat16 on CUDA, else float32")
    parser.add_argument("--overwrite", action="store_true", help="replace captions that are there")


def _caption(args: argparse.Namespace) -> None:
    from gps_guidance.captions import caption
    from gps_guidance.models import quiet_libraries

    quiet_libraries()
    summary = caption(args.dataset, args.model, prompt=args.prompt, batch_size=args.batch_size,
                      num_beams=args.num_beams, overwrite=args.overwrite, dtype=args.dtype)
    if summary is None:  # the main process of `accelerate launch` speaks for all
        return
    print(f"{summary.captioned} captions of {args.model} in {args.dataset}")
    for count, what in ((summary.kept, "kept the caption that they had"),
                        (summary.silent, "got none: unreadable, or the model said nothing"),
                        (summary.without_image, "have no image")):
        if count:
            print(f"  {count:6d}  {what}")


def _add_geocode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder written by `gps-guidance ingest`")
    parser.add_argument("--cache", required=True, metavar="FILE",
                        help="what is known already, and where answers are kept; it may serve "
                        "several datasets")
    parser.add_argument("--contact", help="your e-mail address or page, told to the server")
    parser.add_argument("--endpoint", metavar="URL", help="another Nominatim server")
    parser.add_argument("--offline", action="store_true", help="ask nobody: the cache has it all")


def _geocode(args: argparse.Namespace) -> None:
    from gps_guidance.geocoding import geocode

    summary = geocode(args.dataset, args.cache, contact=args.contact, endpoint=args.endpoint,
                      offline=args.offline)
    print(f"{summary.addressed} photos with an address in {args.dataset}")
    if summary.nameless:
        print(f"  {summary.nameless:6d}  are where there is none")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind",
                        choices=["text", "gps", "angle", "classifier", "gps-clip", "clip"],
                        help="text: captions alone; gps: captions and positions of a city; angle: "
                        "bearings around a landmark; judges: classifier of its bearings, gps-clip "
                        "of positions, clip of captions (docs/evaluation.md)")
    parser.add_argument("dataset", help="folder written by `gps-guidance ingest`")
    parser.add_argument("--out", required=True, metavar="MODEL",
                        help="folder to write; for a classifier that of the angle model")
    parser.add_argument("--recipe", help="a YAML file, or a bundled one such as tiny-landmark")
    parser.add_argument("--class-data-dir", "--class_data_dir", metavar="FOLDER",
                        help="prior preservation images, kept for reuse")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="changes to the recipe, also as --key value")


def _train(args: argparse.Namespace) -> None:
    from gps_guidance.models import quiet_libraries

    quiet_libraries()
    if args.kind == "classifier":
        from gps_guidance.scorers import train_angle_classifier

        if args.recipe or args.overrides or args.class_data_dir:
            raise ValueError("train classifier takes its settings from the angle model in --out: "
                             "give no recipe, key=value or --class-data-dir.")
        print(f"classifier: {train_angle_classifier(args.dataset, args.out)}")
        return
    if args.kind in ("gps-clip", "clip"):
        from gps_guidance.judges import train_judge

        if args.recipe or args.class_data_dir:
            raise ValueError(f"train {args.kind} has neither --recipe nor --class-data-dir; its "
                             "settings are key=value.")
        print(f"judge: {train_judge(args.kind, args.dataset, args.out, args.overrides)}")
        return
    from accelerate import PartialState

    from gps_guidance.recipe import load_recipe
    from gps_guidance.train import train_model

    recipe = load_recipe(args.recipe, args.overrides, args.kind)
    out = train_model(args.dataset, args.out, recipe, args.class_data_dir)
    if PartialState().is_main_process:  # of those of torchrun or `accelerate launch`
        print(f"model: {out}")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder written by `gps-guidance train`")
    parser.add_argument("--hub_model_id", "--hub-model-id", metavar="OWNER/NAME",
                        help="default: the folder's name, of whoever is logged in")
    parser.add_argument("--public", action="store_true",
                        help="everybody sees it (docs/privacy.md); default: nobody else does")


def _push(args: argparse.Namespace) -> None:
    from gps_guidance.hub import push

    print(push(args.model, args.hub_model_id, private=not args.public))


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of an angle model, or miniature-pisa; of --lora, "
                        "the folder of its base")
    parser.add_argument("--lora", metavar="FOLDER", help="LoRA of an angle model")
    parser.add_argument("--bearing", type=float, nargs="+", metavar="DEG",
                        default=[30.0 * k for k in range(12)], help="default: twelve around")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="w of Eq. 7")
    parser.add_argument("--steps", type=_count, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="FILE.png", help="contact sheet to write")


def _sample(args: argparse.Namespace) -> None:
    from gps_guidance.lift.export import image_grid, to_uint8, write_png
    from gps_guidance.models import load_angle_model, quiet_libraries

    quiet_libraries()
    from gps_guidance.sampling import sample_angles

    model = load_angle_model(args.model, args.lora)
    images = sample_angles(model, args.bearing, args.guidance_scale, args.steps, args.seed)
    pictures = [to_uint8(image.permute(1, 2, 0)) for image in images]
    print(write_png(args.out, image_grid(pictures, columns=min(6, len(pictures)))))


def _add_miniature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of JPEG files")
    parser.add_argument("--world", choices=["landmark", "arch", "monuments", "city"],
                        default="landmark", help="the leaning tower, the triumphal arch, invented "
                        "monuments of which each photo shows another, or the city")
    parser.add_argument("--count", type=_count, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=_count, default=1)
    parser.add_argument("--addresses", metavar="FILE",
                        help="also write those of the city, a cache for `gps-guidance geocode`")


def _miniature(args: argparse.Namespace) -> None:
    if args.addresses:
        from gps_guidance.miniature.city import write_addresses

        if args.world != "city":
            raise ValueError(f"The {args.world} has no addresses: give --world city, or no "
                             "--addresses.")
        print(write_addresses(args.addresses))
    from gps_guidance.miniature.worlds import WORLDS

    print(WORLDS[args.world](Path(args.out), args.count, args.seed, args.processes))


def _add_install_extension(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("threestudio", metavar="FOLDER", help="a clone of threestudio")
    parser.add_argument("--copy", action="store_true", help="copy the extension, do not link it")


def _install_extension(args: argparse.Namespace) -> None:
    from gps_guidance.extension import advice, install_extension

    print(install_extension(args.threestudio, args.copy))
    for sentence in advice():
        print(f"- {sentence}")


VERBS = {
    "harvest": (_add_harvest, _harvest, "records of photos of an area, from a photo site"),
    "ingest": (_add_ingest, _ingest, "geotagged photos and records -> a clean dataset"),
    "inspect": (_add_inspect, _inspect, "a dataset -> a report with what training will dislike"),
    "caption": (_add_caption, _caption, "captions for a dataset by a model such as BLIP"),
    "geocode": (_add_geocode, _geocode, "addresses for a dataset by GeoPy, as the baseline has"),
    "takedown": (_add_takedown, _takedown, "remove the photos of an owner from a dataset"),
    "train": (_add_train, _train, "a dataset -> a diffusion model, or a judge"),
    "push": (_add_push, _push, "a finished model -> the Hugging Face Hub, private by default"),
    "sample": (_add_sample, _sample, "images of a landmark by bearing"),
    "miniature": (_add_miniature, _miniature, "let tourists photograph a procedural world"),
    "install-extension": (_add_install_extension, _install_extension,
                          "our extension -> a clone of threestudio"),
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="gps-guidance", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (add_arguments, _, help_text) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=help_text, description=help_text))
    given = _with_overrides(argv, parser, verbs.choices["train"])
    words: list[str] = []
    for word in given:  # argparse takes the -33.8,151.2 of `--center -33.8,151.2` for an option
        if words and words[-1] in ("--center", "--bbox") and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    args, rest = parser.parse_known_args(words)
    # nor does it find the overrides when options stand between them and the dataset
    wrong = [word for word in rest if "=" not in word or word.startswith("-")]
    if wrong or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}{_hint(args, wrong)}")
    if rest:
        args.overrides += rest
    return args


def _with_overrides(argv: Sequence[str], parser: _Parser, train: argparse.ArgumentParser
                    ) -> Sequence[str]:
    """The words of `train`, with settings in diffusers' style as key=value; others as they are."""
    if not argv or argv[0] != "train":
        return argv
    from gps_guidance.recipe import flags_as_overrides, settings

    train.epilog, train.formatter_class = settings(), argparse.RawDescriptionHelpFormatter
    try:
        return flags_as_overrides(argv)
    except ValueError as error:
        parser.error(str(error))


def _hint(args: argparse.Namespace, wrong: Sequence[str]) -> str:
    """What a misspelt setting of `train` may have meant."""
    if args.verb != "train":
        return ""
    from gps_guidance.recipe import nearest_flag

    near = next(filter(None, map(nearest_flag, wrong)), None)
    return f". Did you mean {near}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0 done; 1 the disk is full; 2 something given is wrong (one line says what); 130 Ctrl-C,
    and while training also SIGTERM.
    """
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not sys.stderr.isatty():  # a log file that nobody watches; tqdm reads this when imported
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("gps_guidance").setLevel(logging.INFO)
    try:
        VERBS[args.verb][1](args)
    except (ValueError, OSError) as error:
        if _is_disk_full(error):
            print(f"gps-guidance: error: the disk is full ({error}). Make room and run the same "
                  "command again; it goes on from what is saved.", file=sys.stderr)
            return FAILED
        print(f"gps-guidance: error: {error}", file=sys.stderr)
        return FAILED if _is_disk_full(error.__cause__) else WRONG
    except KeyboardInterrupt:
        print("gps-guidance: stopped; the same command goes on from here.", file=sys.stderr)
        return STOPPED
    return OK


def _is_disk_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


if __name__ == "__main__":
    sys.exit(main())

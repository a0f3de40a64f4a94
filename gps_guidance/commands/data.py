"""Verbs that find photos and make datasets of them."""

from __future__ import annotations

import argparse
import math
import os

from gps_guidance import geo
from gps_guidance.commands import types


def _add_harvest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("provider", choices=["flickr", "commons"],
                        help="flickr: needs a key in the environment variable FLICKR_API_KEY; "
                        "commons: Wikimedia Commons, needs --contact")
    parser.add_argument("--bbox", type=types.box, required=True, metavar="S,W,N,E",
                        help="where the photos were taken")
    parser.add_argument("--from", type=types.day, dest="first", metavar="DAY",
                        help="the first day of taking, as 2019-05-31")
    parser.add_argument("--to", type=types.day, dest="last", metavar="DAY", help="the last one")
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
    place.add_argument("--bbox", type=types.box, metavar="S,W,N,E", help="keep photos of this box")
    place.add_argument("--bounds", metavar="FILE.geojson", help="keep photos of this outline")
    parser.add_argument("--center", type=types.pair, metavar="LAT,LON",
                        help="centre of the landmark")
    parser.add_argument("--min-distance", type=types.metres, default=0.0, metavar="M")
    parser.add_argument("--max-distance", type=types.metres, default=math.inf, metavar="M")
    parser.add_argument("--min-size", type=types.count, default=64, metavar="PX",
                        help="photos with a smaller side are left out")
    parser.add_argument("--image-size", type=types.count, default=768, metavar="PX",
                        help="larger photos are shrunk to it")
    parser.add_argument("--records-only", action="store_true",
                        help="read and download no image: clean a table first")
    clean = parser.add_argument_group("cleaning")
    clean.add_argument("--keep-near-duplicates", action="store_true",
                       help="keep what is the same picture again, resized or saved anew")
    clean.add_argument("--max-per-owner", type=types.count, metavar="N",
                       help="of one owner in one cell")
    clean.add_argument("--cell", type=types.metres, default=100.0, metavar="M",
                       help="side of a cell for the limits on owners; default 100")
    split = parser.add_argument_group("splits")
    split.add_argument("--val-fraction", type=types.fraction, default=0.0,
                       help="part held out as val")
    split.add_argument("--split-by", default="place", metavar="WHAT",
                       help="what falls on one side as a whole: photo, place (the default), owner, "
                       "or place,owner")
    split.add_argument("--block", type=types.metres, default=100.0, metavar="M",
                       help="side of a place; default 100")
    privacy = parser.add_argument_group("privacy (docs/privacy.md)")
    privacy.add_argument("--min-owners-per-cell", type=types.count, default=1, metavar="K",
                         help="leave out cells with photos of fewer owners")
    privacy.add_argument("--blur-position", type=types.metres, default=0.0, metavar="M",
                         help="move positions to the middle of cells of this side")
    scale = parser.add_argument_group("scale")
    scale.add_argument("--part", type=types.part, metavar="K/N",
                       help="read the K-th of N parts; merge the folders by another ingest")
    scale.add_argument("--shards", type=types.count, metavar="MB",
                       help="also write WebDataset shards of this size")
    scale.add_argument("--processes", type=types.count, default=os.cpu_count() or 1, metavar="N",
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
    parser.add_argument("--batch-size", type=types.count, default=8)
    parser.add_argument("--num-beams", type=types.count, default=3,
                        help="of the beam search; 1: greedy")
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


VERBS = {
    "harvest": (_add_harvest, _harvest, "records of photos of an area, from a photo site"),
    "ingest": (_add_ingest, _ingest, "geotagged photos and records -> a clean dataset"),
    "inspect": (_add_inspect, _inspect, "a dataset -> a report with what training will dislike"),
    "caption": (_add_caption, _caption, "captions for a dataset by a model such as BLIP"),
    "geocode": (_add_geocode, _geocode, "addresses for a dataset by GeoPy, as the baseline has"),
    "takedown": (_add_takedown, _takedown, "remove the photos of an owner from a dataset"),
}

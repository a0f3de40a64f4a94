"""Verbs that train, show and publish models, and what they are tried on and used in."""

from __future__ import annotations

import argparse
from pathlib import Path

from gps_guidance.commands import types


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
    parser.add_argument("--steps", type=types.count, default=50)
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
    parser.add_argument("--world", default="landmark", choices=["landmark", "arch", "monuments",
                                                                "city", "city-every-pair"],
                        help="the leaning tower; the triumphal arch; invented monuments, of which "
                        "each photo shows another; the city; the city with the pairs of object and "
                        "place that no tourist photographs, for judges")
    parser.add_argument("--count", type=types.count, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=types.count, default=1)
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
    "train": (_add_train, _train, "a dataset -> a diffusion model, or a judge"),
    "push": (_add_push, _push, "a finished model -> the Hugging Face Hub, private by default"),
    "sample": (_add_sample, _sample, "images of a landmark by bearing"),
    "miniature": (_add_miniature, _miniature, "let tourists photograph a procedural world"),
    "install-extension": (_add_install_extension, _install_extension,
                          "our extension -> a clone of threestudio"),
}

"""Verbs that measure: the paper's tables and figures."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

from gps_guidance.commands import types


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="NAME|key=value",
                        help="experiments, all if there is none (table1 table2 table3 ablation-geo "
                        "ablation-3d fig6 fig8 fig9); changes to the scale's settings")
    parser.add_argument("--scale", default="miniature", metavar="NAME|FILE.yaml",
                        help="miniature: the procedural worlds and the bundled models; "
                        "miniature-arch: a nearly symmetric landmark in 3D; paper: your photos "
                        "and weights; or settings of your own (docs/evaluation.md)")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="tables, pictures, report.html; what is there is not done again")
    parser.add_argument("--processes", type=types.count,
                        help="pieces of work at a time; default: one a core, on CUDA one")


def _reproduce(args: argparse.Namespace) -> None:
    from gps_guidance.models import quiet_libraries

    quiet_libraries()
    from gps_guidance.reproduce.run import reproduce

    names = [word for word in args.overrides if "=" not in word]
    changes = [word for word in args.overrides if "=" in word]
    missing = reproduce(names, args.out, args.scale, changes, args.processes)
    print(f"{args.out}/report.html")
    if missing:
        raise ValueError(" ".join(missing))


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL",
                        help="a GPS model, an angle model, or the trial folder of a 3D run")
    parser.add_argument("--clip", metavar="FOLDER", help="judge of texts, of a GPS model or trial")
    parser.add_argument("--gps-clip", metavar="FOLDER", help="judge of positions: of a GPS model")
    parser.add_argument("--pairs", metavar="NAME|FILE",
                        help="its list of prompts and positions: nyc, paris, miniatown or a file")
    parser.add_argument("--limit", type=types.count, metavar="N", help="only the first N pairs")
    parser.add_argument("--classifier", metavar="FOLDER",
                        help="judge of bearings: of an angle model; default: in its folder")
    parser.add_argument("--images-per-bin", type=types.count, default=10)
    parser.add_argument("--lora", metavar="FOLDER", help="a LoRA that was trained on MODEL")
    parser.add_argument("--guidance-scale", type=float,
                        help="w_p of Eq. 4, default 7.5; of an angle model w of Eq. 7, default 2")
    parser.add_argument("--gps-guidance-scale", type=float, default=7.5, help="w_g of Eq. 4")
    parser.add_argument("--steps", type=types.count, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE.json", help="also write the scores there")


def _evaluate(args: argparse.Namespace) -> None:
    from gps_guidance.models import quiet_libraries

    quiet_libraries()
    from gps_guidance.photos.manifest import write_whole
    from gps_guidance.reproduce.evaluate import TITLES, Judging, evaluate

    given = {key.name: getattr(args, key.name) for key in fields(Judging)}
    scores = evaluate(args.model, Judging(**given))
    wide = max(len(TITLES.get(name, name)) for name in scores)
    for name, score in scores.items():
        print(f"{TITLES.get(name, name):{wide}}  {score}  (of {score.count})")
    if args.out:
        text = json.dumps({name: asdict(score) for name, score in scores.items()}, indent=2)
        write_whole(Path(args.out), f"{text}\n".encode())


VERBS = {
    "evaluate": (_add_evaluate, _evaluate, "your own model or 3D run -> its scores"),
    "reproduce": (_add_reproduce, _reproduce, "the paper's tables, ablations and figures"),
}

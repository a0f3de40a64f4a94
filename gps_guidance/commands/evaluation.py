"""Verbs that measure: the paper's tables and figures."""

from __future__ import annotations

import argparse

from gps_guidance.commands import types


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="NAME|key=value",
                        help="experiments, all if there is none (table1 table2 table3 ablation-geo "
                        "ablation-3d fig6 fig8 fig9); changes to the scale's settings")
    parser.add_argument("--scale", default="miniature", metavar="NAME|FILE.yaml",
                        help="miniature: the procedural worlds and the bundled models; paper: your "
                        "photos and weights; or settings of your own (docs/evaluation.md)")
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


VERBS = {
    "reproduce": (_add_reproduce, _reproduce, "the paper's tables, ablations and figures"),
}

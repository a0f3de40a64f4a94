"""``gps-guidance VERB``: one command per verb. Heavy imports happen inside the verb that runs."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from gps_guidance.commands import data, evaluation, models

VERBS = {**data.VERBS, **models.VERBS, **evaluation.VERBS}
OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        self.exit(WRONG, f"gps-guidance: error: {message}{end} See {self.prog} --help.\n")


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

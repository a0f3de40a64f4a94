"""diffusers' common pipeline tests, run for StableDiffusionGPSPipeline.

    python benchmarks/diffusers_common_tests.py DIFFUSERS   (or DIFFUSERS_PATH=DIFFUSERS)

DIFFUSERS is a checkout of huggingface/diffusers of August 2026 or later, for example of commit
58eb52c. Its ``tests`` are copied to a temporary folder and joined there by
``diffusers_common_template.py``; the checkout stays as it is, and its ``src`` is not used: what is
tested is the installed diffusers. Three configurations of ours run, with a position, with text only
and with a bearing, and StableDiffusionPipeline itself. A test that fails for the latter as well is
no failure of ours; what needs a GPU is skipped without one. Nothing is downloaded. Prints one JSON
line; ``value`` counts the tests of ours that passed.
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
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("diffusers_common_template.py")
WHERE = Path("tests/pipelines/stable_diffusion_gps/test_stable_diffusion_gps.py")
THEIRS, OURS = "TestTheirs", ("TestPlace", "TestText", "TestBearing")


def run_tests(checkout: Path, folder: Path) -> dict[str, str]:
    """passed, failed or skipped for each test, by "class.test"; the log goes to stderr."""
    shutil.copytree(checkout / "tests", folder / "tests")
    test = folder / WHERE
    test.parent.mkdir()
    (test.parent / "__init__.py").touch()
    shutil.copy(TEMPLATE, test)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
               f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}", f"--junitxml={folder}/xml",
               str(test)]
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False,
                          env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
                                          "TMPDIR": str(folder)})
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with exit code {done.returncode}")
    found = {}
    for case in ElementTree.parse(folder / "xml").iter("testcase"):
        kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        result = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
        found[f"{case.attrib['classname'].rsplit('.')[-1]}.{case.attrib['name']}"] = result
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("diffusers", nargs="?", type=Path, help="a checkout of diffusers",
                        default=os.environ.get("DIFFUSERS_PATH"))
    args = parser.parse_args()
    if args.diffusers is None or not (args.diffusers / WHERE.parents[1]).is_dir():
        raise SystemExit(f"{args.diffusers} is no checkout of diffusers: give its path, or set "
                         "DIFFUSERS_PATH.")
    missing = [name for name in ("parameterized", "requests_mock")
               if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"diffusers' tests import {' and '.join(missing)}: pip install "
                         "parameterized requests-mock")
    with tempfile.TemporaryDirectory() as folder:
        found = run_tests(args.diffusers, Path(folder))
    ours = {name: result for name, result in found.items() if name.startswith(OURS)}
    failed: list[str] = []
    theirs_too: list[str] = []
    for name in sorted(name for name, result in ours.items() if result == "failed"):
        kind = next(kind for kind in OURS if name.startswith(kind))
        twin = found.get(THEIRS + name.removeprefix(kind))
        (theirs_too if twin == "failed" else failed).append(name)
    print(json.dumps({
        "name": "diffusers_common_tests.passed", "value": list(ours.values()).count("passed"),
        "goal": None, "ok": bool(ours) and not failed, "failed": failed,
        "failed_for_stable_diffusion_too": theirs_too,
        "skipped": list(ours.values()).count("skipped"),
    }))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

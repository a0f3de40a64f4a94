"""Imports point downward only, and the package is cheap to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gps_guidance"

# The longest matching name counts. A module imports its own level and below, never in a circle.
LEVELS = {
    "geo": 0, "page": 0,
    "photos": 1, "encoders": 1, "noise": 1, "models": 1, "parts": 1, "recipe": 1, "lift.sds": 1,
    "lift.config": 1, "areas": 1, "checkpoints": 1, "interrupts": 1,
    "lora": 1, "zero": 1, "judge_recipe": 1,
    "dataset": 2, "captions": 2, "autoencoder": 2, "sampling": 2, "conditions": 2, "loop": 2,
    "draws": 2, "place": 2, "latents": 2, "texts": 2, "compose": 2, "card": 2,
    "lora_training": 2, "sharding": 2, "pipeline": 2, "geocoding": 2, "lift": 2, "hub": 2,
    "bundles": 2, "training_report": 2, "attention": 2,
    "train": 3, "scorers": 3, "gps_clip": 3, "image_text": 3, "contrastive": 3, "judges": 3,
    "metrics": 3, "viz": 3, "lift.system": 3,
    "lift.engine": 3, "lift.report": 3, "lift.callbacks": 3, "lift.plan": 3, "miniature": 3,
    "lift.threestudio": 3, "lift.trial": 3, "lift.photo_fit": 3, "lift.nerf": 3,
    "nocompile": 3, "extension": 3,
    "reproduce": 3, "reproduce.settings": 1, "commands": 4,
    "cli": 5, "demo": 5, "__main__": 5,
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, path


NAMES = {name for name, _ in modules()}


def imported(path):
    """Names of our own modules that a file imports anywhere in it, late imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        for name in found:
            if name.startswith("gps_guidance.") and name.removeprefix("gps_guidance.") in NAMES:
                yield name.removeprefix("gps_guidance.")


def level(name):
    known = [key for key in LEVELS if name == key or name.startswith(key + ".")]
    assert known, f"gps_guidance.{name} has no level: add it to LEVELS in {Path(__file__).name}"
    return LEVELS[max(known, key=len)]


GRAPH = {name: set(imported(path)) - {name} for name, path in modules()}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_point_downward(name):
    upward = {other for other in GRAPH[name] if level(other) > level(name)}
    assert not upward, f"gps_guidance.{name} (level {level(name)}) imports {sorted(upward)}"


def test_no_circles():
    done: set[str] = set()
    path: list[str] = []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for other in GRAPH[name]:
                visit(other)
            done.add(path.pop())

    for name in sorted(GRAPH):
        visit(name)


def test_only_the_extension_imports_threestudio():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "threestudio" for n in names), path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gps_guidance", "torch numpy pyproj diffusers transformers lightning PIL"),
        ("gps_guidance.geo", "torch diffusers transformers lightning"),
        ("gps_guidance.areas", "torch diffusers transformers lightning matplotlib"),
        ("gps_guidance.geocoding", "torch diffusers transformers lightning geopy"),
        ("gps_guidance.photos.ingest", "torch diffusers transformers lightning"),
        ("gps_guidance.photos.inspection", "torch diffusers transformers lightning"),
        ("gps_guidance.lift.config", "torch diffusers transformers lightning"),
        ("gps_guidance.judge_recipe", "torch diffusers transformers lightning"),
        ("gps_guidance.reproduce.settings", "torch diffusers transformers lightning"),
    ],
)
def test_light_modules_stay_light(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""The pages say what the code does: names, links, columns and keys."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from gps_guidance.encoders import AngleEncoder, GPSEncoder
from gps_guidance.judge_recipe import JUDGES
from gps_guidance.lift import report
from gps_guidance.photos.columns import COLUMNS, RECORD
from gps_guidance.photos.manifest import REASONS, REJECTED, SCHEMA
from gps_guidance.photos.sources import TABLES
from gps_guidance.recipe import KINDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SKIPPED = (".venv", "outputs", "build", "dist", "node_modules", ".cache")
PAGES = sorted(p for p in ROOT.rglob("*.md")
               if not set(p.relative_to(ROOT).parts) & set(SKIPPED)
               and not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
OURS = [p for p in PAGES if p.parent == DOCS or p.name in ("CONTRIBUTING.md", "CHANGELOG.md")
        or "custom" in p.parts]


def name_of(page):
    return str(page.relative_to(ROOT))


def table(page, heading):
    """First column of the first table under a heading, its code spans one by one."""
    text = page.read_text("utf-8").split(f"# {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M).group().splitlines()[2:]
    return [span for line in lines for span in re.findall(r"`([^`]+)`", line.split("|")[1])]


def resolve(name):
    """The object of a dotted name, a field of a dataclass included."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_every_dotted_name_exists(page):
    for name in sorted(set(re.findall(r"`(gps_guidance(?:\.\w+)+)`", page.read_text("utf-8")))):
        try:
            resolve(name)
        except (AttributeError, AssertionError) as error:
            raise AssertionError(f"{page.name}: {name} does not exist ({error})") from error


def test_the_method_maps_every_equation():
    rows = re.findall(r"^\| (\d+) \|.*`gps_guidance\.", (DOCS / "method.md").read_text("utf-8"),
                      re.M)
    assert {int(row) for row in rows} >= {1, 2, 3, 4, 6, 7, 8, 9, 10}


def anchors(page):
    """The anchors that a page's headings make, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_exist(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_manifest_is_documented_column_by_column():
    assert table(DOCS / "formats.md", "manifest.parquet") == SCHEMA.names


def test_the_reasons_for_rejection_are_documented():
    assert set(table(DOCS / "formats.md", "rejected.parquet")) == REASONS
    assert table(DOCS / "formats.md", "rejected.parquet, columns") == REJECTED.names


def test_the_columns_and_kinds_of_sources_are_documented():
    page = (DOCS / "formats.md").read_text("utf-8")
    kinds, columns = (page.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
                      for heading in ("Sources", "Columns of a table"))
    assert [kind for kind in TABLES if f"`{kind}`" not in kinds] == []
    assert table(DOCS / "formats.md", "Columns of a table") == list(COLUMNS) == RECORD.names
    for column, names in COLUMNS.items():
        [cell] = re.findall(rf"^\| `{column}` \| (.+?) \|", columns, re.M)
        assert re.findall(r"`([^`]+)`", cell) == list(names)


def keys_written(function):
    """String keys of dict literals and of assignments ``x["key"] = ...`` in a function's source."""
    source = Path(importlib.import_module(function.__module__).__file__).read_text("utf-8")
    body = next(node for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef) and node.name == function.__name__)
    keys = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Dict):
            keys |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            keys.add(node.slice.value)
    return {key for key in keys if isinstance(key, str)}


def test_the_metrics_are_documented_and_exist():
    from gps_guidance.miniature import truth

    parts = (truth.score, truth._solid_scores, truth._chamfer_scores, truth._bearing_scores)
    of_truth = set().union(*map(keys_written, parts))
    written = (set(report.SCORES) | of_truth | keys_written(report._photo_scores)
               | keys_written(report.finish))
    documented = table(DOCS / "formats.md", "metrics.json")
    assert set(documented) <= written, sorted(set(documented) - written)
    assert set(report.SCORES) <= set(documented)
    views = {"rgb", "opacity", "depth", "mask"}  # what pictures hold, not scores
    needed = of_truth | keys_written(report._photo_scores)
    assert needed - views <= set(documented)
    assert len(documented) == len(set(documented))


@pytest.mark.parametrize(("kind", "heading"), [
    (AngleEncoder, "gps_encoder/config.json of an angle model"),
    (GPSEncoder, "gps_encoder/config.json of a GPS model"),
])
def test_the_encoders_configs_are_documented(kind, heading):
    keys = {k for k in kind(16).config if not k.startswith("_")}
    assert set(table(DOCS / "formats.md", heading)) == keys


def test_recipe_keys_on_the_pages_exist():
    for page in PAGES:
        for line in page.read_text("utf-8").splitlines():
            for kind in re.findall(r"gps-guidance train (text|gps|angle|gps-clip|clip) ", line):
                known = {field.name for field in dataclasses.fields({**KINDS, **JUDGES}[kind])}
                given = re.findall(r" (\w+)=", line)
                assert set(given) <= known, f"{page.name}: {line}"


@pytest.mark.parametrize("page", OURS, ids=name_of)
def test_config_keys_on_the_pages_exist(page):
    """``system.<section>.<key>`` and ``data.<key>`` in code spans are keys of some class."""
    from gps_guidance.lift.plan import known_types

    known: dict[str, set[str]] = {}
    for kind, types in known_types().items():
        known[kind] = {f.name for _, config in types.values() for f in dataclasses.fields(config)}
    text = page.read_text("utf-8")
    for section, key in re.findall(r"\bsystem\.(\w+)\.(\w*[a-z0-9])(?![<\w])", text):
        if section in known:
            assert key in known[section], f"{page.name}: system.{section}.{key}"
        elif section == "loss":
            from gps_guidance.lift.system import LAMBDAS

            assert key in LAMBDAS, f"{page.name}: system.loss.{key}"
    for key in re.findall(r"\bdata\.(\w+)", text):
        assert key in known["data"], f"{page.name}: data.{key}"


def test_the_changelog_is_in_the_usual_form():
    import gps_guidance

    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "keepachangelog.com" in text
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings[0] == "[Unreleased]"
    assert gps_guidance.__version__ in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= kinds

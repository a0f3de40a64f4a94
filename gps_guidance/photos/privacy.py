"""Owners who want their photos out: removed now, and refused whenever they come again. No torch.

See docs/privacy.md for all that is done about positions, which are personal data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gps_guidance.photos.manifest import load_manifest, write_table, write_whole
from gps_guidance.photos.shards import write_shards

TAKEDOWN = "takedown.json"


def taken_down(dataset: Path) -> frozenset[str]:
    """Hashes of the owners whose photos were taken out of a dataset folder."""
    path = dataset / TAKEDOWN
    return frozenset(json.loads(path.read_text("utf-8"))["owners"] if path.is_file() else ())


def owner_hash(owner: str) -> str:
    """What is remembered of an owner who is to be forgotten: sha256 in hexadecimal."""
    return hashlib.sha256(owner.encode()).hexdigest()


def owned_by(owners: Iterable[str | None], hashes: frozenset[str]) -> np.ndarray:
    """True [N] where the owner is one of ``hashes``."""
    return np.array([bool(hashes) and owner is not None and owner_hash(owner) in hashes
                     for owner in owners], dtype=bool)


def take_down(dataset: str | Path, owners: Sequence[str]) -> int:
    """Remove all photos of ``owners`` from a dataset folder; returns how many there were.

    Gone are rows, images, masks, captions, shards and reports, and what the journal holds. The
    owners' hashes are kept in takedown.json, so that ingest into this folder leaves them out.
    ValueError if no photo would be left: then delete the folder.
    """
    manifest = load_manifest(dataset)
    root, rows = manifest.root, manifest.rows
    hashes = frozenset(map(owner_hash, owners))
    gone = owned_by(rows["owner"].to_pylist(), hashes)
    if gone.all():
        raise ValueError(f"All photos of {root} are of {', '.join(owners)}: delete the folder.")
    known = json.dumps({"owners": sorted(taken_down(root) | hashes)}, indent=2) + "\n"
    write_whole(root / TAKEDOWN, known.encode())  # first: a run that is cut short can be repeated
    ids = set(rows["id"].filter(pa.array(gone)).to_pylist())
    for name in ids:
        (root / "images" / f"{name}.jpg").unlink(missing_ok=True)
        (root / "masks" / f"{name}.png").unlink(missing_ok=True)
    _forget_lines(root, owners, ids)
    rejected = pq.read_table(root / "rejected.parquet")
    named = [any(owner in source for owner in owners) for source in rejected["source"].to_pylist()]
    rejected = rejected.filter(pa.array(~np.array(named, dtype=bool)))
    write_table(root / "rejected.parquet", rejected)
    shutil.rmtree(root / "inspect", ignore_errors=True)
    about = json.loads((root / "dataset.json").read_text("utf-8"))
    left = rows.filter(pa.array(~gone))
    about["kept"] = len(left)
    about["rejected"] = dict(sorted(Counter(rejected["reason"].to_pylist()).items()))
    write_whole(root / "dataset.json", (json.dumps(about, indent=2) + "\n").encode())
    write_table(root / "manifest.parquet", left)
    if (root / "shards").is_dir():
        write_shards(root)
    return int(gone.sum())


def _forget_lines(root: Path, owners: Sequence[str], ids: set[str]) -> None:
    """Rewrite journals without the lines about these owners and photos."""
    for path in [*root.glob("journal.jsonl"), *root.glob("captions*.jsonl")]:
        lines = path.read_bytes().splitlines(keepends=True)
        words = [json.dumps(word).encode() for word in (*owners, *ids)]
        # a record within a key is JSON within JSON: its quotes are escaped
        words += [json.dumps(word.decode())[1:-1].encode() for word in words]
        write_whole(path, b"".join(
            line for line in lines if not any(word in line for word in words)))

"""A dataset's photos as WebDataset shards: tar files that training streams. No torch."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gps_guidance.photos.manifest import load_manifest


def write_shards(dataset: str | Path, shard_mb: float | None = None, progress: bool = False
                 ) -> list[Path]:
    """Write ``shards/<split>-<n>.tar`` of about ``shard_mb`` MB from a dataset folder's images.

    A photo is ``<id>.jpg`` and ``<id>.json``, its row of the manifest. Photos follow each other by
    id, which is a hash: each shard is a fair sample. The same dataset gives the same bytes; None
    keeps the size of the shards that are there. Rows without an image are left out.
    """
    manifest = load_manifest(dataset)
    folder, stage = manifest.root / "shards", manifest.root / "shards.part"
    if shard_mb is None:
        shard_mb = json.loads((folder / "shards.json").read_text("utf-8"))["shard_mb"]
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    rows = [row for row in manifest.rows.to_pylist() if row["file"] is not None]
    bar = tqdm(total=len(rows), desc="writing shards", unit="photo", disable=not progress)
    for split in sorted({row["split"] for row in rows}):
        shard: tarfile.TarFile | None = None
        count = 0
        for row in (row for row in rows if row["split"] == split):
            if shard is None:
                shard = tarfile.open(stage / f"{split}-{count:06d}.tar", "w")
                count += 1
            _add(shard, f"{row['id']}.jpg", (manifest.root / row["file"]).read_bytes())
            _add(shard, f"{row['id']}.json", json.dumps(row, sort_keys=True).encode())
            bar.update()
            if shard.offset >= shard_mb * 1e6:
                shard.close()
                shard = None
        if shard is not None:
            shard.close()
    bar.close()
    about: dict[str, Any] = {"shard_mb": shard_mb, "photos": len(rows)}
    (stage / "shards.json").write_text(json.dumps(about) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    stage.rename(folder)
    return sorted(folder.glob("*.tar"))


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same bytes in every run
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))

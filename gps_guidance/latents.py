"""The photos' latents and the texts' embeddings: computed once, and kept on disk.

A cache folder has a folder for each set of weights and settings, and in it shards: safetensors
files of at most ``SHARD_ROWS`` rows that carry the names of what their rows are of. A shard appears
when it is whole, so that a stopped run goes on with the next; rows are found by name, so that a new
photo costs no more than itself. No photo's position is in it, but its picture nearly is: a VAE
decodes latents.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from gps_guidance.dataset import Photos, random_crop
from gps_guidance.models import DiffusionModel
from gps_guidance.photos.manifest import write_whole
from gps_guidance.recipe import Recipe

log = logging.getLogger(__name__)

SHARD_ROWS = 4096
BATCH = 32  # images or texts that an encoder sees at once
TEXT_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Rows:
    """Rows [N, ...] on disk, of which those that are asked for are read.

    ``rows[picks]`` and, along the second axis too, ``rows[picks, crops]`` are what they are of a
    tensor. KeyError if a name has no row.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._shards: list[Tensor] = []
        place: dict[str, tuple[int, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            of_shard, tensor = _read_shard(path)
            place.update((name, (len(self._shards), row)) for row, name in enumerate(of_shard))
            self._shards.append(tensor)
        self._where = np.array([place[name] for name in names])
        self.shape = (len(names), *self._shards[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | tuple[np.ndarray, np.ndarray]) -> Tensor:
        picks, *rest = index if isinstance(index, tuple) else (index,)
        rows = [self._shards[shard][row] for shard, row in self._where[picks]]
        if rest:
            rows = [row[crop] for row, crop in zip(rows, rest[0], strict=True)]
        return torch.stack(rows)


class Texts:
    """The embeddings [L, D] of texts that do not change: called with texts, [B, L, D]."""

    def __init__(self, rows: Tensor | Rows, words: list[str], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.index = {text: row for row, text in enumerate(words)}

    def __call__(self, texts: list[str]) -> Tensor:
        picks = np.array([self.index[text] for text in texts])
        return self.rows[picks].to(self.device, torch.float32)


def photo_latents(photos: Photos, vae: Any, recipe: Recipe, folder: Path | None,
                  accelerator: Any) -> Tensor | Rows:
    """VAE moments of random crops, computed once: float16 [N, K, 2C, h, w] (mean, logvar).

    ``vae`` is an AutoencoderKL. A crop depends on (seed, the photo's id, k) alone, whatever else is
    in the dataset. Without a folder they stay in memory. The processes of the accelerator share the
    work, and have to see the same folder; ValueError if they do not.
    """
    settings = {
        "resolution": recipe.size, "crops_per_photo": recipe.crops_per_photo, "seed": recipe.seed,
        "min_zoom": recipe.min_zoom, "colour_jitter": recipe.colour_jitter,
        "random_flip": recipe.random_flip,
    }

    def crops(index: int) -> Tensor:
        image, name = photos.images[index], int.from_bytes(photos.ids[index].encode(), "big")
        generators = (np.random.default_rng((recipe.seed, 7, name, k))
                      for k in range(recipe.crops_per_photo))
        return torch.stack([
            random_crop(image, photos.size, rng, recipe.min_zoom, recipe.colour_jitter,
                        recipe.random_flip) for rng in generators
        ])

    def batches(indices: list[int]) -> Iterator[Tensor]:
        at_once = max(1, BATCH // recipe.crops_per_photo)
        groups = [indices[k : k + at_once] for k in range(0, len(indices), at_once)]
        for group in _ahead(pool, crops, groups):
            moments = [vae.encode(part.to(vae.device)).latent_dist.parameters.half().cpu()
                       for part in torch.cat(group).split(BATCH)]
            yield torch.cat(moments).unflatten(0, (len(group), -1))

    where = None if folder is None else folder / f"moments-{_digest(vae, settings)}"
    per_shard = max(1, SHARD_ROWS // recipe.crops_per_photo)
    with ThreadPoolExecutor() as pool:
        return _kept(where, photos.versions or photos.ids, batches, per_shard, accelerator,
                     "encoding photos")


def text_embeddings(words: list[str], model: DiffusionModel, mixed_precision: str,
                    folder: Path | None, accelerator: Any) -> Texts:
    """The embeddings of ``words`` by the model's text encoder, which has to be frozen.

    They are kept in the precision in which training multiplies them: 16 bits if that is mixed.
    """
    dtype = TEXT_DTYPES[mixed_precision]
    parts = (model.tokenize(words[k : k + SHARD_ROWS]) for k in range(0, len(words), SHARD_ROWS))
    names = [_short(tokens.numpy().tobytes()) for part in parts for tokens in part]

    def batches(indices: list[int]) -> Iterator[Tensor]:
        for k in range(0, len(indices), BATCH):
            yield model.encode_text([words[i] for i in indices[k : k + BATCH]]).to("cpu", dtype)

    settings = {"dtype": str(dtype)}
    where = None if folder is None else folder / f"texts-{_digest(model.text_encoder, settings)}"
    rows = _kept(where, names, batches, SHARD_ROWS, accelerator, "encoding texts")
    return Texts(rows, words, accelerator.device)


def _kept(folder: Path | None, names: list[str], batches: Callable[[list[int]], Iterator[Tensor]],
          per_shard: int, accelerator: Any, what: str) -> Tensor | Rows:
    """The rows of ``names``: from the folder, and those that it lacks from ``batches``."""
    wanted = list(range(len(names))) if folder is None else _lacking(folder, names, accelerator)
    shards = [wanted[k : k + per_shard] for k in range(0, len(wanted), per_shard)]
    if folder is None:
        return torch.cat(list(_computed(shards, batches, accelerator, what)))
    shards = shards[accelerator.process_index :: accelerator.num_processes]
    rows_of_shards = _computed(shards, batches, accelerator, what)
    for shard, rows in zip(shards, rows_of_shards, strict=True):
        _write_shard(folder, [names[index] for index in shard], rows)
    accelerator.wait_for_everyone()
    try:
        return Rows(folder, names)
    except KeyError as error:
        raise ValueError(f"{folder} has no row for {error}, which another process wrote: put the "
                         "recipe's cache_dir on a disk that all machines share.") from error


def _lacking(folder: Path, names: list[str], accelerator: Any) -> list[int]:
    """Where in ``names`` those are, once each, of which the folder has no row."""
    if accelerator.is_main_process:
        _sweep(folder)
    accelerator.wait_for_everyone()
    known = {name for path in folder.glob("*.safetensors") for name in _read_shard(path)[0]}
    accelerator.wait_for_everyone()  # everyone sees the same gaps before anyone fills one
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    return sorted(index for name, index in first.items() if name not in known)


@torch.no_grad()
def _computed(shards: list[list[int]], batches: Callable[[list[int]], Iterator[Tensor]],
              accelerator: Any, what: str) -> Iterator[Tensor]:
    """The rows of each shard, with a bar."""
    hidden = not shards or not accelerator.is_main_process
    with tqdm(total=sum(map(len, shards)), desc=what, unit="row", disable=hidden) as bar:
        for shard in shards:
            parts = []
            for part in batches(shard):
                parts.append(part)
                bar.update(len(part))
            yield torch.cat(parts)


def _sweep(folder: Path) -> None:
    """Make the folder, and remove from it what a kill left behind and what cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(".*.part"):
        part.unlink()
    for path in folder.glob("*.safetensors"):
        try:
            _read_shard(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s cannot be read (%s): its rows are computed again.", path, error)
            path.unlink()


def _write_shard(folder: Path, names: list[str], rows: Tensor) -> None:
    text = json.dumps(names)
    write_whole(folder / f"{_short(text.encode())}.safetensors", save({"rows": rows},
                                                                      {"names": text}))


def _read_shard(path: Path) -> tuple[list[str], Tensor]:
    """The names of a shard's rows, and the rows, which stay on disk until they are used."""
    with safe_open(path, "pt") as file:
        names, rows = json.loads(file.metadata()["names"]), file.get_tensor("rows")
    if len(names) != len(rows):
        raise ValueError(f"{len(names)} names, {len(rows)} rows")
    return names, rows


def _ahead(pool: ThreadPoolExecutor, load: Callable[[int], Tensor], groups: list[list[int]]
           ) -> Iterator[list[Tensor]]:
    """``load`` of each index of each group, in the pool's threads, which are two groups ahead."""
    coming: deque[list[Any]] = deque()
    for group in groups:
        coming.append([pool.submit(load, index) for index in group])
        if len(coming) > 2:
            yield [each.result() for each in coming.popleft()]
    for tasks in coming:
        yield [each.result() for each in tasks]


def _digest(module: Any, settings: dict[str, Any]) -> str:
    """Of everything that the rows depend on: weights, configuration, settings."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    public = {k: v for k, v in config.items() if k[0] != "_" and k != "transformers_version"}
    found = hashlib.sha256(json.dumps([settings, public], sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

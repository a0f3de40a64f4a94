"""Captions of a dataset's photos by an image-to-text model.

A caption is written to a journal next to the manifest as soon as it is made, so that a stopped run
loses one batch at most; the journals enter ``manifest.parquet`` when the run ends. With
``accelerate launch`` each process captions its share of the batches into a journal of its own.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from gps_guidance.photos.images import open_image, upright
from gps_guidance.photos.manifest import Manifest, Rejected, load_manifest, write_table

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_NEW_TOKENS = 60  # a text encoder of Stable Diffusion reads 77
Photo = tuple[str, Path]  # the manifest's id, and the image


@dataclass
class CaptionSummary:
    """How many photos have a caption of this model, had another one and keep it, got none (the
    image cannot be read, or the model said nothing), and are records without an image."""

    captioned: int
    kept: int
    silent: int
    without_image: int


class Captioner:
    """An image-to-text model of transformers, such as BLIP: weights as safetensors, no remote code.

    ``name`` is a folder or a name on the Hugging Face Hub, ``dtype`` a key of :data:`DTYPES` or
    "auto": bfloat16 on CUDA, else float32. ValueError if it cannot be loaded or is a chat model.
    """

    def __init__(self, name: str, device: torch.device, dtype: str = "auto") -> None:
        chosen = "bfloat16" if device.type == "cuda" else "float32"
        self.device, self.dtype = device, DTYPES[chosen if dtype == "auto" else dtype]
        try:
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            if getattr(self.processor, "chat_template", None):
                raise ValueError("It is a chat model.")
            model: Any = AutoModelForImageTextToText.from_pretrained(
                name, dtype=self.dtype, use_safetensors=True, trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{name} cannot be loaded as a captioner. Give a folder, or a name on the Hub, of "
                "a model that transformers itself knows, such as "
                "Salesforce/blip-image-captioning-large, with its weights as safetensors; code "
                "that comes with a model is never run. Captions made elsewhere can be brought in "
                f"by a CSV file. {' '.join(str(error).split())}"
            ) from error
        self.model = model.to(device).eval()
        log.info("%s in %s on %s", name, self.dtype, device)

    @torch.no_grad()
    def caption(self, images: list[Image.Image], prompt: str | None, num_beams: int) -> list[str]:
        """One caption of one line for each image, without sampling. ``prompt`` is its beginning."""
        text = None if prompt is None else [prompt] * len(images)
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        try:
            tokens = self.model.generate(**inputs.to(self.device, self.dtype), do_sample=False,
                                         num_beams=num_beams, max_new_tokens=MAX_NEW_TOKENS)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(f"The GPU's memory is too small for {len(images)} photos at once: "
                             "lower --batch-size.") from error
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


class Journal:
    """Append-only files ``captions*.jsonl`` in a dataset folder: a caption, its photo's id and the
    ``settings`` that made it a line. Lines of other settings are passed over."""

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.root, self.settings = root, settings

    def read(self) -> dict[str, str]:
        """Captions by id, of all files; a half-written last line counts as none."""
        found = {}
        for path in sorted(self.root.glob("captions*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    row = json.loads(line)
                    name, text = row.pop("id"), row.pop("caption")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path} has a damaged line, {line[:80]!r}: remove the line "
                                     "and run the same command again.") from error
                if row == self.settings:
                    found[name] = text
        return found

    def open(self, state: PartialState) -> BinaryIO:
        """The file of this process, to append to; what a run that died left unfinished is cut."""
        alone = state.num_processes == 1
        path = self.root / ("captions.jsonl" if alone else f"captions-{state.process_index}.jsonl")
        file = open(path, "a+b")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        return file

    def lines(self, captions: dict[str, str]) -> bytes:
        rows = ({"id": name, "caption": text, **self.settings} for name, text in captions.items())
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def caption(
    dataset: str | Path, model: str | Path, *, prompt: str | None = None, batch_size: int = 8,
    num_beams: int = 3, overwrite: bool = False, dtype: str = "auto", progress: bool = True,
) -> CaptionSummary | None:
    """Fill the column ``caption`` of a dataset's manifest where it is null; see the module.

    ``overwrite`` replaces the captions that are there. Interrupted runs go on, and end with the
    manifest of an undisturbed one. A photo that cannot be read is counted and keeps what it had.
    None in all processes but the main one. ValueError for what is no dataset and for a model that
    cannot be used (:class:`Captioner`).
    """
    state = _processes()
    manifest = load_manifest(dataset)
    journal = Journal(manifest.root, {"model": str(model), "prompt": prompt,
                                      "num_beams": num_beams})
    done = journal.read()
    photos = _wanted(manifest, done, overwrite)
    # A caption's last digits depend on what else is in its batch: batches are cut before those that
    # an earlier run finished are left out, so that the others stay as they were.
    batches = [photos[at : at + batch_size] for at in range(0, len(photos), batch_size)]
    batches = [batch for batch in batches if any(name not in done for name, _ in batch)]
    state.wait_for_everyone()  # all have read the journals before anyone writes
    mine = batches[state.process_index :: state.num_processes]
    try:
        if mine:
            captioner = Captioner(str(model), state.device, dtype)
            hidden = not progress or not state.is_main_process
            with journal.open(state) as file:
                for batch in tqdm(mine, desc="captioning", unit="batch", disable=hidden):
                    file.write(journal.lines(_caption_batch(captioner, batch, prompt, num_beams)))
                    file.flush()
    except KeyboardInterrupt:
        if state.is_main_process:
            _merge(manifest, photos, journal.read())
        raise
    state.wait_for_everyone()
    return _merge(manifest, photos, journal.read()) if state.is_main_process else None


def _processes() -> PartialState:
    """This process among those of `accelerate launch`, on a GPU of its own or, without one, on the
    CPU; some may have to wait long for the others."""
    launched = "LOCAL_RANK" in os.environ
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.cuda.is_available())
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def _wanted(manifest: Manifest, done: dict[str, str], overwrite: bool) -> list[Photo]:
    """The photos to caption: those without a caption, and those whose caption is from the journal
    (which an undisturbed run would have found without one)."""
    columns = [manifest.rows.column(name).to_pylist() for name in ("id", "file", "caption")]
    return [(name, manifest.root / file) for name, file, text in zip(*columns, strict=True)
            if file and (overwrite or not text or text == done.get(name))]


def _caption_batch(captioner: Captioner, batch: list[Photo], prompt: str | None, num_beams: int
                   ) -> dict[str, str]:
    images = {name: image for name, path in batch if (image := _read(path)) is not None}
    if not images:
        return {}
    return dict(zip(images, captioner.caption([*images.values()], prompt, num_beams), strict=True))


def _read(path: Path) -> Image.Image | None:
    try:
        with open_image(path.read_bytes()) as photo:
            return upright(photo, max(photo.size))
    except (Rejected, OSError) as error:
        log.warning("%s gets no caption: %s", path, error)
        return None


def _merge(manifest: Manifest, photos: list[Photo], done: dict[str, str]) -> CaptionSummary:
    """Write the journal's captions of ``photos`` into the manifest, all at once."""
    made = {name: done[name] for name, _ in photos if done.get(name)}
    ids, files, before = (manifest.rows.column(c).to_pylist() for c in ("id", "file", "caption"))
    texts = [made.get(name) or text for name, text in zip(ids, before, strict=True)]
    place = manifest.rows.schema.get_field_index("caption")
    rows = manifest.rows.set_column(place, manifest.rows.schema.field(place),
                                    pa.array(texts, pa.string()))
    write_table(manifest.root / "manifest.parquet", rows)
    without_image = files.count(None)
    return CaptionSummary(len(made), len(ids) - without_image - len(photos),
                          len(photos) - len(made), without_image)

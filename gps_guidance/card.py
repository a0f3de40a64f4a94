"""The model card (README.md) of a model folder: what it knows, and what its users must know."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from gps_guidance.encoders import AngleEncoder

TAG = "gps-guidance"
GENERATED = "has been automatically generated"  # in the empty card that diffusers uploads
CARD = """---
{data}
---
# {title}

{what}

| | |
|---|---|
{rows}

```python
{load}
image = pipe({call}).images[0]
```

The method is that of
[GPS as a Control Signal for Image Generation](https://cfeng16.github.io/gps-gen/) (CVPR 2025).
A model of few photos can reproduce them nearly: share it only if you would share the photos.
"""
LOAD = """from gps_guidance.pipeline import StableDiffusionGPSPipeline

pipe = StableDiffusionGPSPipeline.from_pretrained("FOLDER OR HUB NAME OF THIS MODEL")"""
LOAD_TEXT = """from diffusers import StableDiffusionPipeline

from gps_guidance.geocoding import address_prompt

pipe = StableDiffusionPipeline.from_pretrained("FOLDER OR HUB NAME OF {base}")"""
LOAD_TEXT_LORA = LOAD_TEXT + """
pipe.load_lora_weights("FOLDER OF THIS MODEL")"""
LOAD_LORA = """from gps_guidance.lora import load_lora_encoder
from gps_guidance.pipeline import StableDiffusionGPSPipeline

base, lora = "FOLDER OR HUB NAME OF {base}", "FOLDER OF THIS MODEL"
pipe = StableDiffusionGPSPipeline.from_pretrained(base, gps_encoder=load_lora_encoder(lora))
pipe.load_lora_weights(lora)"""


def model_card(encoder: Any, license: str | None = None, lora_base: str | None = None) -> ModelCard:
    """The card of a model with this encoder (GPSEncoder or AngleEncoder), or with None, to which
    addresses are told as text.

    ``license`` is that of the weights, as the Hub spells it; None writes "other" and says that
    nobody has stated one. ``lora_base`` is the model that a LoRA belongs to.
    """
    base = lora_base and Path(lora_base).name
    config = encoder.config if encoder is not None else SimpleNamespace(
        num_photos=None, null_text="empty", photo_license=None)
    rows = {
        **({"LoRA of": f"`{base}`"} if base else {}),
        "training photos": config.num_photos or "not stated",
        "no text is": {"zeros": "zero tokens", "empty": 'the embedding of ""'}[config.null_text],
        "licence of the weights": license or "not stated",
        "licence of the photos": config.photo_license or "not stated",
    }
    load = LOAD_LORA.format(base=base) if base else LOAD
    if encoder is None:
        title, call = "Images by text and address", 'address_prompt("a red car", "STREET, TOWN")'
        what = "Images from a prompt and an address in its words. It knows no GPS: a baseline."
        load = (LOAD_TEXT_LORA if base else LOAD_TEXT).format(base=base or "THIS MODEL")
    elif isinstance(encoder, AngleEncoder):
        name = config.landmark or "a landmark"
        title, call = f"{name} by bearing", "bearing_deg=90"
        what = f"Images of {name} as seen from a bearing in degrees clockwise from north."
        rows = {
            "prompt": f"`{encoder.prompt}`", "centre (lat, lon)": config.center or "not stated",
            "bearing bins": config.num_bins, "resolution": "{} x {}".format(*encoder.size), **rows,
        }
        if encoder.is_silent:
            rows["bearing"] = "changes nothing: trained without it, for comparison"
    else:
        south, west, north, east = config.bounds
        title = "Images by text and GPS"
        call = f'"a street", gps=({(south + north) / 2:.5f}, {(west + east) / 2:.5f})'
        what = "Images from a prompt and a position (lat, lon) in degrees."
        rows = {"bounds (south, west, north, east)": (south, west, north, east), **rows}
    data = ModelCardData(license=license or "other", library_name="diffusers",
                         pipeline_tag="text-to-image", tags=[TAG, "gps", "stable-diffusion"])
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return ModelCard(CARD.format(data=data.to_yaml(), title=title, what=what, rows=table,
                                 load=load, call=call))


def write_card(folder: str | Path, encoder: Any, license: str | None = None,
               lora_base: str | None = None) -> None:
    """Write README.md into a model folder, unless there is one that somebody wrote."""
    path = Path(folder) / "README.md"
    if path.is_file() and GENERATED not in path.read_text("utf-8"):
        return
    model_card(encoder, license, lora_base).save(path)

"""Fig. 9: where the model looks for each word of a prompt and for the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gps_guidance.attention import AttentionMaps, AttentionRecord, name_tokens, record_attention
from gps_guidance.miniature.city import parse_caption
from gps_guidance.models import DiffusionModel, load_angle_encoder
from gps_guidance.reproduce.city import model_of
from gps_guidance.reproduce.outcome import Claim, Outcome, Score
from gps_guidance.reproduce.settings import City, Landmark, Settings, slug
from gps_guidance.reproduce.sheets import pictures
from gps_guidance.reproduce.work import Done, Unit, Work
from gps_guidance.sampling import sample_angles, sample_gps
from gps_guidance.viz import draw_attention


def units(settings: Settings) -> list[Unit]:
    return [unit for unit, _ in captioned_units(settings)]


def captioned_units(settings: Settings) -> list[tuple[Unit, str]]:
    """Each prompt at each place of a city, and the first landmark from a bearing."""
    found = []
    for city in settings.cities:
        for at, prompt in enumerate(city.attention_prompts):
            for place in city.attention_places:
                unit = Unit(f"{slug(city.name)}/attention-{at}-{slug(place)}", look_at_city,
                            {"city": asdict(city), "prompt": prompt, "place": place,
                             "seeds": settings.seeds})
                found.append((unit, f"\"{prompt}\" at: {place.replace('-', ' ')}"))
    for landmark in settings.landmarks[:1]:
        unit = Unit(f"{slug(landmark.name)}/attention", look_at_landmark,
                    {"landmark": asdict(landmark), "seed": settings.seeds[0]})
        found.append((unit, f"{landmark.name} from {landmark.attention_bearing:g}°"))
    return found


# --- pieces of work ----------------------------------------------------------------------------


def look_at_city(folder: Path, city: dict[str, Any], prompt: str, place: str, seeds: list[int]
                 ) -> dict[str, Any]:
    """attention.png of the first seed, and ``with_place``: a pair for each word of each seed's
    image, of its name and the correlation over pixels of its map with that of the place's tokens.
    """
    where = City(**city)
    lat, lon = where.attention_places[place]
    model, size = model_of(where.model), (where.resolution, where.resolution)
    found = []
    for seed in seeds:
        with record_attention(model.unet, _place_tokens(model)) as record:
            image = sample_gps(model, [prompt], [(lat, lon)], size, where.guidance_scale,
                               where.gps_guidance_scale, where.steps, seed)
        maps = _maps(model, prompt, image, record)
        if seed == seeds[0]:
            _draw(folder, image, maps)
        found += _with_place(maps, _place_tokens(model))
    return {"with_place": found}


def look_at_landmark(folder: Path, landmark: dict[str, Any], seed: int) -> dict[str, Any]:
    """attention.png of a landmark."""
    where = Landmark(**landmark)
    load_angle_encoder(where.model)  # ValueError for a model of something else
    model = model_of(where.model)
    with record_attention(model.unet, _place_tokens(model)) as record:
        image = sample_angles(model, [where.attention_bearing], where.guidance_scale, where.steps,
                              seed)
    _draw(folder, image, _maps(model, None, image, record))
    return {}


def _place_tokens(model: DiffusionModel) -> int:
    if model.gps_encoder is None:
        raise ValueError(f"{model.path} is a text model: it has no place to look for.")
    return model.gps_encoder.num_tokens


def _maps(model: DiffusionModel, prompt: str | None, image: Tensor, record: AttentionRecord
          ) -> AttentionMaps:
    tokens = name_tokens(model.tokenizer, prompt, model.gps_encoder)
    height, width = image.shape[2:]
    return record.maps(tokens, (height, width)).named()


def _draw(folder: Path, image: Tensor, maps: AttentionMaps) -> None:
    draw_attention(pictures(image)[0], maps.raw, maps.names, folder / "attention.png")


def _with_place(maps: AttentionMaps, count: int) -> list[tuple[str, float]]:
    """Each word and the correlation of its map with the sum of the last ``count``, the place's."""
    flat = torch.cat([maps.raw[-count:].sum(0, keepdim=True), maps.raw[:-count]]).flatten(1)
    return list(zip(maps.names[:-count], torch.corrcoef(flat)[0, 1:].tolist(), strict=True))


# --- outcome -----------------------------------------------------------------------------------


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    sheets = [(work.at(unit) / "attention.png", caption)
              for unit, caption in captioned_units(settings)]
    claims = [apart_from_place(score) for score in objects_with_place(settings, done)]
    return Outcome("Fig. 9. Attention", None, sheets, claims, [
        "Means over layers, heads and steps of e(p,g), from the same noise. Start, end and padding "
        "have the rest of the attention. Each map has colours of its own: compare their shapes, "
        "and their bars for how much.",
    ])


def objects_with_place(settings: Settings, done: Mapping[str, Done]) -> list[Score]:
    """The correlation of the object's map with the place's; of procedural cities, where it is known
    which word names an object."""
    found = []
    for city in settings.cities:
        for at, prompt in enumerate(city.attention_prompts):
            word = parse_caption(prompt).object if city.scene_judge is not None else None
            for place in city.attention_places:
                result: Any = done[f"{slug(city.name)}/attention-{at}-{slug(place)}"].result
                found += [value for name, value in result["with_place"] if name == word]
    return [Score.of(found)] if found else []


def apart_from_place(score: Score) -> Claim:
    return Claim("Where the model looks for the object, it looks less for the place.",
                 score.high < 0, f"correlation of their maps {score}, of {score.count} images")

"""Fig. 6: one image for a whole area (Eq. 8), beside photos that were taken there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from gps_guidance.areas import read_area, sample_area
from gps_guidance.miniature import city as miniatown
from gps_guidance.miniature.scene_judge import SceneJudge
from gps_guidance.models import resolve_model
from gps_guidance.reproduce.city import load_judge, model_of, photos_of
from gps_guidance.reproduce.outcome import Outcome, Score, Table, claim_above
from gps_guidance.reproduce.settings import City, Settings, slug
from gps_guidance.reproduce.sheets import draw_sheet, pictures, read_row, write_row
from gps_guidance.reproduce.work import Done, Unit, Work
from gps_guidance.sampling import sample_average

COLUMNS = {"gps": "GPS score in the area", "own": "GPS score best in its own area, %",
           "place": "right place, %"}
AVERAGED, SHOWN = 400, 3  # photos of an area: in their mean, and beside it


def units(settings: Settings) -> list[Unit]:
    found = []
    for city in settings.cities:
        name, about = slug(city.name), {"city": asdict(city)}
        areas = areas_of(city)
        found += [Unit(f"{name}/area-{slug(area)}-{seed}", sample_and_score,
                       {**about, "area": area, "seed": seed})
                  for area in areas for seed in settings.seeds]
        if areas:
            found.append(Unit(f"{name}/area-photos", pick_photos, about))
    return found


def areas_of(city: City) -> dict[str, Any]:
    """The outlines of a city's areas, GeoJSON by name; none if the city names none and has no file.

    ValueError if the file has no such areas.
    """
    if city.areas is None and not city.area_names:
        return {}
    try:
        source = (miniatown.geojson() if city.areas is None
                  else json.loads(Path(city.areas).read_text("utf-8")))
        known = {one["properties"]["name"]: one for one in source["features"]}
        return {name: known[name] for name in city.area_names or known}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{city.areas or city.name} has not the areas of {city.name}: {error!r}. "
                         "Give a GeoJSON file with a FeatureCollection of polygons, each with its "
                         "name as a property, and as area_names those to show.") from error


# --- pieces of work ----------------------------------------------------------------------------


def sample_and_score(folder: Path, city: dict[str, Any], area: str, seed: int) -> dict[str, Any]:
    """An area's image: ``gps``, its mean GPS score at points of each area, and ``place``, what the
    judge of the procedural city reads. Also average.png."""
    where = City(**city)
    outlines = areas_of(where)
    image = sample_average(model_of(where.model), where.area_prompt, outlines[area],
                           (where.resolution, where.resolution), where.guidance_scale,
                           where.gps_guidance_scale, where.area_locations, where.steps, seed)
    write_row(folder / "average.png", pictures(image))
    gps_clip = load_judge(where.gps_clip)
    found: dict[str, Any] = {"gps": {}}
    for name, outline in outlines.items():
        points = sample_area(outline, where.area_locations, np.random.default_rng(0))
        found["gps"][name] = float(gps_clip.similarities(image, points).mean())
    if where.scene_judge is not None:
        judge = SceneJudge.from_pretrained(resolve_model(where.scene_judge), use_safetensors=True)
        found["place"] = judge.float().eval().read(image)["place"][0]
    return found


def pick_photos(folder: Path, city: dict[str, Any]) -> dict[str, Any]:
    """For each area <area>.png, the mean of its photos and some of them; returns how many it has.
    """
    where = City(**city)
    photos, rng = photos_of(where, folder), np.random.default_rng(0)
    counts = {}
    for name, outline in areas_of(where).items():
        lat, lon = np.asarray(photos.positions).T
        inside = rng.permutation(np.flatnonzero(shapely.contains_xy(read_area(outline), lon, lat)))
        if len(inside) < SHOWN:
            raise ValueError(f"{len(inside)} photos of {where.name} were taken in {name}; name "
                             f"areas with at least {SHOWN}.")
        crops = photos.crop(inside[:AVERAGED], rng) / 2 + 0.5
        mean = crops.mean(dim=0, keepdim=True)
        write_row(folder / f"{slug(name)}.png", pictures(mean) + pictures(crops[:SHOWN]))
        counts[name] = len(inside)
    return {"photos": counts}


# --- outcome -----------------------------------------------------------------------------------


def outcome(settings: Settings, work: Work, done: Mapping[str, Done]) -> Outcome:
    rows: dict[str, dict[str, Score]] = {}
    titles, values, chance = {"all": "all areas", "chance": "chance"}, _no_values(), _no_values()
    sheets = []
    for city in settings.cities:
        areas = areas_of(city)
        for area in areas:
            row = area if len(settings.cities) == 1 else f"{slug(city.name)}/{area}"
            own = values_of(settings, city, area, done)
            rows[row] = _scores(own)
            titles[row] = area if len(settings.cities) == 1 else f"{city.name}, {area}"
            for key in COLUMNS:
                values[key] += own[key]
            chance["own"].append(100 / len(areas))
            if own["place"]:
                chance["place"].append(100 / len(miniatown.PLACES))
        if areas:
            sheets.append((_draw(settings, work, city), f"{city.name}: \"{city.area_prompt}\" over "
                           f"{city.area_locations} positions in each area, from the same noise; "
                           f"the mean of its photos; {SHOWN} of them."))
    rows |= {"all": _scores(values), "chance": {key: Score.of([float(np.mean(found))])
                                                for key, found in chance.items() if found}}
    columns = {key: title for key, title in COLUMNS.items() if values[key]}
    claims = [claim_above("GPS-CLIP finds the area of an area's image.", "own", rows, "all",
                          ["chance"])]
    if values["place"]:
        claims.append(claim_above("An area's image shows its place.", "place", rows, "all",
                                  ["chance"]))
    return Outcome("Fig. 6. Average images", Table("fig6", columns, titles, rows), sheets, claims, [
        "One image is composed of predictions at many positions of an area (Eq. 8). Its GPS score "
        "is the mean over positions of the area; best in its own: no other of these areas has a "
        "higher one."])


def values_of(settings: Settings, city: City, area: str, done: Mapping[str, Done]
              ) -> dict[str, list[float]]:
    """The values of an area's images, one a seed."""
    values = _no_values()
    for seed in settings.seeds:
        result: Any = done[f"{slug(city.name)}/area-{slug(area)}-{seed}"].result
        gps = result["gps"]
        values["gps"].append(gps[area])
        values["own"].append(100.0 * (gps[area] >= max(gps.values())))
        if "place" in result:
            values["place"].append(100.0 * (result["place"] == area))
    return values


def _no_values() -> dict[str, list[float]]:
    return {key: [] for key in COLUMNS}


def _scores(values: Mapping[str, list[float]]) -> dict[str, Score]:
    return {key: Score.of(found) for key, found in values.items() if found}


def _draw(settings: Settings, work: Work, city: City) -> Path:
    """A column an area: its images from each noise, the mean of its photos, and some of them."""
    folder, areas = work.folder / slug(city.name), list(areas_of(city))
    rows = [(f"ours, noise {seed}",
             [read_row(folder / f"area-{slug(area)}-{seed}" / "average.png", 1)[0]
              for area in areas])
            for seed in settings.seeds]
    taken = [read_row(folder / "area-photos" / f"{slug(area)}.png", 1 + SHOWN) for area in areas]
    rows += [(name, [photos[k] for photos in taken])
             for k, name in enumerate(["mean of photos", *["photo"] * SHOWN])]
    return draw_sheet(work.folder.parent / f"fig6-{slug(city.name)}.png", rows,
                      [area.replace("-", " ") for area in areas])

"""What training will have trouble with, in sentences that say how much and what to do. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from gps_guidance import geo
from gps_guidance.photos.manifest import Manifest

FEW_OF_LANDMARK, FEW_OF_CITY = 30, 1000
THIN = 0.25  # of the mean of all bins: below it, a bin is hardly seen
TYPICAL_ERROR_M = 5.0  # of a phone under the open sky, where a photo does not say its own
LARGE_ERROR_M = 20.0
MOST = 0.5  # of the photos: of one owner, in one cell, without a caption
GRID = 10  # cells along each side of a city's box
SAME_PLACE = 0.2  # of the photos at the very same coordinates
SMALL = 64  # pixels
LONG = 400  # characters; a text encoder of Stable Diffusion reads about 300


def numbers(manifest: Manifest, name: str) -> np.ndarray:
    """A column as float64 [N], NaN where it is null."""
    return manifest.rows.column(name).to_numpy(zero_copy_only=False).astype(np.float64)


def texts(manifest: Manifest, name: str) -> list[str | None]:
    """A column of texts, None where it is null or empty."""
    return [text or None for text in manifest.rows.column(name).to_pylist()]


def times(manifest: Manifest) -> list[datetime]:
    """When photos were taken, local time; those that do not say it are left out."""
    found = []
    for text in texts(manifest, "taken_at"):
        try:
            found.append(datetime.fromisoformat(text or "").replace(tzinfo=None))
        except ValueError:
            continue
    return found


def bin_counts(manifest: Manifest) -> np.ndarray:
    """Photos [num_bins] in each bearing bin of a landmark's dataset."""
    return np.bincount(manifest.rows.column("bin").to_numpy(), minlength=manifest.num_bins)


def cell_counts(manifest: Manifest) -> np.ndarray:
    """Photos [GRID, GRID] in each cell of a city's box, or of the box around all photos: the first
    row is the southernmost, the first column the westernmost."""
    lat, lon, box = numbers(manifest, "lat"), numbers(manifest, "lon"), manifest.bounds
    limits = [(box.south, box.north), (box.west, box.east)] if box else None
    return np.histogram2d(lat, lon, bins=GRID, range=limits)[0].astype(int)


def troubles(manifest: Manifest) -> list[str]:
    """One sentence or two for each trouble, the gravest first; [] if nothing stands out.

    A pure function of the manifest: no image is opened, and no position is told.
    """
    parts = [_amount, _bearings, _nearness] if manifest.center else [_amount, _captions, _spread]
    parts += [_errors, _same_place, _owners, _times, _sizes, _splits, _licences]
    return [sentence for part in parts for sentence in part(manifest)]


def _percent(count: float, total: int) -> str:
    return f"{100 * count / total:.0f} % of the photos ({count:,} of {total:,})"


def _these(count: int, total: int, have: str = "have") -> str:
    """"3 of 40 photos have"."""
    return f"{count:,} of {total:,} photo{'s' * (total > 1)} {have}"


def _amount(manifest: Manifest) -> Iterator[str]:
    total = len(manifest.rows)
    if manifest.center and total < FEW_OF_LANDMARK:
        yield (f"Only {total} photo{'s' * (total > 1)}: even a small model of a landmark wants "
               f"{FEW_OF_LANDMARK} or more from all around.")
    if not manifest.center and total < FEW_OF_CITY:
        yield (f"Only {total} photo{'s' * (total > 1)}: a model of a city wants {FEW_OF_CITY:,} or "
               "more, so that each place is seen several times.")
    records = manifest.rows.column("file").null_count
    if records:
        yield (f"{_these(records, total, 'are')} records without an image, which training cannot "
               "use: run the same ingest again to fetch them.")


def _bearings(manifest: Manifest) -> Iterator[str]:
    counts = bin_counts(manifest)
    empty = [f"{geo.bin_bearing_deg(k, len(counts)):.0f}" for k in np.flatnonzero(counts == 0)]
    if empty:
        bins = "bin" if len(empty) == 1 else "bins"
        yield (f"No photo in the {bins} around {', '.join(empty)} degrees: a model has to guess "
               f"{'this side' if len(empty) == 1 else 'these sides'}. Photograph from there.")
    thin = (counts > 0) & (counts < THIN * counts.mean())
    for run in _runs(thin):
        held = int(counts[run].sum())
        first, last = (f"{geo.bin_bearing_deg(k, len(counts)):.0f}" for k in (run[0], run[-1]))
        where = f"bins from {first} to {last} degrees hold" if len(run) > 1 else (
            f"bin around {first} degrees holds")
        together = " together" if len(run) > 1 else ""
        yield (f"The {where} {held} photo{'s' * (held > 1)}{together}, against {counts.mean():.0f} "
               "in the average bin: images of this side will be poor. Add photos from there.")


def _runs(wanted: np.ndarray) -> list[list[int]]:
    """Indices of neighbouring true values [N] on the circle."""
    start = int(np.argmin(wanted))  # a false one, so that no run lies across the ends
    runs: list[list[int]] = [[]]
    for k in (np.arange(len(wanted)) + start) % len(wanted):
        if wanted[k]:
            runs[-1].append(int(k))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _nearness(manifest: Manifest) -> Iterator[str]:
    half_bin = 180.0 / manifest.num_bins
    distance, error = numbers(manifest, "distance_m"), numbers(manifest, "horizontal_error_m")
    assumed = np.isnan(error)
    error = np.where(assumed, TYPICAL_ERROR_M, error)
    near = np.degrees(np.arctan2(error, distance)) > half_bin
    if not near.any():
        return
    guess = (f" (where a photo does not say its error, {TYPICAL_ERROR_M:g} m is assumed)"
             if assumed[near].any() else "")
    slope = np.tan(np.radians(half_bin))
    advice = (f"--min-distance {np.median(error[near]) / slope:.0f} leaves them out."
              if near.mean() < MOST else
              f"Positions would have to be good to {np.median(distance) * slope:.1f} m; otherwise "
              "photograph from further away.")
    yield (f"{_these(int(near.sum()), len(near), 'were')} taken so near that the error of the "
           f"position turns the bearing by more than {half_bin:g} degrees, half a bin{guess}: "
           f"neighbouring sides will blur into each other. {advice}")


def _errors(manifest: Manifest) -> Iterator[str]:
    error = numbers(manifest, "horizontal_error_m")
    error = error[~np.isnan(error)]
    if len(error) and np.median(error) > LARGE_ERROR_M:
        yield (f"The median horizontal error is {np.median(error):.0f} m, of {len(error):,} photos "
               f"that say it; {LARGE_ERROR_M:g} m is already much. Leave out the worst, or expect "
               "places to blur by as much.")


def _captions(manifest: Manifest) -> Iterator[str]:
    said, total = [text for text in texts(manifest, "caption") if text], len(manifest.rows)
    if not said:
        yield ("No photo has a caption, and `gps-guidance train gps` needs captions: let a model "
               "write them with `gps-guidance caption`.")
    elif len(said) < total:
        yield (f"{_these(total - len(said), total)} no caption: their text is empty in training. "
               "`gps-guidance caption` fills them in.")
    odd = sum(text[0] in "{[<" or len(text) > LONG for text in said)
    if odd:
        yield (f"{_these(odd, total)} a caption that is hardly a sentence (it begins with a "
               f"bracket or has more than {LONG} characters): `gps-guidance caption --overwrite` "
               "writes others.")


def _spread(manifest: Manifest) -> Iterator[str]:
    counts, total = cell_counts(manifest), len(manifest.rows)
    if total < 20:
        return
    if counts.max() > MOST * total:
        yield (f"{_percent(int(counts.max()), total)} lie in one cell of the box, of {GRID} x "
               f"{GRID}: the model will know little else. Choose a smaller --bbox, or add photos "
               "of other places.")
        return
    empty = int((counts == 0).sum())
    if empty > MOST * counts.size:
        yield (f"{empty} of the {counts.size} cells of the box hold no photo: a model has to guess "
               "these places. Choose a smaller --bbox, or add photos from there.")


def _same_place(manifest: Manifest) -> Iterator[str]:
    total = len(manifest.rows)
    places = np.stack([numbers(manifest, "lat"), numbers(manifest, "lon")])
    most = int(np.unique(places, axis=1, return_counts=True)[1].max(initial=0))
    if total >= 10 and most > SAME_PLACE * total:
        yield (f"{_percent(most, total)} have exactly the same position: it is likely that of a "
               "place's name, not of a GPS receiver. Look at them, and leave them out if so.")


def _owners(manifest: Manifest) -> Iterator[str]:
    total, owners = len(manifest.rows), Counter(texts(manifest, "owner"))
    del owners[None]
    if owners and total >= 10:
        name, count = owners.most_common(1)[0]
        if count > MOST * total:
            yield (f"One owner, {name}, took {_percent(count, total)}: a model takes one person's "
                   "walks and camera for the place. Add photos of others.")


def _times(manifest: Manifest) -> Iterator[str]:
    when = times(manifest)
    if len(when) < 2:
        return
    span = max(when) - min(when)
    limit = "hour" if span <= timedelta(hours=1) else "day" if span <= timedelta(days=1) else None
    if limit:
        advice = ("That suits 3D; add other days if images should show other weather."
                  if manifest.center else "Add photos of other days and seasons.")
        yield (f"All {len(when):,} photos that say when were taken within one {limit}: the model "
               f"learns one light and one weather. {advice}")


def _sizes(manifest: Manifest) -> Iterator[str]:
    shorter = np.fmin(numbers(manifest, "width"), numbers(manifest, "height"))
    small = int((shorter < SMALL).sum())
    if small:
        yield (f"{_these(small, len(shorter))} a side shorter than {SMALL} pixels and will look "
               f"blurred: leave them out with --min-size {SMALL}.")


def _splits(manifest: Manifest) -> Iterator[str]:
    split = texts(manifest, "split")
    held_out = [k for k, name in enumerate(split) if name == "val"]
    if not held_out:
        yield ("No photo is held out (the split val is empty), so no score can tell memory from "
               "understanding: ingest with --val-fraction 0.1 if you want to measure.")
        return
    if len(held_out) == len(split):
        yield "Every photo is in the split val and none is left to train: lower --val-fraction."
        return
    keys: list[Any] = [_scene_keys(manifest, name) for name in ("look", "moment")]
    train = [{column[k] for k, name in enumerate(split) if name == "train"} - {None}
             for column in keys]
    twins = sum(any(column[k] in known for column, known in zip(keys, train, strict=True))
                for k in held_out)
    if twins:
        yield (f"{twins:,} of {len(held_out):,} photos held out have a twin in the split train "
               "(the same look, or the same place in the same minute): scores on them are too "
               "good. Remove near-duplicates before you measure.")


def _scene_keys(manifest: Manifest, kind: str) -> list[Any]:
    """For each photo something that only photos of one scene share: "look" is the perceptual hash,
    "moment" the minute and the position to about ten metres. None where it is not known."""
    if kind == "look":
        return texts(manifest, "phash")
    places = np.stack([numbers(manifest, "lat"), numbers(manifest, "lon")], axis=1).round(4)
    return [when and (when[:16], *place)
            for when, place in zip(texts(manifest, "taken_at"), places.tolist(), strict=True)]


def _licences(manifest: Manifest) -> Iterator[str]:
    pairs = zip(texts(manifest, "owner"), texts(manifest, "licence"), strict=True)
    missing = sum(owner is not None and licence is None for owner, licence in pairs)
    if missing:
        yield (f"{_these(missing, len(manifest.rows))} an owner but no licence: ask the owners, "
               "or leave these photos out, before you share a model.")

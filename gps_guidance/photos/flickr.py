"""Photos as Flickr's API describes them. No torch."""

from __future__ import annotations

from typing import Any

from gps_guidance.photos.search import plain_text

# flickr.photos.licenses.getInfo: the numbers that photos carry.
LICENCES: dict[int, str] = {
    0: "All Rights Reserved", 1: "CC BY-NC-SA 2.0", 2: "CC BY-NC 2.0", 3: "CC BY-NC-ND 2.0",
    4: "CC BY 2.0", 5: "CC BY-SA 2.0", 6: "CC BY-ND 2.0", 7: "No known copyright restrictions",
    8: "United States Government Work", 9: "CC0 1.0", 10: "Public Domain Mark 1.0",
    11: "CC BY 4.0", 12: "CC BY-SA 4.0", 13: "CC BY-ND 4.0", 14: "CC BY-NC 4.0",
    15: "CC BY-NC-SA 4.0", 16: "CC BY-NC-ND 4.0",
}
# Up to 2048 pixels, largest first; then the original, which may be huge; then what is left.
SIZES = ("url_k", "url_h", "url_l", "url_o", "url_c", "url_z")


def is_photo(found: dict[str, Any]) -> bool:
    """Whether an object is a photo of Flickr's API, as ``flickr.photos.search`` lists them."""
    return {"id", "owner", "secret", "server"} <= found.keys()


def row_of(photo: dict[str, Any]) -> dict[str, Any]:
    """A photo of the API as a row with the columns of a record.

    Its ``accuracy`` is a zoom level (1 the world, 16 a street), not metres: only 0, with which
    Flickr marks that there is no position, is used.
    """
    owner = photo["owner"]
    owner = owner.get("nsid") if isinstance(owner, dict) else owner
    lat, lon = photo.get("latitude"), photo.get("longitude")
    placed = not (_is_zero(photo.get("accuracy", 1)) or _is_zero(lat) and _is_zero(lon))
    url = next((photo[size] for size in SIZES if photo.get(size)), None) or (
        f"https://live.staticflickr.com/{photo['server']}/{photo['id']}_{photo['secret']}_b.jpg"
    )
    dated = _is_zero(photo.get("datetakenunknown", 0)) and _is_zero(
        photo.get("datetakengranularity", 0)
    )
    return {
        "source": f"https://www.flickr.com/photos/{owner}/{photo['id']}", "url": url,
        "lat": lat if placed else None, "lon": lon if placed else None, "owner": owner,
        "licence": _licence(photo.get("license")),
        "taken_at": photo.get("datetaken") if dated else None,
        "caption": _words(photo.get("title")) or _words(photo.get("description")),
    }


def _is_zero(value: Any) -> bool:
    try:
        return float(value) == 0
    except (TypeError, ValueError):
        return False


def _licence(number: Any) -> str | None:
    if number is None:
        return None
    return LICENCES.get(int(number)) if str(number).isdecimal() and int(number) in LICENCES else (
        f"Flickr licence {number}"
    )


def _words(text: Any) -> str | None:
    """Text of the API, where it has HTML and may be wrapped, as plain text in one line."""
    if isinstance(text, dict):
        text = text.get("_content")
    return plain_text(str(text or ""))

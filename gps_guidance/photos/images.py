"""Pixels of photos: opened safely, turned upright, hashed. No torch."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gps_guidance.photos.manifest import Rejected

EXTENSIONS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".heic", ".heif"}


def open_image(data: bytes) -> Image.Image:
    """Open an image of any supported kind; Rejected with ``unreadable`` or ``too_large``."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text has an address, other in every run
        raise Rejected("unreadable", "no known image format") from error
    except Exception as error:  # decoders raise anything on damaged files
        raise Rejected("unreadable", f"{type(error).__name__}: {error}") from error


def upright(photo: Image.Image, image_size: int) -> Image.Image:
    """The photo turned upright, RGB, no side above ``image_size``; Rejected if it is damaged."""
    try:
        # A JPEG decodes faster at half or a quarter; twice the size wanted is enough for Lanczos.
        photo.draft("RGB", (2 * image_size, 2 * image_size))
        photo.load()
        turned = ImageOps.exif_transpose(photo).convert("RGB")
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", str(error)) from error
    except Exception as error:  # decoders raise anything on damaged files
        reason = "truncated" if "truncat" in str(error).lower() else "unreadable"
        raise Rejected(reason, f"{type(error).__name__}: {error}") from error
    turned.info.clear()  # or the JPEG writer copies the photographer's comment
    turned.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    return turned


def difference_hash(photo: Image.Image) -> str:
    """64-bit perceptual hash: whether each of 9 x 8 grey pixels is brighter than its neighbour."""
    small = np.asarray(photo.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (np.diff(small, axis=1) > 0).flatten()
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"

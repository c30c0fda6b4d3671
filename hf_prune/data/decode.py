"""Turns one stored image into RGB pixels, and says which errors mean that the image is broken."""

import struct
import zlib
from typing import Any

import datasets
import numpy as np
from PIL import Image

# What Pillow raises on broken files: `OSError` covers missing, truncated and unidentified ones.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(stored: dict[str, Any] | None) -> Image.Image:
    """Decode an image file to RGB, upright as its EXIF orientation asks.

    Args:
        stored: `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives it.

    Raises:
        UNREADABLE: One of these, if the file is missing, truncated, too large or not an image.
    """
    if stored is None:
        raise ValueError("an image must not be null")
    return to_rgb(datasets.Image().decode_example(stored))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; alpha is dropped, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Pillow would clip to 255 and turn nearly every pixel white.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")

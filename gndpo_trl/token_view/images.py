"""Images of prompts as bytes."""

import base64
import io
from typing import Any

import datasets
from PIL import Image


# Longest side in pixels of an image in the page; the parquet file has all of it.
PAGE_SIDE = 640
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def as_png(image: Image.Image) -> bytes:
    image = image if image.mode in PNG_MODES else image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def encode(image: Any) -> dict[str, Any]:
    """`bytes` and `path` as the `Image` feature of datasets keeps them; a path that was never opened keeps no bytes."""
    if isinstance(image, Image.Image):
        return {"bytes": as_png(image), "path": None}
    return datasets.Image().encode_example(image)


def data_url(encoded: dict[str, Any]) -> str | None:
    """An encoded image for the page; `None` without bytes, since nothing is fetched."""
    if encoded["bytes"] is None:
        return None
    with Image.open(io.BytesIO(encoded["bytes"])) as image:
        image.thumbnail((PAGE_SIDE, PAGE_SIDE))
        return "data:image/png;base64," + base64.b64encode(as_png(image)).decode()

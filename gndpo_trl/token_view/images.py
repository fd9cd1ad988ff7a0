"""Images of prompts as bytes."""

import base64
import hashlib
import io
from collections.abc import Callable
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


def for_page(image: Any) -> dict[str, str]:
    """The `url` of an image that holds it, for the page, or its `path` where there are no bytes, since nothing is fetched."""
    if not isinstance(image, Image.Image):
        encoded = encode(image)
        if encoded["bytes"] is None:
            return {"path": str(encoded["path"])}
        image = Image.open(io.BytesIO(encoded["bytes"]))
    small = image.copy()
    small.thumbnail((PAGE_SIDE, PAGE_SIDE))
    return {"url": "data:image/png;base64," + base64.b64encode(as_png(small)).decode()}


def once_each(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """
    The same function of an image, computed once for all images with the same pixels.

    Completions of a prompt come with an image object each, and encoding takes a hundred times as long as comparing.
    """
    contents, results = {}, {}

    def function_once(image: Any) -> Any:
        if id(image) not in contents:
            contents[id(image)] = image, content(image)  # kept: no other object gets its id
        key = contents[id(image)][1]
        if key not in results:
            results[key] = function(image)
        return results[key]

    return function_once


def content(image: Any) -> Any:
    """What images with the same pixels have in common; of what cannot be told, the object."""
    if isinstance(image, Image.Image):
        palette = tuple(image.getpalette() or ()), str(image.info.get("transparency"))
        return image.mode, image.size, palette, hashlib.sha256(image.tobytes()).digest()
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return image.get("path"), image["bytes"]
    return image if isinstance(image, str | bytes) else id(image)

"""Pictures of rows, in whatever form the data have them, as the pixels that student, teacher and logs all see."""

import base64
import io
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from PIL import Image, ImageOps
from trl import prepare_multimodal_messages


IMAGE_COLUMNS = ("images", "image")  # where TRL looks for pictures, in this order
# Keys under which a part of a message names its picture. TRL reads the first; a part without it is a placeholder to it.
PART_KEYS = ("image", "url", "path", "base64", "image_url")

FETCH_SECONDS = 30
FETCH_BYTES = 32 * 2**20


def open_picture(picture: Any, fetch: bool = False) -> Image.Image:
    """
    A picture as it is to be seen: RGB, turned as its orientation tag says, transparent parts white, as paper is.

    Args:
        picture:
            A PIL image, a path, an open file or its bytes, a dictionary with `bytes` or `path` (as data sets keep them), a
            data URL, base64 text, or an array or tensor of `uint8`: `(H, W)`, `(H, W, C)` or `(C, H, W)`.
        fetch (`bool`, *optional*, defaults to `False`):
            Whether an http(s) URL is fetched: for 30 seconds at most, and at most 32 MiB.

    Raises:
        `ValueError`: naming what is wrong: it does not open, has no pixels, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`,
            more than 8 bits per channel, or is a URL that is not to be fetched.
    """
    image = look_at(picture, fetch)
    try:
        image.load()
        if image.getexif().get(Image.ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "La":  # Pillow would convert it to RGBA without its transparency
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # whatever the decoders of Pillow raise for a broken file
        raise ValueError(f"it does not open ({type(error).__name__}: {error})") from error


def look_at(picture: Any, fetch: bool = False) -> Image.Image:
    """The picture of [`open_picture`] with its size and mode, whose pixels may not be read yet; raises as that does."""
    try:
        image = _opened(picture, fetch)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(str(error)) from error
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has {width}x{height} pixels. Replace it")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"it has {width}x{height} pixels, more than `PIL.Image.MAX_IMAGE_PIXELS` ({Image.MAX_IMAGE_PIXELS}), as no "
            "picture that a model reads needs. Make it smaller, or raise that limit"
        )
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its mode {image.mode!r} has more than the 8 bits per channel of RGB, and which of its values are black and "
            "white is not known. Scale it to 8 bits"
        )
    return image


def _opened(picture: Any, fetch: bool) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray | torch.Tensor):
        return _from_array(np.asarray(picture))
    if isinstance(picture, Mapping) and (picture.get("bytes") is not None or picture.get("path") is not None):
        picture = picture["bytes"] if picture.get("bytes") is not None else picture["path"]
    if isinstance(picture, str):
        picture = _file_or_bytes(picture, fetch)
    if isinstance(picture, bytes | bytearray | memoryview):
        picture = io.BytesIO(picture)
    elif hasattr(picture, "read"):
        pass
    elif not isinstance(picture, Path):
        raise ValueError(
            f"{str(picture)[:80]!r} ({type(picture).__name__}) is no picture. Give a PIL image, a path, the bytes of a "
            "file, a dictionary with one of `bytes` and `path`, or a data URL"
        )
    elif not picture.is_file():  # a pipe or a device would be read without an end
        raise ValueError(
            f"there is no file {str(picture)[:200]!r}. Correct the path; a relative one starts at {os.getcwd()}"
        )
    try:
        return Image.open(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:  # whatever the parsers of Pillow raise for a broken file
        raise ValueError(f"it does not open ({type(error).__name__}: {error})") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(
            f"it is an array of {array.dtype}, and which of its values are black and white is not known. Scale it to "
            "0-255 and convert it to `uint8`"
        )
    if array.ndim == 3 and array.shape[0] <= 4 < array.shape[2]:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size:
        raise ValueError(f"it is an array of shape {array.shape}, without a pixel. Replace it")
    try:
        return Image.fromarray(np.ascontiguousarray(array))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"it is an array of shape {array.shape}. Give one of (H, W), (H, W, C) or (C, H, W), with at most 4 channels"
        ) from error


def is_url(text: str) -> bool:
    """Whether text is a URL that would have to be fetched."""
    return text[:8].lower().startswith(("http://", "https://"))


def _file_or_bytes(text: str, fetch: bool) -> bytes | Path:
    if is_url(text):
        if not fetch:
            raise ValueError(
                f"{text[:200]!r} is a URL, and nothing is fetched unless `fetch_image_urls` is set. Set it, or download "
                "the pictures beforehand"
            )
        return _fetched(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(
                f"the data URL begins with {head[:60]!r}. Give one of base64: 'data:image/png;base64,...'"
            )
    elif len(text) < 1024 or os.path.isfile(text):  # the others are longer than a path, and than the smallest picture
        return Path(text)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{text[:80]!r}... is neither a path nor base64. Correct it") from error


def _fetched(url: str) -> bytes:
    """The bytes behind a URL; a server that sends many, or sends them slowly, is given up."""
    answers = queue.SimpleQueue()
    # Requests bounds the time between two bytes, and no thread but another can bound all of it.
    threading.Thread(target=_download, args=(url, time.monotonic() + FETCH_SECONDS, answers), daemon=True).start()
    try:
        answer = answers.get(timeout=FETCH_SECONDS)
    except queue.Empty:
        raise ValueError(f"{url[:200]!r} takes longer than {FETCH_SECONDS} s. Download it beforehand") from None
    if isinstance(answer, Exception):
        raise ValueError(f"{url[:200]!r} cannot be fetched ({type(answer).__name__}: {answer})") from answer
    if len(answer) > FETCH_BYTES:
        raise ValueError(f"{url[:200]!r} has more than {FETCH_BYTES >> 20} MiB. Download it beforehand")
    return answer


def _download(url: str, end: float, answers: queue.SimpleQueue) -> None:
    content = b""
    try:
        # `auth` keeps passwords of a .netrc from going to whatever the data name.
        options = {"auth": lambda request: request, "headers": {"Accept-Encoding": "identity"}}
        with requests.get(url, stream=True, timeout=FETCH_SECONDS, **options) as response:
            response.raise_for_status()
            while len(content) <= FETCH_BYTES and time.monotonic() < end:
                piece = response.raw.read1(2**20)
                if not piece:
                    break
                content += piece
        answers.put(content)
    except Exception as error:  # of whatever kind, it belongs to who waits
        answers.put(error)


def pictures_of(row: dict[str, Any]) -> list | None:
    """
    The pictures of a row's prompt, in the prompt's order, as they stand in the row: those in its messages, with those of
    the column `images` or `image` at the placeholders; `None` if there are none.

    Raises:
        `ValueError`: there are more pictures in the column than placeholders in the messages, or fewer.
    """
    prompt, others = row.get("prompt"), pictures_in_column(row)
    return pictures_in(placed(prompt, others)) or None if isinstance(prompt, list) else others


def pictures_in_column(row: dict[str, Any]) -> list | None:
    """The pictures in the column `images` or `image`, as TRL finds them; `None` if there are none."""
    if "images" in row:
        return row["images"] or None
    return [row["image"]] if row.get("image") is not None else None


def placed(messages: list[dict[str, Any]], others: list | None) -> list[dict[str, Any]]:
    """Messages with all pictures in their parts: `others` at the placeholders, or before the first words of the user."""
    messages = with_parts_alike(messages)
    has_parts = any(part.get("type") == "image" for part in parts_of(messages))
    return prepare_multimodal_messages(messages, images=others) if others or has_parts else messages


def pictures_in(messages: list[dict[str, Any]]) -> list:
    """The pictures that stand in the parts of messages."""
    return [part["image"] for part in parts_of(messages) if part.get("type") == "image" and "image" in part]


def parts_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All parts of the messages whose content is a list of them."""
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part for part in parts if isinstance(part, Mapping)]


def with_parts_alike(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Messages whose pictures all stand as `{"type": "image", "image": ...}`, under whichever key they were, and whose parts
    are without the keys that are `None`: Arrow gives all parts the same keys, and templates take them for content.
    """
    return with_parts(messages, _alike)


def with_parts(
    messages: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages whose parts are what `change` makes of them."""

    def changed(message: Any) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            return message
        return {**message, "content": [change(part) if isinstance(part, Mapping) else part for part in content]}

    return [changed(message) for message in messages]


def _alike(part: dict[str, Any]) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") not in ("image", "image_url"):
        return part
    key = next((key for key in PART_KEYS if key in part), None)
    picture = part.get(key)
    if key == "image_url" and isinstance(picture, Mapping):  # as OpenAI's interface has it
        picture = picture.get("url")
    elif key == "base64" and isinstance(picture, str) and not picture.startswith("data:"):
        picture = f"data:image;base64,{picture}"
    others = {name: value for name, value in part.items() if name not in PART_KEYS}
    return {**others, "type": "image"} if key is None else {**others, "type": "image", "image": picture}


def with_open_pictures(row: dict[str, Any], fetch: bool = False, opened: dict | None = None) -> dict[str, Any]:
    """
    A row whose pictures are all what [`open_picture`] makes of them, in its columns and in its prompts.

    Args:
        row (`dict`): Row of a data set.
        fetch (`bool`, *optional*, defaults to `False`): Whether http(s) URLs are fetched.
        opened (`dict`, *optional*): Pictures of other rows that were opened already; those of this row are added to it.

    Raises:
        `ValueError`: naming the column and what is wrong with the picture.
    """
    opened = {} if opened is None else opened

    def open_once(picture: Any, column: str) -> Image.Image:
        key = id(picture)
        if isinstance(picture, str | bytes):
            key = picture
        elif isinstance(picture, Mapping):
            key = picture.get("bytes"), picture.get("path")
        if key not in opened:
            try:
                # The picture itself is kept too, so that no other gets its id.
                opened[key] = picture, open_picture(picture, fetch)
            except ValueError as error:
                raise ValueError(f"a picture in `{column}`: {error}") from error
        return opened[key][1]

    def open_part(part: dict[str, Any], column: str) -> dict[str, Any]:
        is_filled = part.get("type") == "image" and "image" in part
        return {**part, "image": open_once(part["image"], column)} if is_filled else part

    changes = {}
    for column in ("images", "teacher_images"):
        if row.get(column):
            changes[column] = [open_once(picture, column) for picture in row[column]]
    if row.get("image") is not None:
        changes["image"] = open_once(row["image"], "image")
    for column in ("prompt", "teacher_prompt"):
        if isinstance(row.get(column), list):
            changes[column] = with_parts(with_parts_alike(row[column]), partial(open_part, column=column))
    return {**row, **changes}

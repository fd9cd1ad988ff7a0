"""Mistakes in single rows, of prompts and of pictures: found before the first step where the rows can be looked at."""

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from .pictures import (
    IMAGE_COLUMNS,
    is_url,
    look_at,
    parts_of,
    pictures_in,
    pictures_in_column,
    placed,
    with_open_pictures,
    with_parts_alike,
)


LONG_PROMPTS = 32  # that are kept to be tokenized

MARKERS = re.compile(r"<[^<>\s]{1,60}>|\[[A-Z_]{2,40}\]")  # as special tokens are written

VIDEO_COLUMNS = ("videos", "video")

# What chat templates know whose text does not say so: many write any role as it is, and drop any other part.
ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_TEXT_ROLES = ("system", "user", "assistant", "tool")  # TRL takes no others where there may be images
PART_TYPES = ("text", "image", "image_url")
UNREAD_TYPES = ("video", "video_url", "audio", "input_audio")  # that templates know, and TRL leaves out


def check_no_videos(where: str, columns: Iterable[str]) -> None:
    """Raise `ValueError` if there are videos, which TRL would leave out without a word."""
    for column in VIDEO_COLUMNS:
        if column in columns:
            raise ValueError(
                f"{where} has the column `{column}`, but videos are not trained on: the run would see the text alone. Give "
                "frames as `images`, or remove the column."
            )


def check_prompt(prompt: Any, name: str = "the prompt") -> None:
    """Raise `ValueError`, saying what is wrong, if a prompt is neither text nor messages that can be rendered."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{name} is blank")
        _check_text(prompt, name)
        return
    if not isinstance(prompt, list):
        raise ValueError(f"{name} is {_short(prompt)}, neither messages nor text")
    if not prompt:
        raise ValueError(f"{name} has no messages")
    for message in prompt:
        _check_message(message, name)
    texts = texts_of(prompt)
    if not any(
        text.strip() for text in [*texts, *(part["type"] for part in parts_of(prompt) if part["type"] != "text")]
    ):
        raise ValueError(f"the messages of {name} are blank")
    for text in texts:
        _check_text(text, name)


def texts_of(prompt: str | list[dict[str, Any]]) -> list[str]:
    """What is written in a prompt: itself, or the texts of its messages."""
    if isinstance(prompt, str):
        return [prompt]
    contents = [message["content"] for message in prompt if isinstance(message.get("content"), str)]
    return contents + [part["text"] for part in parts_of(prompt) if part["type"] == "text"]


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has {text[error.start]!r}, half of a character, which no tokenizer reads") from error


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} has the message {_short(message)}, which is no dictionary of `role` and `content`")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"a message of {name} has the role {_short(role)}, not a name")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, str | list):
        raise ValueError(f"the content of a message of {name} ({role}) is {_short(content)}, neither text nor parts")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f"a message of {name} ({role}) has the part {_short(part)}, which has no `type`")
        if part["type"] in UNREAD_TYPES:
            raise ValueError(
                f"a message of {name} ({role}) has a part of type {part['type']!r}, which would be ignored"
            )
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"the text of a part of {name} ({role}) is {_short(part.get('text'))}, not text")


def _short(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})" if value is not None else "None"


@dataclass
class RowsSeen:
    """What was seen in rows, each kind with the first row that has it; to be compared with the student's processor."""

    roles: dict[str, str] = field(default_factory=dict)
    part_types: dict[str, str] = field(default_factory=dict)
    sizes: dict[tuple[int, int], str] = field(default_factory=dict)  # (width, height) of pictures in pixels
    markers: dict[str, str] = field(default_factory=dict)  # what is written like a special token
    longest: list[tuple[int, str, Any]] = field(default_factory=list)  # prompts of text: bytes, row, prompt
    with_pictures: str | None = None  # the first row that was seen with some

    def add_prompt(self, where: str, prompt: Any, fetch: bool, others: int = 0, is_students: bool = True) -> None:
        """Look at a prompt and the pictures in its messages, with so many `others` in the row for its placeholders."""
        try:
            check_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Correct or remove the row.") from error
        pictures = []
        if isinstance(prompt, list):
            for message in prompt:
                self.roles.setdefault(message["role"], where)
            messages = with_parts_alike(prompt)
            for part in parts_of(messages):
                self.part_types.setdefault(part["type"], where)
            pictures = pictures_in(messages)
            for picture in pictures:
                self.with_pictures = self.with_pictures or where
                self.add_picture(where, picture, fetch)
            if is_students:
                try:
                    placed(messages, [None] * others)
                except ValueError as error:
                    raise ValueError(
                        f"{where}: {error} Write one `{{'type': 'image'}}` for each picture of the row, in their order."
                    ) from error
        elif others:
            raise ValueError(
                f"{where}: the prompt is text, but has pictures, which TRL places in messages. Write it as `[{{'role': 'user', "
                "'content': ...}]`, without a chat template around it."
            )
        for text in texts_of(prompt) if is_students else ():  # a teacher's prompts have such words as text
            for token in MARKERS.findall(text):
                self.markers.setdefault(token, where)
        if is_students and not others and not pictures:
            heapq.heappush(self.longest, (len(str(prompt).encode(errors="replace")), where, prompt))
            if len(self.longest) > LONG_PROMPTS:
                heapq.heappop(self.longest)

    def add_picture(self, where: str, picture: Any, fetch: bool) -> None:
        """Look at a picture without decoding it; one that would have to be fetched is left for its step."""
        path = picture.get("path") if isinstance(picture, dict) and picture.get("bytes") is None else picture
        if fetch and isinstance(path, str) and is_url(path):
            return
        try:
            size = look_at(picture).size
        except ValueError as error:
            raise ValueError(f"{where} has a picture of which {error}. Replace it, or remove the row.") from error
        self.sizes.setdefault(size, where)

    def check_against(self, processing_class: Any, chat_template: str | None) -> None:
        """Raise `ValueError`, naming the row, if the student's template or processor cannot take what was seen."""
        is_vlm = isinstance(processing_class, ProcessorMixin)
        template = str(chat_template or getattr(processing_class, "chat_template", None) or "")
        roles = IMAGE_TEXT_ROLES if is_vlm else ROLES
        for kind, seen, known in (("role", self.roles, roles), ("type of a part", self.part_types, PART_TYPES)):
            for name, where in seen.items():
                is_in_template = f"'{name}'" in template or f'"{name}"' in template
                if name not in known and (not is_in_template or known is IMAGE_TEXT_ROLES):
                    raise ValueError(
                        f"{where}: the {kind} {name!r} in the prompt is none that would be rendered. Use one of "
                        f"{', '.join(known)}, or remove the row."
                    )
        placeholder = getattr(processing_class, "image_token", None) if is_vlm else None
        if placeholder in self.markers:
            raise ValueError(
                f"{self.markers[placeholder]}: the prompt has {placeholder!r} in its words, where the student's processor puts "
                "a picture. Remove it; a picture is a part `{'type': 'image'}` of a message."
            )
        if self.with_pictures is not None and not is_vlm:
            raise ValueError(
                f"{self.with_pictures} has pictures, but the student's {type(processing_class).__name__} is "
                "no processor for images, so they would be ignored. Of a model that reads images, pass the processor "
                "(`AutoProcessor.from_pretrained`) as `processing_class`; else train an image-text model, or remove them."
            )
        count = getattr(getattr(processing_class, "image_processor", None), "get_number_of_image_patches", None)
        if count is None or not is_vlm or _refusal(count, 224, 224):
            return
        for (width, height), where in self.sizes.items():
            refusal = _refusal(count, width, height)
            if refusal:
                raise ValueError(
                    f"{where} has a picture of {width}x{height} pixels, which the student's processor refuses: {refusal}. "
                    "Crop it, or remove the row."
                )


def _refusal(count: Any, width: int, height: int) -> str | None:
    try:
        count(height, width, {})
    except ValueError as error:
        return str(error)
    except Exception:  # of a processor that needs more to count
        return None
    return None


def open_rows(
    rows: list[dict[str, Any]], fetch: bool, has_prompts: bool = True
) -> tuple[list[dict[str, Any]], RowsSeen]:
    """
    Rows as they are trained on: checked, and with their pictures opened, each once.

    Args:
        rows (`list[dict]`): Rows of a batch.
        fetch (`bool`): Whether http(s) URLs are fetched.
        has_prompts (`bool`, *optional*, defaults to `True`): Whether prompts are complete, and written by no one else.

    Returns:
        The rows, and what was seen in them.

    Raises:
        `ValueError`: naming the prompt of the row.
    """
    seen, opened, result = RowsSeen(), {}, []
    for row in rows:
        where = f"A row (prompt: {str(row.get('prompt'))[:200]!r})"
        check_no_videos(where, row)
        # TRL takes a column without pictures for pictures.
        row = {name: value for name, value in row.items() if name not in IMAGE_COLUMNS or not is_empty(value)}
        try:
            for column in ("images", "teacher_images"):
                if not isinstance(row.get(column), list | tuple | None):
                    raise ValueError(f"`{column}` is {_short(row[column])}, not a list of pictures")
            if has_prompts:
                check_prompt(row.get("prompt"))
            if row.get("teacher_prompt") is not None:
                check_prompt(row["teacher_prompt"], "`teacher_prompt`")
            row = with_open_pictures(row, fetch, opened)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Correct or remove the row.") from error
        others = pictures_in_column(row)
        if isinstance(row.get("teacher_prompt"), str) and (others or row.get("teacher_images")):
            raise ValueError(
                f"{where}: `teacher_prompt` is text, but has pictures. Write it as messages, which place them."
            )
        for picture in [*(others or ()), *(row.get("teacher_images") or ())]:
            seen.with_pictures = seen.with_pictures or where
            seen.add_picture(where, picture, fetch)
        if has_prompts:
            seen.add_prompt(where, row["prompt"], fetch, len(others or ()))
        result.append(row)
    return result, seen


def is_empty(value: Any) -> bool:
    return value is None or isinstance(value, list | tuple) and not value


def check_length(where: str, num_tokens: int, positions: int | None) -> None:
    """Raise `ValueError` if a prompt of so many tokens leaves no position for a completion."""
    if positions is not None and num_tokens >= positions:
        raise ValueError(
            f"{where} has {num_tokens} tokens, but the student has {positions} positions (`max_position_embeddings`), for "
            "prompt and completion together. Shorten or remove the row, or train a model with a longer context."
        )


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, with those that its rotary embeddings are scaled to; `None` if it has no limit."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    of_layer_types = (value for value in rope.values() if isinstance(value, dict))
    for scaling in (rope, *of_layer_types):
        if isinstance(scaling.get("factor"), int | float):
            original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
            positions = max(positions, int(original * scaling["factor"]))
    return positions

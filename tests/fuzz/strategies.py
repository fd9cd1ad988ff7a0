"""Configurations and rows as a recipe, a sweep or a notebook brings them, right and wrong."""

import base64
import dataclasses
import io
import math
import types
import typing
from enum import Enum

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from trl import GRPOConfig

from gndpo_trl.grpo.config_checks import CHOICES


# What stands where something else is meant.
STRANGE = [
    *(None, "", "5", "1e-4", "none", "yes", "a word", "{broken", '{"a": 1}', b"bytes", True, False),
    *(-1, 0, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 0.5, -0.5, 1.5, 1e-45, 1e38, math.inf, -math.inf, math.nan),
    *([], [1], ["a", "b"], (), {}, {"a": 1}, {1: "a"}, [None], [[]], object, 1j),
]


def kinds_of(hint) -> tuple:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def usual_values(field: dataclasses.Field, hint) -> st.SearchStrategy:
    """Values that a field may have, from its type and what else is known of it."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    found = [st.just(made)]
    choices = CHOICES.get(field.name) or field.metadata.get("choices")
    for kind in kinds_of(hint):
        if isinstance(kind, type) and issubclass(kind, Enum):
            found.append(st.sampled_from([item.value for item in kind]))
        elif kind is bool:
            found.append(st.booleans())
        elif kind is int:
            found.append(st.integers(-1, 9) | st.sampled_from([16, 64, 1000]))
        elif kind is float:
            found.append(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 2.0, 1e-3, 1e6, math.inf, 4]))
        elif kind is str:
            found.append(
                st.sampled_from(list(choices)) if choices else st.sampled_from(["a", "http://one:8000", "eval_kl"])
            )
        elif kind in (dict, list) or typing.get_origin(kind) in (dict, list):
            found.append(st.just((typing.get_origin(kind) or kind)()))
        elif kind is type(None):
            found.append(st.none())
    return st.one_of(found)


def configurations(config_class: type, most: int = 5) -> st.SearchStrategy[dict]:
    """Up to so many fields of a configuration, each with a usual or with a strange value."""
    hints = typing.get_type_hints(config_class)
    values = {
        field.name: st.one_of(usual_values(field, hints[field.name]), st.sampled_from(STRANGE))
        for field in dataclasses.fields(config_class)
    }
    names = st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=most, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen}))


# Fields that start what a test has not got: servers, engines, compilers, other processes, the Hub; and those of the run.
NOT_TRAINED = (
    *("output_dir", "max_steps", "resume_from_checkpoint", "use_cpu", "use_vllm", "deepspeed", "fsdp", "fsdp_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "push_to_hub", "hub_token"),
    *("log_completions_hub_repo", "report_to", "log_level", "log_level_replica", "parallelism_config", "ddp_backend"),
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_server_url", "teacher_server_model"),
    *("use_transformers_continuous_batching", "use_transformers_paged", "full_determinism", "tf32", "debug"),
    *("enable_jit_checkpoint", "dataloader_multiprocessing_context"),
)


def trainable(config_class: type, most: int = 6) -> st.SearchStrategy[dict]:
    """
    Up to so many fields with usual values, of those that a run of two steps on a CPU can have; every other one is of the
    fields that this package has added or changed.
    """
    hints = typing.get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    values, own = {}, []
    for field in dataclasses.fields(config_class):
        if field.name not in NOT_TRAINED:
            values[field.name] = usual_values(field, hints[field.name])
            if known.get(field.name) is not field:
                own.append(field.name)
    name = st.sampled_from(own) | st.sampled_from(sorted(values))
    return st.lists(name, min_size=1, max_size=most, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen})
    )


# ---- rows

SCALARS = [None, 5, 1.5, math.nan, True, b"bytes", {}, [], ["one"], [["one"]], {"text": "one"}]
TEXTS = st.sampled_from(
    [
        *(
            "",
            " ",
            "\n\t",
            "what is one plus two ?",
            "<|im_start|>",
            "<IMG_CONTEXT>",
            "<|image_pad|>",
            "{{ x }}",
            "\x00\x1b[2J",
        ),
        *("one " * 600, "\u200b", "\ud800", "あ" * 40, "</img><img>"),
    ]
) | st.text(max_size=20)
ROLES = st.sampled_from(
    ["user", "user", "user", "system", "assistant", "tool", "developer", "usr", "", None, 5, ["user"]]
)
MODES = [
    "1",
    "L",
    "P",
    "LA",
    "La",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "I;16B",
    "F",
]


def image_of(mode: str, size: tuple[int, int]) -> Image.Image:
    try:
        return Image.new(mode, size)
    except ValueError:
        return Image.new("L", size)


def as_bytes(image: Image.Image, cut: int) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()[: None if cut == 0 else -cut]


SIZES = st.sampled_from([(24, 24), (24, 24), (24, 24), (1, 1), (3, 900), (900, 3), (0, 0), (64, 40)])
IMAGES = st.builds(image_of, st.sampled_from(MODES), SIZES)
WHOLE = st.builds(image_of, st.just("RGB"), st.sampled_from([(24, 24), (32, 24)]))
ARRAYS = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype=dtype),
    st.sampled_from(
        [(24, 24), (24, 24, 3), (3, 24, 24), (24, 24, 4), (24, 24, 7), (24,), (0, 0, 3), (2, 2, 2, 2), ()]
    ),
    st.sampled_from(["uint8", "uint8", "float32", "int64", "bool"]),
)
FILES = st.builds(
    as_bytes,
    st.builds(image_of, st.just("RGB"), st.sampled_from([(24, 24), (1, 1)])),
    st.sampled_from([0, 0, 1, 20, 60]),
)
PICTURES = st.one_of(
    *(WHOLE, IMAGES, ARRAYS, FILES, FILES.map(lambda content: {"bytes": content, "path": None})),
    FILES.map(lambda content: f"data:image/png;base64,{base64.b64encode(content).decode()}"),
    st.sampled_from(
        ["gone.png", "", "http://localhost:9/a.png", "file:///gone", "data:,", "data:image/png;base64,#", ".", b""]
    ),
    st.sampled_from([*SCALARS, {"bytes": None, "path": None}, {"path": "gone.png"}, torch.zeros(3, 24, 24)]),
)
PART_TYPES = st.sampled_from(["text", "text", "image", "image", "image_url", "video", "audio", "txt", "", None, 5])


@st.composite
def parts(draw):
    kind = draw(PART_TYPES)
    if draw(st.booleans()) and kind == "text":
        return {"type": "text", "text": draw(TEXTS)}
    part = {"type": kind} if draw(st.integers(0, 9)) else {}
    for key, values in (
        ("text", TEXTS | st.sampled_from(SCALARS)),
        ("image", PICTURES),
        ("image_url", PICTURES),
        ("url", PICTURES),
    ):
        if draw(st.integers(0, 3)) == 0:
            part[key] = draw(values)
    return part


@st.composite
def messages(draw):
    message = {
        "role": draw(ROLES),
        "content": draw(st.one_of(TEXTS, TEXTS, st.lists(parts(), max_size=3), st.sampled_from(SCALARS))),
    }
    if draw(st.integers(0, 9)) == 0:
        del message[draw(st.sampled_from(["role", "content"]))]
    if draw(st.integers(0, 5)) == 0:
        key = draw(st.sampled_from(["name", "tool_calls", "reasoning_content", "x"]))
        message[key] = draw(st.sampled_from([None, "one", [], [{"type": "function"}], [5], {}]))
    return message


GOOD_PROMPTS = st.sampled_from(
    [
        "what is one ?",
        [{"role": "user", "content": "what is one ?"}],
        [{"role": "user", "content": [{"type": "text", "text": "one"}]}],
    ]
)
PROMPTS = st.one_of(
    *(GOOD_PROMPTS, GOOD_PROMPTS, GOOD_PROMPTS, TEXTS, TEXTS, st.lists(messages(), max_size=3)),
    st.one_of(messages(), st.sampled_from(SCALARS), st.lists(st.lists(messages(), max_size=2), max_size=2)),
)


@st.composite
def rows(draw, has_pictures: bool):
    """A row of a data set, with pictures in its columns and messages where these are asked for."""
    row = {"prompt": draw(PROMPTS)} if draw(st.integers(0, 29)) else {}
    if draw(st.integers(0, 2)) == 0:
        row["teacher_prompt"] = draw(PROMPTS)
    if has_pictures:
        column = draw(st.sampled_from(["image", "images", "images", None]))
        if column is not None:
            row[column] = draw(
                PICTURES if column == "image" else st.lists(PICTURES, max_size=2) | st.sampled_from(SCALARS)
            )
        if "teacher_prompt" in row and draw(st.booleans()):
            row["teacher_images"] = draw(st.lists(PICTURES, max_size=2) | st.sampled_from(SCALARS))
    if draw(st.integers(0, 14)) == 0:
        row[draw(st.sampled_from(["videos", "video", "teacher", "solution"]))] = draw(
            st.sampled_from([None, "one", [], ["a.mp4"], 5])
        )
    return row

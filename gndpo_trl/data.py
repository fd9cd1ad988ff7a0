"""Data sets for training: loading splits from disk or the hub, and image questions in the form that TRL trains on."""

import os
import re
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from .grpo.pictures import open_picture


# Loader of the `datasets` library for a single file, by its ending.
FILE_LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}

# What TRL's `think_format_reward` demands: `<think>` opens the reply and is not repeated, `</think>` follows.
INSTRUCTION = (
    "Begin your reply with <think>, reason step by step, and close the reasoning with </think>; use these tags only "
    "once. After </think>, state the final answer in \\boxed{}."
)

IMAGE_MARKER = "<image>"


def load_splits(
    name: str | None, config: str | None = None, streaming: bool = False, train_split: str = "train"
) -> DatasetDict | IterableDatasetDict:
    """
    Splits of a data set: a folder written by `save_to_disk`, a data file, a folder of data files, or a hub id.

    Args:
        name (`str`, *optional*):
            Hub id or path. In a folder of parquet files that are named with one word each, these are the splits:
            `train.parquet`, `testmini.parquet`. Other folders are read as the `datasets` library does.
        config (`str`, *optional*):
            Configuration of a set on the hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the rows while training instead of preparing them first.
        train_split (`str`, *optional*, defaults to `"train"`):
            Name for the rows of a source that knows no splits: a single file, or one split of `save_to_disk`.

    Raises:
        ValueError: `name` is not set, or is a path that leads nowhere.
    """
    if name is None:
        raise ValueError("`dataset_name` is not set. Give a hub id, a folder of `save_to_disk`, or a data file.")
    name = os.path.expanduser(name)
    check_data_path(name)
    path = Path(name)
    if (path / "dataset_dict.json").exists():
        return load_from_disk(name)
    if (path / "state.json").exists():
        return DatasetDict({train_split: load_from_disk(name)})
    if path.suffix in FILE_LOADERS and path.exists():
        return load_dataset(FILE_LOADERS[path.suffix], data_files={train_split: name}, streaming=streaming)
    files = sorted(path.glob("*.parquet"))
    if files and all(file.stem.isidentifier() for file in files):
        # `load_dataset(folder)` knows train, validation and test only: files of other splits would be left out or mixed.
        data_files = {file.stem: str(file) for file in files}
        return load_dataset("parquet", data_files=data_files, streaming=streaming)
    return load_dataset(name, name=config, streaming=streaming)


def check_data_path(name: str) -> None:
    """Raise `ValueError` if `name` can only be a path, or lies in a folder that is there, and has no data to read."""
    path = Path(name)
    if "://" in name or path.is_dir() or (path.suffix in FILE_LOADERS and path.is_file()):
        return
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in FILE_LOADERS or path.is_file()
    if is_path or ("/" in name and path.parent.is_dir()):
        *others, last = FILE_LOADERS
        raise ValueError(
            f"`dataset_name` is {name!r}, where there is no folder and no data file ({', '.join(others)} or {last}). "
            f"Correct the path; a relative one starts at {os.getcwd()}. A set on the hub whose owner has the name of a "
            "local folder is written 'hf://datasets/OWNER/NAME'."
        )


def get_split(splits: DatasetDict | IterableDatasetDict, field: str, name: str) -> Dataset | IterableDataset:
    """Split `name`; a missing one raises a `ValueError` that says which `field` asked for it."""
    if name not in splits:
        raise ValueError(f"`{field}` is {name!r}, but the dataset has the splits {sorted(splits)}.")
    return splits[name]


def open_images(images: Any) -> list[Image.Image]:
    """All images of a row whose column holds a list of them, a single one, or none."""
    if images is None:
        return []
    return [open_picture(image) for image in (images if isinstance(images, list) else [images])]


def content_parts(text: str, num_images: int) -> list[dict[str, str]]:
    """
    Content of a message: `text` cut at its `<image>` markers, or after all images if it has no marker.

    Raises:
        ValueError: the text has markers, but not as many as there are images.
    """
    num_markers = text.count(IMAGE_MARKER)
    if num_markers == 0:
        text = IMAGE_MARKER * num_images + text
    elif num_markers != num_images:
        raise ValueError(
            f"{num_markers} `{IMAGE_MARKER}` markers in the problem, {num_images} images in the row. Write one marker "
            "for each image, or none at all to place the images before the text."
        )
    pieces = re.split(f"({IMAGE_MARKER})", text)
    return [
        {"type": "image"} if piece == IMAGE_MARKER else {"type": "text", "text": piece} for piece in pieces if piece
    ]


def prompt_length(
    prompt: list[dict], images: list[Image.Image], processor: PreTrainedTokenizerBase | ProcessorMixin
) -> int:
    """Tokens of a prompt as the trainer feeds it to the model: in the chat template, with the images expanded."""
    if isinstance(processor, ProcessorMixin):
        prompt = prepare_multimodal_messages(prompt, images=images)
    inputs = processor.apply_chat_template([prompt], add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(inputs["input_ids"][0])


def prepare_questions(
    rows: Dataset,
    split: str,
    columns: dict[str, str] | None = None,
    instruction: str = INSTRUCTION,
    processor: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> Dataset:
    r"""
    Image questions in the form of `hiyouga/geometry3k`, as rows for [`GNDPOTrainer`] and [`~trl.GRPOTrainer`].

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `problem` (text in which each `<image>` marks the place of an image; without any marker, the
            images come first), `images` (a list or a single image) and `answer` (text or a number).
        split (`str`):
            Name of the split, for error messages.
        columns (`dict[str, str]`, *optional*):
            Names of `problem`, `images` and `answer` in `rows` where they differ. `{"images": ""}` says that the set
            has no images.
        instruction (`str`, *optional*, defaults to `INSTRUCTION`):
            Text that follows every problem on a line of its own; may be empty.
        processor ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the student, which measures the prompts.

    Returns:
        [`~datasets.Dataset`]: rows with

        - `prompt`: one user message; its content is a list of parts, or a string in a set without images;
        - `images`: RGB images, in the order of their parts, which may be none; no such column in a set without images;
        - `solution`: the answer as text;
        - `prompt_length`: number of tokens of the prompt, only with a `processor`.

    Raises:
        ValueError: a column is missing, or a row has an empty answer, an image that does not open, or other images than its
            problem has markers for. Names the split, the row and the remedy.
    """
    names = {"problem": "problem", "images": "images", "answer": "answer", **(columns or {})}
    if len(names) > 3:
        raise ValueError(
            f"`columns` has the keys {sorted(columns)}, but only `problem`, `images` and `answer` can stand in other "
            "columns of the source: write `problem=question` for problems in the column `question`."
        )
    has_images = names["images"] != ""
    for role, column in names.items():
        if column not in rows.column_names and (role != "images" or has_images):
            no_images = ", or `images=` if the set has no images" if role == "images" else ""
            raise ValueError(
                f"Split {split!r} has no column {column!r}, only {rows.column_names}. Name the column that holds "
                f"`{role}` in `columns`: `{role}=NAME`{no_images}."
            )
    if has_images and processor is not None and not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"Split {split!r} has images, but {type(processor).__name__} is no processor for images. Measure the "
            "prompts with an image-text model, or set `images=` in `columns` if the questions do without images."
        )

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"Split {split!r}, row {index}"
        problem, answer = row[names["problem"]], row[names["answer"]]
        if not isinstance(problem, str):
            raise ValueError(f"{where}: the problem is {problem!r}, not text. Correct or remove the row.")
        if not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(f"{where}: the answer is {answer!r}. Give a text or a number, or remove the row.")
        try:
            images = open_images(row[names["images"]]) if has_images else []
        except Exception as error:  # whatever datasets and Pillow raise for a broken file
            raise ValueError(
                f"{where}: an image does not open ({type(error).__name__}: {error}). Replace it or remove the row."
            ) from error
        text = f"{problem}\n{instruction}" if instruction else problem
        try:
            parts = content_parts(text, len(images))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

        prompt = [{"role": "user", "content": parts if has_images else text}]
        prepared = {"prompt": prompt, "solution": str(answer)}
        if has_images:
            prepared["images"] = images
        if processor is not None:
            prepared["prompt_length"] = prompt_length(prompt, images, processor)
        return prepared

    # Parts of a message have different keys. Arrow would fill the missing ones with None, which templates take for
    # content; as JSON they come back from parquet as they were.
    features = {"prompt": List({"role": Value("string"), "content": List(Json()) if has_images else Value("string")})}
    if has_images:
        features["images"] = List(ImageFeature())
    features["solution"] = Value("string")
    if processor is not None:
        features["prompt_length"] = Value("int64")
    return rows.map(
        prepare,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(features),
        load_from_cache_file=False,
        desc=f"Preparing {split}",
    )


def split_off_test(splits: DatasetDict, test_size: float, seed: int) -> DatasetDict:
    """
    `train` and `test` from the only split of a set, drawn at random.

    Args:
        splits ([`~datasets.DatasetDict`]):
            A set with one split.
        test_size (`float`):
            Below 1 a share of the rows, from 1 on a number of rows.
        seed (`int`):
            Decides which rows are drawn.

    Raises:
        ValueError: there are several splits, or `test_size` leaves one of the two parts without rows.
    """
    if len(splits) > 1:
        raise ValueError(
            f"`test_size` is {test_size}, but the set has the splits {sorted(splits)} already. Leave `test_size` out, "
            "or choose one of them with `splits`."
        )
    (rows,) = splits.values()
    if test_size >= 1 and test_size != int(test_size) or not 0 < test_size < len(rows):
        raise ValueError(
            f"`test_size` is {test_size}. Give a share of the {len(rows)} rows between 0 and 1, or a number of rows."
        )
    return rows.train_test_split(test_size=test_size if test_size < 1 else int(test_size), seed=seed)


def drop_long_prompts(rows: Dataset, split: str, max_prompt_length: int) -> Dataset:
    """
    The rows of [`prepare_questions`] whose `prompt_length` is at most `max_prompt_length` tokens, without that column.

    Raises:
        ValueError: no row is left.
    """
    short = [index for index, length in enumerate(rows["prompt_length"]) if length <= max_prompt_length]
    if not short:
        raise ValueError(
            f"None of the {len(rows)} prompts of split {split!r} has at most {max_prompt_length} tokens. Raise "
            "`max_prompt_length`."
        )
    return rows.select(short).remove_columns("prompt_length")

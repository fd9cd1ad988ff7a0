"""Mistakes in the data, found before any model is loaded."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset, LargeList, List, Value
from datasets import Image as ImageFeature
from transformers import ProcessorMixin
from trl import GRPOConfig

from .pictures import IMAGE_COLUMNS, is_url
from .row_checks import RowsSeen, check_no_videos
from .trl_hooks import REWARD_ARGUMENTS


# What is looked at of a data set before a run: rows at equal distances, where these are not all.
LOOK_PROMPT_BYTES = 2**28
LOOK_PICTURES = 10_000

KINDS_OF_PICTURES = (ImageFeature, Value, dict)  # columns of pictures, of paths or bytes, and of both


def check_datasets(
    args: GRPOConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Any,
    reward_funcs: Any,
    brings_columns: bool,
) -> RowsSeen:
    """
    Raise where a run on these data would fail late, train nothing, or drop something without a word.

    Args:
        args ([`~trl.GRPOConfig`]): Configuration of the run.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`] or `None`): Data to train on.
        eval_dataset: Data to evaluate on, one set or a dictionary of them, or `None`.
        reward_funcs: Reward functions, one or a list.
        brings_columns (`bool`): Whether prompts or columns come from elsewhere too (environments, `rollout_func`).

    Returns:
        [`RowsSeen`]: what the rows have that only the student's processor can tell whether it is right.

    Raises:
        `ValueError`: naming the data set, what is wrong, and the remedy.
    """
    seen = RowsSeen()
    for field, dataset in by_argument(train_dataset, eval_dataset).items():
        columns = getattr(dataset, "column_names", None)
        if isinstance(dataset, Dataset | IterableDataset) and columns is not None:
            check_no_videos(f"`{field}`", columns)
            check_columns(field, columns, reward_funcs, brings_columns, args.remove_unused_columns)
        if isinstance(dataset, Dataset):
            check_size(field, len(dataset), args)
            check_image_column(field, dataset)
            look_at_rows(field, dataset, seen, args.fetch_image_urls, has_prompts=not brings_columns)
    return seen


def by_argument(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The data sets of a run by the argument that they were passed as, for error messages."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets.update({f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()})
    else:
        datasets["eval_dataset"] = eval_dataset
    return datasets


def check_columns(
    field: str, columns: list[str], reward_funcs: Any, brings_columns: bool, removes_columns: bool = False
) -> None:
    """Raise `ValueError` if the prompts are not there, or a reward function could not be called with these columns."""
    if brings_columns:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"`{field}` has no column `prompt`, only {columns}. Rename the column that holds the prompts "
            "(`dataset.rename_column`), or make one (`dataset.map`)."
        )
    kept = [column for column in columns if not removes_columns or column in ("prompt", *IMAGE_COLUMNS)]
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if callable(function) and not isinstance(function, torch.nn.Module):  # the others are models, or their names
            check_reward_function(field, function, columns, kept)


def check_reward_function(field: str, function: Callable, columns: list[str], kept: list[str]) -> None:
    """Raise `ValueError` if a call with the columns that are `kept`, and with what TRL adds, would fail."""
    name = getattr(function, "__name__", None)
    if name is None:  # as of a partial, or of most objects
        raise ValueError(
            f"The reward function {function!r} has no `__name__`, under which its rewards are logged. Give it one: "
            "`function.__name__ = 'my_reward'`."
        )
    parameters = inspect.signature(function).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters.values():
        needed = parameter.name
        if parameter.kind not in by_name or parameter.default is not parameter.empty or needed in REWARD_ARGUMENTS:
            continue
        if needed not in columns:
            raise ValueError(
                f"The reward function `{name}` needs the column `{needed}`, but `{field}` has only {columns}. Rename the "
                "column that holds it, or leave the function out of `reward_funcs`."
            )
        if needed not in kept:
            raise ValueError(
                f"The reward function `{name}` needs the column `{needed}` of `{field}`, but `remove_unused_columns` is "
                "True, which removes it. Set `remove_unused_columns` to False."
            )
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    # Environments are there only for those who bring columns; TRL passes those two on under other names.
    not_passed = ("environments", "prompt", "completion")
    unknown = [key for key in (*REWARD_ARGUMENTS, *kept) if key not in parameters and key not in not_passed]
    if unknown and not takes_all:
        raise ValueError(
            f"The reward function `{name}` does not take {unknown[0]!r}, with which it would be called: it gets the "
            f"columns of the data and {', '.join(REWARD_ARGUMENTS[:-1])}. Give it `**kwargs`."
        )


def check_size(field: str, num_rows: int, args: GRPOConfig) -> None:
    """Raise `ValueError` if a run on so few rows would not make one step, or not evaluate anything."""
    if field != "train_dataset":
        if num_rows == 0:
            raise ValueError(f"`{field}` has no rows, so nothing would be evaluated. Leave it out, or give some.")
        return
    needed = args.generation_batch_size // args.num_generations
    if num_rows < needed:
        raise ValueError(
            f"`{field}` has {num_rows} rows, but a generation batch takes {needed} prompts (`generation_batch_size` "
            f"{args.generation_batch_size} / `num_generations` {args.num_generations}), so the run would end without a "
            "single step. Give more prompts, or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or "
            "`steps_per_generation`, or raise `num_generations`."
        )


def check_image_column(field: str, dataset: Dataset) -> None:
    """Raise `ValueError` if lists of images are no lists, or all are empty."""
    column = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
    if column is None:
        return
    if column == "images" and isinstance(dataset.features[column], KINDS_OF_PICTURES):
        raise ValueError(
            f"The column `images` of `{field}` holds one image per row, not a list of them. Rename it to `image`, or "
            "put each image into a list."
        )
    if not rows_with_images(dataset, column).any():
        raise ValueError(
            f"None of the {len(dataset)} rows of `{field}` has an image in the column `{column}`. Remove the column, or look why "
            "they are not there."
        )


def look_at_rows(field: str, dataset: Dataset, seen: RowsSeen, fetch: bool, has_prompts: bool = True) -> None:
    """
    Look at the prompts and pictures of a data set, without decoding pictures.

    Rows at equal distances, as many as have 256 MiB of prompts, and the pictures of 10,000 rows; of a set with a transform
    none, since its rows are made when they are read.
    """
    if dataset.format["type"] == "custom":
        return
    image_column = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
    counts = None if image_column is None else pictures_per_row(dataset, image_column)
    for column in ("prompt", "teacher_prompt") if has_prompts else ():
        is_students = column == "prompt"
        for index, prompt in prompts(dataset, column) if column in dataset.column_names else ():
            if prompt is not None or is_students:
                where = f"Row {index} of `{field}`" + ("" if is_students else f", `{column}`")
                others = 0 if counts is None else int(counts[index])
                seen.add_prompt(where, prompt, fetch, others, is_students)
    for column in (*IMAGE_COLUMNS, "teacher_images"):
        feature = dataset.features.get(column)
        feature = getattr(feature, "feature", feature)  # of the items of a list
        if feature is not None and not isinstance(feature, KINDS_OF_PICTURES):
            look_at_one(field, dataset, column, seen, fetch)
            continue
        for index, picture in stored_pictures(dataset, column) if feature is not None else ():
            where = f"Row {index} of `{field}`, column `{column}`,"
            if isinstance(feature, ImageFeature) and isinstance(picture, str) and "://" in picture:
                if is_url(picture):
                    raise ValueError(
                        f"{where} has a picture that is a URL, {picture[:200]!r}, which datasets would fetch without a "
                        "limit. Download the pictures beforehand, or keep the URLs as text (`cast_column`) and set "
                        "`fetch_image_urls`."
                    )
                continue  # in an archive or a store, which datasets reads too
            seen.add_picture(where, picture, fetch)


def look_at_one(field: str, dataset: Dataset, column: str, seen: RowsSeen, fetch: bool) -> None:
    """Look at the first picture of a column that has them in a form of its own, as of arrays: all rows have that one."""
    for index in range(len(dataset)):
        value = dataset[index][column]
        pictures = value if isinstance(dataset.features[column], List | LargeList) else [value]
        for picture in pictures if value is not None else ():
            seen.add_picture(f"Row {index} of `{field}`, column `{column}`,", picture, fetch)
            return


def pictures_per_row(dataset: Dataset, column: str) -> np.ndarray:
    """How many pictures each row has in a column of lists of them, or of single ones, without reading them."""
    if not isinstance(dataset.features[column], List | LargeList):
        return rows_with_values(dataset, column).astype(int)
    lengths = pyarrow.compute.list_value_length(dataset.data.column(column))
    found = pyarrow.compute.fill_null(lengths, 0).to_numpy()
    return found if dataset._indices is None else found[dataset._indices.column(0).to_numpy()]


def rows_with_images(dataset: Dataset, column: str) -> np.ndarray:
    """Boolean array that marks the rows with at least one image, without reading the images."""
    return pictures_per_row(dataset, column) > 0


def rows_with_values(dataset: Dataset, column: str) -> np.ndarray:
    """Boolean array that marks the rows whose value in a column is not `None`, without reading the values."""
    found = pyarrow.compute.is_valid(dataset.data.column(column)).to_numpy()
    return found if dataset._indices is None else found[dataset._indices.column(0).to_numpy()]


def prompts(dataset: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Prompts of rows at equal distances, with the numbers of the rows."""
    bytes_of_row = dataset.data.column(column).nbytes / max(1, dataset.data.num_rows)
    step = max(1, round(len(dataset) * bytes_of_row / LOOK_PROMPT_BYTES))
    rows = dataset.with_format(None).select_columns([column])
    rows = rows if step == 1 else rows.select(range(0, len(rows), step))
    for start in range(0, len(rows), 1000):
        for place, prompt in enumerate(rows[start : start + 1000][column]):
            yield (start + place) * step, prompt


def stored_pictures(dataset: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """Pictures of rows at equal distances as they are stored, with the numbers of the rows; bytes are not copied."""
    stored = dataset.data.column(column)
    places = None if dataset._indices is None else dataset._indices.column(0)
    step = -(-len(dataset) // LOOK_PICTURES) or 1
    is_list = isinstance(dataset.features[column], List | LargeList)
    for index in range(0, len(dataset), step):
        value = stored[index if places is None else places[index].as_py()]
        if value.is_valid:
            for picture in value if is_list else [value]:
                yield index, _from_arrow(picture)


def _from_arrow(picture: pyarrow.Scalar) -> Any:
    """A picture as a value of Python, but its bytes as a file that is read where they lie."""
    if isinstance(picture, pyarrow.StructScalar) and picture.is_valid:
        fields = dict(picture.items())
        content = fields.get("bytes")
        picture = content if content is not None and content.is_valid else fields.get("path", content)
    if picture is None or not picture.is_valid:
        return None
    if pyarrow.types.is_binary(picture.type) or pyarrow.types.is_large_binary(picture.type):
        return pyarrow.BufferReader(picture.as_buffer())
    return picture.as_py()


def check_images_are_read(processing_class: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise `ValueError` if the data have images that the student's processing class would ignore."""
    for field, dataset in by_argument(train_dataset, eval_dataset).items():
        image_columns = {*IMAGE_COLUMNS} & set(getattr(dataset, "column_names", None) or ())
        if image_columns and not isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                f"`{field}` has the column {image_columns.pop()!r}, but the student's processing class is a tokenizer "
                f"({type(processing_class).__name__}) and no processor for images, so they would be ignored. Of a model "
                "that reads images, pass the processor (`AutoProcessor.from_pretrained`) as `processing_class`; else train "
                "an image-text model, or remove the column."
            )

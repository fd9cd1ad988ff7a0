"""Mistakes in the data, found before any model is loaded."""

import inspect
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from .trl_hooks import REWARD_ARGUMENTS


IMAGE_COLUMNS = ("images", "image")  # where TRL looks for images, in this order


def check_datasets(
    args: GRPOConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Any,
    reward_funcs: Any,
    brings_columns: bool,
) -> None:
    """
    Raise where a run on these data would fail late, train nothing, or drop something without a word.

    Args:
        args ([`~trl.GRPOConfig`]): Configuration of the run.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`] or `None`): Data to train on.
        eval_dataset: Data to evaluate on, one set or a dictionary of them, or `None`.
        reward_funcs: Reward functions, one or a list.
        brings_columns (`bool`): Whether prompts or columns come from elsewhere too (environments, `rollout_func`).

    Raises:
        `ValueError`: naming the data set, what is wrong, and the remedy.
    """
    for field, dataset in by_argument(train_dataset, eval_dataset).items():
        columns = getattr(dataset, "column_names", None)
        if isinstance(dataset, Dataset | IterableDataset) and columns is not None:
            check_columns(field, columns, reward_funcs, brings_columns)
        if isinstance(dataset, Dataset):
            check_size(field, len(dataset), args)
            check_image_column(field, dataset)


def by_argument(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The data sets of a run by the argument that they were passed as, for error messages."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets.update({f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()})
    else:
        datasets["eval_dataset"] = eval_dataset
    return datasets


def check_columns(field: str, columns: list[str], reward_funcs: Any, brings_columns: bool) -> None:
    """Raise `ValueError` if the prompts, or a column that a reward function needs, are not there."""
    if brings_columns:
        return
    if "prompt" not in columns:
        raise ValueError(
            f"`{field}` has no column `prompt`, only {columns}. Rename the column that holds the prompts "
            "(`dataset.rename_column`), or make one (`dataset.map`)."
        )
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if not inspect.isroutine(function):
            continue
        for name, parameter in inspect.signature(function).parameters.items():
            is_needed = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if is_needed and name not in columns and name not in REWARD_ARGUMENTS:
                raise ValueError(
                    f"The reward function `{function.__name__}` needs the column `{name}`, but `{field}` has only "
                    f"{columns}. Rename the column that holds it, or leave the function out of `reward_funcs`."
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
    """Raise `ValueError` if some rows have images and others none, or if lists of images are no lists."""
    column = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
    if column is None:
        return
    if column == "images" and isinstance(dataset.features[column], ImageFeature):
        raise ValueError(
            f"The column `images` of `{field}` holds one image per row, not a list of them. Rename it to `image`, or "
            "put each image into a list."
        )
    has_images = rows_with_images(dataset, column)
    if not has_images.all():
        without = len(has_images) - has_images.sum()
        first = int((~has_images).argmax())
        remedy = (
            "Remove the column."
            if not has_images.any()
            else "A forward pass takes images for all of its rows or for none, on all ranks. Train on the two kinds in "
            f"runs of their own: `dataset.filter(lambda row: row[{column!r}])`, and the rest without the column."
        )
        raise ValueError(
            f"{without} of {len(has_images)} rows of `{field}` have no images in the column `{column}`; the first is row "
            f"{first}. {remedy}"
        )


def rows_with_images(dataset: Dataset, column: str) -> np.ndarray:
    """Boolean array that marks the rows with at least one image, without reading the images."""
    if isinstance(dataset.features[column], ImageFeature):
        return rows_with_values(dataset, column)
    lengths = pyarrow.compute.list_value_length(dataset.data.column(column))
    found = pyarrow.compute.greater(pyarrow.compute.fill_null(lengths, 0), 0).to_numpy()
    return found if dataset._indices is None else found[dataset._indices.column(0).to_numpy()]


def rows_with_values(dataset: Dataset, column: str) -> np.ndarray:
    """Boolean array that marks the rows whose value in a column is not `None`, without reading the values."""
    found = pyarrow.compute.is_valid(dataset.data.column(column)).to_numpy()
    return found if dataset._indices is None else found[dataset._indices.column(0).to_numpy()]


def check_images_are_read(trainer: GRPOTrainer) -> None:
    """Raise `ValueError` if the training data has images that the model's processing class would ignore."""
    image_columns = {*IMAGE_COLUMNS} & set(getattr(trainer.train_dataset, "column_names", None) or ())
    if image_columns and not isinstance(trainer.processing_class, ProcessorMixin):
        raise ValueError(
            f"`train_dataset` has the column {image_columns.pop()!r}, but the model ({type(trainer.model).__name__}) "
            "has no processor for images, so they would be ignored. Train an image-text model, or remove the column."
        )


def check_images_alike(rows: list[dict[str, Any]], before: bool | None = None) -> bool:
    """
    Raise if some rows of a batch have images and others none; for data that cannot be looked at beforehand.

    Args:
        rows (`list[dict]`): Rows of one rank.
        before (`bool`, *optional*): Whether the rows of earlier batches have images.

    Returns:
        `bool`: whether these rows have images.

    Raises:
        `ValueError`: naming the prompt of the row that is unlike the others.
    """
    for row in rows:
        found = any(row.get(column) for column in IMAGE_COLUMNS)
        before = found if before is None else before
        if found != before:
            raise ValueError(
                f"A row has {'images' if found else 'no images'}, unlike those before it (prompt: "
                f"{str(row.get('prompt'))[:200]!r}). A forward pass takes images for all of its rows or for none, on all "
                "ranks. Train on the two kinds in runs of their own."
            )
    return before

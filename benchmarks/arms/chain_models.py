"""Models of the chain task, made as those of the digits demo (`examples/digits_models.py`), whose parts these are."""

from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from digits_models import SPECIAL_TOKENS, build_model, save, train_sft
from digits_models import build_processor as build_digits_processor
from transformers import LlavaProcessor

from .chain_data import with_wrong_sums


WORDS = ["\n", "system", "user", "assistant", "Plain", "Checking", "Counting", ":", " what", " is", " the", " first"]
WORDS += [" digit", " plus", " second", ",", " minus", " third", "?"]
WORDS += ["<think>", "I", " see", " and", ".", "+", "-", "=", "</think>", "\\boxed", "{", "}", " "]
NUMBERS = [f"{space}{number}" for space in ("", " ") for number in range(20)]

BATCH_SIZE = 32
REPEATS = 3


def build_processor() -> LlavaProcessor:
    return build_digits_processor([*SPECIAL_TOKENS, *WORDS, *NUMBERS])


def in_batches(split: Dataset, seed: int) -> Dataset:
    """
    The rows in the order of training, so that each batch is counted as a whole or not at all.

    A few counted rows in every batch would triple the time, and they are few to learn from: they come `REPEATS` times.
    """
    rng = np.random.default_rng(seed)
    is_counted = np.array([prompt[0]["content"].startswith("Counting") for prompt in split["prompt"]])
    short = rng.permutation(np.flatnonzero(~is_counted))
    long = np.concatenate([rng.permutation(np.flatnonzero(is_counted)) for _ in range(REPEATS)])
    batches = [rows[start : start + BATCH_SIZE] for rows in (short, long) for start in range(0, len(rows), BATCH_SIZE)]
    batches = [batch for batch in batches if len(batch) == BATCH_SIZE]
    return split.select(np.concatenate([batches[index] for index in rng.permutation(len(batches))]))


def train(train_split: Dataset, output_dir: Path, seed: int, width: int, max_steps: int, learning_rate: float) -> None:
    """Train a new model of `width` on the rows, and save it."""
    processor = build_processor()
    model = build_model(processor, width=width, seed=seed)
    rows, options = in_batches(train_split, seed), {"train_sampling_strategy": "sequential"}
    train_sft(model, processor, rows, output_dir, seed, max_steps, learning_rate, BATCH_SIZE, **options)
    save(model, processor, output_dir)


def build_teacher(splits: DatasetDict, output_dir: Path, seed: int) -> None:
    """Trained on right answers."""
    train(splits["train"], output_dir, seed, width=64, max_steps=1000, learning_rate=2e-3)


def build_student(splits: DatasetDict, output_dir: Path, seed: int) -> None:
    """Trained on answers of which half state a first sum that is one too high."""
    train(with_wrong_sums(splits["train"], seed), output_dir, seed, width=48, max_steps=600, learning_rate=3e-3)

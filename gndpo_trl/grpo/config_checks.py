"""What is wrong with a configuration before TRL looks at it, all of it in one message."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
from trl import GRPOConfig

from .trl_hooks import ROW_MEAN_LOSSES, TOKEN_SUM_LOSSES


LOSSES = (*ROW_MEAN_LOSSES, *TOKEN_SUM_LOSSES, "bnpo")

# Fields that say how much there is of something; `None` where they allow it says that it follows from others.
COUNTS = (
    "num_generations",
    "num_generations_eval",
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "pad_to_multiple_of",
    "scoring_token_budget",
    "log_completions_steps",
    "num_completions_in_page",
    "max_skipped_steps",
)

# Numbers that enter the gradient as they are, where infinity and NaN are never meant.
FINITE = ("learning_rate", "weight_decay", "beta", "epsilon", "epsilon_high", "entropy_coef", "max_grad_norm")


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one `ValueError` for all that is wrong; nothing where nothing is."""
    problems = list(problems)
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} settings cannot be so:\n" + "\n".join(f"- {text}" for text in problems))


def make_numbers_plain(args: GRPOConfig) -> None:
    """Make Python's numbers of numpy's, as a sweep has them: JSON and checkpoints can hold no others."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if isinstance(value, np.generic):
            setattr(args, field.name, value.item())


def type_problems(args: GRPOConfig) -> Iterator[str]:
    """Fields whose value is not of their type, as a quoted number in a recipe or a notebook is."""
    hints = typing.get_type_hints(type(args))
    for name, hint in hints.items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
        # Other types come as text too, or are none of our business.
        if not set(kinds) <= {int, float, bool, type(None)} or not hasattr(args, name):
            continue
        value = getattr(args, name)
        if not any(is_of(value, kind) for kind in kinds):
            wanted = " or ".join(
                {int: "an integer", float: "a number", bool: "True or False"}.get(k, "None") for k in kinds
            )
            yield f"`{name}` is {value!r} ({type(value).__name__}), but has to be {wanted}."


def is_of(value: Any, kind: type) -> bool:
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool | int) and value in (0, 1)
    return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)


def count_problems(args: GRPOConfig) -> Iterator[str]:
    """Numbers of things that are none of them, and numbers that are no numbers."""
    for name in COUNTS:
        value = getattr(args, name, None)
        if isinstance(value, Real) and value < 1:
            yield f"`{name}` is {value}, but it counts something. Give an integer of at least 1."
    for name in FINITE:
        value = getattr(args, name, None)
        if isinstance(value, Real) and not math.isfinite(value):
            yield f"`{name}` is {value}, which no number in a gradient can be. Give a finite one."
    if not 0 < args.temperature < math.inf:
        yield (
            f"`temperature` is {args.temperature}, but completions are sampled, and scored, at it. Give a positive number; "
            "1.0 is the student as it is."
        )
    if args.loss_type not in LOSSES:
        yield f"`loss_type` is {args.loss_type!r}, which TRL does not know. Choose one of {', '.join(map(repr, LOSSES))}."

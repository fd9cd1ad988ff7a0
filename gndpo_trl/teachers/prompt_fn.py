"""Prompts of the teacher that depend on what the student has just sampled: a function of the user's writes them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from .special_tokens import SpecialTokens


@dataclass(eq=False)
class Completion:
    """
    A completion that the student has sampled, as a `teacher_prompt_fn` gets it.

    Attributes:
        text (`str`): What it says, without special tokens. One that it writes out has a zero-width space (U+200B) in it,
            so that it stays text in a prompt.
        num_tokens (`int`): Its length in tokens, with the end of turn.
        rewards (`dict[str, float]`): What each reward function gave it, by the function's name. NaN: it gave none.
        group (`list[Completion]`): All completions of the same prompt, this one among them, in the order of sampling.
            They are all there, also those that other processes train on.
    """

    text: str
    num_tokens: int
    rewards: dict[str, float]
    group: list["Completion"] = field(default_factory=list, repr=False)


# Gets rows of the data set and what was sampled for each of them; returns as many prompts, as `teacher_prompt` has them.
TeacherPromptFn = Callable[[list[dict[str, Any]], list[Completion]], list[str | list[dict[str, Any]] | None]]


def group_completions(
    completion_ids: list[list[int]],
    rewards: torch.Tensor,
    names: list[str],
    num_generations: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Completion]:
    """
    This process's completions, in groups that are whole. All processes call this together.

    Args:
        completion_ids (`list[list[int]]`): Token ids of this process's completions; every process has as many.
        rewards (`torch.Tensor` of shape `(N, F)`): Rewards of the completions of all processes, in their order.
        names (`list[str]`): Names of the `F` reward functions.
        num_generations (`int`): Completions of a prompt. They follow one another, and a group may go on in the next process.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes them.
    """
    texts = SpecialTokens(tokenizer).as_text(tokenizer.batch_decode(completion_ids, skip_special_tokens=True))
    sampled = gather_object([(text, len(ids)) for text, ids in zip(texts, completion_ids, strict=True)])
    completions = [
        Completion(text, num_tokens, dict(zip(names, values, strict=True)))
        for (text, num_tokens), values in zip(sampled, rewards.tolist(), strict=True)
    ]
    for start in range(0, len(completions), num_generations):
        group = completions[start : start + num_generations]
        for completion in group:
            completion.group = group
    first = PartialState().process_index * len(completion_ids)
    return completions[first : first + len(completion_ids)]


def write_prompts(
    function: TeacherPromptFn, rows: list[dict[str, Any]], completions: list[Completion]
) -> list[dict[str, Any]]:
    """
    Rows with the `teacher_prompt` that the function writes for each.

    Raises:
        `ValueError`: if a row has a `teacher_prompt` already, or if the function does not return one prompt for each row.
    """
    if any(row.get("teacher_prompt") is not None for row in rows):
        raise ValueError(
            "The teacher's prompt is given twice: `teacher_prompt_fn` is set, and a row has a `teacher_prompt`. Keep one of "
            "them; under another name the column reaches the function."
        )
    prompts = function([dict(row) for row in rows], completions)
    if not isinstance(prompts, list):
        raise ValueError(
            f"`teacher_prompt_fn` returned {type(prompts).__name__}: {str(prompts)[:200]!r}. Return a list with one entry "
            f"for each of the {len(rows)} rows: a prompt, or None for the student's."
        )
    if len(prompts) != len(rows):
        raise ValueError(
            f"`teacher_prompt_fn` returned {len(prompts)} prompts for {len(rows)} rows. Return one for each row, in their "
            "order, and None for rows in which the teacher reads the student's prompt."
        )
    for number, prompt in enumerate(prompts):
        if not is_prompt(prompt):
            raise ValueError(
                f"`teacher_prompt_fn` returned {str(prompt)[:200]!r} ({type(prompt).__name__}) for row {number}. A prompt is "
                "text that is not empty, a list of messages (dictionaries with `role` and `content`), or None for the "
                "student's."
            )
    return [{**row, "teacher_prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


def is_prompt(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value != ""
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(message, dict) and "role" in message for message in value)

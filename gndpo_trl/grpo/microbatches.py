"""Micro-batches of real tokens: which completions share a forward pass, and how the padding between them goes.

TRL pads every prompt and every completion to the longest of the whole generation batch. Here rows of similar length
share a forward pass, and every row starts in its first column, so that a forward pass of `B` rows is as wide as its
longest row of prompt and completion together. A *row* is one prompt with one completion; its length is the number of
its tokens under the attention mask.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from .cuts import cheapest_cut, fewest_groups, smallest_limit
from .trl_hooks import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


# The largest group may hold this much more than the smallest possible largest group, where that saves padding elsewhere.
GROUP_SLACK = 1.25


def plan_by_length(
    lengths: torch.Tensor,
    *,
    num_groups: int | None = None,
    token_budget: int | None = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda lengths: lengths,
) -> tuple[list[list[int]], list[int]]:
    """
    Distribute rows over groups of similar length, in the same sizes on all ranks.

    The k-th group holds as many rows on every rank, since sharded models wait for each other at every forward pass and
    TRL gathers metrics of the rows of every micro-batch. It is planned for the longest rows that any rank has there.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`): Number of tokens in each row of this rank.
        num_groups (`int`, *optional*): Number of groups, at most `B`.
        token_budget (`int`, *optional*): Largest group in padded tokens; a longer row is a group of its own. Give either
            this or `num_groups`.
        gather (`Callable`, *optional*): Concatenates a tensor along its first dimension over all ranks. It receives
            `(1, B)` lengths. The default is one process.

    Returns:
        `tuple[list[list[int]], list[int]]`: the groups, as lists of row indices, the longest rows first, which together hold
        each of the `B` rows once; and the padded tokens of each on the rank where it is largest.
    """
    order = lengths.argsort(descending=True, stable=True)
    longest = tuple(gather(lengths[order].unsqueeze(0)).amax(0).tolist())
    if num_groups is None:
        num_groups = fewest_groups(padded_ends(np.array(longest), token_budget))
    sizes = group_sizes(longest, num_groups, token_budget)
    starts = accumulate(sizes, initial=0)
    costs = [size * longest[start] for size, start in zip(sizes, starts, strict=False)]
    return [rows.tolist() for rows in order.split(sizes)], costs


@lru_cache(maxsize=1)  # teacher, student and loss cut the same rows
def group_sizes(lengths: tuple[int, ...], num_groups: int, token_budget: int | None = None) -> tuple[int, ...]:
    """
    Cut rows, sorted by length, into groups that cost about the same and hold little padding.

    Padded to its longest row, a group costs `rows × longest`. Among all ways to cut, this is one with the least total
    cost whose largest group is at most 1.25 times as large as it has to be, within the budget, and never larger than a
    micro-batch of TRL's. Groups of about equal cost keep the peak of memory low.

    Args:
        lengths (`tuple[int, ...]`): Number of tokens in each of `B` rows, in descending order.
        num_groups (`int`): Number of groups of at least one row.
        token_budget (`int`, *optional*): Upper bound of a group's cost, where it has more than one row.

    Returns:
        `tuple[int, ...]`: numbers of rows, which sum to `B`.
    """
    longest = np.array(lengths)

    def ends_within(limit: int) -> np.ndarray:
        return padded_ends(longest, limit if token_budget is None else min(limit, token_budget))

    of_trl = math.ceil(len(lengths) / num_groups) * lengths[0]
    smallest = smallest_limit(ends_within, num_groups, range(lengths[0], of_trl))
    limit = min(int(GROUP_SLACK * smallest), of_trl)

    def costs(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return (ends - starts) * longest[starts]

    return tuple(cheapest_cut(costs, ends_within(limit), num_groups))


def padded_ends(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Where groups of rows of descending length may end, if those of more than one row hold `limit` padded tokens at most."""
    starts = np.arange(len(lengths))
    return np.minimum(starts + np.maximum(limit // lengths, 1), len(lengths))


def merge_batches(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of several micro-batches in one; what is one number for a whole generation batch stays one number."""
    merged = {}
    for key, first in batches[0].items():
        values = [batch[key] for batch in batches]
        if first is None or isinstance(first, torch.Tensor) and first.ndim == 0:
            merged[key] = first
        else:
            merged[key] = torch.cat(values) if isinstance(first, torch.Tensor) else sum(values, [])
    return merged


class Regrouping:
    """
    The rows of equally large micro-batches in as many other micro-batches, see [`plan_by_length`].

    A micro-batch is put together when it is asked for, so that no image is held twice but those of the one in use.

    Args:
        batches (`list[dict]`): Micro-batches of one generation batch, as TRL splits it.
        groups (`list[list[int]]`): Rows of each of the `K` new micro-batches, counted through all `batches`.
        gather (`Callable`, *optional*): Concatenates a tensor along its first dimension over all ranks. It receives `(1, K)`
            numbers of tokens. The default is one process.
    """

    def __init__(
        self,
        batches: list[dict[str, Any]],
        groups: list[list[int]],
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ):
        self.batches = batches
        self.rows_before = len(batches[0]["prompt_mask"])
        self.groups = groups
        tokens = torch.cat([loss_mask(batch).sum(-1) for batch in batches])
        of_this_rank = torch.stack([tokens[rows].sum() for rows in self.groups])
        self.num_tokens = gather(of_this_rank.unsqueeze(0)).sum(0).tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Micro-batch `index`, and what its mean over rows or tokens has to be weighted with for sums over all micro-batches
        to stay the same: `num_rows` of this rank, `num_tokens` of all ranks, and `row_share`, the rows relative to what
        they were.
        """
        of_batch = {}
        for row in self.groups[index]:
            of_batch.setdefault(row // self.rows_before, []).append(row % self.rows_before)
        parts = [select_rows(self.batches[number], rows) for number, rows in sorted(of_batch.items())]
        num_rows = len(self.groups[index])
        weights = {"num_rows": num_rows, "num_tokens": self.num_tokens[index]}
        return {**merge_batches(parts), **weights, "row_share": num_rows / self.rows_before}


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """`(B, T)` mask that TRL's loss uses: completion tokens, less those that came from a tool."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def select_rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch as TRL builds it, with their images, in the order of `rows`."""
    selected = {}
    for key, values in split_pixel_values_by_grid(batch).items():
        if isinstance(values, torch.Tensor):
            selected[key] = values[rows] if values.ndim > 0 else values
        else:
            selected[key] = values and [values[row] for row in rows]
    return unsplit_pixel_values_by_grid(selected)


class LeftAligned:
    """
    The rows of a batch moved to the left edge, where TRL aligns them at the boundary of prompt and completion.

    The width shrinks from longest prompt plus longest completion to the longest row. A token's column no longer depends
    on which rows share the batch, so neither do the log-probs of models with absolute positions.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, P + T)`): Left-padded prompts before right-padded completions.
        logits_to_keep (`int`): `T`, padded length of the completions.
    """

    def __init__(self, attention_mask: torch.Tensor, logits_to_keep: int):
        device = attention_mask.device
        prompt_lengths = attention_mask[:, :-logits_to_keep].sum(-1)
        completion_lengths = attention_mask[:, -logits_to_keep:].sum(-1)
        shortest_prompt = prompt_lengths.min().item()
        longest = (prompt_lengths + completion_lengths).max().item()
        width = max(longest, shortest_prompt + 1)  # TRL cannot keep zero columns
        first_column = attention_mask.size(1) - logits_to_keep - prompt_lengths
        # Beyond the end of a row, the columns wrap around to its padding.
        columns = first_column.unsqueeze(1) + torch.arange(width, device=device)
        self.columns = columns % attention_mask.size(1)
        # Of the aligned columns that TRL scores, those that hold the completions.
        self.logits_to_keep = width - shortest_prompt
        scored = (prompt_lengths - shortest_prompt).unsqueeze(1) + torch.arange(logits_to_keep, device=device)
        self.scored_columns = scored.clamp(max=self.logits_to_keep - 1)
        self.is_padding = torch.arange(logits_to_keep, device=device) >= completion_lengths.unsqueeze(1)
        aligned = torch.arange(width, device=device)
        ends = prompt_lengths + completion_lengths
        self.is_completion = (aligned >= prompt_lengths.unsqueeze(1)) & (aligned < ends.unsqueeze(1))

    def mask_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Aligned labels, ignored (-100) outside the completions, so that the LM head projects nothing else."""
        return labels.masked_fill(~self.is_completion, -100)

    def align(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, P + T)` values per token, moved to the left edge."""
        return values.gather(1, self.columns)

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, logits_to_keep)` values, computed on aligned rows, as `(B, T)`; 0 on padding."""
        return values.gather(1, self.scored_columns).masked_fill(self.is_padding, 0)

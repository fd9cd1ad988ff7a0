"""Prompts that several rows share: which rows do, how they share a forward pass, and what that saves.

A *row* is one prompt with one completion. A *packed* row holds the prompts of a forward pass once each, without their last
tokens, and after them one *branch* for each row: the last token of its prompt and its completion without the last token,
which predicts nothing that is asked for. Next-token labels of a branch are its completion.
"""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from .branch_attention import Branches
from .cuts import cheapest_cut, smallest_limit
from .trl_hooks import MULTIMODAL_KEYS, split_pixel_values_by_grid


# A plan has to save this much of the tokens to be followed, unless `share_prompts` is True. The LM head, which computes
# completions alone, gains nothing, and gathering keys and values for the branches takes its time: where a sixth of the
# tokens is saved, `benchmarks/step_cost.py` measures steps that are 5 to 11 % slower.
WORTHWHILE = 0.25
# Attention makes a copy of the keys and values of the prompt for each branch, and keeps it until the backward pass. They
# are so much of what a layer keeps for a token: two of about sixteen vectors.
COPIES = 1 / 8


def same_prompts(batches: list[dict[str, Any]]) -> list[int]:
    """
    Number the prompts of rows, in the order of their first appearance; equal are those with equal tokens and images.

    Args:
        batches (`list[dict]`): Batches as TRL builds them, with `prompt_ids` and `prompt_mask` of one width in all.

    Returns:
        `list[int]`: a number for each row of the batches, in their order.
    """
    numbers, seen, count = [], {}, 0
    for batch in batches:
        images = split_pixel_values_by_grid({key: batch[key] for key in MULTIMODAL_KEYS if batch.get(key) is not None})
        images.pop("mm_token_type_ids", None)  # follow from the prompt, and cover the completion
        images.pop("token_type_ids", None)
        texts = batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, -1).cpu().numpy()
        for row, text in enumerate(texts):
            of_row = {key: values[row] for key, values in images.items()}
            candidates = seen.setdefault(text.tobytes(), [])
            number = next((number for number, other in candidates if equal(of_row, other)), None)
            if number is None:
                number, count = count, count + 1
                candidates.append((number, of_row))
            numbers.append(number)
    return numbers


def equal(images: dict[str, Any], others: dict[str, Any]) -> bool:
    return all(
        torch.equal(value, others[key]) if isinstance(value, torch.Tensor) else value == others[key]
        for key, value in images.items()
    )


class SharedPrompts:
    """
    The rows of a batch in one packed row, and back.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, P + T)`): Left-padded prompts before right-padded completions.
        logits_to_keep (`int`): `T`, padded length of the completions.
        prompts (`list[int]`): A number for the prompt of each row, see [`same_prompts`].

    Attributes:
        first_rows (`list[int]`): For each of the `G` prompts, the first row that has it.
        branches ([`Branches`]): What the attention has to know.
    """

    def __init__(self, attention_mask: torch.Tensor, logits_to_keep: int, prompts: list[int]):
        device, width = attention_mask.device, attention_mask.size(1) - logits_to_keep
        prompt_lengths = attention_mask[:, :width].sum(-1).tolist()
        completion_lengths = attention_mask[:, width:].sum(-1).tolist()
        rows_of = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        self.first_rows = [rows[0] for rows in rows_of.values()]
        # A masked completion keeps one token, so that every row has a branch.
        branch_lengths = [max(length, 1) for length in completion_lengths]
        ordered = [sorted(rows, key=lambda row: -branch_lengths[row]) for rows in rows_of.values()]
        lengths_before = [prompt_lengths[row] - 1 for row in self.first_rows]
        self.branches = Branches(
            lengths_before, [[branch_lengths[row] for row in rows] for rows in ordered], attention_mask.device
        )

        # (row, first column, number of columns) of each piece of the packed row
        pieces = [
            (row, width - 1 - length, length) for row, length in zip(self.first_rows, lengths_before, strict=True)
        ]
        pieces += [(row, width - 1, branch_lengths[row]) for rows in ordered for row in rows]
        rows, first_columns, sizes = torch.tensor(pieces).unbind(1)
        ends = sizes.cumsum(0)
        offsets = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
        columns = first_columns.repeat_interleave(sizes) + offsets
        self.rows, self.columns = rows.repeat_interleave(sizes).to(device), columns.to(device)
        # The prompt that a token continues, and its column in the padded prompts; branches go on from the last one.
        of_pieces = [*range(len(ordered)), *(number for number, rows in enumerate(ordered) for _ in rows)]
        self.prompt_of_token = torch.tensor(of_pieces).repeat_interleave(sizes).to(device)
        self.prompt_column = self.columns.clamp(max=width - 1)
        self.beyond_prompt = self.columns - self.prompt_column
        self.positions_in_row = self.columns - (width - torch.tensor(prompt_lengths, device=device))[self.rows]

        starts = torch.zeros(len(prompts), dtype=torch.long)
        starts[rows[len(ordered) :]] = (ends - sizes)[len(ordered) :]
        scored = starts.unsqueeze(1) + torch.arange(logits_to_keep)
        self.scored_columns = scored.clamp(max=len(columns) - 1).to(device)
        self.is_padding = (torch.arange(logits_to_keep) >= torch.tensor(completion_lengths).unsqueeze(1)).to(device)
        is_branch = torch.arange(len(columns)) >= sum(lengths_before)
        self.is_scored = (
            is_branch.to(device)
            & attention_mask[self.rows, (self.columns + 1).clamp(max=width + logits_to_keep - 1)].bool()
        )
        self.width = width

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, P + T)` values per token as `(1, L)`."""
        return values[self.rows, self.columns].unsqueeze(0)

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(1, L)` next tokens of the branches, -100 elsewhere."""
        following = input_ids[self.rows, (self.columns + 1).clamp(max=input_ids.size(1) - 1)]
        return following.masked_fill(~self.is_scored, -100).unsqueeze(0)

    def scored(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, T)` values per completion token as `(N,)`, in the order in which their branches score them."""
        return values[self.rows[self.is_scored], self.columns[self.is_scored] + 1 - self.width]

    def positions(self, prompt_positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        Position ids of the packed row, `(1, L)`.

        Args:
            prompt_positions (`torch.Tensor` of shape `(3, G, P)`, *optional*): Positions of the padded prompts, for models
                that give images positions of several dimensions. The result is then `(3, 1, L)`.
        """
        if prompt_positions is None:
            return self.positions_in_row.unsqueeze(0)
        return (prompt_positions[:, self.prompt_of_token, self.prompt_column] + self.beyond_prompt).unsqueeze(1)

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """`(1, L)` values, computed on the packed row, as `(B, T)`; 0 on padding."""
        return values[0][self.scored_columns].masked_fill(self.is_padding, 0)


class Plan:
    """
    Forward passes of rows in which each prompt is computed once, in the same sizes on all ranks.

    Rows of a prompt follow each other, the most expensive prompts first. A pass costs its distinct prompt tokens and its
    completion tokens; it is planned for the rank where that is most.

    Args:
        prompt_mask (`torch.Tensor` of shape `(B, P)`): Prompts of the rows of this rank.
        completion_mask (`torch.Tensor` of shape `(B, T)`): Their completions.
        prompts (`list[int]`): See [`same_prompts`].
        largest_pass (`int`): Tokens that a pass may hold, copies of its prompts included in part, where it has more than
            one row. The largest pass of the separate rows that it stands in for, so that no pass needs more memory.
        num_passes (`int`, *optional*): Exactly so many passes; then one may be larger than `largest_pass` where it has
            to be. If `None`, those that cost least.
        gather (`Callable`, *optional*): Concatenates a tensor along its first dimension over all ranks, which plan
            together.

    Attributes:
        passes (`list[list[int]]`): Rows of each pass; together they hold each of the `B` rows once.
        num_tokens (`int`): Tokens of all passes, each on the rank where it is largest.
    """

    def __init__(
        self,
        prompt_mask: torch.Tensor,
        completion_mask: torch.Tensor,
        prompts: list[int],
        *,
        largest_pass: int,
        num_passes: int | None = None,
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ):
        prompt_lengths = (prompt_mask.sum(-1) - 1).tolist()
        branch_lengths = completion_mask.sum(-1).clamp(min=1).tolist()
        of_prompt = {}
        for prompt, length in zip(prompts, branch_lengths, strict=True):
            of_prompt[prompt] = of_prompt.get(prompt, 0) + length
        total = [prompt_lengths[row] + of_prompt[prompt] for row, prompt in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda row: (-total[row], prompts[row], -branch_lengths[row]))
        begins = [k == 0 or prompts[order[k - 1]] != prompts[row] for k, row in enumerate(order)]
        # What a row adds to the pass of the row before it, what it costs more as the first one of a pass, and alone.
        adds = [branch_lengths[row] + begin * prompt_lengths[row] for row, begin in zip(order, begins, strict=True)]
        again = [(not begin) * prompt_lengths[row] for row, begin in zip(order, begins, strict=True)]
        whole = [prompt_lengths[row] + branch_lengths[row] for row in order]
        costs = PassCosts(gather(torch.tensor([[adds, again, whole]], device=prompt_mask.device)).cpu().numpy())
        if num_passes is not None:
            rows = np.arange(len(order))
            largest_row = math.ceil(costs.memory(rows, rows + 1).max())
            limits = range(max(largest_pass, largest_row), math.ceil(costs.memory(rows[:1], rows[-1:] + 1).item()))
            largest_pass = smallest_limit(costs.ends_within, num_passes, limits)
        sizes = cheapest_cut(costs.tokens, costs.ends_within(largest_pass), num_passes)
        bounds = list(accumulate(sizes, initial=0))
        self.passes = [order[start:end] for start, end in pairwise(bounds)]
        self.num_tokens = int(costs.tokens(np.array(bounds[:-1]), np.array(bounds[1:])).sum())


class PassCosts:
    """
    What rows cost that follow each other in one pass, on the rank where it is most.

    Args:
        ranks (`np.ndarray` of shape `(R, 3, B)`): For each rank and row, what it adds to the pass of the row before it; what
            it costs beside that as the first one of a pass; and what it costs alone.
    """

    def __init__(self, ranks: np.ndarray):
        adds, self.again, alone = ranks.swapaxes(0, 1)
        self.until, self.alone_until = (np.pad(values.cumsum(1), ((0, 0), (1, 0))) for values in (adds, alone))

    def tokens(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Tokens of passes, from their first rows and the rows behind their last ones."""
        return (self.until[:, ends] - self.until[:, starts] + self.again[:, starts]).max(0)

    def memory(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Their tokens, and the copies of prompts in part."""
        return self.tokens(starts, ends) + COPIES * (self.alone_until[:, ends] - self.alone_until[:, starts]).max(0)

    def ends_within(self, limit: int) -> np.ndarray:
        """Where passes may end, if those of more than one row shall need no more memory than that."""
        num_rows = self.again.shape[1]
        starts = np.arange(num_rows)
        ends = starts + 1
        for exponent in reversed(range(num_rows.bit_length())):
            further = np.minimum(ends + 2**exponent, num_rows)
            ends = np.where(self.memory(starts, further) <= limit, further, ends)
        return ends

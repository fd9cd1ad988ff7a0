"""Prompts that several rows share: which rows do, how they share a forward pass, and what that saves.

A *row* is one prompt with one completion. A *packed* row holds the prompts of a forward pass once each, without their last
tokens, and after them one *branch* for each row: the last token of its prompt and its completion without the last token,
which predicts nothing that is asked for. Next-token labels of a branch are its completion.
"""

from collections.abc import Callable
from typing import Any

import torch

from .branch_attention import Branches
from .microbatches import cheapest_cut, smallest_largest
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
        texts = batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, -1).tolist()
        for row, text in enumerate(texts):
            of_row = {key: values[row] for key, values in images.items()}
            candidates = seen.setdefault(tuple(text), [])
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
        # What a row adds to the pass of the row before it, and what it costs more as the first one of a pass.
        adds = [branch_lengths[row] + begin * prompt_lengths[row] for row, begin in zip(order, begins, strict=True)]
        again = [(not begin) * prompt_lengths[row] for row, begin in zip(order, begins, strict=True)]
        whole = [prompt_lengths[row] + branch_lengths[row] for row in order]
        ranks = gather(torch.tensor([[adds, again, whole]], device=prompt_mask.device)).double().cpu()
        costs = pass_costs(ranks[:, :2])
        memory = costs + COPIES * pass_costs(torch.stack([ranks[:, 2], torch.zeros_like(ranks[:, 2])], 1))
        if num_passes is None:
            sizes = cut_within(costs, memory, largest_pass)
        else:
            limit = max(smallest_largest(memory, num_passes), largest_pass)
            sizes = cheapest_cut(costs.masked_fill(memory > limit, torch.inf), num_passes)
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        self.passes = [order[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        self.num_tokens = int(sum(costs[start, end].item() for start, end in zip(bounds, bounds[1:], strict=False)))


def pass_costs(ranks: torch.Tensor) -> torch.Tensor:
    """
    `(B, B + 1)` tokens of rows `i` to `j - 1` in one pass, on the rank where they are most; infinite where `j <= i`.

    Args:
        ranks (`torch.Tensor` of shape `(R, 2, B)`): For each rank, what each row adds to the pass of the row before it, and
            what it costs beside that as the first one of a pass.
    """
    num_rows = ranks.size(-1)
    costs = torch.full((num_rows, num_rows + 1), -torch.inf, dtype=torch.float64)
    for adds, again in ranks:
        until = torch.cat([adds.new_zeros(1), adds.cumsum(0)])
        costs = torch.maximum(costs, until - until[:-1].unsqueeze(1) + again.unsqueeze(1))
    is_empty = torch.arange(num_rows + 1) <= torch.arange(num_rows).unsqueeze(1)
    return costs.masked_fill(is_empty, torch.inf)


def cut_within(costs: torch.Tensor, memory: torch.Tensor, largest: int) -> tuple[int, ...]:
    """
    Sizes of the cheapest passes of at most `largest` memory or of one row; as few as are that cheap.

    `costs` and `memory` are of the shape of [`pass_costs`].
    """
    num_rows = len(costs)
    one_row = torch.arange(num_rows + 1) == torch.arange(num_rows).unsqueeze(1) + 1
    costs = costs.masked_fill((memory > largest) & ~one_row, torch.inf) + 1e-3  # among equals, fewer passes
    total, starts = torch.zeros(num_rows + 1, dtype=torch.float64), [0]
    for end in range(1, num_rows + 1):
        best, start = (total[:end] + costs[:end, end]).min(0)
        total[end] = best
        starts.append(start.item())
    sizes, end = [], num_rows
    while end > 0:
        sizes.append(end - starts[end])
        end = starts[end]
    return tuple(sizes[::-1])

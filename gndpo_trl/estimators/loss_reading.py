"""What the passes of the loss find of a generation batch that nothing else has read."""

from typing import Any

import torch
from accelerate.utils import gather

from ..grpo.microbatches import select_rows
from ..objective.distributions import NUM_FIELDS, Comparison


class LossReading:
    """
    A generation batch, while its micro-batches pass. All ranks make one together.

    Args:
        rollout (`dict`): What the student sampled.
        question (`dict`): The same as the teacher reads it.
    """

    def __init__(self, rollout: dict[str, Any], question: dict[str, Any]):
        self.unknown: torch.Tensor | None = None  # tokens that had to leave the loss before
        self.shape = rollout["completion_ids"].shape
        # A micro-batch has all of a question but its rows, if the prompts are the student's, of all ranks: passes are as many.
        self.has_own_prompts = on_any_rank(question["prompt_ids"] is not rollout["prompt_ids"], rollout)
        self.questions = question if self.has_own_prompts else {"rows": question["rows"]}
        self.parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def question(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """A micro-batch as the teacher reads it, and whether that fits into one pass as the micro-batch does."""
        mine = select_rows(self.questions, inputs["row_of_batch"].tolist())
        return (mine, False) if self.has_own_prompts else ({**inputs, **mine}, True)

    def expect(self, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Where a backward pass has to write the comparison at `n` positions, as the fields `(n, NUM_FIELDS)` of a [`Comparison`]."""
        shape = (len(rows), NUM_FIELDS)
        found = torch.full(shape, torch.nan, dtype=torch.promote_types(dtype, torch.float32), device=rows.device)
        self.parts.append((rows, columns, found))
        return found

    def comparison(self) -> Comparison:
        """All that was found, as fields `(B, T)`, 0 on padding."""
        rows, columns, found = (torch.cat(values) for values in zip(*self.parts, strict=True))
        values = found.new_zeros(*self.shape, NUM_FIELDS)
        values[rows, columns] = found
        return Comparison.of(values)


def on_any_rank(is_so: bool, rollout: dict[str, Any]) -> bool:
    """Whether something is so on any rank, which all ask together."""
    return bool(gather(torch.tensor([is_so], device=rollout["completion_ids"].device)).any())

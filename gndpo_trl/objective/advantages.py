"""From scores to token-level advantages, without a trainer or a process group.

Everywhere below, `B` is the number of completions held by this process, `T` the padded completion length, and `mask`
(`(B, T)`, nonzero = valid) marks the tokens that take part in the loss. Scores are in nats. Masked positions may hold
anything, NaN and infinities included.

A population of scores is summarised by its *moments*, a float64 tensor whose last dimension is
`(count, sum, centred sum of squares)`. Moments of parts merge exactly into moments of the whole (Chan, Golub and
LeVeque, 1979), so that whitening over all ranks moves three numbers per rank and never the tokens, and float64 keeps
the variance right even where it is tiny beside the mean. Devices without float64 (MPS) have the CPU compute it: scores
are small beside everything else in a step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


ADVANTAGE_NORMALIZATIONS = ("global", "none", "group", "sequence", "teacher")

# Added to the variance under the square root, as in the reference.
VARIANCE_EPSILON = 1e-8

DEVICES_WITHOUT_FLOAT64 = ("mps",)


def as_float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on their own device if it has that dtype, else on the CPU."""
    return (values.cpu() if values.device.type in DEVICES_WITHOUT_FLOAT64 else values).double()


def row_moments(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Moments of each completion's valid scores.

    Returns:
        `torch.Tensor` of shape `(B, 3)` and dtype float64: count, sum and centred sum of squares of every row. On the
        device of `scores`, or on the CPU if that has no float64.
    """
    values = as_float64(scores.masked_fill(mask == 0, 0.0))
    valid = (mask != 0).to(values.device)
    count = valid.sum(-1).double()
    total = values.sum(-1)
    mean = total / count.clamp(min=1)
    centred = (values - mean.unsqueeze(-1)).masked_fill(~valid, 0.0)
    return torch.stack([count, total, centred.square().sum(-1)], dim=-1)


def merge_moments(moments: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """
    Moments of the union of the populations stacked along `dim`.

    Args:
        moments (`torch.Tensor` of shape `(..., 3)`): Moments to merge.
        dim (`int`, *optional*, defaults to `0`): Dimension that is merged away; not the last one.

    Returns:
        `torch.Tensor` of shape `(..., 3)` without dimension `dim`.
    """
    count, total, centred = moments.unbind(-1)
    mean = (total.sum(dim) / count.sum(dim).clamp(min=1)).unsqueeze(dim)
    shift = total / count.clamp(min=1) - mean
    return torch.stack([count.sum(dim), total.sum(dim), (centred + count * shift.square()).sum(dim)], dim=-1)


def shift_and_scale(moments: torch.Tensor, std_floor: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What whitening does to the scores of a population: `(score - shift) * scale`.

    Args:
        moments (`torch.Tensor` of shape `(..., 3)`): Moments of the population.
        std_floor (`float`, *optional*, defaults to `0.0`): Lower bound of the standard deviation, in nats.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(...)` and dtype float64: the mean, and one over the standard
        deviation, or 0 for a population of fewer than two tokens, which has none.
    """
    count, total, centred = moments.unbind(-1)
    std = (centred / (count - 1).clamp(min=1) + VARIANCE_EPSILON).sqrt().clamp(min=std_floor)
    return total / count.clamp(min=1), (1 / std).masked_fill(count < 2, 0.0)


def whiten(
    scores: torch.Tensor,
    mask: torch.Tensor,
    moments: torch.Tensor,
    std_floor: float = 0.0,
    subtract_mean: bool = True,
) -> torch.Tensor:
    """
    Scores shifted and scaled by the moments of their population: `(score - μ) / max(sqrt(σ² + 1e-8), std_floor)`.

    `σ²` is the unbiased variance. A population of fewer than two tokens has none: its advantages are zero.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): Scores in nats.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
        moments (`torch.Tensor` of shape `(3,)` or `(B, 3)`): Moments of the population each row is compared with.
        std_floor (`float`, *optional*, defaults to `0.0`): Lower bound of the standard deviation, in nats.
        subtract_mean (`bool`, *optional*, defaults to `True`): Whether to subtract `μ`; not where each score is already
            relative to an expectation of its own.

    Returns:
        `torch.Tensor` of shape `(B, T)`, of the dtype of `scores`: advantages, 0 on masked tokens.
    """
    mean, scale = (value.unsqueeze(-1) for value in shift_and_scale(moments, std_floor))  # each (1,) or (B, 1)
    advantages = as_float64(scores)
    if subtract_mean:
        advantages = advantages - mean
    return (advantages * scale).to(scores).masked_fill(mask == 0, 0.0)


@dataclass(frozen=True)
class Population:
    """
    Whom a completion's scores are compared with, and how they become advantages. The defaults are the paper's.

    Attributes:
        normalization (`str`, *optional*, defaults to `"global"`): One of `ADVANTAGE_NORMALIZATIONS`. Every valid token of
            the generation batch on all ranks (`"global"`), those that the same teacher scored (`"teacher"`), those of the
            same prompt (`"group"`), those of the same completion (`"sequence"`); `"none"` leaves scores as they are.
        std_floor (`float`, *optional*, defaults to `0.0`): See [`whiten`].
        num_generations (`int`, *optional*, defaults to `1`): Completions per prompt; they stand next to each other in
            the order of ranks and rows. Only used by `"group"`.
        teachers (`torch.Tensor` of shape `(B,)` and an integer dtype, *optional*): Number of the teacher that scored each
            completion, for `"teacher"`.
        num_teachers (`int`, *optional*, defaults to `1`): `K`, number of teachers on all ranks.
        gather (`Callable`, *optional*): Concatenates a tensor along its first dimension over all ranks, in the order
            of ranks. It receives `(1, 3)` moments for `"global"`, `(1, K, 3)` for `"teacher"` and `(B, 3)` for `"group"`.
            The default is one process.
        process_index (`int`, *optional*, defaults to `0`): Rank of this process in the order of `gather`.

    Raises:
        `ValueError`: if the normalization is not known, or lacks what it needs.
    """

    normalization: str = "global"
    std_floor: float = 0.0
    num_generations: int = 1
    teachers: torch.Tensor | None = None
    num_teachers: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda moments: moments
    process_index: int = 0

    def __post_init__(self):
        if self.normalization not in ADVANTAGE_NORMALIZATIONS:
            raise ValueError(
                f"Unknown normalization {self.normalization!r}. Choose one of {ADVANTAGE_NORMALIZATIONS}."
            )

    def moments(
        self, scores: torch.Tensor, mask: torch.Tensor, variances: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """
        Moments of the population that each completion is compared with. All ranks call it together.

        Args:
            scores (`torch.Tensor` of shape `(B, T)`): Scores, clamped if they are to be.
            mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
            variances (`torch.Tensor` of shape `(B, T)`, *optional*): Says that the scores are expectations, each of a
                distribution with this variance; the moments are then those of all these distributions together.

        Returns:
            `torch.Tensor` of shape `(B, 3)` and dtype float64, or `None` for `"none"`, which compares with nobody.
        """
        if self.normalization == "none":
            return None
        rows = row_moments(scores, mask)
        if variances is not None:
            rows[:, 2] += as_float64(variances.masked_fill(mask == 0, 0.0)).sum(-1)
        if self.normalization == "global":
            return merge_moments(self.gather(merge_moments(rows).unsqueeze(0))).expand_as(rows)
        if self.normalization == "teacher":
            if self.teachers is None:
                raise ValueError('`normalization` is "teacher", but `teachers` does not say whose each completion is.')
            teachers = self.teachers.to(rows.device)
            of_teachers = [merge_moments(rows[teachers == number]) for number in range(self.num_teachers)]
            return merge_moments(self.gather(torch.stack(of_teachers).unsqueeze(0)))[teachers]
        if self.normalization == "group":
            groups = merge_moments(self.gather(rows).view(-1, self.num_generations, 3), dim=1)
            start = self.process_index * len(rows)
            return groups.repeat_interleave(self.num_generations, dim=0)[start : start + len(rows)]
        return rows

    def whiten(
        self, scores: torch.Tensor, mask: torch.Tensor, moments: torch.Tensor | None, subtract_mean: bool = True
    ) -> torch.Tensor:
        """
        Advantages `(B, T)` of scores, without gradient and 0 on masked tokens, by the [`moments`] of their population:
        [`whiten`], or the scores as they are where there are none.
        """
        if moments is None:
            return scores.detach().masked_fill(mask == 0, 0.0)
        return whiten(scores.detach(), mask, moments, self.std_floor, subtract_mean)


def undefined_rows(moments: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """`(B,)`: True for completions whose population has fewer than two valid tokens, and so zero advantages."""
    if moments is None:
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    return (moments[:, 0] < 2).to(scores.device)

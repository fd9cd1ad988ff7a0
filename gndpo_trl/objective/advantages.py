"""From log-probs to token-level advantages: pure tensor functions, no trainer and no process group.

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

import torch


ADVANTAGE_NORMALIZATIONS = ("global", "none", "group", "sequence")

# Added to the variance under the square root, as in the reference.
VARIANCE_EPSILON = 1e-8

DEVICES_WITHOUT_FLOAT64 = ("mps",)


def as_float64(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, on their own device if it has that dtype, else on the CPU."""
    return (values.cpu() if values.device.type in DEVICES_WITHOUT_FLOAT64 else values).double()


def token_scores(teacher_logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Score of every sampled token: how many nats more likely the teacher finds it than the student that sampled it.

    Args:
        teacher_logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the sampled tokens under the teacher, in nats.
        old_logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the same tokens under the student at sampling time.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: `teacher_logps - old_logps` on valid tokens, 0 elsewhere.
    """
    return (teacher_logps - old_logps).masked_fill(mask == 0, 0.0)


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


def clamp_scores(scores: torch.Tensor, mask: torch.Tensor, score_clip: float | None) -> torch.Tensor:
    """Scores without gradient, clamped to `[-score_clip, score_clip]` nats (`None`: as they are), 0 on masked tokens."""
    scores = scores.detach().masked_fill(mask == 0, 0.0)
    return scores if score_clip is None else scores.clamp(-score_clip, score_clip)


def population_moments(
    scores: torch.Tensor,
    mask: torch.Tensor,
    *,
    normalization: str = "global",
    num_generations: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda moments: moments,
    process_index: int = 0,
    variances: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    Moments of the population that each completion is compared with; the arguments are those of [`compute_advantages`].

    With `variances` (`(B, T)`), the scores are expectations, each of a distribution with that variance, and the moments
    are those of all these distributions together.

    Returns:
        `torch.Tensor` of shape `(B, 3)` and dtype float64, or `None` for `normalization="none"`.
    """
    if normalization not in ADVANTAGE_NORMALIZATIONS:
        raise ValueError(f"Unknown normalization {normalization!r}. Choose one of {ADVANTAGE_NORMALIZATIONS}.")
    if normalization == "none":
        return None
    rows = row_moments(scores, mask)
    if variances is not None:
        rows[:, 2] += as_float64(variances.masked_fill(mask == 0, 0.0)).sum(-1)
    if normalization == "global":
        return merge_moments(gather(merge_moments(rows).unsqueeze(0))).expand_as(rows)
    if normalization == "group":
        groups = merge_moments(gather(rows).view(-1, num_generations, 3), dim=1)
        start = process_index * len(rows)
        return groups.repeat_interleave(num_generations, dim=0)[start : start + len(rows)]
    return rows


def normalize(
    scores: torch.Tensor,
    mask: torch.Tensor,
    moments: torch.Tensor | None,
    std_floor: float = 0.0,
    subtract_mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of clamped scores, given the moments of the population that each completion is compared with.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): Result of [`clamp_scores`].
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
        moments (`torch.Tensor` of shape `(B, 3)` or `None`): Result of [`population_moments`].
        std_floor (`float`, *optional*, defaults to `0.0`): See [`whiten`].
        subtract_mean (`bool`, *optional*, defaults to `True`): See [`whiten`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: as [`compute_advantages`].
    """
    if moments is None:  # "none" has no population
        return scores, torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    return whiten(scores, mask, moments, std_floor, subtract_mean), (moments[:, 0] < 2).to(scores.device)


def compute_advantages(
    scores: torch.Tensor,
    mask: torch.Tensor,
    *,
    score_clip: float | None = 5.0,
    normalization: str = "global",
    std_floor: float = 0.0,
    num_generations: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda moments: moments,
    process_index: int = 0,
    moments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of GNDPO (`"global"`), of plain on-policy distillation (`"none"`) and of two arms for ablation.

    The scores are clamped to `[-score_clip, score_clip]` and then whitened over the population that `normalization`
    names: every valid token of the generation batch on all ranks (`"global"`), those of the same prompt (`"group"`),
    those of the same completion (`"sequence"`); `"none"` stops after the clamp.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats, see [`token_scores`].
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
        score_clip (`float`, *optional*, defaults to `5.0`): Bound of the clamp, in nats. `None` turns it off.
        normalization (`str`, *optional*, defaults to `"global"`): One of `ADVANTAGE_NORMALIZATIONS`.
        std_floor (`float`, *optional*, defaults to `0.0`): See [`whiten`].
        num_generations (`int`, *optional*, defaults to `1`): Completions per prompt; they stand next to each other in
            the order of ranks and rows. Only used by `"group"`.
        gather (`Callable`, *optional*): Concatenates a tensor along its first dimension over all ranks, in the order
            of ranks. It receives `(1, 3)` moments for `"global"` and `(B, 3)` for `"group"`. The default is one process.
        process_index (`int`, *optional*, defaults to `0`): Rank of this process in the order of `gather`.
        moments (`torch.Tensor` of shape `(B, 3)`, *optional*): Result of [`population_moments`] where the statistics are
            not those of `scores`; computed from them if `None`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the advantages, of shape `(B, T)` and of the dtype of `scores`, without
        gradient and 0 on masked tokens; and a boolean tensor of shape `(B,)` that marks the completions whose
        population has fewer than two valid tokens, which have zero advantages for that reason.
    """
    scores = clamp_scores(scores, mask, score_clip)
    if moments is None:
        moments = population_moments(
            scores,
            mask,
            normalization=normalization,
            num_generations=num_generations,
            gather=gather,
            process_index=process_index,
        )
    return normalize(scores, mask, moments, std_floor)

"""
What the teacher is doing, as numbers that are exact over all ranks and micro-batches.

Means, extremes and shares are made of a few sums per rank ([`score_statistics`], [`spread_statistics`]). Quantiles are not:
[`tail_metrics`] takes the tokens of all ranks. A batch of 512 completions of 10,000 tokens is 20 MB of float32 scores and
as much of advantages, gathered once for each generation batch: little beside the completions' text, which TRL gathers
too, and beside a histogram, which would save it, there is no range to choose and no error to explain.
"""

import math

import torch

from .advantages import as_float64, merge_moments, row_moments


# Tokens that the student gave a smaller probability are called low-probability tokens. Their scores can be high, since a
# score is at most minus the student's log-prob, and their gradient is large, since it grows with 1 - p.
LOW_PROBABILITY = 0.1

NUM_TENTHS = 10

SCORE_QUANTILES = {"score/p01": 0.01, "score/p10": 0.1, "score/p50": 0.5, "score/p90": 0.9, "score/p99": 0.99}


def score_statistics(
    scores: torch.Tensor,
    teacher_logps: torch.Tensor,
    student_logps: torch.Tensor,
    advantages: torch.Tensor,
    undefined: torch.Tensor,
    is_eos: torch.Tensor,
    unknown: torch.Tensor,
    mask: torch.Tensor,
    score_clip: float | None,
) -> torch.Tensor:
    """
    This process's share of the metrics of one generation batch, ready to be gathered.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): Raw scores in nats, before the clamp.
        teacher_logps (`torch.Tensor` of shape `(B, T)`): Teacher log-probs of the sampled tokens, in nats.
        student_logps (`torch.Tensor` of shape `(B, T)`): Student log-probs of the sampled tokens, in nats.
        advantages (`torch.Tensor` of shape `(B, T)`): Advantages that enter the loss.
        undefined (`torch.Tensor` of shape `(B,)`): Completions without defined statistics.
        is_eos (`torch.Tensor` of shape `(B, T)`): True where the token ends a completion.
        unknown (`torch.Tensor` of shape `(B, T)`): True on the tokens whose log-prob the teacher does not know; none of
            them is valid.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
        score_clip (`float` or `None`): Bound of the clamp, in nats.

    Returns:
        `torch.Tensor` of shape `(17,)` and dtype float64, to be stacked over ranks for [`score_metrics`].
    """
    valid = mask != 0
    raw = as_float64(scores[valid])
    gap = as_float64((teacher_logps - student_logps)[valid])  # the plain score
    clip = float("inf") if score_clip is None else score_clip
    on_eos = as_float64(scores[valid & is_eos])
    extremes = raw if raw.numel() else raw.new_tensor([float("nan")])
    sums = [
        (raw < -clip).sum(),
        (raw > clip).sum(),
        (gap.expm1() - gap).sum(),
        as_float64(teacher_logps[valid]).sum(),
        as_float64(student_logps[valid]).sum(),
        raw.new_tensor(on_eos.numel()),
        on_eos.sum(),
        undefined.sum().to(raw.device),
        unknown.sum().to(raw.device),
    ]
    return torch.cat(
        [
            merge_moments(row_moments(scores, mask)),
            merge_moments(row_moments(advantages, mask)),
            torch.stack([extremes.min(), extremes.max(), *(value.double() for value in sums)]),
        ]
    )


def score_metrics(statistics: torch.Tensor) -> dict[str, float]:
    """
    Metrics of a whole generation batch.

    The reverse KL is estimated from the student's own samples, so the mean of `student - teacher` log-probs is unbiased
    (k1); `k3` is Schulman's estimator, `mean(exp(d) - 1 - d)` with `d` the teacher's less the student's, which is never
    negative and has less variance while the two models are close. Both are averages per token, in nats, whatever is made
    of the scores.

    Args:
        statistics (`torch.Tensor` of shape `(R, 17)`): One row of [`score_statistics`] for each of the `R` ranks.

    Returns:
        `dict[str, float]`: NaN where no token could be averaged; TRL leaves NaN out of what it logs.
    """
    nan = statistics.new_tensor(float("nan"))
    count, total, centred = merge_moments(statistics[:, 0:3])
    advantage_count, _, advantage_centred = merge_moments(statistics[:, 3:6])
    lows, highs = statistics[:, 6], statistics[:, 7]
    sums = statistics[:, 8:].sum(0)
    clamped_low, clamped_high, k3, teacher, student, eos_count, eos_total, undefined, unknown = sums

    def mean(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
        return torch.where(denominator > 0, numerator / denominator, nan)

    metrics = {
        "score/mean": mean(total, count),
        "score/std": mean(centred, count - 1).sqrt(),
        "score/min": torch.where(lows.isnan(), float("inf"), lows).min() if count > 0 else nan,
        "score/max": torch.where(highs.isnan(), -float("inf"), highs).max() if count > 0 else nan,
        "score/clamped_low": mean(clamped_low, count),
        "score/clamped_high": mean(clamped_high, count),
        "score/eos": mean(eos_total, eos_count),
        "reverse_kl": mean(student - teacher, count),
        "reverse_kl_k3": mean(k3, count),
        "teacher/mean_logp": mean(teacher, count),
        "teacher/unknown_tokens": unknown,
        "student/mean_logp": mean(student, count),
        "advantages/std": mean(advantage_centred, advantage_count - 1).sqrt(),
        "advantages/num_tokens": count,
        "advantages/undefined": undefined,
    }
    return {name: value.item() for name, value in metrics.items()}


def spread_statistics(
    scores: torch.Tensor,
    student_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    score_clip: float | None,
) -> torch.Tensor:
    """
    This process's share of what [`spread_metrics`] needs; arguments as of [`score_statistics`].

    Returns:
        `torch.Tensor` of shape `(24,)` and dtype float64.
    """
    valid = mask != 0
    # Of each completion's valid tokens, in tenths of their own number.
    place, length = valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True)
    tenth = (NUM_TENTHS * place // length.clamp(min=1))[valid]
    raw = as_float64(scores[valid])
    zeros = raw.new_zeros(NUM_TENTHS)
    tenth = tenth.to(raw.device)
    counts = zeros.index_add(0, tenth, torch.ones_like(raw))
    totals = zeros.index_add(0, tenth, raw)

    mass = as_float64(advantages[valid].abs())
    is_clamped = raw.abs() > (float("inf") if score_clip is None else score_clip)
    is_improbable = as_float64(student_logps[valid]) < math.log(LOW_PROBABILITY)
    shares = [mass.sum(), (mass * is_clamped).sum(), (mass * is_improbable).sum(), is_improbable.sum().double()]
    return torch.cat([counts, totals, torch.stack(shares)])


def spread_metrics(statistics: torch.Tensor) -> dict[str, float]:
    """
    Where in the completions, and on what kinds of tokens, the signal of a generation batch lies.

    Args:
        statistics (`torch.Tensor` of shape `(R, 24)`): One row of [`spread_statistics`] for each of the `R` ranks.

    Returns:
        `dict[str, float]`: mean raw scores, in nats, of the tokens in each tenth of their completions; shares of the sum
        of absolute advantages on clamped tokens and on low-probability tokens; the share of the latter among all tokens.
        NaN where there is nothing to divide by.
    """
    sums = statistics.sum(0)
    counts, totals = sums[:NUM_TENTHS], sums[NUM_TENTHS : 2 * NUM_TENTHS]
    mass, clamped, improbable, num_improbable = sums[2 * NUM_TENTHS :]
    # 0 / 0 is NaN
    metrics = {f"score/tenth_{number:02}": mean for number, mean in enumerate((totals / counts).tolist(), start=1)}
    return metrics | {
        "advantages/share_clamped": (clamped / mass).item(),
        "advantages/share_low_probability": (improbable / mass).item(),
        "student/low_probability": (num_improbable / counts.sum()).item(),
    }


def tail_metrics(scores: torch.Tensor, advantages: torch.Tensor) -> dict[str, float]:
    """
    Quantiles of the scores, and how much of the signal the largest advantages hold.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): Raw scores, in nats, of all valid tokens of all ranks.
        advantages (`torch.Tensor` of shape `(N,)`): Their advantages.

    Returns:
        `dict[str, float]`: quantiles in nats, interpolated linearly; and the share of the sum of absolute advantages that
        the hundredth of the tokens with the largest ones has, of at least one token. NaN without tokens, or where all
        advantages are zero.
    """
    count = len(scores)
    if count == 0:
        return dict.fromkeys([*SCORE_QUANTILES, "advantages/share_top_1_percent"], math.nan)
    places = [quantile * (count - 1) for quantile in SCORE_QUANTILES.values()]
    lower = [math.floor(place) for place in places]
    ordered = scores.sort().values  # `torch.quantile` takes 16 million numbers at most
    values = ordered[[*lower, *(min(place + 1, count - 1) for place in lower)]].tolist()
    below, above = values[: len(places)], values[len(places) :]
    metrics = {
        name: low + (place - math.floor(place)) * (high - low)
        for name, place, low, high in zip(SCORE_QUANTILES, places, below, above, strict=True)
    }
    mass = as_float64(advantages.abs())
    largest = mass.topk(math.ceil(count / 100)).values.sum()
    return metrics | {"advantages/share_top_1_percent": (largest / mass.sum()).item()}

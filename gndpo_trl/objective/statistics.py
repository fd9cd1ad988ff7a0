"""What the teacher is doing, as numbers: statistics of raw scores that are exact over all ranks and micro-batches."""

import torch

from .advantages import as_float64, merge_moments, row_moments


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

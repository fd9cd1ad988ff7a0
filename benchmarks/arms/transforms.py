"""
Advantages that others propose in the place of whitened scores: pure functions of tensors, compared as arms.

Shapes and names are those of `gndpo_trl.objective`: `scores` `(B, T)` are teacher log-prob minus student
log-prob of the sampled tokens, in nats and before any clamp, `mask` `(B, T)` is True on valid tokens, and every function
returns advantages `(B, T)`, 0 where the mask is False. All of a generation batch is in one process here. [`Transformed`]
makes an estimator of each of them.
"""

from collections.abc import Callable
from functools import partial

import torch

from gndpo_trl.estimators import Sampled
from gndpo_trl.objective.advantages import VARIANCE_EPSILON, merge_moments, row_moments
from gndpo_trl.objective.scores import clamp_scores


SCORE_CLIP = 5.0  # nats, the reference's

# Share of the new batch in the running moments.
MOMENTUM = 0.1

# Median absolute deviation of a normal distribution with standard deviation 1.
NORMAL_MAD = 0.6745


def moments(scores: torch.Tensor, mask: torch.Tensor, by_sequence: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the valid scores, of the batch `()` or of each completion `(B, 1)`."""
    rows = row_moments(scores, mask)
    count, total, centred = (rows.unsqueeze(1) if by_sequence else merge_moments(rows)).unbind(-1)
    variance = centred / (count - 1).clamp(min=1)
    return (total / count.clamp(min=1)).float(), (variance + VARIANCE_EPSILON).sqrt().float()


def scale(scores: torch.Tensor, mask: torch.Tensor, by_sequence: bool = False) -> torch.Tensor:
    """
    Clamped scores divided by their standard deviation, with their mean left in: the half of the normalization that keeps
    the sign of every score. Over the batch, or over each completion.
    """
    scores = clamp_scores(scores, mask, SCORE_CLIP)
    return scores / moments(scores, mask, by_sequence)[1]


def center(scores: torch.Tensor, mask: torch.Tensor, by_sequence: bool = False) -> torch.Tensor:
    """
    Clamped scores without their mean, in nats: the other half, which over the batch is a constant baseline (Williams,
    1992). Dr. GRPO (arXiv 2503.20783) takes GRPO's normalization apart in the same way, and keeps this half.
    """
    scores = clamp_scores(scores, mask, SCORE_CLIP)
    return (scores - moments(scores, mask, by_sequence)[0]).masked_fill(~mask, 0.0)


def robust(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Unclamped scores minus their median, divided by their median absolute deviation in units of a normal distribution's
    standard deviation (Huber, Robust Statistics, 1981); then clamped to as many units as the reference clamps nats,
    because outliers that move neither of the two are left as large as they are.

    Where more than half of the scores are equal the deviation is 0; it is taken no smaller than 0.01 nats.
    """
    valid = scores[mask]
    median = valid.median()
    deviation = (valid - median).abs().median() / NORMAL_MAD
    advantages = (scores - median) / deviation.clamp(min=0.01)
    return advantages.clamp(-SCORE_CLIP, SCORE_CLIP).masked_fill(~mask, 0.0)


class Running:
    """
    Clamped scores whitened by exponential moving averages of mean and variance over the steps before and this one (as
    PopArt does for values, van Hasselt et al., arXiv 1602.07714). The first batch starts the averages.

    The variance is that around the running mean: the average of squares minus the square of the average.
    """

    def __init__(self):
        self.averages = None

    def __call__(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = clamp_scores(scores, mask, SCORE_CLIP)
        valid = scores[mask].double()
        now = torch.stack([valid.mean(), valid.square().mean()])
        self.averages = now if self.averages is None else self.averages.lerp(now, MOMENTUM)
        mean, square = self.averages
        std = (square - mean.square() + VARIANCE_EPSILON).sqrt()
        return ((scores - mean) / std).to(scores).masked_fill(~mask, 0.0)


def tanh(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A smooth clamp: `c tanh(score / c)` with the reference's c, an arm of PowerOPD's comparison (arXiv 2606.17199)."""
    return (SCORE_CLIP * torch.tanh(scores / SCORE_CLIP)).masked_fill(~mask, 0.0)


class Transformed(Sampled):
    """
    An estimator: advantages that a function makes of the raw scores of a generation batch.

    Args:
        transform (`Callable`): Makes advantages of scores and their mask, as those above.
    """

    def __init__(self, transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self.transform = transform

    def advantages(self, scores, reading, mask, population):
        return self.transform(scores.raw, mask), None


FUNCTIONS = {
    "scale": scale,
    "center": center,
    "scale-sequence": partial(scale, by_sequence=True),
    "center-sequence": partial(center, by_sequence=True),
    "robust": robust,
    "tanh": tanh,
}


def build_transform(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function of an arm's name; one per run, since `running` remembers."""
    return Running() if name == "running" else FUNCTIONS[name]

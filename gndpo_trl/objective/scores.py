"""
From log-probs to scores of tokens: the paper's difference of two, clamped, and what others make of them.

`B` is the number of completions of this process, `T` their padded length, and `mask` `(B, T)` is nonzero on the tokens that
take part in the loss. Masked positions may hold anything, NaN and infinities included.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Scores(NamedTuple):
    """
    Scores `(B, T)` of the sampled tokens, 0 on masked ones.

    Attributes:
        raw: In nats, as the models give them; of a piece of several tokens an even share to each.
        shaped: What is compared with its population: clamped, or a difference of probabilities, with what follows it.
    """

    raw: torch.Tensor
    shaped: torch.Tensor


@dataclass(frozen=True)
class Score:
    """
    How much likelier than the student the teacher finds a token. The defaults are the paper's.

    Attributes:
        clip (`float` or `None`, *optional*, defaults to `5.0`): Bound of the clamp, in nats; `None`: no clamp.
        power (`float`, *optional*, defaults to `0.0`): α of [`power_scores`]; 0: the difference of log-probs, clamped.
        extrapolation (`float`, *optional*, defaults to `1.0`): λ of [`extrapolated_scores`].
        discount (`float`, *optional*, defaults to `0.0`): γ of [`discounted_scores`].
    """

    clip: float | None = 5.0
    power: float = 0.0
    extrapolation: float = 1.0
    discount: float = 0.0

    def __call__(
        self,
        teacher_logps: torch.Tensor,
        old_logps: torch.Tensor,
        mask: torch.Tensor,
        reference_logps: torch.Tensor | None = None,
        pieces: torch.Tensor | None = None,
    ) -> Scores:
        """
        Scores of sampled tokens.

        Args:
            teacher_logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the sampled tokens under the teacher, in nats.
            old_logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the same tokens under the student at sampling time.
            mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
            reference_logps (`torch.Tensor` of shape `(B, T)`, *optional*): Those under the student before training, which
                extrapolation needs.
            pieces (`torch.Tensor` of shape `(B, T)`, *optional*): Numbers below `T`, the same for tokens that have one score
                together: that of the piece, which each of them answers for, see [`piece_sums`]. `None`: each has its own.

        Returns:
            [`Scores`]: without gradient.
        """
        if pieces is not None:
            teacher_logps, old_logps = (piece_sums(logps, pieces, mask) for logps in (teacher_logps, old_logps))
            reference_logps = reference_logps if reference_logps is None else piece_sums(reference_logps, pieces, mask)
        if self.extrapolation == 1.0:
            raw = token_scores(teacher_logps, old_logps, mask)
        else:
            raw = extrapolated_scores(teacher_logps, old_logps, reference_logps, mask, self.extrapolation)
        if self.power == 0:
            shaped = clamp_scores(raw, mask, self.clip)
        else:
            shaped = power_scores(teacher_logps, old_logps, mask, self.power).detach()
        if self.discount != 0:
            shaped = discounted_scores(shaped, self.discount).masked_fill(mask == 0, 0.0)
        if pieces is not None:
            raw = raw / piece_sums(torch.ones_like(raw), pieces, mask).clamp(min=1)
        return Scores(raw, shaped)


def piece_sums(values: torch.Tensor, pieces: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    For each token the sum over its piece.

    Of log-probs that is the log-prob of the piece. With its score `s` for each of its tokens, REINFORCE follows
    `s · Σ_t ∇ log π(y_t) = s · ∇ log π(piece)`, the gradient of the reverse KL divergence over pieces. With even shares of `s`
    it would be that of no divergence: pieces of `k` tokens would count a `k`-th.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): One for each token.
        pieces (`torch.Tensor` of shape `(B, T)`): Numbers of pieces, below `T`.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on the tokens that count.

    Returns:
        `torch.Tensor` of shape `(B, T)`
    """
    values = values.masked_fill(mask == 0, 0.0)
    return torch.zeros_like(values).scatter_add(1, pieces, values).gather(1, pieces)


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


def clamp_scores(scores: torch.Tensor, mask: torch.Tensor, score_clip: float | None) -> torch.Tensor:
    """Scores without gradient, clamped to `[-score_clip, score_clip]` nats (`None`: as they are), 0 on masked tokens."""
    scores = scores.detach().masked_fill(mask == 0, 0.0)
    return scores if score_clip is None else scores.clamp(-score_clip, score_clip)


def extrapolated_scores(
    teacher_logps: torch.Tensor,
    old_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    mask: torch.Tensor,
    extrapolation: float,
) -> torch.Tensor:
    """
    Scores of G-OPD (https://huggingface.co/papers/2602.12125), which make more, or less, of what sets the teacher apart.

        score = λ · (log π_T - log π_ref) - (log π_old - log π_ref)

    The teacher's lead over a reference is the reward that it stands for, and the rest the divergence from that reference.
    At λ = 1 the reference cancels out and this is [`token_scores`]; above 1, the student is led beyond its
    teacher; below 1, to somewhere between reference and teacher.

    Args:
        teacher_logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the sampled tokens under the teacher, in nats.
        old_logps (`torch.Tensor` of shape `(B, T)`): Log-probs under the student at sampling time.
        reference_logps (`torch.Tensor` of shape `(B, T)`): Log-probs under the reference.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
        extrapolation (`float`): λ.

    Returns:
        `torch.Tensor` of shape `(B, T)`: scores in nats, 0 on masked tokens.
    """
    scores = extrapolation * (teacher_logps - reference_logps) - (old_logps - reference_logps)
    return scores.masked_fill(mask == 0, 0.0)


def power_scores(
    teacher_logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor, power: float
) -> torch.Tensor:
    """
    Scores of PowerOPD (https://huggingface.co/papers/2606.17199), which compare probabilities instead of their logarithms.

        score = π_T^α - π_old^α

    They lie between -1 and 1, whatever the teacher is sure of, and are small where both find a token unlikely. Divided by α
    they go to [`token_scores`] as α goes to 0. Where those lead down the reverse KL divergence, these lead down
    the Bregman divergence of `Σ p^(1 + α)` (density power divergences: Basu et al., Biometrika 85, 1998), which for α = 1 is
    the squared distance of the two distributions: both end where they are equal, but here unlikely tokens count for less.

    Args:
        teacher_logps (`torch.Tensor` of shape `(B, T)`): Log-probs of the sampled tokens under the teacher, in nats.
        old_logps (`torch.Tensor` of shape `(B, T)`): Log-probs under the student at sampling time.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.
        power (`float`): α, positive.

    Returns:
        `torch.Tensor` of shape `(B, T)`: differences of powers of probabilities, 0 on masked tokens.
    """
    return ((power * teacher_logps).exp() - (power * old_logps).exp()).masked_fill(mask == 0, 0.0)


def discounted_scores(scores: torch.Tensor, discount: float) -> torch.Tensor:
    """
    Scores with those of the tokens that follow, `Σ_k γ^k · score[t + k]`: a token answers for what it led to.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): Scores in nats, 0 on masked tokens, which still count as a step in time.
        discount (`float`): γ, from 0 (each token for itself) to 1.

    Returns:
        `torch.Tensor` of shape `(B, T)`: discounted sums in nats; masked tokens have one, too.
    """
    # Sums over 1, 2, 4, ... tokens, each made of two of those before.
    sums, width, factor = scores, 1, discount
    while width < scores.size(-1) and factor != 0:
        following = torch.nn.functional.pad(sums[..., width:], (0, width))
        sums, width, factor = sums + factor * following, 2 * width, factor * factor
    return sums

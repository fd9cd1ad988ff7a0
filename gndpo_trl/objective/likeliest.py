"""A teacher of whom a few tokens are known at each position: the likeliest ones, the sampled one, and the mass of the rest.

The tokens outside are one outcome for both models, of which each has the mass that its other tokens leave. Their common
score is the clamped log-ratio of the two masses, so that the gradient is the one of a divergence between the two coarser
distributions: it cannot fall by moving mass off the tokens that are known.

`n` is the number of positions, `V` the size of the student's vocabulary, and `K` the number of tokens known: `k + 1`, or all
of the teacher's if it has no more. *States* are `(n, K, 2)`: the distinct ids of these tokens, and their log-probs in nats.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch


# Ids stand beside log-probs in float32, which has all whole numbers up to here.
LARGEST_VOCABULARY = 2**24


@dataclass(frozen=True)
class LikeliestTokens:
    """
    What makes scores of such states, in the place of an [`~objective.distributions.LMHead`].

    Attributes:
        vocab_size (`int` or `None`): The teacher has ids below this; `None`: all of the student's.
    """

    vocab_size: int | None = None
    parameters: ClassVar[list[torch.Tensor]] = []

    def on(self, device: torch.device) -> "LikeliestTokens":
        return self

    def scores(
        self, states: torch.Tensor, log_probs: torch.Tensor, score_clip: float | None, ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        As those of an [`~objective.distributions.LMHead`]; `log_probs` stay as they are.

        Args:
            states (`torch.Tensor` of shape `(n, K, 2)`): What is known of the teacher. NaN makes NaN of its position.
            log_probs (`torch.Tensor` of shape `(n, V)`): The student's of all tokens, in nats.
            score_clip (`float` or `None`): Bound of the clamp, in nats.
            ids (`torch.Tensor` of shape `(n,)`, *optional*): Sampled tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: clamped scores `(n, V)`, or `(n, vocab_size)` if that is less; and the
            teacher's log-probs `(n,)` of the sampled tokens, NaN of those that are not among the known ones.
        """
        known, teacher_logps = unpack(states)
        logps, rest = self._beside(known, teacher_logps, log_probs)
        num_common = self._num_common(log_probs)
        is_common = known < num_common
        own = torch.where(is_common, teacher_logps - logps, rest.unsqueeze(-1))
        if score_clip is not None:
            rest, own = rest.clamp(-score_clip, score_clip), own.clamp(-score_clip, score_clip)
        scores = rest.unsqueeze(-1).repeat(1, num_common + 1)
        # Those that the student does not have go to a column that is left out.
        scores.scatter_(-1, torch.where(is_common, known, num_common), own)
        return scores[:, :num_common], None if ids is None else log_probs_of(ids, known, teacher_logps)

    def coverage(self, states: torch.Tensor, log_probs: torch.Tensor, score_clip: float | None) -> torch.Tensor:
        """
        How much of the student is looked at. The arguments are those of `scores`.

        Returns:
            `torch.Tensor` of shape `(n, 3)`: the student's mass inside the known tokens; 1 where the clamp of the rest is
            active, and else 0; and the share of the teacher's `K - 1` likeliest tokens that are among the student's.
        """
        known, teacher_logps = unpack(states)
        logps, rest = self._beside(known, teacher_logps, log_probs)
        is_clamped = torch.zeros_like(rest) if score_clip is None else (rest.abs() > score_clip).to(rest)
        top_k = max(known.size(-1) - 1, 1)
        likeliest = teacher_logps.topk(top_k).indices
        least = log_probs.topk(min(top_k, log_probs.size(-1))).values[:, -1:]
        overlap = (logps.gather(-1, likeliest) >= least).to(rest).mean(-1)
        return torch.stack([logps.exp().sum(-1), is_clamped, overlap], dim=-1)

    def _num_common(self, log_probs: torch.Tensor) -> int:
        return log_probs.size(-1) if self.vocab_size is None else min(log_probs.size(-1), self.vocab_size)

    def _beside(
        self, known: torch.Tensor, teacher_logps: torch.Tensor, log_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's log-probs `(n, K)` of the known tokens, minus infinity where it has none, and the score `(n,)` of the rest."""
        num_common = self._num_common(log_probs)
        is_common = known < num_common
        logps = log_probs.gather(-1, torch.where(is_common, known, 0)).masked_fill(~is_common, -torch.inf)
        # What only one of the two has is no part of the rest.
        inside = torch.cat([logps, log_probs[:, num_common:]], dim=-1)
        return logps, log_of_rest(teacher_logps) - log_of_rest(inside)


def pack(ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """
    States `(n, K, 2)` of ids and log-probs `(n, K)`, in float32, or in float64 if the log-probs are.

    Raises:
        `ValueError`: if an id is too large to stand beside a log-prob.
    """
    if ids.numel() and ids.max() >= LARGEST_VOCABULARY:
        raise ValueError(
            f"Token id {ids.max()} cannot be kept in float32, which has whole numbers up to {LARGEST_VOCABULARY}. Unset "
            "`teacher_top_k`."
        )
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    return torch.stack([ids.to(dtype), log_probs.to(dtype)], dim=-1)


def unpack(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probs `(n, K)`. Where there is NaN in the place of an id, it is 0."""
    ids, log_probs = states.unbind(-1)
    return ids.nan_to_num(0.0).long(), log_probs


def keep_likeliest(log_probs: torch.Tensor, ids: torch.Tensor, top_k: int) -> torch.Tensor:
    """
    States `(n, K, 2)` of whole distributions.

    Args:
        log_probs (`torch.Tensor` of shape `(n, V)`): The teacher's, in nats.
        ids (`torch.Tensor` of shape `(n,)`): Sampled tokens, which are among those kept.
        top_k (`int`): How many tokens are kept beside: the likeliest ones; `top_k + 1` if the sampled one is among them.
    """
    likeliest, kept = log_probs.topk(min(top_k + 1, log_probs.size(-1)))
    is_kept = (kept == ids.unsqueeze(-1)).any(-1)
    # The last is the least likely one.
    kept[:, -1] = torch.where(is_kept, kept[:, -1], ids)
    likeliest[:, -1] = log_probs.gather(-1, kept[:, -1:]).squeeze(-1)
    return pack(kept, likeliest)


def log_probs_of(ids: torch.Tensor, known: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probs `(n,)` of tokens `ids` `(n,)` among those known `(n, K)`; NaN of others, and where any of them is NaN."""
    is_it = known == ids.unsqueeze(-1)
    found = torch.where(is_it, log_probs, 0.0).sum(-1)
    return found.masked_fill(~is_it.any(-1) | log_probs.isnan().any(-1), torch.nan)


def log_of_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """
    Log `(n,)` of the mass that tokens with these log-probs `(n, K)` leave to the others. A mass that the dtype cannot tell
    from zero counts as the smallest that it can: 1e-7 in float32.
    """
    return (-log_probs.logsumexp(-1).expm1()).clamp(min=torch.finfo(log_probs.dtype).eps).log()

"""Advantages that the loss makes of its own log-probs, so that no other pass of the student is needed."""

from collections.abc import Callable
from typing import Any

import torch

from ..grpo.ranks import raised_on_all_ranks
from ..grpo.rollouts import check_finite, valid_tokens
from ..objective.advantages import Population
from ..objective.scores import Score
from .estimator import Sampled
from .reading import Reading, leave_unknown_out


class ScoredInLoss(Sampled):
    """
    [`Sampled`] whose scores are made in the loss, of the log-probs of its forward pass.

    Args:
        score ([`Score`]): Makes scores.
        population ([`Population`]): Normalizes them by moments that it is given.
        mix (`Callable`): Makes what the loss takes of advantages `(B, T)`, advantages `(B,)` of the rewards, and a mask.
    """

    def __init__(self, score: Score, population: Population, mix: Callable[..., torch.Tensor]):
        self.score, self.population, self.mix = score, population, mix

    def advantages_in_loss(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if "teacher_per_token_logps" not in inputs:
            return super().advantages_in_loss(logps, inputs)
        logps, mask = logps.detach(), valid_tokens(inputs)
        with raised_on_all_ranks():
            check_finite("student", logps, inputs, mask, self.models.tokenizer)
        self.models.watch_sampler(inputs, logps)
        teacher_logps, reference_logps = inputs["teacher_per_token_logps"], inputs["reference_logps"]
        scores = self.score(teacher_logps, logps, mask, reference_logps, inputs.get("pieces"))
        advantages = self.population.whiten(scores.shaped, mask, inputs["score_moments"])
        return self.mix(advantages, inputs["reward_advantages"], mask)


class Unnormalized(ScoredInLoss):
    """Of scores that are compared with nobody, nothing has to be known before the first gradient."""

    def waits_for_loss(self, rollout):
        return self.models.may_read_in_loss(rollout, is_scaled_later=False)

    def begin(self, rollout, question):
        teacher_logps = self.models.teacher_logps(question)
        reference_logps = self.models.reference_logps(rollout, question["rows"])
        self.reading = Reading(teacher_logps, torch.full_like(teacher_logps, torch.nan), reference_logps)
        may_not_know = self.models.teacher.may_not_know(question["rows"])
        self.reading.unknown = leave_unknown_out(rollout, teacher_logps.isnan(), may_not_know)
        return what_is_scored(rollout, self.reading, None)

    def advantages_in_loss(self, logps, inputs):
        if "row_of_batch" in inputs:
            self.reading.student_logps[inputs["row_of_batch"]] = logps.detach()
        return super().advantages_in_loss(logps, inputs)

    def finish(self, rollout):
        return self.reading

    def identity(self):
        return "Sampled"  # which it is in everything that a checkpoint holds


class SamplerStatistics(ScoredInLoss):
    """
    `use_sampling_logps`: in training, the scores of a generation batch are estimated from the sampler's log-probs; they give
    the statistics, and what is logged. A token's own score is made in the loss.
    """

    def read(self, rollout, question):
        # Evaluation may sample at another temperature, and a pass more costs little there.
        if not self.models.is_training:
            return super().read(rollout, question)
        if "sampling_per_token_logps" not in rollout:
            raise ValueError(
                "`use_sampling_logps` is True, but the sampler returned no log-probs. Have `rollout_func` return "
                "`logprobs`, or switch it off."
            )
        return Reading(self.models.teacher_logps(question), rollout["sampling_per_token_logps"], is_estimate=True)

    def for_the_loss(self, rollout, reading, moments):
        return what_is_scored(rollout, reading, moments) if reading.is_estimate else {}


def what_is_scored(rollout: dict[str, Any], reading: Reading, moments: torch.Tensor | None) -> dict[str, Any]:
    """What the loss needs to make scores of its log-probs, and advantages of these, before any are in the rollout."""
    return {
        "teacher_per_token_logps": reading.teacher_logps,
        "reference_logps": reading.reference_logps,
        "reward_advantages": rollout["advantages"],
        "score_moments": moments,
    }

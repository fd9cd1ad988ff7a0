"""`estimator="exact"`: the expected advantage over the whole vocabulary, in the place of a sampled token's."""

import os
from functools import partial
from typing import Any

import torch
from accelerate import PartialState

from ..grpo.hidden_states import head_of
from ..grpo.microbatches import loss_mask, select_rows
from ..grpo.trl_hooks import MULTIMODAL_KEYS, HeadCall, HeadFields
from ..objective.advantages import shift_and_scale
from ..objective.distributions import ExpectedAdvantage, LMHead, Weighting
from ..objective.importance import MAX_LOG_RATIO, sequence_log_ratio
from ..objective.likeliest import LikeliestTokens
from .vocabulary import WholeVocabulary, for_each_teacher, is_copied, without


HEADS = "teacher_heads.pt"


class Exact(WholeVocabulary):
    """
    `estimator="exact"`: the gradient of the expected advantage of a position, `Σ_a π(a) A(a) ∇log π(a)`, normalized by the
    moments of the student's distributions.

    In the loss, the log-prob of a sampled token gets that gradient in place of its own, or, where a reward counts, beside its
    own times the reward's advantage; where the ratio to the student that sampled is asked for, it keeps its value, and what is
    known of the teacher stays with the rollout, in CPU memory. The advantages of the sampled tokens are for the logs.

    Args:
        score_clip (`float` or `None`), field (`str`): See `WholeVocabulary`.
        std_floor (`float`): Lower bound of σ, in nats.
        has_baseline (`bool`): Whether the expected score of the position is subtracted in the place of μ.
        clip_range (`tuple[float, float]` or `None`): Importance ratios below and above which a token with a negative, or a
            positive advantage has no gradient; `None`: none is left out.
        coefs (`tuple[float, float]`): Weights of that gradient, and of the sampled tokens' with the advantage of the rewards.
    """

    of_all_tokens = True

    def __init__(
        self,
        score_clip: float | None,
        field: str,
        std_floor: float,
        has_baseline: bool,
        clip_range: tuple[float, float] | None,
        coefs: tuple[float, float] = (1.0, 0.0),
    ):
        super().__init__(score_clip, field)
        self.std_floor, self.has_baseline, self.clip_range = std_floor, has_baseline, clip_range
        self.distillation_coef, self.reward_coef = coefs
        self.saved_heads: list[LMHead | LikeliestTokens | None] = []  # what a checkpoint holds of them

    def advantages(self, scores, reading, mask, population):
        expected = reading.distributions.mean.masked_fill(~mask, 0.0)
        relative, means = scores.shaped, expected
        if self.has_baseline:
            relative, means = scores.shaped - expected, torch.zeros_like(expected)
        moments = population.moments(means, mask, variances=reading.distributions.variance)
        return population.whiten(relative, mask, moments, subtract_mean=not self.has_baseline), moments

    def for_the_loss(self, rollout, reading, moments):
        if not self.models.is_training or reading.teacher_states is None:  # nothing is left to learn from it
            return {}
        spoiled = reading.distributions.teacher_logps.isnan()
        states = without(reading.teacher_states, spoiled, rollout["completion_mask"])
        found = {**self._keep(states, spoiled.device), "score_moments": moments}
        return found if self.reward_coef == 0 else {**found, "reward_advantages": rollout["advantages"]}

    def head_reader(self, inputs):
        if "score_moments" not in inputs:
            return super().head_reader(inputs)
        if not self.heads:  # the run goes on from a checkpoint
            names = self.teacher.names
            saved = self.saved_heads or [None] * max(len(names), 1)
            if None in saved:
                missing = tuple(name for name, head in zip(names, saved, strict=bool(names)) if head is None)
                found = self.models.teacher_states(one_token(inputs, missing)).heads
                saved = [then or now for then, now in zip(saved, found, strict=True)]
            self.heads = saved
        return partial(self._expected_advantage, inputs)

    def advantages_in_loss(self, logps, inputs):
        if "score_moments" not in inputs:
            return super().advantages_in_loss(logps, inputs)
        return sign_of_loss(ratios(logps.detach(), inputs)).unsqueeze(1).expand_as(logps)

    def _expected_advantage(self, inputs: dict[str, Any], places: torch.Tensor, call: HeadCall) -> HeadFields:
        """Fields of TRL's head, with the gradient of the expected advantage in place of the log-probs' own."""
        fields = call.compute()
        ids = inputs["completion_ids"]
        rows, columns = places // ids.size(1), places % ids.size(1)
        logps = fields[0].new_zeros(ids.shape)
        logps.view(-1)[places] = fields[0].detach()
        ratio = ratios(logps, inputs)
        exact = call.hidden.new_zeros(len(ratio), dtype=torch.promote_types(call.hidden.dtype, torch.float32))
        scale, shift = torch.ones_like(exact), exact
        if inputs["score_moments"] is not None:
            shift, scale = (values.to(exact) for values in shift_and_scale(inputs["score_moments"], self.std_floor))
        low, high = self.clip_range or (0.0, torch.inf)
        keeps_negative, keeps_positive = ratio >= low, ratio <= high

        def expect(mine, head, states, gather):
            weighting = Weighting(
                scale[rows[mine]],
                None if self.has_baseline else shift[rows[mine]],
                keeps_positive[rows[mine]],
                keeps_negative[rows[mine]],
            )
            leaves = (call.hidden[mine], call.weight, call.bias)
            return ExpectedAdvantage.apply(*leaves, head_of(call), states, head, self.score_clip, weighting, gather)

        value = fields[0].detach()
        learned = self.distillation_coef * for_each_teacher(self._states(inputs), rows, columns, head_of(call), expect)
        if "reward_advantages" in inputs:
            rewards = self.reward_coef * inputs["reward_advantages"].to(exact)
            rewards = rewards * torch.where(rewards > 0, keeps_positive, keeps_negative)
            learned = learned + rewards[rows] * (fields[0] - value)
        return value + (sign_of_loss(ratio)[rows] * learned).to(value), *fields[1:]

    def save_state(self, folder):
        # Those of a teacher whose weights have moved on since, or who has none; all others are read again.
        heads = [vars(head) if head is not None and is_copied(head) else None for head in self.heads]
        if any(head is not None for head in heads) and PartialState().is_main_process:
            torch.save(heads, os.path.join(folder, HEADS))

    def load_state(self, folder):
        path = os.path.join(folder, HEADS)
        found = torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else []
        self.heads, self.saved_heads = [], [None if head is None else restored(head) for head in found]


def restored(fields: dict[str, Any]) -> LMHead | LikeliestTokens:
    return LMHead(**fields) if "weight" in fields else LikeliestTokens(**fields)


def ratios(logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """`(B,)` importance ratio of each completion, of log-probs `(B, T)` without gradient; 1 where there are no old ones."""
    old_logps = inputs.get("old_per_token_logps")
    if old_logps is None:
        return torch.ones_like(logps[:, 0])
    return sequence_log_ratio(logps, old_logps, loss_mask(inputs)).clamp(max=MAX_LOG_RATIO).exp()


def sign_of_loss(ratio: torch.Tensor) -> torch.Tensor:
    """
    The advantage that TRL's loss gets for the whole sum over tokens, whose advantages have both signs. Where the ratio is
    clipped for one of the signs, the other one goes on: the loss gets the sign that it does not clip, and the sum leaves out
    the clipped one.
    """
    return torch.where(ratio > 1, -1.0, 1.0).to(ratio)


def one_token(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The first token of a micro-batch as a rollout, once for each of the teachers: what their heads can be read from."""
    names = names or ("",)
    width = inputs["prompt_ids"].size(1)
    keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", *MULTIMODAL_KEYS)
    question = select_rows({key: inputs[key] for key in keys if inputs.get(key) is not None}, [0] * len(names))
    for key in ("completion_ids", "completion_mask"):
        question[key] = question[key][:, :1]
    question["completion_mask"] = torch.ones_like(question["completion_mask"])
    for key in {"token_type_ids", "mm_token_type_ids"} & question.keys():
        question[key] = question[key][:, : width + 1]
    return {**question, "rows": [{"teacher": name, "teacher_prompt": None} for name in names]}

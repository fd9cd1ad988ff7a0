"""Estimators that look at the whole vocabulary: the expected score of a position, as a baseline or as the gradient."""

import os
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather

from ..grpo.hidden_states import HiddenStates, head_of
from ..grpo.microbatches import loss_mask, select_rows
from ..grpo.trl_hooks import MULTIMODAL_KEYS, HeadCall, HeadFields, maybe_gather_lm_head_ctx
from ..objective.advantages import merge_moments, row_moments, shift_and_scale
from ..objective.distributions import Comparison, ExpectedAdvantage, LMHead, Weighting, compare_distributions
from ..objective.importance import MAX_LOG_RATIO, sequence_log_ratio
from ..teachers import Teacher
from .estimator import Estimator
from .reading import Reading


# Mean probability of ids that the teacher does not have, above which the two are not distributions over the same tokens.
LARGEST_FOREIGN_MASS = 1e-3

HEADS = "teacher_heads.pt"


class WholeVocabulary(Estimator):
    """
    What [`Baseline`] and [`Exact`] read: student and teacher give the last hidden states of their scoring passes instead of
    log-probs, and both LM heads are applied to them side by side, a few positions at a time.

    Args:
        score_clip (`float` or `None`): Bound of the clamp of all tokens' scores, in nats.
        field (`str`): What of the configuration asked for it, for error messages.
    """

    def __init__(self, score_clip: float | None, field: str):
        self.score_clip, self.field = score_clip, field

    def check(self, teacher: Teacher) -> None:
        ignorant = teacher.without_distributions()
        if ignorant is not None:
            raise ValueError(
                f"{self.field}, which needs the teacher's distribution over the whole vocabulary, but a "
                f"{type(ignorant).__name__} only knows the sampled tokens. Take a teacher that is a model in this process, "
                "or leave the field at its default."
            )
        self.teacher = teacher

    def read(self, rollout, question):
        # The student last: a teacher that is the student with other weights has FSDP free what it has gathered.
        teacher = self.models.teacher_states(question)
        student = self.models.student_states(rollout)
        mask = rollout["completion_mask"].bool()
        with self.models.clock.phase("distributions"):
            found = compare_rows(student, teacher, rollout["completion_ids"][mask], self.score_clip)
        fields = {name: torch.zeros(mask.shape, device=mask.device) for name in vars(found)}
        for name, values in vars(found).items():
            fields[name][mask] = values.float()
        distributions = Comparison(**fields)
        self._check_foreign_mass(mean_over_tokens(distributions.foreign_mass, loss_mask(rollout)))
        student_logps = rollout.get("old_per_token_logps")
        if student_logps is None:
            student_logps = distributions.student_logps
            self.models.watch_sampler(rollout, student_logps)
        return Reading(distributions.teacher_logps, student_logps, distributions=distributions, teacher_states=teacher)

    def metrics(self, reading, mask):
        return {"score/expected": mean_over_tokens(reading.distributions.mean, mask)}

    def _check_foreign_mass(self, mass: float) -> None:
        if mass > LARGEST_FOREIGN_MASS:
            raise ValueError(
                f"The student gives {mass:.2g} of its probability to token ids that the teacher does not have "
                f"({self.teacher.vocab_size} and above). They are padding of its vocabulary, which training has never "
                "suppressed, and the teacher's distribution says nothing about them. Cut the student's embeddings "
                '(`resize_token_embeddings`), or use `estimator="sampled"` and `score_baseline=None`.'
            )


class Baseline(WholeVocabulary):
    """`score_baseline="expected"`: the score of the sampled token less the expected one of its position, over σ alone."""

    def advantages(self, scores, reading, mask, population):
        relative = scores.shaped - reading.distributions.mean.masked_fill(~mask, 0.0)
        moments = population.moments(relative, mask)
        return population.whiten(relative, mask, moments, subtract_mean=False), moments


class Exact(WholeVocabulary):
    """
    `estimator="exact"`: the gradient of the expected advantage of a position, `Σ_a π(a) A(a) ∇log π(a)`, normalized by the
    moments of the student's distributions.

    The teacher's hidden states stay with the rollout, in CPU memory. In the loss, the log-prob of a sampled token keeps its
    value, for the importance ratio, and gets that gradient in place of its own. The advantages of the sampled tokens are for
    the logs.

    Args:
        score_clip (`float` or `None`), field (`str`): See `WholeVocabulary`.
        std_floor (`float`): Lower bound of σ, in nats.
        has_baseline (`bool`): Whether the expected score of the position is subtracted in the place of μ.
        clip_range (`tuple[float, float]` or `None`): Importance ratios below and above which a token with a negative, or a
            positive advantage has no gradient; `None`: none is left out.
    """

    def __init__(
        self,
        score_clip: float | None,
        field: str,
        std_floor: float,
        has_baseline: bool,
        clip_range: tuple[float, float] | None,
    ):
        super().__init__(score_clip, field)
        self.std_floor, self.has_baseline, self.clip_range = std_floor, has_baseline, clip_range
        # Of the teachers of the generation batch in use; and what a checkpoint holds of them.
        self.heads: list[LMHead | None] = []
        self.saved_heads: list[LMHead | None] = []

    def advantages(self, scores, reading, mask, population):
        expected = reading.distributions.mean.masked_fill(~mask, 0.0)
        relative, means = scores.shaped, expected
        if self.has_baseline:
            relative, means = scores.shaped - expected, torch.zeros_like(expected)
        moments = population.moments(means, mask, variances=reading.distributions.variance)
        return population.whiten(relative, mask, moments, subtract_mean=not self.has_baseline), moments

    def for_the_loss(self, rollout, reading, moments):
        if not self.models.is_training:
            return {}
        states = reading.teacher_states
        self.heads = states.heads
        rows = states.rows
        # Where the teacher knows nothing, no gradient is wanted; but 0 times NaN is NaN.
        spoiled = reading.distributions.teacher_logps.isnan()
        if spoiled.any():
            kept = [
                ~of_row[keep].cpu() for of_row, keep in zip(spoiled, rollout["completion_mask"].bool(), strict=True)
            ]
            rows = [torch.where(keep.unsqueeze(-1), row, 0.0) for row, keep in zip(rows, kept, strict=True)]
        found = {"teacher_hidden_states": rows, "score_moments": moments}
        if len(states.heads) > 1:
            found["teacher_of_row"] = torch.tensor(states.head_of_row, device=spoiled.device)
        return found

    def head_reader(self, inputs):
        if "teacher_hidden_states" not in inputs:
            return None
        if not self.heads:  # the run goes on from a checkpoint
            found = self.models.teacher_states(one_token(inputs, self.teacher.names)).heads
            saved = self.saved_heads or [None] * len(found)
            self.heads = [then or now for then, now in zip(saved, found, strict=True)]
        return partial(self._expected_advantage, inputs)

    def advantages_in_loss(self, logps, inputs):
        if "teacher_hidden_states" not in inputs:
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
        scale, shift = torch.ones_like(ratio), torch.zeros_like(ratio)
        if inputs["score_moments"] is not None:
            shift, scale = (values.to(ratio) for values in shift_and_scale(inputs["score_moments"], self.std_floor))
        low, high = self.clip_range or (0.0, torch.inf)
        keeps_negative, keeps_positive = ratio >= low, ratio <= high

        states = inputs["teacher_hidden_states"]
        lengths = torch.tensor([len(of_row) for of_row in states], device=places.device)
        numbers = inputs.get("teacher_of_row", torch.zeros_like(lengths))
        heads = [(number, head) for number, head in enumerate(self.heads) if head is not None]
        weights = [*head_of(call).parameters, *(weight for _, head in heads for weight in head.parameters)]
        parts, order = [], []
        # Also for a teacher without rows here: other ranks gather its head in their backward pass.
        for number, head in heads:
            is_its = numbers == number
            mine = slice(None) if len(self.heads) == 1 else is_its[rows].nonzero().squeeze(1)
            of_rows, its_lengths = rows[mine], lengths * is_its
            its_states = [of_row for of_row, its in zip(states, is_its.tolist(), strict=True) if its]
            its_states = torch.cat(its_states or [torch.zeros(0, 1)]).to(places.device)
            parts.append(
                ExpectedAdvantage.apply(
                    call.hidden[mine],
                    call.weight,
                    call.bias,
                    head_of(call),
                    its_states[(its_lengths.cumsum(0) - its_lengths)[of_rows] + columns[mine]],
                    head,
                    self.score_clip,
                    Weighting(
                        scale[of_rows],
                        None if self.has_baseline else shift[of_rows],
                        keeps_positive[of_rows],
                        keeps_negative[of_rows],
                    ),
                    partial(gathered, weights),
                )
            )
            order.append(mine)
        expected = parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(order).argsort()]
        return fields[0].detach() + (sign_of_loss(ratio)[rows] * expected).to(fields[0].dtype), *fields[1:]

    def save_state(self, folder):
        # Those of a teacher whose weights have moved on since; all others are read again.
        heads = [vars(head) if head is not None and is_copied(head) else None for head in self.heads]
        if any(heads) and PartialState().is_main_process:
            torch.save(heads, os.path.join(folder, HEADS))

    def load_state(self, folder):
        path = os.path.join(folder, HEADS)
        found = torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else []
        self.heads, self.saved_heads = [], [None if head is None else LMHead(**head) for head in found]


def gathered(weights: list[torch.Tensor]) -> AbstractContextManager:
    """Context in which parameters that ZeRO-3 shards are whole; copies, which are no parameters, are so anyway."""
    return maybe_gather_lm_head_ctx(*filter(is_parameter, weights))


def is_parameter(weight: torch.Tensor | None) -> bool:
    return isinstance(weight, torch.nn.Parameter)


def is_copied(head: LMHead) -> bool:
    return any(not is_parameter(weight) for weight in head.parameters)


def compare_rows(
    student: HiddenStates, teacher: HiddenStates, ids: torch.Tensor, score_clip: float | None
) -> Comparison:
    """Two models at the sampled tokens `ids` `(N,)` of a rollout, row after row."""
    heads = [student.head, *teacher.heads]
    ids_of_rows = ids.split([len(states) for states in student.rows])
    with gathered([weight for head in heads if head is not None for weight in head.parameters]):
        student_head, *teacher_heads = (None if head is None else head.on(ids.device) for head in heads)
        parts = [
            compare_distributions(
                states.to(ids.device),
                student_head,
                teacher_states.to(ids.device),
                teacher_heads[number],
                ids_of_row,
                score_clip,
            )
            for states, teacher_states, number, ids_of_row in zip(
                student.rows, teacher.rows, teacher.head_of_row, ids_of_rows, strict=True
            )
        ]
    return Comparison(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean of `(B, T)` values over the valid tokens of all ranks; NaN without any."""
    count, total, _ = merge_moments(gather(merge_moments(row_moments(values, mask)).unsqueeze(0)))
    return (total / count).item()


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

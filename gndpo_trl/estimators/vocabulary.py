"""Estimators that look at the whole vocabulary: the expected score of a position, as a baseline or as the gradient."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather

from ..grpo.hidden_states import HiddenStates, gathered, head_of, is_parameter
from ..grpo.microbatches import loss_mask
from ..grpo.trl_hooks import HeadCall, HeadFields
from ..objective.advantages import merge_moments, row_moments
from ..objective.distributions import ComparedInBackward, Comparison, LMHead, compare_distributions
from ..teachers import Teacher
from .estimator import Estimator
from .loss_reading import LossReading, on_any_rank
from .reading import Reading, leave_unknown_out


# Mean probability of ids that the teacher does not have, above which the two are not distributions over the same tokens.
LARGEST_FOREIGN_MASS = 1e-3


class WholeVocabulary(Estimator):
    """
    What [`Baseline`] and [`Exact`] read: student and teacher give the last hidden states of their passes instead of
    log-probs, and both LM heads are applied to them side by side, a few positions at a time.

    Where a loss pass may read the student, there is no other: its backward pass compares the two and leaves the gradient of
    unscaled scores. The mean of a position's scores is subtracted from them, which changes nothing of the gradient over all
    tokens, and is what a baseline does to that of the sampled one.

    Args:
        score_clip (`float` or `None`): Bound of the clamp of all tokens' scores, in nats.
        field (`str`): What of the configuration asked for it, for error messages.
    """

    of_all_tokens = False  # whether the gradient is that of all tokens

    def __init__(self, score_clip: float | None, field: str):
        self.score_clip, self.field = score_clip, field
        self.heads: list[LMHead | None] = []  # of the teachers of the generation batch in use
        self.batch: LossReading | None = None

    def check(self, teacher: Teacher) -> None:
        ignorant = teacher.without_distributions()
        if ignorant is not None:
            raise ValueError(
                f"{self.field}, which needs the teacher's distribution over the whole vocabulary, but a "
                f"{type(ignorant).__name__} only knows the sampled tokens. Take a teacher that is a model in this process, "
                "for one behind a server set `teacher_top_k` (16, say), or leave the field at its default."
            )
        self.teacher = teacher

    def read(self, rollout, question):
        # The student last: a teacher that is the student with other weights has FSDP free what it has gathered.
        teacher = self.models.teacher_states(question)
        student = self.models.student_states(rollout)
        mask = rollout["completion_mask"].bool()
        with self.models.clock.phase("distributions"):
            found = compare_rows(student, teacher, rollout["completion_ids"][mask], self.score_clip)
        fields = {}
        for name, values in vars(found).items():
            fields[name] = values.new_zeros(mask.shape)
            fields[name][mask] = values
        distributions = Comparison(**fields)
        self._check_foreign_mass(mean_over_tokens(distributions.foreign_mass, loss_mask(rollout)))
        student_logps = rollout.get("old_per_token_logps")
        if student_logps is None:
            student_logps = distributions.student_logps
            self.models.watch_sampler(rollout, student_logps)
        return Reading(distributions.teacher_logps, student_logps, distributions=distributions, teacher_states=teacher)

    def waits_for_loss(self, rollout):
        return self.models.may_read_in_loss(rollout, is_scaled_later=True)

    def begin(self, rollout, question):
        self.batch = LossReading(rollout, question)
        may_not_know = self.teacher.may_not_know(question["rows"])
        if self.teacher.is_read_when_due and not on_any_rank(any(may_not_know), rollout):
            return {}
        states = self.models.teacher_states(question)
        missing = missing_states(states, rollout["completion_mask"])
        self.batch.unknown = leave_unknown_out(rollout, missing, may_not_know)
        return self._keep(without(states, self.batch.unknown, rollout["completion_mask"]), missing.device)

    def head_reader(self, inputs):
        if "row_of_batch" not in inputs:
            return None
        return partial(self._compare, inputs, self._states(inputs))

    def advantages_in_loss(self, logps, inputs):
        if "row_of_batch" not in inputs:
            return super().advantages_in_loss(logps, inputs)
        return torch.ones_like(logps)

    def finish(self, rollout):
        found, unknown, self.batch = self.batch.comparison(), self.batch.unknown, None
        self.models.watch_sampler(rollout, found.student_logps)
        return Reading(found.teacher_logps, found.student_logps, distributions=found, unknown=unknown)

    def _keep(self, states: HiddenStates, device: torch.device) -> dict[str, Any]:
        """Entries of a rollout for what was read of the teacher."""
        self.heads = states.heads
        found = {"teacher_hidden_states": states.rows}
        if len(states.heads) > 1:
            found["teacher_of_row"] = torch.tensor(states.head_of_row, device=device)
        return found

    def _states(self, inputs: dict[str, Any]) -> HiddenStates:
        """The teacher's states of a micro-batch: kept with the rollout, or read now."""
        if "teacher_hidden_states" in inputs:
            numbers = inputs["teacher_of_row"].tolist() if "teacher_of_row" in inputs else []
            return HiddenStates(inputs["teacher_hidden_states"], heads=self.heads, head_of_row=numbers)
        return self.models.teacher_states_in_loss(*self.batch.question(inputs))

    def _compare(
        self, inputs: dict[str, Any], teacher: HiddenStates, places: torch.Tensor, call: HeadCall
    ) -> HeadFields:
        """Fields of TRL's head, all zeros, with the gradient of the scores; the comparison is there after the backward pass."""
        ids = inputs["completion_ids"]
        rows, columns = places // ids.size(1), places % ids.size(1)

        def compare(mine, head, states, gather):
            found = self.batch.expect(inputs["row_of_batch"][rows[mine]], columns[mine], call.hidden.dtype)
            return ComparedInBackward.apply(
                *(call.hidden[mine], call.weight, call.bias, head_of(call), states, head),
                *(ids.view(-1)[places[mine]], self.score_clip, self.of_all_tokens, found, gather),
            )

        zeros = for_each_teacher(teacher, rows, columns, head_of(call), compare).float()  # as TRL's
        return zeros, torch.zeros_like(zeros), None, None, None

    def metrics(self, reading, mask):
        found = reading.distributions
        values = {
            "score/expected": found.mean,
            "top_k/student_mass": found.known_mass,
            "top_k/rest_clamped": found.rest_clamped,
            "top_k/overlap": found.overlap,
        }
        means = means_over_tokens([(of_name, mask & ~of_name.isnan()) for of_name in values.values()])
        found = zip(values, means, strict=True)
        # The last three only where a few tokens are known.
        return {name: mean for name, mean in found if name.startswith("score/") or not math.isnan(mean)}

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


def for_each_teacher(
    teacher: HiddenStates, rows: torch.Tensor, columns: torch.Tensor, student: LMHead, act: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """
    `(N,)` values at the positions of a micro-batch, of one teacher after the other.

    Args:
        teacher ([`HiddenStates`]): Of all teachers.
        rows (`torch.Tensor` of shape `(N,)`), columns (`torch.Tensor` of shape `(N,)`): The positions.
        student ([`LMHead`]): The student's.
        act (`Callable`): `act(mine, head, states, gather)` gives the values at the positions `mine` of a teacher, which are all
            that depends on it; `gather()` is a context in which the weights of all heads are whole.
    """
    weights = [weight for head in [student, *filter(None, teacher.heads)] for weight in head.parameters]
    parts, order = [], []
    for mine, head, states in teacher.at(rows, columns):
        parts.append(act(mine, head, states, partial(gathered, weights)))
        order.append(mine)
    return parts[0] if len(teacher.heads) == 1 else torch.cat(parts)[torch.cat(order).argsort()]


def missing_states(states: HiddenStates, completion_mask: torch.Tensor) -> torch.Tensor:
    """`(B, T)`: True where the states of a completion's token hold NaN."""
    missing = torch.zeros(completion_mask.shape, dtype=torch.bool, device=completion_mask.device)
    of_tokens = [row.isnan().flatten(1).any(1) for row in states.rows]
    missing[completion_mask.bool()] = torch.cat(of_tokens).to(missing.device)
    return missing


def without(states: HiddenStates, unknown: torch.Tensor, completion_mask: torch.Tensor) -> HiddenStates:
    """States with zeros at unknown tokens `(B, T)`: no gradient is wanted there, but 0 times NaN is NaN."""
    if not unknown.any():
        return states
    rows = []
    for row, is_unknown, mask in zip(states.rows, unknown, completion_mask.bool(), strict=True):
        is_unknown = is_unknown[mask].to(row.device).view(-1, *[1] * (row.ndim - 1))
        rows.append(row.masked_fill(is_unknown, 0.0))
    return replace(states, rows=rows)


def is_copied(head: LMHead) -> bool:
    """Whether nothing of it is a model's own."""
    return not any(map(is_parameter, head.parameters))


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


def means_over_tokens(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """For each of the `(B, T)` values with a mask, their mean over the valid tokens of all ranks; NaN without any."""
    moments = torch.stack([merge_moments(row_moments(values, mask)) for values, mask in parts])
    count, total, _ = merge_moments(gather(moments.unsqueeze(0))).unbind(-1)
    return (total / count).tolist()


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Of one."""
    return means_over_tokens([(values, mask)])[0]

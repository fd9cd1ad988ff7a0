"""Advantages that look at the whole vocabulary: the expected score of a position, as a baseline or as the estimator."""

from functools import partial
from typing import Any

import torch
from accelerate.utils import gather

from .config import GNDPOConfig
from .grpo.hidden_states import HiddenStates, head_of
from .grpo.ratio import SequenceTokenMixin
from .grpo.rollouts import valid_tokens
from .grpo.trl_hooks import HeadCall, HeadFields, maybe_gather_lm_head_ctx
from .objective.advantages import merge_moments, row_moments, shift_and_scale
from .objective.distributions import Comparison, ExpectedAdvantage, LMHead, Weighting, compare_distributions
from .teachers import Teacher


# Mean probability of ids that the teacher does not have, above which the two are not distributions over the same tokens.
LARGEST_FOREIGN_MASS = 1e-3


def looks_at_vocabulary(args: GNDPOConfig) -> bool:
    return args.score_baseline is not None or args.estimator != "sampled"


def check_teacher(teacher: Teacher, args: GNDPOConfig) -> None:
    """Raise `ValueError` if the configuration needs the teacher's distributions and the teacher has none."""
    if looks_at_vocabulary(args) and type(teacher).hidden_states is Teacher.hidden_states:
        field = "score_baseline" if args.score_baseline is not None else "estimator"
        raise ValueError(
            f"`{field}` is {getattr(args, field)!r}, which needs the teacher's distribution over the whole vocabulary, "
            f"but a {type(teacher).__name__} only knows the sampled tokens. Take a teacher that is a model in this "
            "process, or leave the field at its default."
        )


class ExpectationMixin(SequenceTokenMixin):
    """
    `score_baseline="expected"` and `estimator="exact"` for a trainer that has a teacher.

    Student and teacher give the last hidden states of their scoring passes instead of log-probs, and both LM heads are
    applied to them side by side, a few positions at a time. With the exact estimator the teacher's hidden states stay with
    the rollout, in CPU memory; in the loss, the log-prob of a sampled token keeps its value, for the importance ratio, and
    gets the gradient of the expected advantage of its position.
    """

    _teacher_head: LMHead | None = None
    _weighting: Weighting | None = None  # of the micro-batch in the loss
    _row_of_position: torch.Tensor | None = None  # of that, `(N,)`

    def _compare_distributions(
        self, rollout: dict[str, Any], question: dict[str, Any], seconds: dict[str, float]
    ) -> Comparison:
        """
        Student and teacher at the sampled positions, as `(B, T)`, 0 on padding. With the exact estimator, the rollout gets
        what the loss will need.
        """
        with self._timer(seconds, "time/student_scoring"):
            student = self._hidden_states(self.model, rollout)
        with self._timer(seconds, "time/teacher_scoring"):
            teacher = self.teacher.hidden_states(question, self._hidden_states)
        mask = rollout["completion_mask"].bool()
        with self._timer(seconds, "time/distributions"):
            found = self._compare_rows(student, teacher, rollout["completion_ids"][mask])
        fields = {name: torch.zeros(mask.shape, device=mask.device) for name in vars(found)}
        for name, values in vars(found).items():
            fields[name][mask] = values.float()
        comparison = Comparison(**fields)
        self._check_foreign_mass(self._mean_over_tokens(comparison.foreign_mass, rollout))
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["score/expected"].append(self._mean_over_tokens(comparison.mean, rollout))
        if self.args.estimator == "exact" and mode == "train":
            self._teacher_head, rollout["teacher_hidden_states"] = teacher.head, teacher.rows
        return comparison

    def _compare_rows(self, student: HiddenStates, teacher: HiddenStates, ids: torch.Tensor) -> Comparison:
        weights = (student.head.weight, student.head.bias, teacher.head.weight, teacher.head.bias)
        ids_of_rows = ids.split([len(states) for states in student.rows])
        with maybe_gather_lm_head_ctx(*weights):
            student_head, teacher_head = student.head.on(ids.device), teacher.head.on(ids.device)
            parts = [
                compare_distributions(
                    states.to(ids.device),
                    student_head,
                    teacher_states.to(ids.device),
                    teacher_head,
                    ids_of_row,
                    self.args.score_clip,
                )
                for states, teacher_states, ids_of_row in zip(student.rows, teacher.rows, ids_of_rows, strict=True)
            ]
        return Comparison(
            *(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True))
        )

    def _mean_over_tokens(self, values: torch.Tensor, rollout: dict[str, Any]) -> float:
        """Mean of `(B, T)` values over the valid tokens of all ranks; NaN without any."""
        count, total, _ = merge_moments(gather(merge_moments(row_moments(values, valid_tokens(rollout))).unsqueeze(0)))
        return (total / count).item()

    def _check_foreign_mass(self, mass: float) -> None:
        if mass > LARGEST_FOREIGN_MASS:
            raise ValueError(
                f"The student gives {mass:.2g} of its probability to token ids that the teacher does not have "
                f"({self.teacher.vocab_size} and above). They are padding of its vocabulary, which training has never "
                "suppressed, and the teacher's distribution says nothing about them. Cut the student's embeddings "
                '(`resize_token_embeddings`), or use `estimator="sampled"` and `score_baseline=None`.'
            )

    def _population(
        self, clamped: torch.Tensor, mask: torch.Tensor, comparison: Comparison
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Scores of the sampled tokens, relative to the baseline; and the population that they are normalized by: its
        expectations and variances at each position, or the scores themselves. All `(B, T)`.
        """
        expected = comparison.mean.masked_fill(~mask, 0.0)
        has_baseline = self.args.score_baseline == "expected"
        scores = clamped - expected if has_baseline else clamped
        if self.args.estimator == "sampled":
            return scores, scores, None
        return scores, torch.zeros_like(expected) if has_baseline else expected, comparison.variance

    def _compute_loss(self, model, inputs):
        if "teacher_hidden_states" in inputs and self._teacher_head is None:  # the run goes on from a checkpoint
            self._teacher_head = self.teacher.hidden_states(inputs, self._hidden_states).head
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._weighting = self._row_of_position = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._loss_inputs is None or "teacher_hidden_states" not in self._loss_inputs:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self._reading_head(partial(self._expected_advantage, self._loss_inputs)):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _expected_advantage(self, inputs: dict[str, Any], places: torch.Tensor, call: HeadCall) -> HeadFields:
        """Fields of TRL's head, with the gradient of the expected advantage in place of the log-probs' own."""
        fields = call.compute()
        width, device = inputs["completion_ids"].size(1), places.device
        self._row_of_position = places // width
        lengths = torch.tensor([len(states) for states in inputs["teacher_hidden_states"]], device=device)
        order = (lengths.cumsum(0) - lengths)[self._row_of_position] + places % width
        teacher_hidden = torch.cat(inputs["teacher_hidden_states"]).to(device)[order]

        scale = call.hidden.new_ones(len(places), dtype=fields[0].dtype)
        shift = torch.zeros_like(scale)
        if inputs.get("score_moments") is not None:
            shifts, scales = shift_and_scale(inputs["score_moments"], self.args.std_floor)
            shift, scale = (values.to(scale)[self._row_of_position] for values in (shifts, scales))
        self._weighting = Weighting(scale, None if self.args.score_baseline == "expected" else shift)
        weights = (call.weight, call.bias, self._teacher_head.weight, self._teacher_head.bias)
        contribution = ExpectedAdvantage.apply(
            call.hidden,
            call.weight,
            call.bias,
            head_of(call),
            teacher_hidden,
            self._teacher_head,
            self.args.score_clip,
            self._weighting,
            partial(maybe_gather_lm_head_ctx, *weights),
        )
        return fields[0].detach() + contribution.to(fields[0].dtype), *fields[1:]

    def _adapt_loss_inputs(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        logps = super()._adapt_loss_inputs(logps, inputs)
        if self._weighting is None:
            return logps
        # The sum over tokens has advantages of both signs. Where the ratio is clipped for one of them, the other one
        # goes on: TRL's loss gets the sign that it does not clip, and the sum leaves the clipped one out.
        ratio = (logps.detach() - inputs["old_per_token_logps"])[:, 0].exp()
        sign = torch.where(ratio > 1, -1.0, 1.0)
        if self.loss_type != "cispo":  # it clips the ratio and no gradient
            self._weighting.keeps_positive = (ratio <= 1 + self.epsilon_high)[self._row_of_position]
            self._weighting.keeps_negative = (ratio >= 1 - self.epsilon_low)[self._row_of_position]
        inputs["advantages"] = sign
        return logps.detach() + sign.unsqueeze(1) * (logps - logps.detach())

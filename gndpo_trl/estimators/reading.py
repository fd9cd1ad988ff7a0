"""What was read of the sampled tokens, and whether it is to be trusted."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedTokenizerBase

from ..grpo.hidden_states import HiddenStates
from ..grpo.ranks import raised_on_all_ranks
from ..grpo.rollouts import check_finite, leave_out, valid_tokens
from ..objective.distributions import Comparison


@dataclass
class Reading:
    """
    What teacher and student say of the sampled tokens of a rollout; tensors of shape `(B, T)`, in nats.

    Attributes:
        teacher_logps (`torch.Tensor`): Log-probs under the teacher. Masked positions may hold anything.
        student_logps (`torch.Tensor`): Log-probs under the student as it sampled.
        reference_logps (`torch.Tensor`, *optional*): Log-probs under the student before training.
        distributions ([`Comparison`], *optional*): What both say of all other tokens; its fields are `(B, T)`, 0 on padding.
        teacher_states ([`HiddenStates`], *optional*): What the teacher's distributions are made of.
        is_estimate (`bool`, *optional*, defaults to `False`): Whether `student_logps` are the sampler's, which has none for
            some tokens: these then enter no statistics.
        unknown (`torch.Tensor`, *optional*): True on tokens that have left the loss because the teacher does not know them.
    """

    teacher_logps: torch.Tensor
    student_logps: torch.Tensor
    reference_logps: torch.Tensor | None = None
    distributions: Comparison | None = None
    teacher_states: HiddenStates | None = None
    is_estimate: bool = False
    unknown: torch.Tensor | None = None

    def of_teacher(self) -> list[torch.Tensor]:
        """Everything that depends on the teacher: not finite where it does not know, or where something is wrong."""
        found = self.distributions
        return [self.teacher_logps, *([] if found is None else [found.mean, found.variance])]


def leave_unknown_out(rollout: dict[str, Any], missing: torch.Tensor, may_not_know: list[bool]) -> torch.Tensor:
    """
    Take what a teacher does not know, and may not know, out of the loss. All ranks call it together.

    Args:
        rollout (`dict`): Rollout, changed in place.
        missing (`torch.Tensor` of shape `(B, T)`): True where the teacher's answer is NaN.
        may_not_know (`list[bool]`): For each row, whether NaN is an answer of its teacher's.

    Returns:
        `torch.Tensor` of shape `(B, T)`: True on the tokens that were valid and are left out.
    """
    forgiven = torch.tensor(may_not_know, dtype=torch.bool, device=missing.device).unsqueeze(-1)
    unknown = missing & valid_tokens(rollout) & forgiven
    leave_out(rollout, unknown, gather)
    return unknown


def settle(
    rollout: dict[str, Any], reading: Reading, may_not_know: list[bool], tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """
    The tokens that scores are made of: what the teacher may not know and does not is left out of the loss, and anything else
    that is not finite ends the run. All ranks call it together, and raise together.

    Args:
        rollout (`dict`): Rollout; tokens that are left out leave its loss.
        reading ([`Reading`]): What was read of it; gets its `unknown`, or more of it.
        may_not_know (`list[bool]`): For each row, whether NaN is an answer of its teacher's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes the prompt that an error quotes.

    Returns:
        `torch.Tensor` of shape `(B, T)`: True on the tokens whose scores are known.

    Raises:
        `ValueError`: with the counts, the first prompt and what to look at.
    """
    if not reading.is_estimate:  # first: what is known of the teacher's distribution is relative to it
        with raised_on_all_ranks():
            check_finite("student", reading.student_logps, rollout, valid_tokens(rollout), tokenizer)
    missing = torch.stack([values.isnan() for values in reading.of_teacher()]).any(0)
    unknown = leave_unknown_out(rollout, missing, may_not_know)
    reading.unknown = unknown if reading.unknown is None else reading.unknown | unknown
    mask = valid_tokens(rollout)
    with raised_on_all_ranks():
        for values in reading.of_teacher():
            check_finite("teacher", values, rollout, mask, tokenizer)
        if reading.reference_logps is not None:
            check_finite("reference", reading.reference_logps, rollout, mask, tokenizer)
    return mask & reading.student_logps.isfinite() if reading.is_estimate else mask

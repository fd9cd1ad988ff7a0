"""What was read of the sampled tokens, and whether it is to be trusted."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedTokenizerBase

from ..grpo.checkpoints import RunCannotGoOn
from ..grpo.hidden_states import HiddenStates
from ..grpo.ranks import raised_on_all_ranks
from ..grpo.rollouts import check_finite, leave_out, valid_tokens
from ..objective.distributions import Comparison


# A teacher that gives so many tokens log-probs that differ by less than so many nats says nothing, if they are those of one
# token among equal ones: as many as the student's vocabulary has, or up to so many times more or less in another's.
FEWEST_TOKENS, SAME, OTHER_VOCABULARY = 8, 1e-4, 10


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


def check_says_something(
    logps: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    vocab_size: int,
    teachers: torch.Tensor | None = None,
    names: tuple[str, ...] = (),
) -> None:
    """
    Raise where a teacher finds every token as likely as any other: the answer of a model that has lost its weights, as of a
    server that was put to sleep and woken again. All ranks call it together, and raise together.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): The teacher's log-probs of the sampled tokens, in nats.
        ids (`torch.Tensor` of shape `(B, T)`): The sampled tokens.
        mask (`torch.Tensor` of shape `(B, T)`): True on the tokens whose log-probs are known.
        vocab_size (`int`): Size of the student's vocabulary.
        teachers (`torch.Tensor` of shape `(B,)`, *optional*): Number of each row's teacher, if there are several.
        names (`tuple[str, ...]`, *optional*): Their names.

    Raises:
        [`~grpo.checkpoints.RunCannotGoOn`]: with the log-prob, and what to look at.
    """
    found = []
    for number in range(len(names) or 1):
        is_its = mask if teachers is None else mask & (teachers.to(mask.device) == number).unsqueeze(-1)
        values = torch.stack([logps[is_its].float(), ids[is_its].float()])
        lows, highs = (values.amin(1), values.amax(1)) if values.numel() else (2 * [math.inf], 2 * [-math.inf])
        found.append(torch.tensor([values.size(1), *lows, *highs]))
    ranks = gather(torch.stack(found).unsqueeze(0).to(mask.device))
    counts, lows, highs = ranks[..., 0].sum(0), ranks[..., 1:3].amin(0), ranks[..., 3:].amax(0)
    for number, (count, (low, low_id), (high, high_id)) in enumerate(
        zip(counts.tolist(), lows.tolist(), highs.tolist(), strict=True)
    ):
        is_uniform = abs(low + math.log(vocab_size)) < math.log(OTHER_VOCABULARY)
        if count >= FEWEST_TOKENS and low_id < high_id and high - low < SAME and is_uniform:
            who = f"The teacher {names[number]!r}" if names else "The teacher"
            raise RunCannotGoOn(
                f"{who} gives each of {count:.0f} tokens the same log-prob, {low:.4g} nats (that of one token among "
                f"{math.exp(-low):.0f} equal ones), so that it says nothing. Look at its weights; a server that slept and was "
                "woken may have lost them: restart it."
            )

"""Completions that end in a loop: found by their tokens, counted, and left out of the loss where that is asked for."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from accelerate.utils import gather

from .rollouts import leave_out


# A completion repeats itself if it ends in a piece of at most so many tokens that stands there so many times, one after the
# other, and in at least so many tokens together. Lines of a table and lists of numbers seldom do so to the very end.
LONGEST_PIECE, TIMES, FEWEST_TOKENS = 64, 4, 32


def repeats_itself(ids: Sequence[int], end_ids: Collection[int] = ()) -> bool:
    """
    Whether a completion ends in a loop.

    Args:
        ids (`Sequence[int]`): Its tokens.
        end_ids (`Collection[int]`, *optional*): Tokens that end a completion; one of them at its end is none of the loop.
    """
    tail = np.asarray(ids[-(LONGEST_PIECE * TIMES + 1) :])
    if len(tail) and tail[-1] in end_ids:
        tail = tail[:-1]
    for length in range(1, LONGEST_PIECE + 1):
        needed = max(TIMES * length, FEWEST_TOKENS)
        if needed > len(tail):
            return False
        if (tail[-needed + length :] == tail[-needed:-length]).all():
            return True
    return False


class LoopsMixin:
    """
    Counts the completions of a [`~trl.GRPOTrainer`] that end in a loop, as `completions/repeating_ratio`, and leaves them out
    of the loss and of all statistics with `args.mask_repeating_completions`, as `mask_truncated_completions` does with others.
    """

    def _generate(self, prompts: list):
        results = super()._generate(prompts)
        found = [repeats_itself(ids, self.eos_token_ids) for ids in results[1]]
        self._repeating = torch.tensor(found, device=self.accelerator.device)
        mode = "train" if self.model.training else "eval"
        share = gather(self._repeating.float()).mean().item()
        self._metrics[mode]["completions/repeating_ratio"].append(share)
        return results

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        if getattr(self.args, "mask_repeating_completions", False):
            leave_out(rollout, self._repeating.unsqueeze(-1).expand_as(rollout["completion_mask"]), gather)
        return rollout

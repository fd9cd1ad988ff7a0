"""What ranks do together: they end together."""

from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import nn


@contextmanager
def raised_on_all_ranks():
    """
    Have all ranks raise if one of them raises in here, so that none waits for the others. All ranks enter it together, and
    nothing in it may wait for another rank.

    Raises:
        `ValueError`: with the message of the first rank that raised, on those that did not. The others raise what they raised.
    """
    error = None
    try:
        yield
    except Exception as caught:  # functions of the user's raise all kinds
        error = caught
    failed = torch.tensor([int(error is not None)], device=PartialState().device)
    if gather(failed).sum() == 0:  # a number each, since texts are exchanged by pickling
        return
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    texts = gather_object([None if error is None else text])
    if error is not None:
        raise error
    raise ValueError(next(text for text in texts if text is not None))


class RewardsTogetherMixin:
    """Has all ranks of a [`~trl.GRPOTrainer`] end with what a reward function raises on one of them."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        error = None
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as caught:
            # In a reward model that is cut into pieces, the others may wait for anything.
            if any(isinstance(function, nn.Module) for function in self.reward_funcs):
                raise
            error = caught
            rewards = gather(torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device))
        with raised_on_all_ranks():
            if error is not None:
                raise error
        return rewards

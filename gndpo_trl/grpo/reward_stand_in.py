"""A `GRPOTrainer` whose signal is no reward: what stands in the reward's place in TRL's logs."""

from collections import deque
from collections.abc import Callable

import torch

from .trl_hooks import REWARD_METRICS, nanstd


class RewardStandInMixin:
    """
    Lets a [`~trl.GRPOTrainer`] do without rewards, and logs a number per completion where TRL logs them.

    TRL demands a reward source. Where there is none, `stand_in` takes its place, a reward function that returns zeros; a
    trainer that knows better calls `_log_stand_in` after TRL has logged them. Where there are rewards they are logged as
    they are, and the number gets a column of its own in the table of completions.

    Args:
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`], but none are needed.
    """

    stand_in: Callable[..., list[float]]

    def __init__(self, *args, reward_funcs=None, **kwargs):
        super().__init__(*args, reward_funcs=reward_funcs or self.stand_in, **kwargs)
        if not reward_funcs and len(self.reward_funcs) > 1:  # an environment brought a reward of its own
            index = self.reward_funcs.index(self.stand_in)
            for values in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
                del values[index]
            self.reward_weights = torch.cat([self.reward_weights[:index], self.reward_weights[index + 1 :]])

    def _log_stand_in(self, mode: str, values: torch.Tensor, advantages: torch.Tensor) -> None:
        """
        Put a number per completion into the logs of the generation batch that TRL has just logged.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            values (`torch.Tensor` of shape `(N,)`): One for each completion of all ranks, in their order; NaN: none.
            advantages (`torch.Tensor` of shape `(N,)`): Likewise, the mean advantage of its tokens.
        """
        replace_last(self._logs["advantages"], advantages.nan_to_num().tolist())
        column = self._logs["rewards"][self.stand_in.__name__]
        if self.stand_in not in self.reward_funcs:
            column.extend(values.tolist())
            return
        replace_last(column, values.tolist())
        mean, std = values.nanmean().item(), nanstd(values).item()
        name = self.stand_in.__name__
        metrics = {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
        if self.reward_funcs == [self.stand_in]:
            num_generations = self.num_generations if mode == "train" else self.num_generations_eval
            group_stds = nanstd(values.view(-1, num_generations), dim=1)  # NaN for groups of one
            frac_zero_std = (group_stds[~group_stds.isnan()] < 1e-8).float().mean().item()
            metrics.update(zip(REWARD_METRICS, (mean, std, frac_zero_std), strict=True))
        for name, value in metrics.items():
            self._metrics[mode][name][-1] = value


def replace_last(log: deque, values: list) -> None:
    """Overwrite the newest entries of one of TRL's logs, which may be too short to hold all of them."""
    for _ in range(min(len(log), len(values))):
        log.pop()
    log.extend(values)

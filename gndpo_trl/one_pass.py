"""Generation batches that are read by the passes of their own loss, without any other pass of the student."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from .estimators.vocabulary import mean_over_tokens
from .grpo.microbatches import loss_mask
from .grpo.trl_hooks import MULTIMODAL_KEYS, before_engine_step
from .objective.advantages import shift_and_scale


# One number, that of all tokens, scales what these leave.
WITH_ONE_SCALE = ("global", "none")


@dataclass(frozen=True)
class SampledBatch:
    """
    A generation batch before anything is known of it.

    Attributes:
        mode (`str`): `"train"` or `"eval"`.
        rollout (`dict`): What the student sampled.
        rows (`list[dict]`): The rows of the data.
    """

    mode: str
    rollout: dict[str, Any]
    rows: list[dict[str, Any]]


class OnePassMixin:
    """
    Gives a trainer whose `_set_advantages(batch, reading)` scores and reports a generation batch the form in which that
    comes last: its micro-batches pass, the reading is put together of what they found, and the gradient that they have left,
    which is linear in one over the standard deviation, is scaled by it, before it is clipped. What is not finite ends the run
    there: no weight has moved.

    It is the same gradient where one optimizer step uses one generation batch, and nothing in its loss but the scores has to
    be known before, or would be scaled with them.
    """

    in_one_pass = True  # where it is the same; False: never
    # The generation batch whose micro-batches pass, the rows that have not yet, and whether DeepSpeed was given a scale.
    _unread: SampledBatch | None = None
    _rows_left = 0
    _engine_is_scaled = False

    def _begin_run(self):
        super()._begin_run()
        self._unread = None

    def _may_read_in_loss(self, rollout: dict[str, Any], is_scaled_later: bool) -> bool:
        args, teacher = self.args, self.teacher
        if not self.in_one_pass or not self.model.training or "old_per_token_logps" in rollout:
            return False
        if args.gradient_accumulation_steps != args.steps_per_generation or self.num_iterations != 1:
            return False
        if not is_scaled_later:
            return True
        vocab_size = self.model.config.get_text_config().vocab_size
        knows_all_ids = teacher.vocab_size is None or teacher.vocab_size >= vocab_size
        adds_to_the_loss = self.beta != 0 or self.aux_loss_enabled or self._entropy_bonus_enabled
        return (
            knows_all_ids
            and not adds_to_the_loss
            and args.advantage_normalization in WITH_ONE_SCALE
            and (args.reward_coef, args.distillation_coef) == (0, 1)
            and self.top_entropy_quantile == 1.0
            and self.off_policy_mask_threshold is None
            and (not self.is_deepspeed_enabled or can_be_scaled(self.model_wrapped))
        )

    def _leave_to_the_loss(self, batch: SampledBatch) -> None:
        rollout = batch.rollout
        num_rows = len(rollout["completion_ids"])
        rollout["row_of_batch"] = torch.arange(num_rows, device=rollout["completion_ids"].device)
        # Images are not asked for again.
        kept = {key: value for key, value in rollout.items() if key not in MULTIMODAL_KEYS}
        self._unread, self._rows_left = replace(batch, rollout=kept), num_rows
        self._entropies_before = len(self._metrics[batch.mode]["entropy"])

    def _compute_loss(self, model, inputs):
        if "row_of_batch" in inputs:
            self._rows_left -= len(inputs["row_of_batch"])
        return super()._compute_loss(model, inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.is_deepspeed_enabled:
            with before_engine_step(model, self._scale_engine_step):
                loss = super().training_step(model, inputs, num_items_in_batch)
            if self._engine_is_scaled:
                model.optimizer.override_loss_scale(1.0)
                self._engine_is_scaled = False
            return loss
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._unread is not None and self._rows_left == 0:
            scale = self._finish_reading()
            if scale != 1.0:
                gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
                torch._foreach_mul_(gradients, scale)
        return loss

    def _scale_engine_step(self) -> None:
        if self._unread is not None:
            scale = self._finish_reading()
            self.model_wrapped.optimizer.override_loss_scale(1.0 / scale if scale > 0 else math.inf)
            self._engine_is_scaled = True

    def _finish_reading(self) -> float:
        """Score and report the generation batch that has passed; what its gradient is to be multiplied by."""
        batch, self._unread = self._unread, None
        reading = self.estimator.finish(batch.rollout)
        if reading.distributions is not None:  # the loss was given no entropies
            entropies = self._metrics[batch.mode]["entropy"]
            del entropies[self._entropies_before :]
            entropies.append(mean_over_tokens(reading.distributions.entropy, loss_mask(batch.rollout)))
        moments = self._set_advantages(batch, reading)
        return 1.0 if moments is None else shift_and_scale(moments[0], self.args.std_floor)[1].item()


def can_be_scaled(engine: Any) -> bool:
    """Whether DeepSpeed divides the gradient by a scale of ours before it clips it: under ZeRO, where it has none of its own."""
    return hasattr(engine.optimizer, "override_loss_scale") and not engine.fp16_enabled()

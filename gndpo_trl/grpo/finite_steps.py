"""Steps whose loss or gradient is not finite: they change no weight, are counted, and end a run where they go on."""

import math

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from .checkpoints import RunCannotGoOn


class FiniteStepsMixin:
    """
    Keeps NaN and infinity out of the weights of a [`~trl.GRPOTrainer`].

    - A step whose loss or gradient is not finite on any rank leaves weights and optimizer as they are, on all ranks. It counts
      as a step; `skipped_steps` says in every log how many there have been, and such a loss is logged as what it is.
    - After `args.max_skipped_steps` in a row the run ends, with a checkpoint of the weights that it has.
    - A model with weights that are not finite is not saved.

    Under float16, the loss scaler skips steps whose gradients overflow, as it is meant to, and only losses are looked at.
    DeepSpeed has taken its step by the time that anything can be known of it: a gradient that is not finite ends the run at
    once, without a checkpoint.

    Raises:
        [`RunCannotGoOn`]: during a run, on all ranks, after too many such steps in a row.
        `ValueError`: during a run, on all ranks, after one under DeepSpeed; from `save_model`, if a weight is not finite.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._forget_steps()
        self.add_callback(SkipStep(self))

    def _forget_steps(self) -> None:
        # Of the step in progress, of the steps since the last log, and of the run.
        self._loss_is_finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self._logged_loss_is_finite = True
        self.skipped_steps = self.skipped_in_a_row = 0

    def _begin_run(self):
        super()._begin_run()
        self._forget_steps()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_is_finite = self._loss_is_finite & loss.isfinite()
        return loss

    def _judge_step(self) -> None:
        """Skip the step whose gradients are there, if it has to be; called on all ranks."""
        finite = torch.stack([self._loss_is_finite, self._gradient_is_finite()])
        loss_is_finite, gradient_is_finite = gather(finite.unsqueeze(0)).all(0).tolist()
        self._loss_is_finite = torch.ones_like(self._loss_is_finite)
        self._logged_loss_is_finite &= loss_is_finite
        if loss_is_finite and gradient_is_finite:
            self.skipped_in_a_row = 0
            return
        if self.is_deepspeed_enabled and not gradient_is_finite:
            raise ValueError(
                f"The gradient of step {self.state.global_step + 1} is not finite, and DeepSpeed has applied it: the weights "
                "are lost. Go on from the last checkpoint with `resume_from_checkpoint=True`, and look at what comes before "
                "this step: `grad_norm`, `score/max`, and a lower `learning_rate`."
            )
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:  # these skip an overflow themselves
            self.model_wrapped.zero_grad(set_to_none=True)

    def _gradient_is_finite(self) -> torch.Tensor:
        device = self.accelerator.device
        if self.accelerator.scaler is not None:
            return torch.ones((), dtype=torch.bool, device=device)
        if self.is_deepspeed_enabled:
            engine = self.model_wrapped
            norm = None if engine.fp16_enabled() else engine.get_global_grad_norm()
            return torch.tensor(norm is None or math.isfinite(norm), device=device)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        # Of pieces, under FSDP, each rank looks at its own: the largest over all ranks may be a number where one has NaN.
        pieces = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
        pieces = [piece for piece in pieces if piece.numel() > 0]
        return torch.nn.utils.get_total_norm(pieces, norm_type=torch.inf).isfinite().to(device)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """End the run where steps are skipped in a row: after all that is done at the end of a step, a teacher's too."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.skipped_in_a_row >= self.args.max_skipped_steps:
            raise RunCannotGoOn(
                f"{self.skipped_in_a_row} steps in a row had a loss or a gradient that is not finite and were skipped "
                "(`max_skipped_steps`). Lower `learning_rate`, look at the dtype (float16 overflows where bfloat16 does not), "
                "or at the completions of these steps (`log_completions`)."
            )

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps
            if not self._logged_loss_is_finite:  # transformers puts a mean of others in its place
                logs["loss"] = math.nan
            self._logged_loss_is_finite = True
        super().log(logs, start_time)

    def save_model(self, output_dir=None, _internal_call=False):
        trained = [(name, values) for name, values in self.model.named_parameters() if values.requires_grad]
        broken = [name for name, values in trained if not is_finite(values)]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # each rank has looked at its pieces
            count = gather(torch.tensor([len(broken)], device=self.accelerator.device)).sum().item()
        else:
            count = len(broken)
        if count:
            raise ValueError(
                f"{count} weights of the student hold NaN or infinity ({', '.join(broken[:3]) or 'on another rank'}): it is not "
                "saved. Go on from an earlier checkpoint, with a lower `learning_rate`."
            )
        super().save_model(output_dir, _internal_call)


class SkipStep(TrainerCallback):
    """Asks a [`FiniteStepsMixin`] about each step, where transformers lets a callback know."""

    def __init__(self, trainer: FiniteStepsMixin):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._judge_step()


def is_finite(parameter: torch.Tensor) -> bool:
    """Whether what this process has of a parameter is finite."""
    values = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 leaves an empty one in its place
    values = values.to_local() if hasattr(values, "to_local") else values
    return bool(values.isfinite().all())

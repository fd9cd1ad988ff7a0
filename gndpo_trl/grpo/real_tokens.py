"""Forward passes over real tokens, in scoring and in the loss, for any `GRPOTrainer`."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import gather

from .head_check import HeadCheckMixin
from .hidden_states import Collector, HiddenStates
from .microbatches import Regrouping, select_rows
from .modes import evaluating
from .passes import HeadReader, Passes
from .planning import PassPlanner, sharing_in_run
from .trl_hooks import MULTIMODAL_KEYS, ROW_MEAN_LOSSES, ROW_METRICS, TOKEN_SUM_LOSSES


class RealTokensMixin(HeadCheckMixin):
    """
    Makes a [`~trl.GRPOTrainer`] pay for real tokens: rows without the padding between them, of similar length in a pass.

    Scoring (of the student, of a reference model, of any model through `_per_token_logps`) makes as many forward passes
    as there are micro-batches in the loss, or as `args.scoring_token_budget` demands, without dropout. In training, the
    rows of an optimizer step are distributed anew over its micro-batches; gradient and logged metrics stay those of one
    large micro-batch. Where the rows of a pass have the same prompt, it is computed once, see [`PassPlanner`].
    `pad_to_multiple_of` brings TRL's own layout back.

    TRL scores with the dropout of the training mode. Here old log-probs are those of the whole model, as in the
    reference, while the loss drops out as usual: with dropout, an importance ratio to them is not 1 on unchanged
    weights. Where one optimizer step uses a generation batch, TRL takes the ratio to the loss's own log-probs, and it is.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Which rows share a micro-batch must not change the gradient.
        self._regroups_rows = (
            self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0
            and self.loss_type in (*ROW_MEAN_LOSSES, *TOKEN_SUM_LOSSES)
            and not self._entropy_bonus_enabled
            and self.top_entropy_quantile == 1.0
            and not self.aux_loss_enabled
            and self.pad_to_multiple_of is None
        )
        self._regrouping = None
        self._passes = Passes(
            super()._get_per_token_logps_and_entropies,
            self.accelerator,
            keeps_padding=self.pad_to_multiple_of is not None,  # asked for, to compile few shapes
        )
        self._planner = PassPlanner(self._passes, sharing_in_run(self), self.aux_loss_enabled)
        self._window_metrics = {}  # of the micro-batches since the last optimizer step: name -> [(value, weight)]

    def _begin_run(self):
        super()._begin_run()
        self._regrouping = None
        self._window_metrics.clear()

    def _per_token_logps(
        self, model: torch.nn.Module, rollout: dict[str, Any], batch_size: int | None = None
    ) -> torch.Tensor:
        """
        Log-probs `(B, T)`, without gradient, of a rollout's completion tokens under a model with a fused head, in passes over
        `batch_size` rows on average; `None`: over as many as a micro-batch has.
        """
        if batch_size is None:
            args = self.args
            batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
                torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1),
                rollout["completion_ids"].size(1),
                batch_size=batch_size,
                **{key: rollout[key] for key in MULTIMODAL_KEYS if key in rollout},
            )
        return logps

    def _hidden_states(
        self,
        model: torch.nn.Module,
        rollout: dict[str, Any],
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> HiddenStates:
        """Last hidden states of a rollout's completion tokens, where `_per_token_logps` gives their log-probs."""
        collector = Collector(rollout["completion_mask"], device)
        with self._reading_head(collector):
            self._per_token_logps(model, rollout, batch_size)
        return collector.collected(self._passes.core(model).get_output_embeddings())

    def _reading_head(self, reader: HeadReader) -> AbstractContextManager[None]:
        """Passes in this context hand hidden states and LM head to `reader`, which says what the head returns."""
        return self._passes.reading_head(reader)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self._regroups_rows or not self.model.training:
            return inputs
        if self._buffered_inputs is not before:
            groups = self._planner.plan_loss(self.model, self._buffered_inputs)
            self._regrouping = Regrouping(self._buffered_inputs, groups, gather)
        return self._regrouping[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model, inputs):
        if "row_share" not in inputs:
            return super()._compute_loss(model, inputs)
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        loss = super()._compute_loss(model, inputs)
        for name, values in metrics.items():
            if len(values) > before.get(name, 0):
                is_per_row = name in ROW_METRICS or (self.importance_sampling_level == "sequence" and "clip" in name)
                weight = inputs["num_rows"] if is_per_row else inputs["num_tokens"]
                self._window_metrics.setdefault(name, []).append((values.pop(), weight))
        if self.accelerator.sync_gradients:
            for name, parts in self._window_metrics.items():
                metrics[name].append(combine(name, parts))
            self._window_metrics.clear()
        return loss * inputs["row_share"] if self.loss_type in ROW_MEAN_LOSSES else loss

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        multimodal = {key: value for key, value in multimodal.items() if value is not None}
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **multimodal}
        rows = {
            "prompt_ids": input_ids[:, :-logits_to_keep],
            "prompt_mask": attention_mask[:, :-logits_to_keep],
            "completion_ids": input_ids[:, -logits_to_keep:],
            "completion_mask": attention_mask[:, -logits_to_keep:],
            **multimodal,
        }
        self._check_head(model, rows)
        if self._passes.reader is not None:
            places = torch.arange(rows["completion_ids"].numel(), device=input_ids.device)
            batch["places"] = places.view(rows["completion_ids"].shape)
        if batch_size is None:  # a micro-batch of the loss
            prompts = self._planner.prompts_of_micro_batch(model, rows)
            return self._forward(model, batch, logits_to_keep, prompts, **options)

        budget = getattr(self.args, "scoring_token_budget", None)
        num_passes = math.ceil(len(input_ids) / batch_size) if budget is None else None
        groups, prompts = self._planner.plan_scoring(model, rows, num_passes, budget)
        with evaluating(model):
            parts = []
            for group in groups:
                of_group = None if prompts is None else [prompts[row] for row in group]
                parts.append(self._forward(model, select_rows(batch, group), logits_to_keep, of_group, **options))
        original_order = torch.tensor(sum(groups, [])).argsort()
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logps)[original_order],
            torch.cat(entropies)[original_order] if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _forward(self, *args, **kwargs):
        """Every forward pass of scoring and of the loss, see [`Passes.run`]."""
        return self._passes.run(*args, **kwargs)


def combine(name: str, parts: list[tuple[float, float]]) -> float:
    """One metric of several micro-batches: the weighted mean of the parts (value, weight), or their minimum or maximum."""
    numbers = [(value, weight) for value, weight in parts if not math.isnan(value)]
    if not numbers:
        return math.nan
    if name.endswith(("min", "max")):
        return (min if name.endswith("min") else max)(value for value, _ in numbers)
    total = sum(weight for _, weight in numbers)
    return sum(value * weight for value, weight in numbers) / total if total > 0 else 0.0

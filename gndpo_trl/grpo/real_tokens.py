"""Forward passes over real tokens, in scoring and in the loss, for any `GRPOTrainer`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather

from .hidden_states import Collector, HiddenStates
from .microbatches import LeftAligned, Regrouping, plan_by_length, select_rows
from .modes import evaluating
from .sharing import SharingMixin
from .trl_hooks import (
    MULTIMODAL_KEYS,
    ROW_MEAN_LOSSES,
    ROW_METRICS,
    TOKEN_SUM_LOSSES,
    HeadCall,
    HeadFields,
    lm_head_read_by,
    real_tokens_in_lm_head,
)


# Gets the place of each scored position, `row * T + token` of the batch, and what the LM head got.
HeadReader = Callable[[torch.Tensor, HeadCall], HeadFields]


class RealTokensMixin(SharingMixin):
    """
    Makes a [`~trl.GRPOTrainer`] pay for real tokens: rows without the padding between them, of similar length in a pass.

    Scoring (of the student, of a reference model, of any model through `_per_token_logps`) makes as many forward passes
    as there are micro-batches in the loss, or as `args.scoring_token_budget` demands, without dropout. In training, the
    rows of an optimizer step are distributed anew over its micro-batches; gradient and logged metrics stay those of one
    large micro-batch. Where the rows of a pass have the same prompt, it is computed once, see [`SharingMixin`].
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
        self._head_reader = None
        self._window_metrics = {}  # of the micro-batches since the last optimizer step: name -> [(value, weight)]

    def _begin_run(self):
        super()._begin_run()
        self._regrouping = None
        self._window_metrics.clear()

    def _per_token_logps(self, model: torch.nn.Module, rollout: dict[str, Any]) -> torch.Tensor:
        """Log-probs `(B, T)`, without gradient, of a rollout's completion tokens under a model with a fused head."""
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

    def _hidden_states(self, model: torch.nn.Module, rollout: dict[str, Any]) -> HiddenStates:
        """Last hidden states of a rollout's completion tokens, where `_per_token_logps` gives their log-probs."""
        collector = Collector(rollout["completion_mask"])
        with self._reading_head(collector):
            self._per_token_logps(model, rollout)
        return collector.collected(self._core(model).get_output_embeddings())

    @contextmanager
    def _reading_head(self, reader: HeadReader) -> Iterator[None]:
        """Passes in this context hand hidden states and LM head to `reader`, which says what the head returns."""
        self._head_reader = reader
        try:
            yield
        finally:
            self._head_reader = None

    def _read_head(self, places: torch.Tensor | None):
        """Context of a pass whose scored positions are those of `places`; `None` for passes that nobody reads."""
        if places is None:
            return nullcontext()
        reader = self._head_reader
        return lm_head_read_by(lambda call: reader(places, call))

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self._regroups_rows or not self.model.training:
            return inputs
        if self._buffered_inputs is not before:
            self._regrouping = self._regroup(self._buffered_inputs)
        return self._regrouping[self._step % self.args.steps_per_generation]

    def _regroup(self, batches: list[dict[str, Any]]) -> Regrouping:
        lengths = torch.cat([batch["prompt_mask"].sum(-1) + batch["completion_mask"].sum(-1) for batch in batches])
        groups, costs = plan_by_length(lengths, num_groups=len(batches), gather=gather)
        sharing = self._plan_sharing(self.model, batches, costs, in_loss=True)
        return Regrouping(batches, groups if sharing is None else sharing[0].passes, gather)

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
        if self._head_reader is not None:
            places = torch.arange(rows["completion_ids"].numel(), device=input_ids.device)
            batch["places"] = places.view(rows["completion_ids"].shape)
        if batch_size is None:  # a micro-batch of the loss
            prompts = self._prompts_of_micro_batch(model, rows)
            if prompts is not None:
                return self._forward_shared(model, batch, logits_to_keep, prompts, **options)
            return self._forward(model, batch, logits_to_keep, **options)

        budget = getattr(self.args, "scoring_token_budget", None)
        num_groups = math.ceil(len(input_ids) / batch_size) if budget is None else None
        lengths = attention_mask.sum(-1)
        if self.pad_to_multiple_of is not None:  # what will be computed
            lengths = torch.full_like(lengths, attention_mask.size(1))
        groups, costs = plan_by_length(lengths, num_groups=num_groups, token_budget=budget, gather=gather)
        forward, prompts = self._forward, None
        sharing = self._plan_sharing(model, [rows], costs, token_budget=budget)
        if sharing is not None:
            groups, prompts, forward = sharing[0].passes, sharing[1], self._forward_shared
        with evaluating(model):
            parts = []
            for group in groups:
                shared = {} if prompts is None else {"prompts": [prompts[row] for row in group]}
                parts.append(forward(model, select_rows(batch, group), logits_to_keep, **shared, **options))
        original_order = torch.tensor(sum(groups, [])).argsort()
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logps)[original_order],
            torch.cat(entropies)[original_order] if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _forward(self, model, batch: dict[str, Any], logits_to_keep: int, **options):
        """TRL's forward pass on rows without the padding between and before them; results are `(B, T)` as in TRL."""
        score = super()._get_per_token_logps_and_entropies
        attention_mask, places = batch["attention_mask"], batch.pop("places", None)
        if places is not None:  # positions are scored row after row
            places = places[attention_mask[:, -logits_to_keep:].bool()]
        if self.pad_to_multiple_of is not None:  # asked for padding, to compile few shapes
            with self._read_head(places):
                return score(model, logits_to_keep=logits_to_keep, **batch, **options)
        rows = LeftAligned(attention_mask, logits_to_keep)
        for key in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & batch.keys():
            batch[key] = rows.align(batch[key])

        def forward(labels, **inputs):
            return model(labels=rows.mask_labels(labels), **inputs)

        with real_tokens_in_lm_head(attention_mask.device), self._read_head(places):
            logps, entropies, aux_loss = score(forward, logits_to_keep=rows.logits_to_keep, **batch, **options)
        return rows.restore(logps), entropies if entropies is None else rows.restore(entropies), aux_loss


def combine(name: str, parts: list[tuple[float, float]]) -> float:
    """One metric of several micro-batches: the weighted mean of the parts (value, weight), or their minimum or maximum."""
    numbers = [(value, weight) for value, weight in parts if not math.isnan(value)]
    if not numbers:
        return math.nan
    if name.endswith(("min", "max")):
        return (min if name.endswith("min") else max)(value for value, _ in numbers)
    total = sum(weight for _, weight in numbers)
    return sum(value * weight for value, weight in numbers) / total if total > 0 else 0.0

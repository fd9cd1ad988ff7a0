"""`importance_sampling_level="sequence_token"`, GSPO-token's importance ratio, for any `GRPOTrainer`."""

from typing import Any

import torch

from ..objective.importance import sequence_token_logps
from .microbatches import loss_mask
from .trl_hooks import without_advice_on_levels


class SequenceTokenMixin:
    """
    Gives a [`~trl.GRPOTrainer`] the level `"sequence_token"`, with every loss: see [`sequence_token_logps`].

    TRL knows "token" and "sequence". Its token-level ratio is formed from two log-probs; they are exchanged from within
    the forward pass of the loss, which reads the old ones only afterwards.
    """

    def __init__(self, *args, **kwargs):
        with without_advice_on_levels():
            super().__init__(*args, **kwargs)
        self._is_sequence_token = self.importance_sampling_level == "sequence_token"
        if self._is_sequence_token:
            self.importance_sampling_level = "token"
        self._loss_inputs = None

    def _compute_loss(self, model, inputs):
        self._loss_inputs = dict(inputs)
        try:
            return super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_inputs is not None:
            logps = self._adapt_loss_inputs(logps, self._loss_inputs)
        return logps, entropies, aux_loss

    def _adapt_loss_inputs(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """What the loss reads after its forward pass, where that depends on the log-probs `(B, T)` of this pass."""
        if not self._is_sequence_token:
            return logps
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        logps, inputs["old_per_token_logps"] = sequence_token_logps(logps, old_logps, loss_mask(inputs))
        return logps

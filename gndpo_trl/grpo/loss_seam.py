"""The one way into TRL's loss after its forward pass: the advantages that it then takes, and GSPO-token's ratio."""

from contextlib import nullcontext
from typing import Any

import torch

from ..objective.importance import sequence_token_logps
from .microbatches import loss_mask
from .real_tokens import HeadReader
from .trl_hooks import without_advice_on_levels


class Surrogate:
    """
    What a trainer has to say within TRL's loss. This one says nothing.

    `inputs` is a micro-batch as TRL's loss reads it.
    """

    def head_reader(self, inputs: dict[str, Any]) -> HeadReader | None:
        """
        What is to read the LM head in the forward pass, see [`RealTokensMixin`]; `None`: it computes log-probs. Called
        before that pass, and may make others.
        """

    def advantages_in_loss(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Advantages `(B, T)`, or `(B,)`, that the loss takes.

        Args:
            logps (`torch.Tensor` of shape `(B, T)`): Log-probs of this forward pass, in nats.
            inputs (`dict`): The micro-batch; its `old_per_token_logps` are not the ratio's yet.
        """
        return inputs["advantages"]


class LossSeamMixin:
    """
    Gives a [`~trl.GRPOTrainer`] a [`Surrogate`] in its loss, which acts from within the forward pass: TRL reads the old
    log-probs and the advantages only afterwards.
    """

    surrogate = Surrogate()
    # Of the loss in progress: the micro-batch that it reads, and what reads its LM head.
    _in_loss: tuple[dict[str, Any], HeadReader | None] | None = None

    def _compute_loss(self, model, inputs):
        inputs = dict(inputs)
        self._in_loss = inputs, self.surrogate.head_reader(inputs)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._in_loss = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._in_loss is None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs, reader = self._in_loss
        with nullcontext() if reader is None else self._reading_head(reader):
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs["advantages"] = self.surrogate.advantages_in_loss(logps, inputs)
        return self._set_ratio(logps, inputs), entropies, aux_loss

    def _set_ratio(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probs, and in `inputs` old ones, whose token-level ratio is the one of the configured level."""
        return logps


class SequenceTokenMixin(LossSeamMixin):
    """
    Gives a [`~trl.GRPOTrainer`] the level `"sequence_token"`, with every loss: see [`sequence_token_logps`].

    TRL knows "token" and "sequence". Its token-level ratio is formed from two log-probs, which are exchanged here.
    """

    def __init__(self, *args, **kwargs):
        with without_advice_on_levels():
            super().__init__(*args, **kwargs)
        self._is_sequence_token = self.importance_sampling_level == "sequence_token"
        if self._is_sequence_token:
            self.importance_sampling_level = "token"

    def _set_ratio(self, logps, inputs):
        if not self._is_sequence_token:
            return logps
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps.detach() if old_logps is None else old_logps
        logps, inputs["old_per_token_logps"] = sequence_token_logps(logps, old_logps, loss_mask(inputs))
        return logps

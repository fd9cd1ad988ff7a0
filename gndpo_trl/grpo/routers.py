"""Routers of mixture-of-experts models: their logits are computed where TRL's auxiliary loss wants them, and there alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .branch_attention import core_of


@contextmanager
def quiet_routers(model: torch.nn.Module) -> Iterator[None]:
    """
    A model, unwrapped, gives the logits of its routers only to calls that ask for them, whatever its configuration says.
    With them it makes an auxiliary loss, which takes an attention mask as wide as the row: there is none where rows share
    their prompts, nor where cached keys are longer than the row.
    """
    config = core_of(model).config.get_text_config()
    asks = getattr(config, "output_router_logits", False)
    if asks:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asks:
            config.output_router_logits = True


def check_routers(model: torch.nn.Module, aux_loss_enabled: bool) -> None:
    """
    Raise where a student is to have an auxiliary loss of routers, and has none.

    Args:
        model (`torch.nn.Module`): The student, not wrapped for training.
        aux_loss_enabled (`bool`): Whether TRL adds that loss.

    Raises:
        `ValueError`: naming `mlp_only_layers` or `decoder_sparse_step`, whichever leaves no layer to the experts.
    """
    if not aux_loss_enabled:
        return
    config = core_of(model).config.get_text_config()
    dense, every = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    if any(layer not in dense and (layer + 1) % every == 0 for layer in layers):
        return
    raise ValueError(
        f"`model` ({type(core_of(model)).__name__}) has no layer with experts: of {len(layers)} layers, `mlp_only_layers` "
        f"leaves out {list(dense)}, and `decoder_sparse_step` is {every}. There are no routers for the auxiliary loss that "
        "TRL adds: set `router_aux_loss_coef` to 0."
    )

"""Training and evaluation mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as the context lasts, and then for each module the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:
        # In evaluation mode on CPUs, bitsandbytes repacks 4-bit weights for good, in a form that cannot be trained on.
        module.training = training and hasattr(module, "quant_state")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

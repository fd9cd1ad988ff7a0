"""Frozen weights that live in CPU memory and visit the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


ALIGNMENT = 256  # bytes, as the allocators of PyTorch align tensors on devices


class OffloadedWeights:
    """
    Weights of a frozen model that live in CPU memory and visit a device.

    They lie in blocks, since CUDA rounds every piece of pinned memory up to a power of two, and since few large copies are
    faster than many small ones. From pinned memory the copies are asynchronous: the first layers compute while the last
    ones are on their way. Nothing is copied back, as frozen weights do not change.

    Args:
        model (`torch.nn.Module`): Model on the CPU; its weights are moved into the blocks.
        device (`torch.device`): Where they visit.
        block_bytes (`int`, *optional*, defaults to 1 GiB): Size of a block. A larger tensor gets a block of its own.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, block_bytes: int = 2**30):
        self.device = device
        self.tensors = [*model.parameters(), *model.buffers()]
        self.places, sizes, free = [], [], 0  # of each tensor: its block and the first of its bytes
        for tensor in self.tensors:
            num_bytes = tensor.numel() * tensor.element_size()
            if num_bytes > free:
                sizes.append(0)
                free = max(block_bytes, num_bytes)
            self.places.append((len(sizes) - 1, sizes[-1]))
            aligned = -(-num_bytes // ALIGNMENT) * ALIGNMENT
            sizes[-1] += aligned
            free -= aligned
        self.blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for size in sizes]
        for tensor, data in zip(self.tensors, self._views(self.blocks), strict=True):
            tensor.data = data.copy_(tensor.data)

    def _views(self, blocks: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tensor, (block, start) in zip(self.tensors, self.places, strict=True):
            end = start + tensor.numel() * tensor.element_size()
            yield blocks[block][start:end].view(tensor.dtype).view(tensor.shape)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Weights on the device for as long as the context lasts."""
        at_home = [tensor.data for tensor in self.tensors]
        try:
            visiting = [block.to(self.device, non_blocking=True) for block in self.blocks]
            for tensor, data in zip(self.tensors, self._views(visiting), strict=True):
                tensor.data = data
            yield
        finally:
            for tensor, data in zip(self.tensors, at_home, strict=True):
                tensor.data = data

"""Last hidden states of completion tokens, and the LM head that makes distributions of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..objective.distributions import LMHead, chunks
from ..objective.likeliest import LikeliestTokens, keep_likeliest
from .trl_hooks import HeadCall, HeadFields, maybe_gather_lm_head_ctx


@dataclass
class HiddenStates:
    """
    What a model knows of the completions of a rollout.

    Attributes:
        rows (`list[torch.Tensor]`): For each completion its `(T_i, H)` last hidden states, those that predict its tokens, in
            CPU memory, unless they were asked for elsewhere, and in the dtype that the head computes in; or `(T_i, K, 2)`, what
            is known of a few tokens, see [`~objective.likeliest.LikeliestTokens`].
        head ([`LMHead`] or [`~objective.likeliest.LikeliestTokens`], *optional*): The model's, with its parameters, which ZeRO-3
            and FSDP shard.
        heads (`list[LMHead | None]`, *optional*): All heads, where the rows come from several models, `None` for those that
            have no row in any process.
        head_of_row (`list[int]`, *optional*): Number of each row's head in `heads`.
    """

    rows: list[torch.Tensor]
    head: LMHead | LikeliestTokens | None = None
    heads: list[LMHead | LikeliestTokens | None] = field(default_factory=list)
    head_of_row: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.heads = self.heads or [self.head]
        self.head_of_row = self.head_of_row or [0] * len(self.rows)

    def at(
        self, rows: torch.Tensor, columns: torch.Tensor
    ) -> Iterator[tuple[slice | torch.Tensor, LMHead, torch.Tensor]]:
        """
        The states of `N` positions, model by model. Also of a model that has none of them: other processes gather its head.

        Args:
            rows (`torch.Tensor` of shape `(N,)`), columns (`torch.Tensor` of shape `(N,)`): The positions.

        Yields:
            `tuple[slice | torch.Tensor, LMHead, torch.Tensor]`: which of the positions are the model's, its head, and its
            states there, on the device of `rows`.
        """
        numbers = torch.tensor(self.head_of_row, device=rows.device)
        lengths = torch.tensor([len(of_row) for of_row in self.rows], device=rows.device)
        for number, head in enumerate(self.heads):
            if head is None:
                continue
            is_its = numbers == number
            mine = slice(None) if len(self.heads) == 1 else is_its[rows].nonzero().squeeze(1)
            its_lengths = lengths * is_its
            starts = its_lengths.cumsum(0) - its_lengths
            states = [of_row for of_row, its in zip(self.rows, self.head_of_row, strict=True) if its == number]
            states = torch.cat(states or [torch.zeros(0, 1)]).to(rows.device)
            yield mine, head, states[starts[rows[mine]] + columns[mine]]


def head_of(call: HeadCall) -> LMHead:
    """The head as TRL's fused one computes it: in the dtype of autocast, if that is on."""
    device_type = call.hidden.device.type
    is_cast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_cast else call.hidden.dtype
    return LMHead(call.weight, call.bias, dtype, call.temperature, call.softcap, call.scale)


def gathered(weights: list[torch.Tensor]) -> AbstractContextManager:
    """Context in which parameters that ZeRO-3 shards are whole; copies, which are no parameters, are so anyway."""
    return maybe_gather_lm_head_ctx(*filter(is_parameter, weights))


def is_parameter(weight: torch.Tensor) -> bool:
    return isinstance(weight, torch.nn.Parameter)


@torch.no_grad()
def keep_top_k(states: HiddenStates, rollout: dict[str, Any], top_k: int) -> HiddenStates:
    """
    What is known of `top_k` tokens and the sampled one at each position, in the place of hidden states of a single model. All
    ranks that share its head call it together.
    """
    ids, mask = rollout["completion_ids"], rollout["completion_mask"].bool()
    rows = []
    with gathered(states.head.parameters):
        head = states.head.on(ids.device)
        for hidden, sampled in zip(states.rows, ids[mask].split([len(row) for row in states.rows]), strict=True):
            parts = []
            for chunk in chunks(max(len(hidden), 1), ids.device):
                log_probs = head.logits(hidden[chunk].to(ids.device)).log_softmax(-1)
                parts.append(keep_likeliest(log_probs, sampled[chunk], top_k).cpu())
            rows.append(torch.cat(parts))
    return HiddenStates(rows, LikeliestTokens(len(head.weight)))


class Collector:
    """
    Reads the hidden states of forward passes that score a rollout, in whichever order and grouping they do that. The
    log-probs of these passes are zeros: the head projects nothing.

    Args:
        completion_mask (`torch.Tensor` of shape `(B, T)`): The rollout's.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where they are kept.
    """

    def __init__(self, completion_mask: torch.Tensor, device: torch.device | str = "cpu"):
        self.num_rows, self.width = completion_mask.shape
        self.device = device
        self.rows, self.head = {}, None

    def __call__(self, places: torch.Tensor, call: HeadCall) -> HeadFields:
        self.head = head_of(call)
        order = places.argsort()
        hidden = call.hidden.detach()[order].to(self.device, self.head.dtype)
        rows, lengths = (places[order] // self.width).unique_consecutive(return_counts=True)
        for row, of_row in zip(rows.tolist(), hidden.split(lengths.tolist()), strict=True):
            self.rows[row] = of_row.clone()  # memory of its own: no row keeps the others when the batch is split
        self.nothing = hidden[:0].clone()
        return call.hidden.new_zeros(len(places), dtype=torch.float32), None, None, None, None

    def collected(self, lm_head: torch.nn.Module) -> HiddenStates:
        """What was read; `lm_head` is the head as the model holds it, since FSDP frees what it gathers for a pass."""
        self.head.weight, self.head.bias = lm_head.weight, lm_head.bias
        return HiddenStates([self.rows.get(row, self.nothing) for row in range(self.num_rows)], self.head)

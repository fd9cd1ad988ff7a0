"""What a rollout is: the batch that `GRPOTrainer._generate_and_score_completions` returns, and who may trust it."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .microbatches import loss_mask


def valid_tokens(rollout: dict[str, Any]) -> torch.Tensor:
    """`(B, T)` mask of the tokens that take part in the loss: no padding, no tool output, nothing vLLM dropped."""
    mask = loss_mask(rollout).bool()
    if "importance_sampling_ratio" in rollout:
        mask = mask & (rollout["importance_sampling_ratio"] != 0)
    return mask


def leave_out(rollout: dict[str, Any], tokens: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """
    Take tokens out of the loss: nothing of it, no ratio and no mean, depends on them any more.

    Args:
        rollout (`dict`): Rollout, changed in place.
        tokens (`torch.Tensor` of shape `(B, T)`): True on the tokens to leave out.
        gather (`Callable`): Concatenates a tensor along its first dimension over all ranks, which call this together.
    """
    if gather(tokens.sum().unsqueeze(0)).sum() == 0:
        return
    kept = (~tokens).to(rollout["completion_mask"].dtype)
    rollout["tool_mask"] = rollout["tool_mask"] * kept if "tool_mask" in rollout else kept
    rollout["num_items_in_batch"] = gather(loss_mask(rollout).sum().unsqueeze(0)).sum()


def check_finite(
    who: str, logps: torch.Tensor, rollout: dict[str, Any], mask: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Raise where a model gave no usable log-prob for a valid token.

    Args:
        who (`str`): The model, for the message: `"teacher"` or `"student"`.
        logps (`torch.Tensor` of shape `(B, T)`): Its log-probs, in nats.
        rollout (`dict`): The rollout that they belong to.
        mask (`torch.Tensor` of shape `(B, T)`): True on valid tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes the prompt that the message quotes.

    Raises:
        `ValueError`: with the counts, the first prompt and what to look at.
    """
    wrong = ~logps.isfinite() & mask
    if not wrong.any():
        return
    row = wrong.any(-1).nonzero()[0].item()
    prompt = tokenizer.decode(rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()])
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    raise ValueError(
        f"The {who} gave non-finite log-probs for {wrong.sum().item()} of {mask.sum().item()} tokens, in "
        f"{wrong.any(-1).sum().item()} of {len(mask)} completions on rank {rank} "
        f"(NaN: {(logps.isnan() & mask).sum().item()}, infinite: {(logps.isinf() & mask).sum().item()}). First "
        f"prompt: {prompt[-500:]!r}. Check the {who}'s weights and dtype (float16 overflows where bfloat16 does not)."
    )


def check_images_were_kept(rollout: dict[str, Any], max_completion_length: int) -> None:
    """Raise `ValueError` if TRL dropped the images of a batch, which it marks by `num_images=None` and does silently."""
    if rollout.get("num_images", 0) is None:
        raise ValueError(
            "A tool returned an image whose placeholder tokens were cut off at `max_completion_length` "
            f"({max_completion_length}), and TRL dropped all images of the batch from the forward pass. Raise "
            "`max_completion_length`, or have the tool return smaller images."
        )

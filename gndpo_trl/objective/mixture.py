"""What a teacher says of every token and what a reward says of the whole completion, in one advantage."""

import torch


def mix_advantages(
    distillation: torch.Tensor,
    reward: torch.Tensor,
    mask: torch.Tensor,
    distillation_coef: float = 1.0,
    reward_coef: float = 0.0,
) -> torch.Tensor:
    """
    `distillation_coef · A_distillation + reward_coef · A_reward`, the latter the same for all tokens of a completion.

    Args:
        distillation (`torch.Tensor` of shape `(B, T)`): Advantages from a teacher's scores, see
            [`~advantages.Population`]; 0 on tokens that it says nothing of.
        reward (`torch.Tensor` of shape `(B,)`): Advantages of the completions from their rewards, as in GRPO.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on the tokens that take part in the loss.
        distillation_coef (`float`, *optional*, defaults to `1.0`): Weight of the teacher.
        reward_coef (`float`, *optional*, defaults to `0.0`): Weight of the rewards. At 0 they are not looked at.

    Returns:
        `torch.Tensor` of shape `(B, T)`, of the dtype of `distillation`: advantages, 0 on masked tokens.
    """
    distillation = distillation.masked_fill(mask == 0, 0.0)
    if reward_coef == 0:
        return distillation_coef * distillation
    rewards = reward.to(distillation).unsqueeze(-1).masked_fill(mask == 0, 0.0)
    return distillation_coef * distillation + reward_coef * rewards

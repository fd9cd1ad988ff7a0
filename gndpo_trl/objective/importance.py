"""The importance ratio of GSPO-token (section 4.3 of https://huggingface.co/papers/2507.18071), as a pure function."""

import torch


# The reference caps the log ratio here before exponentiating.
MAX_LOG_RATIO = 10.0


def sequence_log_ratio(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`(B,)` log ratio of each completion, without gradient: the mean over its valid tokens of `logp_t - old_logp_t`."""
    valid = mask != 0
    log_ratio = (per_token_logps.detach() - old_per_token_logps).masked_fill(~valid, 0.0)
    return log_ratio.sum(-1) / valid.sum(-1).clamp(min=1)


def sequence_token_logps(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probs whose *token-level* ratio is GSPO-token's: the value of the sequence ratio, a gradient for each token.

    GSPO-token weighs every token of completion `i` with

        w[i,t] = exp(min(sg[log s_i] + logp_t - sg[logp_t], 10))    log s_i = mean over valid t of (logp_t - old_logp_t)

    TRL forms its token-level ratio as `exp(per_token_logps - old_per_token_logps)`. The pair returned here makes that
    expression equal to `w`, in value and in gradient, so that every loss of TRL can be used unchanged. The sum and the
    mean over the valid tokens of the log ratio stay what they were.

    Args:
        per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probs under the current student, in nats.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probs under the student at sampling time.
        mask (`torch.Tensor` of shape `(B, T)`): Nonzero on valid tokens.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, each of shape `(B, T)`: the current log-probs, without gradient on the
        completions whose ratio reached the cap, and the old log-probs that go with them.
    """
    log_sequence_ratio = sequence_log_ratio(per_token_logps, old_per_token_logps, mask).unsqueeze(-1)
    capped = log_sequence_ratio > MAX_LOG_RATIO
    per_token_logps = torch.where(capped, per_token_logps.detach(), per_token_logps)
    return per_token_logps, per_token_logps.detach() - log_sequence_ratio.clamp(max=MAX_LOG_RATIO)

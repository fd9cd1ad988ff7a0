"""GSPO-token's ratio against the paper's own loss and gradient."""

import torch

from gndpo_trl.objective.importance import MAX_LOG_RATIO, sequence_token_logps


def clipped_loss(logps, old_logps, advantages, mask, epsilon):
    """Sequence-mean of token-means of the clipped surrogate, as the specification states it."""
    ratio = torch.exp(logps - old_logps)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return (-(surrogate * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def test_loss_and_gradient_equal_the_reference(reference_vectors):
    for case in reference_vectors:
        logps = case["current_logps"].clone().requires_grad_()
        pair = sequence_token_logps(logps, case["old_logps"], case["mask"])
        loss = clipped_loss(*pair, case["gndpo_advantages"], case["mask"], case["epsilon"])
        (gradient,) = torch.autograd.grad(loss, logps)
        assert abs(loss.item() - case["gspo_token_loss"]) < 1e-9
        torch.testing.assert_close(gradient, case["gspo_token_grad"], rtol=0, atol=1e-9)


def test_every_token_has_the_sequence_ratio_and_its_own_gradient():
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 5, dtype=torch.float64, generator=generator)
    logps = (old + 0.1 * torch.randn(3, 5, dtype=torch.float64, generator=generator)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    new_logps, new_old = sequence_token_logps(logps, old, mask)
    ratio = torch.exp(new_logps - new_old)
    expected = torch.exp(((logps - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).detach()
    torch.testing.assert_close(ratio.detach(), expected.unsqueeze(1).expand_as(ratio))
    weights = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((ratio * weights).sum(), logps)
    torch.testing.assert_close(gradient, ratio.detach() * weights)


def test_masked_tokens_do_not_enter_the_ratio():
    old, logps = torch.zeros(1, 3), torch.tensor([[0.1, float("nan"), float("inf")]])
    new_logps, new_old = sequence_token_logps(logps, old, torch.tensor([[1, 0, 0]]))
    torch.testing.assert_close((new_logps - new_old)[:, 0], torch.tensor([0.1]))


def test_the_log_ratio_is_capped_and_then_has_no_gradient():
    old = torch.full((1, 2), -30.0)
    logps = torch.zeros(1, 2, requires_grad=True)
    new_logps, new_old = sequence_token_logps(logps, old, torch.ones(1, 2))
    assert torch.equal(new_logps - new_old, torch.full((1, 2), MAX_LOG_RATIO))
    assert not new_logps.requires_grad or torch.autograd.grad(new_logps.sum(), logps)[0].abs().sum() == 0

"""GSPO-token's ratio against the paper's own loss and gradient."""

import warnings

import pytest
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


# Losses that make a ratio of their own


@pytest.fixture
def loss_and_gradient(make_trainer):
    """`loss_and_gradient(loss_type, level)` on a rollout of an older student; "sequence" is TRL's own."""

    def compute(loss_type: str, level: str) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = make_trainer(loss_type=loss_type)
        trainer.model.train()
        torch.manual_seed(0)
        rollout = trainer._generate_and_score_completions([trainer.train_dataset[index // 2] for index in range(8)])
        logps = trainer._per_token_logps(trainer.model, rollout)
        rollout["old_per_token_logps"] = logps + 0.1 * torch.randn(logps.shape)
        if loss_type == "luspo":  # TRL's sequence ratio has one advantage per row
            rollout["advantages"] = torch.randn(8)
        trainer._is_sequence_token = level == "sequence_token"
        trainer.importance_sampling_level = "sequence" if level == "sequence" else "token"
        trainer.current_gradient_accumulation_steps = 1  # set by `train`
        loss = trainer._compute_loss(trainer.model, rollout)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        return loss.detach(), gradient

    return compute


@pytest.mark.parametrize("other_level, is_equal", [("sequence", True), ("token", False)])
def test_sequence_token_is_the_ratio_of_luspo(loss_and_gradient, other_level, is_equal):
    loss, gradient = loss_and_gradient("luspo", "sequence_token")
    other_loss, other_gradient = loss_and_gradient("luspo", other_level)
    assert torch.allclose(loss, other_loss, rtol=1e-5) == is_equal
    assert torch.allclose(gradient, other_gradient, rtol=1e-4, atol=1e-6) == is_equal
    assert gradient.abs().max() > 1e-2


def test_vespo_is_the_same_at_either_level(loss_and_gradient):
    loss, gradient = loss_and_gradient("vespo", "sequence_token")
    other_loss, other_gradient = loss_and_gradient("vespo", "token")
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradient, other_gradient)
    assert gradient.abs().max() > 1e-2


def test_a_level_that_does_not_fit_the_loss_is_warned_about(make_config):
    with pytest.warns(UserWarning, match='`importance_sampling_level` is "token".*"luspo".*Set "sequence_token"'):
        make_config(loss_type="luspo", importance_sampling_level="token")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "vespo"):
            for level in ("sequence_token", "token"):
                make_config(loss_type=loss, importance_sampling_level=level)
        make_config(loss_type="luspo", importance_sampling_level="sequence_token")


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "luspo"},
        {"loss_type": "vespo"},
        {"loss_type": "luspo", "importance_sampling_level": "token"},
    ],
)
@pytest.mark.filterwarnings("ignore:`importance_sampling_level`")
def test_trl_does_not_advise_levels_that_are_refused_or_make_no_difference(make_trainer, caplog, options):
    make_trainer(**options)
    assert not [record for record in caplog.records if "importance_sampling_level" in record.getMessage()]

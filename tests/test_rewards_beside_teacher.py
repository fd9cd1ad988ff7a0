"""Rewards beside the teacher: each part alone is what it is without the other, and together they are their sum."""

import pytest
import torch
from helpers import canned, gradients, make_rollout, reward
from trl import GRPOTrainer

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.objective.mixture import mix_advantages


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_rewards_alone_give_the_gradients_of_grpo(make, checkpoints, loss_type, scale_rewards):  # noqa: F811
    options = {"loss_type": loss_type, "scale_rewards": scale_rewards, "importance_sampling_level": "token"}
    options.update(lr_scheduler_type="constant", weight_decay=0.01)
    expected = gradients(make(GRPOTrainer, **options))
    teacher = {"teacher_model": checkpoints["qwen3-teacher"]}
    ours = make(GNDPOTrainer, GNDPOConfig, trainer_options=teacher, distillation_coef=0, reward_coef=1, **options)
    found = gradients(ours)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    entry = ours.state.log_history[0]
    assert entry["rewards/reward/mean"] == entry["reward"] and entry["score/std"] > 0  # the teacher is still watched


def test_the_two_parts_add_up(make_trainer):
    def advantages(distillation: float, rewards: float, **options):
        options = {"distillation_coef": distillation, "reward_coef": rewards, **options}
        trainer = make_trainer(per_device_train_batch_size=8, trainer_options={"reward_funcs": reward}, **options)
        rollout = make_rollout(trainer)
        return rollout["advantages"], valid_tokens(rollout)

    (teacher, mask), (rewards, _) = advantages(1, 0), advantages(0, 1)
    both, _ = advantages(0.5, 2)
    torch.testing.assert_close(both, 0.5 * teacher + 2 * rewards, rtol=0, atol=1e-6)
    assert not both[~mask].any() and rewards[mask].abs().max() > 0.1
    rows = [row[valid].unique() for row, valid in zip(rewards, mask, strict=True)]
    assert all(len(values) == 1 for values in rows), "the same for all tokens of a completion"


def test_mixture_of_numbers_computed_by_hand():
    teacher = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    rewards, mask = torch.tensor([3.0, -1.0]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.tensor([[2.0, 0.5, 0.0], [-0.25, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(mix_advantages(teacher, rewards, mask, 0.5, 0.5), expected)
    undefined = torch.tensor([float("nan"), 1.0])
    assert torch.equal(mix_advantages(teacher, undefined, mask), teacher)


def test_the_loss_mixes_where_the_sampler_gives_the_statistics(make_trainer):
    """`use_sampling_logps`: the loss forms the teacher's advantages anew, and adds those of the rewards again."""

    def rollout_func(prompts, trainer):
        output = canned(prompts, trainer)
        return {**output, "logprobs": [[-3.0] * len(ids) for ids in output["completion_ids"]]}

    def make_one(**options):
        functions = {"reward_funcs": reward, "rollout_func": rollout_func}
        options.update(per_device_train_batch_size=8, use_sampling_logps=True, max_steps=1, max_grad_norm=0.0)
        return gradients(make_trainer(trainer_options=functions, **options))

    teacher, rewards = make_one(), make_one(distillation_coef=0, reward_coef=1)
    both = make_one(distillation_coef=0.5, reward_coef=2)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, 0.5 * teacher[name] + 2 * rewards[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"score_baseline": "expected"}, {"teacher_top_k": 4}], ids=str)
def test_the_exact_gradient_and_that_of_the_reward_add_up(make_trainer, options):
    def make_one(**more):
        functions = {"reward_funcs": reward, "rollout_func": canned}
        more.update(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0.0)
        return gradients(make_trainer(trainer_options=functions, **more))

    teacher, rewards = make_one(estimator="exact", **options), make_one(distillation_coef=0, reward_coef=1)
    both = make_one(estimator="exact", distillation_coef=0.5, reward_coef=2, **options)
    assert max(gradient.abs().max() for gradient in rewards.values()) > 1e-2
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, 0.5 * teacher[name] + 2 * rewards[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward_coef": -1}, "`reward_coef` is -1.*from 0 on"),
        ({"distillation_coef": float("nan")}, "`distillation_coef` is nan"),
        ({"distillation_coef": 0}, "`distillation_coef` is 0 and `reward_coef` 0.0, so that nothing would be learned"),
        ({"reward_coef": 1, "num_generations": 1}, "`reward_coef` is 1, but `num_generations` is 1"),
        ({"reward_coef": 1}, "`reward_coef` is 1, but there is no reward. Pass `reward_funcs`"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)

"""Scores beside the plain one: pinned numbers, and what a run makes of them."""

import pytest
import torch
from helpers import gradients, make_rollout, plain_logps
from peft import LoraConfig
from transformers import Qwen3ForCausalLM

from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.objective.scores import discounted_scores, extrapolated_scores, power_scores, token_scores
from gndpo_trl.teachers import LocalTeacher, SelfTeacher


def test_extrapolated_scores_of_numbers_computed_by_hand():
    teacher = torch.tensor([[-1.0, -0.5, float("nan")]], dtype=torch.float64)
    old = torch.tensor([[-2.0, -1.5, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[-3.0, -0.25, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]])
    for extrapolation, expected in (
        (1.0, [1.0, 1.0, 0.0]),
        (1.5, [1.5 * 2 - 1, 1.5 * -0.25 + 1.25, 0.0]),
        (0.5, [0.5 * 2 - 1, 0.5 * -0.25 + 1.25, 0.0]),
    ):
        found = extrapolated_scores(teacher, old, reference, mask, extrapolation)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)
    plain = token_scores(teacher, old, mask)
    torch.testing.assert_close(extrapolated_scores(teacher, old, reference, mask, 1.0), plain, rtol=0, atol=1e-12)


def test_discounted_scores_of_numbers_computed_by_hand():
    scores = torch.tensor([[1.0, 2.0, -4.0, 0.0, 8.0]], dtype=torch.float64)
    expected = torch.tensor([[1.5, 1.0, -2.0, 4.0, 8.0]], dtype=torch.float64)
    assert torch.equal(discounted_scores(scores, 0.5), expected)
    assert torch.equal(discounted_scores(scores, 0.0), scores)
    assert torch.equal(discounted_scores(scores, 1.0), scores.flip(-1).cumsum(-1).flip(-1))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("discount", [0.3, 0.95, 1.0])
def test_discounted_scores_equal_the_recursion(length, discount):
    torch.manual_seed(length)
    scores = torch.randn(3, length, dtype=torch.float64)
    expected, following = torch.zeros_like(scores), torch.zeros(3, dtype=torch.float64)
    for column in reversed(range(length)):
        following = expected[:, column] = scores[:, column] + discount * following
    torch.testing.assert_close(discounted_scores(scores, discount), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "power, expected",
    [
        (1.0, [[0.238651, -0.135212, 0.0], [0.085548, 0.492296, 0.0]]),
        (0.5, [[0.172270, -0.356770, 0.0], [0.144749, 0.347235, 0.0]]),
    ],
)
def test_power_scores_of_numbers_computed_by_hand(power, expected):
    teacher = torch.tensor([[-0.5, -9.0, -1.0], [-2.0, -0.25, float("nan")]])
    old = torch.tensor([[-1.0, -2.0, -1.0], [-3.0, -1.25, -7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(power_scores(teacher, old, mask, power), torch.tensor(expected), atol=1e-5, rtol=0)


def test_small_powers_give_the_plain_score():
    teacher = torch.tensor([[-0.5, -9.0, -1.0]], dtype=torch.float64)
    old, mask = torch.tensor([[-1.0, -2.0, 0.0]], dtype=torch.float64), torch.ones(1, 3)
    found = power_scores(teacher, old, mask, 1e-6) / 1e-6
    torch.testing.assert_close(found, token_scores(teacher, old, mask), atol=1e-4, rtol=0)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_power_scores_lead_down_a_bregman_divergence(power):
    torch.manual_seed(0)
    logits = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), torch.randn(1, 9, dtype=torch.float64).log_softmax(-1)
    scores = power_scores(teacher, student.detach(), torch.ones(1, 9), power)
    expectation = (student.detach().exp() * scores * student).sum()  # over the student's samples
    (found,) = torch.autograd.grad(expectation, logits, retain_graph=True)
    p, q = student.exp(), teacher.exp()
    divergence = ((p ** (1 + power) - q ** (1 + power)) / (1 + power) - q**power * (p - q)).sum()
    (expected,) = torch.autograd.grad(-divergence, logits, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if power == 1:
        (expected,) = torch.autograd.grad(-(p - q).square().sum() / 2, logits)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalization", ["none", "global"])
def test_a_run_compares_probabilities_and_logs_nats(make_trainer, checkpoints, normalization):
    options = {"score_power": 0.5, "score_clip": None, "score_discount": 0.5, "advantage_normalization": normalization}
    trainer = make_trainer(per_device_train_batch_size=8, learning_rate=1e-2, **options)
    trainer.train()
    rollout = make_rollout(trainer)
    mask = valid_tokens(rollout)
    teacher_logps = plain_logps(Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"]), rollout)
    student_logps = trainer._per_token_logps(trainer.model, rollout)
    differences = (teacher_logps.exp().sqrt() - student_logps.exp().sqrt()).masked_fill(~mask, 0.0)
    expected = discounted_scores(differences, 0.5)
    if normalization == "global":
        expected = (expected - expected[mask].mean()) / expected[mask].std()
    torch.testing.assert_close(rollout["advantages"][mask], expected[mask], rtol=0, atol=1e-3)
    assert not rollout["advantages"][~mask].any()

    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["score/mean"] == pytest.approx((teacher_logps - student_logps)[mask].mean().item(), abs=1e-4)
    assert metrics["score/clamped_low"] == metrics["score/clamped_high"] == 0.0


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("peft", [False, True])
def test_a_run_extrapolates_from_the_student_before_training(make_trainer, checkpoints, beta, peft):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None
    options = {"extrapolation": 1.5, "score_discount": 0.5, "score_clip": 0.1, "beta": beta, "learning_rate": 1e-2}
    trainer = make_trainer(per_device_train_batch_size=8, trainer_options={"peft_config": lora}, **options)
    assert isinstance(trainer.reference, SelfTeacher if peft else type(None) if beta else LocalTeacher)
    trainer.train()
    rollout = make_rollout(trainer)
    mask = valid_tokens(rollout)
    base = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    teacher_logps = plain_logps(Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"]), rollout)
    reference_logps, student_logps = plain_logps(base, rollout), trainer._per_token_logps(trainer.model, rollout)
    assert (student_logps - reference_logps)[mask].abs().max() > 1e-2, "the student has moved"
    scores = extrapolated_scores(teacher_logps, student_logps, reference_logps, mask, 1.5)
    expected = discounted_scores(scores.clamp(-0.1, 0.1), 0.5)
    expected = (expected - expected[mask].mean()) / expected[mask].std()
    torch.testing.assert_close(rollout["advantages"][mask], expected[mask], rtol=0, atol=1e-3)
    assert not rollout["advantages"][~mask].any()

    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["score/mean"] == pytest.approx(scores[mask].mean().item(), abs=1e-4)
    gap = (teacher_logps - student_logps)[mask]
    assert metrics["reverse_kl"] == pytest.approx(-gap.mean().item(), abs=1e-4)
    assert metrics["reverse_kl_k3"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), abs=1e-4)


def test_the_students_start_is_not_held_twice(make_trainer, text_dataset):
    prompts = [[{"role": "user", "content": "one plus one"}]] * len(text_dataset)
    dataset = text_dataset.add_column("teacher_prompt", prompts)
    trainer = make_trainer(teacher_model="self", extrapolation=2.0, trainer_options={"train_dataset": dataset})
    assert trainer.reference is trainer.teacher
    trainer.train()


@pytest.mark.parametrize(
    "options",
    [{"extrapolation": 1.5, "score_discount": 0.9}, {"score_power": 1.0, "score_clip": None}],
    ids=["extrapolated", "power"],
)
def test_the_loss_uses_the_same_scores_where_the_sampler_gives_the_statistics(make_trainer, options):
    """`use_sampling_logps`, with log-probs of the sampler that are those of the training engine."""

    def rollout_func(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        completion_ids = [[11 + row, 12, 13 + row] for row in range(len(prompts))]
        logps = []
        for before, after in zip(prompt_ids, completion_ids, strict=True):
            ids = torch.tensor([before + after])
            with torch.no_grad():
                log_probs = trainer.model(ids).logits[0, :-1].log_softmax(-1)
            logps.append(log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)[-3:].tolist())
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logps}

    def make_one(use_sampling_logps: bool):
        shared = {"max_steps": 1, "per_device_train_batch_size": 8, "use_sampling_logps": use_sampling_logps}
        return gradients(make_trainer(trainer_options={"rollout_func": rollout_func}, **shared, **options))

    found, expected = make_one(True), make_one(False)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"extrapolation": 0.0}, "`extrapolation` is 0.0.*Use 1.0 for the plain score"),
        ({"extrapolation": float("nan")}, "`extrapolation` is nan"),
        ({"score_discount": 1.1}, "`score_discount` is 1.1"),
        ({"score_discount": -0.1}, "`score_discount` is -0.1"),
        ({"score_power": -1.0, "score_clip": None}, "`score_power` is -1.0.*Use 0.0 for the paper's"),
        ({"score_power": float("nan"), "score_clip": None}, "`score_power` is nan"),
        (
            {"score_power": 1.0, "score_clip": 2.0},
            "`score_power` is 1.0.*`score_clip` .2.0. is a number of nats. Set `score_clip` to None",
        ),
        (
            {"score_power": 1.0, "score_clip": None, "extrapolation": 1.5},
            "`score_power` is 1.0 and `extrapolation` 1.5.*or `extrapolation` to 1.0",
        ),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_a_base_under_adapters_is_a_reference_at_temperature_one(make_trainer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(
        ValueError, match="`temperature` is 0.7, but `extrapolation` .1.5. compares the start of the student"
    ):
        make_trainer(trainer_options={"peft_config": lora}, extrapolation=1.5, temperature=0.7)

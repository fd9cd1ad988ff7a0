"""What scoring costs and what it leaves unchanged: forward passes, padding, sampler's log-probs, offloading."""

import pytest
import torch
from helpers import gradients, make_rollout
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Qwen3ForCausalLM

from gndpo_trl.grpo.rollouts import valid_tokens


LENGTHS = [24, 3, 2, 1, 2, 9, 1, 5]
COMPLETIONS = [[11 + (7 * row + 3 * token) % 20 for token in range(length)] for row, length in enumerate(LENGTHS)]


def canned(sampler: PreTrainedModel | None, hides_first: bool):
    """A `rollout_func` that returns the same completions whatever the prompts are, with log-probs of the sampler."""

    def logps_of(prompt_ids: list[int], completion_ids: list[int]) -> list[float | None]:
        if sampler is None:
            return [0.0] * len(completion_ids)
        input_ids = torch.tensor([prompt_ids + completion_ids])
        with torch.no_grad():
            log_probs = sampler(input_ids).logits[0, :-1].float().log_softmax(-1)
        logps = log_probs.gather(-1, input_ids[0, 1:, None]).squeeze(-1)[-len(completion_ids) :].tolist()
        return [None, *logps[1:]] if hides_first else logps  # None: vLLM has no log-prob for a token

    def rollout_func(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        logprobs = [logps_of(*ids) for ids in zip(prompt_ids, COMPLETIONS, strict=True)]
        return {"prompt_ids": prompt_ids, "completion_ids": COMPLETIONS, "logprobs": logprobs}

    return rollout_func


@pytest.fixture
def make_canned(make_trainer):
    """A trainer with four micro-batches of two separate rows, whose completions have heavy-tailed lengths."""

    def make(sampler=None, hides_first=False, **options):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, **options}
        options.setdefault("share_prompts", False)
        trainer_options = {"rollout_func": canned(sampler, hides_first)}
        return make_trainer(max_completion_length=24, trainer_options=trainer_options, **options)

    return make


def watch_forwards(trainer) -> dict[str, list[tuple[int, int]]]:
    """Padded and real tokens of every forward pass from now on, by what it is for."""
    forwards = {"teacher": [], "student": [], "loss": []}

    def watch(who):
        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]
            purpose = "loss" if who == "student" and torch.is_grad_enabled() else who
            forwards[purpose].append((mask.numel(), int(mask.sum())))

        return hook

    for who, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        trainer._checked_heads.add((model, ()))  # without the passes of that comparison
        model.base_model.register_forward_pre_hook(watch(who), with_kwargs=True)
    return forwards


def padding(passes: list[tuple[int, int]]) -> float:
    return sum(padded for padded, _ in passes) / sum(real for _, real in passes)


# Forward passes and padding


@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_log_probs_do_not_depend_on_how_rows_are_grouped(make_trainer, family):
    trainer = make_trainer(family, per_device_train_batch_size=8, max_completion_length=16)
    rollout = make_rollout(trainer)
    mask = valid_tokens(rollout)
    for model in (trainer.model, trainer.teacher.model):
        trainer._passes.keeps_padding = True
        padded = trainer._per_token_logps(model, rollout)
        trainer._passes.keeps_padding = False
        for budget in (None, 1, 60, 10_000):
            trainer.args.scoring_token_budget = budget
            found = trainer._per_token_logps(model, rollout)
            torch.testing.assert_close(found[mask], padded[mask], rtol=0, atol=1e-5)
            assert not found[~rollout["completion_mask"].bool()].any()


def test_forward_passes_hold_little_padding(make_canned):
    trainer = make_canned()
    forwards = watch_forwards(trainer)
    trainer.train()
    assert [len(passes) for passes in forwards.values()] == [4, 4, 4]
    for purpose, passes in forwards.items():
        assert padding(passes) < 1.1, purpose
    # The same rows in the same groups: scoring, without activations to keep, cannot take more memory than the loss.
    assert forwards["teacher"] == forwards["student"] == forwards["loss"]

    padded = make_canned(pad_to_multiple_of=1)
    forwards = watch_forwards(padded)
    padded.train()
    for purpose, passes in forwards.items():
        assert len(passes) == 4 and padding(passes) > 1.5, purpose


def test_a_token_budget_bounds_forward_passes(make_canned):
    trainer = make_canned(scoring_token_budget=100)
    forwards = watch_forwards(trainer)
    trainer.train()
    for purpose in ("teacher", "student"):
        assert len(forwards[purpose]) < 4
        assert max(padded for padded, _ in forwards[purpose]) <= 100
    assert len(forwards["loss"]) == 4

    trainer = make_canned(scoring_token_budget=1)
    forwards = watch_forwards(trainer)
    trainer.train()
    assert len(forwards["teacher"]) == 8 and padding(forwards["teacher"]) == 1.0


@pytest.mark.parametrize(
    "options", [{"num_iterations": 2}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4}]
)
def test_nothing_is_scored_twice(make_canned, options):
    """TRL scores the student where several steps use a generation batch; the reference model goes the same way."""
    trainer = make_canned(max_steps=1, beta=0.1, **options)
    forwards = watch_forwards(trainer)
    trainer.train()
    assert len(forwards["student"]) == len(forwards["teacher"]) == 4


def test_the_teacher_leaves_nothing_for_a_backward_pass(make_trainer, checkpoints):
    teacher = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    teacher.gradient_checkpointing_enable()
    teacher.enable_input_require_grads()
    trainer = make_trainer(teacher_model=teacher, gradient_checkpointing=True)
    outputs, recomputed = [], []
    layer = teacher.base_model.layers[0]
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    layer._gradient_checkpointing_func = lambda *args: recomputed.append(args)
    trainer.train()
    assert outputs and all(output.grad_fn is None and not output.requires_grad for output in outputs)
    assert not recomputed
    assert all(parameter.grad is None for parameter in teacher.parameters())


# The sampler's log-probs


def loss_advantages(trainer) -> dict[tuple[int, ...], torch.Tensor]:
    """Train, and return the advantages that the first step's loss used, by completion."""
    seen = {}
    make = trainer.estimator.advantages_in_loss

    def watch(logps, inputs):
        advantages = make(logps, inputs)
        lengths = inputs["completion_mask"].sum(-1)
        for ids, length, row in zip(inputs["completion_ids"].tolist(), lengths, advantages, strict=True):
            seen[tuple(ids[:length])] = row[:length]
        return advantages

    trainer.estimator.advantages_in_loss = watch
    trainer.train()
    return seen


@pytest.mark.parametrize("normalization", ["global", "none", "group", "sequence"])
def test_exact_sampling_logps_give_the_same_gradient_without_a_student_pass(make_canned, checkpoints, normalization):
    expected = gradients(make_canned(advantage_normalization=normalization))
    sampler = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    trainer = make_canned(sampler, use_sampling_logps=True, advantage_normalization=normalization)
    forwards = watch_forwards(trainer)
    found = gradients(trainer)
    assert not forwards["student"] and len(forwards["loss"]) == 4
    assert "time/student_scoring" not in trainer.state.log_history[0]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5)


def test_rounded_sampling_logps_move_only_the_statistics(make_canned, checkpoints):
    """With log-probs of the student in bfloat16, as a sampler has them, where the trainer computes in float32."""
    expected = loss_advantages(make_canned())
    sampler = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"], dtype=torch.bfloat16)
    trainer = make_canned(sampler, use_sampling_logps=True)
    estimates = {}
    generate = trainer._generate_and_score_completions

    def watch(inputs):
        rollout = generate(inputs)
        for ids, row in zip(rollout["completion_ids"].tolist(), rollout["advantages"], strict=True):
            estimates[tuple(token for token in ids if token)] = row  # 0 is padding
        return rollout

    trainer._generate_and_score_completions = watch
    found = loss_advantages(trainer)
    errors = torch.cat([found[ids] - row for ids, row in expected.items()]).abs()
    all_from_sampler = torch.cat([estimates[ids][: len(ids)] - row for ids, row in expected.items()]).abs()
    # Scores taken from the sampler would pass its rounding on to every token; two scalars average it away.
    assert errors.max() < 0.5 * all_from_sampler.max()
    assert 0 < errors.max() < 0.01


def test_tokens_without_a_sampling_logp_still_count_in_the_loss(make_canned, checkpoints):
    sampler = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    expected = loss_advantages(make_canned())
    trainer = make_canned(sampler, hides_first=True, use_sampling_logps=True)
    found = loss_advantages(trainer)
    assert trainer.state.log_history[0]["advantages/num_tokens"] == sum(LENGTHS) - len(LENGTHS)
    for ids, row in expected.items():
        assert found[ids][0] != 0
        assert found[ids][0].sign() == row[0].sign() or row[0].abs() < 0.3


def test_sampling_logps_are_refused_where_they_would_change_the_loss(make_canned, make_trainer, make_config):
    with pytest.raises(ValueError, match="one optimizer step per generation batch"):
        make_config(use_sampling_logps=True, num_iterations=2)
    with pytest.raises(ValueError, match="Switch one of them off"):
        make_config(use_sampling_logps=True, vllm_importance_sampling_correction=True)
    with pytest.raises(ValueError, match="transformers' generation returns no log-probs"):
        make_trainer(use_sampling_logps=True)
    with pytest.raises(ValueError, match="`scoring_token_budget` is 0"):
        make_config(scoring_token_budget=0)


# Offloading


def test_an_offloaded_teacher_scores_the_same(make_trainer):
    expected = make_trainer()
    rollout = make_rollout(expected)
    trainer = make_trainer(teacher_offload=True)
    torch.testing.assert_close(
        trainer.teacher.per_token_logps(rollout), expected.teacher.per_token_logps(rollout), rtol=0, atol=0
    )
    trainer.train()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_offloaded_teacher_is_pinned_and_on_the_device_only_while_it_scores(make_trainer):
    trainer = make_trainer(teacher_offload=True, use_cpu=False)
    rollout = make_rollout(trainer)
    devices = []
    trainer.teacher.model.base_model.register_forward_pre_hook(
        lambda module, args: devices.extend(parameter.device.type for parameter in module.parameters())
    )
    trainer.teacher.per_token_logps(rollout)
    assert set(devices) == {"cuda"}
    assert all(parameter.is_pinned() for parameter in trainer.teacher.model.parameters())


def test_a_quantized_teacher_is_not_offloaded(make_trainer):
    quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="it is quantized"):
        make_trainer(teacher_offload=True, teacher_model_init_kwargs={"quantization_config": quantization_config})

"""Trainers whose rows share their prompts: plans of passes, gradients, metrics, log lines."""

import logging

import pytest
import torch
from helpers import assert_same_gradients, gradients, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from gndpo_trl.grpo.branch_attention import IMPLEMENTATION
from gndpo_trl.grpo.head_check import adapters_of
from gndpo_trl.grpo.shared_prompts import Plan
from gndpo_trl.grpo.trl_hooks import ROW_MEAN_LOSSES, TOKEN_SUM_LOSSES


LENGTHS = [24, 3, 2, 1, 2, 9, 1, 5]
COMPLETIONS = [[11 + (7 * row + 3 * token) % 20 for token in range(length)] for row, length in enumerate(LENGTHS)]


# Plans


def masks(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of rows with so many prompt and completion tokens."""
    prompts, completions = torch.tensor(rows).unbind(1)
    columns = torch.arange(int(max(prompts.max(), completions.max(), 1)))
    return (columns < prompts.unsqueeze(1)).long().flip(1), (columns < completions.unsqueeze(1)).long()


def cost(rows: list[int], prompt_lengths, completion_lengths, prompts) -> int:
    firsts = {prompts[row]: row for row in rows}.values()
    return sum(prompt_lengths[row] - 1 for row in firsts) + sum(max(completion_lengths[row], 1) for row in rows)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    completions=st.lists(st.integers(0, 30), min_size=8, max_size=8),
    largest=st.integers(1, 120),
)
def test_plans_hold_every_row_once_and_cost_what_they_say(prompts, lengths, completions, largest):
    prompt_lengths, completions = [lengths[prompt] for prompt in prompts], completions[: len(prompts)]
    prompt_mask, completion_mask = masks(list(zip(prompt_lengths, completions, strict=True)))
    for num_passes in (None, *range(1, len(prompts) + 1)):
        plan = Plan(prompt_mask, completion_mask, prompts, largest_pass=largest, num_passes=num_passes)
        assert sorted(sum(plan.passes, [])) == list(range(len(prompts)))
        costs = [cost(rows, prompt_lengths, completions, prompts) for rows in plan.passes]
        assert sum(costs) == plan.num_tokens
        if num_passes is None:
            assert all(size <= largest or len(rows) == 1 for size, rows in zip(costs, plan.passes, strict=True))
        else:
            assert len(plan.passes) == num_passes


def test_completions_of_a_prompt_stay_together_where_they_fit():
    rows = [(50, 10)] * 4 + [(30, 5)] * 4
    prompts = [0] * 4 + [1] * 4
    # 49 + 40 tokens, and an eighth of four copies of 59
    assert Plan(*masks(rows), prompts, largest_pass=119).passes == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Plan(*masks(rows), prompts, largest_pass=1000).passes == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert [len(rows) for rows in Plan(*masks(rows), prompts, largest_pass=90).passes] == [2, 2, 4]
    # A number of passes has its way: they are as small as they can be then.
    assert Plan(*masks(rows), prompts, largest_pass=1, num_passes=2).passes == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_all_ranks_plan_alike():
    """With the same numbers of rows in every pass, planned for the most expensive rank, whatever prompts each has."""
    ranks = [
        ([(50, 10)] * 4 + [(30, 5)] * 4, [0] * 4 + [1] * 4),
        ([(9, 60)] * 2 + [(9, 1)] * 2 + [(70, 1)] * 4, [0, 1, 2, 3, 4, 4, 4, 4]),
    ]
    data, plans = [], []
    for rows, prompts in ranks:
        Plan(*masks(rows), prompts, largest_pass=100, gather=lambda values: data.append(values) or values)
    for rows, prompts in ranks:
        plans.append(Plan(*masks(rows), prompts, largest_pass=100, gather=lambda values: torch.cat(data)))
    assert [len(rows) for rows in plans[0].passes] == [len(rows) for rows in plans[1].passes]
    assert plans[0].num_tokens == plans[1].num_tokens
    for number, (rows, prompts) in enumerate(ranks):
        for rows_of_pass in plans[number].passes:
            lengths = list(zip(*rows, strict=True))
            assert cost(rows_of_pass, *lengths, prompts) <= 100


# Training


@pytest.fixture
def make_sharing(make_trainer):
    """Four prompts with two completions each, or two with four, in four micro-batches."""

    def canned(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        return {"prompt_ids": prompt_ids, "completion_ids": COMPLETIONS, "logprobs": [[-1.0] * n for n in LENGTHS]}

    def make(family="qwen3", share_prompts=True, **options):
        options = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "num_generations": 4,
            "max_steps": 1,
            "max_completion_length": 24,
            "shuffle_dataset": False,
            "share_prompts": share_prompts,
            **options,
        }
        return make_trainer(family, trainer_options={"rollout_func": canned}, **options)

    return make


def count_tokens(trainer) -> dict[str, list[int]]:
    """Tokens of every forward pass of the teacher, the student and the loss from now on."""
    tokens = {"teacher": [], "student": [], "loss": []}

    def watch(who):
        def hook(module, args, kwargs):
            purpose = "loss" if who == "student" and torch.is_grad_enabled() else who
            tokens[purpose].append(kwargs["input_ids"].numel())

        return hook

    for who, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        trainer._checked_heads.add((model, adapters_of(model)))  # without the passes of that comparison
        core.base_model.register_forward_pre_hook(watch(who), with_kwargs=True)
    return tokens


LOSSES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in (*ROW_MEAN_LOSSES, *TOKEN_SUM_LOSSES, "bnpo")},
    "token ratio": {"importance_sampling_level": "token"},
    "reference model": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.1},
    "several steps": {"num_iterations": 2},
    "sampler's log-probs": {"use_sampling_logps": True},
    "token budget": {"scoring_token_budget": 60},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_and_metrics_are_those_of_separate_rows(make_sharing, case):
    found, logs, tokens = {}, {}, {}
    for share_prompts in (False, True):
        torch.manual_seed(0)  # TRL shuffles the rows
        trainer = make_sharing(share_prompts=share_prompts, **LOSSES[case])
        tokens[share_prompts] = count_tokens(trainer)
        torch.manual_seed(0)
        found[share_prompts], logs[share_prompts] = gradients(trainer), trainer.state.log_history[0]
    assert_same_gradients(found[True], found[False])
    assert len(tokens[True]["loss"]) == len(tokens[False]["loss"])
    assert sum(tokens[True]["loss"]) < sum(tokens[False]["loss"])
    assert logs[True].keys() == logs[False].keys()
    for name, value in logs[False].items():
        if not name.startswith(("time/", "step_time", "train_")) and name not in ("num_tokens",):
            assert logs[True][name] == (None if value is None else pytest.approx(value, abs=1e-4, nan_ok=True)), name


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
def test_images_are_shared_in_training(make_sharing, family):
    found = {}
    for share_prompts in (False, True):
        torch.manual_seed(0)
        trainer = make_sharing(family, share_prompts=share_prompts)
        images = []
        trainer.model.get_encoder(modality="image").register_forward_pre_hook(
            lambda module, args, kwargs, images=images: images.append(len([*args, *kwargs.values()][0])),
            with_kwargs=True,
        )
        found[share_prompts] = gradients(trainer), sum(images)
    assert_same_gradients(found[True][0], found[False][0])
    # The first batch's probe is part of it, and scores a few separate rows.
    assert found[True][1] < found[False][1]


@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_scores_are_those_of_separate_rows(make_sharing, family):
    trainer = make_sharing(family, share_prompts=None, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    rollout = make_rollout(trainer)
    for model in (trainer.model, trainer.teacher.model):
        shared = trainer._per_token_logps(model, rollout)
        assert trainer._planner.reasons[model] is None
        trainer._planner.share_prompts = False
        torch.testing.assert_close(trainer._per_token_logps(model, rollout), shared, rtol=0, atol=1e-5)
        trainer._planner.share_prompts = None


def test_prompts_are_shared_where_enough_tokens_are_saved(make_sharing, caplog):
    with caplog.at_level(logging.INFO, logger="gndpo_trl"):
        trainer = make_sharing(share_prompts=None)
        tokens = count_tokens(trainer)
        trainer.train()
    shared = [message for message in caplog.messages if "computes each prompt once" in message]
    assert len(shared) == 2, "one line for the student and one for the teacher"
    separate = make_sharing(share_prompts=False)
    expected = count_tokens(separate)
    separate.train()
    assert len(tokens["teacher"]) >= 3, "two passes of the probe, and those of the plan"
    assert sum(tokens["teacher"][2:]) < 0.7 * sum(expected["teacher"])

    # One completion for each prompt: nothing to save, and nothing is tried out.
    trainer = make_sharing(share_prompts=None, num_generations=1)
    tokens = count_tokens(trainer)
    trainer.train()
    assert not trainer._planner.reasons and len(tokens["teacher"]) == 4


def test_share_prompts_is_an_error_where_it_cannot_be_done(make_sharing):
    with pytest.raises(ValueError, match="`share_prompts` is True, but Qwen3ForCausalLM .* 'eager', and only 'sdpa'"):
        make_sharing(model_init_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="`share_prompts` is True, .* `pad_to_multiple_of` asks for padding"):
        make_sharing(pad_to_multiple_of=8)
    make_sharing(share_prompts=None, pad_to_multiple_of=8)


def test_a_model_that_cannot_share_trains_on_separate_rows(make_sharing, caplog):
    trainer = make_sharing(share_prompts=None, model_init_kwargs={"attn_implementation": "eager"})
    trainer.train()
    lines = [message for message in caplog.messages if "computes each prompt again for every completion" in message]
    assert len(lines) == 2 and all("'eager'" in line for line in lines), "the teacher has the student's attention"
    assert "Qwen3ForCausalLM computes each prompt again for every completion, because its `attn_" in lines[0]


OBSTACLES = {
    "`pad_to_multiple_of` asks for padding": {"pad_to_multiple_of": 8},
    "`torch_compile` compiles for rows of one shape": {"torch_compile": True},
    "`use_transformers_continuous_batching` exchanges the attention": {"use_transformers_continuous_batching": True},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_the_log_names_what_in_the_run_keeps_prompts_from_being_shared(make_sharing, caplog, reason):
    make_sharing(share_prompts=None, **OBSTACLES[reason])
    lines = [message for message in caplog.messages if "again for every completion" in message]
    assert len(lines) == 1 and f"Each prompt is computed again for every completion, because {reason}." in lines[0]
    caplog.clear()
    make_sharing(share_prompts=False, **OBSTACLES[reason])
    make_sharing(share_prompts=None, num_generations=1, **OBSTACLES[reason])
    assert "again for every completion" not in caplog.text, "nothing is lost, or it was asked for"


def test_half_precision_is_no_reason_against_it(make_sharing):
    trainer = make_sharing(bf16=True)
    trainer.train()
    reasons = {**trainer._planner.reasons, **trainer._planner.reasons_in_loss}
    assert set(reasons.values()) == {None}


def test_losses_whose_rows_are_not_regrouped_share_prompts_too(make_sharing):
    trainer = make_sharing(
        share_prompts=None, loss_type="bnpo", per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    tokens = count_tokens(trainer)
    trainer.train()
    separate = make_sharing(
        share_prompts=False, loss_type="bnpo", per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    expected = count_tokens(separate)
    separate.train()
    assert sum(tokens["loss"]) < 0.7 * sum(expected["loss"])


def test_a_model_that_shared_prompts_is_saved_as_any_other(make_sharing, tmp_path):
    trainer = make_sharing()
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    config = (tmp_path / "saved" / "config.json").read_text()
    assert IMPLEMENTATION not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"

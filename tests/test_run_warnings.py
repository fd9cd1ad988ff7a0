"""Warnings about a run: each on a run that gives cause for it and on one that does not."""

import math
import warnings
from collections import Counter

import pytest
from helpers import NUM_TOKENS, Table
from transformers import TrainerControl, TrainerState

from gndpo_trl.run_warnings import (
    RunWarnings,
    check_drift,
    check_handful,
    check_noise,
    check_nothing,
    check_sampling,
    check_teacher_time,
    first_and_latest,
    latest,
)


SIGNS = {
    "no token": "No token is learned from",
    "no gradient": "The gradient is 0",
    "noise": "is trained on noise",
    "clamp": "clamps",
    "length": "Completions that end have grown",
    "handful": "One token in a hundred",
    "entropy": "entropy has fallen",
    "teacher time": "The teacher takes",
    "drift": "the two drift apart",
    "sampling": "sample from another distribution than its own",
}
END = 2  # the tiny tokenizers' end token


def canned(completion_of):
    """A `rollout_func` that samples nothing: `completion_of(row, step)` gives the completion's tokens."""

    def rollout_func(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        completion_ids = [completion_of(row, trainer.state.global_step) for row in range(len(prompts))]
        logprobs = [[0.0] * len(ids) for ids in completion_ids]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    return {"rollout_func": rollout_func}


def given(trainer, **options) -> Counter:
    """How often each warning was given in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(**options)
    messages = [str(warning.message) for warning in caught]
    return Counter(name for name, sign in SIGNS.items() for message in messages if sign in message)


def test_an_ordinary_run_gives_none(make_trainer):
    assert not given(make_trainer(max_steps=25, per_device_train_batch_size=16))


def masked(row: int, step: int) -> list[int]:
    return [11 + row + place for place in range(8)]


NOTHING = {
    "unknown": (
        {"teacher_model": Table(**{f"token_{token}": math.nan for token in range(NUM_TOKENS)})},
        "knows the log-prob of none",
    ),
    "truncated": (
        {"mask_truncated_completions": True, "trainer_options": canned(masked)},
        r"all completions are cut off at `max_completion_length` \(8\)",
    ),
    "empty statistics": (
        {"max_completion_length": 1, "advantage_normalization": "sequence"},
        'with `advantage_normalization="sequence"`, no completion has two tokens to',
    ),
    "frozen": ({"learning_rate": 0.0}, "`learning_rate` was 0 in the latest steps"),
    "floor": ({"std_floor": 1e38}, r"Look at `std_floor` \(1e\+38\)"),
}


@pytest.mark.parametrize("options, reason", NOTHING.values(), ids=NOTHING)
def test_a_run_that_learns_nothing_says_why(make_trainer, options, reason):
    trainer = make_trainer(max_steps=10, **options)
    with pytest.warns(UserWarning, match=reason):
        trainer.train()


@pytest.mark.parametrize("case", ["unknown", "floor"])
def test_a_short_run_that_learns_nothing_says_so_at_its_end(make_trainer, case):
    options, reason = NOTHING[case]
    trainer = make_trainer(max_steps=3, **options)
    with pytest.warns(UserWarning, match=reason):
        trainer.train()


def test_a_short_run_of_a_student_that_is_its_teacher(make_trainer, checkpoints):
    same = {"teacher_model": checkpoints["qwen3-student"], "max_steps": 1}
    assert given(make_trainer(**same)) == {"noise": 1}
    assert given(make_trainer(advantage_normalization="none", **same)) == {"no gradient": 1}
    assert not given(make_trainer(max_steps=1))


def test_a_student_that_is_its_teacher(make_trainer, checkpoints):
    same = checkpoints["qwen3-student"]
    assert given(make_trainer(teacher_model=same, max_steps=12))["noise"] == 1
    assert not given(make_trainer(teacher_model=same, max_steps=12, std_floor=0.1, optim="sgd"))["noise"]
    assert not given(make_trainer(teacher_model=same, max_steps=12, advantage_normalization="none"))["noise"]


def test_a_clamp_that_decides(make_trainer):
    assert given(make_trainer(max_steps=12, score_clip=0.01))["clamp"] == 1
    assert not given(make_trainer(max_steps=9, score_clip=0.01))["clamp"]  # no more than a few batches


def grow(row: int, step: int) -> list[int]:
    return [11 + (row + place) % 20 for place in range(3 + step // 2)] + [END]


@pytest.mark.parametrize(
    "end, completion_of, is_warned",
    [
        (-6.0, grow, True),
        (-0.1, grow, False),  # the teacher wants them to end
        (-6.0, lambda row, step: grow(row, 4), False),  # they do not get longer
    ],
)
def test_completions_that_are_not_to_end(make_trainer, tmp_path, end, completion_of, is_warned):
    """In a run that is resumed: its beginning is that of the first part."""
    options = {
        "teacher_model": Table(token_2=end),
        "trainer_options": canned(completion_of),
        "max_completion_length": 30,
        "learning_rate": 1e-6,
        "save_strategy": "steps",
        "save_steps": 12,
        "output_dir": str(tmp_path / "run"),
    }
    assert not given(make_trainer(max_steps=12, **options))["length"]
    trainer = make_trainer(max_steps=21, **options)
    assert given(trainer, resume_from_checkpoint=True)["length"] == is_warned


@pytest.mark.parametrize("logp, is_warned", [(-500.0, True), (-5.0, False)])
def test_a_handful_of_tokens(make_trainer, logp, is_warned):
    def completion_of(row, step):
        tokens = [11 + (row + place) % 15 for place in range(60)]
        return [30, 30, *tokens] if row == 0 else tokens

    options = {"trainer_options": canned(completion_of), "max_completion_length": 80}
    trainer = make_trainer(teacher_model=Table(token_30=logp), max_steps=12, score_clip=None, **options)
    assert given(trainer)["handful"] == is_warned


def test_an_entropy_that_collapses(make_trainer):
    sure = Table(**{f"token_{token}": -30.0 for token in range(NUM_TOKENS) if token != 15}, token_15=0.0)
    options = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
    assert given(make_trainer(teacher_model=sure, **options))["entropy"] == 1


def test_a_slow_teacher(make_trainer):
    assert given(make_trainer(teacher_model=Table(seconds=0.3), max_steps=11))["teacher time"] == 1


def test_a_truncated_sampler_is_named_before_the_first_step(make_trainer):
    assert given(make_trainer(max_steps=1, top_p=0.5))["sampling"] == 1


# What runs cannot show as well


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, []),
        ({"top_k": 0, "min_p": 0.0, "generation_kwargs": {"top_p": 1.0, "suppress_tokens": [3]}}, []),
        ({"top_k": 3, "min_p": 0.3, "repetition_penalty": 1.1}, ["`top_k` (3)", "`min_p`", "`repetition_penalty`"]),
        ({"top_p": 0.5, "generation_kwargs": {"top_p": 1.0, "typical_p": 0.9}}, ["`typical_p` (0.9)"]),
        ({"temperature": 0.7, "generation_kwargs": {"temperature": 1.0}}, ["`temperature` (1.0)"]),
        ({"temperature": 0.7, "generation_kwargs": {"temperature": 0.7, "num_beams": 2}}, ["`num_beams`"]),
        (
            {"generation_kwargs": {"min_new_tokens": 4, "bad_words_ids": [[7]]}},
            ["`min_new_tokens`", "`bad_words_ids`"],
        ),
        ({"generation_kwargs": {"no_repeat_ngram_size": 0, "stop_strings": ["one"]}}, []),
    ],
)
def test_what_truncates_the_sampler(make_config, options, names):
    message = check_sampling(make_config(**options))
    assert (message or "").split(" makes")[0].count("`") == 2 * len(names)
    assert all(name in message for name in names)


def entries(steps, **metrics) -> list[dict]:
    """A log with the values of each metric at these steps."""
    columns = zip(*metrics.values(), strict=True)
    return [{"step": step, **dict(zip(metrics, row, strict=True))} for step, row in zip(steps, columns, strict=True)]


def test_means_are_over_the_steps_of_a_window():
    history = entries(range(1, 31), value=[None] * 5 + [1.0] * 15 + [3.0] * 10)
    assert latest(history, "value") == 3.0 and latest(history[:25], "value") == 2.0
    assert first_and_latest(history, "value") == (1.0, 3.0)
    assert first_and_latest(history[:20], "value") is None  # the windows would touch
    assert latest(history, "another") is None and first_and_latest(history, "another") is None
    rarely = entries([100, 200, 300], value=[1.0, 2.0, 3.0])
    assert latest(rarely, "value") == 3.0 and first_and_latest(rarely, "value") == (1.0, 3.0)


@pytest.mark.parametrize(
    "first, last, is_warned",
    [(0.01, 0.04, True), (1e-6, 0.02, True), (1e-6, 1e-3, False), (0.1, 0.2, False), (0.1, 0.01, False)],
)
def test_two_engines_that_drift_apart(make_config, first, last, is_warned):
    """tests/vllm_engine has the run."""
    history = entries(range(1, 31), **{"sampling/logp_difference/mean": [first] * 15 + [last] * 15})
    assert (check_drift(history, make_config()) is not None) == is_warned


def test_the_teachers_time_is_that_of_an_optimizer_step(make_config):
    history = entries(range(1, 11), **{"time/teacher_scoring": [8.0] * 10, "step_time": [10.0] * 10})
    assert "takes 8.0 of the 10.0 seconds" in check_teacher_time(history, make_config())
    # A generation batch serves four steps, the log of each has their mean.
    assert check_teacher_time(history, make_config(steps_per_generation=4)) is None
    assert check_teacher_time(history, make_config(num_iterations=4)) is None
    # An optimizer step uses two of them.
    history = entries(range(1, 11), **{"time/teacher_scoring": [4.0] * 10, "step_time": [10.0] * 10})
    config = make_config(steps_per_generation=2, gradient_accumulation_steps=4)
    assert "takes 8.0 of the 10.0 seconds" in check_teacher_time(history, config)


@pytest.mark.parametrize(
    "metrics, reason",
    [
        ({"advantages/num_tokens": 0, "completions/max_length": 0.0}, "all completions are empty"),
        ({"advantages/num_tokens": 0, "completions/max_length": 3.0}, "look at the masks"),
        ({"grad_norm": 0.0, "score/std": 0.0, "score/mean": 0.0, "advantages/std": 0.0}, "all scores are 0"),
        ({"grad_norm": 0.0, "score/std": 1.0, "advantages/std": 1.0}, "which have `requires_grad`"),
        ({"grad_norm": 0.0, "score/std": None, "advantages/std": None}, "have more completions"),
        ({"grad_norm": 1e-9, "score/std": 1.0, "advantages/std": 1.0}, None),
        ({"score/std": 1.0, "advantages/std": 1.0}, None),  # without `max_grad_norm` there is no norm
    ],
)
def test_why_nothing_is_learned(make_config, metrics, reason):
    message = check_nothing(
        entries([10], **{name: [value] for name, value in metrics.items()}), make_config(std_floor=0.1, optim="sgd")
    )
    assert message is None if reason is None else reason in message.replace("Look", "look")


def test_the_floor_and_the_number_of_tokens_are_looked_at(make_config):
    history = entries([10], **{"score/std": [0.04]})
    assert "`std_floor` (it is 0.0) helps with SGD alone" in check_noise(history, make_config())
    assert "`std_floor` (it is 0.05) helps" in check_noise(history, make_config(std_floor=0.05))
    assert check_noise(history, make_config(std_floor=0.05, optim="sgd")) is None
    history = entries([10], **{"advantages/share_top_1_percent": [0.9], "advantages/num_tokens": [99]})
    assert check_handful(history, make_config()) is None


def test_a_clamp_is_advised_where_there_can_be_one(make_config):
    history = entries([10], **{"advantages/share_top_1_percent": [0.9], "advantages/num_tokens": [1000]})
    assert "set `score_clip` to 5.0; have more" in check_handful(history, make_config(score_clip=None))
    assert "score_clip" not in check_handful(history, make_config(score_power=1.0, score_clip=None))


def test_one_process_speaks(make_config):
    config, log_history = make_config(), entries([10], **{"loss": [0.0], "score/std": [0.0]})
    for is_main in (False, True):
        state = TrainerState(is_world_process_zero=is_main, log_history=log_history, global_step=10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            RunWarnings().on_log(config, state, TrainerControl())
        assert len(caught) == is_main

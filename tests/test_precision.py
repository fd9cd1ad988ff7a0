"""Weights in half precision, teachers that are endlessly sure, and a student that has become its teacher: what happens."""

import math
import os

import pytest
import tiny_models
import torch
from helpers import Table

from gndpo_trl.estimators.reading import check_says_something
from gndpo_trl.grpo.checkpoints import RunCannotGoOn


DTYPES = ["float32", "bfloat16", "float16"]


def assert_trained(trainer, steps: int, moves: bool = True) -> None:
    """That so many steps were made, whose logs and weights are finite, and that something was learned."""
    assert trainer.state.global_step == steps
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1]["skipped_steps"] == 0
    for entry in entries:
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry
    assert not moves or max(entry["grad_norm"] for entry in entries) > 0


@pytest.mark.parametrize("teacher", DTYPES)
@pytest.mark.parametrize("student", DTYPES)
def test_every_precision_of_student_and_teacher(make_trainer, student, teacher):
    for options in ({}, {"estimator": "exact"}):
        trainer = make_trainer(
            model_init_kwargs={"dtype": student}, teacher_model_init_kwargs={"dtype": teacher}, max_steps=3, **options
        )
        assert (
            str(trainer.model.dtype) == f"torch.{student}" and str(trainer.teacher.model.dtype) == f"torch.{teacher}"
        )
        trainer.train()
        assert_trained(trainer, 3)


SCORINGS = {
    "as it is": {},
    "no clamp": {"score_clip": None},
    "not whitened": {"advantage_normalization": "none", "score_clip": None},
    "power": {"score_power": 1.0},
    "discount": {"score_discount": 0.9},
    "group": {"advantage_normalization": "group"},
    "sequence": {"advantage_normalization": "sequence", "score_clip": None},
}


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_teacher_that_all_but_excludes_a_token(make_trainer, scoring):
    """Two tokens that are sampled often; without a clamp such scores are all that is left of a batch, but numbers."""
    trainer = make_trainer(teacher_model=Table(token_15=-1e4, token_20=-1e4), max_steps=3, **SCORINGS[scoring])
    trainer.train()
    assert_trained(trainer, 3)
    assert min(entry["score/min"] for entry in trainer.state.log_history if "score/min" in entry) < -9e3


@pytest.mark.parametrize("logp", [-math.inf, math.inf])
@pytest.mark.parametrize("scoring", ["as it is", "no clamp", "power"])
def test_a_teacher_with_an_infinite_log_prob_ends_the_run(make_trainer, scoring, logp):
    trainer = make_trainer(teacher_model=Table(token_15=logp, token_20=logp), max_steps=3, **SCORINGS[scoring])
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    with pytest.raises(ValueError, match="teacher gave non-finite log-probs"):
        trainer.train()
    assert all(torch.equal(new, old) for new, old in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_tokens_that_a_teacher_does_not_know_are_left_out(make_trainer, scoring):
    trainer = make_trainer(teacher_model=Table(token_15=math.nan, token_20=math.nan), max_steps=3, **SCORINGS[scoring])
    trainer.train()
    assert_trained(trainer, 3)
    assert max(entry["teacher/unknown_tokens"] for entry in trainer.state.log_history if "score/min" in entry) > 0


@pytest.mark.parametrize("estimator", [{"estimator": "exact"}, {"score_baseline": "expected"}])
def test_a_model_that_all_but_excludes_a_token(make_trainer, estimator):
    trainer = make_trainer(max_steps=3, **estimator)
    trainer.teacher.model.lm_head.weight.data[15] *= 1e4
    trainer.train()
    assert_trained(trainer, 3)
    assert max(entry["score/clamped_low"] for entry in trainer.state.log_history if "score/min" in entry) > 0


STEPS = 500 if os.environ.get("FUZZ") == "nightly" else 12


@pytest.mark.parametrize(
    "options", [{}, {"estimator": "exact"}, {"score_baseline": "expected"}, {"std_floor": 0.1}], ids=str
)
def test_a_student_that_is_its_teacher_stays_finite(make_trainer, checkpoints, options):
    """The weights are the same, and their precision: scores are 0 up to the order of sums."""
    trainer = make_trainer(
        teacher_model=checkpoints["qwen3-student"], max_steps=STEPS, logging_steps=STEPS // 4, **options
    )
    trainer.train()
    assert_trained(trainer, STEPS, moves=False)


@pytest.mark.parametrize("options", [{}, {"advantage_normalization": "none"}, {"estimator": "exact"}])
def test_a_teacher_that_says_nothing_ends_the_run(make_trainer, options):
    """All tokens are equally likely to it, as to a model without its weights."""
    model, tokenizer = tiny_models.build_qwen3()
    model.lm_head.weight.data.zero_()
    teacher = {"teacher_model": model, "trainer_options": {"teacher_processing_class": tokenizer}}
    trainer = make_trainer(max_steps=3, **teacher, **options)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(RunCannotGoOn, match=r"The teacher gives each of \d+ tokens the same log-prob, -3.497 nats"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_one_of_several_that_says_nothing_is_named(make_trainer, text_dataset, checkpoints):
    class Nothing(Table):
        def per_token_logps(self, rollout):
            return torch.full_like(super().per_token_logps(rollout), -2.0)

    rows = text_dataset.add_column("teacher", ["model", "nothing"] * (len(text_dataset) // 2))
    teachers = {"model": checkpoints["qwen3-teacher"], "nothing": Nothing()}
    trainer = make_trainer(
        teacher_model=teachers, per_device_train_batch_size=8, trainer_options={"train_dataset": rows}
    )
    with pytest.raises(RunCannotGoOn, match="The teacher 'nothing' gives each of"):
        trainer.train()


def test_what_says_something_after_all():
    mask, ids = torch.ones(2, 8, dtype=torch.bool), torch.arange(16).view(2, 8)
    same = torch.full((2, 8), -3.5)
    with pytest.raises(RunCannotGoOn, match="each of 16 tokens the same log-prob, -3.5 nats"):
        check_says_something(same, ids, mask, 33)
    check_says_something(same, torch.ones_like(ids), mask, 33)  # of one token
    check_says_something(same, ids, mask & (ids < 7), 33)  # of too few
    check_says_something(torch.zeros(2, 8), ids, mask, 33)  # of which it is sure
    check_says_something(torch.full((2, 8), -30.0), ids, mask, 33)  # that it all but excludes
    check_says_something(same.index_fill(1, torch.tensor([3]), -3.4), ids, mask, 33)
    check_says_something(same, ids, mask & False, 33)

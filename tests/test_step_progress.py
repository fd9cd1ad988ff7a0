"""The line that says what a step is doing: what it says, and that it is there."""

import sys

import pytest
from helpers import Table

from gndpo_trl.grpo import step_progress
from gndpo_trl.grpo.step_progress import GENERATING, LEARNING, StepLine


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def line(clock) -> StepLine:
    return StepLine(clock)


def pass_step(line: StepLine, clock: Clock) -> None:
    """30 s for 600 tokens, 10 s for a teacher that was asked before, 60 s for 1,200 tokens of learning."""
    line.begin(GENERATING)
    clock.now += 30
    line.advance(600)
    line.begin("teacher scoring")
    line.begin("student scoring")
    clock.now += 5
    line.begin("teacher scoring")
    clock.now += 5
    line.begin(LEARNING, 1200)
    clock.now += 60
    line.advance(1200)


def test_the_first_step_knows_no_time_left_until_its_last_phase(line, clock):
    assert line.text() == ""
    line.begin(GENERATING)
    clock.now += 4
    assert line.text() == ""  # quick steps have no line
    clock.now += 26
    assert line.text() == "generating 00:30"
    line.begin("teacher scoring")
    line.expect(2000)
    clock.now += 2
    line.advance(500)
    assert line.text() == "teacher scoring 00:02, 500 of 2,000 tokens, 250 tokens/s"
    line.begin(LEARNING, 1200)
    clock.now += 10
    line.advance(300)
    assert line.text() == "learning 00:10, 300 of 1,200 tokens, 30 tokens/s, 00:30 left in this step"


def test_later_steps_know_what_the_phases_took(line, clock):
    pass_step(line, clock)
    line.begin(GENERATING)
    clock.now += 10
    assert line.text() == "generating 00:10, 20 tokens/s last time, 01:30 left in this step"
    line.begin("teacher scoring")
    line.begin("student scoring")
    clock.now += 1
    assert line.text() == "student scoring 00:01, 01:09 left in this step"
    line.begin("teacher scoring")
    clock.now += 8  # longer than last time
    assert line.text() == "teacher scoring 00:08, 01:00 left in this step"


def test_an_evaluation_is_not_a_part_of_a_step(line, clock):
    pass_step(line, clock)
    line.begin(GENERATING)
    line.begin(LEARNING, 1000)
    clock.now += 10
    line.advance(500)
    line.pause(True)
    line.begin(GENERATING)  # of the evaluation
    clock.now += 500
    line.advance(77)
    assert line.text() == ""
    line.pause(False)
    assert line.text() == "learning 00:10, 500 of 1,000 tokens, 50 tokens/s, 00:10 left in this step"


@pytest.mark.parametrize(
    "disable_tqdm, is_main, is_terminal",
    [(False, True, True), (False, True, False), (True, True, True), (False, False, False)],
)
def test_it_is_drawn_on_the_main_process_unless_bars_are_off(
    make_trainer, text_dataset, monkeypatch, capsys, disable_tqdm, is_main, is_terminal
):
    for name in ("PATIENCE", "INTERVAL", "LOG_INTERVAL"):
        monkeypatch.setattr(step_progress, name, 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    trainer = make_trainer(
        teacher_model=Table(seconds=0.2),
        disable_tqdm=disable_tqdm,
        gradient_accumulation_steps=2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        trainer_options={"eval_dataset": text_dataset.select(range(4))},
        per_device_eval_batch_size=4,
    )
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: is_main)
    trainer.train()
    drawn = capsys.readouterr().err
    assert ("teacher scoring" in drawn) == (not disable_tqdm and is_main)
    assert ("left in this step" in drawn) == (not disable_tqdm and is_main)
    assert ("left in this step\n" in drawn) == (not disable_tqdm and is_main and not is_terminal)
    assert trainer._line is None


def test_phases_count_the_tokens_that_they_go_through(make_trainer, monkeypatch):
    seen = {}
    begin = StepLine.begin

    def watch(line, name, total=0):
        if line._phase is not None:
            seen.setdefault(line.phase, []).append((line._phase.done, line._phase.total))
        begin(line, name, total)

    monkeypatch.setattr(StepLine, "begin", watch)
    trainer = make_trainer(disable_tqdm=False, gradient_accumulation_steps=2, num_iterations=2, max_steps=3)
    trainer.train()
    assert seen.keys() == {GENERATING, "student scoring", "teacher scoring", LEARNING}
    # Two generation batches, of which the second is in progress; each is learned from twice.
    scored = [total for _, total in seen["student scoring"]]
    assert seen[LEARNING] == [(2 * scored[0], 2 * scored[0])]
    for phase in ("student scoring", "teacher scoring"):
        assert [total for _, total in seen[phase] if total] == scored and all(a == b for a, b in seen[phase])
    sampled = [done for done, _ in seen[GENERATING]]
    assert all(0 < some < all_tokens for some, all_tokens in zip(sampled, scored, strict=True))


def test_a_run_may_begin_with_an_evaluation_or_in_the_middle_of_a_batch(make_trainer, text_dataset, tmp_path):
    options = {"disable_tqdm": False, "num_iterations": 3, "output_dir": str(tmp_path), "save_strategy": "steps"}
    options |= {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    options["trainer_options"] = {"eval_dataset": text_dataset.select(range(8))}
    make_trainer(max_steps=1, **options).train()
    trainer = make_trainer(max_steps=2, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2

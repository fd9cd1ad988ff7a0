r"""Accuracy of `\boxed{}` answers: what counts as equal, what is counted as unparsed, and the metrics of a run."""

import threading
import time

import pytest
from trl.rewards import think_format_reward

from gndpo_trl import GNDPOTrainer, rewards
from gndpo_trl.rewards import boxed_accuracy_reward, check_answer


@pytest.mark.parametrize(
    "answer, solution",
    [
        (r"\frac{1}{2}", "0.5"),
        ("3/4", r"\frac{3}{4}"),
        (r"\sqrt{162}", r"9 \sqrt { 2 }"),
        (r"\frac{33}{2}", "16.5"),
        ("1,000", "1000"),
        (r"x = 5", "5"),
        (r"m\angle A = 75^\circ", "75"),
        (r"75^{\circ}", "75"),
        ("75°", "75"),
        ("75", r"75^\circ"),
        ("12 cm", "12"),
        (r"12 \text{ cm}^2", "12"),
        (r"\$12", "12"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        (r"\boxed{3}", "3"),
        ("3", "$3$"),
        ("3", r"so we get \boxed{3}"),
        ("(B)", "B"),
        (r"\text{B}", "b"),
        (r"\text{Isosceles}", "isosceles"),
    ],
)
def test_equal_answers(answer, solution):
    verdict = check_answer(f"<think>It is \\boxed{{0}}?</think>So it is \\boxed{{{answer}}}.", solution)
    assert verdict.correct and verdict.answer_parsed and verdict.solution_parsed


@pytest.mark.parametrize(
    "answer, solution",
    [
        ("0.33", r"\frac{1}{3}"),
        ("5.29", "5.3"),
        ("B", "A"),
        (r"9\sqrt{3}", r"9\sqrt{2}"),
        ("12 cm^2", "12"),  # read as 12·c·m²; with \text{} around the unit it is 12
    ],
)
def test_different_answers(answer, solution):
    verdict = check_answer(f"\\boxed{{{answer}}}", solution)
    assert not verdict.correct and verdict.answer_parsed


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"\boxed{1}, no, \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed { 3 }", "3"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{}", ""),
        (r"\boxed{1} and then \boxed{\frac{1}", None),  # cut off before the final answer was complete
        ("It is 3.", None),
    ],
)
def test_the_last_box_holds_the_answer(completion, answer):
    assert check_answer(completion, "3").answer == answer


@pytest.mark.parametrize("completion", ["It is 75.", r"\boxed{}", r"\boxed{5\sqrt{3}+}", r"\boxed{√75}"])
def test_answers_that_cannot_be_parsed_are_wrong(completion):
    verdict = check_answer(completion, "75")
    assert not verdict.correct and not verdict.answer_parsed and verdict.solution_parsed


def test_solutions_that_cannot_be_parsed_are_compared_as_text():
    verdict = check_answer(r"\boxed{ ∠abc }", "$∠ ABC$")
    assert verdict.correct and verdict.answer_parsed and not verdict.solution_parsed
    assert not check_answer(r"\boxed{∠ABD}", "∠ABC").correct
    assert not check_answer(r"\boxed{}", "$").correct


def test_conversational_and_plain_completions_with_metrics():
    texts = [r"\boxed{3}", r"\boxed{4}", "3", r"\boxed{∠A}"]
    solutions = ["3", "3", "3", "∠A"]
    logged = {}
    expected = [1.0, 0.0, 0.0, 1.0]
    assert boxed_accuracy_reward(texts, solutions, log_metric=logged.__setitem__) == expected
    assert logged == {"unparsed/answers": 0.25, "unparsed/solutions": 0.25}
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert boxed_accuracy_reward(completions=messages, solution=solutions, prompts=[None] * 4) == expected


def test_messages_are_scored_on_their_text():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    parts = [{"type": "text", "text": r"It is \boxed{3"}, {"type": "image"}, {"type": "text", "text": "}"}]
    completions = [
        [call],
        [{**call, "content": None}],
        [{"role": "assistant", "content": r"\boxed{3}"}, {"role": "tool", "name": "add", "content": "4"}, call],
        [{"role": "assistant", "content": parts}],
        [],
    ]
    logged = {}
    assert boxed_accuracy_reward(completions, ["3"] * 5, log_metric=logged.__setitem__) == [0, 0, 0, 1, 0]
    assert logged["unparsed/answers"] == 0.8


def test_an_answer_that_would_take_forever_ends_as_wrong(monkeypatch):
    monkeypatch.setattr(rewards, "TIMEOUT", 1)
    start = time.perf_counter()
    assert not check_answer(r"\boxed{9^{9^{9^9}}}", "3").correct
    assert time.perf_counter() - start < 4


def test_threads():
    results = []
    thread = threading.Thread(target=lambda: results.append(check_answer(r"\boxed{0.5}", r"\frac{1}{2}").correct))
    thread.start()
    thread.join()
    assert results == [True]


def test_monitor_of_a_run(checkpoints, text_dataset, make_config):
    trainer = GNDPOTrainer(
        model=checkpoints["qwen3-student"],
        reward_funcs=[boxed_accuracy_reward, think_format_reward],
        args=make_config(
            teacher_model_name_or_path=checkpoints["qwen3-teacher"], reward_weights=[0.9, 0.1], max_steps=1
        ),
        train_dataset=text_dataset.add_column("solution", ["∠A"] * len(text_dataset)),
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["rewards/boxed_accuracy_reward/mean"] == 0
    assert entry["unparsed/answers"] == entry["unparsed/solutions"] == 1

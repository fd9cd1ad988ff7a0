"""The demo's parts: data without leaks, answers that survive the tokenizer, and a run of a few steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import digits_data
import digits_models
import numpy as np
import pytest
from datasets import load_from_disk


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def splits():
    return digits_data.build_splits(seed=3, train_rows=400, validation_rows=50, test_rows=50)


def scans_of(split) -> set[bytes]:
    """The single scans of a split, as bytes."""
    pixels = [np.asarray(images[0].convert("L")) for images in split["images"]]
    return {half.tobytes() for image in pixels for half in (image[:, :8], image[:, 8:])}


def test_splits_share_no_scan_and_follow_from_the_seed(splits):
    train, validation, test = (scans_of(splits[name]) for name in ("train", "validation", "test"))
    assert len(train) > 300
    assert not train & validation and not train & test and not validation & test
    again = digits_data.build_splits(seed=3, train_rows=400, validation_rows=50, test_rows=50)
    assert again["test"]["solution"] == splits["test"]["solution"]
    other = digits_data.build_splits(seed=4, train_rows=400, validation_rows=50, test_rows=50)
    assert other["test"]["solution"] != splits["test"]["solution"]


def test_answers_are_right_and_survive_the_tokenizer(splits):
    tokenizer = digits_models.build_processor().tokenizer
    for row in splits["test"]:
        answer = row["completion"][0]["content"]
        assert digits_data.is_correct(answer, row["solution"])
        ids = tokenizer(answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == answer
        assert len(ids) < digits_models.MAX_NEW_TOKENS
    assert tokenizer.unk_token_id not in tokenizer(digits_data.QUESTION)["input_ids"]


def test_wrong_sums_are_one_too_high_in_half_of_the_answers(splits):
    noisy = digits_data.with_wrong_sums(splits["train"], seed=3)
    right = [digits_data.is_correct(row["completion"][0]["content"], row["solution"]) for row in noisy]
    assert 0.4 < np.mean(right) < 0.6
    assert noisy["solution"] == splits["train"]["solution"]
    first_wrong = right.index(False)
    wrong_sum = int(splits["train"][first_wrong]["solution"]) + 1
    assert digits_data.is_correct(noisy[first_wrong]["completion"][0]["content"], str(wrong_sum))


@pytest.mark.parametrize(
    "text, correct",
    [
        (r"<think>I see 3 and 5. 3+5=8.</think>\boxed{8}", True),
        (r"\boxed{7} no, \boxed{8}", True),
        (r"\boxed{8} no, \boxed{7}", False),
        (r"<think>3+5=8.</think>", False),
        ("8", False),
    ],
)
def test_only_the_last_box_counts(text, correct):
    assert digits_data.is_correct(text, "8") is correct
    assert digits_data.sum_reward([[{"role": "assistant", "content": text}]], ["8"]) == [float(correct)]


@pytest.mark.processes
def test_the_demo_runs_on_barely_trained_models(splits, tmp_path):
    """The whole command, with models of a few steps in place of the cached ones: everything but the accuracies."""
    splits.save_to_disk(tmp_path / "data-seed3")
    splits = load_from_disk(tmp_path / "data-seed3")
    for name, width in (("teacher-seed3", 32), ("student-seed3", 16)):
        processor = digits_models.build_processor()
        model = digits_models.build_model(processor, width=width, seed=3)
        digits_models.train_sft(
            model, processor, splits["train"], tmp_path / "sft", seed=3, max_steps=3, learning_rate=1e-3
        )
        digits_models.save(model, processor, tmp_path / name)
    command = [sys.executable, str(ROOT / "examples" / "digits_demo.py"), "--seed", "3"]
    options = ["--output_dir", str(tmp_path), "--max_steps", "3"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["steps"] == 3
    assert 0 <= summary["student_accuracy_after"] <= 1
    for name in ("seconds", "reverse_kl_before", "reverse_kl_after", "peak_grad_norm"):
        assert summary[name] > 0
    assert {"teacher_accuracy", "student_accuracy_before"} <= summary.keys()
    trained = tmp_path / "gndpo-seed3"
    links = re.findall(r'href="([^"]*)"', (trained / "report" / "report.html").read_text())
    pages = {trained / "token_scores" / f"train_{step:05d}.html" for step in (1, 2, 3)}
    assert {(trained / "report" / link).resolve() for link in links} == pages
    assert "accuracy, greedy, test scans" in result.stdout
    assert (trained / "model.safetensors").exists()

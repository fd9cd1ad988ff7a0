"""Image questions from their source to a training step: conversion, parquet, trainer, command line, bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import prepare_geometry3k as script
import pytest
import tiny_models
from datasets import Dataset, DatasetDict, enable_caching
from PIL import Image
from tiny_geometry import build_geometry
from transformers import AutoProcessor, AutoTokenizer
from trl import GRPOTrainer, TrlParser
from trl.rewards import think_format_reward

from gndpo_trl import GNDPOTrainer
from gndpo_trl.data import (
    INSTRUCTION,
    check_data_path,
    content_parts,
    drop_long_prompts,
    load_splits,
    prepare_questions,
    split_off_test,
)


SCRIPT = Path(__file__).parents[1] / "examples" / "prepare_geometry3k.py"
IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


@pytest.fixture(scope="module", autouse=True)
def keep_caching():
    yield
    enable_caching()  # the script disables it


def run(*arguments: str) -> None:
    script.main(*TrlParser(script.PrepareArguments).parse_args_and_config(list(arguments)))


@pytest.fixture(scope="module")
def geometry() -> DatasetDict:
    return build_geometry(mixed=True)


@pytest.mark.parametrize(
    "files", [("train", "test"), ("test",), ("test", "testmini"), ("train", "validation", "test")]
)
def test_files_in_a_folder_are_splits(geometry, tmp_path, files):
    for index, name in enumerate(files):
        geometry["train"].select(range(index + 1)).to_parquet(tmp_path / f"{name}.parquet")
    assert load_splits(str(tmp_path)).num_rows == {name: index + 1 for index, name in enumerate(files)}


@pytest.mark.parametrize(
    "name",
    [
        "./geometry",
        "../geometry",
        "/geometry",
        "~nobody-here/geometry",
        "runs/data/geometry",
        "a.parquet",
        "source/b",
        "rows.csv",
    ],
)
def test_a_mistyped_path_is_not_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "rows.csv").touch()  # there, but of a kind that is not read
    message = rf"`dataset_name` is '{re.escape(name)}'.*no folder.*\.parquet, \.json or \.jsonl.*'hf://datasets/"
    with pytest.raises(ValueError, match=message):
        load_splits(name)


@pytest.mark.parametrize("name", ["gsm8k", "owner/name", "owner/name-v1.5", "hf://datasets/source/b"])
def test_names_on_the_hub_are_not_taken_for_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    check_data_path(name)


def test_a_path_may_start_at_the_home_folder(geometry, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    geometry["test"].to_parquet(tmp_path / "test.parquet")
    assert load_splits("~/test.parquet").num_rows == {"train": 8}


@pytest.mark.parametrize(
    "problem, num_images, parts",
    [
        ("<image>Find x.", 1, [IMAGE, text("Find x.")]),
        ("In <image> find x.", 1, [text("In "), IMAGE, text(" find x.")]),
        ("Is <image> or <image>\nlarger?", 2, [text("Is "), IMAGE, text(" or "), IMAGE, text("\nlarger?")]),
        ("Add <image><image>", 2, [text("Add "), IMAGE, IMAGE]),
        ("Find x.", 2, [IMAGE, IMAGE, text("Find x.")]),
        ("Find x.", 0, [text("Find x.")]),
    ],
)
def test_markers_keep_their_places(problem, num_images, parts):
    assert content_parts(problem, num_images) == parts


def test_rows_for_the_trainer(geometry):
    source = geometry["train"]
    rows = prepare_questions(source, "train")
    assert rows.column_names == ["prompt", "images", "solution"]
    assert rows["solution"] == source["answer"]
    for row, original in zip(rows, source, strict=True):
        pixels = [[image.tobytes() for image in images] for images in (row["images"], original["images"])]
        assert pixels[0] == pixels[1]
        (message,) = row["prompt"]
        marked = "".join(part.get("text", "<image>") for part in message["content"])
        assert message["role"] == "user" and marked == f"{original['problem']}\n{INSTRUCTION}"


def test_the_instruction_can_be_replaced_or_left_out(geometry):
    source = geometry["train"].select(range(1))
    for instruction, expected in (("Answer only.", "rectangle.\nAnswer only."), ("", "rectangle.")):
        content = prepare_questions(source, "train", instruction=instruction)[0]["prompt"][0]["content"]
        assert content[-1]["text"].endswith(expected)


def test_a_reply_as_instructed_has_the_format_that_is_rewarded():
    assert re.search(r"Begin your reply with <think>.*</think>.*\\boxed\{\}", INSTRUCTION)
    replies = ["<think>2 * 3 = 6</think> \\boxed{6}", "So: <think>2 * 3 = 6</think> \\boxed{6}", "\\boxed{6}"]
    assert think_format_reward([[{"role": "assistant", "content": reply}] for reply in replies]) == [1, 0, 0]


def test_sources_that_know_no_image_type(geometry, tmp_path):
    """Files written with pandas hold dictionaries of bytes, and JSON holds paths."""
    expected = prepare_questions(geometry["test"], "test")[0]
    image = geometry["test"][0]["images"][0]
    image.save(tmp_path / "0.png")
    row = {"problem": geometry["test"][0]["problem"], "answer": geometry["test"][0]["answer"]}
    stored = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    pd.DataFrame([{**row, "images": [stored]}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({**row, "images": [str(tmp_path / "0.png")]}))
    for file in ("a.parquet", "b.jsonl"):
        assert prepare_questions(load_splits(str(tmp_path / file))["train"], "train")[0] == expected


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
@pytest.mark.parametrize("algorithm", ["gndpo", "grpo"])
def test_from_parquet_to_a_training_step(make_config, checkpoints, geometry, tmp_path, family, algorithm):
    student, teacher = checkpoints[f"{family}-student"], checkpoints[f"{family}-teacher"]
    rows = prepare_questions(geometry["train"], "train", processor=AutoProcessor.from_pretrained(student))
    rows.to_parquet(tmp_path / "train.parquet")
    loaded = load_splits(str(tmp_path))["train"]
    assert loaded["prompt"] == rows["prompt"]

    placeholders = list(range(3, 3 + len(tiny_models.SPECIAL_TOKENS)))
    options = {"max_steps": 1, "generation_kwargs": {"suppress_tokens": placeholders}}
    if algorithm == "gndpo":
        trainer = GNDPOTrainer(student, args=make_config(**options), train_dataset=loaded, teacher_model=teacher)
    else:
        config = make_config(importance_sampling_level="token", **options)
        trainer = GRPOTrainer(student, think_format_reward, args=config, train_dataset=loaded)

    # Rows 4 to 7: the image first, in the sentence, two images, and the image first again.
    batch = [loaded[index] for index in range(4, 8)]
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([row for row in batch for _ in range(2)])
    assert rollout["prompt_mask"].sum(1).tolist()[::2] == loaded["prompt_length"][4:8]
    assert rollout["num_images"][::2] == [1, 1, 2, 1]
    first_images = [
        tokens[mask.bool()].tolist().index(trainer.model.config.image_token_id)
        for tokens, mask in zip(rollout["prompt_ids"][::2], rollout["prompt_mask"][::2], strict=True)
    ]
    assert first_images[1] == first_images[0] + 2  # "The rectangle <image>"
    assert first_images[2] == first_images[0] + 1  # "First <image>"
    trainer.train()
    assert trainer.state.global_step == 1


def test_text_only_questions(make_config, checkpoints, geometry):
    source = (
        geometry["train"]
        .remove_columns("images")
        .map(lambda row: {"problem": row["problem"].replace("<image>", "it")})
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-student"])
    rows = prepare_questions(source, "train", columns={"images": ""}, processor=tokenizer)
    assert rows[0]["prompt"] == [{"role": "user", "content": f"{source[0]['problem']}\n{INSTRUCTION}"}]
    trainer = GNDPOTrainer(
        checkpoints["qwen3-student"],
        args=make_config(max_steps=1),
        train_dataset=rows,
        teacher_model=checkpoints["qwen3-teacher"],
    )
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([rows[0], rows[0]])
    assert rollout["prompt_mask"].sum(1).tolist() == [rows[0]["prompt_length"]] * 2
    trainer.train()


def test_long_prompts_are_dropped_whole(checkpoints, geometry):
    processor = AutoProcessor.from_pretrained(checkpoints["internvl-student"])
    rows = prepare_questions(geometry["train"], "train", processor=processor)
    longest = max(rows["prompt_length"])
    kept = drop_long_prompts(rows, "train", longest - 1)
    assert kept["prompt"] == [row["prompt"] for row in rows if row["prompt_length"] < longest]
    assert len(kept) < len(rows) and "prompt_length" not in kept.column_names
    with pytest.raises(ValueError, match="None of the 16 prompts of split 'train'.*Raise `max_prompt_length`"):
        drop_long_prompts(rows, "train", 5)


def test_the_processor_expands_the_images_before_it_counts(checkpoints, geometry):
    processor = AutoProcessor.from_pretrained(checkpoints["internvl-student"])
    (length,) = prepare_questions(geometry["train"].select([0]), "train", processor=processor)["prompt_length"]
    source = geometry["train"].select([0]).map(lambda row: {"problem": row["problem"][len("<image>") :]})
    no_images = {"images": ""}
    (length_of_text,) = prepare_questions(source, "train", no_images, processor=processor)["prompt_length"]
    assert length - length_of_text == processor.image_seq_length + 2  # and the image's start and end


def test_a_single_split_is_divided_by_seed(geometry):
    rows = prepare_questions(geometry["train"], "testmini")
    splits = split_off_test(DatasetDict(testmini=rows), 0.25, seed=0)
    assert splits.num_rows == {"train": 12, "test": 4}
    assert split_off_test(DatasetDict(testmini=rows), 4, seed=0)["test"]["prompt"] == splits["test"]["prompt"]
    assert split_off_test(DatasetDict(testmini=rows), 4, seed=1)["test"]["prompt"] != splits["test"]["prompt"]
    together = sorted(str(prompt) for split in splits.values() for prompt in split["prompt"])
    assert together == sorted(str(prompt) for prompt in rows["prompt"])


@pytest.mark.parametrize("test_size", [0, -0.5, 1.5, 16, 100])
def test_impossible_test_sizes_are_refused(geometry, test_size):
    with pytest.raises(ValueError, match="`test_size` is .*16 rows"):
        split_off_test(DatasetDict(train=geometry["train"]), test_size, seed=0)


def test_a_test_split_is_not_replaced(geometry):
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\] already.*Leave `test_size` out"):
        split_off_test(geometry, 0.5, seed=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"problem": "<image><image>Find x."}, "2 `<image>` markers in the problem, 1 images in the row.*one marker"),
        ({"images": []}, "1 `<image>` markers in the problem, 0 images"),
        ({"images": None}, "1 `<image>` markers in the problem, 0 images"),
        ({"problem": None}, "the problem is None.*remove the row"),
        ({"answer": ""}, "the answer is ''.*remove the row"),
        ({"answer": " "}, "the answer is ' '.*remove the row"),
        ({"answer": None}, "the answer is None.*remove the row"),
        ({"images": [{"bytes": b"no image", "path": None}]}, "an image does not open.*UnidentifiedImageError"),
        ({"images": [{"bytes": None, "path": "nowhere.png"}]}, "an image does not open.*nowhere.png.*Replace it"),
        ({"images": [None]}, "an image does not open"),
    ],
)
def test_bad_rows_are_named(geometry, change, message):
    good = geometry["train"][0]
    rows = Dataset.from_list([good, good, {**good, **change}], features=geometry["train"].features)
    with pytest.raises(ValueError, match=f"Split 'train', row 2: {message}"):
        prepare_questions(rows, "train")


def test_questions_without_images_stand_among_those_with_some():
    rows = {
        "problem": ["<image>Find x.", "What is x?"],
        "images": [[Image.new("RGB", (4, 4))], []],
        "answer": ["1", "2"],
    }
    prepared = prepare_questions(Dataset.from_dict(rows), "train", instruction="")
    assert [len(images) for images in prepared["images"]] == [1, 0]
    assert prepared[1]["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "What is x?"}]}]


def test_images_with_more_than_8_bits_are_refused():
    rows = Dataset.from_dict({"problem": ["x"], "images": [[Image.new("I;16", (4, 4), 40_000)]], "answer": ["1"]})
    with pytest.raises(ValueError, match="Split 'train', row 0: an image does not open.*'I;16'.*8 bits"):
        prepare_questions(rows, "train")


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"problem": "query"}, "Split 'train' has no column 'query', only .*`problem=NAME`"),
        ({"images": "image"}, "no column 'image'.*`images=NAME`, or `images=` if the set has no images"),
        ({"question": "problem"}, r"keys \['question'\].*write `problem=question`"),
    ],
)
def test_missing_columns_are_named(geometry, columns, message):
    with pytest.raises(ValueError, match=message):
        prepare_questions(geometry["train"], "train", columns=columns)


def test_a_text_model_does_not_measure_images(checkpoints, geometry):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-student"])
    with pytest.raises(ValueError, match="has images, but .* is no processor for images.*image-text model"):
        prepare_questions(geometry["train"], "train", processor=tokenizer)


@pytest.mark.processes
def test_command_line(checkpoints, geometry, tmp_path):
    geometry.save_to_disk(tmp_path / "source")
    source_files = sorted((tmp_path / "source").rglob("*"))
    student = checkpoints["internvl-student"]
    lengths = prepare_questions(geometry["train"], "train", processor=AutoProcessor.from_pretrained(student))[
        "prompt_length"
    ]
    limit = sorted(lengths)[12]
    num_kept = sum(length <= limit for length in lengths)
    # A process that knows the processors of the tiny models.
    start = f"import runpy, tiny_models; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    arguments = ["--dataset_name", tmp_path / "source", "--output_dir", tmp_path / "out"]
    arguments += ["--model_name_or_path", student, "--max_prompt_length", limit]
    path = os.pathsep.join([str(Path(tiny_models.__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    assert "Preparing train" in result.stderr  # the progress bar
    table = {line.split()[0]: [int(cell) for cell in line.split()[1:]] for line in result.stdout.splitlines()[-2:]}
    splits = load_splits(str(tmp_path / "out"))
    assert table["train"] == [16, 16 - num_kept, num_kept] and 0 < num_kept < 16
    assert splits.num_rows == {"train": num_kept, "test": table["test"][2]}
    assert splits["train"][0]["images"][0].mode == "RGB"
    assert sorted((tmp_path / "source").rglob("*")) == source_files


@pytest.fixture
def other_columns(tmp_path) -> list[str]:
    """Arguments for a source with one image per row, no markers, numbers as answers and a split without answers."""
    rows = [
        {"question": row["problem"].removeprefix("<image>"), "image": row["images"][0], "label": 2}
        for row in build_geometry()["train"]
    ]
    hidden = Dataset.from_list([{**row, "label": None} for row in rows])
    DatasetDict(testmini=Dataset.from_list(rows), hidden=hidden).save_to_disk(tmp_path / "source")
    mapping = ["--columns", "problem=question", "images=image", "answer=label"]
    return ["--dataset_name", str(tmp_path / "source"), "--output_dir", str(tmp_path / "out"), *mapping]


def test_a_set_with_other_columns(other_columns, tmp_path, capsys):
    run(*other_columns, "--splits", "testmini")
    assert "No prompt was measured" in capsys.readouterr().out
    splits = load_splits(str(tmp_path / "out"))
    assert splits.num_rows == {"testmini": 16} and splits["testmini"][0]["solution"] == "2"
    assert [part["type"] for part in splits["testmini"][0]["prompt"][0]["content"]] == ["image", "text"]
    with pytest.raises(ValueError, match="`output_dir` is .* not empty"):
        run(*other_columns, "--splits", "testmini")


def test_a_test_split_from_the_command_line(other_columns, tmp_path):
    run(*other_columns, "--splits", "testmini", "--test_size", "0.25")
    assert load_splits(str(tmp_path / "out")).num_rows == {"train": 12, "test": 4}


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "Split 'hidden', row 0: the answer is None"),
        (["--splits", "mini"], r"`splits` is 'mini', but the dataset has the splits \['hidden', 'testmini'\]"),
        (["--columns", "question"], "`columns` has 'question'. Write `problem=NAME`"),
    ],
)
def test_bad_options_are_named(other_columns, options, message):
    with pytest.raises(ValueError, match=message):
        run(*other_columns, *options)

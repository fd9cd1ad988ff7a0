"""The token view: the same rows in a parquet file, in the terminal, and for wandb; the page is opened in `test_token_page`."""

import io
import json
import math
import struct
import sys
from concurrent.futures import Future
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from helpers import make_row, plain_logps
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback

from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.token_view.images import as_png, content, once_each
from gndpo_trl.token_view.page import page_data, rows_in_page, write_page
from gndpo_trl.token_view.rows import extreme_tokens, rows_of, sample_rows, score_scale
from gndpo_trl.token_view.table import report_table, write_parquet
from gndpo_trl.token_view.terminal import print_rows
from gndpo_trl.token_view.token_text import TokenTexts


def train_and_catch(trainer) -> list[dict]:
    """Train, and return the rollouts of all generation batches."""
    rollouts, compute = [], trainer._generate_and_score_completions

    def catch(inputs):
        rollout = compute(inputs)
        rollouts.append({**rollout, "training": trainer.model.training})
        return rollout

    trainer._generate_and_score_completions = catch
    trainer.train()
    return rollouts


def read(trainer) -> dict[str, list[dict]]:
    """Rows of each parquet file, by its name; every file has its page."""
    folder = Path(trainer.args.output_dir, "token_scores")
    files = sorted(folder.glob("*.parquet"))
    assert sorted(path.with_suffix(".html") for path in files) == sorted(folder.glob("*.html"))
    assert len(list(folder.iterdir())) == 2 * len(files)  # no half of a file is left
    return {path.stem: pq.read_table(path).to_pylist() for path in files}


# What is written


def test_rows_are_what_the_trainer_computed(make_trainer, checkpoints, capsys):
    trainer = make_trainer(log_completions=True, num_completions_to_print=1, score_clip=0.3, max_steps=1)
    (rollout,) = train_and_catch(trainer)
    (name, rows), *others = read(trainer).items()
    assert name == "train_00001" and not others and len(rows) == len(rollout["completion_ids"]) == 4

    mask = valid_tokens(rollout)
    teacher = plain_logps(Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"]), rollout)
    student = plain_logps(Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"]), rollout)
    clamped = 0
    for row, record in enumerate(rows):
        length = mask[row].sum().item()
        ids = rollout["completion_ids"][row, :length]
        assert record["token_ids"] == ids.tolist()
        assert record["advantages"] == rollout["advantages"][row, :length].tolist()
        assert record["teacher_logps"] == pytest.approx(teacher[row, :length].tolist(), abs=1e-5)
        assert record["student_logps"] == pytest.approx(student[row, :length].tolist(), abs=1e-5)
        expected = (teacher - student)[row, :length]
        assert record["scores"] == pytest.approx(expected.tolist(), abs=2e-5)
        assert record["clamped"] == [abs(score) > 0.3 for score in record["scores"]]
        clamped += sum(record["clamped"])
        assert record["completion"] == trainer._tokenizer.decode(ids) == "".join(record["tokens"])
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        assert record["prompt"] == trainer._tokenizer.decode(prompt)
        assert record["reward"] == pytest.approx(expected.mean().item(), abs=1e-5) == record["rewards/teacher_score"]
        assert (record["step"], record["mode"], record["rank"], record["images"]) == (1, "train", 0, [])
    assert 0 < clamped < mask.sum()
    printed = capsys.readouterr().out
    assert printed.count("Tokens of step 1, train") == 1
    assert "Completion" not in printed  # TRL's own table of the same samples


def test_nothing_is_written_unless_it_is_asked_for(make_trainer, capsys):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert not Path(trainer.args.output_dir, "token_scores").exists()
    assert "Tokens of step" not in capsys.readouterr().out


def test_each_logged_batch_is_written_once_and_evaluations_by_their_names(make_trainer, text_dataset):
    """Two logs in each generation batch, batches between logs, and two evaluation sets at the same step."""
    trainer = make_trainer(
        log_completions=True,
        num_completions_to_print=0,
        num_iterations=2,
        max_steps=5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=5,
        per_device_eval_batch_size=4,
        num_generations_eval=1,
        trainer_options={
            "eval_dataset": {"a/b": text_dataset.select(range(3)), "c": text_dataset.select(range(3, 9))}
        },
    )
    rollouts = train_and_catch(trainer)
    files = read(trainer)
    assert list(files) == ["eval_a_b_00005", "eval_c_00005", "train_00001", "train_00003", "train_00005"]
    batches = [rollout for rollout in rollouts if rollout["training"]]
    for name, batch in zip(("train_00001", "train_00003", "train_00005"), batches, strict=True):
        for record, ids in zip(files[name], batch["completion_ids"].tolist(), strict=True):
            assert record["token_ids"] == ids[: len(record["token_ids"])]
    # As TRL's table, no more than the newest `generation_batch_size` completions.
    assert [len(files["eval_a_b_00005"]), len(files["eval_c_00005"])] == [3, 4]
    assert {record["mode"] for record in files["eval_c_00005"]} == {"eval_c"}


def test_batches_between_two_logs_leave_only_the_last(make_trainer):
    trainer = make_trainer(log_completions=True, num_completions_to_print=0, max_steps=5, logging_steps=2)
    rollouts = train_and_catch(trainer)
    files = read(trainer)
    assert list(files) == ["train_00002", "train_00004", "train_00005"]  # transformers logs the end of training too
    for name, rollout in zip(files, (rollouts[1], rollouts[3], rollouts[4]), strict=True):
        assert [record["token_ids"] for record in files[name]] == [
            ids[: mask.sum()].tolist()
            for ids, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
        ]


def test_completions_are_logged_at_intervals_at_first_and_at_last(make_trainer):
    trainer = make_trainer(
        log_completions=True, num_completions_to_print=0, max_steps=6, log_completions_steps=4, logging_steps=1
    )
    rollouts = train_and_catch(trainer)
    files = read(trainer)
    assert list(files) == ["train_00001", "train_00004", "train_00006"]
    assert files["train_00004"][0]["token_ids"][0] == rollouts[3]["completion_ids"][0, 0]
    tables = sorted(path.stem for path in Path(trainer.args.output_dir, "completions").iterdir())
    assert tables == ["completions_00001", "completions_00004", "completions_00006"]  # TRL's own

    trainer.args.log_completions_steps, trainer._completions_logged = None, {}
    trainer.state.max_steps = 10_000

    def logged(logs: dict, steps: range) -> list[int]:
        found = []
        for trainer.state.global_step in steps:
            if trainer._completions_due(logs):
                trainer._completions_logged["train"] = trainer.state.global_step
                found.append(trainer.state.global_step)
        return found

    assert logged({"loss": 0.0}, range(10, 10_001, 10)) == [10, *range(100, 10_001, 100)]
    assert logged({"mine": 0.0}, range(0, 20_000, 10)) == []  # which one rank may log alone


def test_what_cannot_be_written_is_said_once_and_the_run_goes_on(make_trainer, capsys, recwarn):
    options = {"log_completions": True, "num_completions_to_print": 1, "max_steps": 2}
    trainer = make_trainer(save_strategy="steps", save_steps=2, **options)
    folder = Path(trainer.args.output_dir)
    (folder / "completions").rmdir()
    for name in ("completions", "token_scores"):
        (folder / name).write_text("where a folder should be")
    trainer.train()
    assert trainer.state.global_step == 2 and (folder / "checkpoint-2" / "trainer_state.json").exists()
    assert [entry["step"] for entry in trainer.state.log_history if "reverse_kl" in entry] == [1, 2]
    said = [str(warning.message) for warning in recwarn if "could not be shown" in str(warning.message)]
    assert [text.split(" could")[0] for text in said] == [
        "At step 1, TRL's table of completions",
        "At step 1, the token view's file",
        "At step 1, the token view's page",
    ]
    printed = capsys.readouterr().out
    assert "Tokens of step 1, train" in printed and "Tokens of step 2, train" in printed


def test_an_error_of_a_callback_is_not_taken_for_one_of_a_table(make_trainer):
    class Stops(TrainerCallback):
        def on_log(self, *args, **kwargs):
            raise OSError("of the user's own")

    trainer = make_trainer(log_completions=True, num_completions_to_print=0, trainer_options={"callbacks": [Stops()]})
    with pytest.raises(OSError, match="of the user's own"):
        trainer.train()


def test_completions_are_not_uploaded_with_the_model(make_trainer, monkeypatch):
    uploaded = []

    def upload_folder(self, folder_path, ignore_patterns=None, **kwargs):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        uploaded.append(list(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
        done = Future()
        done.set_result(None)
        return done

    # The hub, in whose place stands what would have reached it.
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **kwargs: RepoUrl(f"http://x/{name}", endpoint="http://x")
    )
    options = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 1, "hub_model_id": "user/model"}
    trainer = make_trainer(push_to_hub=True, hub_strategy="checkpoint", save_strategy="steps", save_steps=1, **options)
    trainer.train()
    trainer.push_to_hub()
    assert read(trainer).keys() == {"train_00001"}
    assert len(uploaded) >= 3 and all(any(path.endswith("model.safetensors") for path in paths) for paths in uploaded)
    wrong = [path for paths in uploaded for path in paths if "token_scores" in path or "completions" in path]
    assert not wrong


def test_a_run_that_goes_on_writes_from_its_next_generation_batch_on(make_trainer, tmp_path):
    options = {"log_completions": True, "num_completions_to_print": 0, "num_iterations": 2, "max_steps": 4}
    first = make_trainer(save_strategy="steps", save_steps=1, **options)
    first.train()
    expected = read(first)
    assert list(expected) == ["train_00001", "train_00003"]
    second = make_trainer(output_dir=str(tmp_path / "second"), **options)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-1")))
    found = read(second)
    assert list(found) == ["train_00003"]  # the rows of the batch in progress are not part of a checkpoint
    assert found["train_00003"] == expected["train_00003"]


def test_an_evaluation_shows_nothing_of_a_prediction_before_it(make_trainer, text_dataset):
    trainer = make_trainer(
        log_completions=True,
        num_completions_to_print=0,
        num_generations_eval=1,
        trainer_options={"eval_dataset": text_dataset.select([7])},
    )
    trainer.predict(text_dataset.select(range(2)))
    trainer.evaluate()
    ((name, rows),) = read(trainer).items()
    assert name == "eval_00000" and len(rows) == 1
    assert text_dataset[7]["prompt"][0]["content"] in rows[0]["prompt"]


def test_rewards_stand_beside_the_score(make_trainer):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids]

    def one(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(
        log_completions=True,
        num_completions_to_print=0,
        reward_weights=[0.5, 2.0],
        trainer_options={"reward_funcs": [length, one]},
    )
    trainer.train()
    for records in read(trainer).values():
        for record in records:
            count = len(record["token_ids"])
            assert record["rewards/length"] == (count if count % 2 else None)
            assert record["reward"] == (0.5 * count if count % 2 else 0.0) + 2.0
            scores = record["scores"]
            assert record["rewards/teacher_score"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_completions_that_the_loss_leaves_out_are_shown_without_scores(make_trainer):
    trainer = make_trainer(
        log_completions=True,
        num_completions_to_print=2,
        mask_truncated_completions=True,
        max_completion_length=12,
        per_device_train_batch_size=16,
        max_steps=1,
    )
    (rollout,) = train_and_catch(trainer)
    rows = read(trainer)["train_00001"]
    end = trainer._tokenizer.eos_token_id
    ended = [record["token_ids"][-1] == end for record in rows]
    assert set(ended) == {True, False}, "the seed has only one kind of completions"
    for record, is_whole, ids in zip(rows, ended, rollout["completion_ids"].tolist(), strict=True):
        count = len(record["token_ids"])
        if is_whole:
            assert None not in record["scores"] and None not in record["teacher_logps"]
        else:
            assert record["token_ids"] == ids and count == 12
            assert record["scores"] == record["teacher_logps"] == record["student_logps"] == [None] * count
            assert record["advantages"] == [0.0] * count and not any(record["clamped"])
            assert record["reward"] is None


def test_tokens_out_of_the_loss_and_empty_completions():
    """Tool output keeps its log-probs; what the teacher does not know has none; an empty completion has no tokens."""
    pad = 0
    rollout = {
        "prompt_ids": torch.tensor([[pad, 5, 6], [5, 6, 7], [pad, pad, 5]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[3, 4, pad, pad], [pad] * 4, [3, pad, 4, 2]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [0] * 4, [1] * 4]),
        "advantages": torch.zeros(3, 4),
    }
    teacher, student = torch.full((3, 4), -1.0), torch.full((3, 4), -2.0)
    teacher[2, 0] = float("nan")
    mask = torch.tensor([[1, 1, 0, 0], [0] * 4, [0, 0, 1, 1]]).bool()
    scores = (teacher - student).masked_fill(~mask, 0.0)
    rows = rows_of(rollout, scores, (teacher, student), mask, score_clip=None, rank=3, pad_token_id=pad)
    assert [row.completion_ids.tolist() for row in rows] == [[3, 4], [], [3, pad, 4, 2]]
    assert [row.prompt_ids.tolist() for row in rows] == [[5, 6], [5, 6, 7], [5]]
    np.testing.assert_array_equal(rows[2].scores, [np.nan, np.nan, 1, 1])
    np.testing.assert_array_equal(rows[2].teacher_logps, [np.nan, -1, -1, -1])
    assert rows[2].student_logps.tolist() == [-2.0] * 4
    assert rows[0].rank == 3 and not rows[0].clamped.any()
    assert math.isnan(rows[1].mean_score) and rows[2].mean_score == 1.0


def test_a_batch_without_any_score_can_be_written(tmp_path, capsys):
    rows = [make_row([], []), make_row(["a"], [float("nan")])]
    assert extreme_tokens(rows, 3) == ([], []) and score_scale(rows, None) == 1.0
    write_parquet(rows, str(tmp_path / "rows.parquet"), 1, "train")
    write_page(rows, str(tmp_path / "rows.html"), 1, "train", None)
    print_rows(rows, 1, "train", None, None, Console())
    assert [record["scores"] for record in pq.read_table(tmp_path / "rows.parquet").to_pylist()] == [[], [None]]
    assert "Tokens of step 1" in capsys.readouterr().out


def test_extreme_tokens_are_those_of_the_whole_batch():
    rows = [make_row(list("abc"), [0.0, -3.0, 9.0]), make_row(list("de"), [float("nan"), -8.0]), make_row([], [])]
    rows.append(make_row(["f"], [1.0]))
    assert extreme_tokens(rows, 2) == ([(1, 1), (0, 1)], [(0, 2), (3, 0)])
    assert extreme_tokens(rows, 10) == ([(1, 1), (0, 1)], [(0, 2), (3, 0)])  # five scores: no token is at both ends
    assert score_scale(rows, None) == 9.0 and score_scale(rows, 5.0) == 5.0


def test_images_come_back_from_the_file(make_trainer, image_dataset):
    trainer = make_trainer("internvl", log_completions=True, num_completions_to_print=0, max_steps=1)
    trainer.train()
    path = Path(trainer.args.output_dir, "token_scores", "train_00001.parquet")
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    known = {tuple(map(digest, row["images"])) for row in image_dataset}
    assert len(rows) == 4
    for row in rows:
        assert tuple(map(digest, row["images"])) in known
        assert "<IMG_CONTEXT>" in row["prompt"]
    page = path.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == len({digest(image) for row in rows for image in row["images"]})


def digest(image: Image.Image) -> tuple:
    return image.size, image.convert("RGB").tobytes()


def test_images_can_be_left_out(make_trainer):
    trainer = make_trainer(
        "internvl", log_completions=True, num_completions_to_print=0, max_steps=1, log_multimodal=False
    )
    trainer.train()
    assert [record["images"] for record in read(trainer)["train_00001"]] == [[]] * 4


@pytest.mark.parametrize("mode", ["CMYK", "F", "LA", "I;16"])
def test_images_of_any_kind_get_into_page_and_file(tmp_path, mode):
    image = Image.new("L", (900, 30), 7).convert("I").convert(mode) if mode == "I;16" else Image.new(mode, (900, 30))
    rows = [make_row(["a"], [1.0], images=[image, "https://example.org/x.png"])]
    data = page_data(rows, 5.0)
    assert data["images"][0]["url"].startswith("data:image/png;base64,")
    assert data["images"][1] == {"path": "https://example.org/x.png"}  # named, never fetched
    write_parquet(rows, str(tmp_path / "rows.parquet"), 1, "train")


def test_an_image_of_several_completions_is_encoded_and_written_once(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 700, 3), dtype=np.uint8)
    images = [Image.fromarray(noise) for _ in range(8)]  # objects of their own, as data sets make them
    others = [Image.fromarray(255 - noise), "https://example.org/x.png", "https://example.org/x.png"]
    calls = []
    once = once_each(lambda image: calls.append(image) or len(calls))
    assert [once(image) for image in (*images, *others)] == [1] * 8 + [2, 3, 3] and len(calls) == 3
    palettes = [Image.new("P", (2, 2)), Image.new("P", (2, 2))]
    palettes[0].putpalette([255, 0, 0])
    palettes[1].putpalette([0, 255, 0])
    assert content(palettes[0]) != content(palettes[1])

    rows = [make_row(["a"], [1.0], images=[image, images[0]]) for image in images]
    write_parquet(rows, str(tmp_path / "rows.parquet"), 1, "train")
    assert (tmp_path / "rows.parquet").stat().st_size < 1.2 * len(as_png(images[0]))
    found = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert all(len(row["images"]) == 2 for row in found)
    assert Image.open(io.BytesIO(found[7]["images"][1]["bytes"])).tobytes() == images[0].tobytes()
    data = page_data(rows, 5.0)
    assert len(data["images"]) == 1 and all(row["images"] == [0, 0] for row in data["rows"])


def test_a_page_has_the_rows_of_the_most_extreme_tokens(tmp_path):
    rows = [make_row(["a", "b"], [0.1 * number, -0.1]) for number in range(40)]
    rows[7].scores[0], rows[31].scores[1] = 9.0, -9.0
    shown = rows_in_page(rows, 3, step=1)
    assert len(shown) == 3 and {7, 31} <= {*shown} and shown == sorted(shown)
    data = page_data(rows, 5.0, shown)
    assert [row["number"] - 1 for row in data["rows"]] == shown
    assert (data["num_completions"], data["num_tokens"], sum(data["histogram"]["counts"])) == (40, 80, 80)
    (row, token), *_ = data["extremes"]["lowest"]
    assert data["rows"][row]["number"] == 32 and token == 1
    assert rows_in_page(rows, None, step=1) == rows_in_page(rows, 40, step=1) == [*range(40)]
    write_page(rows, str(tmp_path / "few.html"), 1, "train", 5.0, 3)
    write_page(rows, str(tmp_path / "all.html"), 1, "train", 5.0)
    sizes = [(tmp_path / name).stat().st_size for name in ("few.html", "all.html")]
    assert sizes[1] - sizes[0] > 37 * 100


def test_columns_that_rewards_add_are_still_printed(make_trainer, capsys):
    def kind(completions, log_extra, **kwargs):
        log_extra("kind", ["rare\x1b[2J"] * len(completions))
        return [1.0] * len(completions)

    trainer = make_trainer(
        log_completions=True, num_completions_to_print=1, max_steps=1, trainer_options={"reward_funcs": kind}
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert "Tokens of step 1, train" in printed and "rare" in printed
    assert "\x1b" not in printed  # nothing that a terminal would obey
    assert trainer.num_completions_to_print == 1


# Text of tokens


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, as in the tokenizers of GPT-2 and Qwen, and three merges that cut through characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    a, space = "a", "Ġ"
    euro = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("€")[0][0]
    merges = [(space, euro[0]), (euro[1], euro[2])]
    vocabulary = {token: id for id, token in enumerate(["<s>", *alphabet, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    assert a in vocabulary
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's way, which drops the space that a text begins with, and falls back to bytes."""
    tokens = ["<unk>", "<s>", "▁a", "▁one", "two", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", unk_token="<unk>")


def test_a_character_of_several_tokens_is_with_the_first_of_them():
    tokenizer = byte_level()
    ids = np.array(tokenizer("a €b€ 🦉\n")["input_ids"] + [0])
    texts = TokenTexts(tokenizer).tokens(ids)
    assert texts == ["a", " €", "", "b", "€", "", " ", "🦉", "", "", "", "\n", "<s>"]
    assert "".join(texts) == tokenizer.decode(ids)


def test_bytes_that_never_become_a_character_stay_apart():
    tokenizer = byte_level()
    whole = np.array(tokenizer("🦉")["input_ids"])
    texts = TokenTexts(tokenizer)
    assert texts.tokens(whole[:2]) == ["\ufffd"] * 2  # cut off
    assert texts.tokens(np.concatenate([whole[1:2], whole])) == ["\ufffd", "🦉", "", "", ""]
    assert texts.tokens(whole[:0]) == []
    half, space = whole[:1], np.array(tokenizer(" €")["input_ids"])
    assert texts.tokens(np.concatenate([half, space])) == ["\ufffd", " €", ""]


def test_spaces_between_tokens_stay():
    tokenizer = metaspace()
    ids = np.array([3, 4, 3, 6 + 0xC3, 6 + 0xA9, 3])
    texts = TokenTexts(tokenizer).tokens(ids)
    assert texts == ["one", "two", " one", "é", "", " one"]
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_tokenizer_without_words_will_do():
    backend = Tokenizer(models.WordLevel({"+": 0, "-": 1}))
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert "".join(texts.tokens(np.array([0, 1]))).replace(" ", "") == "+-"


def test_placeholders_of_images_are_counted_in_prompts():
    tokenizer = tiny_models.build_tokenizer()
    ids = tokenizer("what " + "<IMG_CONTEXT>" * 300 + "is <img> <img> ?")["input_ids"]
    assert TokenTexts(tokenizer).prompt(np.array(ids)) == "what <IMG_CONTEXT>×300 is <img> <img> ?"


# In the terminal


def test_the_terminal_shows_colours_and_nothing_that_moves_its_cursor():
    rows = [
        make_row(["one", " \x1b[2J\x9b2J", " three\n", "four"], [-5.0, 7.0, 0.01, float("nan")], rewards={"r": 0.5}),
        make_row(["other"], [1.0]),
    ]
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="truecolor", width=200)
    print_rows(rows, 3, "train", 5.0, None, console)
    text = output.getvalue()
    assert "48;2;179;88;6mone" in text  # the full orange behind it
    assert "\x1b[4;37;48;2;33;102;172m ␛[2J\ufffd2J" in text  # beyond the clamp: underlined on the full blue
    assert "\x1b[2mfour" in text and "\x1b[2J" not in text and "\x9b" not in text
    assert "Lowest scores of the batch" in text and "⟦" in text and "r 0.5" in text and "±5" in text
    for count, panels in ((0, 0), (1, 1)):
        console.file = io.StringIO()
        print_rows(rows, 3, "train", 5.0, count, console)
        assert console.file.getvalue().count("Tokens of step 3") == panels
        assert console.file.getvalue().count("mean score") == panels


# Beside the metrics


def test_tables_have_a_prompt_once_where_that_is_asked_for():
    rows = [make_row(["a", "b"], [6.0, float("nan")]), make_row(["c"], [1.0]), make_row(["d"], [1.0], prompt="who ?")]
    for unique_prompts, completions in ((False, ["ab", "c", "d"]), (True, ["ab", "d"])):
        table = report_table(rows, 2, "eval", None, unique_prompts)
        assert table["completion"].tolist() == completions
    first = table.iloc[0]
    assert (first["step"], first["mode"], first["score"], first["advantage"]) == (2, "eval", 6.0, 3.0)
    assert json.loads(first["tokens"]) == [["a", 6.0, 5.0, -1.0, 3.0, True], ["b", None, None, None, 0.0, False]]


def wandb_records(folder: Path):
    """
    What an offline run has written, record by record: a header of 7 bytes and then LevelDB's log format, blocks of 32 KiB
    that hold pieces of records, each after its checksum, length and kind (whole, first, middle, last).
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, place, pieces = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if left < 7 or kind == 0:  # the rest of a block is empty
            place += left
            continue
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def test_wandb_gets_the_table_beside_the_metrics(make_trainer, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(
        "internvl", log_completions=True, num_completions_to_print=2, report_to=["wandb"], max_steps=1
    )
    trainer.train()
    folder = Path(wandb.run.dir)
    wandb.finish()
    wandb.teardown()  # its other process has written everything when it is gone, not before
    found = {
        "/".join(item.nested_key): json.loads(item.value_json)
        for record in wandb_records(folder.parent)
        for item in record.history.item
    }
    logged = trainer.state.log_history[0]
    assert found["train/reverse_kl"] == pytest.approx(logged["reverse_kl"])
    assert found["completions/_type"] == found["token_scores/_type"] == "table-file"
    table = json.loads((folder / found["token_scores/path"]).read_text())
    rows = read(trainer)["train_00001"]
    rows = [rows[number] for number in sample_rows(rows, 2, step=1)]
    assert len(table["data"]) == len(rows)
    for line, row in zip(table["data"], rows, strict=True):
        line = dict(zip(table["columns"], line, strict=True))
        assert line["completion"] == row["completion"] and line["prompt"] == row["prompt"]
        assert line["reward"] == pytest.approx(row["reward"])
        tokens = json.loads(line["tokens"])
        assert [token[0] for token in tokens] == row["tokens"]
        for place, name in enumerate(("scores", "teacher_logps", "student_logps", "advantages"), start=1):
            assert [token[place] for token in tokens] == pytest.approx(row[name], abs=1e-4)
        assert len(line["images"]) == len(row["images"]) > 0


def test_tensorboard_gets_the_metrics(make_trainer, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = make_trainer(log_completions=True, num_completions_to_print=0, report_to=["tensorboard"], max_steps=2)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [entry for entry in trainer.state.log_history if "reverse_kl" in entry]
    for metric in ("reverse_kl", "score/p50", "grad_norm", "time/generation"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{metric}")]
        assert found == [(entry["step"], pytest.approx(entry[metric])) for entry in logged]
    assert len(logged) == 2


def test_trackio_gets_the_table_beside_the_metrics(make_trainer, tmp_path, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    # Its folders are constants, made when TRL imports it.
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "trackio"]:
        for constant in {"TRACKIO_DIR", "MEDIA_DIR"} & vars(module).keys():
            monkeypatch.setattr(module, constant, tmp_path / constant)
    options = {"report_to": ["trackio"], "project": "token-view", "run_name": "run", "max_steps": 1}
    trainer = make_trainer("internvl", log_completions=True, num_completions_to_print=4, **options)
    trainer.train()
    found = {name: value for entry in storage.get_logs("token-view", "run") for name, value in entry.items()}
    logged = trainer.state.log_history[0]
    assert (tmp_path / "TRACKIO_DIR").is_dir()
    assert found["train/reverse_kl"] == pytest.approx(logged["reverse_kl"])
    rows = read(trainer)["train_00001"]
    table = found["token_scores"]
    assert table["_type"] == "trackio.table" and len(table["_value"]) == len(rows)
    for line, row in zip(table["_value"], rows, strict=True):
        assert line["completion"] == row["completion"] and line["prompt"] == row["prompt"]
        tokens = json.loads(line["tokens"])
        assert [token[0] for token in tokens] == row["tokens"]
        assert [token[1] for token in tokens] == pytest.approx(row["scores"], abs=1e-4)
        assert len(line["images"]) == len(row["images"]) > 0

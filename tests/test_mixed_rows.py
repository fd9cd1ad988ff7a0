"""Rows with and without pictures in one run: trained, evaluated, resumed and sampled as the two kinds are apart."""

import math

import digits_models
import pytest
import tiny_models
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from helpers import (
    assert_resumes_in_the_middle,
    assert_same_gradients,
    completions_of,
    gradients,
    plain_logps,
)
from transformers import Qwen3ForCausalLM

from gndpo_trl.grpo.microbatches import select_rows
from gndpo_trl.grpo.mixed_rows import is_mixed, may_have_pictures, picture_row, without_empty_pictures
from gndpo_trl.grpo.rollouts import valid_tokens


FAMILIES = ["internvl", "qwen25vl"]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
NUM_PICTURES = [0, 1, 0, 2, 1, 0, 0, 1]  # of each row
LENGTHS = [5, 9, 3, 12, 1, 4, 8, 6]


def make_rows(counts=NUM_PICTURES, in_messages: bool = False) -> list[dict]:
    rows = []
    for index, count in enumerate(counts):
        pictures = [tiny_models.draw_image(index + k) for k in range(count)]
        content = f"what is {WORDS[index]} ?"
        if in_messages:
            parts = [{"type": "image", "image": picture} for picture in pictures]
            rows.append({"prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": content}]}]})
        else:
            rows.append({"prompt": [{"role": "user", "content": content}], "images": pictures})
    return rows


@pytest.fixture
def mixed() -> Dataset:
    return Dataset.from_list(make_rows())


def canned(prompts, trainer):
    """The completion of each prompt follows from its word."""
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    texts = [trainer._tokenizer.decode(ids) for ids in prompt_ids]
    completions = completions_of(LENGTHS)
    completion_ids = [next(completions[k] for k, word in enumerate(WORDS) if f"{word} ?" in text) for text in texts]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": [[0.0] * len(c) for c in completion_ids],
    }


@pytest.fixture
def make(make_trainer, mixed):
    def build(family: str, rows=None, **options):
        options = {"num_generations": 1, "max_completion_length": 12, "shuffle_dataset": False, **options}
        trainer_options = {"train_dataset": mixed if rows is None else Dataset.from_list(rows), "rollout_func": canned}
        trainer_options.update(options.pop("trainer_options", {}))
        return make_trainer(family, trainer_options=trainer_options, **options)

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_each_row_alone(make, family):
    trainer = make(family, per_device_train_batch_size=8)
    trainer.model.train()
    trainer.in_one_pass = False
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in range(8)])
    assert rollout["num_images"] == NUM_PICTURES
    mask = valid_tokens(rollout)
    found = trainer._per_token_logps(trainer.model, rollout, batch_size=3)
    for row, count in enumerate(NUM_PICTURES):
        alone = without_empty_pictures(select_rows(rollout, [row]))
        assert ("pixel_values" in alone) == (count > 0)
        expected = plain_logps(trainer.model.eval(), alone)
        torch.testing.assert_close(found[row][mask[row]], expected[0][mask[row]], rtol=0, atol=1e-5)


OPTIONS = {
    "paper": {"advantage_normalization": "none"},
    "exact": {"estimator": "exact", "advantage_normalization": "none"},
    "shared prompts": {"advantage_normalization": "none", "share_prompts": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_two_kinds_apart(make, family, options):
    """In micro-batches of two rows, some of them without any picture."""
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, **options}
    found = gradients(make(family, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options))
    rows, expected = make_rows(), {}
    for has_pictures in (True, False):
        kind = [row for row in rows if bool(row["images"]) == has_pictures]
        kind = kind if has_pictures else [{"prompt": row["prompt"]} for row in kind]
        of_kind = gradients(make(family, kind, per_device_train_batch_size=4, **options))
        for name, gradient in of_kind.items():
            expected[name] = expected.get(name, 0) + gradient / 2
    assert found.keys() == expected.keys()
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_messages", [False, True])
def test_a_run_samples_learns_and_evaluates(make_trainer, family, in_messages, tmp_path):
    rows = Dataset.from_list(make_rows(in_messages=in_messages))
    trainer = make_trainer(
        family,
        trainer_options={"train_dataset": rows, "eval_dataset": rows},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        max_steps=3,
        log_completions=True,
        log_completions_steps=1,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    entries = trainer.state.log_history
    assert all(entry["grad_norm"] > 0 for entry in entries if "loss" in entry)
    assert [math.isfinite(entry["eval_reverse_kl"]) for entry in entries if "eval_reverse_kl" in entry] == [True] * 3
    paths = (tmp_path / "out" / "token_scores").glob("*.parquet")
    logged = [row for path in paths for row in Dataset.from_parquet(str(path))]
    counts = {row["prompt"].split(" ?")[0].split()[-1]: len(row["images"]) for row in logged}
    assert len(counts) > 3 and all(count == NUM_PICTURES[WORDS.index(word)] for word, count in counts.items())


def test_a_family_whose_pictures_lie_one_after_the_other(make_trainer, tmp_path):
    """LLaVA: gradients as those of the two kinds apart, which the student samples."""
    processor = digits_models.build_processor()
    paths = [tmp_path / "student", tmp_path / "teacher"]
    for seed, path in enumerate(paths):
        digits_models.save(digits_models.build_model(processor, 32, seed), processor, path)

    def run(rows, **options):
        data = {"train_dataset": Dataset.from_list(rows)}
        options = {
            "num_generations": 1,
            "generation_kwargs": None,
            "shuffle_dataset": False,
            "max_steps": 1,
            **options,
        }
        options |= {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "advantage_normalization": "none"}
        return make_trainer("internvl", str(paths[0]), str(paths[1]), trainer_options=data, **options)

    rows = make_rows([min(count, 1) for count in NUM_PICTURES])
    completions, expected = {}, {}

    def remembered(trainer):
        sample = trainer._generate_single_turn

        def sample_or_repeat(prompt_ids, *args, **kwargs):
            found, logprobs = sample(prompt_ids, *args, **kwargs)
            return [
                completions.setdefault(tuple(ids), row) for ids, row in zip(prompt_ids, found, strict=True)
            ], logprobs

        trainer._generate_single_turn = sample_or_repeat
        return trainer

    found = gradients(remembered(run(rows, per_device_train_batch_size=2, gradient_accumulation_steps=4)))
    for kind in (
        [row for row in rows if row["images"]],
        [{"prompt": row["prompt"]} for row in rows if not row["images"]],
    ):
        for name, gradient in gradients(remembered(run(kind, per_device_train_batch_size=4))).items():
            expected[name] = expected.get(name, 0) + gradient / 2
    assert len(completions) == 2  # to whose tokens the questions are alike
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_resumes_in_the_middle(make, family, tmp_path):
    def build(**options):
        return make(family, per_device_train_batch_size=4, **options)

    assert_resumes_in_the_middle(build, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_beside_rows_without_changes_nothing(make, family):
    """What a pass on several processes gets: the vision tower runs, and its gradient is exactly zero."""
    found = []
    for has_picture in (False, True):
        trainer = make(
            family, [{"prompt": row["prompt"]} for row in make_rows()], per_device_train_batch_size=8, max_steps=1
        )
        if has_picture:
            trainer._see_pictures()
            trainer._passes.picture = picture_row(trainer.processing_class)
        found.append(gradients(trainer))
    plain, beside = found
    of_vision = beside.keys() - plain.keys()
    assert of_vision and all("vis" in name or "projector" in name for name in of_vision)
    assert not any(beside[name].any() for name in of_vision)
    assert_same_gradients({name: beside[name] for name in plain}, plain)


@pytest.fixture
def text_teacher(tmp_path) -> str:
    """A teacher of text, without embeddings for the placeholders of the families here, which are the last of its ids."""
    return tiny_models.save(*tiny_models.build_qwen3(seed=1, width=48), tmp_path / "text-teacher")


@pytest.mark.parametrize("options", [{}, {"estimator": "exact"}], ids=["paper", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_of_text_beside_one_of_images(make, checkpoints, text_teacher, family, options):
    rows = [{**row, "teacher": "eyes" if row["images"] else "words"} for row in make_rows()]
    teachers = {"eyes": checkpoints[f"{family}-teacher"], "words": text_teacher}
    trainer = make(family, rows, teacher_model=teachers, per_device_train_batch_size=8, **options)
    trainer.model.train()
    trainer.in_one_pass = False
    found = []
    trainer._report = lambda batch: found.append(batch.reading.teacher_logps)
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in range(8)])
    mask, words = valid_tokens(rollout), Qwen3ForCausalLM.from_pretrained(text_teacher)
    for row, count in enumerate(NUM_PICTURES):
        alone = without_empty_pictures(select_rows(rollout, [row]))
        if count == 0:
            alone.pop("mm_token_type_ids", None)
        teacher = trainer.teacher.teachers["eyes"].model if count else words
        expected = plain_logps(teacher, alone)
        torch.testing.assert_close(found[0][row][mask[row]], expected[0][mask[row]], rtol=0, atol=1e-5)
    make(family, rows, teacher_model=teachers, per_device_train_batch_size=4, max_steps=2, **options).train()


def test_a_teacher_of_text_is_kept_from_images(make, text_teacher):
    with pytest.raises(
        ValueError, match=r"4 of the 8 rows of `train_dataset` .*Qwen3ForCausalLM.* column `images`.*text-only"
    ):
        make("internvl", teacher_model=text_teacher)
    stream = IterableDataset.from_generator(lambda: iter(make_rows()))
    trainer = make("internvl", teacher_model=text_teacher, trainer_options={"train_dataset": stream})
    with pytest.raises(ValueError, match="is text-only, but is to score a row with images .*what is two"):
        trainer.train()
    make("internvl", [{"prompt": row["prompt"]} for row in make_rows()], teacher_model=text_teacher).train()


@pytest.mark.parametrize(
    "counts, found",
    [([1, 1, 2], (True, False)), ([1, 0, 2], (True, True)), ([0, 0, 0], (False, False))],
)
def test_what_is_known_of_a_data_set(counts, found):
    features = Features({"prompt": Value("string"), "images": List(Image())})
    rows = {"prompt": ["one"] * 3, "images": [[tiny_models.draw_image(0)] * count for count in counts]}
    dataset = Dataset.from_dict(rows, features=features)
    assert (may_have_pictures(None, {"hard": dataset}), is_mixed(dataset)) == found
    assert may_have_pictures(IterableDataset.from_generator(lambda: iter(())), None)
    assert not may_have_pictures(dataset.remove_columns("images"), None)

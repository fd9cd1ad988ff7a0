"""Rows of any shape: trained on, or refused with the row and a remedy, before the first step where they can be looked at."""

import re
import warnings

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from strategies import rows

from gndpo_trl.grpo.data_checks import check_datasets, check_images_are_read


REMEDY = re.compile(
    r"\b(give|set|use|choose|leave|raise|lower|make|write|rename|replace|remove|correct|change|crop|train|shorten|scale|pass|"
    r"download|cast|add)\b",
    re.I,
)

FAMILIES = ["qwen3", "internvl", "qwen25vl"]


@pytest.fixture(autouse=True)
def quiet():
    disable_progress_bars()


def assert_in_our_words(error: Exception, where: str) -> None:
    assert re.search(where, str(error), re.DOTALL), f"no row: {error}"
    assert REMEDY.search(str(error)), f"no remedy: {error}"


def as_dataset(found: list[dict]) -> Dataset | None:
    """A data set of these rows; `None` if Arrow knows no type for them."""
    try:
        return Dataset.from_list(found)
    except Exception:  # of Arrow or of the encoders of pictures, which see them before anything of ours
        return None


def take_part(trainer, found: list[dict]) -> None:
    """Have the trainer sample and score a generation batch of these rows."""
    trainer._begin_run()
    trainer.model.train()
    doubled = [dict(row) for row in found for _ in range(2)]
    rollout = trainer._generate_and_score_completions(doubled)
    assert rollout["advantages"].isfinite().all()


@pytest.fixture
def trainers(make_trainer, text_dataset, image_dataset):
    text = text_dataset.add_column("teacher_prompt", text_dataset["prompt"])
    return {
        "qwen3": make_trainer(trainer_options={"train_dataset": text}),
        "internvl": make_trainer("internvl"),
        "qwen25vl": make_trainer("qwen25vl"),
    }


@tries(ci=150, nightly=1500)
@given(data=st.data())
def test_a_row_of_a_stream_is_trained_on_or_named(trainers, data):
    family = data.draw(st.sampled_from(FAMILIES))
    row = data.draw(rows(has_pictures=family != "qwen3" or data.draw(st.integers(0, 9)) == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            take_part(trainers[family], [row])
        except ValueError as error:
            assert_in_our_words(error, r"A row|\(prompt: ")


@tries(ci=100, nightly=1000)
@given(data=st.data())
def test_a_data_set_is_trained_on_or_refused_before_the_first_step(trainers, data):
    family = data.draw(st.sampled_from(FAMILIES))
    has_pictures = family != "qwen3" or data.draw(st.integers(0, 9)) == 0
    first = data.draw(rows(has_pictures))
    others = st.just(first) | rows(has_pictures)
    dataset = as_dataset([first, *(data.draw(others) for _ in range(2))])
    if dataset is None:
        return
    trainer = trainers[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            seen = check_datasets(trainer.args, dataset, None, None, brings_columns=False)
            check_images_are_read(trainer.processing_class, dataset, None)
            seen.check_against(trainer.processing_class, trainer.chat_template)
            trainer._teacher_prompts.check_dataset("train_dataset", dataset, False, False)
        except ValueError as error:
            assert_in_our_words(error, r"`train_dataset`")
            return
        try:
            take_part(trainer, list(dataset))
        except ValueError as error:
            # What only the pixels show, or only the tokenizer, or the chat template on both prompts.
            assert_in_our_words(error, r"^A row.*(does not open|has \d+ tokens)|end at different points")

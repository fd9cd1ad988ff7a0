"""Data that would fail late, train nothing, or lose something: refused at construction, with the remedy."""

import pytest
import tiny_models
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


def with_images(image_dataset: Dataset, missing: list[int], value) -> Dataset:
    rows = [image_dataset[index] for index in range(8)]
    for index in missing:
        rows[index]["images"] = value
    return Dataset.from_list(rows, features=image_dataset.features)


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
@pytest.mark.parametrize("value", [None, []])
def test_rows_without_images_beside_rows_with_images(make_trainer, image_dataset, family, value):
    dataset = with_images(image_dataset, [2, 5], value)
    message = (
        r"2 of 8 rows of `train_dataset` have no images in the column `images`; the first is row 2.*runs of their own"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(family, trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match="`eval_dataset`"):
        make_trainer(family, trainer_options={"eval_dataset": dataset})
    kept = dataset.filter(lambda row: row["images"])
    assert len(kept) == 6
    trainer = make_trainer(family, max_steps=3, trainer_options={"train_dataset": kept})
    trainer.train()
    assert trainer.state.global_step == 3


def test_rows_are_counted_as_they_are_selected(make_trainer, image_dataset):
    dataset = with_images(image_dataset, [2, 5], None)
    with pytest.raises(ValueError, match="1 of 3 rows .* the first is row 2"):
        make_trainer("internvl", trainer_options={"train_dataset": dataset.select([7, 0, 5])})
    make_trainer("internvl", trainer_options={"train_dataset": dataset.select([7, 0, 1])})


def test_a_single_image_in_each_row(make_trainer, image_dataset):
    rows = {"prompt": image_dataset["prompt"][:4], "image": [tiny_models.draw_image(index) for index in range(4)]}
    dataset = Dataset.from_dict(rows).cast_column("image", ImageFeature())
    make_trainer("internvl", trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match="holds one image per row, not a list of them. Rename it to `image`"):
        make_trainer("internvl", trainer_options={"train_dataset": dataset.rename_column("image", "images")})
    dataset = Dataset.from_dict({**rows, "image": [*rows["image"][:3], None]}).cast_column("image", ImageFeature())
    with pytest.raises(ValueError, match="1 of 4 rows .* column `image`; the first is row 3"):
        make_trainer("internvl", trainer_options={"train_dataset": dataset})


def test_a_column_without_any_image(make_trainer, image_dataset):
    with pytest.raises(ValueError, match="8 of 8 rows .*Remove the column"):
        make_trainer("internvl", trainer_options={"train_dataset": with_images(image_dataset, list(range(8)), None)})


def test_a_stream_that_changes_its_kind_stops_with_a_word(make_trainer, image_dataset):
    def stream():
        yield from with_images(image_dataset, [5], [])

    dataset = IterableDataset.from_generator(stream, features=image_dataset.features)
    trainer = make_trainer("internvl", max_steps=4, shuffle_dataset=False, trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match="A row has no images, unlike those before it.*what is the sum"):
        trainer.train()


@pytest.mark.parametrize("num_rows", [0, 3])
def test_fewer_prompts_than_a_generation_batch_takes(make_trainer, text_dataset, num_rows):
    dataset = text_dataset.select(range(num_rows))
    message = (
        rf"has {num_rows} rows, but a generation batch takes 4 prompts .*8 / `num_generations` 2.*Give more prompts"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(per_device_train_batch_size=8, trainer_options={"train_dataset": dataset})
    make_trainer(
        per_device_train_batch_size=8, trainer_options={"train_dataset": text_dataset.select(range(4))}
    ).train()


def test_a_stream_that_ends_before_the_first_step(make_trainer, text_dataset):
    dataset = IterableDataset.from_generator(lambda: iter(text_dataset.select(range(1)).to_list()))
    trainer = make_trainer(per_device_train_batch_size=8, trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match="ended before a single step was made: a generation batch takes 4 prompts"):
        trainer.train()


def test_nothing_to_evaluate_on(make_trainer, text_dataset):
    with pytest.raises(ValueError, match=r"`eval_dataset\['hard'\]` has no rows"):
        make_trainer(trainer_options={"eval_dataset": {"easy": text_dataset, "hard": text_dataset.select([])}})


def test_no_column_of_prompts(make_trainer, text_dataset):
    dataset = text_dataset.rename_column("prompt", "question")
    with pytest.raises(ValueError, match=r"`train_dataset` has no column `prompt`, only \['question'\]. Rename"):
        make_trainer(trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match="`eval_dataset` has no column `prompt`"):
        make_trainer(trainer_options={"eval_dataset": dataset})


def needs_solution(completions, solution, scale=1.0, log_metric=None, **kwargs):
    return [scale] * len(completions)


def test_a_reward_that_needs_a_column_which_is_not_there(make_config, checkpoints, make_trainer, text_dataset):
    message = r"`needs_solution` needs the column `solution`, but `train_dataset` has only \['prompt'\]"
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer_options={"reward_funcs": [needs_solution]})
    with pytest.raises(ValueError, match=message):
        GSPOTrainer(checkpoints["qwen3-student"], needs_solution, make_config(GSPOConfig), text_dataset)
    solved = text_dataset.add_column("solution", ["3"] * len(text_dataset))
    make_trainer(trainer_options={"reward_funcs": [needs_solution], "train_dataset": solved}).train()


class Greeter:
    """An environment with a reward of its own."""

    def reset(self, **kwargs) -> str | None:
        return None

    def get_reward(self) -> float:
        return 0.5


@pytest.mark.filterwarnings("ignore:.*experimental.*")
def test_the_teacher_stands_in_only_where_there_is_no_other_reward(make_trainer, monkeypatch):
    # The tiny template renders no tool calls, which TRL asks for wherever there is an environment.
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda processing_class: True)
    trainer = make_trainer(trainer_options={"environment_factory": Greeter})
    assert trainer.reward_func_names == ["Greeter"] and len(trainer.reward_funcs) == 1
    assert trainer.reward_weights.tolist() == [1.0] and len(trainer.reward_processing_classes) == 1
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["reward"] == entry["rewards/Greeter/mean"] == 0.5
    assert "rewards/teacher_score/mean" not in entry and entry["score/mean"] != 0


def test_a_generation_batch_of_one_prompt_is_warned_about(make_config, recwarn):
    make_config(per_device_train_batch_size=4, num_generations=4, advantage_normalization="none")
    make_config(per_device_train_batch_size=4, num_generations=2)
    assert not [warning for warning in recwarn if "single prompt" in str(warning.message)]
    with pytest.warns(UserWarning, match='4 completions of a single prompt.*same as "group"'):
        make_config(per_device_train_batch_size=4, num_generations=4)

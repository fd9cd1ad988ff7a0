"""Data that would fail late, train nothing, or lose something: refused at construction, with the remedy."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from datasets import Dataset, IterableDataset, List
from datasets import Image as ImageFeature
from helpers import reward
from PIL import Image
from transformers import Qwen3Config

from gndpo_trl.grpo.data_checks import check_datasets
from gndpo_trl.grpo.row_checks import RowsSeen, open_rows, positions_of
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer
from gndpo_trl.token_view.images import as_png


def with_images(image_dataset: Dataset, missing: list[int], value) -> Dataset:
    rows = [image_dataset[index] for index in range(8)]
    for index in missing:
        rows[index]["images"] = value
    return Dataset.from_list(rows, features=image_dataset.features)


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
@pytest.mark.parametrize("value", [None, []])
def test_rows_without_images_beside_rows_with_images(make_trainer, image_dataset, family, value):
    """tests/test_mixed_rows.py has what becomes of them."""
    dataset = with_images(image_dataset, [2, 5], value)
    trainer = make_trainer(family, max_steps=3, trainer_options={"train_dataset": dataset, "eval_dataset": dataset})
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_single_image_in_each_row(make_trainer, image_dataset):
    rows = {"prompt": image_dataset["prompt"][:4], "image": [tiny_models.draw_image(index) for index in range(4)]}
    dataset = Dataset.from_dict(rows).cast_column("image", ImageFeature())
    make_trainer("internvl", trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match="holds one image per row, not a list of them. Rename it to `image`"):
        make_trainer("internvl", trainer_options={"train_dataset": dataset.rename_column("image", "images")})
    dataset = Dataset.from_dict({**rows, "image": [*rows["image"][:3], None]}).cast_column("image", ImageFeature())
    make_trainer("internvl", trainer_options={"train_dataset": dataset}).train()


def test_a_column_without_any_image(make_trainer, image_dataset):
    with pytest.raises(ValueError, match="None of the 8 rows of `train_dataset` has an image .*Remove the column"):
        make_trainer("internvl", trainer_options={"train_dataset": with_images(image_dataset, list(range(8)), None)})


def test_a_stream_may_change_its_kind(make_trainer, image_dataset):
    def stream():
        yield from with_images(image_dataset, [5], [])

    dataset = IterableDataset.from_generator(stream, features=image_dataset.features)
    trainer = make_trainer("internvl", max_steps=4, shuffle_dataset=False, trainer_options={"train_dataset": dataset})
    trainer.train()
    assert trainer.state.global_step == 4


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


def check(dataset, args, reward_funcs=None) -> RowsSeen:
    return check_datasets(args, dataset, None, reward_funcs, brings_columns=False)


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


BAD_PROMPTS = {
    "the prompt is None, neither messages nor text": None,
    "the prompt has no messages": [],
    "the messages of the prompt are blank": user(" "),
    r"the content of a message of the prompt \(user\) is None": user(None),
    r"the content of a message of the prompt \(user\) is '5' \(int\)": user(5),
    r"is \"b'one'\" \(bytes\), neither text nor parts": user(b"one"),
    "a message of the prompt has the role None": [{"role": None, "content": "one"}],
    r"has the part .*, which has no `type`": user([{"type": None, "text": "one"}]),
    "has a part of type 'video', which would be ignored": user([{"type": "video", "video": "a.mp4"}]),
    r"the text of a part of the prompt \(user\) is None": user([{"type": "text", "text": None}]),
    r"Number of images provided \(0\) does not match.*for each picture": user([{"type": "image", "image": None}]),
    "picture .* there is no file 'none.png'": user([{"type": "image", "image": "none.png"}]),
}


@pytest.mark.parametrize("message", BAD_PROMPTS)
def test_a_bad_prompt_among_good_ones_is_named_with_its_row(make_config, message):
    prompt = BAD_PROMPTS[message]
    is_alike = isinstance(prompt, list) and prompt and prompt[0]["content"] is not None
    content = prompt[0]["content"] if is_alike else "one"
    good = {"str": "one", "list": [{"type": "text", "text": "one"}], "int": 1, "bytes": b"one"}[type(content).__name__]
    if isinstance(good, str | list):
        dataset = Dataset.from_list([{"prompt": user(good)}] * 8 + [{"prompt": prompt}])
        with pytest.raises(ValueError, match=f"Row 8 of `train_dataset`.*{message}"):
            check(dataset, make_config())
        with pytest.raises(ValueError, match=f"Row 1 of `train_dataset`.*{message}"):
            check(dataset.select([3, 8, 1, 2]), make_config())
        check(dataset.select(range(8)), make_config())
    with pytest.raises(ValueError, match=rf"A row \(prompt: .*{message}"):
        open_rows([{"prompt": user("one")}, {"prompt": prompt}], fetch=False)


def test_a_blank_text_is_named_with_its_row(make_config):
    with pytest.raises(ValueError, match="Row 2 of `train_dataset`: the prompt is blank. Correct or remove the row"):
        check(Dataset.from_dict({"prompt": ["one", "two", "\n", "three"]}), make_config())


def test_roles_and_parts_that_the_template_does_not_know(make_trainer, text_dataset):
    rows = text_dataset.to_list()
    rows[3] = {"prompt": [{"role": "usr", "content": "what is one plus two ?"}]}
    with pytest.raises(ValueError, match="Row 3 of `train_dataset`: the role 'usr' .* none that would be rendered"):
        make_trainer(trainer_options={"train_dataset": Dataset.from_list(rows)})
    seen = RowsSeen()
    seen.add_prompt("Row 1", user([{"type": "txt", "text": "one"}, {"type": "text", "text": "two"}]), fetch=False)
    with pytest.raises(ValueError, match="Row 1: the type of a part 'txt'"):
        seen.check_against(None, "{{ part['text'] }}")
    seen.check_against(None, "{% if part['type'] == 'txt' %}{{ part['text'] }}{% endif %}")


def test_a_bad_row_of_a_stream_is_named_at_its_step(make_trainer, text_dataset):
    rows = text_dataset.to_list()
    rows[5] = {"prompt": []}
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make_trainer(max_steps=4, shuffle_dataset=False, trainer_options={"train_dataset": dataset})
    with pytest.raises(ValueError, match=r"A row \(prompt: '\[\]'\): the prompt has no messages. Correct or remove"):
        trainer.train()
    assert trainer.state.global_step == 2


def images_dataset(*pictures, column="images") -> Dataset:
    rows = [{"prompt": user("one"), column: [picture] if column == "images" else picture} for picture in pictures]
    return Dataset.from_list(rows)


def test_pictures_are_looked_at_before_the_run(make_config, tmp_path):
    good, paths = tiny_models.draw_image(0), [str(tmp_path / name) for name in ("0.png", "1.png", "2.png")]
    for path in paths:
        good.save(path)
    deep = Image.fromarray(np.zeros((4, 4), dtype=np.uint16))
    for dataset, message in (
        (
            images_dataset(good, good, deep),
            "Row 2 of `train_dataset`, column `images`, .* mode 'I;16' has more than the 8",
        ),
        (images_dataset(*paths[:2], "gone.png", column="image"), "Row 2 .*`image`.* no file 'gone.png'"),
        (
            images_dataset(*paths[:2], "http://localhost/a.png"),
            "Row 2 .* nothing is fetched unless `fetch_image_urls` is",
        ),
        (images_dataset(Path(paths[0]).read_bytes(), b"rubbish", column="image"), "Row 1 .* does not open"),
    ):
        with pytest.raises(ValueError, match=message):
            check(dataset, make_config())
    with pytest.raises(ValueError, match="Row 0 .*`images`.* no file 'gone.png'"):
        check(images_dataset(*paths[:2], "gone.png").select([2, 0, 1]), make_config())
    urls = images_dataset(paths[0], paths[1], "http://localhost/a.png")
    assert [*check(urls, make_config(fetch_image_urls=True)).sizes] == [good.size]
    with pytest.raises(ValueError, match="is a URL, .* which datasets would fetch without a limit"):
        check(urls.cast_column("images", List(ImageFeature())), make_config(fetch_image_urls=True))


def test_pictures_are_not_decoded_by_the_look_at_them(make_config):
    broken = as_png(tiny_models.draw_image(0))[:-40]  # which only its pixels show
    assert len(check(images_dataset(broken, broken, column="image"), make_config()).sizes) == 1
    with pytest.raises(ValueError, match=r"A row \(prompt: .*one.*a picture in `image`: it does not open"):
        open_rows([{"prompt": user("one"), "image": broken}], fetch=False)


def test_a_picture_that_the_processor_refuses_is_named_before_the_run(make_trainer, image_dataset):
    thin = Image.new("RGB", (900, 3))
    rows = image_dataset.select(range(8)).to_list()
    rows[6]["images"] = [{"bytes": as_png(thin), "path": None}]
    message = "Row 6 of `train_dataset`, column `images`, has a picture of 900x3 pixels, which the student's processor"
    with pytest.raises(ValueError, match=message):
        dataset = Dataset.from_list(rows, features=image_dataset.features)
        make_trainer("qwen25vl", trainer_options={"train_dataset": dataset})
    in_message = {"prompt": user([{"type": "image", "image": thin}, {"type": "text", "text": "one"}])}
    trainer = make_trainer("qwen25vl", trainer_options={"train_dataset": image_dataset})
    with pytest.raises(ValueError, match=r"A row \(prompt: .*900x3 pixels"):
        trainer._generate_and_score_completions([in_message])
    make_trainer("internvl", trainer_options={"train_dataset": dataset})  # whose processor takes it


def test_images_in_messages_for_a_student_that_reads_text(make_trainer):
    prompt = user([{"type": "image", "image": as_png(tiny_models.draw_image(0))}, {"type": "text", "text": "one"}])
    with pytest.raises(ValueError, match="Row 0 of `train_dataset` has pictures, but the student's .* no processor"):
        make_trainer(trainer_options={"train_dataset": Dataset.from_dict({"prompt": [prompt] * 4})})


def test_videos_are_refused(make_config, text_dataset):
    dataset = text_dataset.add_column("videos", [["a.mp4"]] * len(text_dataset))
    for one in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match="`train_dataset` has the column `videos`, but videos are not trained on"):
            check(one, make_config())
    with pytest.raises(ValueError, match="A row .* has the column `videos`"):
        open_rows([dataset[0]], fetch=False)


def test_a_prompt_beyond_the_positions_is_refused_with_its_length(make_trainer, text_dataset):
    def with_long(words: int) -> Dataset:
        return Dataset.from_list([*text_dataset.to_list(), {"prompt": user(" ".join(["one"] * words))}])

    message = (
        r"Row 24 of `train_dataset` has 605 tokens, but the student has 512 positions \(`max_position_embeddings`\)"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer_options={"train_dataset": with_long(600)})
    trainer = make_trainer(trainer_options={"train_dataset": with_long(500)})
    trainer.model.train()
    with pytest.raises(ValueError, match="A row .* has 605 tokens"):
        trainer._generate_and_score_completions([with_long(600)[24]] * 2)


def test_positions_with_scaled_rotary_embeddings():
    def config(**rope) -> Qwen3Config:
        return Qwen3Config(max_position_embeddings=512, rope_parameters={"rope_theta": 1e4, **rope})

    assert positions_of(config(rope_type="default")) == 512
    assert positions_of(config(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)) == 2048


class Solver:
    """A reward with a name and columns of its own."""

    __name__ = "solver"

    def __call__(self, completions, solution, **kwargs):
        return [0.0] * len(completions)


async def solves_later(completions, solution, **kwargs):
    return [0.0] * len(completions)


def takes_no_others(prompts, completions, solution):
    return [0.0] * len(completions)


named_partial = functools.partial(needs_solution, scale=2.0)
named_partial.__name__ = "named_partial"


@pytest.mark.parametrize("function", [Solver(), Solver().__call__, solves_later, named_partial])
def test_whatever_is_called_for_rewards_needs_its_columns(make_config, text_dataset, function):
    name = function.__name__
    with pytest.raises(ValueError, match=f"`{name}` needs the column `solution`, but `train_dataset` has only"):
        check(text_dataset, make_config(), [reward, function])
    solved = text_dataset.add_column("solution", ["3"] * len(text_dataset))
    check(solved, make_config(), [reward, function])
    with pytest.raises(ValueError, match=f"`{name}` needs the column `solution`.*`remove_unused_columns` is True"):
        check(solved, make_config(remove_unused_columns=True), function)


def test_rewards_that_could_not_be_called(make_config, text_dataset):
    solved = text_dataset.add_column("solution", ["3"] * len(text_dataset))
    with pytest.raises(ValueError, match=r"`takes_no_others` does not take 'completion_ids'.* Give it `\*\*kwargs`"):
        check(solved, make_config(), takes_no_others)
    with pytest.raises(ValueError, match="has no `__name__`, under which its rewards are logged"):
        check(solved, make_config(), functools.partial(needs_solution))


def test_pictures_that_are_no_list_are_named(make_config):
    for column in ("images", "teacher_images"):
        with pytest.raises(ValueError, match=rf"A row .*: `{column}` is '5' \(int\), not a list of pictures. Correct"):
            open_rows([{"prompt": user("one"), column: 5}], fetch=False)
    nested = Dataset.from_list([{"prompt": user("one"), "images": [[[[0, 0]]]]}] * 2)
    with pytest.raises(ValueError, match=r"Row 0 of `train_dataset`, column `images`, .*\(list\) is no picture"):
        check(nested, make_config())


def test_a_text_prompt_with_pictures(make_config):
    dataset = Dataset.from_list([{"prompt": "what is one ?", "images": [tiny_models.draw_image(0)]}] * 2)
    with pytest.raises(
        ValueError, match="Row 0 of `train_dataset`: the prompt is text, but has pictures.*Write it as"
    ):
        check(dataset, make_config())
    row = {"prompt": user("one"), "teacher_prompt": "one", "images": [tiny_models.draw_image(0)]}
    with pytest.raises(ValueError, match="A row .*: `teacher_prompt` is text, but has pictures. Write it as messages"):
        open_rows([row], fetch=False)


def test_half_a_character_is_named_with_its_row():
    for prompt in ("one \ud800", user("one \ud800"), user([{"type": "text", "text": "\udfff"}])):
        with pytest.raises(
            ValueError, match=r"A row .*: the prompt has '\\ud...', half of a character.*Correct or rem"
        ):
            open_rows([{"prompt": prompt}], fetch=False)


@pytest.mark.parametrize("nothing", [None, []])
def test_a_stream_whose_column_of_pictures_is_empty_trains_on_text(make_trainer, nothing):
    dataset = IterableDataset.from_generator(lambda: ({"prompt": user("one"), "images": nothing} for _ in range(16)))
    trainer = make_trainer("internvl", trainer_options={"train_dataset": dataset})
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("family, token", [("internvl", "<IMG_CONTEXT>"), ("qwen25vl", "<|image_pad|>")])
def test_a_placeholder_in_the_words_of_a_prompt(make_trainer, image_dataset, family, token):
    rows = image_dataset.select(range(8)).to_list()
    rows[5]["prompt"] = user(f"what is {token} ?")
    message = rf"Row 5 of `train_dataset`: the prompt has '{re.escape(token)}' in its words.*Remove it"
    with pytest.raises(ValueError, match=message):
        dataset = Dataset.from_list(rows, features=image_dataset.features)
        make_trainer(family, trainer_options={"train_dataset": dataset})

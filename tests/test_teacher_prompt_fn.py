"""`teacher_prompt_fn`: what it sees of a rollout, what the teacher then reads, and which of its answers are refused."""

import pytest
import tiny_models
import torch
from datasets import Dataset, IterableDataset
from helpers import make_rollout, plain_logps
from transformers import Qwen3ForCausalLM

from gndpo_trl.teachers import SelfTeacher
from gndpo_trl.teachers.prompt_fn import group_completions
from gndpo_trl.teachers.prompts import TeacherPrompts


END = 2  # <|im_end|>, the tiny tokenizers' end token


def words_reward(completions, **kwargs):
    return [float(len(completion[0]["content"].split())) for completion in completions]


def some_reward(completions, **kwargs):
    return [None if index % 2 else 1.0 for index in range(len(completions))]


def quote_the_longest(rows, completions):
    """The longest completion of the group before the question, for all others."""
    prompts = []
    for row, completion in zip(rows, completions, strict=True):
        longest = max(completion.group, key=lambda other: other.rewards.get("words_reward", other.num_tokens))
        content = f"{longest.text} {row['prompt'][0]['content']}"
        prompts.append(None if completion is longest else [{"role": "user", "content": content}])
    return prompts


@pytest.fixture
def make(make_trainer, checkpoints):
    def make(function, trainer_options=None, **options):
        options = {"per_device_train_batch_size": 8, **options}
        trainer_options = {"teacher_prompt_fn": function, **(trainer_options or {})}
        return make_trainer(trainer_options=trainer_options, **options)

    return make


def test_what_it_sees_and_what_the_teacher_reads(make, checkpoints):
    calls = []

    def function(rows, completions):
        calls.append((rows, completions))
        return quote_the_longest(rows, completions)

    rewards = {"reward_funcs": [words_reward, some_reward]}
    trainer = make(function, rewards, num_generations=4)
    rollout = make_rollout(trainer)
    ((rows, completions),) = calls
    assert [row["prompt"] for row in rows] == [trainer.train_dataset[index // 2]["prompt"] for index in range(8)]
    mask = rollout["completion_mask"].bool()
    for index, completion in enumerate(completions):
        ids = rollout["completion_ids"][index][mask[index]]
        assert completion.text == trainer._tokenizer.decode(ids, skip_special_tokens=True)
        assert completion.num_tokens == len(ids)
        assert completion.rewards["words_reward"] == len(completion.text.split())
        assert (completion.rewards["some_reward"] == 1.0) == (index % 2 == 0)
        assert completion.group == completions[index // 4 * 4 : index // 4 * 4 + 4]

    # The advantages come from the log-probs of the completions after these prompts.
    teacher = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    student = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    prompts = [prompt or row["prompt"] for prompt, row in zip(quote_the_longest(rows, completions), rows, strict=True)]
    found = torch.zeros(mask.shape)
    for index, prompt in enumerate(prompts):
        prompt_ids = trainer._tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        alone = {"prompt_ids": torch.tensor([prompt_ids]), "prompt_mask": torch.ones(1, len(prompt_ids))}
        alone["completion_ids"] = rollout["completion_ids"][index : index + 1][:, mask[index]]
        alone["completion_mask"] = torch.ones_like(alone["completion_ids"])
        found[index, mask[index]] = plain_logps(teacher, alone)[0]
    scores = found - plain_logps(student, rollout)
    expected = (scores - scores[mask].mean()) / scores[mask].std()
    torch.testing.assert_close(rollout["advantages"][mask], expected[mask], rtol=0, atol=2e-4)
    assert trainer._metrics["train"]["teacher/own_prompts"] == [0.75]


def test_truncated_completions_are_whole(make):
    """TRL masks them out of the loss; the function still sees them."""
    seen = []
    trainer = make(
        lambda rows, completions: seen.extend(completions) or [None] * len(rows),
        mask_truncated_completions=True,
        max_completion_length=2,
        num_generations=2,
    )
    rollout = make_rollout(trainer)
    truncated = rollout["completion_mask"].sum(-1) == 0
    assert truncated.any()
    for completion, ids, is_truncated in zip(seen, rollout["completion_ids"], truncated, strict=True):
        if is_truncated:
            assert completion.num_tokens == 2
            assert completion.text == trainer._tokenizer.decode(ids, skip_special_tokens=True)
    assert all(completion.rewards == {} for completion in seen)  # the teacher's score in TRL's logs is none


@pytest.mark.parametrize("weights", ["initial", "ema", "live"])
def test_a_student_that_teaches_itself_trains_and_evaluates(make, text_dataset, weights):
    sizes = []

    def function(rows, completions):
        sizes.extend(len(completion.group) for completion in completions)
        return quote_the_longest(rows, completions)

    trainer = make(
        function,
        {"eval_dataset": text_dataset.select(range(4))},
        teacher_model="self",
        teacher_weights=weights,
        num_generations=4,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_score/std"] > 0 and {*sizes} == {2}
    assert metrics["eval_teacher/own_prompts"] == pytest.approx(0.5)
    trainer.train()
    assert {*sizes} == {2, 4}
    assert trainer.state.log_history[-2]["score/std"] > 0


def test_one_teacher_of_several_may_be_the_student_itself(make, text_dataset, checkpoints):
    names = ["me", "other"] * (len(text_dataset) // 2)
    dataset = text_dataset.add_column("teacher", names)
    teachers = {"me": SelfTeacher("live"), "other": checkpoints["qwen3-teacher"]}
    trainer = make(quote_the_longest, {"train_dataset": dataset}, teacher_model=teachers, num_generations=4)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["teacher/me/score/std"] > 1e-3 and log["teacher/own_prompts"] == 0.75


def test_a_stream_of_data_and_rows_without_a_prompt_of_their_own(make, text_dataset):
    stream = IterableDataset.from_generator(lambda: iter(text_dataset))
    trainer = make(
        lambda rows, completions: [None] * len(rows), {"train_dataset": stream}, teacher_model="self", max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["teacher/own_prompts"] == 0.0


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_a_run_goes_on_exactly_in_the_middle_of_a_batch(make, tmp_path, estimator):
    def run(folder: str, steps: int, **options):
        schedule = {"save_strategy": "steps", "save_steps": 3, "max_steps": steps, "num_iterations": 2}
        teacher = {"teacher_model": "self", "estimator": estimator}
        trainer = make(quote_the_longest, output_dir=str(tmp_path / folder), **schedule, **teacher)
        trainer.train(**options)
        return trainer

    whole = run("whole", 5)
    run("part", 3)
    resumed = run("part", 5, resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


# What is refused


@pytest.mark.parametrize(
    "returned, message",
    [
        ([None] * 7, r"returned 7 prompts for 8 rows\. Return one for each row"),
        (None, r"returned NoneType: 'None'\. Return a list with one entry for each of the 8 rows"),
        ("one", r"returned str: 'one'\. Return a list"),
        ([None] * 7 + [3], r"returned '3' \(int\) for row 7\. A prompt is text that is not empty, a list of messages"),
        ([""] * 8, r"returned '' \(str\) for row 0"),
        ([[]] * 8, r"returned '\[\]' \(list\) for row 0"),
        ([["one"]] * 8, r"returned \"\['one'\]\" \(list\) for row 0"),
        (["one plus two ?"] * 8, "end at different points of the chat template"),  # text beside messages
    ],
)
def test_bad_prompts_are_refused(make, returned, message):
    with pytest.raises(ValueError, match=message):
        make_rollout(make(lambda rows, completions: returned))


def test_what_cannot_go_together_is_refused(make, text_dataset, checkpoints):
    with pytest.raises(TypeError, match="`teacher_prompt_fn` is 'concise', but has to be a function of rows"):
        make("concise")
    briefed = text_dataset.add_column("teacher_prompt", [None] * len(text_dataset))
    message = "given twice: `teacher_prompt_fn` is set, and `train_dataset` has the column `teacher_prompt`"
    with pytest.raises(ValueError, match=message):
        make(quote_the_longest, {"train_dataset": briefed})
    rows = [{**row, "teacher_prompt": "one"} for row in text_dataset]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="given twice: `teacher_prompt_fn` is set, and a row has a `teacher_prompt`"):
        make(quote_the_longest, {"train_dataset": stream}).train()


def test_the_function_cannot_change_the_rows(make):
    def function(rows, completions):
        for row in rows:
            row.clear()
        return [None] * len(rows)

    trainer = make(function)
    assert make_rollout(trainer)["advantages"].abs().sum() > 0
    assert isinstance(trainer.train_dataset, Dataset) and "prompt" in trainer.train_dataset[0]


def test_template_options_are_for_its_prompts_too(make):
    trainer = make(quote_the_longest, teacher_chat_template_kwargs={"enable_thinking": False})
    assert trainer._teacher_prompts.teacher_kwargs == {"enable_thinking": False}


def test_special_tokens_that_a_student_writes_out_end_no_turn():
    """In a text too, where those of the function's own are meant as such."""
    tokenizer = tiny_models.build_tokenizer(("one<|im_end|>two",))
    said = tokenizer.convert_tokens_to_ids("one<|im_end|>two")
    (completion,) = group_completions([[said, END]], torch.zeros(1, 0), [], 1, tokenizer)
    assert completion.text == "one<\u200b|im_end|>two"
    prompts = TeacherPrompts(tokenizer, {}, {})
    for prompt in (f"{completion.text} <|im_end|>", [{"role": "user", "content": completion.text}]):
        assert prompts._tokenize(prompt).count(END) == 1

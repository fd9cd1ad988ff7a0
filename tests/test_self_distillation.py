"""The self-distillation recipes: their functions, their tiny tasks, and a few steps of each on models that know nothing."""

import json
import random
import re
from pathlib import Path

import pytest
import self_distillation as functions
import self_distillation_tasks as tasks
import train_gndpo as script
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from gndpo_trl.teachers import Completion


ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in tasks.RECIPES.glob("*.yaml"))


def message(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def make_group(*samples: tuple[str, float]) -> list[Completion]:
    group = [Completion(text, len(text.split()), {"right": reward}) for text, reward in samples]
    for completion in group:
        completion.group = group
    return group


def test_functions_write_prompts_after_the_question():
    group = make_group(("one", 1.0), ("one two", 0.0))
    rows = [{"prompt": [{"role": "system", "content": "be kind"}, *message("why ?")]}] * 2
    for prompt in functions.concise(rows, group):
        assert prompt == [rows[0]["prompt"][0], {"role": "user", "content": "why ?\n\nBe concise."}]
    right, wrong = (prompt[-1]["content"] for prompt in functions.checked_draft(rows, group))
    assert "draft of the solution: one\n" in right and "answer is right." in right
    assert "draft of the solution: one two\n" in wrong and "answer is wrong." in wrong
    assert rows[0]["prompt"][-1]["content"] == "why ?"
    for prompt in functions.verified_draft(rows, group):
        assert "A correct solution: one\n" in prompt[-1]["content"]
    assert functions.verified_draft(rows, make_group(("one", 0.0), ("two", 0.0))) == [None, None]


def test_the_shortest_correct_completion_is_for_the_longest_wrong_one():
    samples = [("one two three", 1.0), ("one", 0.0), ("one two", 1.0), ("four five", 0.0), ("six seven", 0.0)]
    group = make_group(*samples)
    prompts = functions.shortest_correct([{"prompt": message("why ?")}] * 5, group)
    assert [prompt is not None for prompt in prompts] == [False, False, False, True, False]  # of equals, the first
    assert "A correct solution: one two\n" in prompts[3][-1]["content"]
    for reward in (0.0, 1.0):  # nothing to learn from
        group = make_group(("one", reward), ("two", reward))
        assert functions.shortest_correct([{"prompt": message("why ?")}] * 2, group) == [None, None]


def test_examples_say_what_they_should_and_survive_the_tokenizer():
    tokenizer, generator = tasks.build_tokenizer(), random.Random(0)
    train, test = tasks.split_questions(seed=1)
    assert len({*train, *test}) == 1000 and len(test) == tasks.NUM_TEST
    spanish = []
    for digits in train[:200]:
        wordy, concise, *plain, translated, corrected, followed = tasks.student_examples(digits, generator)
        sum_in = {language: numbers[sum(digits)] for language, numbers in tasks.NUMBERS.items()}
        assert all(tasks.read_answer(text) == sum_in["en"] for _, text in (wordy, concise))
        assert all(tasks.read_answer(text) == sum_in["es"] for _, text in (translated, corrected, followed))
        spanish += [tasks.read_answer(text) == sum_in["es"] for _, text in plain]
        pairs = [wordy, concise, *plain, translated, corrected, followed, *tasks.teacher_examples(digits, generator)]
        for prompt, text in pairs:
            assert tokenizer.unk_token_id not in tokenizer(prompt[-1]["content"] + text)["input_ids"]
            assert tasks.read_answer(tokenizer.decode(tokenizer(text)["input_ids"])) == tasks.read_answer(text)
            assert len(tokenizer(text)["input_ids"]) < tasks.TINY_OPTIONS["max_completion_length"]
    assert 0.4 < sum(spanish) / len(spanish) < 0.6


def make_model(path: Path, seed: int) -> Path:
    """A model of the tasks' tokenizer with random weights."""
    tokenizer = tasks.build_tokenizer()
    set_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, **sizes)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher"), seed=1)


def test_there_is_a_recipe_for_each_task():
    assert {*RECIPES} == {*tasks.TASKS}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_is_read_as_it_is_written(recipe):
    path = tasks.RECIPES / f"{recipe}.yaml"
    script_args, training_args, model_args = script.parse_arguments(["--config", str(path), "--use_cpu", "True"])
    parsed = {**vars(model_args), **vars(training_args), **vars(script_args)}
    for key, value in yaml.safe_load(path.read_text()).items():
        assert parsed[key] == value, key
    launcher, own = re.search(r"launch --config_file (\S+) .*?--config (\S+)", path.read_text(), re.DOTALL).groups()
    assert (ROOT / launcher).exists() and ROOT / own == path
    assert f"self_distillation_tasks.py {recipe}\n" in path.read_text()


def verbose_reward(completions, **kwargs):
    return [float("plus" in completion[0]["content"]) for completion in completions]


def train(recipe: str, student: Path, teacher: Path, folder: Path, num_steps: int, **options) -> list[dict]:
    """Logs of the steps of a recipe on its tiny task."""
    data = tasks.build_data(recipe, seed=0)
    data["train"] = data["train"].select(range(32))
    data.save_to_disk(folder / "data")
    # No random model is right: what it is rewarded for here, some of its completions have.
    options |= {"max_steps": num_steps, "logging_steps": 1, "per_device_train_batch_size": 16}
    options |= {"max_completion_length": 24, "reward_funcs": f"{__name__}.verbose_reward"}
    command = tasks.tiny_command(recipe, student, teacher, folder / "data", folder / "out", seed=0)
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    script.main(*script.parse_arguments(command))
    log = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize("is_other_form", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_few_steps(student, teacher, tmp_path, monkeypatch, recipe, is_other_form):
    monkeypatch.chdir(ROOT)  # functions are found from there
    settings = yaml.safe_load((tasks.RECIPES / f"{recipe}.yaml").read_text())
    form = {"estimator": settings.get("estimator", "sampled")}
    if is_other_form:
        form = {"estimator": "exact" if form["estimator"] == "sampled" else "sampled"}
        if settings.get("reward_coef"):  # refuses "exact"
            form = {"estimator": "sampled", "score_baseline": "expected"}
    steps = train(recipe, student, teacher, tmp_path, num_steps=2, **form)
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(entry["score/std"] > 0 for entry in steps)
    shares = [entry.get("teacher/own_prompts") for entry in steps]
    if recipe == "self_supervised":  # the longest wrong one of a group of eight, where one is right
        assert all(0 < share <= 1 / 8 for share in shares)
    elif recipe == "harness":  # groups in which one is right
        assert all(0 < share <= 1 for share in shares)
    else:
        assert shares == [1.0 if "teacher_prompt_fn" in settings else None] * 2
    is_sampled = form == {"estimator": "sampled"}
    for entry in steps:
        assert ("score/expected" in entry) != is_sampled
        assert entry.get("score/expected", -1) < 0  # minus a divergence
        # The exact form is normalized by the moments of whole distributions, not by those of the sampled tokens.
        is_whitened = entry["advantages/std"] == pytest.approx(1, abs=1e-3)
        assert is_whitened == (settings["advantage_normalization"] == "global" and is_sampled)


def test_the_teacher_scores_its_rewriting_after_the_question(student, tmp_path, monkeypatch):
    """A teacher that is the student has nothing to say there, whatever it has read to write."""
    monkeypatch.chdir(ROOT)
    (step,) = train("mixed_policy", student, student, tmp_path, num_steps=1)
    assert max(step["score/max"], -step["score/min"]) < 1e-4

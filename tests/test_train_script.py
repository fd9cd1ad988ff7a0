"""`examples/train_gndpo.py` from the command line: its algorithms, data sets of every kind, images, LoRA, resuming."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import train_gndpo as script
from datasets import DatasetDict
from transformers import AutoModelForCausalLM

from gndpo_trl import GNDPOConfig
from gndpo_trl.gspo import GSPOConfig


SCRIPT = Path(__file__).parents[1] / "examples" / "train_gndpo.py"

RECIPE = """
use_cpu: true
bf16: false
gradient_checkpointing: false
per_device_train_batch_size: 4
num_generations: 2
max_completion_length: 8
max_steps: 2
learning_rate: 1.0e-3
logging_steps: 1
report_to: none
"""


@pytest.fixture
def command(checkpoints, tmp_path):
    """Arguments for a run on tiny models: recipe, student, teacher and output folder."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    def build(dataset: Path | str, *options: str, family: str = "qwen3") -> list[str]:
        return [
            *("--config", str(recipe), "--output_dir", str(tmp_path / "out")),
            *("--model_name_or_path", checkpoints[f"{family}-student"]),
            *("--teacher_model_name_or_path", checkpoints[f"{family}-teacher"]),
            *("--dataset_name", str(dataset), *options),
        ]

    return build


def run(arguments: list[str]) -> None:
    script.main(*script.parse_arguments(arguments))


def log_history(output_dir: Path, step: int) -> list[dict]:
    return json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.processes
def test_launched_with_accelerate(command, text_dataset, tmp_path):
    DatasetDict(train=text_dataset, test=text_dataset).save_to_disk(tmp_path / "data")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "no"]
    options = ["--eval_strategy", "steps", "--eval_steps", "2", "--num_generations_eval", "1"]
    result = subprocess.run(
        [*launch, "--dynamo_backend", "no", str(SCRIPT), *command(tmp_path / "data", *options)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    entries = log_history(tmp_path / "out", 2)
    assert entries[0]["score/mean"] != 0
    assert any("eval_score/mean" in entry for entry in entries)


@pytest.mark.parametrize("kind", ["save_to_disk of one split", "parquet", "jsonl", "folder of parquet"])
def test_data_sets_from_disk(command, text_dataset, tmp_path, kind):
    path = tmp_path / "data"
    if kind == "save_to_disk of one split":
        text_dataset.save_to_disk(path)
    elif kind == "folder of parquet":
        path.mkdir()
        text_dataset.to_parquet(path / "train-00000-of-00001.parquet")
    else:
        path = path.with_suffix(f".{kind}")
        text_dataset.to_parquet(path) if kind == "parquet" else text_dataset.to_json(path)
    run(command(path))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_images_and_rewards(command, image_dataset, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(completion_ids, **kwargs):\n    return [1.0 * len(ids) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    image_dataset.save_to_disk(tmp_path / "data")
    suppress = json.dumps({"suppress_tokens": list(range(3, 11))})
    options = ["--generation_kwargs", suppress, "--reward_funcs", "my_rewards.length", "think_format_reward"]
    run(command(tmp_path / "data", *options, family="internvl"))
    entry = log_history(tmp_path / "out", 2)[0]
    assert entry["rewards/length/mean"] > 0 and "rewards/think_format_reward/mean" in entry


def test_lora(command, text_dataset, tmp_path):
    text_dataset.save_to_disk(tmp_path / "data")
    run(command(tmp_path / "data", "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_resume_finds_the_last_checkpoint(command, text_dataset, tmp_path):
    text_dataset.save_to_disk(tmp_path / "data")
    run(command(tmp_path / "data"))
    run(command(tmp_path / "data", "--max_steps", "4", "--resume_from_checkpoint", "true"))
    steps = [entry["step"] for entry in log_history(tmp_path / "out", 4) if "loss" in entry]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dataset_train_split", "training"], r"`dataset_train_split` is 'training'.*\['train'\]"),
        (["--eval_strategy", "steps"], r"`dataset_test_split` is 'test'.*\['train'\]"),
        (["--reward_funcs", "accuracy"], r"`reward_funcs` names 'accuracy'.*accuracy_reward"),
    ],
)
def test_bad_input_is_named(command, text_dataset, tmp_path, options, message):
    DatasetDict(train=text_dataset).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run(command(tmp_path / "data", *options))


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "exact_reward.match",
            "`reward_funcs` names 'exact_reward.match', but there is no module 'exact_reward'.*working dir",
        ),
        ("gndpo_trl.reward.exact", "names 'gndpo_trl.reward.exact', but there is no module 'gndpo_trl.reward'"),
        (
            "exact_rewards.exact_macth",
            "module 'exact_rewards' has no function 'exact_macth'. Did you mean 'exact_match'",
        ),
        ("exact_rewards.zzz", "module 'exact_rewards' has no function 'zzz'. Correct the name"),
        ("exact_rewards.LIMIT", "module 'exact_rewards' has no function 'LIMIT'"),
        ("exact_rewards.", "module 'exact_rewards' has no function ''"),
        (".exact_rewards.exact_match", "names '.exact_rewards.exact_match'. Choose one of"),
    ],
)
def test_mistyped_rewards_are_named_before_anything_is_loaded(command, tmp_path, monkeypatch, name, message):
    (tmp_path / "exact_rewards.py").write_text(
        "LIMIT = 1\n\n\ndef exact_match(completions, **kwargs):\n    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        run(command("./nowhere", "--reward_funcs", name))


def test_a_reward_module_that_lacks_a_package_says_so(command, tmp_path, monkeypatch):
    (tmp_path / "needy_rewards.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        run(command("./nowhere", "--reward_funcs", "needy_rewards.exact_match"))


def test_an_unknown_key_in_a_recipe_is_named(command, tmp_path):
    arguments = command("nowhere")
    for key, message in [("score_clamp", "Did you mean `score_clip`"), ("zzz", "`zzz`, which is not a field.*Remove")]:
        (tmp_path / "recipe.yaml").write_text(RECIPE + f"{key}: 5.0\n")
        with pytest.raises(ValueError, match=message):
            script.parse_arguments(arguments)
    with pytest.raises(ValueError, match="score_clamp"):  # on the command line too
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        script.parse_arguments([*arguments, "--score_clamp", "5.0"])


def test_models_and_data_must_be_given(tmp_path):
    basics = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False"]
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        run(basics)
    with pytest.raises(ValueError, match="`dataset_name` is not set"):
        run([*basics, "--model_name_or_path", "somewhere"])


# The algorithms


@pytest.fixture
def parse(tmp_path):
    def parse(*options: str, recipe: str = ""):
        (tmp_path / "recipe.yaml").write_text(RECIPE + recipe)
        return script.parse_arguments(
            ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), *options]
        )

    return parse


def test_the_algorithm_decides_on_the_configuration(parse):
    teacher, rewards = ["--teacher_model_name_or_path", "there"], ["--reward_funcs", "accuracy_reward"]
    for options, algorithm, config_class in [
        (teacher, "gndpo", GNDPOConfig),
        ([*teacher, *rewards], "gndpo", GNDPOConfig),
        (rewards, "gspo", GSPOConfig),
        ([], "gndpo", GNDPOConfig),
        (["--teacher_server_url", "http://there", *rewards], "gndpo", GNDPOConfig),
        ([*rewards, "--algorithm", "gspo"], "gspo", GSPOConfig),
        ([*teacher, "--algorithm", "opd"], "opd", GNDPOConfig),
    ]:
        script_args, training_args, _ = parse(*options)
        assert script_args.algorithm == algorithm and type(training_args) is config_class
        if config_class is GNDPOConfig:
            assert training_args.advantage_normalization == ("none" if algorithm == "opd" else "global")
    script_args, training_args, _ = parse(*teacher, recipe="algorithm: opd\n")
    assert script_args.algorithm == "opd" and training_args.advantage_normalization == "none"


def test_gspo_is_grpo_with_the_settings_of_the_reference(parse):
    _, config, _ = parse("--reward_funcs", "accuracy_reward")
    assert config.importance_sampling_level == "sequence"
    assert config.loss_type == "grpo"
    assert config.epsilon == 0.2 and config.epsilon_high is None
    assert config.beta == 0.0
    assert config.lr_scheduler_type == "constant"
    assert config.weight_decay == 0.01
    assert config.max_grad_norm == 1.0
    assert config.vllm_importance_sampling_correction is False
    docstring = " ".join(GSPOConfig.__doc__.split())
    for name in [*GSPOConfig.__annotations__, "eval_temperature"]:
        assert " ".join(GSPOConfig.__dataclass_fields__[name].metadata["help"].split()) in docstring, name


@pytest.mark.parametrize(
    "options, recipe, message",
    [
        (["--algorithm", "ppo"], "", r"`algorithm` is 'ppo'.*'gndpo', 'opd', 'gspo'"),
        (
            ["--teacher_model_name_or_path", "there"],
            "algorithm: gspo",
            r"`teacher_model_name_or_path` is 'there'.*GSPO",
        ),
        (
            ["--teacher_server_url", "http://there", "--algorithm", "gspo"],
            "",
            "`teacher_server_url` is .*http://there",
        ),
        (["--algorithm", "gspo"], "", r"`algorithm` is 'gspo', but `reward_funcs` is not set"),
        (["--reward_funcs", "accuracy_reward"], "score_clip: 5.0", r"`score_clip`.*GSPOConfig.*name a teacher"),
        (["--algorithm", "opd"], "advantage_normalization: global", r"`advantage_normalization` is 'global'.*'opd'"),
        (["--algorithm", "opd", "--advantage_normalization", "group"], "", r"`advantage_normalization` is 'group'"),
    ],
)
def test_settings_that_contradict_the_algorithm_are_refused(parse, options, recipe, message):
    with pytest.raises(ValueError, match=message):
        parse(*options, recipe=recipe)


def test_gspo_needs_a_model_that_reads_the_images(checkpoints, image_dataset, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    image_dataset.save_to_disk(tmp_path / "data")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--model_name_or_path", checkpoints["qwen3-student"], "--dataset_name", str(tmp_path / "data")]
    with pytest.raises(ValueError, match="has the column 'images'.*no processor for images"):
        run([*arguments, "--reward_funcs", "think_format_reward"])

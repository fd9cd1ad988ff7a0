"""Every recipe: through the script's own parser, against the paper's constants, and for two steps on tiny models."""

import json
import math
import re
from pathlib import Path

import pytest
import tiny_models
import train_gndpo as script
import yaml
from datasets import Dataset


ROOT = Path(__file__).parents[1]
FAMILIES = {"internvl3_5": "internvl", "qwen_vl": "qwen25vl", "text": "qwen3", "digits": "internvl"}
RECIPES = sorted(
    str(path.relative_to(ROOT / "recipes")) for name in FAMILIES for path in (ROOT / "recipes" / name).rglob("*.yaml")
)
PAPER_RECIPES = [f"internvl3_5/{size}/{name}.yaml" for size in ("1b", "2b", "4b") for name in ("gspo", "opd", "gndpo")]

# The constants of the paper's run that all of its arms share.
PAPER_CONSTANTS = {
    "num_generations": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_completion_length": 16384,
    "vllm_max_model_length": 8192 + 16384,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_correction": False,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "gradient_checkpointing": True,
    "bf16": True,
    "loss_type": "grpo",
    "epsilon": 0.2,
    "beta": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "eval_on_start": True,
    "eval_temperature": 0.0,
    "num_generations_eval": 1,
    "reward_weights": [0.9, 0.1],
}
# What sets the arms apart; with everything else the same, they can be compared.
ARMS = {
    "gspo": {"importance_sampling_level": "sequence"},
    "opd": {"importance_sampling_level": "sequence_token", "advantage_normalization": "none", "score_clip": 5.0},
    "gndpo": {"importance_sampling_level": "sequence_token", "advantage_normalization": "global", "score_clip": 5.0},
}
ARM_KEYS = {
    "algorithm",
    "advantage_normalization",
    "importance_sampling_level",
    "output_dir",
    "score_clip",
    "scoring_token_budget",
    "teacher_model_name_or_path",
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, str]:
    """Folders with train.parquet and test.parquet, without images, with some, and with one in every other row."""
    folders = {}
    for kind in ("text", "images", "mixed"):
        folder = tmp_path_factory.mktemp(kind)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"what is {a} plus two ?"}],
                "solution": str(index),
                **(
                    {}
                    if kind == "text"
                    else {"images": [tiny_models.draw_image(index)][: 1 - (kind == "mixed") * (index % 2)]}
                ),
            }
            for index, a in enumerate(["one", "two", "three", "four"])
        ]
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        folders[kind] = str(folder)
    return folders


def read(recipe: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / recipe).read_text())


def parse(recipe: str, *options: str) -> dict:
    """Fields of all the script's configurations; bf16 is as in the recipe, which only GPUs and `use_cpu` allow."""
    arguments = ["--config", str(ROOT / "recipes" / recipe), "--use_cpu", "True", *options]
    script_args, training_args, model_args = script.parse_arguments(arguments)
    return {**vars(model_args), **vars(training_args), **vars(script_args)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_is_a_field_and_keeps_its_value(recipe):
    teacher = ["--teacher_model_name_or_path", "teacher"] if recipe.startswith("digits") else []
    parsed = parse(recipe, *teacher)
    for key, value in read(recipe).items():
        assert parsed[key] == ([] if key == "report_to" and value == "none" else value), key
    for name in read(recipe)["reward_funcs"]:
        assert callable(script.get_reward_func(name))


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_the_papers_constants(recipe):
    parsed = parse(recipe)
    _, size, name = Path(recipe).with_suffix("").parts
    assert {key: parsed[key] for key in PAPER_CONSTANTS} == PAPER_CONSTANTS
    assert {key: parsed[key] for key in ARMS[name]} == ARMS[name]
    assert parsed["algorithm"] == name
    assert parsed["per_device_train_batch_size"] * parsed["gradient_accumulation_steps"] * 8 == 32 * 16
    assert parsed["steps_per_generation"] == parsed["gradient_accumulation_steps"]
    assert parsed["model_name_or_path"] == f"OpenGVLab/InternVL3_5-{size.upper()}-HF"
    teacher = None if name == "gspo" else "OpenGVLab/InternVL3_5-8B-HF"
    assert parsed.get("teacher_model_name_or_path") == teacher
    assert parsed["reward_funcs"] == ["boxed_accuracy_reward", "think_format_reward"]
    assert parsed["dataset_name"] == "data/geometry3k"


@pytest.mark.parametrize("size", ["1b", "2b", "4b"])
def test_the_arms_differ_only_where_the_reference_differs(size):
    gspo, opd, gndpo = (read(f"internvl3_5/{size}/{name}.yaml") for name in ("gspo", "opd", "gndpo"))
    for one, other, keys in [
        (gspo, gndpo, ARM_KEYS),
        (opd, gndpo, {"algorithm", "advantage_normalization", "output_dir"}),
    ]:
        differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
        assert differing == keys


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.startswith("digits")])
def test_the_launch_command_at_the_top_fits(recipe):
    header = (ROOT / "recipes" / recipe).read_text()
    launcher, own = re.search(r"launch --config_file (\S+) .*?--config (\S+)", header, re.DOTALL).groups()
    assert own == f"recipes/{recipe}"
    settings = yaml.safe_load((ROOT / launcher).read_text())
    assert settings["num_processes"] == (1 if "single_gpu" in recipe else 8)
    assert settings["mixed_precision"] == "bf16" and read(recipe)["bf16"] is True


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_on_tiny_models(checkpoints, datasets, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(ROOT)  # the digits' reward is found from there
    values = read(recipe)
    family = FAMILIES[Path(recipe).parts[0]]
    options = {
        "model_name_or_path": checkpoints[f"{family}-student"],
        "dataset_name": datasets["text" if family == "qwen3" else "mixed" if "mixed" in recipe else "images"],
        "output_dir": tmp_path,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "use_vllm": False,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if values.get("algorithm") != "gspo":
        whose = "other" if values.get("teacher_alignment") == "text" else family
        options["teacher_model_name_or_path"] = checkpoints[f"{whose}-teacher"]
    if family != "qwen3":  # random models sample the placeholders of their family
        placeholders = list(range(3, 3 + len(tiny_models.SPECIAL_TOKENS)))
        options["generation_kwargs"] = json.dumps({"suppress_tokens": placeholders})
    arguments = ["--config", str(ROOT / "recipes" / recipe)]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    script.main(*script.parse_arguments(arguments))

    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        assert math.isfinite(entry["loss"]) and math.isfinite(entry["reward"])
        for name in values["reward_funcs"]:
            assert math.isfinite(entry[f"rewards/{name.rpartition('.')[2]}/mean"])
        if values.get("algorithm") == "gspo":
            assert "score/mean" not in entry
        else:
            assert entry["score/std"] > 0
            is_whitened = entry["advantages/std"] == pytest.approx(1, abs=1e-3)
            assert is_whitened == (values["advantage_normalization"] == "global")
    validations = [entry["step"] for entry in log if "eval_reward" in entry]
    assert validations == ([0, 2] if values.get("eval_on_start") else [])  # before training and at its end
    weights = "adapter_model.safetensors" if values.get("use_peft") else "model.safetensors"
    assert (tmp_path / weights).exists()

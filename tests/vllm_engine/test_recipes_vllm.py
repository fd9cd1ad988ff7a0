"""Every recipe that samples with vLLM, through the training script, for two steps of tiny models on the real engine."""

import json
import math
from pathlib import Path

import pytest
import torch
import train_gndpo as script
import yaml
from datasets import Dataset


ROOT = Path(__file__).parents[2]
FAMILIES = {"internvl3_5": "internvl", "qwen_vl": "qwen25vl", "text": "qwen3"}
RECIPES = sorted(str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml"))
RECIPES = [recipe for recipe in RECIPES if Path(recipe).parts[0] in FAMILIES]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, text_dataset, image_dataset) -> dict[str, str]:
    """Folders with train.parquet and test.parquet for each family, and with images in some rows."""
    folders = {}
    some = [{**row, "images": row["images"][: index % 2]} for index, row in enumerate(image_dataset)]
    mixed = Dataset.from_list(some, features=image_dataset.features)
    kinds = {"qwen3": text_dataset, "internvl": image_dataset, "qwen25vl": image_dataset, "mixed": mixed}
    for family, dataset in kinds.items():
        folder = tmp_path_factory.mktemp(family)
        rows = dataset.select(range(4)).add_column("solution", ["1", "2", "3", "4"])
        for split in ("train", "test"):
            rows.to_parquet(folder / f"{split}.parquet")
        folders[family] = str(folder)
    return folders


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(checkpoints, datasets, tmp_path, monkeypatch, recipe):
    # A run ends with its process group, which the shared engines still need.
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda group: None)
    values = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    assert values["use_vllm"] is True and values["vllm_mode"] == "colocate"
    family = FAMILIES[Path(recipe).parts[0]]
    options = {
        "model_name_or_path": checkpoints[f"{family}-student"],
        "dataset_name": datasets["mixed" if "mixed" in recipe else family],
        "output_dir": tmp_path,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "vllm_enable_sleep_mode": False,  # there is no GPU memory to give back
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
        options["teacher_model_name_or_path"] = checkpoints[f"{family}-teacher"]
        if "load_in_8bit" in str(values.get("teacher_model_init_kwargs")):
            options["teacher_model_init_kwargs"] = "{}"  # bitsandbytes is of the other environment, and tested there
    arguments = ["--config", str(ROOT / "recipes" / recipe)]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    script.main(*script.parse_arguments(arguments))

    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in steps)
    assert all(entry["sampling/logp_difference/max"] < 1e-5 for entry in steps)
    assert [entry["step"] for entry in log if "eval_reward" in entry] == (
        [0, 2] if values.get("eval_on_start") else []
    )

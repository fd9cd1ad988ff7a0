"""
Train a student with GNDPO: text or image-text, on one device or many, as the recipe says.

    accelerate launch examples/train_gndpo.py --config recipes/digits/gndpo.yaml
    accelerate launch examples/train_gndpo.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name trl-lib/DeepMath-103K --output_dir runs/qwen3

Every field of `GNDPOConfig`, of TRL's `ModelConfig` and of the script arguments below can stand in the recipe or on the
command line, which wins.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.launch import check_final_save


REWARD_FUNCS = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
}

# Loader of the `datasets` library for a single file, by its ending.
FILE_LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


@dataclass
class GNDPOScriptArguments(ScriptArguments):
    """
    Script arguments for GNDPO training.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Rewards to monitor; they do not touch the advantages. Names of TRL's (`accuracy_reward`,
            `reasoning_accuracy_reward`, `think_format_reward`) or dotted import paths, looked up from the working
            directory (`my_rewards.exact_match`).
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards to monitor; they do not touch the advantages. Names of TRL's (`accuracy_reward`, "
            "`reasoning_accuracy_reward`, `think_format_reward`) or dotted import paths, looked up from the working "
            "directory (`my_rewards.exact_match`)."
        },
    )


def load_splits(script_args: GNDPOScriptArguments) -> DatasetDict | IterableDatasetDict:
    """Splits of `--dataset_name`: a folder written by `save_to_disk`, a data file, a folder of them, or a hub id."""
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    if name is None:
        raise ValueError("`dataset_name` is not set. Give a hub id, a folder of `save_to_disk`, or a data file.")
    path = Path(name)
    if (path / "dataset_dict.json").exists():
        return load_from_disk(name)
    if (path / "state.json").exists():
        return DatasetDict({script_args.dataset_train_split: load_from_disk(name)})
    if path.suffix in FILE_LOADERS and path.exists():
        files = {script_args.dataset_train_split: name}
        return load_dataset(FILE_LOADERS[path.suffix], data_files=files, streaming=streaming)
    return load_dataset(name, name=script_args.dataset_config, streaming=streaming)


def get_split(splits: DatasetDict | IterableDatasetDict, field: str, name: str):
    if name not in splits:
        raise ValueError(f"`{field}` is {name!r}, but the dataset has the splits {sorted(splits)}.")
    return splits[name]


def get_reward_func(name: str) -> Callable:
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"`reward_funcs` names {name!r}. Choose one of {sorted(REWARD_FUNCS)}, or give a dotted import path."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)


def main(script_args: GNDPOScriptArguments, training_args: GNDPOConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set. Give the student's path or hub id.")
    check_final_save(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    splits = load_splits(script_args)
    train_dataset = get_split(splits, "dataset_train_split", script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = get_split(splits, "dataset_test_split", script_args.dataset_test_split)

    trainer = GNDPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[get_reward_func(name) for name in script_args.reward_funcs or []],
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    resume = training_args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "false"):  # "true": the last checkpoint in `output_dir`
        resume = resume.lower() == "true"
    trainer.train(resume_from_checkpoint=resume)

    trainer.save_state()
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()  # finishes the trackers and leaves the process group


if __name__ == "__main__":
    main(*TrlParser((GNDPOScriptArguments, GNDPOConfig, ModelConfig)).parse_args_and_config())

"""
Train a student with GNDPO, or with one of its baselines: text or image-text, on one device or many, as the recipe says.

    accelerate launch examples/train_gndpo.py --config recipes/digits/gndpo.yaml
    accelerate launch examples/train_gndpo.py \
        --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name trl-lib/DeepMath-103K --output_dir runs/qwen3 \
        --num_generations 4 --gradient_accumulation_steps 8

The paper's comparison has three arms, which share data, prompts, generation and validation:

    for algorithm in gspo opd gndpo; do
        accelerate launch --config_file recipes/accelerate/zero3_offload.yaml examples/train_gndpo.py \
            --config recipes/internvl3_5/1b/$algorithm.yaml
    done

    --algorithm gndpo   a teacher's scores of every token, clamped and whitened over the generation batch
    --algorithm opd     the same without the whitening
    --algorithm gspo    no teacher: TRL's GRPOTrainer on the rewards, with the paper's settings of GSPO

Every field of `GNDPOConfig` (`GSPOConfig` for GSPO), of TRL's `ModelConfig` and of the script arguments below can stand
in the recipe or on the command line, which wins.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.data import get_split, load_splits
from gndpo_trl.grpo.launch import check_final_save
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


ALGORITHMS = ("gndpo", "opd", "gspo")

REWARD_FUNCS = {
    "accuracy_reward": "trl.rewards.accuracy_reward",
    "boxed_accuracy_reward": "gndpo_trl.rewards.boxed_accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards.reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards.think_format_reward",
}


@dataclass
class GNDPOScriptArguments(ScriptArguments):
    """
    Script arguments for training with GNDPO, OPD or GSPO.

    Args:
        algorithm (`str`, *optional*):
            `"gndpo"`, `"opd"` (GNDPO without the whitening) or `"gspo"` (no teacher, the rewards are trained for). If
            unset, it is `"gspo"` where there are rewards and no teacher, else `"gndpo"`.
        reward_funcs (`list[str]`, *optional*):
            Rewards. GSPO trains for them; under GNDPO and OPD they are monitored, unless `reward_coef` is set. One
            of `accuracy_reward`, `boxed_accuracy_reward`, `reasoning_accuracy_reward` and `think_format_reward`, or
            dotted import paths, looked up from the working directory (`my_rewards.exact_match`).
        teacher_prompt_fn (`str`, *optional*):
            Dotted import path of a function that writes the teacher's prompts after sampling, see
            [`GNDPOTrainer`].
        rollout_func (`str`, *optional*):
            Dotted import path of a function that samples in place of the trainer, see [`~trl.GRPOTrainer`].
    """

    algorithm: str | None = field(
        default=None,
        metadata={
            "help": '`"gndpo"`, `"opd"` (GNDPO without the whitening) or `"gspo"` (no teacher, the rewards are trained '
            'for). If unset, it is `"gspo"` where there are rewards and no teacher, else `"gndpo"`.'
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards. GSPO trains for them; under GNDPO and OPD they are monitored, unless `reward_coef` is set. "
            "One of `accuracy_reward`, `boxed_accuracy_reward`, `reasoning_accuracy_reward` and "
            "`think_format_reward`, or dotted import paths, looked up from the working directory "
            "(`my_rewards.exact_match`)."
        },
    )
    teacher_prompt_fn: str | None = field(
        default=None,
        metadata={
            "help": "Dotted import path of a function that writes the teacher's prompts after sampling, see "
            "[`GNDPOTrainer`]."
        },
    )
    rollout_func: str | None = field(
        default=None,
        metadata={
            "help": "Dotted import path of a function that samples in place of the trainer, see [`~trl.GRPOTrainer`]."
        },
    )


@dataclass
class AlgorithmArguments:
    """What decides on the class of the configuration, and so has to be known before everything else is parsed."""

    algorithm: str | None = None
    teacher_model_name_or_path: str | None = None
    teacher_server_url: list[str] | None = None
    reward_funcs: list[str] | None = None


def choose_algorithm(arguments: AlgorithmArguments) -> str:
    algorithm = arguments.algorithm
    names = ("teacher_model_name_or_path", "teacher_server_url")
    field, teacher = next(((name, value) for name in names if (value := getattr(arguments, name))), (None, None))
    if algorithm is None:
        return "gspo" if arguments.reward_funcs and teacher is None else "gndpo"
    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` is {algorithm!r}. Choose one of {', '.join(map(repr, ALGORITHMS))}.")
    if algorithm == "gspo" and teacher is not None:
        raise ValueError(
            f"`{field}` is {teacher!r}, but GSPO learns from rewards and has no teacher. Unset it, "
            'or set `algorithm` to "gndpo" or "opd".'
        )
    if algorithm == "gspo" and not arguments.reward_funcs:
        raise ValueError("`algorithm` is 'gspo', but `reward_funcs` is not set. Name the rewards to train for.")
    return algorithm


def check_recipe_keys(keys: list[str], classes: tuple[type, ...]) -> None:
    """Raise `ValueError`, naming the key and the nearest field, if no class has a field for a key of the recipe."""
    names = {attribute.name for cls in classes for attribute in fields(cls) if attribute.init}
    for key in keys:
        if key in names:
            continue
        if key in GNDPOConfig.__dataclass_fields__:
            remedy = "GSPO, which runs without a teacher, has no use for it. Remove it, or name a teacher."
        elif nearest := difflib.get_close_matches(key, names, n=1):
            remedy = f"Did you mean `{nearest[0]}`?"
        else:
            remedy = "Remove it."
        raise ValueError(f"The recipe sets `{key}`, which is not a field of {classes[1].__name__}. {remedy}")


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[GNDPOScriptArguments, GNDPOConfig | GSPOConfig, ModelConfig]:
    """
    Read the command line and the recipe that it names.

    Raises:
        `ValueError`: if a key of the recipe is unknown, or if settings contradict the algorithm.
    """
    first_parser = TrlParser(AlgorithmArguments, add_help=False)
    first_arguments, other_keys_and_values, _ = first_parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    algorithm = choose_algorithm(first_arguments)
    classes = (GNDPOScriptArguments, GSPOConfig if algorithm == "gspo" else GNDPOConfig, ModelConfig)
    check_recipe_keys([key.removeprefix("--") for key in other_keys_and_values[::2]], classes)

    parser = TrlParser(classes)
    if algorithm == "opd":
        parser.set_defaults(advantage_normalization="none")
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    script_args.algorithm = algorithm
    if algorithm == "opd" and training_args.advantage_normalization != "none":
        raise ValueError(
            f"`advantage_normalization` is {training_args.advantage_normalization!r}, but `algorithm` is 'opd', which "
            'has no whitening. Unset it, or set `algorithm` to "gndpo".'
        )
    if algorithm == "gspo" and script_args.teacher_prompt_fn is not None:
        raise ValueError(
            f"`teacher_prompt_fn` is {script_args.teacher_prompt_fn!r}, but GSPO learns from rewards and has no teacher. "
            "Unset it, or name a teacher."
        )
    return script_args, training_args, model_args


def get_reward_func(name: str) -> Callable:
    if name not in REWARD_FUNCS and "" in name.rpartition(".")[0].split("."):
        raise ValueError(
            f"`reward_funcs` names {name!r}. Choose one of {sorted(REWARD_FUNCS)}, or give a dotted import path."
        )
    return import_function("reward_funcs", REWARD_FUNCS.get(name, name))


def import_function(field: str, name: str) -> Callable:
    """The function that a field of the script arguments names; raises `ValueError` if it is not there."""
    module_name, _, function_name = name.rpartition(".")
    if "" in module_name.split("."):
        raise ValueError(f"`{field}` is {name!r}. Give a dotted import path, as `my_functions.{name or 'name'}`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there, but not what it imports
            raise
        raise ValueError(
            f"`{field}` names {name!r}, but there is no module {error.name!r}. Correct the name, or start from the "
            f"folder that it is in: modules are looked up from the working directory ({os.getcwd()})."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [attribute for attribute, value in vars(module).items() if callable(value)]
        nearest = difflib.get_close_matches(function_name, functions, n=1)
        remedy = f"Did you mean {nearest[0]!r}?" if nearest else "Correct the name."
        raise ValueError(
            f"`{field}` names {name!r}, but the module {module_name!r} has no function {function_name!r}. {remedy}"
        )
    return function


def main(script_args: GNDPOScriptArguments, training_args: GNDPOConfig | GSPOConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set. Give the student's path or hub id.")
    check_final_save(training_args)
    reward_funcs = [get_reward_func(name) for name in script_args.reward_funcs or []]
    functions = {"teacher_prompt_fn": script_args.teacher_prompt_fn, "rollout_func": script_args.rollout_func}
    options = {key: import_function(key, name) for key, name in functions.items() if name is not None}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    splits = load_splits(
        script_args.dataset_name,
        script_args.dataset_config,
        streaming=script_args.dataset_streaming,
        train_split=script_args.dataset_train_split,
    )
    train_dataset = get_split(splits, "dataset_train_split", script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = get_split(splits, "dataset_test_split", script_args.dataset_test_split)

    trainer_class = GSPOTrainer if isinstance(training_args, GSPOConfig) else GNDPOTrainer
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **options,
    )

    trainer.accelerator.print(f"Training with the algorithm {script_args.algorithm}.")
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
    main(*parse_arguments())

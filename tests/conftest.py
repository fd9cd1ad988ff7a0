import json
import os
import re
from pathlib import Path

import other_tokenizers
import pytest
import tiny_models
import torch
from datasets import Dataset
from helpers import canned, reward
from trl import GRPOConfig

from gndpo_trl import GNDPOConfig, GNDPOTrainer


torch.set_num_threads(1)

# Files whose tests train for most of their time; `make quick` leaves them to `make test`.
SLOW = {
    *("test_arms", "test_checkpoints", "test_digits", "test_eval_temperature", "test_evaluate", "test_expectation"),
    *("test_configurations", "test_precision", "test_rows"),
    *(
        "test_finite_steps",
        "test_head_check",
        "test_loops",
        "test_mixed_rows",
        "test_notebook",
        "test_pictures",
        "test_pipeline",
        "test_pretrained",
    ),
    *("test_recipes", "test_report", "test_rewards_beside_teacher", "test_routed_teachers", "test_run_warnings"),
    *("test_self_distillation", "test_self_teacher", "test_server_teacher", "test_shared_prompts", "test_sharing"),
    *("test_step_progress", "test_teacher_prompt_fn", "test_token_page", "test_token_view", "test_train_script"),
    *("test_one_pass", "test_sampling_lead", "test_scoring", "test_teachers", "test_top_k", "test_trainer"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of several processes that are launched alike go to one worker, where they share their processes."""
    from xdist.scheduler import LoadScopeScheduling

    # Not by pytest-xdist's marks: its 3.8 ignores them silently under pytest 9.2.
    class LaunchScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if "faults/" in nodeid:  # they share a process that has imported everything
                return "faults"
            launched = re.search(r"distributed/.*\[.*?(ddp|fsdp2|zero\d)", nodeid)
            return launched[1] if launched else nodeid

    return LaunchScheduling(config, log)


@pytest.fixture(scope="session")
def reference_vectors() -> list[dict]:
    """Cases computed by the paper's code, in float64; `GNDPO_REFERENCE_VECTORS` names another file of the same form."""
    committed = Path(__file__).parent / "reference_vectors.json"
    cases = json.loads(Path(os.environ.get("GNDPO_REFERENCE_VECTORS") or committed).read_text())
    return [
        {
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for key, value in case.items()
        }
        for case in cases
    ]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """
    Paths of a student and a wider teacher of each family: `{family}-student`, `{family}-teacher`; and of a teacher over
    bytes, `other-teacher`.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for family, build in tiny_models.BUILDERS.items():
        paths[f"{family}-student"] = tiny_models.save(*build(seed=0), root / f"{family}-student")
        paths[f"{family}-teacher"] = tiny_models.save(*build(seed=1, width=48), root / f"{family}-teacher")
    other = tiny_models.build_qwen3(seed=1, width=48, tokenizer=other_tokenizers.over_bytes())
    paths["other-teacher"] = tiny_models.save(*other, root / "other-teacher")
    return paths


@pytest.fixture(scope="session")
def text_dataset() -> Dataset:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    questions = [f"what is {a} plus {b} ?" for a in words[:4] for b in words[4:]]
    questions += [f"what is the sum of {a} and {a} and {a} ?" for a in words]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]})


@pytest.fixture(scope="session")
def image_dataset() -> Dataset:
    """Questions with one or two images each, of different sizes."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "what is the sum ?"}],
            "images": [tiny_models.draw_image(index + k) for k in range(1 + index % 2)],
        }
        for index in range(16)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def make_config(tmp_path):
    """Configurations for runs of seconds on a CPU, in full precision."""

    def make(config_class: type = GNDPOConfig, **options) -> GNDPOConfig:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return config_class(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(make_config, checkpoints, text_dataset, image_dataset):
    def make(family: str = "qwen3", model=None, teacher_model=None, trainer_options=None, **options) -> GNDPOTrainer:
        trainer_options = dict(trainer_options or {})
        trainer_options.setdefault("train_dataset", text_dataset if family == "qwen3" else image_dataset)
        if family != "qwen3":
            # Random models sample the placeholders of their family, which no image belongs to.
            placeholders = list(range(3, 3 + len(tiny_models.SPECIAL_TOKENS)))
            options.setdefault("generation_kwargs", {"suppress_tokens": placeholders})
        if teacher_model is None and not {"teacher_model_name_or_path", "teacher_server_url"} & options.keys():
            teacher_model = checkpoints[f"{family}-teacher"]
        return GNDPOTrainer(
            model=model or checkpoints[f"{family}-student"],
            teacher_model=teacher_model,
            args=make_config(**options),
            **trainer_options,
        )

    return make


@pytest.fixture
def make_self_taught(make_trainer, tmp_path):
    """A student whose average, which reads more than it does, is its teacher, in a run of four steps."""
    question = [{"role": "user", "content": "one plus two is what ?"}]
    hint = [{"role": "user", "content": "one plus two is three . what is one plus two ?"}]
    rows = Dataset.from_list([{"prompt": question, "teacher_prompt": hint}] * 8)

    def make(folder: str, callbacks=(), **options) -> GNDPOTrainer:
        trainer_options = {"train_dataset": rows, "callbacks": list(callbacks)}
        options = {"teacher_weights": "ema", "teacher_ema_decay": 0.5, "max_steps": 4, **options}
        folder = str(tmp_path / folder)
        return make_trainer(teacher_model="self", output_dir=folder, trainer_options=trainer_options, **options)

    return make


@pytest.fixture
def make(make_config, checkpoints, text_dataset):
    """A trainer of any class, with rewards, on canned completions of heavy-tailed lengths."""

    def build(trainer_class: type, config_class: type = GRPOConfig, model=None, trainer_options=None, **options):
        trainer_options = {"rollout_func": canned, "reward_funcs": reward, **(trainer_options or {})}
        defaults = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_completion_length": 24,
            "max_steps": 1,
            "loss_type": "grpo",
        }
        return trainer_class(
            model=model or checkpoints["qwen3-student"],
            args=make_config(config_class, **{**defaults, **options}),
            train_dataset=text_dataset,
            **trainer_options,
        )

    return build

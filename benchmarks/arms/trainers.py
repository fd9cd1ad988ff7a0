"""The trainer of an arm: this package's, with its own estimators or another, or one of TRL's."""

from typing import Any

import torch
from datasets import Dataset
from digits_data import sum_reward
from digits_models import tokenize
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import RepeatSampler

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer

from .cells import Arm, Regime, Task
from .models import sample
from .transforms import Transformed, build_transform


# Fields of every trainer's configuration: those of the recipe, and none that would write files.
SHARED_OPTIONS = {
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "weight_decay": 0.01,
}

# Completions that the teacher samples at once for supervised training.
SFT_BATCH_SIZE = 512


class SamePrompts(DistillationTrainer):
    """TRL's trainer on the prompts that the others get: several completions of each, in the same order."""

    num_generations: int

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        prompts = self.args.per_device_train_batch_size // self.num_generations
        return train_order(self.train_dataset, prompts, self.num_generations, self.args.seed)


def train_order(dataset: Dataset, prompts: int, num_generations: int, seed: int) -> RepeatSampler:
    """Indices of the rows of all generation batches, as `GRPOTrainer` draws them."""
    return RepeatSampler(dataset, mini_repeat_count=num_generations, batch_size=prompts, seed=seed)


def teacher_samples(
    teacher: PreTrainedModel, processor: ProcessorMixin, train_split: Dataset, task: Task, regime: Regime, seed: int
) -> Dataset:
    """The rows of all batches, each with a completion that the teacher has sampled."""
    order = list(train_order(train_split, regime.prompts, regime.num_generations, seed))
    size = task.steps * regime.prompts * regime.num_generations
    # An epoch that the run goes beyond would be drawn anew; these runs stay within one.
    rows = train_split.select(order[:size])
    if len(rows) < size:
        raise ValueError(f"{task.steps} steps take {size} rows, and an epoch has {len(rows)}.")
    torch.manual_seed(seed)
    completions = []
    for start in range(0, size, SFT_BATCH_SIZE):
        questions = tokenize(processor, rows.select(range(start, min(start + SFT_BATCH_SIZE, size))))
        tokens, mask = sample(teacher, questions, processor.tokenizer.eos_token_id, task.max_new_tokens)
        completions += [
            [{"role": "assistant", "content": processor.tokenizer.decode(ids[keep], skip_special_tokens=True)}]
            for ids, keep in zip(tokens, mask, strict=True)
        ]
    return rows.remove_columns("completion").add_column("completion", completions)


def build_trainer(
    arm: Arm,
    task: Task,
    regime: Regime,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    processor: ProcessorMixin,
    train_split: Dataset,
    options: dict[str, Any],
) -> Trainer:
    options = {
        **SHARED_OPTIONS,
        "per_device_train_batch_size": regime.prompts * regime.num_generations,
        **options,
        **regime.options,
        **arm.options,
    }
    sources = {"model": student, "train_dataset": train_split, "processing_class": processor}
    if arm.trainer == "sft":
        sources["train_dataset"] = teacher_samples(teacher, processor, train_split, task, regime, options["seed"])
        args = SFTConfig(completion_only_loss=True, max_length=None, train_sampling_strategy="sequential", **options)
        return SFTTrainer(args=args, **sources)
    options["max_completion_length"] = task.max_new_tokens
    if arm.trainer == "distillation":
        trainer = SamePrompts(args=DistillationConfig(**options), teacher_model=teacher, **sources)
        trainer.num_generations = regime.num_generations
        return trainer
    options["num_generations"] = regime.num_generations
    if arm.trainer == "gspo":
        return GSPOTrainer(args=GSPOConfig(**options), reward_funcs=sum_reward, **sources)
    if arm.transform is not None:
        sources["estimator"] = Transformed(build_transform(arm.transform))
    return GNDPOTrainer(
        args=GNDPOConfig(**options), teacher_model=teacher, teacher_processing_class=processor, **sources
    )

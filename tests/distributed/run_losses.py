"""A job of `worker.py`: the first gradient of every loss, with TRL's padding and without it.

Its specification is that of `run_training.py`, and the report of each rank holds, for every loss, the largest entry of the
gradient and the largest difference to TRL's padding.
"""

import torch
from datasets import Dataset
from run_training import canned_rollouts, make_rows
from transformers import AutoProcessor
from trl.trainer.utils import split_pixel_values_by_grid

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.trl_hooks import ROW_MEAN_LOSSES, TOKEN_SUM_LOSSES


# Cases beside the losses' own: with a reference model, with an entropy bonus (TRL's micro-batches then stay), and with
# several optimizer steps per generation batch.
CASES = {
    **{loss_type: {"loss_type": loss_type} for loss_type in (*ROW_MEAN_LOSSES, *TOKEN_SUM_LOSSES, "bnpo")},
    "token ratio": {"importance_sampling_level": "token"},
    "reference model": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.1},
    "several steps": {"num_iterations": 2},
}


def first_gradient(spec: dict, options: dict) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Gradients at the first optimizer step, and the lengths of the rows in each micro-batch before it."""
    trainer = GNDPOTrainer(
        model=spec["model"],
        teacher_model=spec["teacher"],
        args=GNDPOConfig(**{**spec["config"], **options}),
        train_dataset=Dataset.from_list(make_rows(spec["images"])),
        processing_class=AutoProcessor.from_pretrained(spec["model"]),
        rollout_func=canned_rollouts(spec["completions"]),
    )
    gradients, lengths = {}, []

    def catch(optimizer, args, kwargs):
        for name, parameter in trainer.model.named_parameters():
            gradients.setdefault(name, parameter.grad.clone())

    compute_loss = trainer._compute_loss

    def watch(model, inputs):
        lengths.append(inputs["completion_mask"].sum(-1).tolist())
        if "pixel_values" in inputs:
            assert len(split_pixel_values_by_grid(inputs)["pixel_values"]) == len(inputs["prompt_ids"])
        return compute_loss(model, inputs)

    trainer._compute_loss = watch
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(catch)
    trainer.train()
    return gradients, lengths


def compare_losses(spec: dict) -> dict:
    report = {}
    for name, options in CASES.items():
        padded, _ = first_gradient(spec, {**options, "pad_to_multiple_of": 1})
        found, lengths = first_gradient(spec, options)
        report[name] = {
            "largest": max(gradient.abs().max().item() for gradient in padded.values()),
            "difference": max((found[key] - gradient).abs().max().item() for key, gradient in padded.items()),
            "lengths": lengths,
        }
    return report

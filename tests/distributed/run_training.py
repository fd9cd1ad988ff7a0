"""Launched by the tests in several processes: one training run on canned completions, and what each rank saw of it.

Usage: `accelerate launch ... run_training.py SPEC.json`, where the specification holds `model`, `teacher`, `config` (the
fields of GNDPOConfig), `completions` (token ids of the one completion of each prompt, or null to sample), `images`
(whether prompts have one), `resume`, `save` and `fail` (what shall go wrong, and on which rank).
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor

from gndpo_trl import GNDPOConfig, GNDPOTrainer


PROMPTS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def main(spec: dict) -> None:
    torch.set_num_threads(1)
    config = GNDPOConfig(**spec["config"])
    processing_class = AutoProcessor.from_pretrained(spec["model"])
    rows = [{"prompt": [{"role": "user", "content": f"what is {word} ?"}]} for word in PROMPTS]
    if spec["images"]:
        rows = [{**row, "images": [tiny_models.draw_image(index)]} for index, row in enumerate(rows)]

    def rollout_func(prompts, trainer):
        """The completion of each prompt from the specification, in place of sampling."""
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        words = [trainer._tokenizer.decode(ids).split(" ?")[0].split()[-1] for ids in prompt_ids]
        completions = [spec["completions"][PROMPTS.index(word)] for word in words]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": [[0.0] * len(completion) for completion in completions],
        }

    trainer = GNDPOTrainer(
        model=spec["model"],
        teacher_model=spec["teacher"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processing_class,
        rollout_func=rollout_func if spec["completions"] else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if spec.get("lora") else None,
    )
    rank = trainer.accelerator.process_index
    if spec.get("fail") == f"teacher on rank {rank}":
        score = trainer.teacher.score
        trainer.teacher.score = lambda model, rollout: score(model, rollout) * float("nan")

    advantages = {}
    forwards = {"teacher": 0, "student": 0}

    def count(name: str) -> None:
        forwards[name] += 1

    trainer.teacher.model.register_forward_pre_hook(lambda *args: count("teacher"))
    compute = trainer._generate_and_score_completions

    def watch(inputs):
        rollout = compute(inputs)
        for ids, row, mask in zip(
            rollout["prompt_ids"], rollout["advantages"], rollout["completion_mask"], strict=True
        ):
            word = trainer._tokenizer.decode(ids).split(" ?")[0].split()[-1]
            advantages[word] = row[: int(mask.sum())].tolist()
        return rollout

    trainer._generate_and_score_completions = watch
    teacher = trainer.accelerator.unwrap_model(trainer.teacher.model)
    if trainer.is_fsdp_enabled:
        held = sum(parameter.to_local().numel() for parameter in trainer.teacher.model.parameters())
    else:
        held = sum(getattr(p, "ds_tensor", p).numel() for p in teacher.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in teacher.parameters())

    trainer.train(resume_from_checkpoint=spec.get("resume"))
    if spec.get("save"):
        trainer.save_model(spec["save"])
    report = {
        "advantages": advantages,
        "teacher_forwards": forwards["teacher"],
        "teacher_parameters": {"held": held, "whole": whole},
        "log_history": trainer.state.log_history,
        "global_step": trainer.state.global_step,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "num_processes": trainer.accelerator.num_processes,
    }
    Path(spec["report"], f"rank{rank}.json").write_text(json.dumps(report))
    trainer.end()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

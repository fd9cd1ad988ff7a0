"""An arm: a trainer, its optimizer, and one step of it."""

import argparse

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer

from .models import SIZES, build_model, build_processing_class, draw_batch
from .stopwatch import Stopwatch


ARMS = (
    *("grpo", "gspo", "distillation", "padded", "gndpo", "gndpo-logps", "gndpo-rows"),
    *("expected", "expected-before", "exact", "exact-before"),
)


class Arm:
    def __init__(self, name: str, size: str, args: argparse.Namespace, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        student_shape, teacher_shape = SIZES[size]
        has_teacher = name not in ("grpo", "gspo")
        configs = {"grpo": GRPOConfig, "gspo": GSPOConfig, "distillation": DistillationConfig}
        config_class = configs.get(name, GNDPOConfig)
        options = {
            "output_dir": "runs/step_cost",
            "use_cpu": device.type == "cpu",
            "bf16": device.type == "cuda",
            "gradient_checkpointing": args.gradient_checkpointing,
            "per_device_train_batch_size": args.micro_batch,
            "gradient_accumulation_steps": args.completions // args.micro_batch,
            "max_completion_length": args.max_completion_length,
            "report_to": "none",
            "seed": args.seed,
        }
        if name != "distillation":
            options["num_generations"] = args.num_generations
        if name == "padded":
            options["pad_to_multiple_of"] = 1
        if config_class in (GNDPOConfig, GSPOConfig) and name != "padded":
            options["scoring_token_budget"] = args.scoring_token_budget
        if name.startswith("expected"):
            options["score_baseline"] = "expected"
        if name.startswith("exact"):
            options["estimator"] = "exact"
        if name == "gndpo-logps":
            options["use_sampling_logps"] = True
        if name == "gndpo-rows":
            options["share_prompts"] = False
        sources = {"model": build_model(size, student_shape, dtype, seed=0)}
        if has_teacher:
            sources["teacher_model"] = build_model(size, teacher_shape, dtype, seed=1)
        if not has_teacher:
            sources["reward_funcs"] = lambda completions, **kwargs: [0.0] * len(completions)
        if name != "distillation":
            sources["rollout_func"] = self.rollout
        processing_class = build_processing_class(size)
        if config_class is GNDPOConfig:
            sources["teacher_processing_class"] = processing_class
        rows = [{"prompt": "w1"}] if not size.endswith("internvl") else draw_batch(size, "constant", args)[0][:1]
        trainers = {"grpo": GRPOTrainer, "gspo": GSPOTrainer, "distillation": DistillationTrainer}
        trainer_class = trainers.get(name, GNDPOTrainer)
        self.trainer = trainer_class(
            args=config_class(**options),
            train_dataset=Dataset.from_list(rows * args.completions),
            processing_class=processing_class,
            **sources,
        )
        self.trainer.stopwatch = self.stopwatch = Stopwatch(device, sources.get("teacher_model"))
        if name.endswith("before"):
            self.trainer.in_one_pass = False
        if isinstance(self.trainer, GNDPOTrainer):
            self.stopwatch.follow(self.trainer.clock)
        self.steps = args.completions // args.micro_batch
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.trainer.model_wrapped = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.models = [self.model] + ([sources["teacher_model"]] if "teacher_model" in sources else [])
        for model in self.models:
            model = self.trainer.accelerator.unwrap_model(model)
            model.base_model.register_forward_pre_hook(self.stopwatch.count_tokens, with_kwargs=True)

    def use(self, completions: list[list[int]]) -> None:
        """Have the trainer take these completions for sampled."""
        self.completions = completions
        if isinstance(self.trainer, DistillationTrainer):  # has no `rollout_func`
            self.trainer._generate_single_turn = lambda *args, **kwargs: completions

    def rollout(self, prompts: list, trainer: GRPOTrainer) -> dict:
        """The completions in use, with log-probs that cost what real ones cost."""
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        logprobs = [[-1.0] * len(ids) for ids in self.completions]
        return {"prompt_ids": prompt_ids, "completion_ids": self.completions, "logprobs": logprobs}

    def step(self, rows: list[dict]) -> None:
        self.model.train()
        self.trainer.current_gradient_accumulation_steps = self.steps
        self.stopwatch.reset()
        for _ in range(self.steps):
            with self.stopwatch.phase("loss + backward"):
                self.trainer.training_step(self.model, rows, None)
        with self.stopwatch.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Weights of its models and state of its optimizer."""
        tensors = [tensor for model in self.models for tensor in model.parameters()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

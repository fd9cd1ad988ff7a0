"""vLLM as the sampler of a [`~trl.GRPOTrainer`], held to what the training engine scores."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather, is_peft_model
from datasets import Dataset
from trl import GRPOConfig

from .config_checks import raise_problems
from .loss_seam import Surrogate
from .microbatches import loss_mask
from .pictures import pictures_of
from .vllm_adapter import AdapterSync, why_not_alone
from .vllm_engine import (
    ExactVLLMClient,
    ExactVLLMGeneration,
    check_image_limit,
    check_prompt_length,
    check_version,
    engine_settings,
)


logger = get_logger(__name__)

# Options of a request to vLLM that leave the distribution of the next token alone.
NEUTRAL_SAMPLING_OPTIONS = {"ignore_eos", "seed", "stop", "stop_token_ids"}


@dataclass
class VLLMConfig(GRPOConfig):
    r"""
    [`~trl.GRPOConfig`] with a bound on how far vLLM may be from the training engine.

    Parameters:
        sampling_logp_threshold (`float`, *optional*):
            Largest mean difference, in nats, between vLLM's log-probs of the sampled tokens and those of the training
            engine. A run whose first batch exceeds it stops, or whose first batch of new weights. `None` is 0.05 if both
            compute in float32, and 0.2 otherwise. `inf` never stops a run; the difference is logged all the same.
    """

    sampling_logp_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Largest mean difference, in nats, between vLLM's log-probs of the sampled tokens and those of the "
            "training engine. A run whose first batch exceeds it stops, or whose first batch of new weights. `None` is "
            "0.05 if both compute in float32, and 0.2 otherwise. `inf` never stops a run; the difference is logged all the same."
        },
    )

    def __post_init__(self):
        raise_problems(self._problems())
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        """What is wrong with the fields as they were given, each with the value and the remedy."""
        if self.sampling_logp_threshold is not None and not self.sampling_logp_threshold > 0:
            yield (
                f"`sampling_logp_threshold` is {self.sampling_logp_threshold}, but no two engines agree to the last "
                "bit. Give a positive number of nats, None for the default, or inf for none."
            )
        if self.use_vllm and (self.vllm_max_model_length or math.inf) <= self.max_completion_length:
            yield (
                f"`vllm_max_model_length` is {self.vllm_max_model_length}, but it holds prompt and completion, and "
                f"`max_completion_length` alone is {self.max_completion_length}. Raise the former to at least the "
                "longest prompt plus the latter."
            )


def check_sampling_logps(args: GRPOConfig) -> None:
    """
    Raise `ValueError` if vLLM's log-probs would be those of another distribution than the training engine scores.

    They are taken from the distribution that is sampled from, after truncation and masking, which renormalize it.
    """
    neutral = {"top_p": (1.0,), "top_k": (0, -1), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    values = {name: getattr(args, name) for name in neutral}
    values["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex
    neutral |= {"vllm_structured_outputs_regex": (None,), "temperature": (args.temperature,)}
    # These win over the fields of the same name.
    values |= args.generation_kwargs or {}
    for name, value in values.items():
        if name not in NEUTRAL_SAMPLING_OPTIONS and value not in neutral.get(name, ()):
            raise ValueError(
                f"`use_sampling_logps` is True, but `{name}` ({value!r}) makes vLLM sample, and report log-probs, from "
                "another distribution than the student's. Unset it, or switch `use_sampling_logps` off."
            )


def logp_difference(
    sampling_logps: torch.Tensor,
    logps: torch.Tensor,
    mask: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> tuple[float, float]:
    """
    How far the sampler is from the training engine.

    Args:
        sampling_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probs, in nats, by the engine that sampled. NaN where it has none.
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probs, in nats, of the same tokens by the engine that trains.
        mask (`torch.Tensor` of shape `(B, T)`):
            Which tokens the model sampled and the loss uses.
        gather (`Callable`, *optional*):
            Concatenates a tensor of shape `(1, 3)` over all ranks. Without it, the numbers are those of this rank.

    Returns:
        `tuple[float, float]`: mean and largest absolute difference, in nats, over the valid tokens of all ranks; zeros
        if there are none.
    """
    valid = mask.bool() & ~sampling_logps.isnan()
    differences = (sampling_logps - logps).abs()[valid].float()
    largest = differences.max() if differences.numel() else differences.new_zeros(())
    total, count, _ = (all_ranks := gather(torch.stack([differences.sum(), valid.sum(), largest])[None])).sum(0)
    return (total / count.clamp(min=1)).item(), all_ranks[:, 2].max().item()


class VLLMMixin:
    """
    Holds the vLLM sampler of a [`~trl.GRPOTrainer`] to what the trainer scores; without `use_vllm` it does nothing.

    - vLLM samples from exactly the token ids that are scored, with images in both modes, and every generation is
      checked for it.
    - It forgets the embeddings of images when it gets new weights.
    - A server with `--enable-lora` gets a LoRA student's adapter alone, see [`~grpo.vllm_adapter.AdapterSync`].
    - `sampling/logp_difference/mean` and `/max`, in nats, are logged for every batch of which both engines' log-probs
      are known, and a first batch, or a first one of new weights, whose mean exceeds `args.sampling_logp_threshold` stops
      the run. A trainer that scores the completions itself calls `_watch_sampling_logps` when it has.

      Of batches that were sampled with older weights, `sampling/policy_change/mean` and `/max` are logged in their place, and
      stop nothing.

    The arguments are those of [`~trl.GRPOTrainer`], with a [`VLLMConfig`].

    Raises:
        `ValueError`: at construction, if vLLM is too old or too new, or reports no processed log-probs, or takes fewer
            images or shorter prompts than the data have; during a run, if vLLM sampled from another prompt, or differs
            too much from the training engine.
    """

    # Optimizer steps between the weights that sampled the generation batch in use and those that learn from it.
    _staleness = 0

    def __init__(self, model, reward_funcs=None, args=None, *more, **options):
        if args is not None and args.use_vllm and find_spec("vllm") is not None:
            import vllm

            check_version(vllm.__version__, "The installed engine")
        super().__init__(model, reward_funcs, args, *more, **options)
        self._compared_steps: set[int] = set()
        if not self.use_vllm:
            return
        generation = self.vllm_generation
        # TRL makes these objects itself and takes no classes for them.
        generation.__class__ = ExactVLLMGeneration
        if generation.mode == "server" and self.accelerator.is_main_process:
            generation.vllm_client.__class__ = ExactVLLMClient
        generation.settings = settings = engine_settings(generation)
        check_version(settings["version"], "The engine")
        if settings["logprobs_mode"] != "processed_logprobs":
            raise ValueError(
                f"The vLLM server runs with `--logprobs-mode {settings['logprobs_mode']}`, so its log-probs are not "
                "those of the distribution that it samples from. Restart it with `--logprobs-mode processed_logprobs`."
            )
        if settings.get("max_lora_rank") is not None and is_peft_model(self.model):
            why = why_not_alone(self.model, settings["max_lora_rank"])
            if why is None and not settings["loads_adapters"]:
                why = "its environment has no `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`"
            if why is None:
                generation.adapter = AdapterSync(self.model, Path(args.output_dir).absolute(), self.accelerator)
            else:
                logger.warning(
                    f"The vLLM server takes adapters, but gets all weights with the student's merged into them: {why}."
                )
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        datasets = [dataset for dataset in (self.train_dataset, *evaluation.values()) if dataset is not None]
        if any({"image", "images"} & set(dataset.column_names or ()) for dataset in datasets):
            if generation.mode == "server" and self.accelerator.is_main_process:
                _ = generation.extra_image_tokens  # a server that cannot take images says so now
        for dataset in datasets:
            check_image_limit(dataset, settings["images_per_prompt"])
            self._check_prompt_lengths(dataset, settings["max_model_len"])

    def _begin_run(self):
        super()._begin_run()
        self._compared_steps: set[int] = set()
        self._last_loaded_step = -1  # vLLM may hold weights of another run's step of the same number

    def _check_prompt_lengths(self, dataset: Any, max_model_len: int) -> None:
        """Raise `ValueError` if a prompt of text is too long; those with images are looked at when they are sampled."""
        columns = set(dataset.column_names) if isinstance(dataset, Dataset) else set()
        if "prompt" not in columns or {"image", "images"} & columns or self.environment_factories or self.rollout_func:
            return
        for row, prompt in enumerate(dataset["prompt"]):
            # A token has at least a byte, and few templates are longer than the prompts that get near the limit.
            if 2 * len(str(prompt).encode()) > max_model_len and pictures_of({"prompt": prompt}) is None:
                (prompt_ids, *_), *_ = self._tokenize_prompts([prompt])
                check_prompt_length(f"The prompt of row {row} of the data", len(prompt_ids), max_model_len)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rollout = super()._generate_and_score_completions(inputs)
        if {"sampling_per_token_logps", "old_per_token_logps"} <= rollout.keys():
            self._watch_sampling_logps(rollout, rollout["old_per_token_logps"])
        return rollout

    def _watch_sampling_logps(self, rollout: dict[str, Any], logps: torch.Tensor) -> None:
        """
        Log how far vLLM's log-probs are from the training engine's, and stop the run if its first batch, or the first of new
        weights, is far off.

        Args:
            rollout (`dict`):
                Output of `_generate_and_score_completions`, or rows of it.
            logps (`torch.Tensor` of shape `(B, T)`):
                Log-probs, in nats, of the completion tokens under the weights that vLLM sampled with.

        Raises:
            `ValueError`: on all ranks, if this is one of those batches and the mean difference is above the threshold.
        """
        mode = "train" if self.model.training else "eval"
        eval_temperature = getattr(self.args, "eval_temperature", None)
        if not self.use_vllm or "sampling_per_token_logps" not in rollout:
            return
        if mode == "eval" and eval_temperature not in (None, self.temperature):
            return  # log-probs of two different distributions
        mask = loss_mask(rollout)
        mean, largest = logp_difference(rollout["sampling_per_token_logps"], logps, mask, gather)
        # Of older weights, it is what the student has learned since, beside what the engines differ by.
        if mode == "train" and self._staleness > 0:
            self._metrics[mode]["sampling/policy_change/mean"].append(mean)
            self._metrics[mode]["sampling/policy_change/max"].append(largest)
            return
        self._metrics[mode]["sampling/logp_difference/mean"].append(mean)
        self._metrics[mode]["sampling/logp_difference/max"].append(largest)
        # Once with the weights that it was started with, which a sampler may have by itself, and once with others.
        if mode == "eval" or len(self._compared_steps) == 2:
            return
        self._compared_steps.add(self.state.global_step)
        threshold = self.args.sampling_logp_threshold
        if threshold is None:
            training_dtype = "bfloat16" if self.args.bf16 or self.args.fp16 else str(self.model.dtype)
            is_exact = {training_dtype.removeprefix("torch."), self.vllm_generation.settings["dtype"]} == {"float32"}
            threshold = 0.05 if is_exact else 0.2
        if not mean <= threshold:
            raise ValueError(
                f"vLLM's log-probs of the tokens that it sampled are {mean:.3g} nats from the training engine's on "
                f"average (at most {largest:.3g}), more than `sampling_logp_threshold` ({threshold:.3g}) allows. Look "
                "at the expansion of image placeholders, at vLLM's `logprobs_mode` (processed_logprobs), at the dtype "
                f"of both engines (vLLM: {self.vllm_generation.settings['dtype']}), at the weights that vLLM got, and "
                "at what truncates or masks its distribution (`top_p`, `top_k`, `min_p`, `allowed_token_ids`). If the "
                "difference is wanted, raise the threshold, or set it to inf."
            )


class SamplerWatch(Surrogate):
    """
    Has a trainer that leaves scoring to TRL look at its sampler in the loss, where TRL knows no log-probs before it. They are
    those of the weights that vLLM sampled with, since TRL scores beforehand where the weights may have changed.

    Args:
        watch (`Callable`): `_watch_sampling_logps` of a [`VLLMMixin`].
    """

    def __init__(self, watch: Callable[[dict[str, Any], torch.Tensor], None]):
        self.watch = watch

    def advantages_in_loss(self, logps, inputs):
        if "old_per_token_logps" not in inputs:
            self.watch(inputs, logps.detach())
        return super().advantages_in_loss(logps, inputs)

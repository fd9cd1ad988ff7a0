import math
import os
import textwrap
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather, is_peft_model, send_to_device
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from .advantages import clamp_scores, compute_advantages, population_moments, token_scores
from .compatibility import check_compatibility
from .config import GNDPOConfig
from .eval_temperature import EvalTemperatureMixin
from .grpo.vllm import VLLMMixin, check_sampling_logps
from .importance import sequence_token_logps
from .launch import check_final_save
from .metrics import score_metrics, score_statistics
from .microbatches import LeftAligned, group_by_length, regroup, select_rows
from .sigterm import AgreedJITCheckpointCallback, JITCheckpointCallback
from .teacher import LocalTeacher, load_teacher, prepare_teacher
from .trl_hooks import (
    MULTIMODAL_KEYS,
    REWARD_METRICS,
    ROW_MEAN_LOSSES,
    TOKEN_SUM_LOSSES,
    disable_gradient_checkpointing,
    get_config_model_id,
    nanstd,
    real_tokens_in_lm_head,
)


def teacher_score(completions: list, **kwargs) -> list[float]:
    """Holds the place of the reward that TRL requires; the trainer puts the teacher's mean score there."""
    return [0.0] * len(completions)


class GNDPOTrainer(EvalTemperatureMixin, VLLMMixin, GRPOTrainer):
    """
    Trainer for Globally Normalized Distillation Policy Optimization (GNDPO), proposed in [Stabilizing On-Policy
    Distillation for MLLM Reasoning with Global Normalization](https://huggingface.co/papers/2606.09091).

    The student samples completions; a frozen teacher scores every sampled token; the score, `teacher log-prob - student
    log-prob`, is clamped and whitened over all valid tokens of the generation batch, on all ranks; the result is the
    token-level advantage of TRL's clipped policy-gradient loss. Everything else is [`~trl.GRPOTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from gndpo_trl import GNDPOTrainer

    >>> trainer = GNDPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     teacher_model="Qwen/Qwen3-4B",
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher: a path, a model id or a loaded model. May be omitted if `args.teacher_model_name_or_path` is set.
            Image-text students need an image-text teacher.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids and images mean the same to both
            models. If `None`, it is loaded from where the teacher came from.
        args ([`GNDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions to monitor. They are computed and logged as in [`~trl.GRPOTrainer`] and do not touch the
            advantages. Without any, the teacher's mean score per completion is logged as the reward.

        All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: at construction, if there is no teacher or if it cannot score what the student samples; during a
            run, if the teacher or the student returns non-finite log-probs.
    """

    _tag_names = ["trl", "gndpo"]
    _name = "GNDPO"
    _paper = {
        "title": "Stabilizing On-Policy Distillation for MLLM Reasoning with Global Normalization",
        "id": "2606.09091",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{hao2026stabilizing,
                title  = {{Stabilizing On-Policy Distillation for MLLM Reasoning with Global Normalization}},
                author = {Dongze Hao and Zhiwei Jin and Chen Chen and others},
                year   = 2026,
                eprint = {arXiv:2606.09091},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GNDPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
        teacher_model: str | PreTrainedModel | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GNDPOConfig(f"{model_name.split('/')[-1]}-GNDPO")
        elif not isinstance(args, GNDPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}, but GNDPOTrainer needs a GNDPOConfig: replace the class name, all "
                "fields of GRPOConfig are there."
            )
        if teacher_model is model and not isinstance(model, str):
            raise ValueError(
                "`teacher_model` and `model` are the same object, so the teacher would be trained with the student. "
                "Load the teacher separately."
            )
        if args.save_strategy != "no":
            check_final_save(args)
        if args.use_sampling_logps and not args.use_vllm and rollout_func is None:
            raise ValueError(
                "`use_sampling_logps` is True, but transformers' generation returns no log-probs. Set `use_vllm=True`, "
                "pass a `rollout_func` that returns `logprobs`, or switch it off."
            )
        if args.use_sampling_logps and rollout_func is None:
            check_sampling_logps(args)
        teacher_model, teacher_processing_class = load_teacher(teacher_model, teacher_processing_class, args)

        super().__init__(
            model=model,
            reward_funcs=reward_funcs or teacher_score,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )

        check_images_are_read(self)
        keep_checkpoint_names(self.model)

        if args.enable_jit_checkpoint:
            callback = AgreedJITCheckpointCallback()
            callback.jit_manager = self.pop_callback(JITCheckpointCallback).jit_manager
            self.add_callback(callback)

        # TRL knows "token" and "sequence"; "sequence_token" reaches its token-level ratio through `_compute_loss`.
        self._is_sequence_token = self.importance_sampling_level == "sequence_token"
        self.importance_sampling_level = "token"
        self._loss_inputs = None
        # Which rows share a micro-batch must not change the gradient.
        self._regroups_rows = (
            args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) == 0
            and self.loss_type in (*ROW_MEAN_LOSSES, *TOKEN_SUM_LOSSES)
            and not self._entropy_bonus_enabled
            and self.top_entropy_quantile == 1.0
            and not self.aux_loss_enabled
            and self.pad_to_multiple_of is None
        )

        check_compatibility(
            student=self.model,
            student_processing_class=self.processing_class,
            student_stop_ids=self.eos_token_ids,
            teacher=teacher_model,
            teacher_processing_class=teacher_processing_class,
        )
        teacher_vocab_size = teacher_model.config.get_text_config().vocab_size
        student_vocab_size = self.model.config.get_text_config().vocab_size
        if student_vocab_size > teacher_vocab_size and not self.use_vllm:
            # The student's vocabulary is padded further than the teacher's; the rows beyond are no tokens.
            padding_ids = range(teacher_vocab_size, student_vocab_size)
            suppressed = {*(self.generation_config.suppress_tokens or ()), *padding_ids}
            self.generation_config.suppress_tokens = sorted(suppressed)
            self.generation_kwargs["suppress_tokens"] = sorted(suppressed)
        self.teacher = LocalTeacher(
            prepare_teacher(teacher_model, self.accelerator, args.teacher_offload),
            teacher_vocab_size,
            self._per_token_logps,
            offload_from=self.accelerator.device if args.teacher_offload else None,
        )

    def _per_token_logps(self, model: torch.nn.Module, rollout: dict[str, Any]) -> torch.Tensor:
        """Log-probs `(B, T)`, without gradient, of a rollout's completion tokens under a model with a fused head."""
        mode = "train" if self.model.training else "eval"
        logps, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
            torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1),
            rollout["completion_ids"].size(1),
            batch_size=(
                self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
            ),
            **{key: rollout[key] for key in MULTIMODAL_KEYS if key in rollout},
        )
        return logps

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rollout = super()._generate_and_score_completions(inputs)
        if rollout.get("num_images", 0) is None:
            raise ValueError(
                "A tool returned an image whose placeholder tokens were cut off at `max_completion_length` "
                f"({self.max_completion_length}), and TRL dropped all images of the batch from the forward pass. Raise "
                "`max_completion_length`, or have the tool return smaller images."
            )
        mask = self._valid_tokens(rollout)
        # Evaluation may sample at another temperature, and a pass more costs little there.
        uses_sampling_logps = self.args.use_sampling_logps and self.model.training
        if uses_sampling_logps and "sampling_per_token_logps" not in rollout:
            raise ValueError(
                "`use_sampling_logps` is True, but the sampler returned no log-probs. Have `rollout_func` return "
                "`logprobs`, or switch it off."
            )

        seconds = {}
        # The student keeps its training mode, as in TRL: its dropout is that of the loss.
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            with self._timer(seconds, "time/teacher_scoring"):
                teacher_logps = self.teacher.per_token_logps(rollout)
            if "old_per_token_logps" not in rollout and not uses_sampling_logps:
                with self._timer(seconds, "time/student_scoring"):
                    rollout["old_per_token_logps"] = self._per_token_logps(self.model, rollout)
                self._watch_sampling_logps(rollout, rollout["old_per_token_logps"])
        self._raise_if_not_finite("teacher", teacher_logps, mask, rollout)
        if uses_sampling_logps:
            student_logps = rollout["sampling_per_token_logps"]
            mask = mask & student_logps.isfinite()  # vLLM has no log-prob for some tokens
        else:
            student_logps = rollout["old_per_token_logps"]
            self._raise_if_not_finite("student", student_logps, mask, rollout)

        mode = "train" if self.model.training else "eval"
        scores = token_scores(teacher_logps, student_logps, mask)
        population = {
            "normalization": self.args.advantage_normalization,
            "num_generations": self.num_generations if mode == "train" else self.num_generations_eval,
            "gather": gather,
            "process_index": self.accelerator.process_index,
        }
        moments = None
        if uses_sampling_logps:  # the advantages below are then estimates for the logs; the loss makes its own
            moments = population_moments(clamp_scores(scores, mask, self.args.score_clip), mask, **population)
            rollout["teacher_per_token_logps"], rollout["score_moments"] = teacher_logps, moments
        advantages, undefined = compute_advantages(
            scores,
            mask,
            score_clip=self.args.score_clip,
            std_floor=self.args.std_floor,
            moments=moments,
            **population,
        )
        rollout["advantages"] = advantages

        is_eos = torch.isin(rollout["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
        statistics = score_statistics(
            scores, teacher_logps, student_logps, advantages, undefined, is_eos, mask, self.args.score_clip
        )
        self._log_teacher(mode, statistics, seconds, scores, advantages, mask)
        return rollout

    @staticmethod
    def _valid_tokens(rollout: dict[str, Any]) -> torch.Tensor:
        """`(B, T)` mask of the tokens that take part in the loss: no padding, no tool output, nothing vLLM dropped."""
        mask = rollout["completion_mask"].bool()
        if "tool_mask" in rollout:
            mask = mask & rollout["tool_mask"].bool()
        if "importance_sampling_ratio" in rollout:
            mask = mask & (rollout["importance_sampling_ratio"] != 0)
        return mask

    def _raise_if_not_finite(self, who: str, logps: torch.Tensor, mask: torch.Tensor, rollout: dict[str, Any]) -> None:
        wrong = ~logps.isfinite() & mask
        if not wrong.any():
            return
        row = wrong.any(-1).nonzero()[0].item()
        prompt = self._tokenizer.decode(rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()])
        raise ValueError(
            f"The {who} gave non-finite log-probs for {wrong.sum().item()} of {mask.sum().item()} tokens, in "
            f"{wrong.any(-1).sum().item()} of {len(mask)} completions on rank {self.accelerator.process_index} "
            f"(NaN: {(logps.isnan() & mask).sum().item()}, infinite: {(logps.isinf() & mask).sum().item()}). First "
            f"prompt: {prompt[-500:]!r}. Check the {who}'s weights and dtype (float16 overflows where bfloat16 does "
            "not)."
        )

    @contextmanager
    def _timer(self, seconds: dict[str, float], name: str):
        def now():
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize(self.accelerator.device)
            return time.perf_counter()

        start = now()
        yield
        seconds[name] = now() - start

    def _log_teacher(
        self,
        mode: str,
        statistics: torch.Tensor,
        seconds: dict[str, float],
        scores: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Put the teacher's signal into TRL's metrics and completions table, in place of what stands for rewards."""
        metrics = score_metrics(gather(statistics.unsqueeze(0)))
        times = gather(torch.tensor([list(seconds.values())], device=mask.device)).amax(0)  # the slowest rank
        metrics.update(zip(seconds, times.tolist(), strict=True))

        # One row for each completion of all ranks, in the order of TRL's own logs; NaN without any valid token.
        per_completion = torch.stack([scores, advantages], dim=-1).sum(1) / mask.sum(-1, keepdim=True)
        mean_scores, mean_advantages = gather(per_completion).unbind(-1)
        replace_last(self._logs["advantages"], mean_advantages.nan_to_num().tolist())
        column = self._logs["rewards"][teacher_score.__name__]
        if teacher_score not in self.reward_funcs:
            column.extend(mean_scores.tolist())
        else:
            replace_last(column, mean_scores.tolist())
            for name, value in self._reward_metrics(mode, mean_scores).items():
                self._metrics[mode][name][-1] = value
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _reward_metrics(self, mode: str, mean_scores: torch.Tensor) -> dict[str, float]:
        """What TRL logs about rewards, computed from the teacher's mean score per completion."""
        mean, std = mean_scores.nanmean().item(), nanstd(mean_scores).item()
        name = teacher_score.__name__
        metrics = {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
        if self.reward_funcs == [teacher_score]:
            num_generations = self.num_generations if mode == "train" else self.num_generations_eval
            group_stds = nanstd(mean_scores.view(-1, num_generations), dim=1)  # NaN for groups of one
            frac_zero_std = (group_stds[~group_stds.isnan()] < 1e-8).float().mean().item()
            metrics.update(zip(REWARD_METRICS, (mean, std, frac_zero_std), strict=True))
        return metrics

    # TRL generates once for `steps_per_generation * num_iterations` micro-batches. A checkpoint in between would resume
    # with other completions and out of step with the sampler, so the rest of the generation batch goes with it.
    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        step = self.state.global_step * self.args.gradient_accumulation_steps
        if step % (self.args.steps_per_generation * self.num_iterations) == 0 or self.args.save_only_model:
            return
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        os.makedirs(folder, exist_ok=True)
        torch.save({"step": step, "inputs": self._buffered_inputs}, self._buffer_file(folder))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.exists(self._buffer_file(checkpoint)):
            buffer = torch.load(self._buffer_file(checkpoint), map_location="cpu", weights_only=True)
            self._step = buffer["step"]
            self._buffered_inputs = send_to_device(buffer["inputs"], self.accelerator.device)

    def _buffer_file(self, folder: str) -> str:
        return os.path.join(folder, f"generation_buffer_{self.accelerator.process_index}.pt")

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self._regroups_rows or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regroup(self._buffered_inputs, gather)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model, inputs):
        self._loss_inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None
        return loss * inputs.get("row_share", 1.0) if self.loss_type in ROW_MEAN_LOSSES else loss

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch.update({key: value for key, value in multimodal.items() if value is not None})
        if batch_size is None:
            logps, entropies, aux_loss = self._score(model, batch, logits_to_keep, **options)
            if self._loss_inputs is not None:
                logps = self._adapt_loss_inputs(logps)
            return logps, entropies, aux_loss

        budget = self.args.scoring_token_budget
        num_groups = math.ceil(len(input_ids) / batch_size) if budget is None else None
        groups = group_by_length(attention_mask.sum(-1), num_groups=num_groups, token_budget=budget, gather=gather)
        parts = [self._score(model, select_rows(batch, rows), logits_to_keep, **options) for rows in groups]
        original_order = torch.tensor(sum(groups, [])).argsort()
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(logps)[original_order],
            torch.cat(entropies)[original_order] if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _score(self, model, batch: dict[str, Any], logits_to_keep: int, **options):
        """TRL's forward pass on rows without the padding between and before them; results are `(B, T)` as in TRL."""
        score = super()._get_per_token_logps_and_entropies
        attention_mask = batch["attention_mask"]
        if self.pad_to_multiple_of is not None:  # asked for padding, to compile few shapes
            return score(model, logits_to_keep=logits_to_keep, **batch, **options)
        rows = LeftAligned(attention_mask, logits_to_keep)
        for key in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & batch.keys():
            batch[key] = rows.align(batch[key])
        with real_tokens_in_lm_head(attention_mask.device):
            logps, entropies, aux_loss = score(model, logits_to_keep=rows.logits_to_keep, **batch, **options)
        return rows.restore(logps), entropies if entropies is None else rows.restore(entropies), aux_loss

    def _adapt_loss_inputs(self, logps: torch.Tensor) -> torch.Tensor:
        """What the loss reads after its forward pass, where that depends on the log-probs `(B, T)` of this pass."""
        inputs = self._loss_inputs
        if "teacher_per_token_logps" in inputs:
            mask = self._valid_tokens(inputs)
            self._raise_if_not_finite("student", logps, mask, inputs)
            self._watch_sampling_logps(inputs, logps.detach())
            inputs["advantages"], _ = compute_advantages(
                token_scores(inputs["teacher_per_token_logps"], logps, mask),
                mask,
                score_clip=self.args.score_clip,
                normalization=self.args.advantage_normalization,
                std_floor=self.args.std_floor,
                moments=inputs["score_moments"],
            )
        if self._is_sequence_token:
            mask = inputs["completion_mask"]
            if "tool_mask" in inputs:
                mask = mask * inputs["tool_mask"]
            old_logps = inputs.get("old_per_token_logps")
            old_logps = logps.detach() if old_logps is None else old_logps
            logps, inputs["old_per_token_logps"] = sequence_token_logps(logps, old_logps, mask)
        return logps


def check_images_are_read(trainer: GRPOTrainer) -> None:
    """Raise `ValueError` if the training data has images that the student's processing class would ignore."""
    image_columns = {"image", "images"} & set(getattr(trainer.train_dataset, "column_names", None) or ())
    if image_columns and not isinstance(trainer.processing_class, ProcessorMixin):
        raise ValueError(
            f"`train_dataset` has the column {image_columns.pop()!r}, but the student ({type(trainer.model).__name__}) "
            "has no processor for images, so they would be ignored. Train an image-text model, or remove the column."
        )


def keep_checkpoint_names(student: torch.nn.Module) -> None:
    """
    Make a student save its weights under the names that they were loaded from.

    Under ZeRO-3, transformers 5.23 remembers all renamings of weights that it might have needed to load a model, and
    undoes them when it saves: the text weights of image-text checkpoints then get names that only it can read.
    """
    student = student.get_base_model() if is_peft_model(student) else student
    if getattr(student, "_weight_conversions", None) is not None:
        student._weight_conversions = [change for change in student._weight_conversions if change.was_used()]


def replace_last(log: deque, values: list) -> None:
    """Overwrite the newest entries of one of TRL's logs, which may be too short to hold all of them."""
    for _ in range(min(len(log), len(values))):
        log.pop()
    log.extend(values)

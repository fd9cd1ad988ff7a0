"""A frozen model in this process as the teacher: loading, placement, scoring."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from os import PathLike, fspath
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, is_peft_model
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..grpo.data_checks import rows_with_images
from ..grpo.head_check import check_head
from ..grpo.hidden_states import HiddenStates, keep_top_k
from ..grpo.pictures import IMAGE_COLUMNS
from ..grpo.ranks import raised_on_all_ranks
from ..grpo.trl_hooks import (
    MULTIMODAL_KEYS,
    add_fused_lm_head,
    create_model_from_path,
    prepare_deepspeed,
    prepare_fsdp,
)
from .compatibility import ModelDescription, ProcessingClass, check_compatibility, describe, warn_on_text_prompts
from .offload import OffloadedWeights
from .teacher import ReadHiddenStates, Score, Teacher
from .weights import piece


# The student is scored at the sampling temperature, since that is the distribution it sampled from. The teacher is
# the target and is taken as it is.
TEACHER_TEMPERATURE = 1.0

# Weights, evenly spread over the layers, whose sum tells teachers apart.
NUM_SUMMED = 16


class LocalTeacher(Teacher):
    """
    A frozen model in this process that scores rollouts on the student's own token ids and images, at temperature 1.

    Args:
        model (`str`, `PathLike` or [`~transformers.PreTrainedModel`]):
            Path, model id or loaded model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids and images mean the same to both
            models. If `None`, it is loaded from where the model came from.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`. Unless they say otherwise, the teacher keeps the dtype of its checkpoint and
            takes the student's attention implementation.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the Hub.
        offload (`bool`, *optional*, defaults to `False`):
            Whether its weights live in CPU memory, and are on the device only while it scores.
        cast_lm_head_to_fp32 (`bool`, *optional*, defaults to `False`):
            Whether its LM head computes in float32.
        max_completion_length (`int`, *optional*):
            Length of the longest completions, for which it has to have positions. If `None`, they are counted when it
            scores.
        top_k (`int`, *optional*):
            Number of likeliest tokens, beside the sampled one, that are kept of its distribution at a position. `None`: all,
            as hidden states.

    Raises:
        `TypeError`: if it is neither a path nor a model.
        `ValueError`: if there is no such model, if loading options come with a loaded model, if it cannot score what the
            student samples.
    """

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel,
        processing_class: ProcessingClass | None = None,
        *,
        revision: str | None = None,
        init_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
        cast_lm_head_to_fp32: bool = False,
        max_completion_length: int | None = None,
        top_k: int | None = None,
    ):
        self.model = fspath(model) if isinstance(model, PathLike) else model
        if not isinstance(self.model, str) and not hasattr(self.model, "config"):
            raise TypeError(
                f"`teacher_model` is {str(model)[:200]!r} ({type(model).__name__}), but a teacher is a path, a model id, a loaded "
                "model or an instance of `Teacher`. Pass several as a dictionary of these, by name."
            )
        if not isinstance(self.model, str) and (init_kwargs is not None or revision is not None):
            field = "teacher_model_init_kwargs" if init_kwargs is not None else "teacher_model_revision"
            raise ValueError(
                f"`{field}` is set, but `teacher_model` is already loaded, so it would have no effect. Unset it, or pass "
                "the teacher as a path or model id."
            )
        self.init_kwargs = {"revision": revision, "trust_remote_code": trust_remote_code, **(init_kwargs or {})}
        if "torch_dtype" in self.init_kwargs:  # the name of earlier versions of transformers, which ignores it now
            self.init_kwargs.setdefault("dtype", self.init_kwargs.pop("torch_dtype"))
        self.is_blind = False  # a teacher of text, of a student that reads images
        self.offload = offload
        self.is_read_when_due = not offload
        self.cast_lm_head_to_fp32 = cast_lm_head_to_fp32
        self.top_k = top_k
        self.description = describe(
            "teacher_model",
            self.model,
            processing_class,
            revision=self.init_kwargs["revision"],
            trust_remote_code=self.init_kwargs["trust_remote_code"],
        )
        config = self.description.config.get_text_config()
        self.vocab_size = config.vocab_size
        self.context = getattr(config, "max_position_embeddings", None)
        # Rotary positions go on beyond those of the training, learned ones end.
        self.is_rotary = getattr(config, "rope_parameters", None) is not None
        if max_completion_length is not None:
            self._check_length(max_completion_length + 1, f"`max_completion_length` is {max_completion_length}")

    def check(self, student: ModelDescription) -> None:
        self.is_blind = isinstance(student.processing_class, ProcessorMixin) and not self.description.reads_images
        self.tokenizer = student.tokenizer  # for teachers made of this one, which decode the student's ids
        check_compatibility(student, self.description)

    def check_data(self, field: str, dataset: Any, has_prompt_fn: bool) -> None:
        if self.is_blind and isinstance(dataset, Dataset):
            for column in {*IMAGE_COLUMNS, "teacher_images"} & {*dataset.column_names}:
                has_images = rows_with_images(dataset, column)
                if has_images.any():
                    raise ValueError(
                        f"{has_images.sum()} of the {len(has_images)} rows of `{field}` that the teacher ({self.description.name}) "
                        f"is to score have images in the column `{column}`, but it is text-only and cannot score what the student "
                        "says about them. Choose an image-text teacher as `teacher_model`, or one for these rows (a dictionary "
                        "of teachers, and the column `teacher`)."
                    )
        if not has_prompt_fn:
            warn_on_text_prompts(field, dataset, self.description)

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        self.score = score
        if self.offload:
            self._check_offload(accelerator)
        if isinstance(self.model, str):
            self.model = self._load(student, accelerator)
        check_own_weights(student, self.model)
        check_head("teacher_model", self.model)
        self.model.requires_grad_(False)
        self.model.eval()
        add_fused_lm_head(
            self.model.get_base_model() if is_peft_model(self.model) else self.model,
            temperature=TEACHER_TEMPERATURE,
            cast_lm_head_to_fp32=self.cast_lm_head_to_fp32,
        )
        if self.offload:
            self.on_device = OffloadedWeights(self.model, accelerator.device).on_device
        else:
            self.model = place(self.model, accelerator)
            self.on_device = nullcontext

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """
        Log-probs of the sampled tokens, see [`Teacher`].

        Raises:
            `ValueError`: on all ranks, if a completion holds a token id that the teacher has no embedding for, or a row is
                longer than the positions that it has embeddings for.
        """
        rollout = self._as_text(rollout)
        self._check_rows(rollout)
        with self.on_device():
            return self.score(self.model, rollout)

    def may_not_know(self, rows: list[dict[str, Any]]) -> list[bool]:
        return [False] * len(rows)

    def hidden_states(self, rollout: dict[str, Any], read: ReadHiddenStates) -> HiddenStates:
        """See [`Teacher`]; raises `ValueError` as `per_token_logps` does for ids and positions that the teacher does not have."""
        rollout = self._as_text(rollout)
        self._check_rows(rollout)
        with self.on_device():
            states = read(self.model, rollout)
            return states if self.top_k is None else keep_top_k(states, rollout, self.top_k)

    def identity(self) -> str:
        """Its class, origin, and the sum of some of its weights."""
        parameters = list(self.model.parameters())
        some = parameters[:: max(1, len(parameters) // NUM_SUMMED)]
        total = sum(piece(parameter).detach().float().abs().sum().cpu() for parameter in some)
        total = gather(total.view(1).to(PartialState().device)).sum().item()
        known = "" if self.top_k is None else f", its likeliest {self.top_k} tokens"
        return f"{self.description.name} of {self.description.config._name_or_path!r} (weights: {total:.7g}){known}"

    def _as_text(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """The rollout without vision inputs, for a teacher of text; raises where a row has images and a completion."""
        if not self.is_blind:
            return rollout
        with raised_on_all_ranks():
            counts = rollout.get("num_images") or [0] * len(rollout["completion_mask"])
            for count, mask, row in zip(counts, rollout["completion_mask"], rollout["rows"], strict=False):
                if count and mask.any():
                    raise ValueError(
                        f"The teacher ({self.description.name}) is text-only, but is to score a row with images (prompt: "
                        f"{str(row.get('prompt'))[:200]!r}). Have an image-text teacher score such rows."
                    )
        rollout = {key: value for key, value in rollout.items() if key not in MULTIMODAL_KEYS}
        # Rows of others, which fill up a batch, may have placeholders that it has no embedding for.
        return {**rollout, "prompt_ids": rollout["prompt_ids"].clamp(max=self.vocab_size - 1)}

    def _check_rows(self, rollout: dict[str, Any]) -> None:
        longest = (rollout["prompt_mask"].sum(-1) + rollout["completion_mask"].sum(-1)).max()
        largest, longest = gather(torch.stack([rollout["completion_ids"].max(), longest])[None]).amax(0).tolist()
        self._check_length(longest, f"a row (prompt and completion) has {longest} tokens")
        if largest >= self.vocab_size:
            raise ValueError(
                f"The student sampled token id {largest}, but the teacher has embeddings for {self.vocab_size} ids "
                "only. Such ids are padding of the student's vocabulary; keep the sampler from drawing them "
                "(`generation_kwargs`, e.g. `suppress_tokens` or vLLM's `allowed_token_ids`)."
            )

    def _check_length(self, length: int, what: str) -> None:
        if self.context is None or length <= self.context:
            return
        text = (
            f"The teacher has a context of {self.context} tokens (`max_position_embeddings`), but {what}. Lower "
            "`max_completion_length`, leave long prompts out, or choose a teacher with a longer context"
        )
        if not self.is_rotary:
            raise ValueError(f"{text}.")
        warnings.warn(f"{text}; what it says beyond its context may mean nothing.", stacklevel=3)
        self.context = None  # said once

    def _load(self, student: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
        init_kwargs = dict(self.init_kwargs)
        # Weights that are never updated gain nothing from TRL's default of float32.
        init_kwargs.setdefault("dtype", "auto")
        init_kwargs.setdefault("attn_implementation", student.config._attn_implementation)
        # Sharding needs device_map=None ("auto" fails), and offloaded weights have to stay on the CPU.
        if self.offload or accelerator.distributed_type in ["MULTI_GPU", "DEEPSPEED", "FSDP"]:
            init_kwargs["device_map"] = None
        if accelerator.distributed_type == "DEEPSPEED":
            # ZeRO-3 shards while it loads, and counts one process until DeepSpeed has been told of the others: a
            # student that is not loaded that way (a quantized one) has not done so.
            import deepspeed

            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
        return create_model_from_path(self.model, **init_kwargs)

    def _check_offload(self, accelerator: Accelerator) -> None:
        plugin = accelerator.state.deepspeed_plugin
        is_quantized = (
            "quantization_config" in self.init_kwargs
            or getattr(self.description.config, "quantization_config", None) is not None
        )
        remedy = None
        if plugin is not None and plugin.zero_stage == 3:
            remedy = "ZeRO-3 shards it and has an offloading of its own: set `offload_param_device: cpu` there"
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            remedy = "FSDP shards it and has an offloading of its own: set `fsdp_offload_params: true` there"
        elif is_quantized:
            remedy = "it is quantized, and quantized weights cannot be moved so: keep it on the device"
        if remedy is not None:
            raise ValueError(
                f"`teacher_offload` is True, but the teacher cannot be offloaded: {remedy}, and unset it here."
            )


def check_own_weights(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Raise `ValueError` if a parameter of the teacher is one of the student's."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in names]
    if shared:
        raise ValueError(
            f"`teacher_model` shares {len(shared)} parameters with `model` ({shared[0]!r} is the first), so the teacher "
            "would be trained with the student, or be scored through its adapters. Load the teacher separately: pass "
            "its path or model id, or the result of another `from_pretrained`."
        )


def place(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """The model as TRL places a reference model: sharded under ZeRO-3 and FSDP, else whole on every device."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        with zero3_buckets(plugin.deepspeed_config["zero_optimization"], model.config):
            return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def zero3_buckets(zero_optimization: dict[str, Any], config: PreTrainedConfig) -> Iterator[None]:
    """
    Fill in ZeRO-3's bucket sizes for a model where they are unset or `"auto"`, for as long as the context lasts.

    transformers derives them from the student's hidden size, too late for the teacher; TRL derives a reference model's
    from a top-level `hidden_size`, which image-text configurations do not have. The sizes are those of transformers.
    """
    before = dict(zero_optimization)
    hidden_size = config.get_text_config().hidden_size
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    if zero_optimization["stage"] == 3:
        unset = {name: size for name, size in sizes.items() if zero_optimization.get(name, "auto") == "auto"}
        zero_optimization.update(unset)
    try:
        yield
    finally:
        zero_optimization.clear()
        zero_optimization.update(before)

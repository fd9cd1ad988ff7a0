"""The teacher: where it comes from, how it is placed, and what it is asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .config import GNDPOConfig
from .trl_hooks import (
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    prepare_deepspeed,
    prepare_fsdp,
)


# The student is scored at the sampling temperature, since that is the distribution it sampled from. The teacher is
# the target and is taken as it is.
TEACHER_TEMPERATURE = 1.0


def load_teacher(
    teacher_model: str | PreTrainedModel | None,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: GNDPOConfig,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin | None]:
    """
    Load the teacher and the processing class that belongs to it.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or `None`): Path, model id or loaded model. If `None`,
            `args.teacher_model_name_or_path` is loaded.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`] or `None`):
            If `None`, it is loaded from where the model came from.
        args ([`GNDPOConfig`]): Configuration with the `teacher_model_*` fields.

    Returns:
        The frozen teacher, and its processing class, or `None` if the model was passed as an object that does not say
        where it came from.

    Raises:
        `ValueError`: if no teacher is given, if it is given twice, or if loading options come with a loaded model.
    """
    if teacher_model is None and args.teacher_model_name_or_path is None:
        raise ValueError(
            "No teacher. Pass `teacher_model` (a path, a model id or a loaded model) to the trainer, or set "
            "`teacher_model_name_or_path` in the configuration."
        )
    if teacher_model is not None and args.teacher_model_name_or_path is not None:
        raise ValueError(
            f"The teacher is given twice: `teacher_model` was passed to the trainer and `teacher_model_name_or_path` "
            f"is {args.teacher_model_name_or_path!r}. Keep one of them."
        )
    if teacher_model is None:
        teacher_model = args.teacher_model_name_or_path
    revision = args.teacher_model_revision
    if isinstance(teacher_model, str):
        model_id = teacher_model
        init_kwargs = dict(args.teacher_model_init_kwargs or {})
        # Weights that are never updated gain nothing from TRL's default of float32.
        init_kwargs.setdefault("dtype", "auto")
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        if revision is not None:
            init_kwargs.setdefault("revision", revision)
        # Distributed training requires device_map=None ("auto" fails)
        if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED", "FSDP"]:
            init_kwargs["device_map"] = None
        teacher_model = create_model_from_path(model_id, **init_kwargs)
        revision = init_kwargs.get("revision")
    elif args.teacher_model_init_kwargs is not None or revision is not None:
        field = "teacher_model_init_kwargs" if args.teacher_model_init_kwargs is not None else "teacher_model_revision"
        raise ValueError(
            f"`{field}` is set, but `teacher_model` is already loaded, so it would have no effect. Unset it, or pass "
            "the teacher as a path or model id."
        )
    else:
        model_id = get_config_model_id(teacher_model.config)

    if teacher_processing_class is None and model_id:
        teacher_processing_class = AutoProcessor.from_pretrained(
            model_id, revision=revision, trust_remote_code=args.trust_remote_code
        )
    teacher_model.requires_grad_(False)
    teacher_model.eval()
    return teacher_model, teacher_processing_class


def prepare_teacher(teacher_model: PreTrainedModel, accelerator: Accelerator, offload: bool) -> torch.nn.Module:
    """
    Place the teacher as TRL places a reference model: sharded under ZeRO-3 and FSDP, else whole on every device.

    The fused LM head goes on first, as it must before any wrapping, so that no `(B, T, V)` logits ever exist.

    Args:
        teacher_model ([`~transformers.PreTrainedModel`]): Teacher as returned by [`load_teacher`].
        accelerator ([`~accelerate.Accelerator`]): Accelerator of the trainer.
        offload (`bool`): Whether its weights live in CPU memory, see [`on_device`].

    Raises:
        `ValueError`: if it cannot be offloaded this way.
    """
    if offload:
        check_offload(teacher_model, accelerator)
    add_fused_lm_head(
        teacher_model.get_base_model() if is_peft_model(teacher_model) else teacher_model,
        temperature=TEACHER_TEMPERATURE,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        with zero3_buckets(plugin.deepspeed_config["zero_optimization"], teacher_model.config):
            return prepare_deepspeed(teacher_model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(teacher_model, accelerator)
    return accelerator.prepare_model(teacher_model, evaluation_mode=True)


def check_offload(teacher_model: PreTrainedModel, accelerator: Accelerator) -> None:
    plugin = accelerator.state.deepspeed_plugin
    remedy = None
    if plugin is not None and plugin.zero_stage == 3:
        remedy = "ZeRO-3 shards it and has an offloading of its own: set `offload_param_device: cpu` there"
    elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
        remedy = "FSDP shards it and has an offloading of its own: set `fsdp_offload_params: true` there"
    elif getattr(teacher_model, "is_quantized", False):
        remedy = "it is quantized, and quantized weights cannot be moved so: keep it on the device"
    if remedy is not None:
        raise ValueError(
            f"`teacher_offload` is True, but the teacher cannot be offloaded: {remedy}, and unset it here."
        )


def move_to_cpu(model: torch.nn.Module, pin_memory: bool) -> None:
    """Move the weights to CPU memory, pinned if they are to be copied from there to a CUDA device."""
    for tensor in (*model.parameters(), *model.buffers()):
        cpu = tensor.data.cpu()
        tensor.data = cpu.pin_memory() if pin_memory else cpu


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """
    Weights of a frozen model on `device` for as long as the context lasts.

    From pinned memory the copies are asynchronous: the first layers compute while the last ones are copied. Nothing is
    copied back, since frozen weights do not change.
    """
    tensors = (*model.parameters(), *model.buffers())
    on_cpu = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, on_cpu, strict=True):
            tensor.data = data


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


class LocalTeacher:
    """
    A frozen model in this process that scores rollouts on the student's own token ids and images.

    Any object with this `per_token_logps` can be the trainer's teacher; the trainer knows nothing else about it.

    Args:
        model (`torch.nn.Module`): Teacher as returned by [`prepare_teacher`].
        vocab_size (`int`): Number of token ids that the model has embeddings for, padding of the vocabulary included.
        score (`Callable`): `score(model, rollout)` gives `(B, T)` log-probs of the completion tokens, without
            gradient.
        offload_from (`torch.device`, *optional*): Device that the weights are on only while the teacher scores; between
            times they are in CPU memory. If `None`, they stay where they are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vocab_size: int,
        score: Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor],
        offload_from: torch.device | None = None,
    ):
        self.model = model
        self.vocab_size = vocab_size
        self.score = score
        self.offload_from = offload_from
        if offload_from is not None:
            move_to_cpu(model, pin_memory=offload_from.type == "cuda")

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """
        Log-probs of the sampled tokens.

        Args:
            rollout (`dict`): Batch as `GRPOTrainer` builds it: `prompt_ids`, `prompt_mask` (`(B, P)`),
                `completion_ids`, `completion_mask` (`(B, T)`) and the vision inputs of the model family.

        Returns:
            `torch.Tensor` of shape `(B, T)`: log-probs in nats, at temperature 1; anything on masked positions.

        Raises:
            `ValueError`: if a completion holds a token id that the teacher has no embedding for.
        """
        largest = rollout["completion_ids"].max().item()
        if largest >= self.vocab_size:
            raise ValueError(
                f"The student sampled token id {largest}, but the teacher has embeddings for {self.vocab_size} ids "
                "only. Such ids are padding of the student's vocabulary; keep the sampler from drawing them "
                "(`generation_kwargs`, e.g. `suppress_tokens` or vLLM's `allowed_token_ids`)."
            )
        if self.offload_from is None:
            return self.score(self.model, rollout)
        with on_device(self.model, self.offload_from):
            return self.score(self.model, rollout)

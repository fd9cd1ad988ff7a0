"""How the student samples: from the distribution that is scored, and in evaluation at a temperature of its own."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from .modes import evaluating
from .routers import quiet_routers


logger = get_logger(__name__)

# What a checkpoint's `generation_config.json` may say while rollouts are sampled: how it is computed, and which tokens are
# special. Everything else in there shapes the samples.
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "max_length"),
    *("_from_model_config", "transformers_version"),
}

# Options of transformers and of vLLM that sample from another distribution than the student's, and the values at which they
# do not.
PLAIN = {
    "do_sample": (True,),
    "num_beams": (1,),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "top_h": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "bad_words_ids": ([],),
    "bad_words": ([],),
    "sequence_bias": ({},),
    "logit_bias": ({},),
    "allowed_token_ids": (),
}

# Options of transformers and of vLLM that sample several completions where TRL counts on one.
SEVERAL = ("num_return_sequences", "n")

# Where configurations and processors have the ids that stand for what is not text.
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")

# Bias of a logit, in nats, that vLLM takes at most: of tokens that are not to be sampled.
NEVER = -100.0


class SamplingMixin:
    """
    Makes a [`~trl.GRPOTrainer`] sample from the distribution that it scores, and at `args.eval_temperature` while it
    evaluates, with transformers and with vLLM.

    - TRL samples in training mode, from another distribution at every forward pass where there is dropout, and its
      continuous batching leaves the model in training mode whatever mode it was in. Here the mode is restored.
    - What the checkpoint's own generation config says beside TRL's options (`no_repeat_ngram_size`, `bad_words_ids`,
      `min_p`, …) would stay on in transformers' generation. It is left out while completions are sampled, and named in the
      log; whoever wants it sets `generation_kwargs`. What is saved with the model keeps it.
    - Placeholders of images and videos, which nothing would belong to, are sampled by neither transformers nor vLLM.
      `suppress_tokens` in `generation_kwargs` adds to them, for both.

    Raises:
        `ValueError`: at construction, if `eval_temperature` is set and a `rollout_func` samples in the trainer's place.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        temperature = getattr(self.args, "eval_temperature", None)
        if temperature is not None and self.rollout_func is not None:
            raise ValueError(
                f"`eval_temperature` is {temperature}, but `rollout_func` does the sampling, so it would have no "
                "effect. Unset it, and let `rollout_func` choose its temperature by `trainer.model.training`."
            )
        if isinstance(self.processing_class, ProcessorMixin):
            suppress_tokens(self, placeholder_ids(self.model.config, self.processing_class))
        elif self.use_vllm and "suppress_tokens" in self.vllm_generation.generation_kwargs:
            suppress_tokens(self, [])
        if self.use_vllm:
            return
        left_out = leftovers(generation_owner(self.model).generation_config, self.generation_config)
        if left_out and self.rollout_func is None:
            options = ", ".join(f"{name}={value!r}" for name, value in left_out.items())
            logger.warning(
                f"The student's generation config has {options}, which is left out: completions are sampled from the "
                "distribution that is scored. Set `generation_kwargs` to have it all the same."
            )

    def _generate_single_turn(self, *args, **kwargs):
        temperature = getattr(self.args, "eval_temperature", None)
        training = self.model.training
        with evaluating(self.model), quiet_routers(self.model), self._without_leftovers():
            if temperature is None or training:
                return super()._generate_single_turn(*args, **kwargs)
            owner, name = (self.vllm_generation, "generation_kwargs") if self.use_vllm else (self, "generation_config")
            training_options = getattr(owner, name)
            if self.use_vllm:  # these win over vLLM's other options; 0 is greedy there
                eval_options = {**training_options, "temperature": temperature}
            else:
                eval_options = copy.deepcopy(training_options)
                if temperature > 0:
                    eval_options.update(temperature=temperature)
                else:
                    # Neutral values, not None: the model's own generation config would fill that with its own.
                    eval_options.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, min_p=None)
            setattr(owner, name, eval_options)
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                setattr(owner, name, training_options)

    @contextmanager
    def _without_leftovers(self) -> Iterator[None]:
        if self.use_vllm:  # every request says what it wants
            yield
            return
        owner = generation_owner(self.accelerator.unwrap_model(self.model))
        own = owner.generation_config
        owner.generation_config = copy.deepcopy(own)
        for name in leftovers(own, self.generation_config):
            setattr(owner.generation_config, name, None)
        try:
            yield
        finally:
            owner.generation_config = own


def generation_owner(model: Any) -> Any:
    """The model whose generation config fills what a call of `generate` leaves open."""
    return model.get_base_model() if is_peft_model(model) else model


def leftovers(own: GenerationConfig, asked: GenerationConfig) -> dict[str, Any]:
    """
    Options of a model's generation config that would shape its samples though nobody asked for them.

    Args:
        own ([`~transformers.GenerationConfig`]): The model's.
        asked ([`~transformers.GenerationConfig`]): The one that `generate` is called with, whose values win.
    """
    defaults = own._get_default_generation_params()
    return {
        name: value
        for name, value in vars(own).items()
        if name in vars(asked)
        and name not in HARMLESS
        and getattr(asked, name) is None
        and value not in (None, False, defaults.get(name))
    }


def shaping_options(args: GRPOConfig) -> dict[str, Any]:
    """What in a configuration makes the student sample from another distribution than the one that is scored."""
    options = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    options |= args.generation_kwargs or {}  # these win
    plain = {**PLAIN, "temperature": (args.temperature,)}
    return {
        name: value
        for name, value in options.items()
        if name in plain and value is not None and value not in plain[name]
    }


def placeholder_ids(*owners: Any) -> set[int]:
    """Ids that stand for what is no text, as a configuration or a processor has them."""
    found = (getattr(owner, name, None) for name in PLACEHOLDERS for owner in owners)
    return {id for id in found if isinstance(id, int)}


def several_problems(args: GRPOConfig) -> Iterator[str]:
    """Options under which the sampler returns more completions than there are prompts."""
    for name in SEVERAL:
        number = (args.generation_kwargs or {}).get(name)
        if number not in (None, 1):
            yield (
                f"`generation_kwargs` has `{name}` = {number!r}, but the sampler is given each prompt as often as it is to answer "
                "it. Set `num_generations` instead."
            )


def suppress_tokens(trainer: GRPOTrainer, ids: Iterable[int]) -> None:
    """
    Keep the trainer's sampler from these token ids, beside those that it is kept from already.

    vLLM knows no such option, but biases. What the student gives these tokens is shared by the others then, whose log-probs
    vLLM reports as larger by that much; the training engine's are those of the student.
    """
    if trainer.use_vllm:
        asked = dict(trainer.vllm_generation.generation_kwargs)
        biases = {int(id): bias for id, bias in (asked.pop("logit_bias", None) or {}).items()}
        suppressed = {*(asked.pop("suppress_tokens", None) or ()), *ids}
        biases |= dict.fromkeys(sorted(suppressed), NEVER)
        trainer.vllm_generation.generation_kwargs = {**asked, "logit_bias": biases} if biases else asked
        return
    suppressed = sorted({*(trainer.generation_config.suppress_tokens or ()), *ids})
    trainer.generation_config.suppress_tokens = suppressed
    trainer.generation_kwargs["suppress_tokens"] = suppressed


def stop_at(trainer: GRPOTrainer, ids: set[int]) -> None:
    """
    Have sampling end at these token ids, too, with transformers and with vLLM: they end a completion for all masks and metrics,
    and for whoever loads what is saved.
    """
    if not ids:
        return
    before, added = trainer.eos_token_ids, sorted(ids - set(trainer.eos_token_ids))
    # A list each: transformers would save what TRL changes.
    trainer.eos_token_ids = [*before, *added]
    generation_owner(trainer.model).generation_config.eos_token_id = [*before, *added]
    if trainer.use_vllm:
        asked = trainer.vllm_generation.generation_kwargs
        stops = sorted({*(asked.get("stop_token_ids") or ()), *added})
        trainer.vllm_generation.generation_kwargs = {**asked, "stop_token_ids": stops}
    else:
        trainer.generation_config.eos_token_id = [*before, *added]
        trainer.generation_kwargs["eos_token_id"] = [*before, *added]

    def named(ids: list[int]) -> str:
        return ", ".join(f"{id} ({trainer._tokenizer.convert_ids_to_tokens(id)!r})" for id in ids)

    logger.warning(
        f"The teacher ends its turn with {named(added)}, where sampling from the student went on (it stopped at "
        f"{named(before)}). It stops there now, too, and so will the student that is saved; `stop_at_teacher_eos: false` has "
        "it sample on."
    )

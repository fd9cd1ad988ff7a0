"""How the student samples: without dropout, and in evaluation at a temperature of its own."""

import copy
from collections.abc import Iterable

from trl import GRPOTrainer

from .modes import evaluating


class SamplingMixin:
    """
    Makes a [`~trl.GRPOTrainer`] sample without dropout, and at `args.eval_temperature` while it evaluates, with
    transformers and with vLLM.

    TRL samples in training mode, from another distribution at every forward pass where there is dropout, and its
    continuous batching leaves the model in training mode whatever mode it was in. Here the mode is restored.

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

    def _generate_single_turn(self, *args, **kwargs):
        temperature = getattr(self.args, "eval_temperature", None)
        training = self.model.training
        with evaluating(self.model):
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


def suppress_tokens(trainer: GRPOTrainer, ids: Iterable[int]) -> None:
    """Keep transformers' generation from sampling these token ids, beside those that it is kept from already."""
    suppressed = sorted({*(trainer.generation_config.suppress_tokens or ()), *ids})
    trainer.generation_config.suppress_tokens = suppressed
    trainer.generation_kwargs["suppress_tokens"] = suppressed

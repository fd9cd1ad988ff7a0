"""Validation at a temperature of its own: `eval_temperature`, for every trainer that samples as `GRPOTrainer` does."""

import copy
from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class EvalTemperatureConfig(GRPOConfig):
    r"""
    [`~trl.GRPOConfig`] with a temperature for evaluation.

    Parameters:
        eval_temperature (`float`, *optional*):
            Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is greedy
            decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at `temperature`
            all the same, so `eval_reverse_kl` then estimates no divergence.
    """

    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is "
            "greedy decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at "
            "`temperature` all the same, so `eval_reverse_kl` then estimates no divergence."
        },
    )

    def __post_init__(self):
        if self.eval_temperature is not None and not 0 <= self.eval_temperature < float("inf"):
            raise ValueError(
                f"`eval_temperature` is {self.eval_temperature}. Use 0.0 for greedy decoding, a positive number for "
                "sampling, or None for the training temperature."
            )
        if self.eval_temperature == 0:
            if self.num_generations_eval not in (None, 1):
                raise ValueError(
                    f"`num_generations_eval` is {self.num_generations_eval}, but with `eval_temperature=0.0` all "
                    "completions of a prompt are the same. Set `num_generations_eval: 1`, or a positive "
                    "`eval_temperature`."
                )
            self.num_generations_eval = 1
        super().__post_init__()


class EvalTemperatureMixin:
    """
    Makes a [`~trl.GRPOTrainer`] sample at `args.eval_temperature` while it evaluates, with transformers and with vLLM.

    Raises:
        `ValueError`: at construction, if a `rollout_func` samples in the trainer's place.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.eval_temperature is not None and self.rollout_func is not None:
            raise ValueError(
                f"`eval_temperature` is {self.args.eval_temperature}, but `rollout_func` does the sampling, so it would "
                "have no effect. Unset it, and let `rollout_func` choose its temperature by `trainer.model.training`."
            )

    def _generate_single_turn(self, *args, **kwargs):
        temperature = self.args.eval_temperature
        if temperature is None or self.model.training:
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
            self.model.eval()  # continuous batching leaves it in training mode, in the middle of an evaluation

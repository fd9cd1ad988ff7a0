"""Options that every trainer of this package adds to `GRPOConfig`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from transformers.trainer_pt_utils import AcceleratorConfig

from .config_checks import (
    as_if_typed,
    choice_problems,
    lead_problems,
    make_plain,
    number_problems,
    raise_problems,
    type_problems,
)
from .config_conflicts import conflicts, foreign_words
from .credentials import credential_problems
from .evaluation_logs import GREATER_IS_BETTER, LESS_IS_BETTER, best_model_problems, is_greater_better
from .launch import check_ddp_backend, check_launch
from .sampling import several_problems
from .vllm import VLLMConfig


@dataclass
class ExtendedGRPOConfig(VLLMConfig):
    r"""
    [`~trl.GRPOConfig`] with a temperature for evaluation, a token budget for scoring and shared prompts.

    Mistakes in how the run is launched are refused here, before any model is loaded. `greater_is_better` follows from
    `metric_for_best_model`; where it does not, and where the best model would be chosen by the loss, both are asked for.

    Parameters:
        eval_temperature (`float`, *optional*):
            Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is greedy
            decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at `temperature`
            all the same, so `eval_reverse_kl` then estimates no divergence.
        scoring_token_budget (`int`, *optional*):
            Most tokens, padding included, in a forward pass that scores completions (of the teacher, the student and
            the reference model). Completions of similar length share a forward pass; one that is longer than the
            budget gets its own. If `None`, as many forward passes are made as there are micro-batches in the loss, of
            the same size.
        share_prompts (`bool`, *optional*):
            Whether a forward pass computes a prompt, with its images, once for all of its completions. `None` does so
            where the model is found to compute the same and at least a quarter of the tokens is saved; the log names the
            models that keep separate rows, and why. `True` raises an error instead. `False` keeps separate rows.
        mask_repeating_completions (`bool`, *optional*, defaults to `False`):
            Whether completions that end in a loop, of at most 64 tokens at least four times, are left out of the loss and of
            all statistics. `completions/repeating_ratio` counts them in any case.
        log_completions_steps (`int`, *optional*):
            Number of optimizer steps between two logs of completions, with `log_completions`: in the terminal, in files
            and in wandb. The first log at or after each multiple of it has them. `None` spreads 100 over the run; 1 logs
            them with every log. The very first log and the last step have them in any case.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Steps in a row whose loss or gradient is not finite, after which the run ends with a checkpoint. Such a step
            changes no weight.
        fetch_image_urls (`bool`, *optional*, defaults to `False`):
            Whether images that the data give as http(s) URLs are fetched, by every rank in every step that has them, for
            30 seconds and 32 MiB at most. By default they are refused.
        sampling_lead (`int`, *optional*, defaults to `0`):
            Generation batches that are sampled ahead while the student learns, with `vllm_mode="server"` or a `rollout_func`
            that has the attribute `samples_ahead = True`. At 1 sampling and learning go on at the same time, and a batch is
            sampled with the weights of one optimizer step ago. More go with `estimator="exact"`.
    """

    # Types that values may have beside those of their fields.
    _also_of: ClassVar[dict[str, tuple[type, ...]]] = {
        "accelerator_config": (AcceleratorConfig,),
        "debug": (type(None),),
        "fsdp": (bool, list),
        "resume_from_checkpoint": (bool,),
    }
    _less_is_better: ClassVar[tuple[str, ...]] = LESS_IS_BETTER
    _greater_is_better: ClassVar[tuple[str, ...]] = GREATER_IS_BETTER

    eval_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature for sampling during evaluation. `None` uses `temperature`, as TRL does. `0.0` is "
            "greedy decoding, with one completion per prompt (`num_generations_eval=1`). Log-probs are computed at "
            "`temperature` all the same, so `eval_reverse_kl` then estimates no divergence."
        },
    )
    scoring_token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, padding included, in a forward pass that scores completions (of the teacher, the "
            "student and the reference model). Completions of similar length share a forward pass; one that is longer "
            "than the budget gets its own. If `None`, as many forward passes are made as there are micro-batches in "
            "the loss, of the same size."
        },
    )
    share_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a forward pass computes a prompt, with its images, once for all of its completions. `None` "
            "does so where the model is found to compute the same and at least a quarter of the tokens is saved; the log "
            "names the models that keep separate rows, and why. `True` raises an error instead. `False` keeps separate "
            "rows."
        },
    )
    mask_repeating_completions: bool = field(
        default=False,
        metadata={
            "help": "Whether completions that end in a loop, of at most 64 tokens at least four times, are left out of the loss "
            "and of all statistics. `completions/repeating_ratio` counts them in any case."
        },
    )
    log_completions_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of optimizer steps between two logs of completions, with `log_completions`: in the terminal, "
            "in files and in wandb. The first log at or after each multiple of it has them. `None` spreads 100 over the "
            "run; 1 logs them with every log. The very first log and the last step have them in any case."
        },
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={
            "help": "Steps in a row whose loss or gradient is not finite, after which the run ends with a checkpoint. Such a "
            "step changes no weight."
        },
    )
    fetch_image_urls: bool = field(
        default=False,
        metadata={
            "help": "Whether images that the data give as http(s) URLs are fetched, by every rank in every step that has "
            "them, for 30 seconds and 32 MiB at most. By default they are refused."
        },
    )
    sampling_lead: int = field(
        default=0,
        metadata={
            "help": 'Generation batches that are sampled ahead while the student learns, with `vllm_mode="server"` or a '
            "`rollout_func` that has the attribute `samples_ahead = True`. At 1 sampling and learning go on at the same time, "
            'and a batch is sampled with the weights of one optimizer step ago. More go with `estimator="exact"`.'
        },
    )

    def __post_init__(self):
        make_plain(self)
        mistyped = type_problems(self)
        if mistyped:
            # Nothing can be compared with them; what else is wrong is found with their defaults in their places.
            others = as_if_typed(self, mistyped)._problems()
            raise_problems(
                [*mistyped.values(), *(text for text in others if not any(f"`{name}`" in text for name in mistyped))]
            )
        if self.eval_temperature == 0 and self.num_generations_eval is None:
            self.num_generations_eval = 1
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = is_greater_better(self)
        check_ddp_backend(self)
        with foreign_words(self):
            super().__post_init__()
        raise_problems(self._late_problems())
        check_launch(self)

    def _problems(self) -> Iterator[str]:
        yield from number_problems(self)
        yield from choice_problems(self)
        yield from conflicts(self)
        yield from best_model_problems(self)
        yield from super()._problems()
        if self.eval_temperature is not None and not 0 <= self.eval_temperature < float("inf"):
            yield (
                f"`eval_temperature` is {self.eval_temperature}. Use 0.0 for greedy decoding, a positive number for "
                "sampling, or None for the training temperature."
            )
        if self.eval_temperature == 0 and self.num_generations_eval not in (None, 1):
            yield (
                f"`num_generations_eval` is {self.num_generations_eval}, but with `eval_temperature=0.0` all "
                "completions of a prompt are the same. Set `num_generations_eval: 1`, or a positive "
                "`eval_temperature`."
            )

    def _late_problems(self) -> Iterator[str]:
        """What is wrong once TRL has read the arguments that are given as JSON, and worked out a generation batch."""
        yield from credential_problems(self)
        yield from several_problems(self)
        yield from lead_problems(self)

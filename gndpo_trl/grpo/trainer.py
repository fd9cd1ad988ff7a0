"""`GRPOTrainer` with everything that this folder adds to it."""

import inspect
import warnings
from typing import Any

import torch
from accelerate.utils import gather
from datasets import IterableDataset
from trl import GRPOTrainer

from .checkpoints import CheckpointMixin
from .completion_tables import CompletionTablesMixin
from .data_checks import check_datasets, check_images_are_read
from .evaluation_logs import EvaluationLogsMixin, check_best_metric
from .finite_steps import FiniteStepsMixin
from .head_check import check_head
from .learned_prompts import check_learned_prompts
from .loops import LoopsMixin
from .lost_ranks import lost_ranks_are_named
from .mixed_rows import MixedRowsMixin, may_have_pictures, with_same_columns
from .ranks import RewardsTogetherMixin, raised_on_all_ranks
from .real_tokens import RealTokensMixin
from .routers import check_routers
from .row_checks import RowsSeen, check_length, open_rows, positions_of
from .sampling import SamplingMixin
from .sampling_lead import SamplingLeadMixin
from .saved_names import SavedNamesMixin
from .step_progress import StepProgressMixin
from .trained_weights import check_adapter, check_trains
from .vllm import VLLMMixin


class ExtendedGRPOTrainer(
    SamplingMixin,
    LoopsMixin,
    MixedRowsMixin,
    StepProgressMixin,
    RealTokensMixin,
    SamplingLeadMixin,
    VLLMMixin,
    FiniteStepsMixin,
    CompletionTablesMixin,
    RewardsTogetherMixin,
    CheckpointMixin,
    SavedNamesMixin,
    GRPOTrainer,
    EvaluationLogsMixin,
):
    """
    What [`GNDPOTrainer`] and [`GSPOTrainer`] stand on: [`~trl.GRPOTrainer`] that looks at its data before it loads a
    model, pays for real tokens, counts completions that end in a loop, samples with vLLM from the prompts that it scores, ahead
    of the batch in use where it is asked to, goes on exactly from its checkpoints, keeps NaN out of its weights, validates at a
    temperature of its own, names ranks that are gone, says what it is doing in steps that take long, and
    logs completions with images to wandb.
    """

    def __init__(self, *args, **kwargs):
        named = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        check_learned_prompts(named.get("args"), named.get("model"), named.get("peft_config"))
        brings_columns = any(named.get(name) is not None for name in ("environment_factory", "rollout_func"))
        seen = RowsSeen()
        datasets = [named.get(name) for name in ("train_dataset", "eval_dataset")]
        if named.get("args") is not None:
            seen = check_datasets(named["args"], *datasets, named.get("reward_funcs"), brings_columns)
            check_best_metric(named["args"], named.get("eval_dataset"))
            check_adapter(named["args"], named["model"])
        if named.get("processing_class") is not None:
            pad_on_the_left(named["processing_class"])
            check_images_are_read(named["processing_class"], *datasets)
        super().__init__(*args, **kwargs)
        check_trains(self.model)
        check_routers(self.model, self.aux_loss_enabled)
        check_head("model", self.model)
        check_images_are_read(self.processing_class, *datasets)
        seen.check_against(self.processing_class, self.chat_template)
        self._positions = positions_of(self.model.config)
        for num_bytes, where, prompt in seen.longest:
            # A token has at least a byte, and few templates are longer than the prompts that get near the limit.
            if self._positions is not None and 2 * num_bytes > self._positions:
                (prompt_ids, *_), *_ = self._tokenize_prompts([prompt])
                check_length(where, len(prompt_ids), self._positions)
        self._has_whole_prompts = not brings_columns
        others = self.tools or self.environment_factories is not None  # which may bring some
        if self._is_vlm and (may_have_pictures(*datasets) or seen.with_pictures is not None or others):
            self._see_pictures()

    def train(self, *args, **kwargs):
        with lost_ranks_are_named():
            output = super().train(*args, **kwargs)
        if self.state.global_step == 0 and isinstance(self.train_dataset, IterableDataset):
            needed = self.args.generation_batch_size // self.args.num_generations
            raise ValueError(
                f"`train_dataset` ended before a single step was made: a generation batch takes {needed} prompts. Give "
                "more, or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
            )
        return output

    def _generate_and_score_completions(self, inputs):
        # In place, so that whoever called this goes on with the same pictures.
        inputs[:] = self._with_open_pictures(inputs)
        rollout = super()._generate_and_score_completions(inputs)
        num_tokens, row = rollout["prompt_mask"].sum(1).max(0)
        with raised_on_all_ranks():
            check_length(f"A row ({str(inputs[row]['prompt'])[:200]!r})", int(num_tokens), self._positions)
        return rollout

    def _with_open_pictures(self, rows):
        with raised_on_all_ranks():
            rows, seen = open_rows(rows, self.args.fetch_image_urls, self._has_whole_prompts)
            seen.check_against(self.processing_class, self.chat_template)
        if self._is_vlm and not self._sees_pictures:
            found = torch.tensor([seen.with_pictures is not None], device=self.accelerator.device)
            if gather(found).any():  # in rows that were not looked at before
                self._see_pictures()
        return with_same_columns(rows)


def pad_on_the_left(processing_class: Any) -> None:
    """Have the trainer's own tokenizer or processor pad as one that TRL loads: prompts end where completions begin."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if getattr(tokenizer, "padding_side", "left") != "left":
        warnings.warn(
            f'The `padding_side` of `processing_class` is {tokenizer.padding_side!r}, where TRL needs "left", and is set to '
            "that now: what a processor says of each token of a prompt would be said of others.",
            stacklevel=3,
        )
        tokenizer.padding_side = "left"

"""Forward passes without padding: over separate rows, and over a packed row in which they share their prompts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from .branch_attention import core_of, has_grid_positions
from .microbatches import LeftAligned, select_rows
from .mixed_rows import beside_picture, without_empty_pictures
from .routers import quiet_routers
from .shared_prompts import SharedPrompts
from .trl_hooks import HeadCall, HeadFields, lm_head_read_by, real_tokens_in_lm_head


# Gets the place of each scored position, `row * T + token` of the batch, and what the LM head got.
HeadReader = Callable[[torch.Tensor, HeadCall], HeadFields]


class Passes:
    """
    Runs the forward passes of a [`~trl.GRPOTrainer`], of whatever model, on real tokens.

    Args:
        score (`Callable`): TRL's `_get_per_token_logps_and_entropies`.
        accelerator ([`~accelerate.Accelerator`]): What has wrapped the models.
        keeps_padding (`bool`): Whether separate rows are left as TRL lays them out.

    Attributes:
        reader (`Callable`, *optional*): Gets what the LM head gets, in passes over batches with `places`, see `reading_head`.
        picture (`dict`, *optional*): A row for passes without pictures, where these have to run the vision tower as others do, see
            [`picture_row`].
    """

    def __init__(self, score: Callable, accelerator: Accelerator, keeps_padding: bool):
        self.score, self.accelerator, self.keeps_padding = score, accelerator, keeps_padding
        self.reader: HeadReader | None = None
        self.picture: dict[str, Any] | None = None

    def run(
        self,
        model,
        batch: dict[str, Any],
        logits_to_keep: int,
        prompts: list[int] | None = None,
        problems: list[str] | None = None,
        **options,
    ):
        """
        One forward pass; results are those of TRL's method, with log-probs and entropies `(B, T)` that are 0 on padding.

        Args:
            batch (`dict`): What TRL's method takes of `B` rows, and `places` `(B, T)` where the head is to be read.
            logits_to_keep (`int`): `T`, padded length of the completions.
            prompts (`list[int]`, *optional*): Numbers of the prompts, which the rows share then, see [`same_prompts`].
            problems (`list[str]`, *optional*): Gets what shows that the model computes something else on shared prompts.
                `None` has the attention raise instead.
        """
        count, batch = len(batch["input_ids"]), dict(without_empty_pictures(batch))
        picture = self.picture_for(model)
        if picture is not None and "num_images" not in batch:
            batch = beside_picture(batch, picture, logits_to_keep)
            prompts = prompts and [*prompts, max(prompts) + 1]
        places = batch.pop("places", None)
        with quiet_routers(self.core(model)):
            if prompts is None:
                results = self._run_separate(model, batch, places, logits_to_keep, **options)
            else:
                results = self._run_shared(model, batch, places, logits_to_keep, prompts, problems, **options)
        logps, entropies, aux_loss = results
        return logps[:count], entropies if entropies is None else entropies[:count], aux_loss

    @contextmanager
    def reading_head(self, reader: HeadReader) -> Iterator[None]:
        """Passes in this context hand hidden states and LM head to `reader`, which says what the head returns."""
        self.reader = reader
        try:
            yield
        finally:
            self.reader = None

    def picture_for(self, model) -> dict[str, Any] | None:
        """`picture`, if the model is more than one of text."""
        config = core_of(self.core(model)).config
        return None if config.get_text_config() is config else self.picture

    def core(self, model) -> torch.nn.Module:
        """The model as it was before it was wrapped."""
        return self.accelerator.unwrap_model(model)

    def _read_head(self, places: torch.Tensor | None):
        """Context of a pass whose scored positions are those of `places`; `None` for passes that nobody reads."""
        if places is None:
            return nullcontext()
        reader = self.reader
        return lm_head_read_by(lambda call: reader(places, call))

    def _run_separate(self, model, batch: dict[str, Any], places: torch.Tensor | None, logits_to_keep: int, **options):
        attention_mask = batch["attention_mask"]
        if places is not None:  # positions are scored row after row
            places = places[attention_mask[:, -logits_to_keep:].bool()]
        if self.keeps_padding:
            with self._read_head(places):
                return self.score(model, logits_to_keep=logits_to_keep, **batch, **options)
        rows = LeftAligned(attention_mask, logits_to_keep)
        for key in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & batch.keys():
            batch[key] = rows.align(batch[key])

        def forward(labels, **inputs):
            return model(labels=rows.mask_labels(labels), **inputs)

        with real_tokens_in_lm_head(attention_mask.device), self._read_head(places):
            logps, entropies, aux_loss = self.score(forward, logits_to_keep=rows.logits_to_keep, **batch, **options)
        return rows.restore(logps), entropies if entropies is None else rows.restore(entropies), aux_loss

    def _run_shared(
        self,
        model,
        batch: dict[str, Any],
        places: torch.Tensor | None,
        logits_to_keep: int,
        prompts: list[int],
        problems: list[str] | None,
        **options,
    ):
        shared = SharedPrompts(batch["attention_mask"], logits_to_keep, prompts)
        shared.branches.problems = problems
        all_input_ids = batch["input_ids"]
        if places is not None:
            places = shared.scored(places)
        core = core_of(self.core(model))

        def forward(input_ids, attention_mask, labels, mm_token_type_ids=None, **inputs):
            # TRL's inputs are those of one row for each prompt, of which the images are taken.
            grid_positions = None
            if "image_grid_thw" in inputs and has_grid_positions(core):
                grid_positions, _ = core.base_model.get_rope_index(
                    input_ids=input_ids[:, : shared.width],
                    mm_token_type_ids=mm_token_type_ids[:, : shared.width],
                    image_grid_thw=inputs["image_grid_thw"],
                    attention_mask=attention_mask[:, : shared.width],
                )
            outputs = model(
                input_ids=shared.pack(all_input_ids),
                attention_mask=shared.branches.no_mask(),
                position_ids=shared.positions(grid_positions),
                shift_labels=shared.labels(all_input_ids),
                shared_prompts=shared.branches,
                **inputs,
            )
            entropy = None if outputs.entropy is None else shared.restore(outputs.entropy)
            return SimpleNamespace(log_probs=shared.restore(outputs.log_probs), entropy=entropy)

        questions = select_rows(batch, shared.first_rows)
        with real_tokens_in_lm_head(all_input_ids.device), self._read_head(places):
            results = self.score(forward, logits_to_keep=logits_to_keep, **questions, **options)
        if problems is not None and shared.branches.num_calls != core.get_decoder().config.num_hidden_layers:
            problems.append(f"{shared.branches.num_calls} of its layers attended as they were told")
        return results

"""
Rows with and without pictures in one run.

A forward pass takes pictures of any of its rows. Where it has none, nothing is to be seen, but other processes may wait: those
that hold pieces of the vision tower, or its gradients. So on several processes a pass without pictures gets a row more, a small
picture that is asked nothing: the vision tower runs on all of them alike, and what it makes of that picture reaches no loss, so
that its gradient is exactly zero.
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin, Trainer
from trl import prepare_multimodal_messages

from .branch_attention import core_of
from .data_checks import by_argument, rows_with_images
from .pictures import IMAGE_COLUMNS, pictures_in
from .trl_hooks import MULTIMODAL_KEYS


SIZE = (64, 64)  # pixels of the picture that nobody is asked about

# Vision inputs that a pass has for each token, and those that TRL counts beside what a processor makes.
PER_TOKEN, COUNTED = ("token_type_ids", "mm_token_type_ids"), ("num_images", "num_tiles")

# What is said about it.
PROBE = [{"role": "user", "content": "?"}]


class MixedRowsMixin:
    """
    Makes a [`~trl.GRPOTrainer`] train, evaluate and sample on rows of which some have pictures, in any mixture on any process.

    Raises:
        `ValueError`: at construction, on several processes, if some rows of a data set have no pictures, and the student's family
            lays them out row by row (Idefics, SmolVLM).
    """

    _sees_pictures = False

    def _see_pictures(self) -> None:
        """Be ready for passes without pictures beside passes with some. All processes call it together."""
        self._sees_pictures = True
        if self.accelerator.num_processes == 1:
            return
        picture = picture_row(self.processing_class, self.chat_template, self.chat_template_kwargs)
        if picture is not None:
            self._passes.picture = Trainer._prepare_inputs(self, picture)
        elif any(map(is_mixed, by_argument(self.train_dataset, self.eval_dataset).values())):
            raise ValueError(
                "Some rows have no images, and others have, which on several processes does not go with a "
                f"{type(self.processing_class).__name__}: it lays pictures out row by row. Train on the two kinds in runs of "
                "their own, or on one process."
            )

    def get_decay_parameter_names(self, model):
        """In a run of text alone, nothing of a vision tower, which has no gradient: DeepSpeed and FSDP would have it decay."""
        names = super().get_decay_parameter_names(model)
        if not self._is_vlm or self._sees_pictures:
            return names
        core = core_of(self.accelerator.unwrap_model(self.model))
        of_text = {*core.get_decoder().parameters(), *core.get_output_embeddings().parameters()}
        used = {name for name, parameter in model.named_parameters() if parameter in of_text}
        return [name for name in names if name in used]

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        # Processors take empty lists beside others, and nothing else for no pictures.
        return prompt_ids, images and [of_row or [] for of_row in images], fields

    def _generate(self, prompts: list):
        *results, images, tool_images = super()._generate(prompts)
        if images is None:  # of a `rollout_func`, which returns none
            images = [pictures_in(prompt) if isinstance(prompt, list) else [] for prompt in prompts]
            images = images if any(images) else None
        self._pictures = images
        return (*results, images, tool_images)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        picture = self._passes.picture if self._generates_in_pieces() else None
        if picture is None or any(images or ()):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        fields = {key: value for key, value in picture.items() if key in MULTIMODAL_KEYS and key not in COUNTED}
        for key in {*PER_TOKEN} & fields.keys():
            of_rows = multimodal_fields.get(key) or [[0] * len(ids) for ids in prompt_ids]
            fields[key] = [*map(list, of_rows), *fields[key].tolist()]
        prompt_ids = [*prompt_ids, picture["prompt_ids"][0].tolist()]
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, images, fields, *args, **kwargs)
        return completion_ids[:-1], logprobs and logprobs[:-1]

    def _generates_in_pieces(self) -> bool:
        """Whether processes wait for each other within a forward pass of generation."""
        if self.use_vllm:
            return False
        plugin = self.accelerator.state.deepspeed_plugin
        is_zero3 = plugin is not None and plugin.zero_stage == 3
        return self.is_fsdp_enabled or (is_zero3 and not self.args.ds3_gather_for_generation)

    def _generate_and_score_completions(self, inputs):
        # TRL gathers the pictures of those processes alone that have some.
        shows, self.log_multimodal = self.log_multimodal, False
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            self.log_multimodal = shows
        if shows and self._sees_pictures:
            self._logs["images"].extend(gather_object(self._pictures or [[] for _ in inputs]))
        return rollout


def may_have_pictures(train_dataset: Any, eval_dataset: Any) -> bool:
    """Whether data may have pictures in a column, as far as can be known before they are read."""
    for dataset in by_argument(train_dataset, eval_dataset).values():
        columns = getattr(dataset, "column_names", None)
        if dataset is None:
            continue
        if columns is None:
            return True
        for column in {*IMAGE_COLUMNS, "teacher_images"} & {*columns}:
            if not isinstance(dataset, Dataset) or rows_with_images(dataset, column).any():
                return True
    return False


def is_mixed(dataset: Any) -> bool:
    """Whether some rows of a data set have pictures in their column, and others none."""
    columns = {*IMAGE_COLUMNS} & {*dataset.column_names} if isinstance(dataset, Dataset) else ()
    return any(0 < rows_with_images(dataset, column).sum() < len(dataset) for column in columns)


def with_same_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have the column of pictures that one of them has, since TRL looks for it in the first."""
    missing = {
        column: [] if column == "images" else None for column in IMAGE_COLUMNS if any(column in row for row in rows)
    }
    return [{**missing, **row} for row in rows]


def picture_row(
    processing_class: ProcessorMixin, chat_template: str | None = None, template_kwargs: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """
    A row with a small picture, as a rollout has rows: `prompt_ids` and `prompt_mask` `(1, P)`, and the vision inputs of the
    model family; `None` if that lays pictures out row by row.
    """
    image = Image.new("RGB", SIZE)
    try:
        messages = prepare_multimodal_messages(PROBE, images=[image])
        options = {"add_generation_prompt": True, "tokenize": False, **(template_kwargs or {})}
        text = processing_class.apply_chat_template(messages, chat_template=chat_template, **options)
        inputs = processing_class(images=[[image]], text=[text], return_tensors="pt")
    except Exception:  # templates raise what they like
        text = processing_class.image_token + processing_class.tokenizer.eos_token
        inputs = processing_class(images=[[image]], text=[text], return_tensors="pt")
    row = {key: value for key, value in inputs.items() if key in MULTIMODAL_KEYS}
    pixels = row["pixel_values"]
    if pixels.ndim == 5:
        return None
    row |= {"prompt_ids": inputs["input_ids"], "prompt_mask": inputs["attention_mask"], "num_images": [1]}
    if "spatial_shapes" in row or (pixels.ndim == 4 and len(pixels) != 1):
        row["num_tiles"] = [len(pixels)]
    return row


def without_empty_pictures(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without vision inputs if no row of it has a picture; what is said of its tokens stays."""
    if any(batch.get("num_images") or ()):
        return batch
    return {key: value for key, value in batch.items() if key not in MULTIMODAL_KEYS or key in PER_TOKEN}


def beside_picture(batch: dict[str, Any], picture: dict[str, Any], logits_to_keep: int) -> dict[str, Any]:
    """
    The rows of a forward pass without pictures, with that of [`picture_row`] as one more, which has no completion.

    Args:
        batch (`dict`): What a pass takes of `B` rows, without vision inputs.
        picture (`dict`): See [`picture_row`].
        logits_to_keep (`int`): `T`, padded length of the completions.

    Returns:
        `dict`: what it takes of `B + 1` rows, of which the prompts may be wider.
    """
    batch, count = dict(batch), len(batch["input_ids"])
    device, length = batch["input_ids"].device, picture["prompt_ids"].size(1)
    more = max(0, length - (batch["input_ids"].size(1) - logits_to_keep))
    of_picture = {"input_ids": picture["prompt_ids"], "attention_mask": picture["prompt_mask"]}
    for key in {*PER_TOKEN} & (batch.keys() | picture.keys()):
        of_picture[key] = picture.get(key, torch.zeros_like(picture["prompt_ids"]))
        batch.setdefault(key, torch.zeros_like(batch["input_ids"]))
    for key, value in of_picture.items():
        rows = torch.nn.functional.pad(batch[key], (more, 0))
        left = rows.size(1) - logits_to_keep - length
        row = torch.nn.functional.pad(value.to(device, rows.dtype), (left, logits_to_keep))
        batch[key] = torch.cat([rows, row])
    if "places" in batch:
        batch["places"] = torch.nn.functional.pad(batch["places"], (0, 0, 0, 1))
    for key, value in picture.items():
        if key in MULTIMODAL_KEYS and key not in PER_TOKEN:
            batch[key] = [0] * count + value if key in COUNTED else value.to(device)
    return batch

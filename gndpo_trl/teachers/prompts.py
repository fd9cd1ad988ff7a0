"""Prompts that are the teacher's own: other words, images or template options before the same completions."""

import re
import unicodedata
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from ..grpo.data_checks import rows_with_images, rows_with_values
from ..grpo.pictures import (
    parts_of,
    pictures_in,
    pictures_in_column,
    pictures_of,
    placed,
    with_parts_alike,
)
from ..grpo.trl_hooks import MULTIMODAL_KEYS, pad
from .compatibility import ProcessingClass, answer_opening
from .special_tokens import SpecialTokens


# A prompt that ends so has the model begin inside its reasoning.
OPEN_REASONING = "<think>"


class TeacherPrompts:
    """
    Puts the column `teacher_prompt` of the data where a teacher reads the student's prompt.

    A `teacher_prompt` is what a `prompt` may be: messages, which the student's chat template renders, or text, which is
    taken as it is. Special tokens that messages write out are ordinary text, unless the student's prompt has that text
    word for word, of which TRL makes control tokens for the student. The teacher sees the images of the column
    `teacher_images`, or the student's where a row has none of its own. Rows whose `teacher_prompt` is `None` keep the
    student's prompt, token by token.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The student's: its token ids are those that a teacher is asked for.
        student_kwargs (`dict`): Keyword arguments of the chat template for the student's prompts.
        teacher_kwargs (`dict`): Those for the teacher's.
        chat_template (`str`, *optional*): Template to use in place of the processing class's own.
        tools (`list[Callable]`, *optional*): Tools that prompts offer.
        pad_to_multiple_of (`int`, *optional*): Widths of padded prompts are multiples of it.
    """

    def __init__(
        self,
        processing_class: ProcessingClass,
        student_kwargs: dict[str, Any],
        teacher_kwargs: dict[str, Any],
        *,
        chat_template: str | None = None,
        tools: list[Callable] | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.processing_class = processing_class
        self.is_vlm = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = processing_class.tokenizer if self.is_vlm else processing_class
        self.student_kwargs, self.teacher_kwargs = student_kwargs, teacher_kwargs
        self.template_options = {"chat_template": chat_template, "tools": tools or None}
        self.tools = tools
        self.pad_to_multiple_of = pad_to_multiple_of
        self.special_tokens = SpecialTokens(processing_class)
        self.student_tokenizer = self.tokenizer  # of the prompts that the student has read
        self.is_shown = False

    def check_dataset(
        self, field: str, dataset: Any, removes_columns: bool, has_environments: bool, has_prompt_fn: bool = False
    ) -> None:
        """
        Raise where the teacher's prompts in a data set could not be read, or would be lost.

        Args:
            field (`str`): Argument that the data set was passed as.
            dataset: The data set; one whose columns are not known is looked at row by row during the run.
            removes_columns (`bool`): `remove_unused_columns`.
            has_environments (`bool`): Whether environments write the student's prompts.
            has_prompt_fn (`bool`): Whether a function writes the teacher's prompts during the run.

        Raises:
            `ValueError`: naming the data set, what is wrong, and the remedy.
        """
        columns = getattr(dataset, "column_names", None) or ()
        has_column = "teacher_prompt" in columns
        if has_column and has_prompt_fn:
            raise ValueError(
                f"The teacher's prompt is given twice: `teacher_prompt_fn` is set, and `{field}` has the column "
                "`teacher_prompt`. Keep one of them; under another name the column reaches the function."
            )
        if not has_column and not has_prompt_fn:
            if "teacher_images" in columns:
                raise ValueError(
                    f"`{field}` has the column `teacher_images`, but no `teacher_prompt` that they belong to. Add one "
                    "(the student's prompt, if only the images differ), or remove the column."
                )
            return
        own = [name for name in ("teacher_prompt", "teacher_images") if name in columns]
        if removes_columns and own:
            raise ValueError(
                f"`{field}` has the column `{own[0]}`, but `remove_unused_columns` is True, which removes it. Set "
                "`remove_unused_columns` to False, or remove the column to have the teacher read the student's prompt."
            )
        source = "`teacher_prompt_fn` is set" if has_prompt_fn else f"`{field}` has the column `teacher_prompt`"
        remedy = "Unset it" if has_prompt_fn else "Remove the column"
        if has_environments:
            raise ValueError(
                f"{source}, but environments write the student's prompts, and what they add would be missing in the "
                f"teacher's. {remedy}, or train without `environment_factory`."
            )
        if self.tools and self.is_vlm:
            raise ValueError(
                f"{source}, and `tools` may return images, which are then in the completion and would be lost beside the "
                f"teacher's own. {remedy}, or train without tools."
            )
        if "teacher_images" in columns:
            if not self.is_vlm:
                raise ValueError(
                    f"`{field}` has the column `teacher_images`, but the student has no processor for images, and the "
                    "teacher reads what the student's processing class makes. Remove the column, or train an image-text "
                    "student."
                )
            if isinstance(dataset, Dataset) and has_column:
                check_teacher_images(field, dataset)

    def exchange(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """
        The rollout as the teacher reads it.

        Args:
            rollout (`dict`): Rollout of `B` rows with `rows`, see [`Teacher`].

        Returns:
            `dict`: the same rollout if no row has a `teacher_prompt`. Else one with other `prompt_ids` and `prompt_mask`
            `(B, P')`, left-padded, and the images that belong to them.

        Raises:
            `ValueError`: if a prompt of the teacher ends at another point of the chat template than the student's, or if
                its images do not fit.
        """
        rows = rollout["rows"]
        own = [row.get("teacher_prompt") is not None for row in rows]
        for row, has_own in zip(rows, own, strict=True):
            if row.get("teacher_images") and not has_own:
                raise ValueError(
                    f"A row has `teacher_images`, but its `teacher_prompt` is None (prompt: {quote(row)}). Give it one, "
                    "or remove its images."
                )
        if not any(own):
            return rollout

        images = [images_of(row) for row in rows]
        student_ids = [
            ids[mask.bool()].tolist() for ids, mask in zip(rollout["prompt_ids"], rollout["prompt_mask"], strict=True)
        ]
        device, others = rollout["prompt_ids"].device, {}
        if any(images):
            prompt_ids, others = self._process(rows, own, images, student_ids, rollout["completion_ids"].shape)
        else:
            prompt_ids = [
                self._tokenize(row["teacher_prompt"], row.get("prompt")) if has_own else ids
                for row, has_own, ids in zip(rows, own, student_ids, strict=True)
            ]
        for row, before, after in zip(rows, student_ids, prompt_ids, strict=True):
            self._check_ending(row, before, after)
        if not self.is_shown:
            self._show(student_ids[own.index(True)], prompt_ids[own.index(True)])

        ids = self._pad(prompt_ids, self.tokenizer.pad_token_id)
        mask = self._pad([[1] * len(row) for row in prompt_ids], 0)
        question = {key: value for key, value in rollout.items() if key not in MULTIMODAL_KEYS}
        question.update(prompt_ids=ids.to(device), prompt_mask=mask.to(device))
        for key, value in others.items():
            question[key] = value.to(device) if isinstance(value, torch.Tensor) else value
        return question

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        rows = [torch.as_tensor(row) for row in rows]
        return pad(rows, value, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)

    def _render(self, prompt: str | list, kwargs: dict[str, Any], closed=False, like: Any = None) -> str:
        if isinstance(prompt, str):
            return prompt
        prompt = self.special_tokens.as_text(prompt, like)
        if self.is_vlm:
            prompt = prepare_multimodal_messages(prompt)
        return self.processing_class.apply_chat_template(
            prompt, add_generation_prompt=not closed, tokenize=False, **self.template_options, **kwargs
        )

    def _tokenize(self, prompt: str | list, students: str | list | None = None) -> list[int]:
        text = self._render(prompt, self.teacher_kwargs, like=students)
        return self.tokenizer(text, add_special_tokens=self._adds_special_tokens(prompt, text))["input_ids"]

    def _adds_special_tokens(self, prompt: str | list, text: str) -> bool:
        """The rules of TRL and of transformers: text gets them, what a template rendered has them already."""
        bos_token = self.tokenizer.bos_token
        return isinstance(prompt, str) or (self.is_vlm and not (bos_token and text.startswith(bos_token)))

    def _process(self, rows, own, images, student_ids, shape) -> tuple[list[list[int]], dict[str, Any]]:
        """Token ids of the prompts, and the vision inputs of the model family, for rows with images."""
        images = [row_images or [] for row_images in images]
        prompts = [with_images(row) for row in rows]
        if any(isinstance(prompt, str) and row_images for prompt, row_images in zip(prompts, images, strict=True)):
            raise ValueError(
                "A `teacher_prompt` with images is text. Write it as messages, which say where the images are."
            )
        texts = [
            self._render(prompt, self.teacher_kwargs if has_own else self.student_kwargs, like=row["prompt"])
            for prompt, has_own, row in zip(prompts, own, rows, strict=True)
        ]
        options = {"add_special_tokens": self._adds_special_tokens(prompts[0], texts[0]), "padding": True}
        options.update(padding_side="left", return_tensors="pt")
        inputs = self.processing_class(text=texts, images=images, **options)
        prompt_ids = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        for row, has_own, ids, before in zip(rows, own, prompt_ids, student_ids, strict=True):
            if not has_own and ids != before:
                raise ValueError(
                    "The student sampled after other tokens than its prompt renders to, so the teacher cannot be given "
                    f"the images of a row without `teacher_prompt` (prompt: {quote(row)}). Give every row one, or none."
                )
        others = {key: value for key, value in inputs.items() if key in MULTIMODAL_KEYS}
        for key in {"token_type_ids", "mm_token_type_ids"} & others.keys():
            types = [kinds[mask.bool()] for kinds, mask in zip(others[key], inputs["attention_mask"], strict=True)]
            others[key] = torch.cat([self._pad(types, 0), torch.zeros(shape, dtype=others[key].dtype)], dim=1)
        others["num_images"] = [len(row_images) for row_images in images]
        pixels = others["pixel_values"]
        if "spatial_shapes" in others or (pixels.ndim == 4 and len(pixels) != sum(others["num_images"])):
            others["num_tiles"] = [
                len(self.processing_class(text=[text], images=[row_images], **options)["pixel_values"])
                if row_images
                else 0
                for text, row_images in zip(texts, images, strict=True)
            ]
        return prompt_ids, others

    @cached_property
    def endings(self) -> list[list[int]]:
        """Token ids that the chat template opens the answer with, for the student and for the teacher."""
        endings = []
        for kwargs in (self.student_kwargs, self.teacher_kwargs):
            text = answer_opening(lambda probe, closed, kwargs=kwargs: self._render(probe, kwargs, closed=closed))
            if text is None:
                warnings.warn(
                    "The chat template refuses every question that it was tried on, so that it is NOT checked whether "
                    "the prompts of student and teacher end at the same point of it. Compare the pair that is printed."
                )
                return []
            endings.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return endings

    def _check_ending(self, row: dict[str, Any], student_ids: list[int], teacher_ids: list[int]) -> None:
        # Where both are text, the user has seen to the template.
        is_text = isinstance(row.get("prompt"), str) and not isinstance(row.get("teacher_prompt"), list)
        endings = [] if is_text else self.endings

        def ends(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
            last = tokenizer.decode(ids[-len(OPEN_REASONING) :]).rstrip()
            at_endings = [ids[len(ids) - len(ending) :] == ending for ending in endings]
            return [*at_endings, last.endswith(OPEN_REASONING)]

        student, teacher = (student_ids, self.student_tokenizer), (teacher_ids, self.tokenizer)
        if ends(*student) != ends(*teacher):
            before, after = (tokenizer.decode(ids[-20:]) for ids, tokenizer in (student, teacher))
            raise ValueError(
                f"The prompts of student and teacher end at different points of the chat template: the student's as "
                f"{before!r}, the teacher's as {after!r} (prompt: {quote(row)}). The completion would not follow on the "
                "teacher's. Write `teacher_prompt` as messages if `prompt` is messages and as text if it is text, and let "
                f"`chat_template_kwargs` ({self.student_kwargs}) and `teacher_chat_template_kwargs` agree on what opens "
                "the answer (`enable_thinking`, say)."
            )

    def _show(self, student_ids: list[int], teacher_ids: list[int]) -> None:
        self.is_shown = True
        if PartialState().is_main_process:
            both = (("student", student_ids, self.student_tokenizer), ("teacher", teacher_ids, self.tokenizer))
            for reader, ids, tokenizer in both:
                text = re.sub(r"(<[^<>]+>)(?:\s?\1)+", r"\1...", tokenizer.decode(ids))  # placeholders of an image
                print(f"A prompt as the {reader} reads it:\n{printable(text)}\n", flush=True)


def images_of(row: dict[str, Any]) -> list | None:
    """Images that the teacher sees, in the order of its prompt; `None` if there are none."""
    prompt, own = row.get("teacher_prompt"), row.get("teacher_images")
    if prompt is None:
        return own or pictures_of(row)
    return pictures_in(with_images(row)) or None if isinstance(prompt, list) else own or pictures_of(row)


def with_images(row: dict[str, Any]) -> str | list:
    """
    The prompt that the teacher reads, with its images in the messages: those of the column `teacher_images`, or without
    any the student's, stand where it has placeholders, or before the first words where it has no images of its own.

    Raises:
        `ValueError`: if its placeholders and the images do not fit.
    """
    prompt = row.get("teacher_prompt")
    if prompt is None:
        return placed(row["prompt"], pictures_in_column(row)) if isinstance(row["prompt"], list) else row["prompt"]
    if isinstance(prompt, str):
        return prompt
    images, messages = row.get("teacher_images"), with_parts_alike(prompt)
    parts = [part for part in parts_of(messages) if part.get("type") == "image"]
    if not images and not (parts and all("image" in part for part in parts)):
        images = pictures_of(row)
    try:
        return placed(messages, images)
    except ValueError as error:
        raise ValueError(
            f"`teacher_prompt` and its images do not fit: {error} A row without `teacher_images` has the student's. "
            f"Prompt: {str(prompt)[:200]!r}."
        ) from error


def printable(text: str) -> str:
    """The text, with what would move a terminal's cursor or not be seen as Python writes it."""
    hidden = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # controls, formats, private and half characters, line separators
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden and c not in "\n\t" else c
        for c in text
    )


def quote(row: dict[str, Any]) -> str:
    return repr(str(row.get("prompt"))[:200])


def check_teacher_images(field: str, dataset: Dataset) -> None:
    """Raise `ValueError` if images have no prompt to stand in."""
    has_images = rows_with_images(dataset, "teacher_images")
    has_prompt = rows_with_values(dataset, "teacher_prompt")
    if (has_images & ~has_prompt).any():
        first = int((has_images & ~has_prompt).argmax())
        raise ValueError(
            f"Row {first} of `{field}` has `teacher_images`, but its `teacher_prompt` is None. Give it one, or remove its "
            "images."
        )

"""A teacher of another model family, which reads everything in a form of its own: prompt, images, completion."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather
from transformers import PreTrainedModel, TrainerCallback

from ..grpo.checkpoints import RunCannotGoOn
from ..grpo.ranks import raised_on_all_ranks
from ..grpo.rollouts import check_finite
from .alignment import Translation, Translator, Vocabulary
from .compatibility import ModelDescription, ProcessingClass, placeholders_of, render, try_probes
from .local import LocalTeacher
from .prompts import TeacherPrompts, images_of, quote
from .served.teacher import ServerTeacher
from .teacher import Score, Teacher


ANSWER = "4711"


class OwnPrompts(TeacherPrompts):
    """
    All prompts in the teacher's own form: messages in its chat template, images from its image processor, text as text.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): The teacher's.
        student ([`ModelDescription`]): Has the options of the chat template, and the tokenizer of the student's prompts.
    """

    def __init__(self, processing_class: ProcessingClass, student: ModelDescription):
        super().__init__(processing_class, student.template_kwargs, student.teacher_template_kwargs)
        self.student_tokenizer = student.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # TRL's rule
        self.endings = []  # those of two templates say nothing of each other

    def exchange(self, rollout: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {**row, "teacher_prompt": row["prompt"]} if row.get("teacher_prompt") is None else row
            for row in rollout["rows"]
        ]
        if not self.is_vlm:
            for row in rows:
                if images_of(row):
                    raise ValueError(
                        f"A row has images, but the teacher reads text alone (prompt: {quote(row)}). Choose an image-text "
                        "teacher, or leave such rows out."
                    )
        return super().exchange({**rollout, "rows": rows})

    def _render(self, prompt, kwargs, closed=False, like=None):
        if not isinstance(prompt, str) and getattr(self.processing_class, "chat_template", None) is None:
            raise ValueError(
                f'`teacher_alignment` is "text" and a prompt is messages ({str(prompt)[:200]!r}), but the teacher has no chat '
                "template of its own. Give it a column `teacher_prompt` of text, or `teacher_processing_class` a template."
            )
        # What is a special token to the teacher is text in data that were written for the student.
        return super()._render(prompt, kwargs, closed)


@dataclass
class Reading:
    """A rollout as the teacher reads it, and for each row how its tokens and the student's belong together."""

    rollout: dict[str, Any]
    question: dict[str, Any]
    translations: list[Translation]


class OtherFamily(Teacher):
    """
    A teacher with another tokenizer than the student's, or another image processor.

    It reads the row's messages (or its `teacher_prompt`) through its own chat template and processor, and then the completion
    as text, in its own tokens. Both are compared piece by piece, see [`~teachers.alignment.Translator`]: the log-prob of a
    piece is the sum of those of its tokens, and each of the student's tokens in it is given an even share. Pieces of which the
    teacher reads something else than the student wrote are NaN, see [`Teacher`].

    Args:
        teacher ([`LocalTeacher`] or [`ServerTeacher`]): Who scores. Its processing class has to be known.
        max_unknown (`float`, *optional*, defaults to 0.05): Largest share of a batch's tokens of which the teacher may read
            something else.

    Raises:
        `ValueError`: if its processing class is unknown, or its tokenizer does not say where in a text its tokens are.
        [`~grpo.checkpoints.RunCannotGoOn`]: during a run, on all ranks, if too many tokens are unknown.
    """

    renders = True

    def __init__(self, teacher: LocalTeacher | ServerTeacher, *, max_unknown: float = 0.05):
        self.teacher, self.max_unknown = teacher, max_unknown
        self.description: ModelDescription | None = getattr(teacher, "description", None)
        if self.description is None or None in (self.description.processing_class, self.description.config):
            raise ValueError(
                '`teacher_alignment` is "text", but the teacher\'s tokenizer is unknown, and its tokens are made here. Set '
                "`teacher_model_name_or_path` to its path or id beside `teacher_server_url`, or pass `teacher_processing_class`."
            )
        self.asked: Reading | None = None

    def callbacks(self) -> list[TrainerCallback]:
        return self.teacher.callbacks()

    def check(self, student: ModelDescription) -> None:
        if student.processing_class is None:
            return  # TRL refuses the student
        self.teacher.check(self.description)  # which is asked in its own tokens
        self.prompts = OwnPrompts(self.description.processing_class, student)
        self.student_tokenizer, tokenizer = student.tokenizer, self.description.tokenizer
        lead, end = turn_of(student, student.template_kwargs)
        own_lead, own_end = turn_of(self.description, student.teacher_template_kwargs)
        self.leads = lead, own_lead
        if own_end is None:
            raise ValueError(
                "The teacher's tokenizer has no end token, which the end of the student's turns is to be compared with. Set its "
                "`eos_token`, and pass it as `teacher_processing_class`."
            )
        if end not in student.stop_ids:
            end = student.tokenizer.eos_token_id
        # Of several tokens that end a turn, the others are those of the same name, where there are such.
        added = tokenizer.added_tokens_encoder
        names = {id: student.tokenizer.convert_ids_to_tokens(id) for id in student.stop_ids}
        ends = {id: own_end if id == end else added.get(name, own_end) for id, name in names.items()}
        self.translator = Translator(
            Vocabulary(student.tokenizer), Vocabulary(tokenizer), ends, placeholders_of(self.description)
        )

    def check_data(self, field: str, dataset: Any, has_prompt_fn: bool) -> None:
        self.teacher.check_data(field, dataset, has_prompt_fn)

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        self.teacher.prepare(student, accelerator, score)

    def start(self, rollout: dict[str, Any]) -> None:
        with raised_on_all_ranks():
            self.asked = self._read(rollout)
        self.teacher.start(self.asked.question)

    def pieces(self, rollout: dict[str, Any]) -> torch.Tensor:
        mask = rollout["completion_mask"].bool()
        pieces = torch.arange(mask.size(1), device=mask.device).repeat(len(mask), 1)
        for row, translation in enumerate(self._asked(rollout).translations):
            pieces[row, mask[row]] = torch.tensor(translation.of_student, dtype=torch.long, device=mask.device)
        return pieces

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """See [`Teacher`]: even shares of what the teacher says of the pieces."""
        asked, self.asked = self._asked(rollout), None
        question, mask = asked.question, rollout["completion_mask"].bool()
        found = self.teacher.per_token_logps(question).float()
        with raised_on_all_ranks():
            self._check(found, question)
        logps = torch.full(mask.shape, torch.nan, dtype=torch.float32, device=found.device)
        for row, translation in enumerate(asked.translations):
            of_student, of_teacher = (
                torch.tensor(numbers, dtype=torch.long, device=found.device)
                for numbers in (translation.of_student, translation.of_teacher)
            )
            sums = found.new_zeros(len(translation.is_known))
            sums.index_add_(0, of_teacher, found[row, : len(of_teacher)])
            sums[~torch.tensor(translation.is_known, dtype=torch.bool, device=found.device)] = torch.nan
            sizes = of_student.bincount(minlength=len(sums))
            logps[row, mask[row]] = (sums / sizes)[of_student]
        self._check_changed(asked)
        return logps.to(mask.device)

    def identity(self) -> str:
        return f"{self.teacher.identity()}, on text"

    def save_state(self, folder: str) -> None:
        self.teacher.save_state(folder)

    def load_state(self, folder: str) -> None:
        self.teacher.load_state(folder)

    def _asked(self, rollout: dict[str, Any]) -> Reading:
        if self.asked is None or self.asked.rollout is not rollout:
            self.start(rollout)
        return self.asked

    def _read(self, rollout: dict[str, Any]) -> Reading:
        translations = []
        for row, ids, mask, prompt in zip(
            rollout["rows"],
            rollout["completion_ids"],
            rollout["completion_mask"].bool(),
            rollout["prompt_ids"],
            strict=True,
        ):
            # What follows on text is of one text with it; what answers messages begins one.
            is_text = isinstance(row.get("prompt"), str)
            before, leads = (prompt[-1].item(), (b"", b"")) if is_text else (None, self.leads)
            translations.append(self.translator.translate(ids[mask].tolist(), before, leads))
        width = max(1, *(len(translation.ids) for translation in translations))  # a forward pass has a column
        own = {key: rollout[key] for key in ("prompt_ids", "prompt_mask", "rows")}
        prompt_ids = rollout["prompt_ids"]
        own["completion_ids"] = prompt_ids.new_full((len(prompt_ids), width), self.prompts.tokenizer.pad_token_id)
        own["completion_mask"] = prompt_ids.new_zeros((len(prompt_ids), width))
        for row, translation in enumerate(translations):
            own["completion_ids"][row, : len(translation.ids)] = prompt_ids.new_tensor(translation.ids)
            own["completion_mask"][row, : len(translation.ids)] = 1
        return Reading(rollout, self.prompts.exchange(own), translations)

    def _check(self, logps: torch.Tensor, question: dict[str, Any]) -> None:
        knows = ~torch.tensor(self.teacher.may_not_know(question["rows"]), device=logps.device).unsqueeze(-1)
        mask = question["completion_mask"].bool() & knows
        check_finite("teacher", logps, question, mask, self.description.tokenizer)

    def _check_changed(self, asked: Reading) -> None:
        """Raise where the teacher reads too much otherwise than it was written. All ranks call it together."""
        changed = sum(translation.num_changed for translation in asked.translations)
        total = sum(len(translation.of_student) for translation in asked.translations)
        changed, total = gather(torch.tensor([[changed, total]], device=PartialState().device)).sum(0).tolist()
        if changed > self.max_unknown * total:
            raise RunCannotGoOn(
                f"The teacher reads {changed} of {total} tokens of a batch otherwise than the student wrote them, or not at all, "
                f"more than a share of {self.max_unknown:g}: what its tokenizer changes or has no token for. Choose a teacher "
                "whose tokenizer keeps texts as they are, or pass `OtherFamily(LocalTeacher(...), max_unknown=...)` as "
                "`teacher_model` to leave these tokens out."
            )


def turn_of(model: ModelDescription, kwargs: dict[str, Any]) -> tuple[bytes, int | None]:
    """
    How a model's chat template goes on where an answer begins, with a space or with nothing, and the token that ends its turn:
    the one that the template has after the answer, or the tokenizer's.
    """
    tokenizer = model.tokenizer

    def parts(probe: list[dict[str, Any]]) -> tuple[str, str]:
        opened = render(model.processing_class, probe, **kwargs)
        answered = render(
            model.processing_class, [*probe, {"role": "assistant", "content": ANSWER}], closed=True, **kwargs
        )
        before, _, after = answered.rpartition(ANSWER)
        return before.removeprefix(opened) if before.startswith(opened) else "", after

    found = None
    if getattr(model.processing_class, "chat_template", None) is not None:
        found = try_probes(parts)
    lead, after = found or ("", "")
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids} | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    end = next((id for id in ids if id in special), tokenizer.eos_token_id)
    return b" " if lead == " " else b"", end

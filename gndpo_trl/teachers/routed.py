"""Several teachers, each for the rows that name it."""

import os
import re
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from ..grpo.hidden_states import HiddenStates
from ..grpo.microbatches import select_rows
from ..grpo.ranks import raised_on_all_ranks
from ..objective.distributions import LMHead
from .compatibility import ModelDescription
from .teacher import ReadHiddenStates, Score, Teacher


class RoutedTeacher(Teacher):
    """
    Teachers of any kinds, each of which scores the rows whose column `teacher` names it.

    Rows are spread over processes as they come, so that a process may have many for one teacher and none for another. All
    of them ask each teacher for as many rows, those of the process that has most; the missing ones are a row of theirs
    with nothing to score.

    Args:
        teachers (`dict[str, Teacher]`): The teachers by the names that the column has for them.

    Raises:
        `ValueError`: if there are none, if a name could not be a folder in a checkpoint, or if a row names another one.
    """

    def __init__(self, teachers: dict[str, Teacher]):
        if not teachers:
            raise ValueError("`teacher_model` is an empty dictionary. Give at least one teacher, by its name.")
        for name in teachers:
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
                raise ValueError(
                    f"`teacher_model` has the name {name!r}, which cannot stand in the names of metrics and folders. Use "
                    "letters, digits, - and _ (in the column `teacher` too)."
                )
        self.teachers = teachers
        self.names = tuple(teachers)
        self.asked: tuple[dict[str, Any], list] | None = None

    @property
    def vocab_size(self) -> int | None:
        sizes = [teacher.vocab_size for teacher in self.teachers.values() if teacher.vocab_size is not None]
        return min(sizes, default=None)

    @property
    def renders(self) -> bool:
        return any(teacher.renders for teacher in self.teachers.values())

    def renders_rows(self, rows: list[dict[str, Any]]) -> list[bool]:
        return [self.teachers[self.names[number]].renders for number in self.route(rows)]

    def callbacks(self) -> list[TrainerCallback]:
        return [callback for teacher in self.teachers.values() for callback in teacher.callbacks()]

    def check(self, student: ModelDescription) -> None:
        for teacher in self.teachers.values():
            teacher.check(student)

    def check_data(self, field: str, dataset: Any, has_prompt_fn: bool) -> None:
        columns = getattr(dataset, "column_names", None)
        if columns is not None and "teacher" not in columns:
            raise ValueError(
                f"`teacher_model` names {len(self.names)} teachers ({', '.join(self.names)}), but `{field}` has no column "
                f"`teacher` that says whose a row is, only {columns}. Add one (`dataset.add_column`)."
            )
        if not isinstance(dataset, Dataset):
            return  # row by row, during the run
        named = dataset["teacher"]
        rows = {name: [] for name in self.names}
        for index, name in enumerate(named):
            self.check_name(name, f"Row {index} of `{field}`")
            rows[name].append(index)
        for name, teacher in self.teachers.items():
            if rows[name]:
                teacher.check_data(field, dataset.select(rows[name]), has_prompt_fn)
            elif field == "train_dataset":
                warnings.warn(
                    f"`teacher_model` has a teacher {name!r}, but no row of `{field}` names it: it stays idle."
                )

    def check_name(self, name: Any, where: str) -> None:
        if name not in self.teachers:
            raise ValueError(
                f"{where} names the teacher {name!r} in the column `teacher`, but `teacher_model` has only "
                f"{', '.join(map(repr, self.names))}. Correct the row, or add that teacher."
            )

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        for teacher in self.teachers.values():
            teacher.prepare(student, accelerator, score)

    def route(self, rows: list[dict[str, Any]]) -> list[int]:
        for row in rows:
            self.check_name(row.get("teacher"), f"A row (prompt: {str(row.get('prompt'))[:200]!r})")
        return [self.names.index(row["teacher"]) for row in rows]

    def start(self, rollout: dict[str, Any]) -> None:
        self.asked = rollout, self._ask(rollout)
        for _, teacher, question, _ in self.asked[1]:
            teacher.start(question)

    def pieces(self, rollout: dict[str, Any]) -> torch.Tensor | None:
        if not self.renders:
            return None
        ids = rollout["completion_ids"]
        pieces = torch.arange(ids.size(1), device=ids.device).repeat(len(ids), 1)
        self.asked = rollout, self._asked(rollout)
        for _, teacher, question, rows in self.asked[1]:
            found = teacher.pieces(question)
            if found is not None:
                pieces[rows] = found[: len(rows)]
        return pieces

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        ids = rollout["completion_ids"]
        logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        for _, teacher, question, rows in self._asked(rollout):
            logps[rows] = teacher.per_token_logps(question)[: len(rows)].float()
        return logps

    def may_not_know(self, rows: list[dict[str, Any]]) -> list[bool]:
        return [self.teachers[row["teacher"]].may_not_know([row])[0] for row in rows]

    def hidden_states(self, rollout: dict[str, Any], read: ReadHiddenStates) -> HiddenStates:
        """See [`Teacher`]; the heads are in the order of `names`, `None` where no process has a row for the teacher."""
        states: list[torch.Tensor | None] = [None] * len(rollout["completion_ids"])
        heads: list[LMHead | None] = [None] * len(self.names)
        for number, teacher, question, rows in self._asked(rollout):
            found = teacher.hidden_states(question, read)
            heads[number] = found.head
            for row, of_row in zip(rows, found.rows, strict=False):  # those without anything to score come last
                states[row] = of_row
        return HiddenStates(states, next(filter(None, heads)), heads, self.route(rollout["rows"]))

    def identity(self) -> str:
        return "; ".join(f"{name}: {teacher.identity()}" for name, teacher in self.teachers.items())

    def without_distributions(self) -> Teacher | None:
        found = (teacher.without_distributions() for teacher in self.teachers.values())
        return next((ignorant for ignorant in found if ignorant is not None), None)

    def _asked(self, rollout: dict[str, Any]) -> list[tuple[int, Teacher, dict[str, Any], list[int]]]:
        """What the teachers have been asked of a rollout, or will be now."""
        before, questions = self.asked or (None, None)
        self.asked = None
        return questions if before is rollout else self._ask(rollout)

    def _ask(self, rollout: dict[str, Any]) -> list[tuple[int, Teacher, dict[str, Any], list[int]]]:
        """
        The number of each teacher, the teacher, what it is asked, and for which rows; the same teachers and numbers of rows on
        all processes.
        """
        with raised_on_all_ranks():
            numbers = self.route(rollout["rows"])
        rows = [[row for row, number in enumerate(numbers) if number == k] for k in range(len(self.names))]
        counts = torch.tensor([[len(mine) for mine in rows]], device=rollout["completion_ids"].device)
        questions = []
        for number, (teacher, mine, count) in enumerate(
            zip(self.teachers.values(), rows, gather(counts).amax(0).tolist(), strict=True)
        ):
            if count > 0:
                question = select_rows(rollout, mine + [0] * (count - len(mine)))
                question["completion_mask"][len(mine) :] = 0
                questions.append((number, teacher, question, mine))
        return questions

    def save_state(self, folder: str) -> None:
        for teacher, own in self._folders(folder):
            os.makedirs(own, exist_ok=True)
            teacher.save_state(own)

    def load_state(self, folder: str) -> None:
        for teacher, own in self._folders(folder):
            teacher.load_state(own)

    def _folders(self, folder: str) -> list[tuple[Teacher, str]]:
        return [(teacher, os.path.join(folder, f"teacher-{name}")) for name, teacher in self.teachers.items()]

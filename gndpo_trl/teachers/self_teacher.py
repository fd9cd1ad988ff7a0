"""The student as its own teacher: its base, its average, an earlier copy of it, or itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..grpo.data_checks import rows_with_values
from ..grpo.hidden_states import HiddenStates, gathered, keep_top_k
from ..grpo.ranks import raised_on_all_ranks
from .local import LocalTeacher
from .teacher import ReadHiddenStates, Score, Teacher
from .weights import free_gathered, piece, piece_of, whole


# Weights that follow the student, and those that training started from, which a run may have beside them.
STATE, STATE_OF_START = "teacher.safetensors", "start.safetensors"


class NeedsPrompts(Teacher):
    """A teacher that has nothing to teach where it reads what the student reads."""

    looks_at_rows = False  # in a stream of data, whose columns are not known before

    def check_data(self, field: str, dataset: Any, has_prompt_fn: bool) -> None:
        if field != "train_dataset" or has_prompt_fn:
            return
        columns = getattr(dataset, "column_names", None)
        self.looks_at_rows = columns is None
        has_prompts = columns is None or "teacher_prompt" in columns
        if has_prompts and isinstance(dataset, Dataset):
            has_prompts = rows_with_values(dataset, "teacher_prompt").any()
        if not has_prompts:
            self._refuse(columns)

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        if not self.looks_at_rows:
            return
        with raised_on_all_ranks():
            if not any("teacher_prompt" in row for row in rows):
                self._refuse(sorted(rows[0]))

    def _refuse(self, columns: list[str]) -> None:
        raise ValueError(
            f'`teacher_model` is "self", but no row of `train_dataset` has a `teacher_prompt` (columns: {columns}). A model '
            "that reads what the student reads has nothing to teach it. Add the column, with what the teacher knows beside "
            "the question, pass a `teacher_prompt_fn` to the trainer, or name another model."
        )


class SelfTeacher(NeedsPrompts):
    """
    The student's own model, with other weights than those in training, as the teacher of a prompt of its own.

    There is one model. While it scores, what is trained of it (of a LoRA student: the adapters) is exchanged for the
    teacher's weights, of which each process keeps its piece. Under ZeRO-3 and FSDP2 nothing is gathered for that.

    Args:
        weights (`str`):
            `"ema"`: the exponential moving average of the student's weights, in float32. `"periodic"`: a copy of them.
            `"live"`: those in training. `"initial"`: a copy of those that training starts from.
        decay (`float`, *optional*, defaults to `0.999`): Share of the average that an optimizer step leaves.
        sync_steps (`int`, *optional*, defaults to `50`): Optimizer steps between two copies.
        offload (`bool`, *optional*, defaults to `False`): Whether the teacher's weights are kept in CPU memory.
        top_k (`int`, *optional*): Of its distribution, see [`LocalTeacher`].

    Raises:
        `ValueError`: if no row has a prompt for the teacher, if the model is sharded by FSDP 1, or if a checkpoint to go on from holds no weights of such a teacher.
    """

    def __init__(
        self,
        weights: str,
        decay: float = 0.999,
        sync_steps: int = 50,
        offload: bool = False,
        top_k: int | None = None,
    ):
        self.weights, self.top_k = weights, top_k
        self.decay, self.sync_steps, self.offload = decay, sync_steps, offload
        self.has_own_weights = weights != "live"
        self.state = STATE_OF_START if weights == "initial" else STATE
        self.values: dict[str, torch.Tensor] = {}  # name of a parameter: this process's piece of the teacher's

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if self.has_own_weights and plugin is not None and plugin.fsdp_version == 1:
            raise ValueError(
                f"`teacher_weights` is {self.weights!r}, which FSDP 1 cannot do: it melts parameters into one another. Set "
                "`fsdp_version: 2` in the accelerate configuration."
            )
        self.student, self.accelerator, self.score = student, accelerator, score

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.student = model
        if self.has_own_weights and not self.values:  # else they came with the checkpoint
            for name, parameter in self._trained():
                dtype = torch.float32 if self.weights == "ema" else parameter.dtype
                self.values[name] = self._home(piece(parameter).to(dtype, copy=True))

    def on_step_end(self, args, state, control, **kwargs):
        is_due = self.weights == "ema" or (self.weights == "periodic" and state.global_step % self.sync_steps == 0)
        if not is_due:
            return
        for name, parameter in self._trained():
            mine = self.values[name]
            now = piece(parameter).to(mine.device, mine.dtype)
            if self.weights == "ema":
                mine.lerp_(now, 1 - self.decay)
            else:
                mine.copy_(now)

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """Log-probs of the sampled tokens, see [`Teacher`]."""
        self.check_rows(rollout["rows"])
        with self._teaching():
            return self.score(self.student, rollout)

    def may_not_know(self, rows: list[dict[str, Any]]) -> list[bool]:
        return [False] * len(rows)

    def identity(self) -> str:
        known = "" if self.top_k is None else f", its likeliest {self.top_k} tokens"
        return f"the student ({self.weights}){known}"

    def hidden_states(self, rollout: dict[str, Any], read: ReadHiddenStates) -> HiddenStates:
        """See [`Teacher`]. The LM head is a copy where the student's is trained, whose weights will move on."""
        self.check_rows(rollout["rows"])
        with self._teaching():
            states = read(self.student, rollout)
            if self.top_k is not None:
                return keep_top_k(states, rollout, self.top_k)
            if any(weight.requires_grad for weight in states.head.parameters):
                with gathered(states.head.parameters):
                    head = states.head.on(torch.device("cpu"))
                copies = (None if weight is None else weight.clone() for weight in (head.weight, head.bias))
                states = HiddenStates(states.rows, replace(head, **dict(zip(("weight", "bias"), copies, strict=True))))
        return states

    def save_state(self, folder: str) -> None:
        if not self.has_own_weights:
            return
        # Whole, so that a run on another number of processes can go on from it.
        tensors = {}
        for name, parameter in self._trained():
            tensor = whole(parameter, self.values[name], self.accelerator.device)
            if self.accelerator.is_main_process:
                tensors[name] = tensor.cpu().contiguous()
        if self.accelerator.is_main_process:
            save_file(tensors, os.path.join(folder, self.state))

    def load_state(self, folder: str) -> None:
        if not self.has_own_weights:
            return
        path = os.path.join(folder, self.state)
        trained = dict(self._trained())
        names = set()
        if os.path.exists(path):
            with safe_open(path, "pt") as file:
                names = {*file.keys()}
        if names != trained.keys():
            raise ValueError(
                f"`teacher_weights` is {self.weights!r}, but the checkpoint {folder!r} has no such weights for this model "
                f"in `{self.state}`. It was saved by a run with another teacher, or one that trained other parameters: set "
                "what that run had, or start a new run from its model."
            )
        with safe_open(path, "pt") as file:
            for name, parameter in trained.items():
                values = piece_of(parameter, file.get_tensor(name), self.accelerator.device)
                dtype = torch.float32 if self.weights == "ema" else parameter.dtype
                self.values[name] = self._home(values.to(piece(parameter).device, dtype, copy=True))

    def _home(self, values: torch.Tensor) -> torch.Tensor:
        return values.cpu() if self.offload else values

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What is trained of the student, and so what of the teacher is another."""
        free_gathered(self.student)
        yield from ((name, value) for name, value in self.student.named_parameters() if value.requires_grad)

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """The model with the teacher's weights, for as long as the context lasts."""
        if not self.values:  # in training, or none was trained yet
            yield
        else:
            before = {name: piece(parameter).clone() for name, parameter in self._trained()}
            try:
                self._write(self.values)
                yield
            finally:
                self._write(before)

    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained():
            piece(parameter).copy_(values[name])
        free_gathered(self.student)


class InitialStudent(NeedsPrompts, LocalTeacher):
    """The student as it is before training, in a model of its own, as the teacher of a prompt of its own."""

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        self.check_rows(rollout["rows"])
        return super().per_token_logps(rollout)

    def hidden_states(self, rollout: dict[str, Any], read: ReadHiddenStates) -> HiddenStates:
        self.check_rows(rollout["rows"])
        return super().hidden_states(rollout, read)

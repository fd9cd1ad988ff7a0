"""What a teacher is: everything that the trainer asks of one."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerCallback

from ..grpo.hidden_states import HiddenStates
from .compatibility import ModelDescription


Score = Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor]
ReadHiddenStates = Callable[[torch.nn.Module, dict[str, Any]], HiddenStates]


class Teacher(TrainerCallback):
    """
    Knows how likely the sampled tokens are. `per_token_logps` is all that a teacher must have; the rest has defaults.

    Pass an instance as `teacher_model`. The trainer calls, in this order and on all ranks: `check` before it loads any
    model; `check_data` and `prepare` when the student is there; for each generation batch `start`, then its own scoring pass, then
    `per_token_logps`; `save_state` and `load_state` with checkpoints. A teacher is also a
    [`~transformers.TrainerCallback`] of the run: one whose weights follow the student's moves them in `on_step_end`.

    Example: a teacher that likes short words.

    ```python
    >>> class ShortWords(Teacher):
    ...     def __init__(self, tokenizer):
    ...         lengths = [len(tokenizer.decode([id])) for id in range(len(tokenizer))]
    ...         self.logps = (-torch.tensor(lengths, dtype=torch.float32)).log_softmax(-1)
    ...
    ...     def per_token_logps(self, rollout):
    ...         return self.logps.to(rollout["completion_ids"].device)[rollout["completion_ids"]]
    ```

    A *rollout* is the batch that `GRPOTrainer` makes of its samples: `prompt_ids` and `prompt_mask` `(B, P)`, left-padded;
    `completion_ids` and `completion_mask` `(B, T)`, right-padded; the vision inputs of the model family; and `rows`, the
    `B` rows of the data set, so that a teacher can read columns of its own. Every rank has the same `B`.

    Attributes:
        vocab_size (`int` or `None`): The teacher knows token ids below this; the trainer keeps transformers' generation
            from sampling others. `None`: it knows all of the student's.
        is_read_when_due (`bool`): Whether `hidden_states` are asked for a micro-batch at a time, when its loss is due, where they
            can be, and not for a generation batch, whose states wait in CPU memory. For models that stay where they are.
        names (`tuple[str, ...]`): Names of those that share the rows where this stands for several, see `route`.
        renders (`bool`): Whether it makes prompts of the `rows` by itself, and has `pieces`.
    """

    vocab_size: int | None = None
    is_read_when_due: bool = False
    names: tuple[str, ...] = ()
    renders: bool = False

    def callbacks(self) -> list[TrainerCallback]:
        """Who follows the run as a callback: this teacher."""
        return [self]

    def check(self, student: ModelDescription) -> None:
        """
        Compare with the student, before the weights of either are loaded.

        Args:
            student ([`ModelDescription`]): Its configurations and processing class.

        Raises:
            `ValueError`: if this teacher cannot score what the student samples.
        """

    def check_data(self, field: str, dataset: Any, has_prompt_fn: bool) -> None:
        """
        Look at a data set of the run, before it begins.

        Args:
            field (`str`): Argument of the trainer that it was passed as: `"train_dataset"`, `"eval_dataset"` or
                `"eval_dataset['name']"`.
            dataset: The data set, or `None`.
            has_prompt_fn (`bool`): Whether a `teacher_prompt_fn` writes the column `teacher_prompt` during the run.

        Raises:
            `ValueError`: if this teacher cannot teach from it.
        """

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        """
        Load and place what the teacher needs.

        Args:
            student ([`~transformers.PreTrainedModel`]): The student's model, before it is wrapped for training.
            accelerator ([`~accelerate.Accelerator`]): Accelerator of the trainer.
            score (`Callable`): `score(model, rollout)` gives the `(B, T)` log-probs, without gradient, of a rollout's
                completions under a model with TRL's fused LM head, in forward passes over real tokens. All ranks have
                to call it together, with the same `B`; the rollout may have other prompts and images than the student's.
        """

    def route(self, rows: list[dict[str, Any]]) -> list[int]:
        """The number in `names` of the teacher of each row, for metrics and whitening. Asked where there are names."""
        raise NotImplementedError(f"{type(self).__name__} has `names`, but no `route`.")

    def renders_rows(self, rows: list[dict[str, Any]]) -> list[bool]:
        """For each row whether its teacher `renders`; the others are given prompts in the student's ids."""
        return [self.renders] * len(rows)

    def start(self, rollout: dict[str, Any]) -> None:
        """Begin to score a rollout and return at once. For teachers elsewhere: the student is scored meanwhile."""

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """
        Log-probs of the sampled tokens.

        Args:
            rollout (`dict`): The batch that `start` was called with.

        Returns:
            `torch.Tensor` of shape `(B, T)`: log-probs in nats. NaN says that the teacher does not know the token, see
            `may_not_know`. Masked positions may hold anything.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `per_token_logps`.")

    def pieces(self, rollout: dict[str, Any]) -> torch.Tensor | None:
        """
        Which tokens have one score together, because the teacher knows them only so: `(B, T)` numbers below `T`, the same for
        the tokens of a piece, of which each is given an even share of its log-prob. `None`: each token has its own. Asked
        after `start`.
        """
        return None

    def may_not_know(self, rows: list[dict[str, Any]]) -> list[bool]:
        """
        For each row whether NaN is an answer. If so, the token leaves the loss and all statistics, and is counted in
        `teacher/unknown_tokens`; if not, it ends the run, as an infinite log-prob does. Models in this process know all
        tokens.
        """
        return [True] * len(rows)

    def hidden_states(self, rollout: dict[str, Any], read: ReadHiddenStates) -> HiddenStates:
        """
        What the teacher knows of all tokens of the vocabulary at the sampled positions, for `score_baseline="expected"` and
        `estimator="exact"`, which then ask for this instead of `per_token_logps`. A teacher that is a model in this process
        has its hidden states and its LM head; any other the likeliest tokens of its distributions, as
        [`~objective.likeliest.keep_likeliest`] makes them, with [`~objective.likeliest.LikeliestTokens`] as the head. One that
        leaves it out is refused for these two. Where NaN is an answer (`may_not_know`), it is one here, too.

        Args:
            rollout (`dict`): The batch that `start` was called with.
            read (`Callable`): `read(model, rollout)` gives the hidden states of a rollout's completions under a model, under
                the conditions of `score`.

        Returns:
            [`HiddenStates`]
        """
        raise NotImplementedError(f"{type(self).__name__} has no `hidden_states`.")

    def without_distributions(self) -> "Teacher | None":
        """This teacher, or one of those that it stands for, if it has no `hidden_states`."""
        return self if type(self).hidden_states is Teacher.hidden_states else None

    def identity(self) -> str:
        """
        Who this teacher is, in words that a warning can quote: what it said of a generation batch is used by a run that goes on
        with the same one, and left by others. Called on all ranks, after `prepare`.
        """
        return type(self).__name__

    def save_state(self, folder: str) -> None:
        """Write what changes during a run into the folder of a checkpoint. Called on all ranks."""

    def load_state(self, folder: str) -> None:
        """Read it back when a run goes on. Called on all ranks, after `prepare`."""

"""What the teacher reads: the student's prompts, or prompts of its own, before the completions that were sampled."""

from typing import Any

import torch
from accelerate.utils import gather

from .grpo.data_checks import by_argument
from .grpo.ranks import raised_on_all_ranks
from .grpo.rollouts import check_images_were_kept
from .teachers.prompt_fn import Completion, TeacherPromptFn, group_completions, write_prompts
from .teachers.prompts import TeacherPrompts


class QuestionsMixin:
    """
    Gives a trainer with a teacher that teacher's prompts: from the column `teacher_prompt` of the data, from
    `teacher_prompt_fn`, or else the student's.
    """

    teacher_prompt_fn: TeacherPromptFn | None
    _completions: tuple[Completion, ...] = ()  # of the rollout in progress, where that function is to see them

    def _begin_run(self):
        super()._begin_run()
        self._completions = ()

    def _question(self, mode: str, rollout: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The rollout as the teacher reads it, which has begun to."""
        with self.clock.phase("teacher_scoring"):
            rows = self._with_teacher_prompts(mode, rows)
            with raised_on_all_ranks():
                check_images_were_kept(rollout, self.max_completion_length)
                renders = self.teacher.renders_rows(rows) if self.teacher.renders else [False] * len(rows)
                nothing = {"teacher_prompt": None, "teacher_images": None}
                exchanged = [{**row, **nothing} if own else row for row, own in zip(rows, renders, strict=True)]
                question = {**self._teacher_prompts.exchange({**rollout, "rows": exchanged}), "rows": rows}
            self.teacher.start(question)
            pieces = self.teacher.pieces(question)
            if pieces is not None:
                rollout["pieces"] = pieces
        return question

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.teacher_prompt_fn is not None:
            columns = [k for k, function in enumerate(self.reward_funcs) if function is not self.stand_in]
            self._completions = group_completions(
                completion_ids_list,
                rewards[:, columns],
                [self.reward_func_names[k] for k in columns],
                self.num_generations if self.model.training else self.num_generations_eval,
                self._tokenizer,
            )
        return rewards

    def _with_teacher_prompts(self, mode: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, with the prompts that `teacher_prompt_fn` writes for what was sampled after them."""
        if self.teacher_prompt_fn is None:
            return rows
        completions, self._completions = self._completions, ()
        with raised_on_all_ranks():
            rows = write_prompts(self.teacher_prompt_fn, rows, list(completions))
        rows = self._with_open_pictures(rows)
        has_own = [float(row["teacher_prompt"] is not None) for row in rows]
        share = gather(torch.tensor(has_own, device=self.accelerator.device)).mean().item()
        self._metrics[mode]["teacher/own_prompts"].append(share)
        return rows

    def _prepare_questions(self) -> None:
        """Look at the data sets and the templates, before the run."""
        own_kwargs = self.args.teacher_chat_template_kwargs
        has_prompt_fn = self.teacher_prompt_fn is not None
        self._teacher_prompts = TeacherPrompts(
            self.processing_class,
            self.chat_template_kwargs,
            {**self.chat_template_kwargs, **(own_kwargs or {})},
            chat_template=self.chat_template,
            tools=self.tools,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        if self.args.remove_unused_columns and self.teacher.names:
            raise ValueError(
                "`teacher_model` has several teachers, but `remove_unused_columns` is True, which removes the column "
                "`teacher` that says whose a row is. Set it to False."
            )
        if self.teacher.renders and (self.tools or self.environment_factories is not None):
            which = "tools" if self.tools else "environment_factory"
            raise ValueError(
                f'`teacher_alignment` is "text" and `{which}` is set, but then completions hold turns in the student\'s chat '
                "template, which the teacher does not know. Train without, or choose a teacher of the student's model family."
            )
        for field, dataset in by_argument(self.train_dataset, self.eval_dataset).items():
            self.teacher.check_data(field, dataset, has_prompt_fn)
            has_environments = self.environment_factories is not None
            self._teacher_prompts.check_dataset(
                field, dataset, self.args.remove_unused_columns, has_environments, has_prompt_fn=has_prompt_fn
            )
        columns = getattr(self.train_dataset, "column_names", None)
        is_rendered = has_prompt_fn or columns is None or "teacher_prompt" in columns
        if own_kwargs is not None and not is_rendered:
            raise ValueError(
                f"`teacher_chat_template_kwargs` is {own_kwargs}, but `train_dataset` has no column `teacher_prompt` that "
                f"they would render, only {columns}. Add one, or unset them."
            )

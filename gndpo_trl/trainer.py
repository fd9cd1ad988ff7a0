"""GNDPO, from the rollout to the advantages."""

import textwrap
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from .config import GNDPOConfig
from .expectation import ExpectationMixin, check_teacher, looks_at_vocabulary
from .grpo.data_checks import by_argument
from .grpo.launch import check_final_save
from .grpo.rollouts import check_finite, check_images_were_kept, leave_out, valid_tokens
from .grpo.sampling import suppress_tokens
from .grpo.trainer import ExtendedGRPOTrainer
from .grpo.trl_hooks import get_config_model_id
from .grpo.vllm import check_sampling_logps
from .objective.advantages import clamp_scores, normalize, population_moments, token_scores
from .objective.distributions import Comparison
from .objective.mixture import mix_advantages
from .objective.scores import discounted_scores, extrapolated_scores, power_scores
from .run_warnings import RunWarnings
from .teacher_logs import TeacherLogsMixin
from .teachers import Teacher
from .teachers.compatibility import describe
from .teachers.from_config import Student, get_reference, get_teacher
from .teachers.prompt_fn import Completion, TeacherPromptFn, group_completions, write_prompts
from .teachers.prompts import TeacherPrompts
from .token_view.mixin import TokenViewMixin


class GNDPOTrainer(ExpectationMixin, TeacherLogsMixin, TokenViewMixin, ExtendedGRPOTrainer):
    """
    Trainer for Globally Normalized Distillation Policy Optimization (GNDPO), proposed in [Stabilizing On-Policy
    Distillation for MLLM Reasoning with Global Normalization](https://huggingface.co/papers/2606.09091).

    The student samples completions; a frozen teacher scores every sampled token; the score, `teacher log-prob - student
    log-prob`, is clamped and whitened over all valid tokens of the generation batch, on all ranks; the result is the
    token-level advantage of TRL's clipped policy-gradient loss. Everything else is [`~trl.GRPOTrainer`].

    The teacher reads the student's prompt, or the column `teacher_prompt` of the data where a row has one, see
    [`~teachers.prompts.TeacherPrompts`], or what `teacher_prompt_fn` writes after sampling.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from gndpo_trl import GNDPOConfig, GNDPOTrainer

    >>> trainer = GNDPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     teacher_model="Qwen/Qwen3-4B",
    ...     args=GNDPOConfig("qwen3-gndpo", num_generations=4, gradient_accumulation_steps=8),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        teacher_model (`str`, `PathLike`, [`~transformers.PreTrainedModel`], [`~teachers.Teacher`] or `dict`, *optional*):
            Teacher: a path, a model id, a loaded model, `"self"` for the student with a prompt of its own
            (`args.teacher_weights`), or anything else that scores tokens, see [`~teachers.Teacher`]. A dictionary of
            such teachers has each score the rows whose column `teacher` holds its name. May be omitted if
            `args.teacher_model_name_or_path` or `args.teacher_server_url` is set. Image-text students need an image-text
            teacher.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids and images mean the same to both
            models. If `None`, it is loaded from where the teacher came from.
        teacher_prompt_fn (`Callable`, *optional*):
            Writes the teacher's prompts after sampling, in training and evaluation: `teacher_prompt_fn(rows,
            completions)` gets this process's rows of the data set and a [`~teachers.Completion`] for each (its text, its
            rewards, the other completions of its prompt), and returns a list of as many prompts, as the column
            `teacher_prompt` would hold them. `None` keeps the student's prompt for a row.
        args ([`GNDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions. They are computed and logged as in [`~trl.GRPOTrainer`], and touch the advantages only
            with `args.reward_coef`. Without any, the teacher's mean score per completion is logged as the reward.

        All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: at construction, if there is no teacher or if it cannot score what the student samples; during a
            run, if the student returns non-finite log-probs or the teacher infinite ones.
        [`~grpo.checkpoints.RunCannotGoOn`]: during a run, with a checkpoint, if the teacher's servers do not answer.
    """

    _generation_arguments = (
        *ExtendedGRPOTrainer._generation_arguments,
        *("score_clip", "advantage_normalization", "std_floor", "use_sampling_logps", "score_baseline", "estimator"),
        *("teacher_weights", "distillation_coef", "reward_coef", "extrapolation", "score_power", "score_discount"),
    )
    _tag_names = ["trl", "gndpo"]
    _name = "GNDPO"
    _paper = {
        "title": "Stabilizing On-Policy Distillation for MLLM Reasoning with Global Normalization",
        "id": "2606.09091",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{hao2026stabilizing,
                title  = {{Stabilizing On-Policy Distillation for MLLM Reasoning with Global Normalization}},
                author = {Dongze Hao and Zhiwei Jin and Chen Chen and others},
                year   = 2026,
                eprint = {arXiv:2606.09091},
            }"""),
    }

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GNDPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
        teacher_model: str | PathLike | PreTrainedModel | Teacher | dict[str, Any] | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        teacher_prompt_fn: TeacherPromptFn | None = None,
    ):
        model = fspath(model) if isinstance(model, PathLike) else model
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GNDPOConfig(f"{model_name.split('/')[-1]}-GNDPO")
        check_arguments(args, rollout_func, teacher_model, teacher_prompt_fn)
        student = Student(model, processing_class, is_peft=peft_config is not None or isinstance(model, PeftModel))
        self.teacher = get_teacher(teacher_model, teacher_processing_class, args, student)
        check_teacher(self.teacher, args)
        self.reference = get_reference(self.teacher, args, student)
        self.teacher_prompt_fn = teacher_prompt_fn
        self._completions: list[Completion] = []  # of the rollout in progress, where that function is to see them
        model_kwargs = args.model_init_kwargs or {}
        revision = model_kwargs.get("revision")
        trust_remote_code = model_kwargs.get("trust_remote_code", args.trust_remote_code)
        description = describe("model", model, processing_class, revision, trust_remote_code)
        for scorer in self._scorers():
            scorer.check(description)

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if args.reward_coef != 0 and self.stand_in in self.reward_funcs:
            raise ValueError(
                f"`reward_coef` is {args.reward_coef}, but there is no reward. Pass `reward_funcs`, or leave it at 0."
            )
        self._teacher_prompts = self._get_teacher_prompts()
        for scorer in self._scorers():
            scorer.prepare(self.model, self.accelerator, self._per_token_logps)
            for callback in scorer.callbacks():
                self.add_callback(callback)
        self.add_callback(RunWarnings())
        vocab_size = self.model.config.get_text_config().vocab_size
        if self.teacher.vocab_size is not None and self.teacher.vocab_size < vocab_size and not self.use_vllm:
            # The student's vocabulary is padded further than the teacher's; the rows beyond are no tokens.
            suppress_tokens(self, range(self.teacher.vocab_size, vocab_size))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        # The student samples completions.
        rollout = super()._generate_and_score_completions(inputs)
        seconds = {"time/generation": self._generation_seconds}
        check_images_were_kept(rollout, self.max_completion_length)

        # The teacher and the student as it sampled, log pi_T and log pi_old of every sampled token.
        with self._timer(seconds, "time/teacher_scoring"):
            rows = self._with_teacher_prompts(mode, inputs)
            question = self._teacher_prompts.exchange({**rollout, "rows": rows})
            self.teacher.start(question)
        comparison = (
            self._compare_distributions(rollout, question, seconds) if looks_at_vocabulary(self.args) else None
        )
        student_logps = self._student_logps(rollout, comparison, seconds)
        teacher_logps = self._teacher_logps(question, comparison, seconds)
        unknown = teacher_logps.isnan() & valid_tokens(rollout)
        leave_out(rollout, unknown, gather)
        check_finite("teacher", teacher_logps, rollout, valid_tokens(rollout), self._tokenizer)

        # Scores in nats, clamped; vLLM has no log-prob for some tokens, which then enter no statistics.
        mask = valid_tokens(rollout) & student_logps.isfinite()
        reference_logps = self._reference_logps(rollout, inputs, seconds)
        scores, clamped = self._scores(teacher_logps, student_logps, reference_logps, mask)
        relative, population, variances = clamped, clamped, None
        if comparison is not None:
            relative, population, variances = self._population(clamped, mask, comparison)

        teachers = None
        if self.teacher.names:
            teachers = torch.tensor(self.teacher.route(inputs), device=mask.device)
        # Whitened over all valid tokens of the generation batch, on all ranks and in all accumulation steps.
        moments = population_moments(
            population,
            mask,
            normalization=self.args.advantage_normalization,
            num_generations=self.num_generations if mode == "train" else self.num_generations_eval,
            gather=gather,
            process_index=self.accelerator.process_index,
            variances=variances,
            teachers=teachers,
            num_teachers=len(self.teacher.names),
        )
        has_baseline = self.args.score_baseline is not None
        advantages, undefined = normalize(relative, mask, moments, self.args.std_floor, subtract_mean=not has_baseline)
        # TRL has put the advantages of the rewards there, one for each completion.
        reward_advantages = rollout["advantages"]
        if self._uses_sampling_logps():  # these are estimates for the logs then; the loss makes its own
            rollout["teacher_per_token_logps"] = teacher_logps
            rollout["reward_advantages"], rollout["reference_logps"] = reward_advantages, reference_logps
        if "teacher_per_token_logps" in rollout or "teacher_hidden_states" in rollout:
            rollout["score_moments"] = moments
        rollout["advantages"] = self._mix(advantages, reward_advantages, rollout)

        logps = (teacher_logps, student_logps)
        self._log_teacher(mode, rollout, seconds, scores, logps, undefined, unknown, mask, teachers)
        self._keep_token_rows(mode, rollout, scores, logps, mask)
        return rollout

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
        completions, self._completions = self._completions, []
        rows = write_prompts(self.teacher_prompt_fn, rows, completions)
        has_own = [float(row["teacher_prompt"] is not None) for row in rows]
        share = gather(torch.tensor(has_own, device=self.accelerator.device)).mean().item()
        self._metrics[mode]["teacher/own_prompts"].append(share)
        return rows

    def _scorers(self) -> list[Teacher]:
        is_another = self.reference is not None and self.reference is not self.teacher
        return [self.teacher, self.reference] if is_another else [self.teacher]

    def _get_teacher_prompts(self) -> TeacherPrompts:
        own_kwargs = self.args.teacher_chat_template_kwargs
        has_prompt_fn = self.teacher_prompt_fn is not None
        prompts = TeacherPrompts(
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
        for field, dataset in by_argument(self.train_dataset, self.eval_dataset).items():
            self.teacher.check_data(field, dataset, has_prompt_fn)
            has_environments = self.environment_factories is not None
            prompts.check_dataset(
                field, dataset, self.args.remove_unused_columns, has_environments, has_prompt_fn=has_prompt_fn
            )
        columns = getattr(self.train_dataset, "column_names", None)
        is_rendered = has_prompt_fn or columns is None or "teacher_prompt" in columns
        if own_kwargs is not None and not is_rendered:
            raise ValueError(
                f"`teacher_chat_template_kwargs` is {own_kwargs}, but `train_dataset` has no column `teacher_prompt` that "
                f"they would render, only {columns}. Add one, or unset them."
            )
        return prompts

    def _uses_sampling_logps(self) -> bool:
        # Evaluation may sample at another temperature, and a pass more costs little there.
        return self.args.use_sampling_logps and self.model.training

    def _teacher_logps(
        self, question: dict[str, Any], comparison: Comparison | None, seconds: dict[str, float]
    ) -> torch.Tensor:
        """Log-probs `(B, T)` of the sampled tokens under the teacher."""
        if comparison is not None:
            return comparison.teacher_logps
        with self._timer(seconds, "time/teacher_scoring"), torch.no_grad():
            return self.teacher.per_token_logps(question)

    def _student_logps(
        self, rollout: dict[str, Any], comparison: Comparison | None, seconds: dict[str, float]
    ) -> torch.Tensor:
        """Log-probs `(B, T)` of the sampled tokens under the student: the training engine's, or the sampler's."""
        if self._uses_sampling_logps():
            if "sampling_per_token_logps" not in rollout:
                raise ValueError(
                    "`use_sampling_logps` is True, but the sampler returned no log-probs. Have `rollout_func` return "
                    "`logprobs`, or switch it off."
                )
            return rollout["sampling_per_token_logps"]
        logps = rollout.get("old_per_token_logps")
        if logps is None:
            # Not for the loss: one optimizer step uses this batch, and TRL compares the loss's own log-probs then.
            if comparison is not None:
                logps = comparison.student_logps
            else:
                with self._timer(seconds, "time/student_scoring"):
                    logps = self._per_token_logps(self.model, rollout)
            self._watch_sampling_logps(rollout, logps)
        check_finite("student", logps, rollout, valid_tokens(rollout), self._tokenizer)
        return logps

    def _reference_logps(
        self, rollout: dict[str, Any], rows: list[dict[str, Any]], seconds: dict[str, float]
    ) -> torch.Tensor | None:
        """Log-probs `(B, T)` of the sampled tokens under the student before training, if scores need them."""
        if self.reference is None:
            return rollout["ref_per_token_logps"] if self.args.extrapolation != 1.0 else None
        with self._timer(seconds, "time/reference_scoring"), torch.no_grad():
            return self.reference.per_token_logps({**rollout, "rows": rows})

    def _scores(
        self,
        teacher_logps: torch.Tensor,
        student_logps: torch.Tensor,
        reference_logps: torch.Tensor | None,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw scores `(B, T)` in nats, and what is whitened: each clamped, or of probabilities, with what follows it."""
        args = self.args
        if reference_logps is None:
            scores = token_scores(teacher_logps, student_logps, mask)
        else:
            scores = extrapolated_scores(teacher_logps, student_logps, reference_logps, mask, args.extrapolation)
        if args.score_power == 0:
            clamped = clamp_scores(scores, mask, args.score_clip)
        else:
            clamped = power_scores(teacher_logps, student_logps, mask, args.score_power)
        if args.score_discount != 0:
            clamped = discounted_scores(clamped, args.score_discount).masked_fill(~mask, 0.0)
        return scores, clamped

    def _mix(self, advantages: torch.Tensor, rewards: torch.Tensor, rollout: dict[str, Any]) -> torch.Tensor:
        args = self.args
        return mix_advantages(advantages, rewards, valid_tokens(rollout), args.distillation_coef, args.reward_coef)

    def _adapt_loss_inputs(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if "teacher_per_token_logps" in inputs:  # `use_sampling_logps`: only the statistics are the sampler's
            mask = valid_tokens(inputs)
            check_finite("student", logps, inputs, mask, self._tokenizer)
            self._watch_sampling_logps(inputs, logps.detach())
            reference_logps = inputs["reference_logps"]
            _, clamped = self._scores(inputs["teacher_per_token_logps"], logps.detach(), reference_logps, mask)
            advantages, _ = normalize(clamped, mask, inputs["score_moments"], self.args.std_floor)
            inputs["advantages"] = self._mix(advantages, inputs["reward_advantages"], inputs)
        return super()._adapt_loss_inputs(logps, inputs)

    def _save_state(self, folder):
        super()._save_state(folder)
        self.teacher.save_state(folder)

    def _load_state(self, folder):
        super()._load_state(folder)
        self.teacher.load_state(folder)


def check_arguments(
    args: GNDPOConfig, rollout_func: Callable | None, teacher_model: Any, teacher_prompt_fn: Any
) -> None:
    """Raise before anything is loaded where the trainer's arguments cannot be meant so."""
    if not isinstance(args, GNDPOConfig):
        raise TypeError(
            f"`args` is a {type(args).__name__}, but GNDPOTrainer needs a GNDPOConfig: replace the class name, all "
            "fields of GRPOConfig are there."
        )
    if teacher_prompt_fn is not None and not callable(teacher_prompt_fn):
        raise TypeError(
            f"`teacher_prompt_fn` is {teacher_prompt_fn!r}, but has to be a function of rows and completions. Pass the "
            "function itself; prompts that are known before sampling go into the column `teacher_prompt`."
        )
    if args.save_strategy != "no":
        check_final_save(args)
    is_one = not isinstance(teacher_model, dict) and not getattr(teacher_model, "names", ())
    if args.advantage_normalization == "teacher" and is_one:
        raise ValueError(
            '`advantage_normalization` is "teacher", but there is one teacher only, for which that is "global". Set that, '
            "or pass several teachers as a dictionary."
        )
    if args.use_sampling_logps and not args.use_vllm and rollout_func is None:
        raise ValueError(
            "`use_sampling_logps` is True, but transformers' generation returns no log-probs. Set `use_vllm=True`, "
            "pass a `rollout_func` that returns `logprobs`, or switch it off."
        )
    if args.use_sampling_logps and rollout_func is None:
        check_sampling_logps(args)

"""GNDPO, from the rollout to the advantages."""

import copy
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
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
from .grpo.data_checks import by_argument
from .grpo.launch import check_final_save
from .grpo.ratio import SequenceTokenMixin
from .grpo.rollouts import check_finite, check_images_were_kept, leave_out, valid_tokens
from .grpo.sampling import suppress_tokens
from .grpo.trainer import ExtendedGRPOTrainer
from .grpo.trl_hooks import get_config_model_id
from .grpo.vllm import check_sampling_logps
from .objective.advantages import clamp_scores, normalize, population_moments, token_scores
from .objective.mixture import mix_advantages
from .objective.scores import discounted_scores, extrapolated_scores
from .teacher_logs import TeacherLogsMixin
from .teachers import InitialStudent, LocalTeacher, RoutedTeacher, SelfTeacher, Teacher
from .teachers.compatibility import describe
from .teachers.prompts import TeacherPrompts


class GNDPOTrainer(SequenceTokenMixin, TeacherLogsMixin, ExtendedGRPOTrainer):
    """
    Trainer for Globally Normalized Distillation Policy Optimization (GNDPO), proposed in [Stabilizing On-Policy
    Distillation for MLLM Reasoning with Global Normalization](https://huggingface.co/papers/2606.09091).

    The student samples completions; a frozen teacher scores every sampled token; the score, `teacher log-prob - student
    log-prob`, is clamped and whitened over all valid tokens of the generation batch, on all ranks; the result is the
    token-level advantage of TRL's clipped policy-gradient loss. Everything else is [`~trl.GRPOTrainer`].

    The teacher reads the student's prompt, or the column `teacher_prompt` of the data where a row has one, see
    [`~teachers.prompts.TeacherPrompts`].

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
            `args.teacher_model_name_or_path` is set. Image-text students need an image-text teacher.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids and images mean the same to both
            models. If `None`, it is loaded from where the teacher came from.
        args ([`GNDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions. They are computed and logged as in [`~trl.GRPOTrainer`], and touch the advantages only
            with `args.reward_coef`. Without any, the teacher's mean score per completion is logged as the reward.

        All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: at construction, if there is no teacher or if it cannot score what the student samples; during a
            run, if the student returns non-finite log-probs or the teacher infinite ones.
    """

    _generation_arguments = (
        *ExtendedGRPOTrainer._generation_arguments,
        *("score_clip", "advantage_normalization", "std_floor", "use_sampling_logps", "teacher_weights"),
        *("distillation_coef", "reward_coef", "extrapolation", "score_discount"),
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
    ):
        model = fspath(model) if isinstance(model, PathLike) else model
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GNDPOConfig(f"{model_name.split('/')[-1]}-GNDPO")
        check_arguments(args, rollout_func, teacher_model)
        student = Student(model, processing_class, is_peft=peft_config is not None or isinstance(model, PeftModel))
        self.teacher = get_teacher(teacher_model, teacher_processing_class, args, student)
        self.reference = get_reference(self.teacher, args, student)
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
        vocab_size = self.model.config.get_text_config().vocab_size
        if self.teacher.vocab_size is not None and self.teacher.vocab_size < vocab_size and not self.use_vllm:
            # The student's vocabulary is padded further than the teacher's; the rows beyond are no tokens.
            suppress_tokens(self, range(self.teacher.vocab_size, vocab_size))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode, seconds = "train" if self.model.training else "eval", {}
        # The student samples completions.
        rollout = super()._generate_and_score_completions(inputs)
        check_images_were_kept(rollout, self.max_completion_length)

        # The teacher and the student as it sampled, log pi_T and log pi_old of every sampled token.
        with self._timer(seconds, "time/teacher_scoring"):
            question = self._teacher_prompts.exchange({**rollout, "rows": inputs})
            self.teacher.start(question)
        student_logps = self._student_logps(rollout, seconds)
        with self._timer(seconds, "time/teacher_scoring"), torch.no_grad():
            teacher_logps = self.teacher.per_token_logps(question)
        unknown = teacher_logps.isnan() & valid_tokens(rollout)
        leave_out(rollout, unknown, gather)
        check_finite("teacher", teacher_logps, rollout, valid_tokens(rollout), self._tokenizer)

        # Scores in nats, clamped; vLLM has no log-prob for some tokens, which then enter no statistics.
        mask = valid_tokens(rollout) & student_logps.isfinite()
        reference_logps = self._reference_logps(rollout, inputs, seconds)
        scores, clamped = self._scores(teacher_logps, student_logps, reference_logps, mask)

        teachers = None
        if self.teacher.names:
            teachers = torch.tensor(self.teacher.route(inputs), device=mask.device)
        # Whitened over all valid tokens of the generation batch, on all ranks and in all accumulation steps.
        moments = population_moments(
            clamped,
            mask,
            normalization=self.args.advantage_normalization,
            num_generations=self.num_generations if mode == "train" else self.num_generations_eval,
            gather=gather,
            process_index=self.accelerator.process_index,
            teachers=teachers,
            num_teachers=len(self.teacher.names),
        )
        advantages, undefined = normalize(clamped, mask, moments, self.args.std_floor)
        # TRL has put the advantages of the rewards there, one for each completion.
        reward_advantages = rollout["advantages"]
        if self._uses_sampling_logps():  # these are estimates for the logs then; the loss makes its own
            rollout["teacher_per_token_logps"], rollout["score_moments"] = teacher_logps, moments
            rollout["reward_advantages"], rollout["reference_logps"] = reward_advantages, reference_logps
        rollout["advantages"] = self._mix(advantages, reward_advantages, rollout)

        logps = (teacher_logps, student_logps)
        self._log_teacher(mode, rollout, seconds, scores, logps, undefined, unknown, mask, teachers)
        return rollout

    def _scorers(self) -> list[Teacher]:
        is_another = self.reference is not None and self.reference is not self.teacher
        return [self.teacher, self.reference] if is_another else [self.teacher]

    def _get_teacher_prompts(self) -> TeacherPrompts:
        own_kwargs = self.args.teacher_chat_template_kwargs
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
            self.teacher.check_data(field, dataset)
            has_environments = self.environment_factories is not None
            prompts.check_dataset(field, dataset, self.args.remove_unused_columns, has_environments)
        columns = getattr(self.train_dataset, "column_names", None)
        if own_kwargs is not None and columns is not None and "teacher_prompt" not in columns:
            raise ValueError(
                f"`teacher_chat_template_kwargs` is {own_kwargs}, but `train_dataset` has no column `teacher_prompt` that "
                f"they would render, only {columns}. Add one, or unset them."
            )
        return prompts

    def _uses_sampling_logps(self) -> bool:
        # Evaluation may sample at another temperature, and a pass more costs little there.
        return self.args.use_sampling_logps and self.model.training

    def _student_logps(self, rollout: dict[str, Any], seconds: dict[str, float]) -> torch.Tensor:
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
        """Raw scores `(B, T)` in nats, and what is whitened: each clamped, with what follows it."""
        args = self.args
        if reference_logps is None:
            scores = token_scores(teacher_logps, student_logps, mask)
        else:
            scores = extrapolated_scores(teacher_logps, student_logps, reference_logps, mask, args.extrapolation)
        clamped = clamp_scores(scores, mask, args.score_clip)
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


@dataclass
class Student:
    """What a teacher that is the student itself is made from: the trainer's arguments."""

    model: str | PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
    is_peft: bool


def get_teacher(
    teacher_model: str | PathLike | PreTrainedModel | Teacher | dict[str, Any] | None,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: GNDPOConfig,
    student: Student,
) -> Teacher:
    """
    The teacher that the trainer's arguments and the configuration's `teacher_*` fields name.

    Raises:
        `ValueError`: if none is given, if it is given twice, or if options come with a teacher that has no use for them.
    """
    if teacher_model is None and args.teacher_model_name_or_path is None:
        raise ValueError(
            "No teacher. Pass `teacher_model` (a path, a model id, a loaded model or a `Teacher`) to the trainer, or set "
            "`teacher_model_name_or_path` in the configuration."
        )
    if teacher_model is not None and args.teacher_model_name_or_path is not None:
        raise ValueError(
            f"The teacher is given twice: `teacher_model` was passed to the trainer and `teacher_model_name_or_path` "
            f"is {args.teacher_model_name_or_path!r}. Keep one of them."
        )
    teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    teachers = list(teacher_model.values()) if isinstance(teacher_model, dict) else [teacher_model]
    if args.teacher_weights != "initial" and not any(is_self(teacher) for teacher in teachers):
        raise ValueError(
            f"`teacher_weights` is {args.teacher_weights!r}, but the teacher is a model of its own, whose weights stay. "
            'Unset it, or set `teacher_model` to "self".'
        )
    options = {
        "teacher_processing_class": teacher_processing_class,
        "teacher_model_revision": args.teacher_model_revision,
        "teacher_model_init_kwargs": args.teacher_model_init_kwargs,
        "teacher_offload": args.teacher_offload or None,
    }
    for name, value in options.items():
        if value is not None and all(isinstance(teacher, Teacher) for teacher in teachers):
            raise ValueError(
                f"`{name}` is set, but `teacher_model` is a {type(teachers[0]).__name__}, which decides that itself. Unset "
                "it."
            )
    if not isinstance(teacher_model, dict):
        return make_teacher(teacher_model, teacher_processing_class, args, student)
    for name in ("teacher_processing_class", "teacher_model_revision"):
        if options[name] is not None:
            raise ValueError(
                f"`{name}` is set, but `teacher_model` has several teachers, and it can only be that of one. Pass that one "
                "as a `LocalTeacher`, which takes it, and unset it here."
            )
    teachers = {name: make_teacher(teacher, None, args, student) for name, teacher in teacher_model.items()}
    return RoutedTeacher(teachers)


def is_self(teacher: Any) -> bool:
    return isinstance(teacher, str) and teacher == "self"


def make_teacher(
    teacher: str | PathLike | PreTrainedModel | Teacher,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: GNDPOConfig,
    student: Student,
) -> Teacher:
    if isinstance(teacher, Teacher):
        return teacher
    if is_self(teacher):
        return get_self_teacher(processing_class, args, student)
    return LocalTeacher(
        teacher,
        processing_class,
        revision=args.teacher_model_revision,
        init_kwargs=args.teacher_model_init_kwargs,
        trust_remote_code=args.trust_remote_code,
        offload=args.teacher_offload,
        cast_lm_head_to_fp32=args.cast_lm_head_to_fp32,
    )


def get_self_teacher(
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, args: GNDPOConfig, student: Student
) -> Teacher:
    """
    The student as its own teacher.

    Raises:
        `ValueError`: if options come with it that have no meaning for it, if it would not be scored at temperature 1, or
            if a copy of a student that ZeRO-3 has sharded already is asked for.
    """
    options = {
        "teacher_processing_class": teacher_processing_class,
        "teacher_model_revision": args.teacher_model_revision,
        "teacher_model_init_kwargs": args.teacher_model_init_kwargs,
    }
    for name, value in options.items():
        if value is not None:
            raise ValueError(f'`{name}` is set, but `teacher_model` is "self", which has the student\'s. Unset it.')
    if args.teacher_weights == "initial" and not student.is_peft:
        return get_initial_student(args, student)
    if args.teacher_offload and args.teacher_weights in ("initial", "live"):
        raise ValueError(
            f"`teacher_offload` is True, but with `teacher_weights={args.teacher_weights!r}` the teacher has no weights "
            "beside the student's. Unset it."
        )
    if args.temperature != 1.0:
        raise ValueError(
            f"`temperature` is {args.temperature}, but this teacher is scored through the student's own LM head, and "
            "teachers are scored at temperature 1. Set `temperature` to 1.0, or pass the student's path as `teacher_model` "
            "for a copy with a head of its own."
        )
    return SelfTeacher(
        args.teacher_weights, args.teacher_ema_decay, args.teacher_sync_steps, offload=args.teacher_offload
    )


def get_reference(teacher: Teacher, args: GNDPOConfig, student: Student) -> Teacher | None:
    """
    The student before training, for scores that need its log-probs; `None` where TRL's reference model has them.

    Raises:
        `ValueError`: as [`get_self_teacher`].
    """
    if args.extrapolation == 1.0 or args.beta != 0.0:
        return None
    if isinstance(teacher, InitialStudent) or (isinstance(teacher, SelfTeacher) and teacher.weights == "initial"):
        return teacher
    if not student.is_peft:
        return get_initial_student(args, student)
    if args.temperature != 1.0:
        raise ValueError(
            f"`temperature` is {args.temperature}, but with `extrapolation` ({args.extrapolation}) the base under the "
            "adapters is scored through the student's own LM head, and the scale is that of temperature 1. Set "
            "`temperature` to 1.0."
        )
    return SelfTeacher("initial")


def get_initial_student(args: GNDPOConfig, student: Student) -> InitialStudent:
    """A frozen copy of the student as it is before training, loaded as TRL loads the student."""
    model, init_kwargs = student.model, {"dtype": "float32", **(args.model_init_kwargs or {})}
    if not isinstance(model, str):
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "`model` is loaded and sharded by ZeRO-3 already, so that no copy of it can be made for the teacher. "
                "Pass its path or model id as `model`."
            )
        model, init_kwargs = copy.deepcopy(model), None
    return InitialStudent(
        model,
        student.processing_class,
        init_kwargs=init_kwargs,
        trust_remote_code=args.trust_remote_code,
        offload=args.teacher_offload,
        cast_lm_head_to_fp32=args.cast_lm_head_to_fp32,
    )


def check_arguments(args: GNDPOConfig, rollout_func: Callable | None, teacher_model: Any) -> None:
    """Raise before anything is loaded where the trainer's arguments cannot be meant so."""
    if not isinstance(args, GNDPOConfig):
        raise TypeError(
            f"`args` is a {type(args).__name__}, but GNDPOTrainer needs a GNDPOConfig: replace the class name, all "
            "fields of GRPOConfig are there."
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

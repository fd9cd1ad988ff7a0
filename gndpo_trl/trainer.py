"""GNDPO, from the rollout to the advantages."""

import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from typing import Any

import torch
from accelerate import PartialState
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

from .batch_logs import BatchLogsMixin, ScoredBatch
from .clock import Clock
from .config import GNDPOConfig
from .estimators import Estimator, Models, Reading
from .estimators.from_config import get_estimator
from .estimators.reading import check_says_something, settle
from .grpo.launch import check_final_save
from .grpo.loss_seam import SequenceTokenMixin
from .grpo.ranks import raised_on_all_ranks
from .grpo.rollouts import valid_tokens
from .grpo.sampling import stop_at, suppress_tokens
from .grpo.trainer import ExtendedGRPOTrainer
from .grpo.trl_hooks import get_config_model_id
from .grpo.vllm import check_sampling_logps
from .objective.advantages import Population, undefined_rows
from .objective.mixture import mix_advantages
from .objective.scores import Score
from .one_pass import OnePassMixin, SampledBatch
from .questions import QuestionsMixin
from .run_warnings import RunWarnings
from .teachers import Teacher
from .teachers.compatibility import describe
from .teachers.from_config import StudentArguments, get_reference, get_teacher
from .teachers.prompt_fn import TeacherPromptFn


class GNDPOTrainer(SequenceTokenMixin, OnePassMixin, QuestionsMixin, BatchLogsMixin, ExtendedGRPOTrainer):
    """
    Trainer for Globally Normalized Distillation Policy Optimization (GNDPO), proposed in [Stabilizing On-Policy
    Distillation for MLLM Reasoning with Global Normalization](https://huggingface.co/papers/2606.09091).

    The student samples completions; a frozen teacher scores every sampled token; the score, `teacher log-prob - student
    log-prob`, is clamped and whitened over all valid tokens of the generation batch, on all ranks; the result is the
    token-level advantage of TRL's clipped policy-gradient loss. Everything else is [`~trl.GRPOTrainer`].

    The teacher reads the student's prompt, or one of its own, see [`~teachers.prompts.TeacherPrompts`].

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
            `args.teacher_model_name_or_path` or `args.teacher_server_url` is set. Rows with images need an
            image-text teacher.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids and images mean the same to both
            models. If `None`, it is loaded from where the teacher came from.
        teacher_prompt_fn (`Callable`, *optional*):
            Writes the teacher's prompts after sampling, in training and evaluation: `teacher_prompt_fn(rows,
            completions)` gets this process's rows of the data set and a [`~teachers.Completion`] for each (its text, its
            rewards, the other completions of its prompt), and returns a list of as many prompts, as the column
            `teacher_prompt` would hold them. `None` keeps the student's prompt for a row.
        estimator ([`~estimators.Estimator`], *optional*):
            What the gradient at a sampled position looks at, in place of those that the configuration has names for.
        args ([`GNDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions. They are computed and logged as in [`~trl.GRPOTrainer`], and touch the advantages only
            with `args.reward_coef`. Without any, the teacher's mean score per completion is logged as the reward.

        All other arguments are those of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: at construction, if there is no teacher or if it cannot score what the student samples; during a
            run, on all ranks, if log-probs are not finite, see [`~estimators.reading.settle`].
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
        estimator: Estimator | None = None,
    ):
        model = fspath(model) if isinstance(model, PathLike) else model
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GNDPOConfig(f"{model_name.split('/')[-1]}-GNDPO")
        check_arguments(args, reward_funcs, rollout_func, teacher_model, teacher_prompt_fn)
        student = StudentArguments(
            model, processing_class, is_peft=peft_config is not None or isinstance(model, PeftModel)
        )
        self.teacher = get_teacher(teacher_model, teacher_processing_class, args, student)
        self.reference = get_reference(self.teacher, args, student)
        self._scorers = [self.teacher] if self.reference in (None, self.teacher) else [self.teacher, self.reference]
        self.teacher_prompt_fn = teacher_prompt_fn
        self.score = Score(args.score_clip, args.score_power, args.extrapolation, args.score_discount)
        self.population = population_of(args, self.teacher)
        self.mix = partial(mix_advantages, distillation_coef=args.distillation_coef, reward_coef=args.reward_coef)
        self.estimator = self.surrogate = get_estimator(estimator, args, self.score, self.population, self.mix)
        self.estimator.check(self.teacher)
        stop_ids = check_scorers(self._scorers, model, processing_class, args)

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
        self.clock = Clock(self.accelerator.device, self._begin_phase)
        self._prepare_questions()
        for scorer in self._scorers:
            scorer.prepare(self.model, self.accelerator, self._per_token_logps)
            for callback in scorer.callbacks():
                self.add_callback(callback)
        self.models = Models(self)
        self.estimator.prepare(self.models)
        self.add_callback(RunWarnings())
        suppress_padding_ids(self)
        stop_at(self, stop_ids)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        self.clock.start()
        # The student samples completions; the teacher reads them, after the same prompts or its own.
        rollout = super()._generate_and_score_completions(inputs)
        question = self._question(mode, rollout, inputs)
        batch = SampledBatch(mode, rollout, inputs)
        if self.estimator.waits_for_loss(rollout):
            # The passes of the loss read it, and advantages come after them: the same numbers, without a pass before.
            rollout.update(self.estimator.begin(rollout, question))
            self._leave_to_the_loss(batch)
        else:
            # log pi_T and log pi_old of every sampled token.
            self._set_advantages(batch, self.estimator.read(rollout, question))
        return rollout

    def _set_advantages(self, batch: SampledBatch, reading: Reading) -> torch.Tensor | None:
        """From log-probs to the advantages in the rollout, and their moments; logs both."""
        mode, rollout = batch.mode, batch.rollout
        # What is unknown leaves the loss.
        if reading.reference_logps is None:
            reading.reference_logps = self.models.reference_logps(rollout, batch.rows)
        mask = settle(rollout, reading, self.teacher.may_not_know(batch.rows), self._tokenizer)
        population = self._population_of(mode, batch.rows)
        vocab_size = self.model.config.get_text_config().vocab_size
        who = population.teachers, self.teacher.names
        check_says_something(reading.teacher_logps, rollout["completion_ids"], mask, vocab_size, *who)
        # Scores in nats, log pi_T - log pi_old, clamped.
        logps = (reading.teacher_logps, reading.student_logps, mask, reading.reference_logps)
        scores = self.score(*logps, rollout.get("pieces"))
        # Whitened over all valid tokens of the generation batch, on all ranks and in all accumulation steps.
        advantages, moments = self.estimator.advantages(scores, reading, mask, population)
        check_advantages(self.estimator, advantages, moments, mask)
        # TRL's loss takes them in the place of the rewards' advantages, one for each completion.
        rollout.update(self.estimator.for_the_loss(rollout, reading, moments))
        rollout["advantages"] = self.mix(advantages, rollout["advantages"], valid_tokens(rollout))
        undefined = undefined_rows(moments, advantages)
        self._report(ScoredBatch(mode, rollout, reading, scores.raw, mask, undefined, population.teachers))
        return moments

    def _generate(self, prompts: list):
        with self.clock.timing("generation"):
            return super()._generate(prompts)

    def _population_of(self, mode: str, rows: list[dict[str, Any]]) -> Population:
        """Whom the completions of these rows are compared with."""
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        with raised_on_all_ranks():
            teachers = torch.tensor(self.teacher.route(rows)) if self.teacher.names else None
        return replace(self.population, num_generations=num_generations, teachers=teachers)

    def _generation_depends_on(self):
        who = {"teacher": self.teacher.identity(), "kind of estimator": self.estimator.identity()}
        return super()._generation_depends_on() | who

    def _save_state(self, folder):
        super()._save_state(folder)
        for scorer in self._scorers:
            scorer.save_state(folder)
        self.estimator.save_state(folder)

    def _load_state(self, folder):
        super()._load_state(folder)
        for scorer in self._scorers:
            scorer.load_state(folder)
        self.estimator.load_state(folder)


def check_advantages(
    estimator: Estimator, advantages: torch.Tensor, moments: torch.Tensor | None, mask: torch.Tensor
) -> None:
    """Raise where an estimator's advantages are none for these tokens, which broadcasting would hide."""
    expected = {"advantages": (advantages, mask.shape), "moments": (moments, (len(mask), 3))}
    for name, (values, shape) in expected.items():
        if values is not None and values.shape != shape:
            raise ValueError(
                f"{type(estimator).__name__}.advantages returned {name} of shape {tuple(values.shape)}, for a batch that needs "
                f"{tuple(shape)}. Return (advantages, moments) as `Estimator.advantages` describes."
            )
    with raised_on_all_ranks():
        if not (advantages.isfinite() | ~mask).all():
            raise ValueError(
                f"{type(estimator).__name__}.advantages returned NaN or infinity for a valid token, of scores that are finite. "
                "Look at what it divides by."
            )


def population_of(args: GNDPOConfig, teacher: Teacher) -> Population:
    """Whom all completions are compared with, but for what a generation batch says of itself."""
    return Population(
        args.advantage_normalization,
        args.std_floor,
        num_teachers=len(teacher.names),
        gather=gather,
        process_index=PartialState().process_index,
    )


def suppress_padding_ids(trainer: GNDPOTrainer) -> None:
    """Keep a student whose vocabulary is padded further than its teacher's from sampling the rows beyond: no tokens."""
    known, vocab_size = trainer.teacher.vocab_size, trainer.model.config.get_text_config().vocab_size
    if known is not None and known < vocab_size:
        suppress_tokens(trainer, range(known, vocab_size))


def check_scorers(scorers: list[Teacher], model: Any, processing_class: Any, args: GNDPOConfig) -> set[int]:
    """
    Have teacher and reference compare themselves with the student, before the weights of any are loaded; the token ids that
    sampling has to stop at beside the student's own.
    """
    kwargs = args.model_init_kwargs or {}
    trust_remote_code = kwargs.get("trust_remote_code", args.trust_remote_code)
    description = describe("model", model, processing_class, kwargs.get("revision"), trust_remote_code)
    description.template_kwargs = args.chat_template_kwargs or {}
    own_kwargs = args.teacher_chat_template_kwargs or {}
    description.teacher_template_kwargs = {**description.template_kwargs, **own_kwargs}
    description.adopted_stop_ids = set() if args.stop_at_teacher_eos else None
    for scorer in scorers:
        scorer.check(description)
    return description.adopted_stop_ids or set()


def check_arguments(
    args: GNDPOConfig, reward_funcs: Any, rollout_func: Callable | None, teacher_model: Any, teacher_prompt_fn: Any
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
    if reward_funcs and args.reward_coef == 0:
        warnings.warn(
            "`reward_funcs` are computed and logged, but nothing is learned from them: `reward_coef` is 0. Set it to add their "
            "advantages to the teacher's.",
            stacklevel=3,
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

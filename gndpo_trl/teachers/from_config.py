"""The teacher that the trainer's arguments and the configuration name."""

import copy
from dataclasses import dataclass
from os import PathLike
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..config import GNDPOConfig
from .local import LocalTeacher
from .other_family import OtherFamily
from .routed import RoutedTeacher
from .self_teacher import InitialStudent, SelfTeacher
from .served.teacher import ServerTeacher
from .served.urls import are_one_server
from .teacher import Teacher


@dataclass
class StudentArguments:
    """What a teacher that is the student itself is made from: the trainer's arguments."""

    model: str | PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
    is_peft: bool


def get_teacher(
    teacher_model: str | PathLike | PreTrainedModel | Teacher | dict[str, Any] | None,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: GNDPOConfig,
    student: StudentArguments,
) -> Teacher:
    """
    The teacher that the trainer's arguments and the configuration's `teacher_*` fields name.

    Raises:
        `ValueError`: if none is given, if it is given twice, or if options come with a teacher that has no use for them.
    """
    named = {name: getattr(args, name) for name in ("teacher_model_name_or_path", "teacher_server_url")}
    named = {name: value for name, value in named.items() if value is not None}
    if teacher_model is None and not named:
        raise ValueError(
            "No teacher. Pass `teacher_model` (a path, a model id, a loaded model or a `Teacher`) to the trainer, or set "
            "`teacher_model_name_or_path` or `teacher_server_url` in the configuration."
        )
    if teacher_model is not None and named:
        raise ValueError(
            f"The teacher is given twice: `teacher_model` was passed to the trainer and `{next(iter(named))}` is "
            f"{next(iter(named.values()))!r}. Keep one of them."
        )
    if args.teacher_server_url is None:
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    teachers = list(teacher_model.values()) if isinstance(teacher_model, dict) else [teacher_model]
    if args.teacher_weights != "initial" and not any(is_self(teacher) for teacher in teachers):
        raise ValueError(
            f"`teacher_weights` is {args.teacher_weights!r}, but the teacher is a model of its own, whose weights stay. "
            'Unset it, or set `teacher_model` to "self".'
        )
    if is_self(teacher_model) and args.teacher_alignment != "ids":
        raise ValueError(
            f'`teacher_alignment` is {args.teacher_alignment!r}, but `teacher_model` is "self", which has the student\'s tokens. '
            "Unset it."
        )
    if args.teacher_server_url is not None:
        return get_server_teacher(teacher_processing_class, args)
    if args.teacher_server_model is not None:
        raise ValueError(
            f"`teacher_server_model` is {args.teacher_server_model!r}, but `teacher_server_url` is not set, so there is no "
            "server that it could be named to. Set the URL, or unset the name; a `ServerTeacher` takes it as `served_model`."
        )
    options = {
        "teacher_processing_class": teacher_processing_class,
        "teacher_model_revision": args.teacher_model_revision,
        "teacher_model_init_kwargs": args.teacher_model_init_kwargs,
        "teacher_offload": args.teacher_offload or None,
        "teacher_top_k": args.teacher_top_k,
        "teacher_alignment": None if args.teacher_alignment == "ids" else args.teacher_alignment,
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
    student: StudentArguments,
) -> Teacher:
    if isinstance(teacher, ServerTeacher):
        check_not_sampled_from(teacher, args)
    if isinstance(teacher, Teacher):
        return teacher
    if is_self(teacher):
        return get_self_teacher(processing_class, args, student)
    local = LocalTeacher(
        teacher,
        processing_class,
        revision=args.teacher_model_revision,
        init_kwargs=args.teacher_model_init_kwargs,
        offload=args.teacher_offload,
        cast_lm_head_to_fp32=args.cast_lm_head_to_fp32,
        max_completion_length=args.max_completion_length,
        top_k=args.teacher_top_k,
    )
    return OtherFamily(local) if args.teacher_alignment == "text" else local


def get_server_teacher(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, args: GNDPOConfig
) -> Teacher:
    init_kwargs = dict(args.teacher_model_init_kwargs or {})
    trust_remote_code = init_kwargs.pop("trust_remote_code", False)  # of the tokenizer, which is loaded here
    for name, value in {"teacher_model_init_kwargs": init_kwargs, "teacher_offload": args.teacher_offload}.items():
        if value:
            raise ValueError(
                f"`{name}` is set, but the teacher runs behind `teacher_server_url`, which decides that itself. Unset it."
            )
    if is_self(args.teacher_model_name_or_path):
        raise ValueError(
            '`teacher_model_name_or_path` is "self", but the teacher runs behind `teacher_server_url`. Keep one of them.'
        )
    teacher = ServerTeacher(
        args.teacher_server_url,
        processing_class,
        served_model=args.teacher_server_model,
        model=args.teacher_model_name_or_path,
        revision=args.teacher_model_revision,
        trust_remote_code=trust_remote_code,
        max_completion_length=args.max_completion_length,
        timeout=args.teacher_server_timeout,
        top_k=args.teacher_top_k,
    )
    check_not_sampled_from(teacher, args)
    return OtherFamily(teacher) if args.teacher_alignment == "text" else teacher


def check_not_sampled_from(teacher: ServerTeacher, args: GNDPOConfig) -> None:
    """Raise `ValueError` if a server of the teacher is the one that gets the student's weights."""
    if not args.use_vllm or args.vllm_mode != "server":
        return
    sampler = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    for url in teacher.urls:
        if are_one_server(url, sampler):
            raise ValueError(
                f"`teacher_server_url` has {url!r}, where the student is sampled from (`vllm_server_base_url`, or host and "
                f"port: {sampler!r}): it gets the student's weights, so the student would be its own teacher. Serve the "
                "teacher at another URL: another machine, port or path."
            )


def get_self_teacher(
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: GNDPOConfig,
    student: StudentArguments,
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
    if args.teacher_offload and args.teacher_weights == "live":
        raise ValueError(
            "`teacher_offload` is True, but with `teacher_weights='live'` the teacher has no weights beside the student's. "
            "Unset it."
        )
    if args.temperature != 1.0:
        raise ValueError(
            f"`temperature` is {args.temperature}, but this teacher is scored through the student's own LM head, and "
            "teachers are scored at temperature 1. Set `temperature` to 1.0, or pass the student's path as `teacher_model` "
            "for a copy with a head of its own."
        )
    return SelfTeacher(
        args.teacher_weights,
        args.teacher_ema_decay,
        args.teacher_sync_steps,
        offload=args.teacher_offload,
        top_k=args.teacher_top_k,
    )


def get_reference(teacher: Teacher, args: GNDPOConfig, student: StudentArguments) -> Teacher | None:
    """
    The student as it is when training starts, for scores that need its log-probs; `None` where TRL's reference model is it.

    Raises:
        `ValueError`: as [`get_self_teacher`], and if student and teacher would not be scored at one temperature.
    """
    if args.extrapolation == 1.0:
        return None
    if args.temperature != 1.0:
        raise ValueError(
            f"`temperature` is {args.temperature}, but `extrapolation` ({args.extrapolation}) compares the start of the student "
            "with the teacher and with the student, and those are scored at temperature 1 and at that of sampling. Set "
            "`temperature` to 1.0."
        )
    # TRL's may be another model: the base of a student with adapters, a checkpoint from before what was done to a loaded
    # model, or, synchronized, a later student.
    if args.beta != 0.0 and isinstance(student.model, str) and not student.is_peft and not args.sync_ref_model:
        return None
    if isinstance(teacher, InitialStudent) or (isinstance(teacher, SelfTeacher) and teacher.weights == "initial"):
        return teacher
    return SelfTeacher("initial") if student.is_peft else get_initial_student(args, student)


def get_initial_student(args: GNDPOConfig, student: StudentArguments) -> InitialStudent:
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
        top_k=args.teacher_top_k,
    )

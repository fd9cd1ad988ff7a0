"""Who scores the student's samples, and whether it can."""

from ..grpo.hidden_states import HiddenStates
from ..objective.likeliest import LikeliestTokens, keep_likeliest
from .local import LocalTeacher
from .other_family import OtherFamily
from .prompt_fn import Completion, TeacherPromptFn
from .routed import RoutedTeacher
from .self_teacher import InitialStudent, SelfTeacher
from .served.teacher import ServerTeacher
from .teacher import Teacher


__all__ = [
    "Completion",
    "HiddenStates",
    "InitialStudent",
    "LikeliestTokens",
    "LocalTeacher",
    "OtherFamily",
    "RoutedTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "Teacher",
    "TeacherPromptFn",
    "keep_likeliest",
]

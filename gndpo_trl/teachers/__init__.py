"""Who scores the student's samples, and whether it can."""

from .local import LocalTeacher
from .prompt_fn import Completion, TeacherPromptFn
from .routed import RoutedTeacher
from .self_teacher import InitialStudent, SelfTeacher
from .served.teacher import ServerTeacher
from .teacher import Teacher


__all__ = [
    "Completion",
    "InitialStudent",
    "LocalTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "ServerTeacher",
    "Teacher",
    "TeacherPromptFn",
]

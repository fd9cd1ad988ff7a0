"""Who scores the student's samples, and whether it can."""

from .local import LocalTeacher
from .self_teacher import InitialStudent, SelfTeacher
from .teacher import Teacher


__all__ = ["InitialStudent", "LocalTeacher", "SelfTeacher", "Teacher"]

"""Who scores the student's samples, and whether it can."""

from .local import LocalTeacher
from .teacher import Teacher


__all__ = ["LocalTeacher", "Teacher"]

"""Who scores the student's samples, and whether it can."""

from .local import LocalTeacher
from .server import ServerTeacher
from .teacher import Teacher


__all__ = ["LocalTeacher", "ServerTeacher", "Teacher"]

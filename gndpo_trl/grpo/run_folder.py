"""The folder that a run writes to: held by one run at a time, and no longer than it has room."""

import errno
import fcntl
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from accelerate import Accelerator
from accelerate.utils import gather_object


PROBE = 2**20  # bytes that a disk with room takes
LOCK = "_run.lock"  # with an underscore, which keeps it out of what transformers pushes to the Hub


@contextmanager
def held_by_one_run(folder: str, accelerator: Accelerator) -> Iterator[None]:
    """
    Hold a folder while a run writes to it; called on all ranks.

    Raises:
        `RuntimeError`: on all ranks, if another run holds it, or if it cannot be written to.
    """
    file, refusal = None, None
    if accelerator.is_main_process:
        try:
            file = lock(folder)
        except OSError as error:
            refusal = f"`output_dir` ({folder}) cannot be written to: {error}."
        except RuntimeError as error:
            refusal = str(error)
    refusal = gather_object([refusal])[0]
    if refusal is not None:
        raise RuntimeError(refusal)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def lock(folder: str) -> TextIO:
    """
    Lock a folder until the file that is returned is closed, or this process is no more, however it ended.

    Raises:
        `OSError`: if there can be no such file.
        `RuntimeError`: if another process holds it.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")
    try:
        # Not `flock`: the workers of a data loader would inherit that, and hold it for a while when their run has died.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            with file:
                file.seek(0)
                holder = file.read().strip()
            raise RuntimeError(
                f"Another run is writing to `output_dir` ({folder}): {holder or 'its name is not known'}. Their checkpoints would "
                "become mixed up. Give this run a folder of its own, or end the other one."
            ) from None
        warnings.warn(
            f"The file system of `output_dir` ({folder}) has no locks ({error}): nothing keeps a second run from writing "
            "there. Make sure that there is none."
        )
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class DiskFull(OSError):
    """Raised in the place of whatever a library says when there is no room for what it writes."""


FULL = (errno.ENOSPC, errno.EDQUOT)


def why_not_written(error: BaseException, folder: str) -> int | None:
    """
    What the system has against writing to a folder (a number of `errno`), where that is the cause of an error.

    Where torch writes a file, what the system said is lost ("unexpected pos 57664"), and what safetensors says of it is a
    text. The disk itself is asked then: a quota is no part of what it says is free, so that a little is written to it.
    """
    cause = error
    while cause is not None:
        for number in FULL:
            if getattr(cause, "errno", None) == number or f"os error {number})" in str(cause):
                return number
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, OSError | RuntimeError):
        return None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        return refusal.errno
    return None

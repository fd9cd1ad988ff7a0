"""SIGTERM and Ctrl-C in a run of several processes: one decision, taken by all of them at the end of the same step."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


logger = logging.getLogger(__name__)


class AgreedJITCheckpointCallback(JITCheckpointCallback):
    """
    transformers' `enable_jit_checkpoint`, with the ranks in agreement, and for Ctrl-C (SIGINT) too.

    There, every process starts a timer of its own when the signal arrives and saves at the next point of the loop that
    it reaches after that, so that one rank can enter the collectives of saving while another enters those of training,
    and the job hangs. Here the ranks compare notes at the end of every optimizer step, and only there: a signal that
    reaches one of them ends all.

    Attributes:
        ended_by (`signal.Signals`, *optional*): The signal that has ended the run in progress, which is saved.
    """

    ended_by: signal.Signals | None = None
    _has_ctrl_c = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.ended_by = None
        # transformers takes its handler back after a run; this may be another one.
        if signal.getsignal(signal.SIGTERM) != self.jit_manager._sigterm_handler:
            self.jit_manager.setup_signal_handler()

    def is_asked(self) -> bool:
        """Whether this process has been told to end with a checkpoint."""
        return self._has_ctrl_c or self.jit_manager.is_checkpoint_requested

    @contextmanager
    def minding_ctrl_c(self) -> Iterator[None]:
        """Have the first Ctrl-C in here end the run with a checkpoint, and the second one end it at once."""
        self._has_ctrl_c = False
        before = signal.getsignal(signal.SIGINT)
        # Only the main thread may say what a signal does; and who starts jobs in the background may have it ignored.
        if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
            yield
            return
        self._process = os.getpid()
        signal.signal(signal.SIGINT, self._on_ctrl_c)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_ctrl_c(self, number, frame):
        if os.getpid() != self._process:  # a worker of the data loader, which the terminal sends it to as well
            return
        if self._has_ctrl_c:
            raise KeyboardInterrupt
        self._has_ctrl_c = True
        logger.warning("Ctrl-C: the run ends after this step, with a checkpoint. Press it again to end it at once.")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass

    def on_step_begin(self, args, state, control, **kwargs):
        pass

    def on_epoch_end(self, args, state, control, **kwargs):
        pass

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor([[self.jit_manager.is_checkpoint_requested, self._has_ctrl_c]], device=args.device)
        has_sigterm, has_ctrl_c = gather(asked).any(0).tolist()
        self.jit_manager.is_checkpoint_requested = False
        if has_sigterm or has_ctrl_c:
            self.ended_by = signal.SIGTERM if has_sigterm else signal.SIGINT
            # Saved by the loop, after the callbacks that come after this one: a teacher's weights may follow the student's.
            # And before whatever kills a process that is slow to end: without an evaluation.
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

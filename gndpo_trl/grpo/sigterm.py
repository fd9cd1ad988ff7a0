"""SIGTERM in a run of several processes: one decision, taken by all of them at the end of the same step."""

import signal

import torch
from accelerate.utils import gather
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class AgreedJITCheckpointCallback(JITCheckpointCallback):
    """
    transformers' `enable_jit_checkpoint`, with the ranks in agreement.

    There, every process starts a timer of its own when the signal arrives and saves at the next point of the loop that
    it reaches after that, so that one rank can enter the collectives of saving while another enters those of training,
    and the job hangs. Here the ranks compare notes at the end of every optimizer step, and only there.

    Attributes:
        has_saved (`bool`): Whether a signal has ended the run in progress.
    """

    has_saved = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_saved = False
        # transformers takes its handler back after a run; this may be another one.
        if signal.getsignal(signal.SIGTERM) != self.jit_manager._sigterm_handler:
            self.jit_manager.setup_signal_handler()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass

    def on_step_begin(self, args, state, control, **kwargs):
        pass

    def on_epoch_end(self, args, state, control, **kwargs):
        pass

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor([int(self.jit_manager.is_checkpoint_requested)], device=args.device)
        self.jit_manager.is_checkpoint_requested = self.has_saved = bool(gather(requested).any())
        super().on_step_end(args, state, control, **kwargs)

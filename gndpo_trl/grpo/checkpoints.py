"""Runs that begin clean, and checkpoints that are whole or absent and hold what a `GRPOTrainer` needs to go on exactly."""

import json
import os
import re
import signal
import warnings
from contextlib import contextmanager, nullcontext
from glob import glob
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.serialization import default_restore_location
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .run_folder import FULL, DiskFull, held_by_one_run, why_not_written
from .sigterm import AgreedJITCheckpointCallback, JITCheckpointCallback
from .trl_hooks import ENTROPY_STATE_NAME, TRAINER_STATE_NAME


logger = get_logger(__name__)

BUFFER = "generation_buffer_{}.pt"  # one for each rank


class RunCannotGoOn(RuntimeError):
    """Raised on all ranks together before a generation batch is trained on: the run saves what it has, and ends."""


class CheckpointMixin:
    """
    Makes the checkpoints of a [`~trl.GRPOTrainer`] ones that a run can go on from, and each call of `train` a run of its own.

    - Whatever an earlier run of the same trainer left, however it ended, is gone when `train` begins; weights and optimizer
      stay.
    - TRL generates once for `steps_per_generation * num_iterations` micro-batches. A checkpoint in between would resume
      with other completions and out of step with the sampler, so the rest of the generation batch goes with it. It is
      used again if everything that it depends on is the same; else all ranks leave it, with a warning that says why.
    - `trainer_state.json` is written when everything else is there. A folder without it is no checkpoint:
      `resume_from_checkpoint=True` takes the last one that is whole.
    - A folder has the checkpoints of one run: a run that would save into one with another's, or while another run does, is
      refused.
    - `enable_jit_checkpoint` saves on SIGTERM or Ctrl-C at the end of the same step on all ranks, and then ends the process:
      what would come after `train` is for a run that is over. Whatever ends a run, its last words say what it has left; the
      card of a model that is saved before the end says so.
    - A disk that is full while a checkpoint or a result is written is called that, in a [`DiskFull`].
    - A run that ends by a [`RunCannotGoOn`] saves its last step first, whatever `save_strategy` says.
    - A run that goes on in a later epoch reads the prompts of that epoch, each once; TRL's sampler would begin with those of
      the first. One that is resumed after its last step makes no other.
    - Weights keep the names that they were loaded from.
    """

    # Arguments that decide what is in a generation batch, beside the number of processes.
    _generation_arguments = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
        "num_generations",
        "max_completion_length",
        "mask_truncated_completions",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
        "chat_template_kwargs",
        "scale_rewards",
        "reward_weights",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
    )

    _on_signal: AgreedJITCheckpointCallback | None = None
    _saves_entropy = False  # in the checkpoint that is being written
    _train_sampler = None  # of the run in progress; streams have none

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.enable_jit_checkpoint:
            self._on_signal = AgreedJITCheckpointCallback()
            self._on_signal.jit_manager = self.pop_callback(JITCheckpointCallback).jit_manager
            self.add_callback(self._on_signal)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        output_dir = self.args.output_dir
        with held_by_one_run(output_dir, self.accelerator) if self._saves_checkpoints() else nullcontext():
            checkpoint = self._checkpoint_to_go_on_from(resume_from_checkpoint)
            self._begin_run()
            try:
                with nullcontext() if self._on_signal is None else self._on_signal.minding_ctrl_c():
                    output = super().train(checkpoint, *args, **kwargs)
            except RunCannotGoOn as reason:
                if self.state.global_step != self._saved_step:
                    self._save_checkpoint(self.model_wrapped, trial=None)
                if self.state.global_step == 0:
                    raise
                raise RunCannotGoOn(
                    f"{reason} The run ended after step {self.state.global_step}, which is saved in {output_dir!r}: "
                    "go on with `resume_from_checkpoint=True`."
                ) from reason
            except KeyboardInterrupt as interrupt:
                for callback in self.callback_handler.callbacks:
                    if getattr(callback, "training_bar", None) is not None:
                        callback.training_bar.close()  # which would be drawn again after the last words
                raise KeyboardInterrupt(self._what_is_left()) from interrupt
        ended_by = None if self._on_signal is None else self._on_signal.ended_by
        if ended_by is not None and not self._is_done():
            words = (
                f"{'Ctrl-C' if ended_by == signal.SIGINT else ended_by.name} ended the run after step {self.state.global_step} "
                f"of {self.state.max_steps}, which is saved in {output_dir!r}. It is not finished: go on with "
                "`resume_from_checkpoint=True`."
            )
            if ended_by == signal.SIGINT:  # which a notebook survives
                raise KeyboardInterrupt(words)
            logger.warning(words)
            raise SystemExit(128 + ended_by)
        if self._is_done() and self._saved_step not in (0, self.state.global_step):  # its card is not of the result
            self.create_model_card(model_name=os.path.basename(self.args.hub_model_id or output_dir))
        return output

    def _what_is_left(self) -> str:
        """Last words of a run that Ctrl-C has ended wherever it was."""
        end = (
            f"Ctrl-C ended the run in step {self.state.global_step + 1} of {self.state.max_steps}: it is not finished."
        )
        whole = list(whole_checkpoints(self.args.output_dir).values())
        if not whole:
            return f"{end} There is no checkpoint of it. With `enable_jit_checkpoint=True`, Ctrl-C saves one."
        return f"{end} Its last whole checkpoint is {whole[-1]!r}: go on with `resume_from_checkpoint=True`."

    def _saves_checkpoints(self) -> bool:
        return self.args.save_strategy != "no" or self.args.enable_jit_checkpoint

    def _checkpoint_to_go_on_from(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """
        What `train` resumes from, in a folder that is fit for it; called on all ranks.

        Raises:
            `ValueError`: on all ranks, if there is no such checkpoint, or if the folder has those of another run.
        """
        checkpoint, refusal = resume_from_checkpoint, None
        if self.accelerator.is_main_process:
            try:
                if checkpoint is True:
                    checkpoint = last_whole_checkpoint(self.args.output_dir)
                elif isinstance(checkpoint, str) and not is_whole(checkpoint):
                    raise ValueError(
                        f"`resume_from_checkpoint` is {checkpoint!r}, which is no whole checkpoint: it has no readable "
                        f"`{TRAINER_STATE_NAME}`, so the run that wrote it ended before it was done. Name an earlier "
                        "one, or say `True` for the last one that is whole."
                    )
                self._check_folder(checkpoint)
            except ValueError as error:
                refusal = str(error)
        checkpoint, refusal = gather_object([(checkpoint, refusal)])[0]
        if refusal is not None:
            raise ValueError(refusal)
        return checkpoint

    def _check_folder(self, checkpoint: str | bool | None) -> None:
        """Raise `ValueError`, or warn, where `output_dir` has checkpoints that a run from this one would mix with its own."""
        folder = self.args.output_dir
        there = whole_checkpoints(folder)
        if not there:
            return
        if checkpoint and os.path.realpath(os.path.dirname(os.path.abspath(checkpoint))) == os.path.realpath(folder):
            begins_at = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
            later = [os.path.basename(path) for step, path in there.items() if step > begins_at]
            if later:
                warnings.warn(
                    f"`output_dir` ({folder}) has later checkpoints than the one that this run goes on from: "
                    f"{', '.join(later)}. Until it has passed them, `resume_from_checkpoint=True` would take those: move "
                    "them elsewhere, or name the checkpoint whenever you resume."
                )
            return
        names = ", ".join(os.path.basename(path) for path in there.values())
        found = f"`output_dir` ({folder}) has the checkpoints of another run ({names})"
        if not self._saves_checkpoints():
            warnings.warn(f"{found}, which `resume_from_checkpoint=True` would take for this one's.")
        elif self.state.global_step > 0:
            raise ValueError(
                f"`output_dir` ({folder}) has the checkpoints of this trainer's last run ({names}), which another would "
                "overwrite or leave among its own. To train for longer, raise `trainer.args.max_steps` or "
                "`trainer.args.num_train_epochs` and call `trainer.train(resume_from_checkpoint=True)`; to begin again with "
                "the weights as they are now, set `trainer.args.output_dir` to another folder."
            )
        else:
            raise ValueError(
                f"{found}: a run that begins anew would overwrite some, and `resume_from_checkpoint=True` might go on from "
                "the others. Go on from them with `resume_from_checkpoint=True`, choose another `output_dir`, or remove them."
            )

    def _begin_run(self) -> None:
        """
        Forget what an earlier run of this trainer left; called on all ranks, before anything of a checkpoint is read. Whoever
        keeps something from one step to the next has it reset here.
        """
        self._saved_step = 0  # the last one of this run of which there is a checkpoint
        self._step, self._buffered_inputs, self._current_train_step_time = 0, None, 0.0
        for logged in (*self._metrics.values(), *self._logs.values(), self._pending_metrics, self._pending_extra_logs):
            logged.clear()

    def _save_state(self, folder: str) -> None:
        """Write what else a run needs to go on into a checkpoint that is being saved; called on all ranks."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            state = {
                "step": self._step,
                "inputs": self._buffered_inputs,
                "depends_on": self._generation_depends_on(),
            }
            torch.save(state, self._buffer_file(folder))
        if self._saves_entropy and self.args.should_save:
            state = {"entropy_coef": self.entropy_coef, "last_world_entropy": self._last_world_entropy}
            with open(os.path.join(folder, ENTROPY_STATE_NAME), "w", encoding="utf-8") as file:
                json.dump(state, file)

    def _load_state(self, folder: str) -> None:
        """Read it back; called on all ranks."""
        reason, now = None, self._generation_depends_on()  # which ranks find out together
        if os.path.exists(self._buffer_file(folder)):
            buffer = torch.load(self._buffer_file(folder), map_location=self._back_home, weights_only=True)
            then = buffer.get("depends_on", {})
            # Of what an earlier version did not compare, nothing is known; one that compared nothing is left.
            changes = [
                f"`{name}` was {then[name]}, is {now[name]}"
                for name in now.keys() & then.keys()
                if then[name] != now[name]
            ]
            reason = ", ".join(sorted(changes)) or (None if then else "it does not say what they depend on")
        elif glob(os.path.join(folder, BUFFER.format("*"))):
            reason = f"it was saved by fewer than {self.accelerator.num_processes} processes"
        else:
            buffer = None
        reasons = [reason for reason in gather_object([reason]) if reason is not None]
        if reasons:
            if self.accelerator.is_main_process:
                warnings.warn(
                    f"The checkpoint {folder!r} holds completions for the steps that follow, but not for this run "
                    f"({reasons[0]}). They are left, and new ones are generated for the same prompts."
                )
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        elif buffer is not None:
            self._step = buffer["step"]
            self._buffered_inputs = buffer["inputs"]

    def _back_home(self, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        """Tensors on this process's device, but those that a rollout keeps in CPU memory, as `torch.load` asks for them."""
        return default_restore_location(storage, "cpu" if location == "cpu" else str(self.accelerator.device))

    def _generation_depends_on(self) -> dict[str, Any]:
        """
        What the rest of a generation batch depends on, by the names that a warning calls it by; called on all ranks. Plain
        types alone: it is saved with the batch, and compared.
        """
        return {
            "number of processes": self.accelerator.num_processes,
            "kind of device": self.accelerator.device.type,
            "reference model": self.beta != 0.0,
            **{name: plain(getattr(self.args, name)) for name in self._generation_arguments},
        }

    def _buffer_file(self, folder: str) -> str:
        return os.path.join(folder, BUFFER.format(self.accelerator.process_index))

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # what an earlier run left there would make it look whole
            for path in (os.path.join(folder, TRAINER_STATE_NAME), *glob(os.path.join(folder, BUFFER.format("*")))):
                if os.path.exists(path):
                    os.remove(path)
        self.accelerator.wait_for_everyone()
        # TRL would write it when the checkpoint is whole already.
        self._saves_entropy, self.use_adaptive_entropy = self.use_adaptive_entropy, False
        try:
            with self._saying_what_the_disk_has(self.args.output_dir):
                super()._save_checkpoint(model, trial)
        finally:
            self.use_adaptive_entropy = self._saves_entropy
        self._saved_step = self.state.global_step

    def save_model(self, output_dir=None, _internal_call=False):
        with self._saying_what_the_disk_has(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.accelerator.is_main_process and not self._is_done():
            with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(
                    f"\n## Not the end of its run\n\nThe model has made {self.state.global_step} of {self.state.max_steps} "
                    "steps; the run had not ended when it was saved.\n"
                )

    @contextmanager
    def _saying_what_the_disk_has(self, folder: str):
        try:
            yield
        except DiskFull:
            raise
        except Exception as error:
            number = why_not_written(error, folder)
            if number is None:
                raise
            whole = list(whole_checkpoints(self.args.output_dir).values())
            remedy = (
                f"The last whole checkpoint is {whole[-1]!r}: go on with `resume_from_checkpoint=True` when there is room."
                if whole
                else "There is no whole checkpoint yet: begin again when there is room."
            )
            if number in FULL:
                raise DiskFull(
                    number,
                    f"The disk or quota of {folder!r} is full, and what was being written there is of no use. {remedy} "
                    "`save_total_limit` bounds how many are kept.",
                ) from error
            raise OSError(
                number,
                f"{folder!r} can no longer be written to ({os.strerror(number)}), and what was being written there is of no "
                f"use. {remedy.replace('there is room', 'it can')}",
            ) from error

    # The last thing that all ranks do for a checkpoint before the main one writes its `trainer_state.json`.
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        self._save_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_state(checkpoint)
            self._saved_step = self.state.global_step
            if self._is_done() and self.accelerator.is_main_process:
                warnings.warn(
                    f"{checkpoint!r} is of step {self.state.global_step}, and the run is over after {self.state.max_steps}: "
                    "there is nothing left to train. Raise `max_steps` or `num_train_epochs` to go on."
                )

    def _is_done(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _run_epoch(self, *, epoch, epochs_trained, **options):
        if self._is_done():  # transformers looks only after a step
            self.control.should_training_stop = True
            return
        sampler = self._train_sampler
        if epoch == epochs_trained and sampler is not None and sampler.shuffle:
            for _ in range(epochs_trained):  # a permutation for each epoch, from one stream
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, **options)


def plain(value: Any) -> Any:
    """A value as it can be saved with tensors, which come back with no other types."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def is_whole(checkpoint: str) -> bool:
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


def checkpoints_of(output_dir: str) -> dict[int, str]:
    """The folders of checkpoints in a folder, whole or not, by their numbers of steps, which increase."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = [int(name.split("-")[1]) for name in names if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name)]
    return {step: os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}") for step in sorted(steps)}


def whole_checkpoints(output_dir: str) -> dict[int, str]:
    """Those that a run finished writing."""
    return {step: checkpoint for step, checkpoint in checkpoints_of(output_dir).items() if is_whole(checkpoint)}


def last_whole_checkpoint(output_dir: str) -> str:
    """
    The checkpoint of the most steps in a folder, leaving out those that a run did not finish writing.

    Raises:
        `ValueError`: if there is none.
    """
    for checkpoint in reversed(checkpoints_of(output_dir).values()):
        if is_whole(checkpoint):
            return checkpoint
        warnings.warn(f"{checkpoint!r} is left out: the run that wrote it ended before it was whole.")
    raise ValueError(
        f"`resume_from_checkpoint` is True, but `output_dir` ({output_dir}) has no whole checkpoint. Unset it to start "
        "from the beginning, or name the folder of a checkpoint."
    )

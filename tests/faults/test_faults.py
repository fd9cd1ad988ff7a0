"""
Runs that are killed, that run out of disk or lose a part of themselves, and what they go on to: the weights and the prompts of
the run that nothing befell. `make faults` tries many more, see `docs/reliability.md`.
"""

import re
import signal

import pytest
from harness import Faults, Variant, free_port, last_whole_step


pytestmark = pytest.mark.processes

PLAIN = Variant("plain")


@pytest.fixture(scope="module")
def faults(checkpoints, tmp_path_factory):
    faults = Faults(tmp_path_factory.mktemp("faults"), checkpoints["qwen3-student"], checkpoints["qwen3-teacher"])
    yield faults
    faults.close()


def goes_on(faults: Faults, variant: Variant, folder, least: int = 0) -> None:
    """From a whole checkpoint of at least some step, to the end of the run that nothing befell."""
    step, ended = faults.go_on(variant, folder)
    assert step >= least and not faults.difference(variant, folder, ended)


@pytest.mark.parametrize(
    "variant, at, number, saved",
    [
        (PLAIN, "generation", 2, 2),
        (PLAIN, "teacher scoring", 3, 4),
        (PLAIN, "scoring", 4, 2),  # the student's of the second generation batch, after the teacher's
        (PLAIN, "backward", 8, 3),  # the second of two in the fourth step
        (PLAIN, "before the optimizer", 1, 0),
        (PLAIN, "after the optimizer", 4, 3),
        (Variant("EMA", "self", {"teacher_weights": "ema", "teacher_ema_decay": 0.5}), "end of the step", 3, 2),
        (Variant("exact", config={"estimator": "exact"}), "after teacher scoring", 2, 2),
    ],
    ids=lambda value: value.name if isinstance(value, Variant) else None,
)
def test_killed_in_a_step(faults, variant, at, number, saved):
    folder = faults.new_folder(variant)
    ended = faults.begin(variant, folder, {"kill": {"at": at, "number": number}}).wait()
    assert ended.codes == [-signal.SIGKILL] and last_whole_step(folder / "out") == saved
    goes_on(faults, variant, folder)


@pytest.mark.parametrize(
    "action, share", [("kill", 0.02), ("tear", 0.3), ("kill", 0.62), ("tear", 0.75), ("kill", 0.99)]
)
def test_killed_at_a_file_operation(faults, action, share):
    """With one checkpoint kept, so that earlier ones are removed on the way; the last operations are of the result."""
    variant = Variant("one kept", config={"save_total_limit": 1})
    folder, number = faults.new_folder(variant), int(share * faults.whole(variant).file_operations)
    ended = faults.begin(variant, folder, {"files": {"action": action, "number": number}}).wait()
    assert ended.codes == [-signal.SIGKILL]
    goes_on(
        faults, variant, folder, least=ended.steps - 1
    )  # the step whose checkpoint was being written is made again


def test_one_rank_of_two_is_killed(faults):
    variant = Variant("DDP", config={"per_device_train_batch_size": 1}, world_size=2)
    folder = faults.new_folder(variant)
    ended = faults.begin(variant, folder, {"kill": {"at": "backward", "number": 5}}, on_rank=1).wait()
    assert ended.codes == [1, -signal.SIGKILL]  # the other by itself
    goes_on(faults, variant, folder, least=2)


@pytest.mark.parametrize(
    "number, jit, code, words",
    [
        (signal.SIGTERM, False, -signal.SIGTERM, ""),
        (signal.SIGTERM, True, 143, "SIGTERM ended the run after step .* It is not finished"),
        (signal.SIGINT, False, 130, "KeyboardInterrupt: Ctrl-C ended the run in step .*whole checkpoint is"),
        (signal.SIGINT, True, 130, "KeyboardInterrupt: Ctrl-C ended the run after step .* It is not finished"),
    ],
)
def test_signals(faults, number, jit, code, words):
    variant = Variant("many steps", config={"max_steps": 20, "save_steps": 4})
    folder = faults.new_folder(variant)
    started = faults.begin(variant, folder, config={**variant.config, "enable_jit_checkpoint": jit})
    started.wait_for("'skipped_steps'", count=6)
    started.send(number)
    ended = started.wait()
    assert ended.codes == [code] and re.search(words, ended.output), ended.output
    step = last_whole_step(folder / "out")
    assert step >= 4 and (not jit or step == ended.steps)
    goes_on(faults, variant, folder)


def test_a_full_disk(faults):
    folder = faults.new_folder(PLAIN)
    number = faults.whole(PLAIN).file_operations // 2
    ended = faults.begin(PLAIN, folder, {"files": {"action": "full", "number": number}}).wait()
    assert ended.codes == [1] and re.search("DiskFull: .* is full.* The last whole checkpoint is", ended.output)
    goes_on(faults, PLAIN, folder, least=2)


def test_a_folder_that_cannot_be_written_to(faults):
    folder = faults.new_folder(PLAIN)
    ended = faults.begin(PLAIN, folder, {"files": {"action": "read-only", "number": 1}}).wait()
    assert ended.codes == [1] and ended.steps == 0
    assert re.search(r"RuntimeError: `output_dir` \(.*\) cannot be written to: .*Read-only file system", ended.output)
    goes_on(faults, PLAIN, folder)


def test_two_runs_in_one_folder(faults):
    variant = Variant("two at once", config={"max_steps": 200})
    folder = faults.new_folder(variant)
    first = faults.begin(variant, folder)
    first.wait_for("'skipped_steps'")
    ended = faults.begin(variant, folder).wait()
    assert ended.codes == [1] and "RuntimeError: Another run is writing to `output_dir`" in ended.output
    first.send(signal.SIGKILL)
    assert first.wait().codes == [-signal.SIGKILL]
    assert faults.begin(PLAIN, folder, resume=True).wait().codes == [0]  # the dead one's lock is gone with it


def test_a_worker_of_the_data_loader_dies(faults):
    variant = Variant("worker", config={"dataloader_num_workers": 1})
    folder = faults.new_folder(variant)
    ended = faults.begin(variant, folder, dying_worker=40).wait()
    assert ended.codes == [1] and "DataLoader worker" in ended.output and "killed by signal" in ended.output
    goes_on(faults, variant, folder)


def test_the_teachers_server_dies(faults):
    port = free_port()
    config = {"teacher_server_url": f"http://localhost:{port}", "teacher_server_timeout": 1.0}
    variant = Variant("served", "served", config)
    server = faults.serve(port)
    faults.whole(variant)
    folder = faults.new_folder(variant)
    started = faults.begin(variant, folder)
    started.wait_for("'skipped_steps'", count=2)
    faults.end(server)
    ended = started.wait()
    assert ended.codes == [1] and re.search(r"RunCannotGoOn: .*ended after step \d, which is saved", ended.output)
    faults.serve(port)
    goes_on(faults, variant, folder, least=2)

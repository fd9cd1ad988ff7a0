"""Started by the tests in several processes, which do the jobs that appear in a folder, one after the other.

Usage: `accelerate launch ... worker.py FOLDER PID`, where PID is the process that writes `job{N}.json` into the folder;
without it, nobody waits for the jobs. A job holds `task`, `report` (a folder of its own, for `rank{N}.json`), what the task
needs (see `run_training.py`, `run_losses.py`, `run_sampled.py` and `run_served.py`) and optionally `last`, after which the processes leave.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from run_losses import compare_losses
from run_sampled import train_sampled
from run_served import train_served
from run_training import train


TASKS = {"train": train, "losses": compare_losses, "sampled": train_sampled, "served": train_served}


def leave() -> None:
    # Without tearing the process group down: now and then gloo's threads abort a process that does so
    # ("terminate called without an active exception"), after all of its work is done.
    os._exit(0)


def next_job(path: Path, parent: int) -> dict:
    while not path.exists():
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            leave()
        time.sleep(0.05)
    return json.loads(path.read_text())


def main(folder: Path, parent: int) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    number = 0
    while True:
        spec = next_job(folder / f"job{number}.json", parent)
        report = TASKS[spec["task"]](spec)
        Path(spec["report"], f"rank{rank}.json").write_text(json.dumps(report))
        gc.collect()  # the trainer, before the next one is made
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        if rank == 0:
            Path(spec["report"], "done").touch()
        if spec.get("last"):
            leave()
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

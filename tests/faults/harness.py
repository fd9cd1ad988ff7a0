"""Runs that something befalls, and the run that nothing did: `Faults` starts both and compares what came of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
MINUTES = 60.0


@dataclass(frozen=True)
class Variant:
    """What is trained: a kind of teacher, options, and how many processes."""

    name: str
    kind: str = "local"
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    lora: bool = False
    world_size: int = 1


@dataclass
class Whole:
    """The run that nothing befell."""

    weights: bytes
    reads: dict[tuple[int, int], list[str]]
    file_operations: int
    seconds: float


@dataclass
class Ended:
    """
    Attributes:
        codes (`list[int | None]`): Of each rank: its exit code, minus the number of a signal, or `None` if it had to be killed.
        steps (`int`): Steps whose log was printed.
    """

    codes: list[int | None]
    output: str
    steps: int
    seconds: float


class Started:
    """A run of one or several processes."""

    def __init__(self, faults: "Faults", specs: list[dict]):
        self.faults, self.specs, self.start = faults, specs, time.monotonic()
        self.pids = [faults.start({"run": spec}) for spec in specs]

    @property
    def output(self) -> str:
        return "".join(Path(spec["log"]).read_text() for spec in self.specs if Path(spec["log"]).exists())

    def wait_for(self, text: str, count: int = 1, seconds: float = MINUTES) -> None:
        deadline = time.monotonic() + seconds
        while self.output.count(text) < count:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 3 * MINUTES, patience: float = 20.0) -> Ended:
        """Where one rank has failed, the others have `patience` seconds before they are killed, as a launcher does."""
        codes: dict[int, int | None] = {}
        deadline = time.monotonic() + seconds
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and (code := self.faults.ended(pid)) is not None:
                    codes[rank] = code
                    if code != 0:
                        deadline = min(deadline, time.monotonic() + patience)
            if time.monotonic() > deadline:
                for rank, pid in enumerate(self.pids):
                    if rank not in codes:
                        os.kill(pid, signal.SIGUSR1)
                        time.sleep(0.5)
                        self.faults.end(pid)
                        codes[rank] = None
            time.sleep(0.02)
        first = Path(self.specs[0]["log"]).read_text()
        in_order = [codes[rank] for rank in range(len(self.pids))]
        return Ended(in_order, self.output, first.count("'skipped_steps'"), time.monotonic() - self.start)


class Faults:
    """
    A process that has imported everything, and what it needs.

    Args:
        folder (`Path`): For all that is written.
        student, teacher (`str`): Checkpoints.
    """

    def __init__(self, folder: Path, student: str, teacher: str):
        self.folder, self.student, self.teacher, self.number = folder, student, teacher, 0
        self.wholes: dict[str, Whole] = {}
        self.running: set[int] = set()
        library = folder / "file_faults.so"
        source = str(FOLDER / "file_faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed
        environment = {**os.environ, "LD_PRELOAD": str(library), "PATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(FOLDER / "runs.py"), student, teacher]
        with open(folder / "parent.log", "w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.parent = subprocess.Popen(command, env=environment, text=True, **pipes)
        assert self.parent.stdout.readline() == "ready\n", (folder / "parent.log").read_text()

    def close(self) -> None:
        for pid in [*self.running]:
            self.end(pid)
        self.parent.kill()
        self.parent.wait()

    def ask(self, command: dict) -> Any:
        self.parent.stdin.write(json.dumps(command) + "\n")
        self.parent.stdin.flush()
        return json.loads(self.parent.stdout.readline())

    def start(self, command: dict) -> int:
        pid = self.ask(command)
        self.running.add(pid)
        return pid

    def ended(self, pid: int, seconds: float = 0.0) -> int | None:
        code = self.ask({"wait": pid, "seconds": seconds})
        if code is not None:
            self.running.discard(pid)
        return code

    def end(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.ended(pid, 10.0)

    def new_folder(self, variant: Variant) -> Path:
        self.number += 1
        folder = self.folder / f"{variant.name.replace(' ', '-')}-{self.number}"
        folder.mkdir()
        return folder

    def begin(
        self, variant: Variant, folder: Path, fault: dict | None = None, on_rank: int = -1, **options
    ) -> Started:
        port = free_port()
        attempt = len(list(folder.glob("*.log")))
        specs = []
        for rank in range(variant.world_size):
            befallen = rank == on_rank % variant.world_size
            specs.append(
                {
                    **{"out": str(folder / "out"), "reads": str(folder / "reads"), "student": self.student},
                    **{"teacher": self.teacher, "kind": variant.kind, "lora": variant.lora, "rank": rank},
                    **{"world_size": variant.world_size, "port": port, "config": variant.config},
                    "log": str(folder / f"{attempt}-{rank}.log"),
                    **(fault if fault and befallen else {}),
                    **options,
                }
            )
        return Started(self, specs)

    def serve(self, port: int) -> int:
        pid = self.start({"serve": {"log": str(self.folder / "server"), "teacher": self.teacher, "port": port}})
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("localhost", port)).close()
                return pid
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, (self.folder / "server").read_text()
                time.sleep(0.02)

    def whole(self, variant: Variant) -> Whole:
        """What comes of a variant if nothing befalls it; each prompt of an epoch has been read once."""
        if variant.name not in self.wholes:
            folder = self.new_folder(variant)
            ended = self.begin(variant, folder).wait()
            assert ended.codes == [0] * variant.world_size, ended.output
            report = json.loads((folder / "0-0.json").read_text())
            whole = Whole(result_of(folder), reads_of(folder), report["file_operations"], ended.seconds)
            check_epochs(whole.reads)
            self.wholes[variant.name] = whole
        return self.wholes[variant.name]

    def go_on(self, variant: Variant, folder: Path) -> tuple[int, Ended]:
        """Resume what is in a folder, or begin again where it has no whole checkpoint: the step that it went on from, and how."""
        step = last_whole_step(folder / "out")
        return step, self.begin(variant, folder, **({"resume": True} if step else {})).wait()

    def difference(self, variant: Variant, folder: Path, ended: Ended) -> str:
        """How what is in a folder differs from the run that nothing befell; empty if not at all."""
        whole = self.whole(variant)
        if any(code != 0 for code in ended.codes):
            return f"it ended with {ended.codes}: {ended.output[-2000:]}"
        if result_of(folder) != whole.weights:
            return "other weights"
        if reads_of(folder) != whole.reads:
            return f"other prompts: {reads_of(folder)} instead of {whole.reads}"
        return ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def result_of(folder: Path) -> bytes:
    (weights,) = (folder / "out" / "result").glob("*model.safetensors")
    return weights.read_bytes()


def reads_of(folder: Path) -> dict[tuple[int, int], list[str]]:
    """The prompts of each generation batch, by step and rank: those that were read last, where it was made again."""
    lines = (folder / "reads").read_text().splitlines()
    return {(step, rank): words for step, rank, words in map(json.loads, lines)}


def check_epochs(reads: dict[tuple[int, int], list[str]]) -> None:
    words = [word for _, batch in sorted(reads.items()) for word in batch]
    for start in range(0, len(words), 8):
        epoch = words[start : start + 8]
        assert len(set(epoch)) == len(epoch), epoch


def last_whole_step(out: Path) -> int:
    """The step of the last checkpoint that is whole, or 0."""
    steps = [0]
    for state in out.glob("checkpoint-*/trainer_state.json"):
        try:
            steps.append(json.loads(state.read_text())["global_step"])
        except ValueError:
            pass
    return max(steps)

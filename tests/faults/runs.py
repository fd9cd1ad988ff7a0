"""
One process that has imported everything, and forks a child for each run: `python runs.py`, with `file_faults.c` preloaded.

It reads a JSON object a line. `{"run": SPEC}` is answered with the child's process id, `{"wait": PID, "seconds": S}` with what
became of it: its exit code, minus the number of the signal that killed it, or `null` where it still runs.

A specification holds

- `out`: the `output_dir`, `log`: a file for what is printed, and `reads`: a file for the prompts that are read;
- `student`, `teacher`: checkpoints; `kind`: of teacher ("local", "two", "self" or "served"); `lora`; `config`: fields of
  GNDPOConfig;
- `rank`, `world_size` and `port`, where there are several processes;
- `kill`: `{"at": POINT, "number": N}`, to be killed at a point of the step (see `kill_at`);
- `files`: `{"action": ACTION, "number": N}`, what befalls the N-th operation on a file in `out` (see `file_faults.c`);
- `dying_worker`: the number of the row at which a worker of the data loader is killed.

`{"serve": ...}` instead of `run` has the child be the teacher's server, on `port`.
"""

import ctypes
import faulthandler
import functools
import importlib.metadata
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from stand_in_server import StandInServer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.teachers import LocalTeacher


ACTIONS = ("count", "kill", "tear", "full", "read-only")  # in the order of `file_faults.c`

# Two steps use a generation batch, and a run reads its eight prompts once and a half.
NUM_PROMPTS, STEPS, PROMPTS_PER_STEP = 8, 6, 2
CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def make_rows(kind: str) -> list[dict]:
    rows = [{"prompt": [{"role": "user", "content": f"what is {word} ?"}]} for word in WORDS[:NUM_PROMPTS]]
    if kind == "two":
        return [{**row, "teacher": ("first", "second")[index % 2]} for index, row in enumerate(rows)]
    if kind == "self":
        own = [{"role": "user", "content": "one plus one is two . what is the sum of one and two ?"}]
        return [{**row, "teacher_prompt": own} for row in rows]
    return rows


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Deadly:
    """Counts the times that something is reached, and dies at one of them."""

    def __init__(self, number: int):
        self.number, self.count = number, 0

    def __call__(self, *args) -> None:
        self.count += 1
        if self.count == self.number:
            die()


class DeadlySteps(TrainerCallback):
    def __init__(self, point: str, reached: Deadly):
        self.point, self.reached = point, reached

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.point == "before the optimizer":
            self.reached()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.point == "after the optimizer":
            self.reached()

    def on_step_end(self, args, state, control, **kwargs):
        if self.point == "end of the step":
            self.reached()


def kill_at(trainer: GNDPOTrainer, point: str, number: int) -> None:
    """Be killed when a point is reached for the N-th time."""
    reached = Deadly(number)

    def wrap(owner, name: str, counts=lambda: True, after: bool = False) -> None:
        call = getattr(owner, name)

        def called(*args, **kwargs):
            if counts() and not after:
                reached()
            result = call(*args, **kwargs)
            if counts() and after:
                reached()
            return result

        setattr(owner, name, called)

    if point == "generation":
        wrap(trainer, "_generate")
    elif point == "after generation":
        wrap(trainer, "_generate", after=True)
    elif point == "teacher scoring":
        wrap(trainer.teacher, "hidden_states" if reads_hidden_states(trainer) else "per_token_logps")
    elif point == "after teacher scoring":
        wrap(trainer.teacher, "hidden_states" if reads_hidden_states(trainer) else "per_token_logps", after=True)
    elif point == "in generation":
        model = trainer.model
        model.register_forward_pre_hook(lambda module, args: None if torch.is_grad_enabled() else reached())
    elif point == "scoring":
        wrap(trainer, "_get_per_token_logps_and_entropies", counts=lambda: not torch.is_grad_enabled())
    elif point == "forward":
        model = trainer.model
        model.register_forward_pre_hook(lambda module, args: reached() if torch.is_grad_enabled() else None)
    elif point == "backward":
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        parameters[len(parameters) // 2].register_hook(lambda gradient: reached())
    else:
        trainer.add_callback(DeadlySteps(point, reached))


def reads_hidden_states(trainer: GNDPOTrainer) -> bool:
    return trainer.args.estimator == "exact" or trainer.args.score_baseline == "expected"


class DyingRows:
    """A transform of rows that kills the worker of a data loader which reads a certain one of them."""

    def __init__(self, number: int, parent: int):
        self.reached, self.parent = Deadly(number), parent

    def __call__(self, rows: dict) -> dict:
        if os.getpid() != self.parent:
            for _ in rows["prompt"]:
                self.reached()
        return rows


def train(spec: dict) -> None:
    kind = spec.get("kind", "local")
    teacher = {
        "local": spec["teacher"],
        "two": {"first": spec["teacher"], "second": LocalTeacher(spec["student"])},
        "self": "self",
        "served": None,
    }[kind]
    config = {**CONFIG, **spec.get("config", {}), "output_dir": spec["out"]}
    rank = spec.get("rank", 0)
    rows = Dataset.from_list(make_rows(kind))
    if "dying_worker" in spec:
        rows.set_transform(DyingRows(spec["dying_worker"], os.getpid()))
    trainer = GNDPOTrainer(
        model=spec["student"],
        teacher_model=teacher,
        args=GNDPOConfig(**config),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if spec.get("lora") else None,
    )
    if trainer._on_signal is not None:
        trainer._on_signal.jit_manager.kill_wait = 0
    generate = trainer._generate

    def note(prompts):
        words = [prompt[0]["content"].split()[2] for prompt in prompts[:: trainer.num_generations]]
        with open(spec["reads"], "a") as file:
            file.write(json.dumps([trainer.state.global_step, rank, words]) + "\n")
        return generate(prompts)

    trainer._generate = note
    if "kill" in spec:
        kill_at(trainer, spec["kill"]["at"], spec["kill"]["number"])
    files = ctypes.CDLL(os.environ["LD_PRELOAD"])
    fault = spec.get("files", {"action": "count", "number": 0})
    os.makedirs(spec["out"], exist_ok=True)
    files.watch_files(os.fsencode(spec["out"] + "/"), ctypes.c_long(fault["number"]), ACTIONS.index(fault["action"]))
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    trainer.save_model(f"{spec['out']}/result")
    if rank == 0:
        Path(spec["log"]).with_suffix(".json").write_text(
            json.dumps({"steps": trainer.state.global_step, "file_operations": files.count_files()})
        )


def be_child(command: dict) -> None:
    spec = command.get("run") or command["serve"]
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if spec.get("world_size", 1) > 1:
        os.environ.update(RANK=str(spec["rank"]), LOCAL_RANK=str(spec["rank"]), WORLD_SIZE=str(spec["world_size"]))
        os.environ.update(
            MASTER_ADDR="localhost", MASTER_PORT=str(spec["port"]), LOCAL_WORLD_SIZE=str(spec["world_size"])
        )
    faulthandler.register(signal.SIGUSR1)  # says where a run hangs
    code = 1
    try:
        if "serve" in command:
            StandInServer(spec["teacher"], port=spec["port"])
            signal.pause()
        train(spec)
        code = 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of the parent's is to be cleaned up


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def main() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    # accelerate looks hundreds of times which packages there are, which takes half of a run that is so small.
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    for path in sys.argv[1:]:  # what is imported when it is first needed
        AutoModelForCausalLM.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(json.dumps(wait(command["wait"], command["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            be_child(command)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()

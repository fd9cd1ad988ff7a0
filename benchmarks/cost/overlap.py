"""
What sampling ahead saves: wall time of a step with `sampling_lead=1`, beside that without it, and beside TRL's
`AsyncDistillationTrainer`; with real vLLM servers on one core, and learning on another.

    python -m benchmarks.cost.served_teacher --build
    python -m benchmarks.cost.overlap
    python -m benchmarks.cost.overlap --served_teacher --trl
    python -m benchmarks.cost.overlap --cluster

The first needs an environment with vLLM, and starts its servers. New weights reach them by a file, as in `tests/vllm_engine`.
With `--cluster`, no server is started: 1, 2, 4 and 8 of them are a `rollout_func` that sleeps, and what each part waits for
is compared with what follows from the lengths of the two halves.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer

from .served_teacher import FOLDER, PROMPT, VOCABULARY


sys.path.append(str(Path(__file__).parents[2] / "tests"))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "vllm_engine"))

SERVERS_CORE, LEARNING_CORE = 0, 1
WARMUP = 2  # steps that are not counted
TOP_K = 8  # tokens of a served teacher at each position


class StepEnds(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Median of the steps after the first ones."""
        return median(late - early for early, late in zip(self.times[WARMUP - 1 :], self.times[WARMUP:], strict=False))


def on_cores(core: int) -> None:
    os.sched_setaffinity(0, {core})


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """A vLLM server of a checkpoint, on its core; its URL when it is up."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--model", str(model)]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--max-logprobs", "-1"]
    command += ["--logprobs-mode", "processed_logprobs", *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(FOLDER / f"server-{port}.log", "w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=lambda: on_cores(SERVERS_CORE),
        )
    try:
        yield f"http://localhost:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the engine's own processes
        process.wait()


def prompts(steps: int, completions: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (steps * completions, PROMPT), generator=generator).tolist()
    return Dataset.from_dict({"prompt": [" ".join(f"w{id}" for id in row) for row in rows]})


def common(args: argparse.Namespace, micro_batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(FOLDER / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": args.completions // micro_batch,
        "max_completion_length": args.length,
        "max_steps": args.steps,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def measure(args: argparse.Namespace, lead: int, rollout_func=None, **options) -> dict[str, float]:
    """Median seconds of a step, of the request for a batch, and of who waited for whom."""
    ends = StepEnds()
    if rollout_func is not None:
        rollout_func.samples_ahead = True
    trainer = GNDPOTrainer(
        model=str(FOLDER / "student"),
        args=GNDPOConfig(
            **common(args, 4), num_generations=args.num_generations, estimator="exact", sampling_lead=lead, **options
        ),
        train_dataset=prompts(args.steps, args.completions // args.num_generations),
        callbacks=[ends],
        rollout_func=rollout_func,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "step_time" in entry][WARMUP:]
    names = {"generation": "time/generation", "sampling": "sampling/seconds", "learning waited": "sampling/waited"}
    names["samples waited"] = "sampling/was_ready"
    found = {name: median(entry.get(key, 0.0) for entry in history) for name, key in names.items()}
    if lead == 0:
        found |= {"sampling": found["generation"], "learning waited": found["generation"]}
    return {"step": ends.seconds, **found, "rest": ends.seconds - found["learning waited"]}


def measure_trl(args: argparse.Namespace, url: str, teacher_url: str) -> float:
    """Median seconds of a step of TRL's trainer that overlaps, with the same servers and tokens for each optimizer step."""
    import requests
    from transformers import AutoTokenizer
    from trl.experimental.async_distillation import (
        AsyncDistillationConfig,
        AsyncDistillationTrainer,
        async_distillation_trainer,
    )
    from vllm_stand_ins import update_named_params

    async_distillation_trainer.get_peak_flops_per_device = lambda *args: 1.0  # it asks CUDA, for a metric

    class ByFile:
        """Weights go as ours do, while the server is paused, as TRL has it."""

        session, base_url = requests.Session(), url

        def init_weight_transfer(self):
            pass

        def pause(self):
            self.session.post(f"{url}/pause", params={"mode": "keep"}).raise_for_status()

        def send_weights(self, iterator):
            update_named_params(self, None, iterator)

        def resume(self):
            self.session.post(f"{url}/resume").raise_for_status()

        def destroy(self):
            pass

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "student")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # it takes no plain text
    )
    rows = prompts(2 * args.steps + 8, args.completions)["prompt"]
    ends = StepEnds()
    trainer = AsyncDistillationTrainer(
        model=str(FOLDER / "student"),
        args=AsyncDistillationConfig(
            **common(args, 1),  # it packs a micro-batch into one row, which needs FlashAttention to be cheap
            vllm_server_base_url=url,
            teacher_server_urls={"default": teacher_url},
            teacher_top_k=TOP_K,
            beta=1.0,
            model_init_kwargs={"attn_implementation": "sdpa"},
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": row}] for row in rows]}),
        processing_class=tokenizer,
        callbacks=[ends],
        weight_transfer=ByFile(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return ends.seconds


def row(name: str, found: dict[str, float], before: float) -> str:
    longer = max(found["sampling"], found["rest"])
    values = [found[key] for key in ("step", "sampling", "rest", "learning waited", "samples waited")]
    values += [found["step"] / before, found["step"] / longer]
    return f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |"


HEADER = (
    "| arm | step, s | sampling | everything else | learning waited | samples waited | step / lead 0 | step / longer half |\n"
    "|---|---|---|---|---|---|---|---|"
)


def compare(args: argparse.Namespace) -> None:
    from trl.generation.vllm_client import VLLMClient
    from vllm_stand_ins import update_named_params

    VLLMClient.init_communicator = lambda client, device: None
    VLLMClient.update_named_params = update_named_params
    on_cores(LEARNING_CORE)
    torch.set_num_threads(1)
    has_teacher = args.served_teacher or args.trl
    with (
        served(FOLDER / "student") as url,
        served(FOLDER / "teacher") if has_teacher else nullcontext() as teacher_url,
    ):
        sampler = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 300.0}
        if args.served_teacher:
            sampler |= {"teacher_server_url": [teacher_url], "teacher_top_k": TOP_K}
        else:
            sampler |= {"teacher_model_name_or_path": str(FOLDER / "teacher")}
        print(HEADER)
        before = measure(args, 0, **sampler)
        print(row("`sampling_lead=0`", before, before["step"]), flush=True)
        print(row("`sampling_lead=1`", measure(args, 1, **sampler), before["step"]), flush=True)
        if args.trl:
            step = measure_trl(args, url, teacher_url)
            print(f"| `AsyncDistillationTrainer` | {step:.2f} | | | | | {step / before['step']:.2f} | |", flush=True)


def simulate(args: argparse.Namespace) -> None:
    """Servers that sleep: what is measured beside what follows from the two halves."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def servers(seconds: float):
        def rollout_func(rows, trainer):
            time.sleep(seconds)
            completions = torch.randint(3, VOCABULARY, (len(rows), args.length), generator=generator).tolist()
            prompt_ids = [[3] * PROMPT for _ in rows]
            return {
                "prompt_ids": prompt_ids,
                "completion_ids": completions,
                "logprobs": [[0.0] * args.length] * len(rows),
            }

        return rollout_func

    teacher = {"teacher_model_name_or_path": str(FOLDER / "student")}  # what it says does not matter here
    rest = measure(args, 0, servers(0.0), **teacher)["rest"]
    one_server = args.ratio * rest
    print(
        "| servers | lead | step, s | on paper | learning waited | on paper | samples waited | on paper |\n|---|---|---|---|---|---|---|---|"
    )
    for number in (1, 2, 4, 8):
        sampling = one_server / number
        paper = {0: (sampling + rest, sampling, 0.0)}
        paper[1] = max(sampling, rest), max(sampling - rest, 0.0), max(rest - sampling, 0.0)
        for lead in (0, 1):
            found = measure(args, lead, servers(sampling), **teacher)
            pairs = zip(
                (found[key] for key in ("step", "learning waited", "samples waited")), paper[lead], strict=True
            )
            print(f"| {number} | {lead} | " + " | ".join(f"{a:.2f} | {b:.2f}" for a, b in pairs) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--completions", type=int, default=16, help="in a generation batch, which is an optimizer step"
    )
    parser.add_argument("--num_generations", type=int, default=1, help="completions of a prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--served_teacher", action="store_true", help="with the teacher behind a server, on the servers' core"
    )
    parser.add_argument("--trl", action="store_true", help="TRL's AsyncDistillationTrainer beside it")
    parser.add_argument("--cluster", action="store_true", help="servers that sleep")
    parser.add_argument(
        "--ratio", type=float, default=4.0, help="how much longer one of these takes than everything else"
    )
    args = parser.parse_args()
    simulate(args) if args.cluster else compare(args)


if __name__ == "__main__":
    main()

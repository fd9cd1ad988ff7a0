"""
Faults at many points of many kinds of runs: `make faults`, or `python tests/faults/nightly.py [--points 270] [--seed 0]`.

Each point is a run that something befalls once, or twice, and that is resumed until it is over. It has to end in the weights
of the run that nothing befell, bit for bit, and to have read the same prompts. What came of each point is a line in
`build/faults/points.jsonl`, so that a run of this program that was cut off goes on where it was; at the end the table in
`docs/reliability.md` is written anew.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from harness import Ended, Faults, Variant, free_port, last_whole_step


ROOT = Path(__file__).parents[2]
RECIPE = json.loads((ROOT / "recipes/deepspeed/zero3.json").read_text())


def zero(stage: int) -> dict[str, Any]:
    if stage == 3:
        return RECIPE
    return {**RECIPE, "zero_optimization": {"stage": stage, "overlap_comm": False}}


def variants(port: int) -> dict[Variant, int]:
    """What is trained, and how many of a hundred points it has."""
    served = {"teacher_server_url": f"http://localhost:{port}", "teacher_server_timeout": 2.0}
    two_ranks = {"per_device_train_batch_size": 1}
    return {
        Variant("one teacher"): 11,
        Variant("two teachers", "two"): 8,
        Variant("moving average of the student", "self", {"teacher_weights": "ema", "teacher_ema_decay": 0.5}): 9,
        Variant("periodic copy of the student", "self", {"teacher_weights": "periodic", "teacher_sync_steps": 2}): 8,
        Variant("teacher behind a server", "served", served): 8,
        Variant("expected score subtracted", config={"score_baseline": "expected"}): 8,
        Variant("exact gradient", config={"estimator": "exact"}): 9,
        Variant("LoRA", lora=True): 8,
        Variant("one checkpoint kept", config={"save_total_limit": 1}): 9,
        Variant("two ranks, DDP", config=two_ranks, world_size=2): 8,
        Variant("two ranks, DDP, moving average", "self", {**two_ranks, "teacher_weights": "ema"}, world_size=2): 4,
        Variant("two ranks, ZeRO-2", config={**two_ranks, "deepspeed": zero(2)}, world_size=2): 5,
        Variant("two ranks, ZeRO-3", config={**two_ranks, "deepspeed": zero(3)}, world_size=2): 5,
    }


# Points of a step, and how often a run of six steps comes by at least.
POINTS = {
    "generation": 3,
    "after generation": 3,
    "teacher scoring": 3,
    "after teacher scoring": 3,
    "in generation": 12,
    "scoring": 6,
    "forward": 12,
    "backward": 12,
    "before the optimizer": 6,
    "after the optimizer": 6,
    "end of the step": 6,
}

KINDS = {
    "killed in a step": 30,
    "killed at a file operation": 25,
    "killed in the middle of a write": 12,
    "disk full": 9,
    "read-only from some point on": 4,
    "SIGTERM": 4,
    "SIGTERM, `enable_jit_checkpoint`": 5,
    "Ctrl-C": 5,
    "Ctrl-C, `enable_jit_checkpoint`": 5,
}
FILES = {
    "killed at a file operation": "kill",
    "killed in the middle of a write": "tear",
    "disk full": "full",
    "read-only from some point on": "read-only",
}


def draw_fault(kind: str, variant: Variant, file_operations: int, seconds: float, draw: random.Random) -> dict:
    """One thing that befalls a run; `rank` is the one that it befalls."""
    if kind == "killed in a step":
        at = draw.choice(list(POINTS))
        return {"kill": {"at": at, "number": draw.randint(1, POINTS[at])}, "rank": draw.randrange(variant.world_size)}
    if kind in FILES:
        return {"files": {"action": FILES[kind], "number": draw.randint(1, file_operations)}, "rank": 0}
    return {"after": draw.uniform(0.2, 1.0) * seconds, "jit": "jit" in kind}


def befall(faults: Faults, variant: Variant, folder: Path, fault: dict, step: int) -> tuple[Ended, str]:
    """Go on from what is in a folder, with a fault: how it ended, and what is wrong with that."""
    options: dict[str, Any] = {"resume": True} if step else {}
    if "after" in fault:
        number = signal.SIGINT if fault["signal"] == "SIGINT" else signal.SIGTERM
        options["config"] = {**variant.config, "enable_jit_checkpoint": fault["jit"]}
        started = faults.begin(variant, folder, **options)
        time.sleep(fault["after"])
        started.send(number)
        ended = started.wait()
        expected = 130 if number == signal.SIGINT else 143 if fault["jit"] else -signal.SIGTERM
        # It may be over by then; or not have begun, when SIGTERM has its usual meaning.
        if {*ended.codes} - {0, None, expected, -number} and variant.world_size == 1:
            return ended, f"it ended with {ended.codes}: {ended.output[-2000:]}"
        if fault["jit"] and ended.steps and {*ended.codes} & {expected} and "not finished" not in ended.output:
            return ended, f"it did not say that it is not finished: {ended.output[-2000:]}"
        return ended, ""
    on_rank = fault["rank"]
    ended = faults.begin(
        variant, folder, {key: fault[key] for key in ("kill", "files") if key in fault}, on_rank, **options
    ).wait()
    code = ended.codes[on_rank]
    if "files" in fault and fault["files"]["action"] == "full" and code != 0:
        is_named = "is full" in ended.output or "No space left on device" in ended.output
        return ended, "" if is_named else f"it does not say that the disk is full: {ended.output[-2000:]}"
    if "files" in fault and fault["files"]["action"] == "read-only" and code != 0:
        is_named = "Read-only file system" in ended.output or "os error 30" in ended.output
        return ended, "" if is_named else f"it does not say that the folder is read-only: {ended.output[-2000:]}"
    return ended, "" if code in (0, -signal.SIGKILL) else f"it ended with {ended.codes}: {ended.output[-2000:]}"


def try_point(faults: Faults, variant: Variant, kind: str, draw: random.Random) -> dict:
    whole = faults.whole(variant)
    folder = faults.new_folder(variant)
    befell, again, wrong = [], 0, ""
    for _ in range(draw.choice((1, 1, 2))):
        fault = draw_fault(kind, variant, whole.file_operations, whole.seconds, draw)
        if "after" in fault:
            fault["signal"] = "SIGINT" if kind.startswith("Ctrl-C") else "SIGTERM"
        step = last_whole_step(folder / "out")
        if (folder / "out" / "result").exists() and step == 6:
            break
        ended, wrong = befall(faults, variant, folder, fault, step)
        befell.append({"fault": fault, "codes": ended.codes, "seconds": round(ended.seconds, 1)})
        if any(code != 0 for code in ended.codes):
            again = max(again, step + ended.steps - last_whole_step(folder / "out"))
        if wrong:
            break
    step, ended = faults.go_on(variant, folder)
    wrong = wrong or faults.difference(variant, folder, ended)
    return {
        "befell": befell,
        "again": again,
        "wrong": wrong,
        "has_befallen": any(code != 0 for one in befell for code in one["codes"]),
    }


COLUMNS = ("killed in a step", "killed at a file operation", "disk full", "read-only", "SIGTERM", "Ctrl-C")


def column(kind: str) -> str:
    if kind == "killed in the middle of a write":
        return "killed at a file operation"
    return next(name for name in COLUMNS if kind.startswith(name))


def table(points: list[dict]) -> str:
    """How often each kind of run went on exactly, of the times that something befell it."""
    befallen = [point for point in points if point["has_befallen"]]
    groups: dict[str, list[dict]] = {}
    for point in befallen:
        groups.setdefault(point["variant"], []).append(point)
    lines = [
        f"| what was trained | {' | '.join(COLUMNS)} | steps made again, at most |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, group in [*sorted(groups.items()), ("all", befallen)]:
        cells = []
        for kind in COLUMNS:
            wrong = [bool(point["wrong"]) for point in group if column(point["kind"]) == kind]
            cells.append(f"{wrong.count(False)} of {len(wrong)}" if wrong else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {max(point['again'] for point in group)} |")
    return "\n".join(lines)


def write_table(points: list[dict]) -> None:
    page = ROOT / "docs" / "reliability.md"
    before, marker, rest = page.read_text().partition("<!-- written by `make faults` -->\n")
    after = rest[rest.index("<!-- until here -->") :]
    page.write_text(before + marker + table(points) + "\n" + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--points", type=int, default=270)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what it has started
    record = ROOT / "build" / "faults" / "points.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    lines = record.read_text().splitlines() if record.exists() else []
    points = [json.loads(line) for line in lines]
    done = {point["number"] for point in points if point["seed"] == arguments.seed}
    with tempfile.TemporaryDirectory() as folder:
        build = tiny_models.BUILDERS["qwen3"]
        student = tiny_models.save(*build(seed=0), Path(folder, "student"))
        teacher = tiny_models.save(*build(seed=1, width=48), Path(folder, "teacher"))
        faults = Faults(Path(folder), student, teacher)
        try:
            port = free_port()
            faults.serve(port)
            drawn = variants(port)
            for number in sorted({*range(arguments.points)} - done):
                draw = random.Random(1_000_000 * arguments.seed + number)
                (variant,) = draw.choices(list(drawn), drawn.values())
                (kind,) = draw.choices(list(KINDS), KINDS.values())
                point = {"seed": arguments.seed, "number": number, "variant": variant.name, "kind": kind}
                point |= try_point(faults, variant, kind, draw)
                points.append(point)
                with open(record, "a") as file:
                    file.write(json.dumps(point) + "\n")
                print(
                    f"{number + 1}/{arguments.points} {variant.name}, {kind}: {point['wrong'] or 'exact'}", flush=True
                )
        finally:
            faults.close()
    write_table(points)
    if any(point["wrong"] for point in points):
        sys.exit(1)


if __name__ == "__main__":
    main()

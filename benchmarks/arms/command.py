"""
Ways to turn a teacher's scores into a gradient, side by side: the same models, data, batches and number of steps.

    python -m benchmarks.arms --arms global none distillation --learning_rates 2e-4 6e-4 2e-3 --seeds 30 31 32 33 34
    python -m benchmarks.arms.report

A *cell* is one run: a task, a regime (what is made hard about it), an arm, a learning rate and a seed. Its row is written
when it ends, in one piece, and a cell that has a row is not run again, so the command can be stopped and repeated, and the
set of cells grows from one command to the next. At the end all rows go to `--results`, which is committed; a cell that
stands there counts as run.

Models and data of a task and seed are built once and kept in `--output_dir`. Each process has one thread, since models this
small gain nothing from more. Seconds in the rows are those of a machine that others used too, see the columns `jobs` and
`load`; `python benchmarks/step_cost.py` measures time.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from .cells import ARMS, REGIMES, SMOKE_TASKS, TASKS, Cell
from .results import FOLDER, ROOT, code_version, conclude, finished_cells, read_rows, write_results, write_whole


RESULTS = FOLDER / "runs.parquet"

# Read by glibc, OpenMP and tokenizers when a process starts: freed memory is kept for the next step's tensors.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


def build(task: str, seed: int, which: str, output_dir: Path, smoke: bool) -> None:
    """In a worker: build a model that the cells of a task and seed have in common, if it is not there."""
    from .models import build_once

    build_once(task, (SMOKE_TASKS if smoke else TASKS)[task], seed, which, output_dir)


def run(cell: Cell, output_dir: Path, smoke: bool, jobs: int, commit: str) -> float:
    """In a worker: run a cell and write its row. Returns its seconds."""
    from .runs import run_cell

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start, load = time.perf_counter(), os.getloadavg()[0]
    row = run_cell(**asdict(cell), output_dir=output_dir, smoke=smoke)
    seconds = time.perf_counter() - start
    row.update(cell_seconds=seconds, jobs=jobs, load=load, commit=commit)
    row["time"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    write_whole(output_dir / "cells" / f"{cell.name}.json", lambda partial: partial.write_text(json.dumps(row)))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["digits"], choices=TASKS)
    parser.add_argument("--regimes", nargs="+", default=["demo"], choices=REGIMES)
    parser.add_argument("--arms", nargs="+", default=["global", "none", "distillation"], choices=ARMS)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[2e-4, 6e-4, 2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[30, 31, 32, 33, 34])
    parser.add_argument("--jobs", type=int, default=1, help="processes; one core each")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "arms", help="models, data, single rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table of all rows")
    parser.add_argument(
        "--smoke", action="store_true", help="models that know nothing, two steps; needs --output_dir and --results"
    )
    args = parser.parse_args()
    for option in ("output_dir", "results"):
        if args.smoke and getattr(args, option) == parser.get_default(option):
            parser.error(f"--smoke needs another --{option}, so that its rows do not join the real ones.")

    rows = read_rows(args.results, args.output_dir)
    finished = finished_cells(rows)
    # Seed by seed: a command that is stopped leaves arms that can be compared.
    wanted = [
        Cell(task, regime, arm, learning_rate, seed)
        for task, seed, regime, learning_rate, arm in itertools.product(
            args.tasks, args.seeds, args.regimes, args.learning_rates, args.arms
        )
    ]
    cells = [cell for cell in dict.fromkeys(wanted) if cell not in finished]
    print(f"{len(wanted) - len(cells)} of {len(wanted)} cells are there, {len(cells)} to run", flush=True)

    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=args.jobs, mp_context=context) as pool:
        try:
            shared = dict.fromkeys((cell.task, cell.seed) for cell in cells)
            builds = [
                pool.submit(build, task, seed, which, args.output_dir, args.smoke)
                for task, seed in shared
                for which in ("teacher", "student")
            ]
            for future in as_completed(builds):
                future.result()
            options = (args.output_dir, args.smoke, args.jobs, code_version())
            futures = {pool.submit(run, cell, *options): cell for cell in cells}
            for count, future in enumerate(as_completed(futures), 1):
                name = futures[future].name
                try:
                    print(f"{count}/{len(cells)} {name}: {future.result():.0f} s", flush=True)
                except Exception as error:  # the other cells are worth having
                    failed.append(name)
                    print(f"{count}/{len(cells)} {name} failed: {type(error).__name__}: {error}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            print("Stopped; the same command goes on.", file=sys.stderr)
            return 130
        finally:
            rows = read_rows(args.results, args.output_dir)
            if rows:
                write_results(rows, args.results)
    return conclude(rows, args.results, failed)

"""The rows of runs: files of their own while a command goes on, and a table in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from .cells import Cell


ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent


def finished_cells(rows: list[dict], cell: type = Cell) -> set:
    return {cell(*(row[name] for name in cell.__dataclass_fields__)) for row in rows}


def read_rows(results: Path, output_dir: Path) -> list[dict]:
    """All rows there are: those of earlier commands in `results`, and the files of single cells."""
    rows = pd.read_parquet(results).to_dict("records") if results.exists() else []
    known = finished_cells(rows)
    files = sorted((output_dir / "cells").glob("*.json"))
    new = [json.loads(file.read_text()) for file in files]
    return rows + [row for row in new if not finished_cells([row]) & known]


def write_whole(path: Path, write) -> None:
    """Have `write` write the file `path`, so that whoever is interrupted leaves none or the whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(partial)
    partial.replace(path)


def write_results(rows: list[dict], path: Path, cell: type = Cell) -> None:
    table = pd.DataFrame(rows).sort_values(list(cell.__dataclass_fields__), ignore_index=True)
    write_whole(path, lambda partial: table.to_parquet(partial, compression="zstd"))


def code_version() -> str:
    """The commit that runs, with a `+` where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def conclude(rows: list[dict], results: Path, failed: list[str]) -> int:
    """Say how a command has ended; returns its exit status."""
    print(f"{len(rows)} rows: {results}")
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0

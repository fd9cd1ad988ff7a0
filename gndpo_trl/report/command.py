"""
Make a report of runs: one HTML page that fetches nothing, and its figures as PNGs beside it.

    gndpo-report runs/text
    gndpo-report runs/text runs/text-exact --output_dir comparison

It reads the trainer state (`trainer_state.json`, of the run or of a checkpoint, whichever was written last) and links to the
pages of the token view, which `log_completions` writes. Runs of TRL's own trainers can stand beside those of this package;
what they do not log is left out.
"""

import argparse
from pathlib import Path

from .runs import printable, read_runs


def write_report(folders: list[Path], output_dir: Path) -> Path:
    """
    Write the report of runs.

    Args:
        folders (`list[Path]`): Their `output_dir`s.
        output_dir (`Path`): Where `report.html` and its PNGs go; created if needed.

    Returns:
        `Path`: the page.

    Raises:
        `FileNotFoundError`, `ValueError`: see [`read_runs`].
        `ImportError`: if matplotlib is not installed.
    """
    try:
        from .figures import draw
        from .page import write_page
    except ImportError as error:
        raise ImportError("The report draws with matplotlib: `pip install gndpo-trl[report]`.") from error
    runs = read_runs(folders)
    output_dir.mkdir(parents=True, exist_ok=True)
    page = output_dir / "report.html"
    write_page(runs, draw(runs, output_dir), page)
    return page


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gndpo-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="`output_dir` of a run, or a checkpoint in it"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="where the report goes; default: `report` in the run, or here for several runs"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    output_dir = args.output_dir or (args.runs[0] / "report" if len(args.runs) == 1 else Path("report"))
    try:
        page = write_report(args.runs, output_dir)
    except (ImportError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"Written: {printable(str(page))}")
    return 0

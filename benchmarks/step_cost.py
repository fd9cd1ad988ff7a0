"""What a step costs, see `cost/step.py`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cost.step import main  # noqa: E402


if __name__ == "__main__":
    main()

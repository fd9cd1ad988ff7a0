"""Ways to turn a teacher's scores into a gradient, side by side; see `command.py`."""

import sys
from pathlib import Path


# The digits task is the demo's, whose modules lie among the scripts there.
sys.path.append(str(Path(__file__).parents[2] / "examples"))

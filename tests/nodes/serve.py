"""Usage: `serve.py CHECKPOINT ADDRESS PORT`: a served teacher, until it is killed."""

import sys
import threading
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from stand_in_server import StandInServer


path, address, port = sys.argv[1:]
StandInServer(path, port=int(port), host=address)
threading.Event().wait()

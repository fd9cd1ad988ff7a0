"""Which rank is gone, when ranks that wait for one another stop to: its number, its machine, and what to do."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object


# Of a connection to a rank that is there, in a network that works.
SECONDS = 5.0


class Peer(NamedTuple):
    rank: int
    host: str
    address: str
    port: int

    def answers(self) -> bool:
        """Whether its process is there, whatever it is doing: its machine takes the connection for it."""
        try:
            socket.create_connection((self.address, self.port), timeout=SECONDS).close()
        except OSError:
            return False
        return True

    def __str__(self):
        return f"rank {self.rank} ({self.host}, {self.address})"


@contextmanager
def lost_ranks_are_named() -> Iterator[None]:
    """
    Where ranks that wait for one another give up, say which of them are gone. All ranks enter this together.

    Each listens on a port of the interface by which it reaches the main process, and never speaks there. Where the ranks cannot
    reach each other's, for a firewall, nothing is said.

    Raises:
        `RuntimeError`: in the place of a collective's, if ranks do not answer any more.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    listener = socket.create_server((own_address(), 0), backlog=state.num_processes)
    address, port = listener.getsockname()
    me = Peer(state.process_index, socket.gethostname(), address, port)
    peers = sorted(gather_object([me]))
    next_one = peers[(me.rank + 1) % len(peers)]
    can_be_asked = all(gather_object([next_one.answers()]))
    try:
        yield
    except BaseException as error:
        listener.detach()  # open as long as the process is there: ranks that raise together do not find each other gone
        gone = who_is_gone(peers) if can_be_asked and isinstance(error, RuntimeError) else []
        if not gone:
            raise
        raise RuntimeError(
            f"Of {len(peers)} ranks {', '.join(map(str, gone))} {'does' if len(gone) == 1 else 'do'} not answer any more, so "
            "that no step can be made. See what its own output ends with, and whether its machine and network are there; then "
            "go on from the last checkpoint, on as many ranks (`resume_from_checkpoint=True`)."
        ) from error
    listener.close()


def own_address() -> str:
    """Of the interface by which this process reaches the main one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # which sends nothing
        probe.connect((os.environ.get("MASTER_ADDR", "localhost"), 9))
        return probe.getsockname()[0]


def who_is_gone(peers: list[Peer]) -> list[Peer]:
    with ThreadPoolExecutor(len(peers)) as pool:
        answers = pool.map(Peer.answers, peers)
        return [peer for peer, is_there in zip(peers, answers, strict=True) if not is_there]

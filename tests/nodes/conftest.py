import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import environment
from network import Network, why_there_is_none


ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker.py"
sys.path.insert(0, str(WORKER.parent))  # its jobs can be done in this process, too
TIMEOUT = 300


class Cluster:
    """Two nodes, each of which starts one process of a job of `tests/distributed/worker.py`."""

    def __init__(self, network: Network):
        self.network, self.processes, self.folder = network, [], None
        self.server: subprocess.Popen | None = None

    def start(self, accelerate_config: str, spec: dict, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        spec = {"task": "train", "images": False, "report": str(folder), "last": True, **spec}
        (folder / "job0.json").write_text(json.dumps(spec))
        options = [
            "--config_file",
            str(ROOT / f"recipes/accelerate/cpu/{accelerate_config}.yaml"),
            "--num_machines",
            "2",
        ]
        options += ["--main_process_ip", self.network.address("one"), "--main_process_port", "29500"]
        self.processes = []
        for rank, node in enumerate(("one", "two")):
            command = [*self.network.on(node), sys.executable, "-m", "accelerate.commands.launch", *options]
            command += ["--machine_rank", str(rank), str(WORKER), str(folder), str(os.getpid())]
            with open(folder / f"{node}.log", "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**environment(), "GLOO_SOCKET_IFNAME": "eth0"},
                    )
                )

    def serve(self, checkpoint: str, folder: Path) -> str:
        """Start a served teacher on the third machine; its URL."""
        address, port = self.network.address("servers"), "8000"
        command = [
            *self.network.on("servers"),
            sys.executable,
            str(Path(__file__).parent / "serve.py"),
            checkpoint,
            address,
            port,
        ]
        with open(folder / "server.log", "w") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        url, deadline = f"http://{address}:{port}", time.monotonic() + TIMEOUT
        probe = [
            *self.network.on("one"),
            sys.executable,
            "-c",
            f"import urllib.request as r; r.urlopen('{url}/v1/models')",
        ]
        while subprocess.run(probe, capture_output=True).returncode != 0:
            assert self.server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        return url

    def output(self, node: str) -> str:
        return (self.folder / f"{node}.log").read_text(errors="replace")

    def wait_for(self, happens: Callable[[], bool]) -> None:
        """Until something has happened, while both go on."""
        deadline = time.monotonic() + TIMEOUT
        while not happens():
            assert all(process.poll() is None for process in self.processes) and time.monotonic() < deadline, (
                self.output("one") + self.output("two")
            )
            time.sleep(0.1)

    def wait(self) -> list[dict]:
        """Until both have ended; what the ranks report."""
        deadline = time.monotonic() + TIMEOUT
        for process in self.processes:
            process.wait(timeout=max(deadline - time.monotonic(), 1))
        assert [process.returncode for process in self.processes] == [0, 0], self.output("one") + self.output("two")
        return [json.loads((self.folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    def stop(self) -> None:
        for process in filter(None, [*self.processes, self.server]):
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def network():
    reason = why_there_is_none()
    if reason is not None:
        pytest.skip(f"Two nodes need network namespaces, and here {reason}.")
    network = Network(f"gndpo-{os.getpid()}")
    yield network
    network.close()


@pytest.fixture
def cluster(network):
    cluster = Cluster(network)
    yield cluster
    cluster.stop()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.processes)

"""Machines on one machine: network namespaces that reach each other over a switch, as nodes of a cluster do."""

import json
import shutil
import subprocess
from contextlib import suppress


NAMES = ("one", "two", "servers")
SWITCH = "switch"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Network:
    """
    The machines `NAMES`, each with a device `eth0` and an address, until `close`.

    Args:
        prefix (`str`): Before the names of the namespaces, so that two of them can be there at the same time.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        try:
            for name in (*NAMES, SWITCH):
                ip("netns", "add", self.namespace(name))
                ip("-n", self.namespace(name), "link", "set", "lo", "up")
            switch = self.namespace(SWITCH)
            ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
            ip("-n", switch, "link", "set", "bridge0", "up")
            for name in NAMES:
                peer = ("peer", "name", "eth0", "netns", self.namespace(name))
                ip("-n", switch, "link", "add", name, "type", "veth", *peer)
                ip("-n", switch, "link", "set", name, "master", "bridge0", "up")
                ip("-n", self.namespace(name), "address", "add", f"{self.address(name)}/24", "dev", "eth0")
                ip("-n", self.namespace(name), "link", "set", "eth0", "up")
        except Exception:
            self.close()
            raise

    def namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def address(self, name: str) -> str:
        return f"10.77.0.{NAMES.index(name) + 1}"

    def on(self, name: str) -> list[str]:
        """What a command begins with that runs on a machine."""
        return ["ip", "netns", "exec", self.namespace(name)]

    def num_bytes_sent(self, name: str) -> int:
        (device,) = json.loads(ip("-n", self.namespace(name), "-s", "-j", "link", "show", "eth0"))
        return device["stats64"]["tx"]["bytes"]

    def cut(self, name: str) -> None:
        """Pull a machine's cable."""
        ip("-n", self.namespace(SWITCH), "link", "set", name, "down")

    def mend(self, name: str) -> None:
        ip("-n", self.namespace(SWITCH), "link", "set", name, "up")

    def close(self) -> None:
        for name in (*NAMES, SWITCH):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", self.namespace(name))


def why_there_is_none() -> str | None:
    """Why this machine cannot have such a network; `None` if it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    try:
        Network("gndpo-try").close()
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}`: {error.stderr.strip()}"
    return None

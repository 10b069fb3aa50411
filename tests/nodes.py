"""Machines of a test: network namespaces of this one, each with an address of its own, on one switch.

    with nodes(3) as machines:
        machines[0].start(["torchrun", ...], file)      # in its network, as a user of that machine
        machines[1].slow("20mbit")                      # its cable
        machines[2].cut()

Namespaces share files, processors and memory, not addresses, ports or loopback. The switch is a bridge in a namespace
of its own, so nothing of this machine's network is touched. Names hold the process number of the test, and what a test
that was killed left behind is removed by the next one. Needs root and `ip`.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAME = "sltrain-{pid}-{what}"
DELAY = "20ms"  # of a slow cable, where the kernel can delay


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def need_namespaces() -> None:
    """Skip the test where this process cannot make a network."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root, and ip and tc (iproute2), for network namespaces")
    try:
        remove_stale()
        name = NAME.format(pid=os.getpid(), what="trial")
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")


def remove_stale() -> None:
    """Remove the namespaces of tests whose process is gone."""
    for name in re.findall(r"^(sltrain-\d+-\w+)", ip("netns", "list"), re.MULTILINE):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            remove(name)


def remove(name: str) -> None:
    """End what runs in a namespace, and remove it with its interfaces."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", name)


@dataclass
class Node:
    """One machine; its interface is eth0, the other end of its cable `port` of the switch."""

    name: str
    address: str
    switch: str
    port: str
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(
        self, command: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on this machine; what it prints is added to `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """Kill everything that runs on it, its launcher too."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def cut(self) -> None:
        """Pull its cable out."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        ip("-n", self.switch, "link", "set", self.port, "up")

    def slow(self, rate: str) -> bool:
        """Make its cable slow in both directions, with a delay if the kernel can; returns whether it can."""
        ends = [(self.switch, self.port), (self.name, "eth0")]
        shapes = [["netem", "delay", DELAY, "rate", rate], ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]]
        for number, shape in enumerate(shapes):
            try:
                for namespace, device in ends:
                    tc = ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape]
                    subprocess.run(tc, check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError:
                continue
            return number == 0
        pytest.skip("the kernel has neither netem nor tbf to make a cable slow")


@contextmanager
def nodes(number: int) -> Iterator[list[Node]]:
    """That many machines, at 10.77.0.1, 10.77.0.2, ...; afterwards nothing of them is left."""
    pid = os.getpid()
    switch = NAME.format(pid=pid, what="switch")
    made: list[str] = []

    def make(name: str) -> None:
        ip("netns", "add", name)
        made.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    try:
        make(switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        machines = []
        for i in range(number):
            node = Node(NAME.format(pid=pid, what=f"node{i}"), f"10.77.0.{i + 1}", switch, f"port{i}")
            make(node.name)
            ip("-n", switch, "link", "add", node.port, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            ip("-n", switch, "link", "set", node.port, "master", "bridge", "up")
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            ip("-n", node.name, "link", "set", "eth0", "up")
            machines.append(node)
        yield machines
    finally:
        for name in made:
            remove(name)

"""Gloo is told through which interface the other machines are, unless the user said so; see tests/test_nodes.py."""

import os
import socket

import pytest

from sltrain.engine.interface import ANYWHERE, VARIABLE, interface_to, name_interface


@pytest.mark.parametrize(
    ("machines", "own", "expected"),
    [("2", "ib0", "ib0"), ("1", None, None), ("2", None, interface_to(ANYWHERE))],
)
def test_only_what_nobody_said_and_several_machines_need(
    machines: str, own: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads to the loopback, as Debian's for the machine's own, says nothing: the default route does."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    monkeypatch.setenv(VARIABLE, own or "")
    name_interface()
    assert (os.environ.get(VARIABLE) or None) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no such machine", ""])
def test_no_interface_leads_there(host: str) -> None:
    assert interface_to(host) is None


def test_an_interface_of_this_machine() -> None:
    found = interface_to(ANYWHERE)
    if found is None:
        pytest.skip("this machine has no way to others")
    assert found in [name for _, name in socket.if_nameindex()] and found != "lo"

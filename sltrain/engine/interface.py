"""Through which network interface this machine reaches the others of its run.

Gloo listens on the address that the machine's own name resolves to. Debian and Ubuntu write that name into /etc/hosts
as 127.0.1.1, and many containers as 127.0.0.1: gloo then tells the other machines to call themselves, and the run ends
before it begins with "Connection refused". So the interface with the address from which MASTER_ADDR is reached is named
to gloo, by its variable GLOO_SOCKET_IFNAME (docs.pytorch.org/docs/stable/distributed.html, "Choosing the network
interface to use"). Who sets that variable decides. NCCL finds an interface itself, and has NCCL_SOCKET_IFNAME.
"""

import os
import socket
import struct

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # man 7 netdevice: the IPv4 address of an interface
ANYWHERE = "192.0.2.1"  # an address that no machine has (RFC 5737): what leads to it is the default route


def name_interface() -> None:
    """Name it to gloo if the run is on several machines and nobody did."""
    if os.environ.get(VARIABLE) or int(os.environ.get("GROUP_WORLD_SIZE", "1")) <= 1:
        return
    name = interface_to(os.environ.get("MASTER_ADDR", "")) or interface_to(ANYWHERE)
    if name is not None:
        os.environ[VARIABLE] = name


def interface_to(host: str) -> str | None:
    """The interface through which this machine reaches a name or IPv4 address, its own included; None for one that is
    not known here or is the loopback's, and on systems without Linux's calls. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            own = probe.getsockname()[0]
            if not own.startswith("127."):
                return next((name for _, name in socket.if_nameindex() if _address(probe, name) == own), None)
    except (OSError, ImportError):
        pass
    return None


def _address(any_socket: socket.socket, interface: str) -> str | None:
    """The IPv4 address of an interface; None without one."""
    import fcntl

    try:
        answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])

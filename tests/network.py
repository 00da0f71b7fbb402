"""Two hosts on this machine, joined by a link that can be cut: Linux network namespaces, each with a host name."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CARD = "eth0"
SUBNET = "192.0.2"  # for documentation: no real host has such an address
NOBODYS_CARD = "02:00:00:00:00:01"


@dataclass
class Host:
    """A network namespace, and the name that processes there find as their host's."""

    name: str
    address: str
    namespace: str

    def command(self, *command: str) -> list[str]:
        """`command` as it runs on this host; the process that is started becomes the command itself."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        return ["ip", "netns", "exec", self.namespace, *named]

    def ip(self, *arguments: str) -> None:
        """Change this host's network."""
        run_ip("-netns", self.namespace, *arguments)

    def connect(self) -> None:
        """Give the card its address and switch it on; without `lo` a host would not reach itself."""
        self.ip("link", "set", "lo", "up")
        self.ip("address", "add", f"{self.address}/24", "dev", CARD)
        self.ip("link", "set", CARD, "up")

    def move(self) -> None:
        """Take the next address: no packet of an older connection comes through again, and nobody closes it."""
        self.ip("address", "flush", "dev", CARD)
        self.address = f"{SUBNET}.{int(self.address.rpartition('.')[2]) + 1}"
        self.connect()


@dataclass(frozen=True)
class Network:
    """Two hosts and the link between them."""

    first: Host
    second: Host

    @contextmanager
    def down(self) -> Iterator[None]:
        """The second host's card is off: it is told that it reaches nobody. The first is told nothing."""
        self.second.ip("link", "set", CARD, "down")
        try:
            yield
        finally:
            self.second.ip("link", "set", CARD, "up")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What either sends is lost and neither is told: both send to a card that is not there."""
        for host, other in ((self.first, self.second), (self.second, self.first)):
            host.ip("neigh", "replace", other.address, "lladdr", NOBODYS_CARD, "dev", CARD, "nud", "permanent")
        try:
            yield
        finally:
            for host in (self.first, self.second):
                host.ip("neigh", "flush", "dev", CARD, "nud", "permanent")

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Silent, and then the second host has another address: only new connections work, as when a NAT forgets."""
        with self.silent():
            yield
            self.second.move()


def why_not() -> str:
    """Why there can be no such network here; empty: there can."""
    if missing := [name for name in ("ip", "unshare", "hostname") if not shutil.which(name)]:
        return f"network namespaces need {', '.join(missing)} (apt-get install iproute2 util-linux hostname)"
    probe = ["unshare", "--net", "--uts", "--mount", "true"]
    if os.geteuid() != 0 or subprocess.run(probe, capture_output=True).returncode != 0:
        return "network namespaces need root, and a kernel or container that lets it make them"
    return ""


@contextmanager
def joined_hosts() -> Iterator[Network]:
    """Two hosts; gone afterwards. What runs there must have ended by then."""
    token = secrets.token_hex(3)
    hosts = [Host(f"host-{i}", f"{SUBNET}.{i}", f"ablation-{token}-{i}") for i in (1, 2)]
    try:
        for host in hosts:
            run_ip("netns", "add", host.namespace)
        near, far = (["name", CARD, "netns", host.namespace] for host in hosts)
        run_ip("link", "add", *near, "type", "veth", "peer", *far)
        for host in hosts:
            host.connect()
        yield Network(*hosts)
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)  # it may not have been made


def run_ip(*arguments: str) -> None:
    """`ip` with these arguments; what it says where it fails goes to the log."""
    subprocess.run(["ip", *arguments], check=True)

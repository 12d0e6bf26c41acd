"""A slow network between hosts, in user space: it delays packets, limits their rate, and can be cut and healed.

The kernel's netem does this too, where there is one; containers and small virtual machines often have none. Each host
gets a TUN device in place of its card, under the same name and address, so that nothing on the hosts need know. One
process carries packets between the devices: it reads one, holds it as long as the link would, and writes it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from tests.cluster.hosts import Hosts

_MTU = 9000  # bytes; jumbo frames keep the process's share of a core small
_QUEUE_SECONDS = 0.3  # what a host may have waiting to be sent; beyond it packets are dropped, as by a switch

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000


class SlowLink:
    """Every host's card is a slow one while the context lasts.

    Args:
        hosts: those that are on.
        delay: seconds from one host to another, one way.
        megabits: per second that each host can send.
    """

    def __init__(self, hosts: Hosts, delay: float = 0.020, megabits: float = 100.0) -> None:
        self._hosts = hosts
        self._delay = delay
        self._megabits = megabits
        self._carrier: subprocess.Popen[str] | None = None

    def __enter__(self) -> SlowLink:
        hosts = self._hosts
        processes = [str(hosts.first_process(i)) for i in hosts.all()]
        command = [sys.executable, "-m", "tests.cluster.slow_link", str(self._delay), str(self._megabits), *processes]
        self._carrier = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._carrier.stdout is not None
        if self._carrier.stdout.readline().strip() != "ready":
            self._end_carrier()
            raise RuntimeError("the slow link does not start; its error is above")
        for i in hosts.all():
            hosts.ip(i, "link", "set", "eth0", "down")
            hosts.ip(i, "link", "set", "eth0", "name", "fast0")
            hosts.ip(i, "addr", "del", f"{hosts.address(i)}/24", "dev", "fast0")
            hosts.ip(i, "link", "set", "tun0", "name", "eth0")
            hosts.ip(i, "addr", "add", f"{hosts.address(i)}/24", "dev", "eth0")
            hosts.ip(i, "link", "set", "eth0", "mtu", str(_MTU), "txqueuelen", "2000", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end_carrier()  # the devices go with it
        hosts = self._hosts
        for i in hosts.all():
            with contextlib.suppress(RuntimeError):  # off
                hosts.ip(i, "link", "set", "fast0", "name", "eth0")
                hosts.ip(i, "addr", "add", f"{hosts.address(i)}/24", "dev", "eth0")
                hosts.ip(i, "link", "set", "eth0", "up")

    def cut(self, i: int) -> None:
        """Drop every packet from and to host `i`."""
        self._tell(f"cut {i}")

    def heal(self, i: int) -> None:
        """Carry its packets again."""
        self._tell(f"heal {i}")

    def _tell(self, line: str) -> None:
        assert self._carrier is not None and self._carrier.stdin is not None, "used outside its context"
        self._carrier.stdin.write(line + "\n")
        self._carrier.stdin.flush()

    def _end_carrier(self) -> None:
        assert self._carrier is not None and self._carrier.stdin is not None and self._carrier.stdout is not None
        self._carrier.stdin.close()
        self._carrier.stdout.close()
        try:
            self._carrier.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._carrier.kill()
            self._carrier.wait()


class _Link:
    """Packets on their way, and the rules that they follow."""

    def __init__(self, delay: float, megabits: float) -> None:
        self._delay = delay
        self._seconds_per_byte = 8e-6 / megabits
        self._sent_at: dict[int, float] = {}
        """When the last byte that a host has queued leaves it."""
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._count = 0
        self.unplugged: set[int] = set()

    def send(self, source: int, target: int, packet: bytes, now: float) -> None:
        """Take a packet of host `source`; it may be dropped."""
        if source in self.unplugged or target in self.unplugged:
            return
        sent_at = max(now, self._sent_at.get(source, 0.0)) + len(packet) * self._seconds_per_byte
        if sent_at - now > _QUEUE_SECONDS:
            return
        self._sent_at[source] = sent_at
        self._count += 1  # packets of one moment arrive in the order they came
        heapq.heappush(self._waiting, (sent_at + self._delay, self._count, target, packet))

    def arrived(self, now: float) -> list[tuple[int, bytes]]:
        """(host, packet) of all that are there by now."""
        found = []
        while self._waiting and self._waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._waiting)
            if target not in self.unplugged:
                found.append((target, packet))
        return found

    def next_arrival(self) -> float | None:
        """When the next packet will be there."""
        return self._waiting[0][0] if self._waiting else None


def _open_devices(processes: list[int]) -> dict[int, int]:
    """Host -> file descriptor of a new TUN device in the network of its first process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(network: int) -> None:
        if libc.setns(network, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    devices = {}
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    for host, process in enumerate(processes, start=1):
        network = os.open(f"/proc/{process}/ns/net", os.O_RDONLY)
        enter(network)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
        devices[host] = device
        os.close(network)
    enter(home)
    return devices


def _carry(link: _Link, devices: dict[int, int]) -> None:
    """Until standard input is closed, which says `cut HOST` and `heal HOST`."""
    host_of = {device: host for host, device in devices.items()}
    poll = select.poll()
    for descriptor in (sys.stdin.fileno(), *host_of):
        poll.register(descriptor, select.POLLIN)
    print("ready", flush=True)
    while True:
        for target, packet in link.arrived(time.monotonic()):
            with contextlib.suppress(OSError):  # the host is off, or its device not up yet
                os.write(devices[target], packet)
        until = link.next_arrival()
        wait = None if until is None else max(0.0, until - time.monotonic()) * 1000.0
        for descriptor, _ in poll.poll(wait):
            if descriptor == sys.stdin.fileno():
                line = os.read(descriptor, 4096).decode()
                if not line:
                    return
                for word, host in (each.split() for each in line.splitlines()):
                    (link.unplugged.add if word == "cut" else link.unplugged.discard)(int(host))
                continue
            try:
                for _ in range(64):  # then see to what has arrived
                    packet = os.read(descriptor, 65536)
                    target = packet[19]  # the last byte of the destination's address, which is the host's number
                    if packet[0] >> 4 == 4 and target in devices:
                        link.send(host_of[descriptor], target, packet, time.monotonic())
            except BlockingIOError:
                pass
            except OSError:  # the host is off
                poll.unregister(descriptor)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("delay", type=float, help="seconds, one way")
    parser.add_argument("megabits", type=float, help="per second and host")
    parser.add_argument("processes", type=int, nargs="+", help="first process of each host")
    arguments = parser.parse_args()
    _carry(_Link(arguments.delay, arguments.megabits), _open_devices(arguments.processes))


if __name__ == "__main__":
    _main()

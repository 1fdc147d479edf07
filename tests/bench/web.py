"""The dashboard under load: pings a second, and what idle hosts cost.

    python3 tests/bench/web.py [--hosts N] [--seconds S]
"""

from __future__ import annotations

import argparse
import resource
import selectors
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dashboard  # noqa: E402
from dashboard import API, VIEW, Dashboard, request  # noqa: E402


def used(pid: int) -> float:
    """Seconds of processor time that a process took."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def memory(pid: int) -> int:
    """Resident megabytes."""
    with open(f"/proc/{pid}/status") as file:
        return int(file.read().split("VmRSS:")[1].split()[0]) // 1024


class Caller:
    """A connection that asks again as soon as it is answered."""

    def __init__(self, port: int, data: bytes, again: bool):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.data, self.again, self.buffer = data, again, b""
        self.replies, self.bad, self.asked = 0, 0, 0.0
        self.waits: list[float] = []
        self.ask()

    def ask(self) -> None:
        self.asked = time.monotonic()
        self.sock.send(self.data)

    def read(self) -> None:
        self.buffer += self.sock.recv(65_536)
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = int(head.partition(b"Content-Length: ")[2].partition(
                b"\r\n")[0] or 0)
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            self.replies += 1
            self.bad += not head.startswith(b"HTTP/1.1 2")
            self.waits.append(time.monotonic() - self.asked)
            if self.again:
                self.ask()


def drive(callers: list[Caller], seconds: float) -> None:
    """Read what comes for so long."""
    with selectors.DefaultSelector() as selector:
        for caller in callers:
            selector.register(caller.sock, selectors.EVENT_READ, caller)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for key, _ in selector.select(0.1):
                key.data.read()


def pings(found: Dashboard, count: int, seconds: float) -> None:
    data = request(found.port, "POST", f"/ping/{found.check()}", b"done\n")
    callers = [Caller(found.port, data, True) for _ in range(count)]
    before, begin = used(found.process.pid), time.monotonic()
    drive(callers, seconds)
    took = time.monotonic() - begin
    done = sum(caller.replies for caller in callers)
    waits = sorted(wait for caller in callers for wait in caller.waits)
    print(f"{count} connections: {done / took:,.0f} pings/s on the disk, "
          f"{(used(found.process.pid) - before) / took:.0%} of a core, half "
          f"within {waits[len(waits) // 2] * 1000:.1f} ms, 99 % within "
          f"{waits[int(len(waits) * 0.99)] * 1000:.1f} ms, "
          f"{sum(caller.bad for caller in callers)} refused")
    for caller in callers:
        caller.sock.close()


def idle(found: Dashboard, count: int, streams: int, seconds: float) -> None:
    """Hosts that wait, and browsers that follow."""
    with found.client() as client:
        for number in range(count):
            client.send(request(found.port, "POST", "/api/v1/hosts", {
                "host": f"{number:032x}", "name": f"host {number}",
                "token_sha256": dashboard.sha256(f"{number:064x}")}, API))
            if number % 100 == 99:
                for _ in range(100):
                    assert client.reply().status == 201
    base = memory(found.process.pid)
    callers = [Caller(found.port, request(
        found.port, "POST", "/api/v1/sync", dashboard.sync_of(
            f"{number:032x}", wait=25), f"{number:064x}"), True)
        for number in range(count)]
    follow = [Caller(found.port, request(
        found.port, "GET", "/api/v1/stream?since=0", token=VIEW), False)
        for _ in range(streams)]
    drive(callers, 5)
    before, begin = used(found.process.pid), time.monotonic()
    drive(callers, seconds)
    took = time.monotonic() - begin
    print(f"{count} hosts that wait 25 s each and {streams} streams: "
          f"{(used(found.process.pid) - before) / took:.1%} of a core, "
          f"{memory(found.process.pid)} MB ({base} before), "
          f"{sum(caller.replies for caller in callers)} replies, "
          f"{sum(caller.bad for caller in callers)} refused")
    for caller in [*callers, *follow]:
        caller.sock.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--callers", type=int, default=32)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    with tempfile.TemporaryDirectory() as folder, Dashboard(
            Path(folder)) as found:
        found.settle()
        for count in (1, options.callers):
            pings(found, count, 5)
        idle(found, options.hosts, options.streams, options.seconds)
        print(found.log()[-500:])
        found.no_fault()


if __name__ == "__main__":
    main()

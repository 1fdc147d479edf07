"""A dashboard of the test's own: its process, and clients that speak HTTP
to it byte by byte. Loopback only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

import support

API, VIEW = "a1" * 32, "b2" * 32
HOST, HOST_TOKEN = "c3" * 16, "d4" * 32


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Reply:
    """What came back: status, headers by small names, body."""

    def __init__(self, status: int, headers: dict, body: bytes):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"{self.status} {self.headers} {self.body[:300]!r}"


class Client:
    """One connection, and what comes by it."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None,
                 seconds: float = 20):
        self.sock = socket.create_connection(("127.0.0.1", port), seconds)
        if tls:
            self.sock = tls.wrap_socket(self.sock,
                                        server_hostname="127.0.0.1")
        self.port, self.data, self.reset = port, bytearray(), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.sock.close()

    def send(self, data: bytes) -> "Client":
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)
        return self

    def more(self) -> bool:
        """Receive something; False at the end."""
        try:
            data = self.sock.recv(65_536)
        except (ConnectionResetError, ssl.SSLError):
            data, self.reset = b"", True
        self.data += data
        return bool(data)

    def head(self) -> tuple[int, dict]:
        while b"\r\n\r\n" not in self.data:
            if not self.more():
                raise EOFError(bytes(self.data[:300]))
        end = self.data.index(b"\r\n\r\n")
        first, *lines = self.data[:end].decode("latin-1").split("\r\n")
        del self.data[:end + 4]
        return int(first.split(" ")[1]), {
            name.lower(): value for name, value in (
                line.split(": ", 1) for line in lines)}

    def reply(self, method: str = "GET") -> Reply:
        status, headers = self.head()
        length = int(headers.get("content-length", 0)) \
            if method != "HEAD" else 0
        while len(self.data) < length:
            if not self.more():
                raise EOFError(bytes(self.data[:300]))
        body = bytes(self.data[:length])
        del self.data[:length]
        return Reply(status, headers, body)

    def to_the_end(self, seconds: float = 10) -> bytes:
        """All that comes until the other side hangs up."""
        until = time.monotonic() + seconds
        while self.more():
            assert time.monotonic() < until, "it does not hang up"
        return bytes(self.data)

    def ended(self) -> bool:
        """Nothing more comes: the other side has hung up."""
        return not self.data and not self.more()

    def line(self) -> bytes:
        """The next line of a stream that is not empty."""
        while True:
            while b"\n" not in self.data:
                if not self.more():
                    raise EOFError(bytes(self.data[:300]))
            end = self.data.index(b"\n")
            line = bytes(self.data[:end])
            del self.data[:end + 1]
            if line:
                return line

    def ask(self, method: str, path: str, body=None, token: str = "",
            **headers) -> Reply:
        self.send(request(self.port, method, path, body, token, **headers))
        return self.reply(method)


def request(port: int, method: str, path: str, body=None, token: str = "",
            **headers) -> bytes:
    """A request as bytes; a body that is no bytes becomes JSON."""
    headers = {name.replace("_", "-"): value
               for name, value in headers.items()}
    headers.setdefault("Host", f"127.0.0.1:{port}")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if body is not None and not isinstance(body, bytes):
        headers.setdefault("Content-Type", "application/json")
        body = json.dumps(body).encode()
    if body is not None:
        headers.setdefault("Content-Length", len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()
                   if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (
        body or b"")


class Dashboard:
    """`koitab dashboard` in a process of its own."""

    def __init__(self, folder: Path, *options: str, patch: str = "",
                 tls: ssl.SSLContext | None = None, prefix: tuple = (),
                 db: str = ""):
        self.folder, self.tls = Path(folder), tls
        self.db = db or str(self.folder / "dashboard.db")
        self.said = self.folder / f"said-{time.monotonic_ns()}"
        self.command = [*prefix, *support.program("koitab", patch=patch),
                        "dashboard"]
        listen = () if "--listen" in options else (
            "--listen", "127.0.0.1:0")
        with open(self.said, "ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *listen, "--db", self.db, *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={"PATH": os.environ.get("PATH", os.defpath),
                     "HOME": str(self.folder),
                     "KOI_HOME": str(self.folder / "koi")})
        self.port = 0

    def __enter__(self):
        found = support.wait_until(self.listens, 30, "the dashboard to listen")
        self.port = int(found)
        return self

    def __exit__(self, *error):
        self.stop(signal.SIGKILL)

    def listens(self) -> str:
        if self.process.poll() is not None:
            pytest.fail(f"the dashboard ended: {self.log()}")
        found = re.search(r"listens at https?://\S+:(\d+)\n", self.log())
        return found[1] if found and "next: " in self.log() else ""

    def log(self) -> str:
        return self.said.read_text("utf-8", "replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)

    def client(self, **how) -> Client:
        return Client(self.port, self.tls, **how)

    def ask(self, method: str, path: str, body=None, token: str = "",
            **headers) -> Reply:
        with self.client() as client:
            return client.ask(method, path, body, token, **headers)

    def settle(self) -> "Dashboard":
        """A dashboard with keys, and one host."""
        made = self.ask("POST", "/api/v1/dashboards", {
            "salt": "00" * 16, "rounds": 600_000,
            "api_sha256": sha256(API), "view_sha256": sha256(VIEW)})
        assert made.status == 201, made
        self.dash = made.json["dash"]
        self.join(HOST, HOST_TOKEN)
        return self

    def join(self, host: str, token: str) -> None:
        made = self.ask("POST", "/api/v1/hosts", {
            "host": host, "name": f"host {host[:4]}",
            "token_sha256": sha256(token)}, API)
        assert made.status == 201, made

    def check(self) -> str:
        """A check of the test's own: its uuid."""
        made = self.ask("POST", "/api/v1/checks", {
            "name": "a check", "slug": "a-check", "kind": "simple",
            "period": 3600, "grace": 60}, API)
        assert made.status == 201, made
        return made.json["id"]

    def no_fault(self) -> None:
        """Nothing surprised the dashboard."""
        assert "Traceback" not in self.log(), self.log()
        assert "fault of ours" not in self.log(), self.log()


def sync_of(host: str = HOST, **fields) -> dict:
    """What a host sends that has nothing to send."""
    return {"v": 1, "host": host, "epoch": 1, "instance":
            "1700000000000-00000001", "wait": 0, "now": time.time(),
            "offset": 0, "zone": "UTC", "version": "1.0", "boot": "b",
            "troubles": [], "list_sha": "", **fields}

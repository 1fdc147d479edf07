"""The dashboard under test, and its clients. No code is in two places:

InProcessDashboard  its database and its rules, under a clock the test sets
DashboardProcess    `koitab dashboard`, which can be killed and started again
HttpClient          one connection to it, byte by byte
DashboardHost       a koid that joined a dashboard, and its commands
Operator            asks, and signs requests, as the page does
PageDriver          the page in a real browser

Everything stays on loopback. tests/conftest.py has the fixtures.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest

import support
from browser import Browser

koitab = support.load("koitab")

NOW = 1_800_000_000.0       # a Friday in 2027
OPERATOR_TOKEN, VIEWER_TOKEN = "a1" * 32, "b2" * 32
HOST = "c3" * 16
# Started by root, a dashboard becomes another user; here it has root's files.
STAY_ROOT = ("-u", "root") if support.AS_ROOT else ()


def token_of(host: str) -> str:
    """The token that this rig gives a host of this id."""
    return koitab.sha256_hex("token of " + host)


HOST_TOKEN = token_of(HOST)


# 600,000 rounds take 0.2 s of processor time for each passphrase typed, and
# what is tested here does not depend on their number.
ROUNDS = 1000
FEW_ROUNDS = f"""
k.ROUNDS, k.derive_keys.__defaults__ = {ROUNDS}, ({ROUNDS},)
k.PAGE_JS = k.PAGE_JS.replace("LEAST_ROUNDS = 600000",
                              "LEAST_ROUNDS = {ROUNDS}")
"""


def derive(password: str, salt: bytes, rounds: int) -> koitab.Keys:
    """The keys of a password, also by as few rounds as above."""
    with mock.patch.object(koitab, "ROUNDS", ROUNDS):
        return koitab.derive_keys(password, salt, rounds)


def new_dashboard() -> dict:
    """The fields that make a dashboard with the two tokens above."""
    return {"salt": "00" * 16, "rounds": koitab.ROUNDS,
            "api_sha256": koitab.sha256_hex(OPERATOR_TOKEN)}


def new_token(role: str = "viewer", token: str = VIEWER_TOKEN,
              name: str = "") -> dict:
    """The fields that add an access token, called as its role."""
    return {"name": name or role, "role": role,
            "sha256": koitab.sha256_hex(token)}


# ==========================================================================
# What a host sends
# ==========================================================================

def frames(text: str, stream: int = 1) -> bytes:
    """The text as a job would write it, a frame a line."""
    return b"".join(koitab.frame(stream, number, line.encode())
                    for number, line in enumerate(text.splitlines(True)))


def spec(tag: str = "backup", **fields) -> str:
    return json.dumps({
        "user": "root", "tag": tag, "section": "Night", "name": tag.title(),
        "label": tag.title(), "when": "0 3 * * *", "words": "At 03:00",
        "command": f"do {tag}", "params": [], "confirm": "no", **fields})


def piece(run: int, at: int, data: bytes, **fields) -> dict:
    return {"run": run, "at": at, "data": base64.b64encode(data).decode(),
            **fields}


def sync_payload(host: str = HOST, **fields) -> dict:
    """What a host sends that has nothing to send."""
    return {"v": 3, "host": host, "epoch": 1, "instance":
            "1700000000000-00000001", "wait": 0, "now": time.time(),
            "offset": 0, "zone": "UTC", "version": "1.0", "boot": "b",
            "problems": [], "list_sha": "", **fields}


# ==========================================================================
# In this process
# ==========================================================================


class FakeClock(koitab.Clock):
    def __init__(self, now: float = NOW):
        self.time = now

    def now(self) -> float:
        return self.time

    def ticks(self) -> float:
        return self.time


class refused:
    """The block under `with` raises a koitab.Error of this status."""

    def __init__(self, status: int):
        self.status = status

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        assert isinstance(error, koitab.Error), f"nothing raised: {error!r}"
        assert error.status == self.status, error.message
        self.message = error.message
        return True


# Turns a database of today into one of schema 6, and of 7 where that has the
# same data.
BACK_TO_SCHEMA_6 = """
    drop trigger runs_added; drop trigger runs_changed;
    drop trigger runs_removed; drop table usage;
    drop index runs_with_output; drop index runs_by_host;
    drop index notifications_of_source;
    alter table notifications drop column source;
    alter table notifications drop column left_out;"""


class InProcessDashboard:
    """The Hub, driven by hand: no thread, no network, a clock that is set."""

    def __init__(self, path, clock=None, fresh: bool = True,
                 durable: bool = False):
        self.path = str(path)
        self.clock = clock or FakeClock()
        self.dashboard = koitab.Dashboard(self.path, self.clock)
        self.dashboard.open()
        if not durable:         # a test has no power cut
            self.dashboard.db.execute("pragma synchronous=off")
        self.lines: list[dict] = []
        self.dashboard.on_changes = self.lines.append
        self.change = self.number = 0
        self.dash = ""
        if fresh:
            self.dash = self.do(self.dashboard.credentials.create,
                                new_dashboard(),
                                NOW)["dash"]
            # Not by the operation: it would have a row in the audit.
            self.dashboard.db.insert("tokens", created=NOW, **new_token())
            self.dashboard.credentials.load(self.dashboard.db)
        else:
            self.dash = self.dashboard.credentials.dash

    # --- write and read

    def do(self, operation, *values):
        """Return the result of an operation. Raises what it raises."""
        found = []
        self.dashboard.write(operation, *values,
                             then=lambda *told: found.extend(told))
        self.dashboard.run_once()
        result, error = found
        if error:
            raise error
        return result

    def ask(self, question, *values):
        return self.dashboard.read(question, *values)

    def run_chores(self) -> None:
        """Do all that waits, and all chores that are due."""
        for _ in range(10_000):
            busy = self.dashboard.run_once()
            if self.dashboard.broken or not busy and all(
                    chore.at > self.now for chore in self.dashboard.chores):
                return
        raise AssertionError("there is always another chore")

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and look."""
        self.clock.time += seconds
        # they are tested by themselves
        for chore in self.dashboard.chores:
            chore.at = max(chore.at, self.clock.time + 1)
        self.dashboard.run_once()

    def reopen(self) -> InProcessDashboard:
        """The same database, opened by the next dashboard."""
        self.dashboard.close()
        dashboard = InProcessDashboard(self.path, self.clock, fresh=False)
        dashboard.change, dashboard.number = self.change, self.number
        return dashboard

    def principal_of(self, token: str):
        return self.dashboard.credentials.principal_of(token)

    @property
    def state(self) -> dict:
        return self.ask(self.dashboard.state, "operator", self.clock.now())

    @property
    def now(self) -> float:
        return self.clock.now()

    def rows(self, statement: str, *values) -> list:
        return self.dashboard.db.execute(statement, *values).fetchall()

    # --- hosts

    def join(self, host: str = HOST, name: str = "web1"):
        """Add a host; what its token is good for."""
        self.do(self.dashboard.hosts.join, {
            "host": host, "name": name,
            "token_sha256": koitab.sha256_hex(token_of(host))}, self.now)
        return self.principal_of(token_of(host))

    @property
    def ping_key(self) -> str:
        return self.state["dash"]["ping_key"]

    def sync(self, access, **fields) -> dict:
        return self.do(self.dashboard.host_sync.sync, access.host, {
            "v": 3, "host": access.host, "epoch": 1,
            "instance": "1000-abcdef01", "wait": 0, "now": self.now,
            "offset": 3600, "zone": "Europe/Berlin", "version": "1.0",
            "boot": "x", "problems": [], **fields}, self.now)

    def list_of(self, access, *specs: str, **fields) -> dict:
        return {"mac": "e" * 64, "body": json.dumps({
            "v": 1, "dash": self.dash, "host": access.host,
            "key": "0" * 16, "name": "web1", "at": 1,
            "jobs": list(specs), **fields})}

    def record(self, state: str = "done", **fields) -> dict:
        """The record of a run; a new one, unless `run` is given."""
        self.change += 1
        if "run" not in fields:
            self.number += 1
        done = state == "done"
        return {
            "run": self.number, "change": self.change, "user": "root",
            "tag": "backup", "section": "Night", "name": "Backup",
            "label": "Backup", "trigger": "schedule", "state": state,
            "due": self.now - 10, "requested_at": None,
            "started": self.now - 10 if state not in (
                "missed", "skipped", "queued") else None,
            "ended": self.now if done else None,
            "exit": 0 if done else None, "signal": None, "reason": "",
            "args": {}, "attempt": 1, "count": 1, "bytes": 0, "cut": False,
            "size": 0, "next": None, "nonce": "", **fields}

    def failing(self, count: int, size: int = 0) -> list[dict]:
        """The records of as many jobs that failed."""
        return [self.record(tag=f"job{number}", name=f"Job{number}", exit=1,
                            size=size) for number in range(count)]

    def runs(self, access, *records: dict, **fields) -> dict:
        return self.sync(access, records=list(records), **fields)

    def job(self, tag: str = "backup") -> dict:
        return next(job for job in self.state["jobs"] if job["tag"] == tag)

    # --- pings and notifications

    def ping(self, key: str, slug=None, action: str = "success",
             **call) -> tuple:
        return self.do(self.dashboard.checks.ping, key, slug, action, {
            "scheme": "https", "method": "GET", "ua": "curl", "ip": "::1",
            "rid": None, "create": False, "body": b"", **call}, self.now)

    def channel(self, kind: str = "mail", target: str = "ops@example.org"):
        return self.do(self.dashboard.alerts.change_channel,
                       {"kind": kind, "target": target}, self.now)["id"]

    def take_notifications(self) -> list[str]:
        """The titles of the notifications; there are none afterwards."""
        found = [title for title, in self.rows(
            "select title from notifications order by id")]
        self.dashboard.db.execute("delete from notifications")
        return found


# ==========================================================================
# A connection
# ==========================================================================


class HttpReply:
    """What came back: status, headers by small names, body."""

    def __init__(self, status: int, headers: dict, body: bytes):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"{self.status} {self.headers} {self.body[:300]!r}"


class HttpClient:
    """One connection, and the bytes that came by it."""

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

    def send(self, data: bytes) -> HttpClient:
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

    def reply(self, method: str = "GET") -> HttpReply:
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked" and method != "HEAD":
            return HttpReply(status, headers, b"".join(self.chunks()))
        length = int(headers.get("content-length", 0)) \
            if method != "HEAD" else 0
        return HttpReply(status, headers, self.take(length))

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes. Raises EOFError."""
        while len(self.data) < length:
            if not self.more():
                raise EOFError(bytes(self.data[:300]))
        data = bytes(self.data[:length])
        del self.data[:length]
        return data

    def chunks(self):
        """The chunks of a body whose length was not known: RFC 9112, 7.1."""
        size = 1
        while size:
            while b"\r\n" not in self.data:
                if not self.more():
                    raise EOFError(bytes(self.data[:300]))
            size = int(self.take(self.data.index(b"\r\n") + 2), 16)
            yield self.take(size + 2)[:-2]

    def read_to_end(self, seconds: float = 10) -> bytes:
        """All that comes until the other side closes the connection."""
        until = time.monotonic() + seconds
        while self.more():
            assert time.monotonic() < until, "the connection stays open"
        return bytes(self.data)

    def is_closed(self) -> bool:
        """Has the other side closed it, with nothing left to read?"""
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
            **headers) -> HttpReply:
        self.send(encode_request(self.port, method, path, body, token,
                                 **headers))
        return self.reply(method)


# What the page accepts: JSON with times in seconds since 1970.
SECONDS = "application/vnd.koi+json"


def encode_request(port: int, method: str, path: str, body=None,
                   token: str = "", **headers) -> bytes:
    """A request as bytes; a body that is not bytes becomes JSON."""
    headers = {name.replace("_", "-"): value
               for name, value in headers.items()}
    headers.setdefault("Host", f"127.0.0.1:{port}")
    headers.setdefault("Accept", SECONDS)
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


# ==========================================================================
# A process
# ==========================================================================


class DashboardProcess:
    """`koitab dashboard` on a free port, which stays its own when it is
    started again; and the hosts that were added to it, which end with it.

    `prefix` is a command that starts it, `db` another database than
    dashboard.db of the directory. Passphrases have few rounds, unless `rounds`
    is "".
    """

    def __init__(self, folder: Path, *options: str, patch: str = "",
                 tls: ssl.SSLContext | None = None, prefix: tuple = (),
                 db: str = "", rounds: str = FEW_ROUNDS):
        self.folder, self.options, self.tls = Path(folder), options, tls
        self.folder.mkdir(parents=True, exist_ok=True)
        self.db = Path(db or self.folder / "dashboard.db")
        self.patch = rounds + SOCKET_BY_DATABASE + patch
        self.prefix, self.port = prefix, 0
        self.logs: list[Path] = []      # one for each start
        self.hosts: dict[str, DashboardHost] = {}

    def start(self) -> DashboardProcess:
        """Start it; return when it listens."""
        self.logs.append(self.folder / f"dashboard-{len(self.logs)}.log")
        listen = () if "--listen" in self.options else (
            "--listen", f"127.0.0.1:{self.port}")
        with open(self.logs[-1], "wb") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *support.program("koitab", patch=self.patch),
                 "dashboard", *listen, "--db", str(self.db), *STAY_ROOT,
                 *self.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={"PATH": os.environ.get("PATH", os.defpath),
                     "HOME": str(self.folder),
                     "KOI_HOME": str(self.folder / "koi")})
        self.port = int(support.wait_until(
            self.listens, 30, "the dashboard to listen"))
        return self

    def listens(self) -> str:
        """Its port, as soon as it has said all that it says at the start."""
        if self.process.poll() is not None:
            pytest.fail(f"the dashboard ended: {self.log()}")
        log = self.logs[-1].read_text("utf-8", "replace")
        found = re.search(r"listens at https?://\S+:(\d+)\n", log)
        return found[1] if found and re.search(
            "dashboard: (next|the page): ", log) else ""

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def __enter__(self) -> DashboardProcess:
        return self.start()

    def __exit__(self, *_error) -> None:
        for host in self.hosts.values():
            host.stop(signal.SIGKILL)
            host.end_jobs()
        self.kill()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it said since its first start."""
        return "".join(log.read_text("utf-8", "replace")
                       for log in self.logs)

    def assert_no_bugs(self) -> None:
        """No exception surprised it."""
        assert "Traceback" not in self.log(), self.log()
        assert "internal error" not in self.log(), self.log()

    def rows(self, statement: str, *values) -> list[tuple]:
        """Rows of its database, read without its help."""
        db = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=30)
        try:
            return db.execute(statement, values).fetchall()
        finally:
            db.close()

    # --- over HTTP

    def client(self, **how) -> HttpClient:
        return HttpClient(self.port, self.tls, **how)

    def ask(self, method: str, path: str, body=None, token: str = "",
            **headers) -> HttpReply:
        with self.client() as client:
            return client.ask(method, path, body, token, **headers)

    def set_up(self) -> DashboardProcess:
        """Give it the tokens of this rig, and one host without a koid."""
        made = self.found(new_dashboard())
        assert made.status == 201, made
        self.dash = made.json["dash"]
        made = self.ask("POST", "/api/v1/tokens", new_token(),
                        OPERATOR_TOKEN)
        assert made.status == 200, made
        self.register_host(HOST, HOST_TOKEN)
        return self

    def founding_token(self) -> str:
        """The token that creates the dashboard."""
        path = Path(f"{self.db.absolute()}.founding")
        if not path.exists():           # on its own disk
            path = Path(f"/proc/{self.process.pid}/root{path}")
        return path.read_text().strip()

    def found(self, fields: dict) -> HttpReply:
        """Create the dashboard with these keys."""
        return self.ask("POST", "/api/v1/dashboards", fields,
                        self.founding_token())

    def register_host(self, host: str, token: str,
                      operator: str = OPERATOR_TOKEN) -> None:
        made = self.ask("POST", "/api/v1/hosts", {
            "host": host, "name": f"host {host[:4]}",
            "token_sha256": koitab.sha256_hex(token)}, operator)
        assert made.status == 201, made

    def add_check(self) -> str:
        """A check; its UUID."""
        made = self.ask("POST", "/api/v1/checks", {
            "name": "a check", "slug": "a-check", "kind": "simple",
            "period": 3600, "grace": 60}, OPERATOR_TOKEN)
        assert made.status == 201, made
        return made.json["id"]

    # --- hosts with a koid

    def add_host(self, name: str, tab: str = "",
                 shift: float = 0) -> DashboardHost:
        """Start a koid. It is not a member of this dashboard yet."""
        host = self.hosts[name] = DashboardHost(self.folder / name, name,
                                                shift)
        if tab:
            host.install(tab)
        host.start()
        return host


# ==========================================================================
# Hosts
# ==========================================================================


# All hosts are this one machine, so a patch gives each its name.
NAMED = "k.Machine.host = lambda self: {name!r}\n"
# An agent tries again, and is started again, after 0.1 s instead of 1 s.
QUICK_TO_RETRY = "k.PAUSE_FIRST = k.RESTART_FIRST = 0.1\n"
# /run/koi-dashboard is the machine's, not a test's.
SOCKET_BY_DATABASE = """
k.Machine.dashboard_directory = lambda self, db: k.posixpath.dirname(db)
"""
# Most tests come by plain http, as proxies and browsers do: as if each command
# had this option. test_dashboard_recordings.py has those of the Unix socket.
PLAIN_HTTP = "k.Invocation.plain_http = True\n"
# A clock that goes right, but for being set wrong.
SHIFTED = """
now = k.Clock.now
k.Clock.now = lambda self: now(self) + {shift}
"""


class DashboardHost(support.Koi):
    """A koid, and the koitab commands of its machine."""

    def __init__(self, folder: Path, name: str, shift: float = 0,
                 rounds: str = FEW_ROUNDS, plain_http: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        self.name = name
        self.patch = rounds + QUICK_TO_RETRY + NAMED.format(name=name) + (
            SHIFTED.format(shift=shift) if shift else "") \
            + PLAIN_HTTP * plain_http

    def command(self, *args: str) -> list[str]:
        return [*support.program("koitab", self.python, self.patch), *args]

    def koitab(self, *args: str, stdin: str = "", seconds: float = 60
               ) -> support.Result:
        """Run a koitab command on this host, and wait for its end."""
        done = subprocess.run(
            self.command(*args), env=self.env, input=stdin.encode(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=seconds,
            cwd=str(self.folder))
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def install(self, text: str) -> None:
        done = self.koitab("-", stdin=text)
        assert done.code == 0, done

    def agent(self) -> int:
        """The pid of the process that talks to the dashboard, or 0."""
        pid = self.daemon.pid
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                children = file.read().split()
            for child in children:
                # The others are supervisors.
                with open(f"/proc/{child}/cmdline") as file:
                    if "koi-agent" in file.read():
                        return int(child)
        return 0

    def cpu_seconds(self) -> float:
        """Processor time of koid and its agent, so far."""
        ticks = 0
        for pid in filter(None, (self.daemon.pid, self.agent())):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/stat") as file:
                    parts = file.read().rpartition(")")[2].split()
                ticks += int(parts[11]) + int(parts[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    # --- this host and a dashboard

    def create_dashboard(self, dashboard: DashboardProcess) -> Operator:
        """`koitab -d new`; its text is `printed`."""
        done = self.koitab("-d", "new", dashboard.url,
                           stdin=dashboard.founding_token() + "\n")
        assert done.code == 0, done
        self.printed = done.out
        dash = re.search(r"^dashboard +\S+/#([0-9a-f]{16})$", done.out, re.M)
        password = re.search(r"^passphrase +(\S+)$", done.out, re.M)
        return Operator(dashboard, dash[1], password[1])

    def join(self, operator: Operator) -> None:
        """`koitab -d join`"""
        done = self.koitab(
            "-d", "join", f"{operator.dashboard.url}/#{operator.dash}",
            stdin=operator.password + "\n")
        assert done.code == 0, done


# ==========================================================================
# Who has the passphrase
# ==========================================================================


class Operator:
    """A user with the passphrase: asks, and signs as the page does."""

    def __init__(self, dashboard: DashboardProcess, dash: str,
                 password: str):
        self.dashboard, self.dash, self.password = dashboard, dash, password
        salted = dashboard.ask("GET", f"/api/v1/salt?dash={dash}").json
        self.keys = derive(password, bytes.fromhex(salted["salt"]),
                           salted["rounds"])
        self.token = self.keys.api.hex()

    def reply(self, method: str, path: str, body=None, token: str = ""
              ) -> HttpReply:
        return self.dashboard.ask(method, "/api/v1/" + path, body,
                                  token or self.token)

    def ask(self, path: str):
        reply = self.reply("GET", path)
        assert reply.status == 200, (path, reply)
        return reply.json

    def tell(self, path: str, body: dict):
        reply = self.reply("POST", path, body)
        assert reply.status < 300, (path, reply)
        return reply.json

    def viewer_token(self) -> str:
        """A fresh access token of a viewer."""
        token = os.urandom(32).hex()
        self.tell("tokens", new_token("viewer", token, token))
        return token

    def host(self, name: str) -> str:
        return next(host["id"] for host in self.ask("state")["hosts"]
                    if host["name"] == name)

    def job(self, name: str, host: str = "") -> dict | None:
        return next((job for job in self.ask("state")["jobs"]
                     if name in (job["name"], job["label"])
                     and host in ("", job["host"])), None)

    def runs(self, name: str) -> list[dict]:
        job = self.job(name)
        return self.ask(f"jobs/{job['id']}/runs?limit=100")["runs"] \
            if job else []

    def key(self, host: str) -> bytes:
        return koitab.host_key(self.keys.run, host)

    def specs(self, host: str) -> dict[str, str]:
        """Name -> spec text, of the list that the host signed."""
        def listed():
            reply = self.reply("GET", f"hosts/{host}/list")
            return reply.json if reply.status == 200 else None
        found = koitab.verify_job_list(support.wait_until(
            listed, 20, "a signed list"), self.key(host), self.dash, host)
        return {json.loads(text)["name"]: text for text in found["jobs"]}

    def request(self, host: str, spec: str, args: dict | None = None,
                secrets: dict | None = None, **changes) -> dict:
        """The fields of a request, as the page fills them in."""
        job, now, key = json.loads(spec), int(time.time() * 1000), \
            self.key(host)
        nonce = changes.get("nonce") or os.urandom(16).hex()
        return {"v": 1, "do": "run", "key": koitab.key_id(key),
                "dash": self.dash, "host": host, "user": job["user"],
                "tag": job["tag"], "job": koitab.sha256_hex(spec),
                "args": args or {}, "secrets": {
                    name: koitab.encrypt_secret(key, nonce, name,
                                                value.encode()
                                                ).hex()
                    for name, value in (secrets or {}).items()},
                "nonce": nonce, "iat": now, "exp": now + 300_000, **changes}

    def sealed(self, host: str, body: dict, key: bytes = b"") -> dict:
        text = json.dumps(body, ensure_ascii=False)
        return {"host": host, "body": text,
                "mac": koitab.run_mac(key or self.key(host), text)}

    def result(self, nonce: str, seconds: float = 20) -> dict:
        """What became of a request: with the run, if there is one."""
        def settled():
            state = self.ask(f"requests/{nonce}")
            return state if state["state"] != "waiting" and (
                state["state"] != "accepted" or state["run"]) else None
        return support.wait_until(settled, seconds, f"a result of {nonce}")

    def text(self, run: int) -> str:
        return self.reply("GET", f"runs/{run}/raw").body.decode()


# ==========================================================================
# The page
# ==========================================================================


ADVICE = "[DOM] Password forms should"   # of Chromium: a user name, too

# Runs in each document before its own script: notes what must not happen.
WATCH = """
window.watch = {faults: [], pwned: 0};
window.pwned = () => { watch.pwned += 1; };
window.alert = window.confirm = window.prompt = window.pwned;
document.addEventListener("securitypolicyviolation", (event) =>
  watch.faults.push(`CSP ${event.violatedDirective}: ${event.blockedURI} ${
    event.sample}`));
addEventListener("error", (event) => watch.faults.push(event.message));
addEventListener("unhandledrejection", (event) =>
  watch.faults.push(`not caught: ${event.reason}`));
"""


class PageDriver(Browser):
    """The dashboard's page, and whether it behaves."""

    def begin(self, size, flags):
        super().begin(size, flags)
        self.command("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    kept: list[str] = []

    def cpu_seconds(self) -> float:
        """Processor time of the page's thread, which a busy machine does not
        lengthen."""
        self.command("Performance.enable", timeDomain="threadTicks")
        return next(metric["value"] for metric in self.command(
            "Performance.getMetrics")["metrics"]
            if metric["name"] == "TaskDuration")

    def go(self, url: str) -> None:
        """A fresh document; what the one before did wrong is not lost."""
        self.kept = self.faults()
        super().go("about:blank")
        super().go(url)

    def open(self, url: str, secret: str, path: str = "jobs") -> None:
        """A fresh document; log in."""
        self.go(url)
        self.insert("#secret", secret)
        self.keys("Enter")
        self.wait("document.body.classList.contains('open')", 30)
        if path != "jobs":
            self.visit(path)

    def visit(self, path: str, css: str = "") -> None:
        """Go to a view of the page, and wait for an element of it."""
        # Until the event, the elements are those of the view before.
        self.js("""
            const to = arguments[0];
            return location.hash === to || new Promise((done) => {
                addEventListener("hashchange", done, {once: true});
                location.hash = to;
            }).then(() => true);""", f"#/{path}")
        if css:
            self.wait(f"document.querySelector({json.dumps(css)})")

    def insert(self, css: str, text: str) -> None:
        """Put text in the place of what is in a field, as an input method
        does: all of Unicode."""
        self.click(css)
        self.js("document.activeElement.select()")
        self.command("Input.insertText", text=text)

    def shows(self, text: str, seconds: float = 30, css: str = "body") -> None:
        """Wait until a text is to be seen."""
        self.wait(f"document.querySelector({json.dumps(css)})?.innerText"
                  f".includes({json.dumps(text)})", seconds)

    def press(self, words: str, css: str = "button, a") -> None:
        """Click on what bears these words."""
        self.wait(f"[...document.querySelectorAll({json.dumps(css)})].some("
                  f"(one) => one.checkVisibility() && one.innerText.trim() "
                  f"=== {json.dumps(words)})")
        element = self.js(
            f"return [...document.querySelectorAll({json.dumps(css)})].find("
            "(one) => one.checkVisibility() && one.innerText.trim() === "
            "arguments[0])", words)
        self.call("POST", f"/element/{next(iter(element.values()))}/click")

    def faults(self, *expected: str) -> list[str]:
        """What went wrong since the last time; what is expected left out."""
        found = self.js("return window.watch ? watch.faults.splice(0).concat("
                        "watch.pwned ? ['PWNED ' + watch.pwned] : []) : []")
        found, self.kept = [*self.kept, *found, *self.console()], []
        return [text for text in found
                if not any(part in text for part in (ADVICE, *expected))]

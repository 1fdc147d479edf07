#!/usr/bin/env python3
"""What koi's dashboard bears: pings, records, agents, clicks, a million runs.

    python3 tests/bench/dashboard.py [--quick] [--only NAMES] [--koitab FILE]

The machine is noisy, so what counts are ratios within one run: of rounds in
turn (A B C A B C ...). Each row says what is wanted and what was measured;
nothing here fails. Who asks is in processes of its own, and the rows say how
much of the processor that takes. All of it goes over the loopback.

    pings     acknowledged pings a second over many connections, each kept on
              the disk (synchronous=FULL), against an http.server that
              commits each, and one that keeps nothing
    records   records of runs a second by POST /api/v1/sync, one at a time as
              runs begin and end, and 20 and 200 as after a pause
    agents    2,000 hosts whose long polls wait and 200 browsers that follow
              the stream, held by one process, plain and with TLS
    idle      wake-ups of a dashboard with 100 checks that nobody asks, and
              the size of what a browser reads first
    click     from a signed request to the first line of the job: a real
              koid, with nothing else to do and with the 2,000 agents held
    million   every question of the page, asked of 1,000,000 runs of 300
              jobs on 20 hosts
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import http.client
import http.server
import json
import os
import random
import re
import resource
import selectors
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True

import koi as bench  # noqa: E402
from koi import plural, row, status_of  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
API, VIEW, DASH = "a1" * 32, "b2" * 32, "d0" * 8
RUN_KEY = bytes(range(32))
PING_WIRES, PING_CHECKS = 192, 100
# Pings a second, a connection each, that Healthchecks 4.4 with uWSGI (four
# processes) and PostgreSQL took on a machine of this class with two cores.
HEALTHCHECKS = 152
JOBS_OF_HOST = 15


def name_of_host(number: int) -> str:
    return f"{number:032x}"


def token_of_host(number: int) -> str:
    return f"{number:064x}"


def seconds_of(pid: int) -> float:
    """The processor time of a process, with that of threads that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the dashboard --------------------------------------------------------


class Dashboard:
    """`koitab dashboard` in its own process. `fill(koi, db)` puts into
    its database what is to be there from the beginning, by SQL."""

    def __init__(self, args, folder: Path, fill=None, tls: bool = False):
        folder.mkdir()
        self.db, self.said = folder / "dashboard.db", folder / "said"
        self.cert = folder / "cert.pem" if tls else None
        self.found(fill)
        command = [args.koitab.resolve(), "dashboard", "--listen",
                   "127.0.0.1:0", "--db", self.db]
        if os.geteuid() == 0:       # else it becomes another user
            command += ["-u", "root"]
        if tls:
            make_certificate(folder)
            command += ["--cert", self.cert, "--key", folder / "key.pem"]
        with open(self.said, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={"PATH": bench.PATH, "HOME": str(folder),
                     "KOI_HOME": str(folder / "koi")})
        self.pid, self.port = self.process.pid, 0
        began = time.monotonic()
        while "dashboard: the page: " not in self.log():
            if self.process.poll() is not None:
                raise SystemExit(f"bench: it ended: {self.log()}")
            time.sleep(0.01)
        self.start_time = time.monotonic() - began
        self.port = int(self.log().split("listens at ")[1].split(
            "\n")[0].rpartition(":")[2])

    def found(self, fill) -> None:
        """A database with a dashboard in it."""
        dashboard = KOI.Dashboard(str(self.db))
        dashboard.open()
        dashboard.db.execute("pragma synchronous=off")
        dashboard.db.execute("pragma cache_size=-262144")
        dashboard.db.execute("begin")
        dashboard.db.insert(
            "dashboard", id=1, dash=DASH, salt="00" * 16, rounds=600_000,
            api_sha256=KOI.sha256_hex(API), ping_key="pings",
            badge_key="badge", created=time.time())
        dashboard.db.insert(
            "tokens", name="bench", role="viewer", created=time.time(),
            sha256=KOI.sha256_hex(VIEW))
        if fill:
            fill(dashboard.db.connection)
        dashboard.db.execute("commit")
        dashboard.close()

    def log(self) -> str:
        return self.said.read_text("utf-8", "replace")

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for line in self.log().splitlines():
            if "internal error" in line or "Traceback" in line:
                row("A FAULT OF THE DASHBOARD'S", "", "", line)

    def client(self):
        """A connection, to ask one thing after the other."""
        return http.client.HTTPConnection("127.0.0.1", self.port, 60)


def make_certificate(folder: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-days", "90", "-subj",
         "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, stderr=subprocess.DEVNULL)


def ask(client, method: str, path: str, body=None, token: str = API):
    """(status, bytes) of one answer."""
    client.request(method, path, body and json.dumps(body), {
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json"})
    response = client.getresponse()
    return response.status, response.read()


def put_hosts(db, many: int) -> None:
    """Hosts with a list, seen a moment ago."""
    now = time.time()
    db.executemany(
        "insert into hosts (host, name, token, joined, seen, list, mac, "
        "list_sha) values (?, ?, ?, ?, ?, '{}', '', ?)",
        [(name_of_host(n), f"host{n}", KOI.sha256_hex(token_of_host(n)), now,
          now, KOI.sha256_hex("{}")) for n in range(1, many + 1)])


def greeting(number: int, wait: float, **more) -> dict:
    """What a host sends that has nothing to say."""
    return {"v": 3, "host": name_of_host(number), "epoch": 1, "instance":
            "1700000000000-00000001", "wait": wait, "now": time.time(),
            "offset": 0, "zone": "UTC", "version": "1.0", "boot": "b",
            "problems": [], "list_sha": KOI.sha256_hex("{}"), **more}


def as_request(method: str, path: str, token: str = "", body: bytes = b""
               ) -> bytes:
    return (f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            + (f"Authorization: Bearer {token}\r\n" if token else "")
            + ("Content-Type: application/json\r\nContent-Length: "
               f"{len(body)}\r\n" if body else "") + "\r\n").encode() + body


# --- processes that ask ---------------------------------------------------


class Loader:
    """One of this file's functions in its own process. It says one
    line when it is ready (or done) and ends with our end of its stdin."""

    def __init__(self, operation, *values):
        self.process = subprocess.Popen(
            [sys.executable, "-B", __file__, "--inside", operation.__name__,
             json.dumps(values), "--koitab", KOI.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def said(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("bench: who should ask has ended")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def done_by(operation, *values):
    """What such a process found."""
    with Loader(operation, *values) as loader:
        return loader.said()


def say(value) -> None:
    print(json.dumps(value), flush=True)


class Caller:
    """One connection that asks again as soon as it is answered."""

    def __init__(self, port: int, following):
        self.sock = socket.create_connection(("127.0.0.1", port), 60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.following, self.data, self.since = following, b"", 0.0

    def ask(self) -> None:
        self.since = time.perf_counter()
        self.sock.sendall(self.following(None))

    def hear(self) -> int | None:
        """How many things were acknowledged; None: it is not all yet."""
        self.data += self.sock.recv(262_144)
        end = self.data.find(b"\r\n\r\n")
        at = self.data.find(b"Content-Length: ", 0, end)
        if end < 0 or at < 0:
            return None
        size = int(self.data[at + 16:self.data.index(b"\r", at)])
        if len(self.data) < end + 4 + size:
            return None
        data, self.data = self.data, b""
        return self.following(data)


def hammer(callers: list[Caller], seconds: float) -> dict:
    """All ask at once, for so long. The first fifth warms up."""
    with selectors.DefaultSelector() as waiting:
        for caller in callers:
            waiting.register(caller.sock, selectors.EVENT_READ, caller)
            caller.ask()
        began = time.perf_counter() + seconds / 5
        counted, bad, times = 0, 0, []
        before = time.process_time()
        while True:
            for key, _ in waiting.select(5):
                found = key.data.hear()
                if found is None:
                    continue
                now = time.perf_counter()
                if now >= began:
                    counted += found
                    bad += not found
                    times.append(now - key.data.since)
                key.data.ask()
            took = time.perf_counter() - began
            if took >= seconds * 4 / 5:
                break
    spent = (time.process_time() - before) / seconds
    times.sort()
    return {"rate": counted / took, "bad": bad, "cpu": spent,
            "p50": quantile(times, .5), "p99": quantile(times, .99)}


def quantile(times: list, part: float) -> float:
    return times[min(int(len(times) * part), len(times) - 1)] if times \
        else float("nan")


class Rounds:
    """What several servers did in turn, and what that took of the
    processor."""

    def __init__(self):
        self.found = collections.defaultdict(list)

    def take(self, name: str, pid: int, operation, *values) -> None:
        before, began = seconds_of(pid), time.monotonic()
        found = done_by(operation, *values)
        found["served"] = (seconds_of(pid) - before) / (
            time.monotonic() - began)
        self.found[name].append(found)

    def median(self, name: str, field: str = "rate") -> float:
        return statistics.median(each[field] for each in self.found[name])

    def ratio(self, name: str, other: str) -> float:
        return statistics.median(
            mine["rate"] / theirs["rate"] for mine, theirs in zip(
                self.found[name], self.found[other]))

    def note(self, name: str) -> str:
        bad = sum(each["bad"] for each in self.found[name])
        rates = sorted(each["rate"] for each in self.found[name])
        return (f"{rates[0]:,.0f} to {rates[-1]:,.0f}; p50 / p99 "
                f"{self.median(name, 'p50') * 1e3:.0f} / "
                f"{self.median(name, 'p99') * 1e3:.0f} ms; CPU server "
                f"{self.median(name, 'served'):.0%}, who asks "
                f"{self.median(name, 'cpu'):.0%}"
                + (f"; {bad} NOT ACKNOWLEDGED" if bad else ""))


# --- the baseline: http.server and one commit for each request ------------

BASELINE = """
create table pings (id integer primary key, "check" text, at real, ip text,
    ua text);
create table runs (id integer primary key, host text, n integer,
    state text, started real, ended real, body text, unique (host, n));
"""


class Plain(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True

    def do_GET(self) -> None:
        if self.path.startswith("/kept/"):
            self.server.keep([(
                'insert into pings ("check", at, ip, ua) values (?,?,?,?)',
                (self.path[6:], time.time(), self.client_address[0],
                 self.headers.get("user-agent", "")))])
        self.reply(b"OK")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(
            self.headers["Content-Length"])))
        self.server.keep([(
            "insert or replace into runs (host, n, state, started, ended, "
            "body) values (?,?,?,?,?,?)",
            (asked["host"], each["run"], each["state"], each["started"],
             each["ended"], json.dumps(each))) for each in asked["records"]])
        self.reply(json.dumps({"acked": asked["records"][-1]["change"]}
                              ).encode())

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args) -> None:
        pass


class Baseline(http.server.ThreadingHTTPServer):
    """One connection under a lock: threads with their own would wait for
    each other by sleeping."""

    daemon_threads, request_queue_size = True, 1024

    def __init__(self, path: str):
        super().__init__(("127.0.0.1", 0), Plain)
        self.db = sqlite3.connect(path, isolation_level=None,
                                  check_same_thread=False)
        self.db.executescript("pragma journal_mode=wal; pragma "
                              f"synchronous=full; {BASELINE}")
        self.lock = threading.Lock()

    def handle_error(self, _request, _address) -> None:
        """Who asked has disconnected."""

    def keep(self, rows: list) -> None:
        with self.lock:
            self.db.execute("begin immediate")
            for statement, values in rows:
                self.db.execute(statement, values)
            self.db.execute("commit")


def serve_plain(path: str) -> None:
    server = Baseline(path)
    say(server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


# --- pings ----------------------------------------------------------------


def load_pings(port: int, paths: list, wires: int, seconds: float) -> None:
    def following(path: str):
        request = as_request("GET", path)
        return lambda answer: request if answer is None else int(
            answer.endswith(b"\r\n\r\nOK"))

    say(hammer([Caller(port, following(paths[n % len(paths)]))
                for n in range(wires)], seconds))


def load_fresh_pings(port: int, paths: list, threads: int, seconds: float
                     ) -> None:
    """Each ping by its own connection, as curl sends it."""
    times, bad = [], []
    end = time.perf_counter() + seconds

    def send(number: int) -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port), 60) as sock:
                sock.sendall(as_request("GET", paths[number % len(paths)]))
                data = sock.recv(65_536)
            (times if data.endswith(b"\r\n\r\nOK") else bad).append(
                time.perf_counter() - began)
            number += threads

    began, before = time.perf_counter(), time.process_time()
    workers = [threading.Thread(target=send, args=(number,))
               for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - began
    times.sort()
    say({"rate": len(times) / took, "bad": len(bad),
         "cpu": (time.process_time() - before) / took,
         "p50": quantile(times, .5), "p99": quantile(times, .99)})


def put_checks(db) -> None:
    db.executemany(
        "insert into checks (uuid, name, slug, tags, desc, kind, "
        "period, grace, schedule, tz, start_within, run_limit, "
        "manual_resume, methods, created) values (?, ?, ?, '', '', ?, 300, "
        "60, '*/5 * * * *', 'UTC', 0, 0, 0, '', ?)",
        [(uuid_of(n), f"check {n}", f"check-{n}", "cron" if n % 2 else
          "simple", time.time()) for n in range(PING_CHECKS)])


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def disk_row(folder: Path) -> None:
    """What one commit costs at least."""
    fd, times = os.open(folder / "disk", os.O_CREAT | os.O_WRONLY), []
    for _ in range(100):
        os.write(fd, bytes(4096))
        began = time.perf_counter()
        os.fdatasync(fd)
        times.append(time.perf_counter() - began)
    os.close(fd)
    row("disk: fdatasync", "", f"{statistics.median(times) * 1e3:.1f} ms",
        "the median; one commit is at least one of these")


def pings(args, folder: Path) -> None:
    rounds, many = Rounds(), 2 if args.quick else args.rounds
    seconds = 3 if args.quick else 8
    disk_row(folder)
    checks = [f"/ping/{uuid_of(n)}" for n in range(PING_CHECKS)]
    with Dashboard(args, folder / "pings", put_checks) as ours, \
            Loader(serve_plain, str(folder / "plain.db")) as plain:
        port = plain.said()
        for _ in range(many):
            rounds.take("koi", ours.pid, load_pings, ours.port, checks,
                        PING_WIRES, seconds)
            for name in ("kept", "bare"):
                rounds.take(name, plain.process.pid, load_pings, port,
                            [f"/{name}/1"], PING_WIRES, seconds)
            rounds.take("fresh", ours.pid, load_fresh_pings, ours.port,
                        checks, 64, seconds)
        for wires in () if args.quick else (1, 16, 1000):
            rounds.take(f"{wires}", ours.pid, load_pings, ours.port, checks,
                        wires, seconds)
        size = status_of(ours.pid, "VmHWM") / 1024
    row("pings: acknowledged a second", "3,000",
        f"{rounds.median('koi'):,.0f}",
        f"{PING_WIRES} connections; {rounds.note('koi')}; peak {size:.0f} MB")
    row("pings: / http.server, a commit each", "more than 1",
        f"{rounds.ratio('koi', 'kept'):.2f}",
        f"{rounds.median('kept'):,.0f}/s; {rounds.note('kept')}")
    row("pings: / http.server, nothing kept", "",
        f"{rounds.ratio('koi', 'bare'):.2f}",
        f"{rounds.median('bare'):,.0f}/s; {rounds.note('bare')}")
    for wires in () if args.quick else (1, 16, 1000):
        name = str(wires)
        row(f"pings: with {plural(wires, 'connection')}", "",
            f"{rounds.median(name):,.0f}", rounds.note(name))
    row("pings: a connection each", f"{10 * HEALTHCHECKS:,}",
        f"{rounds.median('fresh'):,.0f}", rounds.note("fresh"))
    row("pings: / Healthchecks, a connection each", "at least 10",
        f"{rounds.median('fresh') / HEALTHCHECKS:.1f}",
        f"its {HEALTHCHECKS}/s were measured at another time")


# --- records --------------------------------------------------------------

RECORD = ('{"run":%d,"change":%d,"user":"root","tag":"job%d","section":"",'
          '"name":"job %d","label":"/usr/local/bin/job --number %d",'
          '"trigger":"schedule","state":"%s","due":%.0f,"requested_at":null,'
          '"started":%.3f,"ended":%s,"exit":%s,"signal":null,"reason":"",'
          '"args":{},"attempt":1,"count":1,"bytes":0,"cut":false,"size":0,'
          '"next":%.0f,"nonce":""}')


class Teller:
    """A host that tells of its runs, so many at a time: one as it begins
    and as it ends; more at a time when they have ended."""

    def __init__(self, number: int, batch: int, epoch: int):
        self.number, self.batch, self.change = number, batch, 0
        letter = greeting(number, 0, records=[], epoch=epoch)
        del letter["records"]
        self.head = json.dumps(letter)[:-1] + ', "records": ['

    def record(self) -> str:
        self.change += 1
        run, going = self.change, False
        if self.batch == 1:
            run, going = (self.change + 1) // 2, self.change % 2 == 1
        job, at = run % JOBS_OF_HOST, int(time.time())
        ended = "null" if going else f"{at + 0.5:.3f}"
        status = "null" if going else str(int(run % 50 == 0))
        return RECORD % (run, self.change, job, job, job, "running" if going
                         else "done", at, at, ended, status, at + 300)

    def following(self, answer: bytes | None):
        if answer is None:
            records = ",".join(self.record() for _ in range(self.batch))
            return as_request("POST", "/api/v1/sync", token_of_host(
                self.number), (self.head + records + "]}").encode())
        acked = json.loads(answer[answer.index(b"\r\n\r\n"):]).get("acked")
        return self.batch if acked == self.change else 0


def load_records(port: int, batch: int, wires: int, epoch: int,
                 seconds: float) -> None:
    say(hammer([Caller(port, Teller(n + 1, batch, epoch).following)
                for n in range(wires)], seconds))


def records(args, folder: Path) -> None:
    rounds, many = Rounds(), 1 if args.quick else max(args.rounds // 2, 2)
    seconds, epoch = 3 if args.quick else 8, 0
    with Dashboard(args, folder / "records",
                   lambda db: put_hosts(db, 200)) as ours, \
            Loader(serve_plain, str(folder / "plain2.db")) as plain:
        port = plain.said()
        for _ in range(many):
            for batch, wires in ((1, 100), (20, 20), (200, 10)):
                epoch += 1
                for name, pid, where in (
                        ("koi", ours.pid, ours.port),
                        ("plain", plain.process.pid, port)):
                    rounds.take(f"{name} {batch}", pid, load_records, where,
                                batch, wires, epoch, seconds)
    for batch, wires in ((1, 100), (20, 20), (200, 10)):
        mine, theirs = f"koi {batch}", f"plain {batch}"
        row(f"records: a second, {batch} at a time", "",
            f"{rounds.median(mine):,.0f}",
            f"{wires} hosts; {rounds.note(mine)}")
        row("records: / http.server, a commit each", "",
            f"{rounds.ratio(mine, theirs):.2f}",
            f"{rounds.median(theirs):,.0f}/s; {rounds.note(theirs)}")


# --- agents ---------------------------------------------------------------


def load_agents(port: int, agents: int, viewers: int, cert: str | None
                ) -> None:
    """Hold them until stdin ends."""
    raise_limit()
    asyncio.run(hold_all(port, agents, viewers, cert))


async def hold_all(port: int, agents: int, viewers: int, cert: str | None
                   ) -> None:
    context = ssl.create_default_context(cafile=cert) if cert else None
    door, held, wrong = asyncio.Semaphore(32), [], collections.Counter()

    async def connected():
        async with door:
            return await asyncio.open_connection("127.0.0.1", port,
                                                 ssl=context, limit=2**16)

    async def agent(number: int) -> None:
        reader, writer = await connected()
        wait = 0.0
        while True:
            body = json.dumps(greeting(number, wait)).encode()
            writer.write(as_request("POST", "/api/v1/sync",
                                    token_of_host(number), body))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                wrong[head[:12]] += 1
            await reader.readexactly(int(head.split(
                b"Content-Length: ")[1].split(b"\r")[0]))
            if not wait:        # so that they do not call at one moment
                held.append(number)
            wait = wait and 25 or random.uniform(1, 25)

    async def viewer() -> None:
        reader, writer = await connected()
        writer.write(as_request("GET", "/api/v1/stream", VIEW))
        await reader.readuntil(b"\r\n\r\n")
        held.append(0)
        while await reader.readline():
            pass
        wrong["stream"] += 1

    tasks = [asyncio.ensure_future(agent(n + 1)) for n in range(agents)]
    tasks += [asyncio.ensure_future(viewer()) for _ in range(viewers)]
    while len(held) < agents + viewers:
        await asyncio.sleep(0.1)
    say("held")
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    ended = sum(task.done() for task in tasks)
    say({"ended": ended, "wrong": sum(wrong.values())})
    os._exit(0)


@contextlib.contextmanager
def holding(ours: Dashboard, agents: int, viewers: int):
    """Hold connections of agents and viewers; yield figures about them."""
    said: dict = {}
    with Loader(load_agents, ours.port, agents, viewers,
                str(ours.cert) if ours.cert else None) as loader:
        began = time.monotonic()
        loader.said()
        said["pid"], said["came"] = loader.process.pid, \
            time.monotonic() - began
        yield said
        loader.process.stdin.write(b"\n")
        loader.process.stdin.flush()
        said.update(loader.said())


def agents(args, folder: Path) -> None:
    many, viewers = (500, 50) if args.quick else (2000, 200)
    rest, seconds = (3, 15) if args.quick else (30, 60)
    for tls in (False, True):
        name = "TLS" if tls else "plain"
        with Dashboard(args, folder / f"agents-{name}",
                       lambda db: put_hosts(db, many), tls) as ours:
            empty = status_of(ours.pid, "VmRSS") / 1024
            with holding(ours, many, viewers) as said:
                time.sleep(rest)
                before, began = seconds_of(ours.pid), time.monotonic()
                time.sleep(seconds)
                used = (seconds_of(ours.pid) - before) / (
                    time.monotonic() - began)
                size = status_of(ours.pid, "VmRSS") / 1024
                peak = status_of(ours.pid, "VmHWM") / 1024
        agents_rows(f"{many:,} + {viewers}, {name}", args.quick, used, size,
                    f"peak {peak:.0f} MB, {empty:.0f} MB before; all came in "
                    f"{said['came']:.1f} s" + (
                        f"; {said} WENT" if said["wrong"] or said["ended"]
                        else ""), (size - empty) * 1024 / (many + viewers))


def agents_rows(what: str, quick: bool, used: float, size: float, note: str,
                each: float) -> None:
    row(f"agents: CPU, {what}", "" if quick else "under 10 %",
        f"{used:.1%}", "of a core, idle")
    row(f"agents: RSS, {what}", "" if quick else "under 200 MB",
        f"{size:.0f} MB", f"{each:.0f} kB each; {note}")


# --- idle -----------------------------------------------------------------


def wakes_of(pid: int) -> int:
    """How often the threads of a process have waited for something."""
    return sum(int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)",
                             path.read_text(), re.M)[1])
               for path in Path(f"/proc/{pid}/task").glob("*/status"))


def idle(args, folder: Path) -> None:
    seconds = 60 if args.quick else 300
    with Dashboard(args, folder / "idle", put_checks) as ours:
        time.sleep(10)              # what it does once, at its start
        before, began = wakes_of(ours.pid), time.monotonic()
        time.sleep(seconds)
        wakes = (wakes_of(ours.pid) - before) * 60 / (
            time.monotonic() - began)
        state, page = (len(ask(ours.client(), "GET", path)[1])
                       for path in ("/api/v1/state", "/"))
    row("idle: wake-ups a minute", "at most 10", f"{wakes:.1f}",
        "without hosts and browsers")
    row("idle: bytes of the state of 100 checks, of the page", "",
        f"{state:,}, {page:,}", "not compressed")


# --- click ----------------------------------------------------------------


class Koid:
    """A real koid that belongs to a dashboard, with one job by hand."""

    def __init__(self, args, folder: Path, ours: Dashboard, number: int):
        self.ours, self.host = ours, name_of_host(number)
        self.key = KOI.host_key(RUN_KEY, self.host)
        home, self.out = folder / "home", folder / "out"
        (home / "tabs").mkdir(parents=True)
        for path in (home, home / "tabs"):
            path.chmod(0o700)
        bench.write_tab(home / "tabs" / "root", [bench.Entry(
            "@manual", f"date +%s.%N >> {self.out}")])
        keys = home / "keys"
        keys.write_text(KOI.Enrollment(
            url=f"http://127.0.0.1:{ours.port}", dash=DASH, host=self.host,
            token=token_of_host(number), key=self.key.hex(), name="clicked",
            since=time.time(), plain_http=True).to_json())
        keys.chmod(0o600)
        with open(folder / "koid.log", "wb") as log:
            self.process = subprocess.Popen(
                [args.koitab.resolve(), "daemon"],
                env={"PATH": bench.PATH, "HOME": str(folder),
                     "KOI_HOME": str(home)}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, cwd=folder)
        self.log, self.client = folder / "koid.log", ours.client()
        self.spec = self.listed()

    def listed(self) -> str:
        """The text of the job, as the page would have it."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            _, data = ask(self.client, "GET",
                          f"/api/v1/hosts/{self.host}/list")
            jobs = json.loads(json.loads(data).get("body") or "{}").get(
                "jobs")
            if jobs:
                return jobs[0]
            time.sleep(0.1)
        raise SystemExit(f"bench: no list came: {self.log.read_text()}")

    def body(self) -> dict:
        """A signed request."""
        job, now = json.loads(self.spec), int(time.time() * 1000)
        text = json.dumps({
            "v": 1, "do": "run", "key": KOI.key_id(self.key), "dash": DASH,
            "host": self.host, "user": job["user"], "tag": job["tag"],
            "job": KOI.sha256_hex(self.spec), "args": {}, "secrets": {},
            "nonce": os.urandom(16).hex(), "iat": now, "exp": now + 300_000})
        return {"host": self.host, "body": text,
                "mac": KOI.run_mac(self.key, text)}

    def click(self) -> float | None:
        """Seconds until the job's own clock; None if it never started."""
        body, before = self.body(), bench.came(self.out)
        began = time.time()
        status, data = ask(self.client, "POST", "/api/v1/requests", body)
        if status != 202:
            raise SystemExit(f"bench: {status} {data!r}")
        while bench.came(self.out) == before:
            if time.time() > began + 10:
                return None
            time.sleep(0.002)
        return float(self.out.read_text().split()[-1]) - began

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait(20)


def clicked(koid: Koid, many: int) -> list:
    """In order of length; with a rest between two, as people have it."""
    times = []
    for _ in range(many):
        times.append(koid.click())
        time.sleep(random.uniform(0.2, 0.5))
    return sorted(10.0 if each is None else each for each in times)


def click_floor(folder: Path, many: int) -> list:
    """What nobody can beat: start sh and date."""
    out, times = folder / "floor", []
    for _ in range(many):
        began = time.time()
        subprocess.run(["/bin/sh", "-c", f"date +%s.%N > {out}"], check=True)
        times.append(float(out.read_text()) - began)
    return sorted(times)


def click(args, folder: Path) -> None:
    many, held = (25, 500) if args.quick else (200, 2000)
    floor = click_floor(folder, 50)
    row("click: floor, sh and date", "",
        f"{quantile(floor, .5) * 1e3:.0f} / {quantile(floor, .99) * 1e3:.0f} "
        "ms", "p50 / p99 of 50")
    with Dashboard(args, folder / "click",
                   lambda db: put_hosts(db, held + 1)) as ours:
        (folder / "clicked").mkdir()
        with Koid(args, folder / "clicked", ours, held + 1) as koid:
            time.sleep(2)
            click_row("idle", clicked(koid, many))
            with holding(ours, held, held // 10):
                time.sleep(2 if args.quick else 10)
                click_row(f"{held:,} agents held", clicked(koid, many))


def click_row(what: str, times: list) -> None:
    lost = sum(each >= 10 for each in times)
    row(f"click: to start, {what}", "p99 under 300 ms",
        f"{quantile(times, .5) * 1e3:.0f} / {quantile(times, .99) * 1e3:.0f} "
        "ms", f"p50 / p99 of {len(times)}, the longest "
        f"{times[-1] * 1e3:.0f} ms" + (f"; {lost} NEVER" if lost else ""))


# --- a million runs -------------------------------------------------------

WORDS = ("disk backup rsync vacuum certificate renewed archive snapshot "
         "mirror checksum database index rotated nothing to do done").split()
SPREAD_DAYS, LAST_DAY = 90, 30_000      # days; runs of the last of them


class Filling:
    """Runs of many jobs on twenty hosts, the output of some of them."""

    def __init__(self, runs: int, jobs: int, outputs: int):
        self.runs, self.jobs, self.outputs = runs, jobs, outputs
        self.hosts, self.now = 20, time.time()
        self.chance = random.Random(1)

    def __call__(self, db) -> None:
        began = time.monotonic()
        put_hosts(db, self.hosts)
        put_checks(db)
        self.put_jobs(db)
        indexes = db.execute("select name, sql from sqlite_master where type "
                             "= 'index' and tbl_name = 'runs' and sql is not "
                             "null").fetchall()
        for name, _ in indexes:
            db.execute(f"drop index {name}")
        db.executemany(
            "insert into runs (job, host, epoch, n, change, trigger, "
            "state, at, due, started, ended, exit, reason, args, attempt, "
            "count, bytes, cut, size, have, line, keep_until) values (?, ?, "
            "1, ?, ?, 'schedule', 'done', ?, ?, ?, ?, ?, '', '{}', 1, 1, ?, "
            "0, ?, ?, ?, ?)", self.rows())
        for _, text in indexes:
            db.execute(text)
        self.put_outputs(db)
        self.put_others(db)
        self.took = time.monotonic() - began

    def put_jobs(self, db) -> None:
        db.executemany(
            "insert into jobs (host, user, tag, section, name, label, "
            "timing, words, command, next, last_ok, spec) values (?, "
            "'root', ?, ?, ?, ?, '*/5 * * * *', 'every 5 minutes', ?, ?, ?, "
            "'{}')",
            [(n % self.hosts + 1, f"job{n}", ("", "nightly", "web")[n % 3],
              f"job {n}", f"/usr/local/bin/job --number {n} | logger",
              f"/usr/local/bin/job --number {n} | logger",
              self.now + 3600, self.now) for n in range(self.jobs)])

    def at(self, number: int) -> float:
        """When a run was: the last ones within a day."""
        busy = min(LAST_DAY, self.runs // 3)
        left = self.runs - number
        return self.now - left / busy * 86_400 if left <= busy else \
            self.now - 86_400 - (left - busy) / (
                self.runs - busy) * SPREAD_DAYS * 86_400

    def rows(self):
        """In order of time, each job in its turn; the last thousands have
        output, and some of them failed."""
        chance, numbers = self.chance.random, [0] * self.hosts
        first = self.runs - self.outputs
        for number in range(self.runs):
            job = number % self.jobs
            host = job % self.hosts
            numbers[host] += 1
            at, took = self.at(number), 1 + 20 * chance()
            size = self.size if number >= first else 0
            yield (job + 1, host + 1, numbers[host], numbers[host], at,
                   at // 60 * 60, at, at + took, int(chance() < 0.02), size,
                   size, size, "done", at + 90 * 86_400)

    @property
    def size(self) -> int:
        return len(self.frames(0))

    def frames(self, number: int) -> bytes:
        """Forty lines, of which one names the run."""
        lines = random.Random(number)
        text = "".join(
            f"{lines.choice(WORDS):>11} {lines.choice(WORDS):>11} "
            f"{lines.randrange(10**6):06}\n" for _ in range(40))
        text += f"run {number:08} of the bench\n"
        return KOI.FRAME.pack(1, 5, len(text)) + text.encode()

    def put_outputs(self, db) -> None:
        first = self.runs - self.outputs + 1
        frames = [(run, self.frames(run)) for run in range(first,
                                                           self.runs + 1)]
        db.executemany("insert into outputs (run, at, data) values "
                       "(?, 0, ?)", frames)
        found = db.execute("select 1 from sqlite_master where name = 'found'"
                           ).fetchone()
        if found:
            db.executemany(
                "insert into found (rowid, text) values (?, ?)",
                [(run, KOI.indexed_text(data)) for run, data in frames])
            db.execute("update runs set indexed = 1 where id >= ?", (first,))

    def put_others(self, db) -> None:
        db.executemany(
            "insert into audit (at, what, host, job, label, state) "
            "values (?, 'run', ?, ?, 'a job', 'accepted')",
            [(self.now - n * 60, name_of_host(1), n % self.jobs + 1)
             for n in range(20_000)])
        db.executemany(
            'insert into pings ("check", n, at, kind, scheme, method, ua, '
            "ip, duration, size, line, body) values (?, ?, ?, 'success', "
            "'http', 'GET', 'curl', '127.0.0.1', 1.5, 0, '', x'')",
            [(check + 1, n, self.now - (100 - n) * 300)
             for check in range(PING_CHECKS) for n in range(1, 101)])
        db.execute("update checks set n = 100, status = 'up', last_ping = ?",
                   (self.now,))

    def questions(self) -> dict:
        """What the page asks, each with a path made anew each time."""
        chance, day = self.chance, 86_400
        runs, jobs, first = self.runs, self.jobs, self.runs - self.outputs + 1

        def some_run() -> int:
            return chance.randint(jobs * 2, runs)

        def output() -> int:
            return chance.randint(first, runs)

        return {
            "state": lambda: "/api/v1/state",
            "runs of a job": lambda:
                f"/api/v1/jobs/{chance.randint(1, jobs)}/runs",
            "runs of a job, deep": lambda:
                f"/api/v1/jobs/{chance.randint(1, jobs)}/runs?before="
                f"{chance.randint(1, runs // 3)}",
            "a run": lambda: f"/api/v1/runs/{some_run()}",
            "its output": lambda: f"/api/v1/runs/{output()}/output?from=0",
            "its text": lambda: f"/api/v1/runs/{output()}/raw",
            "search, one hit": lambda:
                f"/api/v1/search?q={output():08}+of",
            "search, in all outputs": lambda:
                f"/api/v1/search?q={chance.choice(WORDS[:9])}",
            "search, no hit": lambda:
                f"/api/v1/search?q=zq{chance.randrange(10**9)}",
            "search, two letters": lambda: "/api/v1/search?q=zq",
            "search in a job, no hit": lambda:
                f"/api/v1/search?q=zqx&job={chance.randint(1, jobs)}",
            f"a day, {min(LAST_DAY, runs // 3):,} runs": lambda:
                f"/api/v1/day?from={self.now - day:.3f}&to={self.now:.3f}",
            f"a day, {(runs - LAST_DAY) // SPREAD_DAYS:,} runs": lambda:
                f"/api/v1/day?from={self.now - 50 * day:.3f}&to="
                f"{self.now - 49 * day:.3f}",
            "audit": lambda: "/api/v1/audit",
            "audit, deep": lambda:
                f"/api/v1/audit?before={self.now - chance.random() * 9e5:.3f}",
            "pings of a check": lambda: "/api/v1/checks/"
                f"{uuid_of(chance.randrange(PING_CHECKS))}/pings",
            "a host's list": lambda: f"/api/v1/hosts/{name_of_host(1)}/list",
            "channels": lambda: "/api/v1/channels",
            "metrics": lambda: "/metrics",
            "a badge": lambda: "/badge/badge/all.svg",
            "healthz": lambda: "/healthz",
            "the page itself": lambda: "/"}


def million(args, folder: Path) -> None:
    filling = Filling(100_000 if args.quick else 1_000_000, 300,
                      1_000 if args.quick else 5_000)
    many = 10 if args.quick else 40
    with Dashboard(args, folder / "million", filling) as ours:
        size = ours.db.stat().st_size / 2**20
        row("million: the filling", "under 60 s", f"{filling.took:.0f} s",
            f"{filling.runs:,} runs, {filling.jobs} jobs, "
            f"{filling.outputs:,} outputs, {size:.0f} MB; the dashboard "
            f"starts in {ours.start_time:.1f} s")
        client = ours.client()
        question_row(client, "state, as it starts", lambda: "/api/v1/state",
                     1, "")
        time.sleep(2)           # it has looked at all jobs by then
        for name, path in filling.questions().items():
            before = seconds_of(ours.pid)
            question_row(client, name, path, many, spent=lambda: (
                seconds_of(ours.pid) - before) / many)  # noqa: B023
        row("million: memory after that", "",
            f"{status_of(ours.pid, 'VmRSS') / 1024:.0f} MB",
            f"peak {status_of(ours.pid, 'VmHWM') / 1024:.0f} MB")


def question_row(client, name: str, path, many: int,
                 wanted: str = "under 100 ms", spent=None) -> None:
    times, size, wrong = [], 0, ""
    for _ in range(many):
        began = time.perf_counter()
        status, data = ask(client, "GET", path())
        times.append((time.perf_counter() - began) * 1e3)
        size = max(size, len(data))
        if status != 200:
            wrong = f"; STATUS {status} {data[:100]!r}"
    first = times[0]
    times.sort()
    row(f"million: {name}", wanted, f"{times[len(times) // 2]:.1f} ms",
        f"the longest {times[-1]:.1f} ms, the first {first:.1f} ms, "
        + (f"CPU {spent() * 1e3:.1f} ms each, " if spent else "")
        + f"{size / 1024:,.0f} kB{wrong}")


# --- what was typed -------------------------------------------------------

FIGURES = {figure.__name__: figure for figure in (pings, records, agents,
                                                  idle, click, million)}
INSIDE = {function.__name__: function for function in (
    load_pings, load_fresh_pings, load_records, load_agents, serve_plain)}
KOI = None


def raise_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help=",".join(FIGURES))
    parser.add_argument("--quick", action="store_true",
                        help="smaller counts: about two minutes in all")
    parser.add_argument("--rounds", type=int, default=5, metavar="N",
                        help="rounds in turn, for pings and records")
    parser.add_argument("--koitab", type=Path, default=ROOT / "koitab.py",
                        help="another koitab.py than the one at the top")
    parser.add_argument("--dir", help="where the scratch folder is made")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def loads() -> str:
    return " ".join(f"{each:.1f}" for each in os.getloadavg())


def main() -> None:
    global KOI
    args = parsed()
    bench.ROOT = args.koitab.resolve().parent
    KOI = bench.koitab()
    raise_limit()
    if args.inside:
        INSIDE[args.inside[0]](*json.loads(args.inside[1]))
        return
    print(f"{os.cpu_count()} processors, load {loads()}")
    row("figure", "wanted", "measured")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for name in (args.only or ",".join(FIGURES)).split(","):
            print(f"--- {name}, load {loads()}", flush=True)
            FIGURES[name](args, Path(folder))
    print(f"load {loads()}")


if __name__ == "__main__":
    main()

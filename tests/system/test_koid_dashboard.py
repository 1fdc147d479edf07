"""The dashboard that koid runs: `koitab -d new` alone is enough, koid's end
is the dashboard's end, and it has no right but its database."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

import support
from dashboard_rig import DashboardHost, DashboardProcess
from support import wait_until

koitab = support.load("koitab")

TAB = '"Hello" @manual echo hello\n'


class EmbeddingHost(DashboardHost):
    """A koid that is asked for its dashboard, on a free port."""

    def __init__(self, folder: Path):
        super().__init__(folder, "web1", rounds="", plain_http=False)
        # The dashboard's user must be able to reach its directory.
        for parent in (folder, *folder.parents[:2]):
            if parent.stat().st_uid == os.geteuid():
                parent.chmod(parent.stat().st_mode | 0o011)
        self.set_constants(ROOT_PORT=0, USER_PORT=0,
                           LOCAL_DASHBOARD="http://127.0.0.1:1")
        self.directory = Path(f"{self.home}-dashboard")

    def new(self) -> "EmbeddingHost":
        """`koitab -d new`"""
        done = self.koitab("-d", "new")
        assert done.code == 0, (done, self.log())
        self.passphrase = re.search(r"^passphrase +(\S+)$", done.out, re.M)[1]
        self.dash = re.search("#([0-9a-f]{16})$", done.out, re.M)[1]
        self.port = int(re.search(r"^dashboard +http://127.0.0.1:(\d+)/",
                                  done.out, re.M)[1])
        salted = self.ask_http("GET", "/api/v1/salt")
        self.token = koitab.derive_keys(
            self.passphrase, bytes.fromhex(salted["salt"]),
            salted["rounds"]).api.hex()
        return self

    def ask_http(self, method: str, path: str, body: dict | None = None):
        """Return the answer of the dashboard, from JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port,
                                                timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body and json.dumps(body), {
                "Content-Type": "application/json", "Authorization":
                f"Bearer {getattr(self, 'token', '')}"})
            reply = connection.getresponse()
            text = reply.read()
            assert reply.status < 300, (path, reply.status, text)
            return json.loads(text)

    def pid(self) -> int:
        """The pid of the dashboard, or 0."""
        for child in support.children_of(self.daemon.pid):
            with contextlib.suppress(OSError):
                if b"koi-dashboard" in Path(
                        f"/proc/{child}/cmdline").read_bytes():
                    return child
        return 0

    def listens(self) -> bool:
        """Can the port be connected to?"""
        try:
            return bool(self.ask_http("GET", "/api/v1/salt"))
        except OSError:
            return False

    def shown_runs(self) -> list[int]:
        """Return the numbers, on this host, of the runs that are shown."""
        return [run["n"] for job in self.ask_http(
            "GET", "/api/v1/state")["jobs"] for run in self.ask_http(
                "GET", f"/api/v1/jobs/{job['id']}/runs?limit=1000")["runs"]
            if run["state"] == "done"]

    def rows(self, statement: str) -> list[tuple]:
        """Rows of the dashboard's database."""
        with contextlib.closing(sqlite3.connect(
                self.directory / "dashboard.db")) as db:
            return db.execute(statement).fetchall()


@pytest.fixture
def host(tmp_path):
    host = EmbeddingHost(tmp_path / "web1")
    host.install(TAB)
    yield host
    pid = host.pid() if host.daemon else 0
    host.stop(signal.SIGKILL)
    host.end_jobs()
    wait_until(lambda: not support.is_alive(pid), 30, "its dashboard to end")
    if support.AS_ROOT and (host.home / "dashboard").exists():
        # A killed koid left its socket.
        port = int((host.home / "dashboard").read_text())
        Path("/run/koi", koitab.dashboard_socket_name(port)).unlink(
            missing_ok=True)


def status_of(pid: int, *names: str) -> list[str]:
    """Fields of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return [re.search(rf"^{name}:\t(.*)$", text, re.M)[1] for name in names]


# --- koitab -d new is enough ------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--container",)])
def test_new_without_a_url_starts_a_dashboard_and_connects_koid(host, options):
    host.start(*options)
    host.new()
    wait_until(lambda: host.koitab("-d", "show").code == 0, 30,
               "koid to be connected")
    host.run("Hello")
    wait_until(host.shown_runs, 30, "the run to be shown")
    assert "next: koitab -d new" in host.log()
    again = host.koitab("-d", "new")
    assert again.code == 1 and "already a member" in again.err


def test_dashboard_can_access_only_its_database(host):
    host.start().new()
    uid = koitab.DASHBOARD_UID if support.AS_ROOT else os.geteuid()
    try:
        account = koitab.Machine().account("koi-dashboard")
        uid = account.uid if support.AS_ROOT and account else uid
    finally:
        pid = host.pid()
    ids, bounding, effective, forbidden = status_of(
        pid, "Uid", "CapBnd", "CapEff", "NoNewPrivs")
    assert ids.split() == [str(uid)] * 4
    assert int(effective, 16) == 0 and forbidden == "1"
    assert not support.AS_ROOT or int(bounding, 16) == 0
    assert status_of(pid, "Name") == ["koi-dashboard"]
    assert support.owner(host.directory) == uid
    assert support.mode(host.directory) == 0o700
    if support.AS_ROOT:     # koi's own state is closed to that user
        assert support.owner(host.home) == 0
        assert support.mode(host.home) == 0o700
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            assert str(host.home) + "/" not in os.readlink(fd)


def test_restarted_koid_runs_the_dashboard_on_the_same_port(host):
    host.start().new()
    pid = host.pid()
    host.stop()
    assert not support.is_alive(pid)
    host.start()
    wait_until(host.listens, 30, "the dashboard to be back")
    assert host.problems() == "" and "restarting" not in host.log()
    wait_until(lambda: host.koitab("-d", "show").code == 0, 30,
               "koid to be connected")


def test_koid_runs_no_dashboard_unless_one_was_created(host):
    host.start()
    assert host.pid() == 0 and not host.directory.exists()


def test_new_uses_a_dashboard_that_runs_by_itself_and_is_not_created(
        tmp_path, host):
    with DashboardProcess(tmp_path / "own",
                          db=f"{host.home}/dashboard.db",
                          rounds="") as server:
        host.set_constants(LOCAL_DASHBOARD=server.url)
        host.start()
        done = host.koitab("-d", "new")
        assert done.code == 0 and server.url in done.out, done
        assert host.pid() == 0
        # It is created, so the next host starts another one.
        assert host.koitab("-d", "off").code == 0
        host.new()
        assert host.port != server.port and host.pid()


def test_new_does_not_use_a_dashboard_of_another_user(host):
    """Nobody but root and the caller can make a socket where it counts."""
    with contextlib.closing(koitab.socket.create_server(
            ("127.0.0.1", 0))) as squatter:
        host.set_constants(LOCAL_DASHBOARD="http://127.0.0.1:"
                           f"{squatter.getsockname()[1]}")
        token = host.home / "dashboard.db.founding"
        token.write_text("ab" * 32)
        token.chmod(0o600)
        host.start().new()
        squatter.setblocking(False)
        with pytest.raises(BlockingIOError):
            squatter.accept()


def test_new_without_koid_says_how_to_start_it(host):
    done = host.koitab("-d", "new")
    assert (done.code, done.out, done.err) == (
        1, "", "koitab: error: koid is not running\nkoitab: hint: koid &\n")


def test_port_used_by_another_program_is_reported(host):
    with contextlib.closing(koitab.socket.create_server(
            ("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        host.set_constants(ROOT_PORT=port)
        host.start()
        (host.home / "dashboard").write_text(f"{port}\n")
        done = host.koitab("-d", "new") if support.AS_ROOT else None
        if done:
            assert done.code == 1 and f"127.0.0.1:{port}: Address already " \
                "in use\nkoitab: hint: koitab dashboard --listen" in done.err
        host.stop()
        host.start()
        wait_until(lambda: f"127.0.0.1:{port}: Address" in host.problems(),
                   30, "the problem to be shown")
    wait_until(host.pid, 30, "the dashboard to start")


# --- kill -9 ----------------------------------------------------------------


class Pinger(threading.Thread):
    """Pings a check without pause, and counts what is acknowledged."""

    def __init__(self, host: EmbeddingHost, slug: str):
        super().__init__(daemon=True)
        self.host, self.slug, self.acknowledged = host, slug, 0
        self.stopping = False
        self.key, = host.rows("select ping_key from dashboard")[0]

    def run(self) -> None:
        while not self.stopping:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(
                    "127.0.0.1", self.host.port, timeout=30)
                with contextlib.closing(connection):
                    connection.request(
                        "POST", f"/ping/{self.key}/{self.slug}?create=1")
                    self.acknowledged += connection.getresponse(
                        ).status in (200, 201)

    def wait_for_more(self) -> None:
        """Wait until some more pings are acknowledged."""
        wanted = self.acknowledged + 20
        wait_until(lambda: self.acknowledged >= wanted, 30, "more pings")


def kill_dashboard(host: EmbeddingHost) -> None:
    """Kill the dashboard, and wait for the next one."""
    pid = host.pid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: host.pid() not in (0, pid), 30, "another process")


def is_free(port: int) -> bool:
    """Whether no process listens on the port."""
    with contextlib.suppress(OSError):
        koitab.socket.create_server(("127.0.0.1", port)).close()
        return True
    return False


def kill_koid(host: EmbeddingHost) -> None:
    """Kill koid, check that its dashboard leaves the port, start koid."""
    pid = host.pid()
    host.stop(signal.SIGKILL)
    wait_until(lambda: not support.is_alive(pid), 30, "the orphan to end")
    wait_until(lambda: is_free(host.port), 30, "the port to be free")
    host.start()
    wait_until(host.pid, 30, "another process")


def test_kill_of_koid_or_dashboard_loses_nothing_acknowledged(host):
    host.start().new()
    pingers = [Pinger(host, f"check-{number}") for number in range(3)]
    for pinger in pingers:
        pinger.start()
    runs = []
    for kill in (kill_dashboard, kill_koid, kill_dashboard):
        pingers[0].wait_for_more()
        runs += [host.run("Hello")[0] for _ in range(3)]
        kill(host)
    pingers[0].wait_for_more()
    for pinger in pingers:
        pinger.stopping = True
    for pinger in pingers:
        pinger.join(60)
    kept = dict(host.rows("select slug, n from checks"))
    assert all(kept[pinger.slug] >= pinger.acknowledged > 0
               for pinger in pingers), (kept, [
                   pinger.acknowledged for pinger in pingers])
    wait_until(lambda: sorted(host.shown_runs()) == runs, 30,
               f"each of the runs {runs} once")


# --- mail -------------------------------------------------------------------


def test_mail_of_the_dashboard_has_the_rights_of_koid(host):
    """Postfix's sendmail gets the right to queue a mail from its file's
    mode, which no_new_privs would forbid."""
    sendmail = host.folder / "sendmail"
    host.set_constants(SENDMAILS=(str(sendmail),))
    sendmail.write_text(f"""#!/bin/sh
        cd {host.folder}
        grep -E 'NoNewPrivs|^Uid' /proc/self/status > rights
        printf '%s\\n' "$@" > words
        cat > mail
        [ ! -e full ] || {{ echo 'the queue is full' >&2; exit 75; }}""")
    sendmail.chmod(0o755)
    host.start().new()
    channel = host.ask_http("POST", "/api/v1/channels", {
        "kind": "mail", "target": "ops@example.org"})["id"]
    test = {"do": "test", "id": channel}
    assert host.ask_http("POST", "/api/v1/channels", test)["delivered"]
    own = status_of(os.getpid(), "NoNewPrivs")[0]
    assert (host.folder / "rights").read_text() == "".join((
        "Uid:", f"\t{os.geteuid()}" * 4, f"\nNoNewPrivs:\t{own}\n"))
    assert (host.folder / "words").read_text() == "-i\n--\nops@example.org\n"
    mail = (host.folder / "mail").read_text()
    assert "To: ops@example.org\nSubject: koi: " in mail
    (host.folder / "full").touch()
    result = host.ask_http("POST", "/api/v1/channels", test)
    assert not result["delivered"]
    assert "sendmail failed: the queue is full" in result["error"]


MAIL = {"to": "ops@example.org", "sender": "", "subject": "x", "text": "y",
        "key": "k", "at": 1.0}


@pytest.mark.parametrize("field, value, expected", [
    ("subject", "x\nBcc: eve@example.org", b"Subject: koi: x Bcc: eve@"),
    ("subject", "x\r\n\r\nbody", b"Subject: koi: x    body\n"),
    ("subject", "x" * 10_000, b"Subject: koi: "),
    ("key", "k>\nBcc: eve@example.org", b"Message-ID: <k>"),
    ("text", "y\n.\nMAIL FROM:<eve>\0\x1b[2J", b"\ny\n.\nMAIL FROM:<eve>  "),
])
def test_a_field_of_a_mail_cannot_add_a_header(field, value, expected):
    mail = koitab.alert_message("web1", **{**MAIL, field: value})
    assert expected in mail
    names = [line.partition(b":")[0] for line in mail.partition(
        b"\n\n")[0].splitlines() if not line.startswith(b" ")]
    assert sorted(names) == sorted([
        b"From", b"To", b"Subject", b"Date", b"Message-ID",
        b"Auto-Submitted", b"MIME-Version", b"Content-Type",
        b"Content-Transfer-Encoding"])


@pytest.mark.parametrize("to", [
    "-oQ/tmp@example.org", "root", "a@b, c@d", "a@b\nBcc: c@d", "|sh@x", ""])
def test_recipient_that_is_not_a_single_address_gets_no_mail(to):
    for fields in ({"to": to}, {"sender": to or "-"}):
        assert koitab.send_alert_mail("web1", {**MAIL, **fields}, {}) \
            == "invalid email address"


@pytest.fixture
def taken_over(tmp_path, monkeypatch):
    """koid's side of a compromised dashboard. No mail is sent."""
    clock = koitab.Clock()
    lines = []
    machine = koitab.Machine(clock)
    log = koitab.DaemonLog(machine)
    monkeypatch.setattr(log, "log", lambda text, bad=False:
                        lines.append(text))
    embedded = koitab.EmbeddedDashboard(machine, str(tmp_path / "koi"), log,
                                        koitab.Poller())
    embedded.lines_logged = lines
    monkeypatch.setattr(koitab.os, "fork", lambda: 4_000_000)
    return embedded


def test_no_dashboard_runs_as_the_uid_of_an_account(taken_over, monkeypatch):
    monkeypatch.setattr(koitab.os, "geteuid", lambda: 0)
    monkeypatch.setattr(taken_over.machine, "account", lambda name: None)
    monkeypatch.setattr(taken_over.machine, "user_name", lambda uid: "bob")
    taken_over.start()
    assert (taken_over.pid, taken_over.problem) == (
        0, "no dashboard: uid 61170 is already the user bob: create the "
        "account koi-dashboard")


def test_number_of_mails_of_a_dashboard_is_limited(taken_over):
    for _ in range(koitab.MOST_ALERT_MAILS):
        assert taken_over.take({"op": "mail", "mail": MAIL}) is None
        taken_over.mailers.clear()
    assert "at most 500 mails" in taken_over.take(
        {"op": "mail", "mail": MAIL})["error"]


def test_number_of_concurrent_sendmails_of_a_dashboard_is_limited(taken_over):
    mail = {"op": "mail", "mail": MAIL}
    assert taken_over.take(mail) is None
    taken_over.mailers.update((1, 2))
    assert "2 at once" in taken_over.take(mail)["error"]


def test_log_lines_of_a_dashboard_are_limited_in_number_and_length(taken_over):
    for _ in range(100):
        taken_over.take({"op": "log", "text": "x" * 10_000})
        taken_over.take({"op": "state", "problem": os.urandom(1000).hex()})
    assert len(taken_over.lines_logged) == koitab.MOST_LOG_LINES
    assert max(map(len, taken_over.lines_logged)) < 1100


def test_dashboard_cannot_make_koid_write_more_than_one_file_once(
        taken_over, monkeypatch):
    written = []
    monkeypatch.setattr(taken_over.machine, "write_file",
                        lambda *values: written.append(values))
    for _ in range(100):
        taken_over.take({"op": "ready"})
    assert written == [(taken_over.home, "dashboard", "0\n")]


@pytest.mark.parametrize("request_", [
    {}, {"op": "run", "job": "Hello"}, {"op": "mail"}, {"op": ["mail"]},
    {"op": "mail", "mail": {**MAIL, "at": "now"}}, {"op": "state"}])
def test_request_that_a_dashboard_may_not_make_is_an_error(
        taken_over, request_):
    with pytest.raises((KeyError, ValueError, TypeError)):
        taken_over.take(request_)


# --- koitab dashboard, started by root --------------------------------------


@pytest.fixture
def by_itself(host):
    """`koitab dashboard`, started by root without -u."""
    log = host.folder / "dashboard.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            host.command("dashboard", "--listen", "127.0.0.1:0"),
            env=host.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    with support.stopping(process):
        wait_until(lambda: "dashboard: next: " in log.read_text(), 30,
                   "the dashboard to listen")
        process.url = re.search(r"listens at (http://\S+)",
                                log.read_text())[1]
        yield process


@support.root_only
def test_a_dashboard_that_root_starts_becomes_another_user(host, by_itself):
    uid, effective, forbidden = status_of(
        by_itself.pid, "Uid", "CapEff", "NoNewPrivs")
    assert uid.split() == [str(koitab.DASHBOARD_UID)] * 4
    assert int(effective, 16) == 0 and forbidden == "1"
    assert support.owner(host.directory) == koitab.DASHBOARD_UID
    done = host.koitab("-d", "new", by_itself.url)
    assert done.code == 0, done         # it has found the token


@support.root_only
@pytest.mark.parametrize("options, status, words", [
    ((), 1, "dashboard.db is the database of a dashboard that ran as root\n"
     "koitab: hint: koitab dashboard -u root\n"),
    (("--db", "of-root/db"), 1, "of-root is not owned by uid 61170: "
     "another dashboard may use it\n"
     "koitab: hint: koitab dashboard -u USER\n")])
def test_dashboard_refuses_a_database_owned_by_root(
        host, options, status, words):
    (host.home / "dashboard.db").touch()
    (host.folder / "of-root").mkdir()
    done = host.koitab("dashboard", "--listen", "127.0.0.1:0", *options)
    assert (done.code, done.out, words in done.err) == (status, "", True), done


# --- units ------------------------------------------------------------------

# Why an exposure that `systemd-analyze security` finds stays open.
OPEN_POINTS = {
    "RootDirectory=/RootImage=": "Python and the program are in the host's",
    "RestrictAddressFamilies=~AF_UNIX": "sd_notify, and local clients",
    "RestrictAddressFamilies=~AF_(INET|INET6)": "pages, hosts, webhooks",
    "PrivateNetwork=": "the same",
    "IPAddressDeny=": "hosts and webhooks may have any address",
    "ProtectHome=": "the program may be in a home; it is read-only",
    "PrivateUsers=": "it fails in containers, and there are no privileges",
    "DeviceAllow=": "ProtectClock= adds the clock, to be read"}


def printed(command: list[str]) -> str:
    """Return what a command that must succeed prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE,
                          encoding="utf-8").stdout


def exposure(folder: Path, service: str, *options: str) -> tuple[str, set]:
    """Return the exposure of a unit and the points that are open."""
    support.need("systemd-analyze")
    unit = folder / f"{service}.service"
    unit.write_text(printed(
        support.program("koitab") + ["unit", *options]))
    text = printed([
        "systemd-analyze", "security", "--offline=true", "--no-pager",
        str(unit)])
    return (re.search(r"level for \S+: ([0-9.]+)", text)[1],
            set(re.findall(r"^\u2717 (\S+)", text, re.M)))


@support.root_only
def test_exposure_of_the_units_is_documented_with_reasons(tmp_path):
    figure, points = exposure(tmp_path, "koi-dashboard", "dashboard")
    assert float(figure) <= 1.3 and points <= set(OPEN_POINTS), points
    # A port below 1024 needs a capability of the host's.
    figure, points = exposure(tmp_path, "koi-dashboard", "dashboard",
                              "--listen", "127.0.0.1:443")
    assert float(figure) <= 1.5 and points <= {
        *OPEN_POINTS, "AmbientCapabilities=",
        "CapabilityBoundingSet=~CAP_NET_(BIND_SERVICE|BROADCAST|RAW)"}, points
    # What is closed to koid is closed to every job.
    figure, _ = exposure(tmp_path, "koid", "daemon")
    assert float(figure) <= 9.6

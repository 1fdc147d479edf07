"""koid as root, for several users: who may do what, and what a job can do.

koid runs in a separate mount namespace with its usual paths: its home is
/var/lib/koi, its socket /run/koi/koid.sock. Users call it from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest

import clockwork
import support

koitab = support.load("koitab")
pytestmark = support.root_only

ALICE, MALLORY, WWW = support.ALICE, support.MALLORY, "www-data"
NOON = 1_795_348_800            # 2026-11-22 12:00:00 UTC
UNKNOWN_UID = 4242                 # a uid that has no name
# Of its own uid, as the limit of processes counts those of all our tests.
CAROL, CAROL_UID, DAVE, DAVE_UID = "carol", 1977, "dave", 1978
GROUPS = (1502, 1503, 1504)     # alice is a member of these, too
STRICT = ("sh", "-c", 'umask 077; exec "$@"', "sh")
# For support.program: koitab asks koid, and prints the replies.
CALLS = """
import json

def asked(request):
    link = k.DaemonClient(k.Machine())
    if request["op"] != "run":
        reply = link.ask(request.pop("op"), **request)
        reply.pop("output", None)       # bytes
        return reply
    run, connection, data = link.attach(
        request["job"], request.get("args", {}), request.get("user", ""))
    chunks = [data]
    while chunks[-1] or len(chunks) == 1:
        chunks.append(connection.recv(65536))
    streams = [[], [], [], []]
    for stream, _, part in k.read_frames(b"".join(chunks)):
        streams[stream].append(part.decode())
    return {"run": run, "text": "".join(streams[1] + streams[2]),
            "notes": streams[0], **json.loads("".join(streams[3]) or "{}")}

for line in sys.stdin:
    try:
        reply = asked(json.loads(line))
    except k.Error as error:
        reply = {"error": error.message, "hint": error.hint}
    print(json.dumps(reply), flush=True)
sys.exit()
"""


class Caller:
    """A process of some user's that asks koid, one thing after the other."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def ask(self, op: str, **fields) -> dict:
        """The reply, also when it is {"error": ..}."""
        self.write(op, **fields)
        return json.loads(self.process.stdout.readline() or "{}")

    def tab(self, text: str) -> None:
        assert self.ask("install", text=text)["installed"], text

    def write(self, op: str, **fields) -> None:
        """Ask, and do not wait for the reply."""
        request = json.dumps({"op": op, **fields})
        self.process.stdin.write(request.encode() + b"\n")
        self.process.stdin.flush()


class Town(support.Koi):
    """koid in its usual places, on a host with several users."""

    def __init__(self, folder: Path, host: support.Host):
        super().__init__(folder)
        self.place, self.host = host, self
        self.lib, self.processes = self.folder / "lib", []
        self.home = self.lib / "koi"
        (self.home / "tabs").mkdir(parents=True)
        for path in (self.home, self.home / "tabs"):
            path.chmod(0o700)
        self.lib.chmod(0o755)
        del self.env["KOI_HOME"]
        self.people(f"{CAROL}:x:{CAROL_UID}:{CAROL_UID}::/:/bin/sh\n",
                    f"{DAVE}:x:{DAVE_UID}:{DAVE_UID}::/:/bin/sh\n")
        with open(host.folder / "group", "a") as file:
            file.writelines(f"g{gid}:x:{gid}:{ALICE}\n" for gid in GROUPS)
        host.bind(self.lib, "/var/lib")
        host.setup.append("mount -t tmpfs -o mode=755 tmpfs /run")
        self.open_place()

    def people(self, *lines: str) -> None:
        """Add users to the host."""
        with open(self.place.folder / "passwd", "a") as file:
            file.writelines(lines)

    def open_place(self) -> None:
        holder = subprocess.Popen(
            self.place.command(["sh", "-c", "echo; exec sleep 3600"]),
            stdout=subprocess.PIPE)
        self.processes.append(holder)
        assert holder.stdout.readline(), "no namespace"
        self.root = Path(f"/proc/{holder.pid}/root")

    def command(self, *args) -> list[str]:
        """koitab's command line; or, for Koi.start, a command in the
        namespace."""
        if args and isinstance(args[0], list):
            return ["nsenter", f"--mount={self.root.parent}/ns/mnt",
                    f"--root={self.root}", "--wd=/", *args[0]]
        return super().command(*args)

    @contextlib.contextmanager
    def link(self):
        link = koitab.DaemonClient(koitab.Machine())
        link.path = f"{self.root}{koitab.ROOT_SOCKET}"
        yield link

    def as_user(self, who, command: list[str], **env: str) -> list[str]:
        """A command in the namespace, as a user or a uid."""
        uid = {ALICE: support.ALICE_UID, MALLORY: support.MALLORY_UID,
               CAROL: CAROL_UID}.get(who, who)
        settings = [f"{name}={value}" for name, value in env.items()]
        return self.command(["setpriv", "--reuid", str(uid), "--regid",
                             str(uid), "--clear-groups", "env", "-i",
                             "PATH=/usr/bin:/bin", *settings, *command])

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        """A process that is ended at the end."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, **options)
        self.processes.append(process)
        return process

    def caller(self, who, **env: str) -> Caller:
        return Caller(self.popen(self.as_user(who, self.program(CALLS),
                                              **env)))

    def program(self, patch: str) -> list[str]:
        """A program in Python: `k` is koitab, `sys.argv` has its arguments.
        It exits."""
        return support.program("koitab", self.python, patch)

    def seconds_for(self, caller: Caller) -> float:
        """The processor time of koid's from a request to its answer; also
        what it does for others comes before the answer."""
        before = support.processor_seconds(self.daemon.pid)
        reply = caller.ask("history", limit=1)
        assert "error" not in reply, reply
        return support.processor_seconds(self.daemon.pid) - before

    def python_as(self, who, program: str, *args: str) -> support.Result:
        """What a program in Python does as this user."""
        done = subprocess.run(
            self.as_user(who, [*self.program(
                f"import json, os\n{program}\nsys.exit()"), *args]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, timeout=60)
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        self.end_jobs()
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def town(tmp_path, host):
    support.need("nsenter", "setpriv", "unshare")
    tmp_path.chmod(0o755)
    town = Town(tmp_path, host)
    yield town
    town.close()


@pytest.fixture
def clock(town):
    """The clock of a koid that is started with `clock.start`."""
    return clockwork.StillClock(town)


@pytest.fixture
def out(tmp_path):
    """A directory into which everyone can write."""
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


# The places ------------------------------------------------------------------


def test_every_user_can_use_the_socket_and_only_root_the_home(town):
    town.start()
    assert support.mode(town.root / "run/koi/koid.sock") == 0o666
    assert support.mode(town.root / "run/koi") == 0o755
    assert town.caller(ALICE).ask("list")["text"] is None
    for path in (town.home, town.home / "tabs", town.home / "runs"):
        assert (support.mode(path), support.owner(path)) == (0o700, 0)
    for name in ("history.db", "lock"):
        assert support.mode(town.home / name) == 0o600
    listed = town.python_as(ALICE, "os.listdir('/var/lib/koi')")
    assert "PermissionError" in listed.err


def test_strict_umask_of_root_does_not_exclude_users(town):
    town.start(wrap=STRICT)
    assert town.caller(ALICE).ask("list")["text"] is None


def test_installed_tab_is_in_force_before_the_reply_and_private(town):
    town.start()
    alice = town.caller(ALICE)
    alice.tab('"Mine" @manual id -un\n')
    assert support.mode(town.home / "tabs" / ALICE) == 0o600
    assert alice.ask("list")["text"] == '"Mine" @manual id -un\n'
    assert alice.ask("run", job="Mine")["text"] == "alice\n"
    assert alice.ask("remove")["removed"] is True
    assert alice.ask("list")["text"] is None
    assert "no job" in alice.ask("run", job="Mine")["error"]


# Permissions of users --------------------------------------------------------

AS_IF = {"LOGNAME": ALICE, "USER": ALICE, "SUDO_USER": ALICE,
         "SUDO_UID": "1500", "HOME": "/root"}
ON_ALICE = [("list", {}), ("install", {"text": "@manual id\n"}),
            ("remove", {}), ("jobs", {}), ("history", {}), ("status", {}),
            ("run", {"job": "Hers"}), ("log", {"job": "Hers"}),
            ("log", {"run": 1}), ("kill", {"run": 1}),
            ("pause", {"job": "Hers"}), ("resume", {"job": "Hers"})]
HERS = '"Hers" @manual echo secret\n"Long" @manual sleep 600\n'


@pytest.fixture
def busy(town):
    """alice has a tab, run 1 that has ended, and run 2 that continues."""
    town.tab(HERS, ALICE)
    town.start()
    assert town.caller(ALICE).ask("run", job="Hers")["text"] == "secret\n"
    alice = town.caller(ALICE)
    alice.write("run", job="Long")
    town.ended("Hers", user=ALICE)  # its caller hears of it before koid does
    support.wait_until(lambda: town.history(job="Long", user=ALICE), 30,
                       "Long")
    return town


@pytest.mark.parametrize("who", [MALLORY, UNKNOWN_UID])
@pytest.mark.parametrize("name", [ALICE, "root"])
def test_user_cannot_act_for_another_user_in_any_environment(busy, who, name):
    caller = busy.caller(who, **AS_IF)
    for op, fields in ON_ALICE:
        reply = caller.ask(op, user=name, **fields)
        assert reply.get("error") == "must be privileged to use -u", (
            op, reply)
    assert (busy.home / "tabs" / ALICE).read_text() == HERS
    assert not (busy.home / "tabs" / "root").exists()
    assert [run["state"] for run in busy.history()] == ["running", "done"]


@pytest.mark.parametrize("who", [MALLORY, UNKNOWN_UID])
def test_user_without_option_u_sees_and_runs_only_their_own_jobs(busy, who):
    caller = busy.caller(who, **AS_IF)
    for op, fields in (("run", {"job": "Hers"}), ("log", {"job": "Hers"}),
                       ("log", {"run": 1}), ("kill", {"run": 2}),
                       ("pause", {"job": "Hers"}), ("pause", {"job": ""}),
                       ("run", {"job": ""}), ("log", {})):
        reply = caller.ask(op, **fields)
        assert "error" in reply, (op, fields, reply)
    for op, what in (("jobs", "jobs"), ("history", "runs"),
                     ("status", "running")):
        assert not caller.ask(op).get(what), (op, caller.ask(op))
    everything = json.dumps([caller.ask(op) for op in (
        "jobs", "history", "status", "list")])
    assert "Hers" not in everything and "secret" not in everything
    assert [run["state"] for run in busy.history()] == ["running", "done"]


def test_a_uid_without_a_name_has_no_tab(town):
    """After userdel, from a container, of a service: SO_PEERCRED gives a
    number, and koid must not take "nobody" for "everybody"."""
    town.start()
    caller = town.caller(UNKNOWN_UID)
    for op, fields in (("install", {"text": "@manual id\n"}), ("list", {}),
                       ("remove", {})):
        assert "error" in caller.ask(op, **fields), op
    assert list((town.home / "tabs").iterdir()) == []


def test_root_acts_for_anyone(busy):
    assert busy.ask("list", user=ALICE)["text"] == HERS
    assert {job["user"] for job in busy.ask("jobs")["jobs"]} == {ALICE}
    busy.ask("log", run=1)
    assert b"secret" in busy.output
    assert busy.ask("kill", run=2)["run"]["label"] == "Long"
    newest = busy.ended("Long", user=ALICE)[0]
    assert (newest["signal"], newest["reason"]) == (15, "killed by root")
    with pytest.raises(koitab.Error, match="unknown"):
        busy.ask("list", user="nobody-such")


def test_job_name_given_by_root_means_a_job_of_root(town):
    """alice cannot have root run, see or kill a job of hers by its name."""
    town.tab('"Deploy" @manual echo trap\n"Hers" @manual sleep 600\n', ALICE)
    town.tab('"Deploy" @manual echo of root\n')
    town.start()
    alice = town.caller(ALICE)
    assert alice.ask("run", job="Deploy")["text"] == "trap\n"
    assert town.run("Deploy")[1] == b"of root\n"
    alice.write("run", job="Hers")
    running = support.wait_until(lambda: [
        run for run in town.ask("status")["running"]
        if run["name"] == "Hers"])[0]
    assert {run["user"] for run in town.history(job="Deploy")} == {"root"}
    assert [run["user"] for run in town.history(
        job="Deploy", user=ALICE)] == [ALICE]
    assert town.ask("log", job="Deploy")["run"]["user"] == "root"
    for op in ("log", "kill", "history", "run", "pause"):
        with pytest.raises(koitab.Error, match="no job"):
            town.ask(op, job="Hers")
    town.ask("pause", job="Deploy", user=ALICE)
    paused = {job["user"]: job["paused"] for job in town.ask("jobs")["jobs"]
              if job["name"] == "Deploy"}
    town.ask("resume", job="Deploy", user=ALICE)
    assert town.ask("kill", job="Hers", user=ALICE)["run"]["run"] \
        == running["run"]
    with pytest.raises(koitab.Error, match="\"Deploy\" is not running"):
        town.ask("kill", job="Deploy")
    assert paused == {"root": None, ALICE: 0}


@pytest.mark.parametrize("name", [
    "../x", "..", ".", "/etc/passwd", "alice/../root", "alice\0", "\ud800",
    "a" * 5000, "-", "*", "alice\n"])
def test_impossible_user_name_is_an_unknown_user(town, name):
    town.start()
    with pytest.raises(koitab.Error, match="unknown"):
        town.ask("install", user=name, text="@manual id\n")
    assert list((town.home / "tabs").iterdir()) == []
    assert not (town.home / "x").exists()


def test_run_of_one_user_reads_nothing_from_the_tab_of_another(town):
    """Two jobs of one name, each its user's."""
    town.start()
    callers = {who: town.caller(who) for who in (ALICE, MALLORY)}
    for who, caller in callers.items():
        caller.tab(f'"Same" @manual echo {who}; id -un\n')
    for who, caller in callers.items():
        assert caller.ask("run", job="Same")["text"] == f"{who}\n{who}\n"
        assert {run["user"] for run in caller.ask("history")["runs"]} == {who}
        run = caller.ask("history")["runs"][0]["run"]
        other = callers[MALLORY if who == ALICE else ALICE]
        assert "no run" in other.ask("log", run=run)["error"]


# koi.allow and koi.deny ------------------------------------------------------


ALLOWED = [     # koi.allow, koi.deny, who may use koitab, who may not
    (None, None, [ALICE, MALLORY], []),
    ("alice\n", None, [ALICE], [MALLORY]),
    ("alice\n", "alice\n", [ALICE], [MALLORY]),
    (None, "mallory\n", [ALICE], [MALLORY]),
    (None, "", [ALICE, MALLORY], []),
    ("", None, [], [ALICE, MALLORY]),
    (" alice\nALICE\n#alice\nalic\n", None, [], [ALICE, MALLORY]),
    ("FOLDER", None, [], [ALICE, MALLORY]),     # it cannot be read
    (None, "FOLDER", [], [ALICE, MALLORY]),
    ("LOOP", None, [], [ALICE, MALLORY]),
]


def test_koi_allow_and_koi_deny_work_like_those_of_cron(town):
    folder = town.folder / "rules"
    town.set_constants(ACCESS_FILES=((f"{folder}/koi.allow", True),
                                     (f"{folder}/koi.deny", False))).start()
    callers = {who: town.caller(who) for who in (ALICE, MALLORY)}
    for allow, deny, may, may_not in ALLOWED:
        folder.mkdir()
        for name, text in (("koi.allow", allow), ("koi.deny", deny)):
            if text == "FOLDER":
                (folder / name).mkdir()
            elif text == "LOOP":
                (folder / name).symlink_to(name)
            elif text is not None:
                (folder / name).write_text(text)
        for who in may + may_not:
            reply = callers[who].ask("install", text="@manual id\n")
            assert reply.get("installed", False) == (who in may), (
                allow, deny, reply)
        for who in may_not:
            reply = callers[who].ask("list")
            assert reply["error"] == f"You ({who}) are not allowed to use " \
                "this program (koitab)"
        assert town.ask("install", text="@manual id\n")["installed"]  # root
        shutil.rmtree(folder)


def test_tab_of_an_excluded_user_cannot_be_installed_by_root(town):
    """As in Debian's: the tab's user counts, not the caller."""
    (town.folder / "koi.deny").write_text("alice\n")
    town.set_constants(
        ACCESS_FILES=((f"{town.folder}/koi.deny", False),)).start()
    with pytest.raises(koitab.Error, match="alice cannot use this program"):
        town.ask("install", user=ALICE, text="@manual id\n")


# Trusted files ---------------------------------------------------------------

GOOD = '"Job" @manual id -un\n'


def plain(path: Path, _town) -> None:
    path.write_text(GOOD)
    path.chmod(0o600)


def with_mode(number: int):
    def make(path: Path, town) -> None:
        plain(path, town)
        path.chmod(number)
    return make


def of_alice(path: Path, town) -> None:
    plain(path, town)
    os.chown(path, support.ALICE_UID, support.ALICE_UID)


def hard_link(path: Path, town) -> None:
    plain(path, town)
    os.link(path, town.folder / "other-name")


def symbolic_link(path: Path, town) -> None:
    plain(town.folder / "target", town)
    path.symlink_to(town.folder / "target")


def fifo(path: Path, _town) -> None:
    os.mkfifo(path, 0o600)


def folder(path: Path, _town) -> None:
    path.mkdir(mode=0o600)


def endless(path: Path, _town) -> None:
    path.write_text("#" * (2**20 + 1))
    path.chmod(0o600)


def with_nul(path: Path, _town) -> None:
    path.write_text(GOOD + "\0\n")
    path.chmod(0o600)


def device(path: Path, _town) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


NOT_BELIEVED = {
    "bob1": (with_mode(0o666), "chmod go-w"),
    "bob2": (with_mode(0o620), "chmod go-w"),
    "bob3": (of_alice, "owned by"), "bob4": (hard_link, "hard link"),
    "bob5": (symbolic_link, "link"), "bob6": (fifo, "not a regular file"),
    "bob7": (folder, "not a regular file"),
    "bob8": (device, "not a regular file"),
    "bob9": (endless, "larger than"), "bob10": (with_nul, "NUL")}


def uid_of(name: str) -> int:
    """Of the bobs."""
    return 1600 + int(name[3:])


@pytest.fixture
def bobs(town):
    """More users: a caller for each."""
    town.people(*(f"{name}:x:{uid_of(name)}:{uid_of(name)}::/:/bin/sh\n"
                  for name in NOT_BELIEVED))
    return lambda name: town.caller(uid_of(name))


def test_tab_that_others_can_write_is_not_used(town, bobs):
    for name, (make, _) in NOT_BELIEVED.items():
        make(town.home / "tabs" / name, town)
    town.tab(GOOD, MALLORY)
    town.start()
    all_problems = town.ask("status")["problems"]
    assert len(all_problems) == len(NOT_BELIEVED)
    for name, (_, why) in NOT_BELIEVED.items():
        path = f"/var/lib/koi/tabs/{name}: not used: "
        bob = bobs(name)
        problem, = bob.ask("status")["problems"]
        assert path in problem and why in problem and problem in all_problems
        assert any(path in line and why in line
                   for line in town.log().splitlines())
        assert "no job" in bob.ask("run", job="Job")["error"]
    mallory = town.caller(MALLORY)
    assert mallory.ask("status")["problems"] == []
    assert mallory.ask("run", job="Job")["exit"] == 0


def test_tab_that_only_root_can_write_is_used(town, bobs):
    makers = {"bob1": plain, "bob2": with_mode(0o644),
              "bob3": with_mode(0o400)}
    for name, make in makers.items():
        make(town.home / "tabs" / name, town)
    town.start()
    for name in makers:
        assert bobs(name).ask("run", job="Job")["text"] == f"{name}\n"


def test_tab_that_becomes_writable_by_others_is_dropped(town):
    path = town.tab(GOOD, ALICE)
    town.start()
    path.chmod(0o666)
    support.wait_until(lambda: town.ask("status")["problems"], 10, "a look")
    alice = town.caller(ALICE)
    assert "no job" in alice.ask("run", job="Job")["error"]
    path.chmod(0o600)
    support.wait_until(lambda: not town.ask("status")["problems"], 10,
                       "another look")
    assert alice.ask("run", job="Job")["exit"] == 0


def test_home_accessible_to_others_is_refused_with_a_command(town):
    town.home.chmod(0o755)
    with pytest.raises(pytest.fail.Exception):
        town.start()
    assert "chmod 700 /var/lib/koi" in town.log()


def test_home_that_is_a_link_or_owned_by_another_user_is_refused(town):
    shutil.rmtree(town.home)
    elsewhere = town.folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    town.home.symlink_to(elsewhere)
    with pytest.raises(pytest.fail.Exception):
        town.start()
    town.home.unlink()
    town.home.mkdir(mode=0o700)
    os.chown(town.home, support.ALICE_UID, 0)
    with pytest.raises(pytest.fail.Exception):
        town.start()
    assert "is not a directory" in town.log()
    assert "is owned by another user" in town.log()


def test_invalid_tab_is_not_installed_and_the_old_one_is_kept(town):
    town.start()
    alice = town.caller(ALICE)
    alice.tab(GOOD)
    for text in ("61 * * * * id\n", GOOD + GOOD, "@manual id",
                 "CRON_TZ=Mars/Base\n* * * * * id\n"):
        reply = alice.ask("install", text=text)
        assert reply["installed"] is False and reply["problems"], text
    assert alice.ask("list")["text"] == GOOD
    assert alice.ask("run", job="Job")["exit"] == 0


def test_tab_above_a_size_limit_is_refused_with_the_limit(town):
    town.start()
    alice = town.caller(ALICE)
    for text, why in (("@manual x\n" * 10_001, "10,000"),
                      ("#" * 2**20 + "\n", "larger"),
                      ("* * * * * " + "x" * 900_000 + "\n", "131,071"),
                      ("@manual a\0b\n", "NUL")):
        reply = alice.ask("install", text=text)
        assert not reply.get("installed"), text[:20]
        assert why in json.dumps(reply), reply
    assert alice.ask("list")["text"] is None


# Rights and environment of a job ---------------------------------------------

PROBE = """
import json, os, signal

def refused(call, *values):
    try:
        call(*values)
    except PermissionError:
        return True
    return False

def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

status = dict(line.split(":\\t", 1) for line
              in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "uids": os.getresuid(), "gids": os.getresgid(),
    "groups": sorted(os.getgroups()), "umask": os.umask(0o022),
    "fds": [fd for fd in range(70_000) if is_open(fd)],
    "cwd": os.getcwd(), "leads": os.getsid(0) == os.getpgid(0) != 0,
    "environment": dict(os.environ), "status": status,
    "refused": [refused(os.setuid, 0), refused(os.seteuid, 0),
                refused(os.setresuid, 0, 0, 0), refused(os.setreuid, 0, 0),
                refused(os.setgid, 0), refused(os.setresgid, 0, 0, 0),
                refused(os.setgroups, [0]), refused(os.chroot, "/"),
                refused(os.kill, os.getppid() and 1, 0)]}))
"""


@pytest.fixture
def probe(tmp_path):
    """Return a command that prints its user, groups and environment."""
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    path.chmod(0o644)
    return f"/usr/bin/python3 -IBS {path}"


def probed(town, who: str, probe: str, settings: str = "",
           wrap: tuple = ()) -> dict:
    town.tab(f"{settings}\"Probe\" @manual {probe}\n", who)
    town.start(wrap=wrap, SECRET_OF_ROOT="x", PYTHONPATH="/x")
    _, out, err, end = town.run("Probe", user=who)
    assert end["exit"] == 0, (err, town.log())
    return json.loads(out)


@pytest.mark.parametrize("who, uid, groups", [
    (ALICE, support.ALICE_UID, [support.ALICE_UID, *GROUPS]),
    (MALLORY, support.MALLORY_UID, [support.MALLORY_UID]),
    (WWW, 33, [33]), ("nobody", 65534, [65534])])
def test_job_has_only_the_rights_of_its_user(town, probe, who, uid, groups):
    job = probed(town, who, probe)
    assert job["uids"] == [uid] * 3 and job["gids"] == [uid] * 3
    assert job["groups"] == groups
    assert job["refused"] == [True] * len(job["refused"])
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(job["status"][name], 16) == 0, name


def test_job_has_three_descriptors_and_a_clean_process_state(town, probe):
    job = probed(town, ALICE, probe, wrap=STRICT)
    assert job["fds"] == [0, 1, 2]
    assert job["umask"] == 0o022 and job["leads"]


def test_signals_ignored_by_koid_have_their_default_action_in_a_job(town):
    town.tab('"Status" @manual grep Sig /proc/self/status\n', ALICE)
    town.start()
    text = town.caller(ALICE).ask("run", job="Status")["text"]
    masks = dict(line.split(":\t") for line in text.splitlines())
    for name in ("SigBlk", "SigIgn"):       # the C library has 32 and 33
        assert int(masks[name], 16) & ~(3 << 31) == 0, text


def test_job_has_only_the_environment_of_cron(town, probe):
    job = probed(town, ALICE, probe, "OWN=1\nUSER=root\nLOGNAME=root\n")
    host = set(koitab.Machine().host_environment()) - {"SHELL", "PATH"}
    assert {name: value for name, value in job["environment"].items()
            if name not in {*host, "LC_CTYPE", "PWD"}} == {
        "SHELL": "/bin/sh", "HOME": str(town.place.home[ALICE]),
        "LOGNAME": ALICE, "USER": ALICE, "OWN": "1", "PATH": "/usr/bin:/bin",
        "KOI_RUN": job["environment"]["KOI_RUN"]}


def test_job_in_the_tab_of_root_runs_as_root(town):
    town.tab('"Root" @manual id -u; id -G\n')
    town.start()
    _, out, _, end = town.run("Root")
    assert (out.split()[0], end["exit"]) == (b"0", 0)


NOT_THE_USER = [
    "setresuid:error=EAGAIN", "setresuid:error=EPERM",
    "setresgid:error=EPERM", "setgroups:error=EPERM",
    # The kernel says that it did, and did not (CVE-2006-2607 and kin).
    "setresuid:retval=0", "setresgid:retval=0", "setgroups:retval=0",
]


@pytest.mark.parametrize("fault", NOT_THE_USER)
def test_job_that_cannot_become_its_user_is_not_run(town, out, fault):
    support.need("strace")
    town.tab(f'"Job" @manual id > {out}/ran\n', ALICE)
    name = fault.partition(":")[0]
    town.start(wrap=("strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e",
                     f"trace={name}", "-e", f"inject={fault}"))
    alice = town.caller(ALICE)
    # A refused run is over at once; its caller hears why.
    reply = alice.ask("run", job="Job")
    run = town.ended()[0]
    assert run["state"] == "unstartable" and run["reason"], run
    assert run["exit"] is None and run["started"] is None
    assert "failed to start" in " ".join(reply["notes"]), reply
    assert list(out.iterdir()) == []
    assert "error" not in alice.ask("history")      # it lives


def test_job_starts_in_a_home_that_only_its_user_can_enter(town):
    town.place.home[ALICE].chmod(0o700)
    town.tab('"Where" @manual pwd\n', ALICE)
    town.start()
    reply = town.caller(ALICE).ask("run", job="Where")
    assert reply["text"] == f"{town.place.home[ALICE]}\n"
    assert reply["notes"] == []


@pytest.mark.parametrize("home, why", [
    ("{root}", "Permission denied"), ("/no/such/home", "No such file"),
    ("/etc/passwd", "Not a directory")])
def test_job_does_not_start_in_a_directory_its_user_cannot_enter(
        town, home, why):
    """A process that changed there as root would be let in."""
    closed = town.folder / "of-root"
    closed.mkdir(mode=0o700)
    home = home.format(root=closed)
    town.tab(f'HOME={home}\n"Where" @manual pwd; ls\n', ALICE)
    town.start()
    reply = town.caller(ALICE).ask("run", job="Where")
    assert reply["text"].splitlines()[0] == "/"
    assert len(reply["notes"]) == 1 and why in reply["notes"][0]
    assert home in reply["notes"][0] and reply["exit"] == 0


def test_home_nonexistent_of_debian_gets_no_note(town):
    town.tab('HOME=/nonexistent\n"Where" @manual pwd\n', ALICE)
    town.start()
    reply = town.caller(ALICE).ask("run", job="Where")
    assert (reply["text"], reply["notes"]) == ("/\n", [])


def test_home_without_a_slash_is_not_relative_to_the_directory_of_koid(town):
    town.tab('HOME=.\n"Where" @manual pwd\n', ALICE)
    town.start(wrap=("env", "-C", str(town.folder)))
    assert town.caller(ALICE).ask("run", job="Where")["text"] == "/\n"


def test_job_of_a_deleted_user_is_recorded_and_not_run(town, out):
    passwd = town.place.folder / "passwd"
    before = passwd.read_text()
    town.people("bob:x:1600:1600::/:/bin/sh\n")
    town.tab(f'"Bobs" @manual id > {out}/ran\n', "bob")
    town.tab('"Hers" @manual id -un\n', ALICE)
    town.start()
    passwd.write_text(before)
    end = town.run("Bobs", user="bob")[3]
    assert end["reason"] == "user bob does not exist"
    run = town.history(job="Bobs", user="bob")[0]
    assert (run["state"], run["user"]) == ("unstartable", "bob")
    assert run["reason"] == "user bob does not exist"
    assert list(out.iterdir()) == []
    assert town.caller(ALICE).ask("run", job="Hers")["text"] == "alice\n"


@pytest.mark.parametrize("line", [
    "bob:x:4294967295:1600::/:/bin/sh\n", "bob:x:65535:1600::/:/bin/sh\n"])
def test_job_of_a_user_with_a_reserved_uid_is_not_run(town, out, line):
    town.people(line)
    town.tab(f'"Bobs" @manual id > {out}/ran\n', "bob")
    town.start()
    end = town.run("Bobs", user="bob")[3]
    assert end["reason"] == "user bob does not exist"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("line, uid", [
    ("bob:!:1600:1600::/:/usr/sbin/nologin\n", 1600),   # locked, no shell
    ("bob:x:1600:1600::/:/bin/false\n", 1600),
    ("bob:x:1600:1600::/:\n", 1600),
    ("toor:x:0:0::/root:/bin/sh\n", 0)])
def test_jobs_of_a_user_without_a_login_shell_run(town, line, uid):
    """As in cron: www-data's tab is why."""
    town.people(line)
    name = line.partition(":")[0]
    town.tab('"Id" @manual id -u\n', name)
    town.start()
    assert town.run("Id", user=name)[1] == b"%d\n" % uid


# Supervisors and arguments are protected from users --------------------------

REACH = """
import ctypes
supervisor, koid = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
reached = []
for pid in (supervisor, koid):
    for name in ("mem", "environ", "maps", "fd", "cwd", "root", "exe",
                 "map_files", "syscall", "stack", "auxv", "io"):
        path = f"/proc/{pid}/{name}"
        try:
            if name in ("fd", "map_files"):
                os.listdir(path)
            elif name in ("cwd", "root", "exe"):
                os.readlink(path)
            else:
                os.read(os.open(path, os.O_RDONLY), 1)
            reached.append(path)
        except OSError:
            pass
    for request in (16, 0x4206):            # PTRACE_ATTACH, PTRACE_SEIZE
        if libc.ptrace(request, pid, 0, 0) == 0:
            reached.append(f"ptrace {pid}")
    handle = libc.syscall(434, pid, 0)      # pidfd_open, pidfd_getfd
    for fd in range(64):
        if libc.syscall(438, handle, fd, 0) >= 0:
            reached.append(f"descriptor {fd} of {pid}")
try:
    os.kill(koid, 9)
    reached.append("kill koid")
except OSError:
    pass
for path in ("/var/lib/koi", "/var/lib/koi/runs/1", "/var/lib/koi/tabs",
             "/var/lib/koi/history.db", "/run/koi/koid.sock"):
    for change in (lambda: os.rename(path, path + "x"),
                   lambda: os.chmod(path, 0o777), lambda: os.unlink(path),
                   lambda: os.open(path, os.O_RDWR)):
        try:
            change()
            reached.append(path)
        except OSError:
            pass
print(json.dumps(reached))
"""


def test_user_cannot_access_a_supervisor_or_its_files(busy):
    """It runs as alice, but it is a part of koid's memory."""
    supervisor = busy.running(2).supervisor
    status = Path(f"/proc/{supervisor}/status").read_text()
    assert f"Uid:\t{support.ALICE_UID}\t" in status
    tried = busy.python_as(ALICE, REACH, str(supervisor),
                           str(busy.daemon.pid))
    assert (tried.out, tried.err) == ("[]\n", ""), tried


def test_supervisor_killed_by_its_user_interrupts_only_its_run(busy):
    run = busy.running(2)
    killed = busy.python_as(ALICE, "os.kill(int(sys.argv[1]), 9)",
                            str(run.supervisor))
    os.kill(run.job, 0)         # the job continues without a supervisor
    os.killpg(run.job, signal.SIGKILL)
    assert killed.code == 0, killed
    run = busy.ended("Long", user=ALICE)[0]
    assert (run["state"], run["reason"]) == (
        "interrupted", "the supervisor was killed")
    assert busy.caller(ALICE).ask("run", job="Hers")["text"] == "secret\n"


def test_argument_value_is_not_in_any_command_line(town):
    town.tab('"Hush" @manual echo {{Word, secret}} | wc -c; '
             'cat /proc/[0-9]*/cmdline | tr "\\0" " "\n', ALICE)
    town.start()
    reply = town.caller(ALICE).ask("run", job="Hush",
                                   args={"Word": "hunter2hunter2"})
    assert reply["text"].split()[0] == "15"
    assert "hunter2" not in reply["text"]
    assert "hunter2" not in json.dumps(town.history())
    for path in town.home.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


# No free processes -----------------------------------------------------------


def test_run_of_a_user_at_the_process_limit_waits(town, tmp_path):
    gate = tmp_path / "gate"
    town.tab(f'"First" @manual cat {gate}; true\n'
             '"Second" @manual id -un\n', CAROL)
    os.mkfifo(gate, 0o644)
    gate.chmod(0o644)
    town.start(wrap=("prlimit", "--nproc=4"))
    first, second = asking(town, CAROL, "First"), None
    support.wait_until(lambda: processes_of(CAROL_UID) == 3, 30, "three")
    second = asking(town, CAROL, "Second")
    support.wait_until(lambda: processes_of(CAROL_UID) == 4, 30, "four")
    supervisor = town.header(2).supervisor
    support.wait_until_idle(supervisor)
    before = support.processor_seconds(supervisor)
    support.wait_until(lambda: support.processor_seconds(supervisor) > before,
                       30, "another try")
    assert town.history(job="Second", user=CAROL)[0]["state"] == "running"
    assert town.ask("status")["problems"] == []
    with open(gate, "w"):
        pass                    # the first ends, and there is room
    assert json.loads(first.process.stdout.readline())["exit"] == 0
    reply = json.loads(second.process.stdout.readline())
    assert (reply["text"], reply["exit"]) == ("carol\n", 0)


def test_run_that_waits_a_minute_for_a_process_is_unstartable(town):
    town.tab('"Long" @manual sleep 600; true\n"Second" @manual id\n', CAROL)
    town.tab('"His" @manual id -un\n', DAVE)
    town.set_constants(TRY_FOR=1.0).start(wrap=("prlimit", "--nproc=4"))
    asking(town, CAROL, "Long")
    support.wait_until(lambda: processes_of(CAROL_UID) == 3, 30, "three")
    reply = asking(town, CAROL, "Second").process.stdout.readline()
    assert b"failed to start: Resource temporarily unavailable" in reply
    run = town.ended("Second", user=CAROL)[0]
    assert run["state"] == "unstartable" and run["started"] is None
    assert "Resource temporarily unavailable" in run["reason"]
    reply = json.loads(asking(town, DAVE, "His").process.stdout.readline())
    assert reply["text"] == "dave\n"


def asking(town, user: str, job: str) -> Caller:
    """root asks for a run of a user's, who has no process to spare; the
    answer is still to come."""
    caller = Caller(town.popen(town.command(town.program(CALLS))))
    caller.write("run", job=job, user=user)
    return caller


def processes_of(uid: int) -> int:
    count = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            count += folder.name.isdigit() and \
                f"Uid:\t{uid}\t" in (folder / "status").read_text()
    return count


@pytest.mark.parametrize("call", ["clone", "clone3"])
def test_koid_survives_a_system_without_free_processes(town, call):
    support.need("strace")
    town.tab('"Hers" @manual id -un\n', ALICE)
    town.start(wrap=("strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e",
                     f"trace={call}", "-e",
                     f"inject={call}:error=EAGAIN:when=1..2"))
    reply = town.caller(ALICE).ask("run", job="Hers")
    assert (reply["text"], reply["exit"]) == ("alice\n", 0), (
        reply, town.log())


# Callers who mean harm -------------------------------------------------------

BAD_REQUESTS = [
    b"\n", b"garbage\n", b"null\n", b"[]\n", b'"x"\n', b"5\n", b"{}\n",
    b"\xff\xfe\x00\n", b"{\n", b'{"op": null}\n', b'{"op": 5}\n',
    b'{"op": ["list"]}\n', b'{"op": "fly"}\n', b'{"op": "__init__"}\n',
    b'{"op": "install"}{"op": "list"}\n',
    b'{"op": "list", "user": ["alice"]}\n', b'{"op": "list", "user": 0}\n',
    b'{"op": "list", "user": {}}\n', b'{"op": "list", "user": "../x"}\n',
    b'{"op": "list", "user": "alice\\u0000"}\n',
    b'{"op": "list", "user": "\\ud800"}\n',
    b'{"op": "install", "text": 5}\n', b'{"op": "install", "text": null}\n',
    b'{"op": "install", "text": ["@manual id"]}\n',
    b'{"op": "log", "run": true}\n', b'{"op": "log", "run": "1"}\n',
    b'{"op": "log", "run": -1}\n', b'{"op": "log", "run": 1e3}\n',
    b'{"op": "log", "run": 99999999999999999999999}\n',
    b'{"op": "log", "run": ' + b"9" * 5000 + b'}\n',
    b'{"op": "log", "run": NaN}\n', b'{"op": "log"}\n',
    b'{"op": "log", "job": "\\u0000"}\n', b'{"op": "log", "job": ""}\n',
    b'{"op": "kill"}\n', b'{"op": "kill", "run": 1}\n',
    b'{"op": "kill", "run": 99999999999999999999999}\n',
    b'{"op": "history", "before": 99999999999999999999999}\n',
    b'{"op": "history", "limit": "5"}\n',
    b'{"op": "history", "job": "\\ud800"}\n',
    b'{"op": "run"}\n', b'{"op": "run", "job": ""}\n',
    b'{"op": "run", "job": 5}\n', b'{"op": "run", "job": ["x"]}\n',
    b'{"op": "run", "job": "x", "args": []}\n',
    b'{"op": "run", "job": "x", "args": "y"}\n',
    b'{"op": "run", "job": "x", "user": 5}\n',
    b'{"op": "run", "job": "x", "user": ["alice"]}\n',
    b'{"op": "run", "job": "Odd", "args": {"A": 5}}\n',
    b'{"op": "run", "job": "Odd", "args": {"A": null}}\n',
    b'{"op": "run", "job": "Odd", "args": {"A": "\\u0000"}}\n',
    b'{"op": "run", "job": "Odd", "args": {"A": "\\ud800"}}\n',
    b'{"op": "run", "job": "Odd", "args": {"B": "x"}}\n',
    b'{"op": "run", "job": "Odd", "args": {"A": "' + b"x" * 70_000 + b'"}}\n',
    b"[" * 1_000_000 + b"\n", b'{"op":' * 100_000 + b"\n",
    b'{"op": "list", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
]
RAW = """
import json, os, socket
def call(data=b"", seconds=15.0):
    door = socket.socket(socket.AF_UNIX)
    door.settimeout(seconds)
    door.connect("/run/koi/koid.sock")
    try:
        door.sendall(data)
    except OSError:
        pass            # it hung up: an answer, too
    return door
"""
EACH = RAW + """
for line in sys.stdin.buffer.read().split(b"\\n--\\n"):
    door = call(line)
    answer = b""
    while chunk := door.recv(65536):
        answer += chunk
    print(json.dumps([line[:60].decode("latin-1"),
                      answer.decode("latin-1")]))
"""


def test_invalid_request_is_refused_with_a_message(town):
    town.tab('"Odd" @manual echo {{A}}\n', MALLORY)
    town.start()
    mallory = town.popen(town.as_user(
        MALLORY, town.program(EACH + "sys.exit()\n")))
    out, _ = mallory.communicate(b"--\n".join(
        line + b"\n" for line in BAD_REQUESTS)[:-1], timeout=60)
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == len(BAD_REQUESTS), town.log()
    for line, answer in answers:
        reply = json.loads(answer)
        assert reply.get("error"), (line, answer)
        assert "koid failed" not in reply["error"], (line, reply)
    assert "failed" not in town.log()
    assert town.history() == []


def harmful(town, program: str) -> subprocess.Popen:
    """mallory does something to koid until we are done; he says when it has
    begun."""
    process = town.popen(town.as_user(
        MALLORY, town.program(
            f"{RAW}{program}\nprint('begun', flush=True)\n"
            "sys.stdin.read()\nsys.exit()\n")))
    said = process.stdout.readline()
    assert said == b"begun\n", said
    return process


HARM = {
    "a line of 9 MB": """
door = call(b"x" * 9_000_000)
""",
    "half a request, and silence": """
doors = [call(b'{"op": "li') for _ in range(60)]
""",
    "300 connections": """
doors = []
for _ in range(300):
    try:
        doors.append(call(b'{'))
    except OSError:
        pass
""",
    "60 half requests of 4 MB": """
doors = [call(b"x" * 4_000_000) for _ in range(60)]
""",
    "replies that are not read": """
doors = [call(b'{"op": "log", "job": "Big"}\\n') for _ in range(60)]
""",
    "descriptors in the post": """
import array
for _ in range(50):
    door = call()
    door.sendmsg([b"{"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                           array.array("i", [0, 1, 2] * 20))])
""",
    "calls that are hung up at once": """
for _ in range(2_000):
    door = socket.socket(socket.AF_UNIX)
    door.connect("/run/koi/koid.sock")
    door.close()
""",
}


@pytest.mark.parametrize("name", HARM)
def test_hostile_client_does_not_delay_replies_to_others_by_a_second(
        town, clock, name):
    """A second of koid's own; its clock stands, so nobody is sent away."""
    town.tab('"Big" @manual head -c 900000 /dev/zero\n', MALLORY)
    town.tab('"Hers" @manual id -un\n', ALICE)
    clock.start(NOON)
    if "read" in name:
        town.run("Big", user=MALLORY)
    alice = town.caller(ALICE)
    town.seconds_for(alice)     # it has loaded Python, and so on
    files = len(os.listdir(f"/proc/{town.daemon.pid}/fd"))
    before = support.megabytes_of(town.daemon.pid)
    mallory = harmful(town, HARM[name])
    took = [town.seconds_for(alice) for _ in range(5)]
    assert max(took) < 1, took
    assert support.megabytes_of(town.daemon.pid) - before < 80
    assert alice.ask("run", job="Hers")["text"] == "alice\n"
    town.ask("status")
    mallory.kill()
    mallory.wait()
    support.wait_until(lambda: len(os.listdir(
        f"/proc/{town.daemon.pid}/fd")) <= files, 10, "koid to let go")


def test_flood_of_connections_delays_neither_jobs_nor_other_users(town):
    town.tab('"Hers" @manual id -un\n', ALICE)
    town.start()
    alice = town.caller(ALICE)
    flood = """
for _ in range(3):
    if os.fork() == 0:
        while os.getppid() != 1:
            door = socket.socket(socket.AF_UNIX)
            try:
                door.connect("/run/koi/koid.sock")
            except OSError:
                pass
            door.close()
        os._exit(0)
"""
    mallory = harmful(town, flood)
    took = [town.seconds_for(alice) for _ in range(10)]
    reply = alice.ask("run", job="Hers")
    mallory.kill()
    mallory.wait()
    assert max(took) < 3, took     # with no limit: 18 s
    assert reply["text"] == "alice\n"


# Writes down each turn of koid's loop, and whose requests are carried out.
TURNS = """
import os
turns = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
wait, answer = k.Poller.wait, k.ControlService.answer
def noted_wait(self, timeout):
    os.write(turns, b"\\n")
    return wait(self, timeout)
def noted_answer(self, caller, request):
    os.write(turns, caller.name.encode() + b" ")
    return answer(self, caller, request)
k.Poller.wait, k.ControlService.answer = noted_wait, noted_answer
"""
MANY_JOBS = "".join(f"0 {n % 24} 29 2 * true {n}\n"
                    for n in range(9999 if support.FULL else 999))


def test_koid_handles_one_request_of_each_user_per_turn(town, tmp_path):
    """Each request costs a look at all the jobs; 63 wait all the time."""
    turns = tmp_path / "turns"
    town.patch += TURNS.format(path=str(turns))
    town.tab(MANY_JOBS, MALLORY)
    town.start()
    alice = town.caller(ALICE)
    harmful(town, """
if os.fork() == 0:
    while os.getppid() != 1:
        for door in [call(b'{"op": "jobs"}\\n') for _ in range(63)]:
            while door.recv(65536):
                pass
    os._exit(0)
""")
    support.wait_until(lambda: turns.read_text().count(MALLORY) > 5, 30)
    for _ in range(5):
        assert "error" not in alice.ask("history")
    served = turns.read_text()
    assert served.count(f"{ALICE} ") == 5
    assert max(line.count(MALLORY) for line in served.splitlines()) == 1


def test_output_of_one_user_is_limited_on_disk(town):
    """Only the oldest runs of that user are removed."""
    town.set_constants(BYTES_OF_HISTORY=4 * 2**20)
    town.tab('"Noise" @manual head -c 1200000 /dev/urandom\n', ALICE)
    for user in (MALLORY, "root"):
        town.tab('"Mine" @manual echo mine\n', user)
    town.start()
    assert town.run("Mine")[1] == b"mine\n"
    assert town.run("Mine", user=MALLORY)[1] == b"mine\n"
    for _ in range(16 if support.FULL else 8):
        town.caller(ALICE).ask("run", job="Noise")
    assert town.run("Mine", user=MALLORY)[1] == b"mine\n"
    runs = support.wait_until(lambda: [
        run for run in town.history(user=ALICE) if run["state"] == "done"
    ] and not town.ask("status")["running"] and town.history(user=ALICE))
    with sqlite3.connect(town.home / "history.db") as db:
        size, = db.execute("select sum(length(frames)) from output").fetchone()
    db.close()
    assert 2 * 2**20 < size < 4 * 2**20 and 2 <= len(runs) <= 4
    assert len(town.history(job="Mine")) == 1
    assert len(town.history(job="Mine", user=MALLORY)) == 2


def test_number_of_active_runs_of_a_user_is_limited(town):
    town.set_constants(MOST_ACTIVE=5)
    town.tab('"Long" @manual sleep 600\n', ALICE)
    town.tab('"Mine" @manual echo mine\n', MALLORY)
    town.tab('"Long" @manual sleep 600\n')
    town.start()
    for _ in range(5):
        town.caller(ALICE).write("run", job="Long")
    support.wait_until(lambda: len(town.ask("status")["running"]) == 5)
    reply = town.caller(ALICE).ask("run", job="Long")
    assert reply["error"] == "alice has 5 active runs", reply
    assert town.history(user=ALICE)[0]["state"] == "skipped"
    assert town.caller(MALLORY).ask("run", job="Mine")["text"] == "mine\n"
    for _ in range(6):          # root has no limit
        town.launch("Long")
    support.wait_until(lambda: len(town.ask("status")["running"]) == 11)


def test_user_with_few_runs_starts_before_a_user_with_many(town, clock, out):
    """The tab of alice is read first."""
    town.tab("* * * * * true\n" * 30, ALICE)
    town.tab("* * * * * true\n", MALLORY)
    town.patch += f"""
fork = k.fork_supervisor
def noted_fork(account, *rest):
    with open({str(out / "order")!r}, "a") as file:
        file.write(account.name + "\\n")
    return fork(account, *rest)
k.fork_supervisor = noted_fork
"""
    clock.start(NOON)
    clock.elapse(60)
    order = support.wait_until(lambda: (out / "order").exists() and (
        out / "order").read_text().split())
    assert order[0] == MALLORY and set(order[1:]) <= {ALICE}


def test_one_user_cannot_take_all_connections(town):
    town.start()
    harmful(town, "doors = [call(b'{') for _ in range(64)]")
    mallory = town.caller(MALLORY)
    assert "busy" in mallory.ask("history")["error"]
    assert "error" not in town.caller(ALICE).ask("history")


def test_unread_replies_do_not_fill_the_memory_of_koid(town):
    town.tab('"Fat" @manual true {{A, text}} {{B, text}} {{C, text}}\n',
             MALLORY)
    town.start()
    caller = town.caller(MALLORY)
    for _ in range(20):
        assert caller.ask("run", job="Fat", args=dict.fromkeys(
            "ABC", "x" * 60_000))["exit"] == 0
    before = support.megabytes_of(town.daemon.pid)
    harmful(town, """
doors = [call(b'{"op": "history", "limit": 1000}\\n') for _ in range(60)]
""")
    town.caller(ALICE).ask("list")      # koid has come to all before this
    grown = support.megabytes_of(town.daemon.pid) - before
    print(f"60 replies of 3.6 MB: koid has grown by {grown:.0f} MB")
    assert grown < 100


def test_silent_client_is_disconnected(town, clock):
    clock.start(NOON)
    mallory = town.popen(town.as_user(MALLORY, town.program(RAW + """
door = call(b'{"op": "list"')
door.setblocking(False)
print("begun", flush=True)
for line in sys.stdin:
    try:
        print("closed" if door.recv(10) == b"" else "answered", flush=True)
    except BlockingIOError:
        print("open", flush=True)
sys.exit()
""")))
    assert mallory.stdout.readline() == b"begun\n"
    clock.seen()
    for seconds, state in ((koitab.REQUEST_TIME - 1, b"open\n"),
                           (1, b"closed\n")):
        clock.elapse(seconds)
        clock.seen()
        mallory.stdin.write(b"\n")
        mallory.stdin.flush()
        assert mallory.stdout.readline() == state


def test_large_tab_does_not_delay_other_users_by_a_second(town):
    """koid has one thread: as long as it reads, all wait."""
    town.start()
    mallory, alice = town.caller(MALLORY), town.caller(ALICE)
    text = "".join(f"* * * * * x{number}\n" for number
                   in range(10_000 if support.FULL else 2000))
    assert mallory.ask("install", text=text)["installed"]
    assert town.seconds_for(alice) < 1
    assert town.ask("remove", user=MALLORY)["removed"]


# koid --system ---------------------------------------------------------------

SPOOL = "var/spool/cron/crontabs"
# name below /etc/cron.d -> does Debian's cron read it? All are root's, 0644.
NAMES = {
    "good_1-A": True, "e2scrub_all": True, "php": True, "good.bak": False,
    "good~": False, ".hidden": False, "#good#": False, "good.dpkg-new": False,
    "gööd": False, "with blank": False, "tmp.x": False, "UPPER": True}


class System(Town):
    """A host with the tabs of cron: /etc is a copy of this machine's, the
    spool is empty."""

    def __init__(self, folder: Path, host: support.Host):
        self.etc, self.spool = folder / "etc", folder / "spool"
        shutil.copytree("/etc", self.etc, symlinks=True,
                        ignore=shutil.ignore_patterns(
                            "ssl", "ca-certificates*", "X11", "fonts",
                            "java*", "apt", "apache2", "postgresql*"))
        for path in self.etc.glob("cron*/*"):
            if not path.name.startswith(("e2scrub", ".")):
                path.unlink()
        self.spool.mkdir()
        self.spool.chmod(0o1730)
        with open(self.etc / "shadow", "a") as file:    # for cron's PAM
            file.writelines(f"{name}:*:19000:0:99999:7:::\n" for name in (
                ALICE, MALLORY, CAROL, DAVE))
        host.binds.insert(0, (str(self.etc), "/etc"))
        host.bind(self.spool, f"/{SPOOL}")
        super().__init__(folder, host)

    def write(self, name: str, text: str, mode: int = 0o644,
              uid: int = 0) -> Path:
        """A file as a package brings it."""
        path = self.etc / name
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, uid, 0)
        return path

    def put(self, user: str, text: str, mode: int = 0o600,
            uid: int = 0) -> Path:
        """A file in the spool."""
        path = self.spool / user
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, uid, uid)
        return path

    def cron(self, **env: str) -> subprocess.Popen:
        """Debian's cron, in the foreground."""
        settings = [f"{name}={value}" for name, value in env.items()]
        return self.popen(self.command(["env", *settings, "cron", "-f"]),
                          stderr=subprocess.PIPE)

    def cron_pid(self) -> str:
        path = self.root / "run/crond.pid"
        return path.read_text().strip() if path.exists() else ""


@pytest.fixture
def system(tmp_path, host):
    support.need("cron", "nsenter", "setpriv", "unshare")
    tmp_path.chmod(0o755)
    system = System(tmp_path, host)
    yield system
    system.close()


def tabs_of_every_kind(system, out) -> None:
    """Lines that note, in a file of the line's name, whose they are and
    what they know."""
    def line(name: str, user: str = "", when: str = "* * * * *") -> str:
        note = f"{{ id -un; echo $MARK-$OTHER; }} > {out}/{name}"
        return " ".join(part for part in (when, user, note) if part) + "\n"

    def note_of(name: str) -> str:
        return shlex.quote(name.replace(" ", "_").replace("#", "+"))

    system.write("crontab", "MARK=crontab\n" + line("root", "root")
                 + line("alice", ALICE) + line("www", WWW)
                 + line("never", "root", "0 0 30 2 *"))
    system.write("cron.d/unknown", line("unknown", "nobody-such"))
    for name in NAMES:
        if name != "e2scrub_all":
            system.write(f"cron.d/{name}", "OTHER=d\n"
                         + line(f"d-{note_of(name)}", MALLORY))
    system.write("cron.d/open", line("open", "root"), 0o666)
    system.write("cron.d/group", line("group", "root"), 0o664)
    system.write("cron.d/foreign", line("foreign", "root"),
                 uid=support.ALICE_UID)
    (system.etc / "cron.d/folder").mkdir()
    (system.etc / "cron.d/nowhere").symlink_to("/nonexistent")
    target = system.write("elsewhere", line("linked", "root"))
    (system.etc / "cron.d/link").symlink_to(f"/etc/{target.name}")
    system.put(ALICE, line("spool-alice"), uid=support.ALICE_UID)
    system.put(WWW, line("spool-www"))
    system.put(MALLORY, line("spool-0644"), 0o644, support.MALLORY_UID)
    system.put(CAROL, line("spool-0400"), 0o400, CAROL_UID)
    system.put(DAVE, line("spool-anothers"), uid=support.ALICE_UID)
    system.put("ghost", line("spool-ghost"))
    system.put("tmp.abc", line("spool-tmp"))
    os.link(system.put("daemon", line("spool-linked")),
            system.folder / "daemon")
    system.put("aside", line("spool-link"))
    (system.spool / "bin").symlink_to("aside")


def noted(out: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().split()
            for path in out.iterdir() if path.stat().st_size}


def test_koid_system_runs_the_jobs_of_debians_cron_as_the_same_users(
        tmp_path, host):
    """The same files on two hosts, one with each, and one minute."""
    support.need("cron", "faketime", "nsenter", "setpriv", "unshare")
    hosts, notes = [], []
    for name in ("koid", "cron"):
        folder = tmp_path / name
        (folder / "out").mkdir(parents=True)
        for path in (tmp_path, folder):
            path.chmod(0o755)
        (folder / "out").chmod(0o1777)
        hosts.append(System(folder, support.Host(folder / "host")))
        notes.append(folder / "out")
        tabs_of_every_kind(hosts[-1], notes[-1])
    koid, cron = hosts
    # cron would hang on the first, and leave out /etc/crontab because of the
    # second, which any user can make where links are not protected.
    os.mkfifo(koid.etc / "cron.d/fifo", 0o644)
    os.link(koid.etc / "crontab", koid.folder / "hard-link")
    try:
        clock, crons = clockwork.StillClock(koid), tmp_path / "clock"
        clockwork.show_faked(crons, NOON + 30)
        daemon = clockwork.Sleeper(cron.cron(**clockwork.faked(crons)),
                                   "nanosleep")
        clock.set(NOON + 30)
        koid.start("--system")
        assert not any(map(noted, notes))
        clock.elapse_to(NOON + 60)
        clock.seen()
        clockwork.show_faked(crons, NOON + 61)  # cron wakes a second later
        daemon.wake()
        support.wait_until(lambda: not koid.unfinished(), 30, "the ends")
        expected = {
            "root": ["root", "crontab-"], "alice": ["alice", "crontab-"],
            "www": [WWW, "crontab-"], "linked": ["root", "-"],
            "spool-alice": ["alice", "-"], "spool-www": [WWW, "-"],
            **{f"d-{name}": ["mallory", "-d"] for name, read
               in NAMES.items() if read and name != "e2scrub_all"}}
        assert noted(notes[0]) == noted(notes[1]) == expected
        runs = koid.history()
        assert {(run["user"], run["reason"]) for run in runs
                if run["state"] == "unstartable"} >= {
            ("nobody-such", "user nobody-such does not exist")}
        log = koid.log()
        for path in ("cron.d/open", "cron.d/group", "cron.d/foreign"):
            assert f"/etc/{path}: not used: " in log
        for user in (MALLORY, DAVE, "daemon", "bin"):
            assert f"/{SPOOL}/{user}: not used: " in log
        assert "e2scrub_all" in json.dumps(koid.ask("jobs"))
    finally:
        for one in hosts:
            one.close()


@pytest.mark.parametrize("replaced", [True, False])
def test_changed_crontab_is_in_force_from_the_next_minute(
        system, out, replaced):
    """In place, which Debian's cron does not notice in the spool, or by
    rename."""
    clock = clockwork.StillClock(system)
    places = {"crontab": system.etc / "crontab",
              "cron.d": system.etc / "cron.d/one",
              "spool": system.spool / ALICE}

    def write(to: Path, place: str, name: str) -> None:
        user = "" if place == "spool" else "alice "
        to.write_text(f"* * * * * {user}id -un > {out}/{place}-{name}\n")
        to.chmod(0o600)

    for place, path in places.items():
        write(path, place, "before")
    clock.set(NOON + 57)
    system.start("--system")
    for place, path in places.items():
        if replaced:
            write(system.folder / "fresh", place, "after")
            os.rename(system.folder / "fresh", path)
        else:
            write(path, place, "after")
    clock.seen()
    clock.elapse(koitab.SETTLE)
    clock.seen()
    clock.elapse_to(NOON + 60)
    clock.seen()
    support.wait_until(lambda: not system.unfinished(), 20, system.log())
    assert noted(out) == {f"{place}-after": ["alice"] for place in places}


def test_koid_without_system_ignores_the_tabs_of_cron(system, out):
    system.write("crontab", f"* * * * * root id > {out}/ran\n")
    system.put(ALICE, f"* * * * * id > {out}/ran\n")
    cron = system.cron()
    support.wait_until(system.cron_pid, 10, "cron")
    system.start()
    assert system.ask("jobs")["jobs"] == []
    assert system.cron_pid() == str(cron.pid)


# --- what koitab shows of cron's tabs


def koitab_as(system, who, *args: str, **env: str) -> support.Result:
    done = subprocess.run(
        system.as_user(who, system.command(*args), **env),
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    return support.Result(done.returncode, done.stdout.decode(),
                          done.stderr.decode())


@pytest.fixture
def served(system):
    """koid --system, with jobs of alice's and root's in all of cron's
    places."""
    system.put(ALICE, "30 4 * * * echo spooljob; exit 4\n",
               uid=support.ALICE_UID)
    system.write("cron.d/both", "A=1\n1 1 * * * root echo of-root $A\n"
                 f"2 1 * * * {ALICE} echo of-alice $A\nB=2\n"
                 "# secret\n3 1 * * * root echo secret\n", 0o600)
    system.start("--system")
    return system


def test_user_sees_all_their_served_jobs_and_no_line_of_others(served):
    shown = koitab_as(served, ALICE, "next")
    assert shown.code == 0 and "T04:30:00" in shown.out
    assert "echo of-alice $A" in shown.out and "T01:02:00" in shown.out
    reply = served.caller(ALICE).ask("list")
    assert reply["text"] is None and reply["served"] == {
        "/etc/cron.d/both": f"A=1\n\n2 1 * * * {ALICE} echo of-alice $A\n",
        f"/{SPOOL}/{ALICE}": "30 4 * * * echo spooljob; exit 4\n"}
    assert koitab_as(served, MALLORY, "next").err == \
        "no crontab for mallory\n"


def test_user_runs_a_job_of_the_spool_and_status_shows_it(served):
    run = koitab_as(served, ALICE, "run", "echo spooljob; exit 4")
    assert (run.out, run.code) == ("spooljob\n", 4), run
    assert "exit 4" in koitab_as(served, ALICE, "history").out
    status = koitab_as(served, ALICE, "status").out
    for line in (f"/{SPOOL}/{ALICE}: 1 job", "/etc/cron.d/both: 1 job"):
        assert line in status


@pytest.mark.parametrize("args, code", [(["-l"], 1), (["-e"], 0)])
def test_options_l_and_e_warn_of_a_served_spool_crontab(served, args, code):
    shown = koitab_as(served, ALICE, *args, EDITOR="true")
    assert shown.code == code
    assert f"warning: koid serves /{SPOOL}/{ALICE}, too\n" in shown.err
    assert "cron.d" not in shown.err
    assert "koid serves" not in koitab_as(served, MALLORY, "-l").err


def test_root_sees_the_system_tabs_and_cannot_run_a_job_by_line_number(served):
    shown = koitab_as(served, 0, "next")
    for command in ("of-root", "of-alice", "secret"):
        assert f"echo {command}" in shown.out
    assert "spooljob" not in shown.out
    assert "spooljob" in koitab_as(served, 0, "-u", ALICE, "next").out
    for who, line, label in ((0, "2", "echo of-root $A"),
                             (ALICE, "3", "echo of-alice $A")):
        run = koitab_as(served, who, "run", line)
        assert run.code == 1 and run.out == ""
        assert f'{line} is not the name of a job; the job on line {line} ' \
            f'is "{label}"' in run.err
        command = run.err.split("hint: koitab ")[1].split()
        assert koitab_as(served, who, *command).out.startswith("of-")


def test_error_of_a_spool_crontab_is_its_users_problem(served):
    (served.spool / ALICE).unlink()     # protected_regular in proc(5)
    served.put(ALICE, "99 * * * * echo\n", uid=support.ALICE_UID)
    support.wait_until(lambda: served.caller(ALICE).ask("status")["problems"],
                       10, "the problem")
    assert served.caller(MALLORY).ask("status")["problems"] == []


# --- what status says of other daemons


def fake_cron(system, *words: str) -> subprocess.Popen:
    """A program that /proc shows as a cron; it takes no lock."""
    program = system.folder / "bin" / words[0]
    program.parent.mkdir(exist_ok=True)
    program.symlink_to("/usr/bin/tail")
    (system.folder / "crond").touch()
    cron = system.popen(system.command([
        "sh", "-c", 'cd "$0" && exec "$@"', str(system.folder),
        str(program), *words[1:], "-f", "crond"]))
    support.wait_until(lambda: Path(f"/proc/{cron.pid}/comm").read_text()
                       == words[0] + "\n", 10, "the program")
    return cron


def problem(system, who=0) -> str:
    status = koitab_as(system, who, "status", "--json")
    problems = json.loads(status.out)["problems"]
    assert status.code == (1 if problems else 0), status
    return "\n".join(problems)


def test_status_reports_crontabs_that_no_daemon_serves(system):
    system.write("cron.d/t", "* * 1 1 * root true\n")
    system.write("cron.d/empty", "A=b\n")
    system.put(ALICE, "* * 1 1 * true\n", uid=support.ALICE_UID)
    system.start()
    said = problem(system)
    assert "crontabs that no daemon serves" in said and "/etc/cron.d/t" in said
    assert f"/{SPOOL}/{ALICE}" in said and "empty" not in said
    assert problem(system, ALICE) == ""
    with support.stopping(fake_cron(system, "cron")):
        assert problem(system) == ""
    system.stop()
    system.start("--system")
    assert problem(system) == ""


@pytest.mark.parametrize("words", [["crond"], ["busybox", "crond"]])
def test_koid_system_refuses_and_reports_a_cron_without_a_lock(system, words):
    system.start("--system")
    cron = fake_cron(system, *words)
    assert f"koid --system and cron (pid {cron.pid}) serve the same" \
        in problem(system)
    system.stop()
    with pytest.raises(pytest.fail.Exception):
        system.start("--system")
    assert f"cron is running (pid {cron.pid})" in system.log()


def test_status_reports_two_running_crons(system):
    system.start()
    first, second = fake_cron(system, "cron"), fake_cron(
        system, "busybox", "crond")
    said = problem(system)
    for cron in (first, second):
        assert f"cron (pid {cron.pid})" in said


def test_status_reports_a_second_koid_of_the_user(town):
    hers = town.folder / "hers"
    hers.mkdir()
    support.own(hers, support.ALICE_UID)
    env = {"HOME": str(hers)}
    with support.stopping(town.popen(town.as_user(
            ALICE, town.command("daemon"), **env))):
        home = hers / ".local/state/koi"
        support.wait_until((home / "koid.sock").exists, 20, "her koid")
        town.start()
        status = koitab_as(town, ALICE, "status", **env)
        assert status.code == 1
        assert f"{home} has a tab that only your own koid serves" \
            in status.out
    assert koitab_as(town, ALICE, "status", **env).code == 0


# --- cron and koid: only one of them runs


def test_cron_refuses_to_start_while_koid_serves_its_tabs(system):
    system.start("--system")
    assert system.cron_pid() == str(system.daemon.pid)
    assert support.mode(system.root / "run/crond.pid") == 0o644
    refused = support.ended(system.cron())
    assert refused.code == 1, refused
    assert f"otherpid may be {system.daemon.pid}" in refused.err
    assert system.ask("status")["system"] is True


def test_koid_refuses_to_serve_the_tabs_of_cron_while_cron_is_running(system):
    cron = system.cron()
    support.wait_until(system.cron_pid, 10, "cron")
    with pytest.raises(pytest.fail.Exception):
        system.start("--system")
    assert f"cron is running (pid {cron.pid})" in system.log()
    assert system.cron_pid() == str(cron.pid) and cron.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_cron_starts_after_koid_stops_even_while_a_job_is_running(
        system, out, number):
    """A job and its supervisor must not hold the lock."""
    system.tab(f'"Long" @manual touch {out}/runs; sleep 600\n', ALICE)
    system.start("--system")
    asking(system, ALICE, "Long")
    support.wait_until(lambda: list(out.iterdir()), 20, "Long")
    system.stop(number)
    cron = system.cron()
    support.wait_until(lambda: system.cron_pid() == str(cron.pid), 10,
                       "cron to take over")
    assert cron.poll() is None


def reboots(out: Path) -> int:
    return (out / "boots").read_text().count("up") \
        if (out / "boots").exists() else 0


def test_reboot_jobs_run_once_when_koid_and_then_cron_serve(system, out):
    system.write("crontab", f"@reboot root echo up >> {out}/boots\n")
    system.start("--system")
    support.wait_until(lambda: reboots(out), 20, "@reboot")
    assert (system.root / "run/crond.reboot").exists()
    system.stop()
    system.start("--system")
    system.stop()
    cron = system.cron()
    support.wait_until(system.cron_pid, 10, "cron")
    support.wait_until(lambda: "nanosleep" in Path(
        f"/proc/{cron.pid}/wchan").read_text(), 10, "cron to sleep")
    assert reboots(out) == 1


@pytest.mark.parametrize("mark", ["crond.reboot", "cron.reboot"])
def test_koid_runs_no_reboot_job_that_cron_has_run(system, out, mark):
    """Debian's mark, and cronie's."""
    (system.root / "run" / mark).touch(mode=0)
    system.write("crontab", f"@reboot root echo up >> {out}/boots\n")
    system.tab(f'"Now" @manual echo now >> {out}/boots\n')
    system.start("--system")
    assert system.run("Now")[3]["exit"] == 0    # later than any @reboot
    assert (out / "boots").read_text() == "now\n"


def test_koid_without_system_writes_no_file_of_cron(system, out):
    system.tab(f"@reboot echo up >> {out}/boots\n")
    system.start()
    support.wait_until(lambda: reboots(out), 20, "@reboot")
    for name in ("crond.reboot", "cron.reboot", "crond.pid"):
        assert not (system.root / "run" / name).exists()
    system.stop()
    system.start()
    system.ask("status")        # later than any start
    support.wait_until(lambda: not support.children_of(system.daemon.pid),
                       20, "the jobs")
    assert reboots(out) == 1


# An ordinary user's own koid -------------------------------------------------


@pytest.mark.parametrize("where, home", [
    ({"XDG_STATE_HOME": "{home}/state"}, "state/koi"),
    ({"XDG_STATE_HOME": "not/absolute"}, ".local/state/koi"),
    ({}, ".local/state/koi"),
])
def test_koid_of_an_ordinary_user_is_accessible_only_to_that_user(
        town, where, home):
    base = town.place.home[ALICE]
    env = {"HOME": str(base), **{name: value.format(home=base)
                                 for name, value in where.items()}}
    koid = town.popen(town.as_user(ALICE, [*town.command("daemon")], **env),
                      stderr=subprocess.PIPE)
    door = base / home / "koid.sock"
    support.wait_until(door.exists, 20, "the socket")
    assert (support.mode(door), support.owner(door)) == (
        0o600, support.ALICE_UID)
    assert support.mode(base / home) == 0o700
    alice = town.caller(ALICE, **env)
    alice.tab('"Me" @manual id -un\n')
    assert alice.ask("run", job="Me")["text"] == "alice\n"
    assert alice.ask("status")["system"] is False
    reply = alice.ask("list", user=MALLORY)
    assert "runs as an ordinary user" in reply["error"]
    mallory = town.caller(MALLORY, KOI_HOME=str(base / home))
    for op in ("list", "jobs", "history", "status"):
        assert "Permission denied" in mallory.ask(op)["error"], op
    assert koid.poll() is None


def test_an_ordinary_user_cannot_serve_the_system(town):
    done = subprocess.run(
        town.as_user(ALICE, town.command("daemon", "--system"),
                     HOME=str(town.place.home[ALICE])),
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=30)
    assert done.returncode != 0
    assert b"only root can use --system" in done.stderr


def test_ordinary_user_cannot_serve_all_users(town):
    """Neither in root's home, nor at the socket that all would call."""
    town.start()
    done = subprocess.run(
        town.as_user(ALICE, town.command("daemon"), KOI_HOME="/var/lib/koi"),
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=30)
    assert done.returncode == 1 and b"error" in done.stderr
    assert b"Traceback" not in done.stderr

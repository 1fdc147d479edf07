"""What the tests share: a scratch home, real programs, real users."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from scratch import is_shared, make_scratch_directory

CHECKOUT = Path(__file__).resolve().parent.parent
STRICT = os.environ.get("STRICT") == "1"
# The long form of sweeps and matrices: make test-all.
FULL = os.environ.get("TESTS_FULL") == "1"
AS_ROOT = os.geteuid() == 0
ALICE, ALICE_UID = "alice", 1500
MALLORY, MALLORY_UID = "mallory", 1501

# Only root can make users, mount, and change owners (see conftest.py).
root_only = pytest.mark.root_only


# tests/run.py makes one for all its workers, and removes it.
SCRATCH = Path(os.environ.get("TESTS_SCRATCH") or make_scratch_directory())
CACHE = SCRATCH / "compiled"


def shared_checkout() -> Path:
    """The checkout, or a copy of it where other users cannot enter it: a
    checkout of root's is often in /root, or was made under umask 077."""
    if not AS_ROOT or all(map(is_shared, [
            CHECKOUT / "mission.py", CHECKOUT / "koitab.py",
            CHECKOUT / "tests", Path(__file__)])):
        return CHECKOUT
    copy = SCRATCH / "checkout"
    if not copy.exists():
        fresh = SCRATCH / f"checkout-{os.getpid()}"
        shutil.copytree(CHECKOUT, fresh,
                        ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for path in [fresh, *fresh.rglob("*")]:
            mode = path.stat().st_mode
            path.chmod(mode | (0o055 if mode & 0o100 else 0o044))
        try:
            fresh.rename(copy)
        except OSError:             # another worker was faster
            shutil.rmtree(fresh)
    return copy


ROOT = shared_checkout()
# Time zone law changes: what the vectors of tests/cases assert holds for
# these zone files, and not for those of every machine.
ZONES = ROOT / "tests/cases/zoneinfo"
# The interpreter under test. A virtual environment only starts it.
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
# One that every user can start: one under /root cannot be.
SHARED_PYTHON = PYTHON if not AS_ROOT or is_shared(PYTHON) \
    else "/usr/bin/python3"


def program(name: str, python: str = PYTHON, patch: str = "") -> list[str]:
    """The command that starts mission or koitab, before its arguments.

    See tests/cached.py: `patch` is Python text that changes the module `k`.
    """
    return [python, "-IS", str(ROOT / "tests/cached.py"), str(CACHE), patch,
            str(ROOT / f"{name}.py")]


def load(name: str):
    """mission or koitab as a module, from the file at the top. koitab has
    the time zones of tests/cases before those of the machine."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        if name == "koitab":
            module.ZONE_DIRECTORIES = (str(ZONES), *module.ZONE_DIRECTORIES)
    return sys.modules[name]


PARTS = {   # program -> the Debian package that brings it
    "git": "git", "sendmail": "msmtp-mta", "notify-send": "libnotify-bin",
    "dunst": "dunst", "dunstctl": "dunst", "Xvfb": "xvfb",
    "dbus-daemon": "dbus", "pass": "pass", "gpg": "gnupg",
    "strace": "strace", "ts": "moreutils", "openssl": "openssl",
    "setcap": "libcap2-bin", "getcap": "libcap2-bin", "bash": "bash",
    "unshare": "util-linux", "setpriv": "util-linux",
    "busybox": "busybox", "cron": "cron", "faketime": "faketime",
    "crontab": "cron", "systemd-analyze": "systemd", "dash": "dash",
    "systemctl": "systemd", "pgrep": "procps",
    "nsenter": "util-linux", "setsid": "util-linux",
    "restic": "restic", "borg": "borgbackup", "rsync": "rsync",
    "setfacl": "acl", "apache2": "apache2-bin",
    "bindfs": "bindfs", "fusermount3": "fuse3",
    "etcd": "etcd-server", "etcdctl": "etcd-client", "ip": "iproute2",
    "mkfs.ext4": "e2fsprogs", "ps": "procps", "zsh": "zsh", "fish": "fish",
}


def find(program: str) -> str | None:
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=path + ":/usr/sbin:/usr/lib:/sbin")


# What a program needs of this machine beyond being installed: a container
# may have no CAP_SYS_ADMIN, or forbid ptrace.
TRIALS = {
    "unshare": ("-m", "-u", "-p", "-f", "mount", "-t", "tmpfs", "tmpfs",
                str(SCRATCH)),
    "strace": ("-o", "/dev/null", "true"),
}


@functools.lru_cache(maxsize=None)
def trial_failure(program: str) -> str:
    """Why a program that is installed does not work here; "" if it does."""
    done = subprocess.run(
        [find(program), *TRIALS[program]], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    return f"exit status {done.returncode} {' '.join(lines[:1])}".strip() \
        if done.returncode else ""


def need(*programs: str) -> None:
    """Skip, naming what is missing or does not work here; with STRICT=1
    fail. `unshare` is for namespaces with mounts, which need root."""
    for program in programs:
        if not find(program):
            absent(f"{program} is missing: apt-get install "
                   f"{PARTS.get(program, program)} (make parts)")
        failure = program in TRIALS and trial_failure(program)
        if failure:
            absent(f"{program} does not work on this machine: {failure}")


def need_zone(name: str) -> None:
    """Skip if this machine's tzdata does not have this time zone."""
    if not any(os.path.isfile(os.path.join(folder, name)) for folder in
               load("koitab").ZONE_DIRECTORIES if folder != str(ZONES)):
        absent(f"time zone {name} is missing: apt-get install tzdata, for "
               "an old name tzdata-legacy (make parts)")


CAPABILITIES = {"CAP_SYS_PTRACE": 19}       # capabilities(7)


def need_capability(name: str) -> None:
    """Skip if root does not have this capability, as in a container."""
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("CapEff:")[2].split()[0], 16)
    if not held >> CAPABILITIES[name] & 1:
        absent(f"{name} is missing")


def absent(why: str) -> None:
    if STRICT:
        pytest.fail(why)
    pytest.skip(why)


def sample(values, *telling) -> list:
    """All values in the long form (make test-all); else every eighth, and
    those that are named."""
    values = list(values)
    assert all(value in values for value in telling), telling
    return [value for number, value in enumerate(values)
            if FULL or value in telling or number % 8 == 0]


def wait_until(question, seconds: float = 10, what: str = "it"):
    """Ask again until the answer is true; the answer. For other processes,
    whose events we cannot select on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.01)
    pytest.fail(f"waited {seconds} s for {what}")


class Result:
    """How a program ended: code, out, err (text)."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


# A built-in task runs in a child that mission starts as `sys.executable -Iu
# mission.py _builtin ...`: that, too, must come from the cache, and with the
# same patch. `text` is this text, and what a test adds to it.
def on_terminal(command: list[str], env: dict, stdin: str = "") -> str:
    """What a command prints on a terminal, both streams together."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE,
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    process.stdin.write(stdin.encode())
    process.stdin.close()
    found = b""
    with stopping(process):
        while True:
            try:
                data = os.read(ours, 65_536)
            except OSError:         # EIO: no process has it open any more
                break
            found += data
        os.close(ours)
        process.wait(60)
    return found.decode("utf-8", "backslashreplace")


BUILTIN_FROM_CACHE = f"""
start = k.Processes.start
def start_from_cache(self, argv, *rest, **options):
    if argv[3:4] == ["_builtin"]:
        assert argv[1] == "-Iu"
        argv = [argv[0], "-ISu", {str(ROOT / "tests/cached.py")!r},
                {str(CACHE)!r}, f"text = {{text!r}}\\nexec(text)", *argv[2:]]
    return start(self, argv, *rest, **options)
k.Processes.start = start_from_cache
"""
# The lock of a run is where no variable can move it; but hundreds of tests
# should not leave theirs on this machine.
LOCK_IN_STATE = """
assert k.lock_home
k.lock_home = k.state_home
"""
# For `Scratch.patch`: mission does not wait between its tries.
NO_PAUSES = """
assert k.Processes.pause
k.Processes.pause = lambda self, seconds: None
"""


class Scratch:
    """A home, directories for storages, and a configuration to run.

    `config` is a dict that tests change before they call `mission(...)`.
    """

    def __init__(self, folder: Path, user: str | None = None,
                 python: str = PYTHON):
        self.folder, self.python = Path(folder), python
        self.host = None            # a Host: runs in a mount namespace
        self.patches = [BUILTIN_FROM_CACHE, LOCK_IN_STATE]
        self.home = self.make("home")
        self.state = self.folder / "state"
        self.logs, self.tasks = self.make("logs"), self.make("tasks")
        self.path = self.folder / "mission.config.json"
        self.env = {"PATH": os.environ.get("PATH", os.defpath),
                    "HOME": str(self.home), "MISSION_STATE": str(self.state)}
        self.config = {
            "tasks": [],
            "user": {"name": user or some_user()},
            "storage": {"tasks": {"path": str(self.tasks)},
                        "logs": {"path": str(self.logs)}},
        }

    def make(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def storage(self, name: str, **options) -> Path:
        if options.get("commit"):
            need("git")
        path = self.make(name)
        self.config["storage"][name] = {"path": str(path), **options}
        return path

    def task(self, slug: str, script: str = "", **options) -> Path:
        """A task with its script (`#!/bin/sh` is put in front if missing)."""
        folder = self.tasks / slug
        folder.mkdir(exist_ok=True)
        script = textwrap.dedent(script).lstrip("\n")
        if not script.startswith("#!"):
            script = "#!/bin/sh\n" + script
        run = folder / "run"
        run.write_text(script)
        run.chmod(0o755)
        self.entry(slug, "exec", **options)
        return run

    def builtin(self, slug: str, python: str = "", **options) -> None:
        if python:
            folder = self.tasks / slug
            folder.mkdir(exist_ok=True)
            (folder / "task.py").write_text(textwrap.dedent(python))
        self.entry(slug, "builtin", **options)

    def entry(self, slug: str, kind: str, **options) -> None:
        options.setdefault("name", slug.capitalize())
        options.setdefault("scheduled", True)
        self.config["tasks"].append({"slug": slug, "type": kind, **options})

    def stand_in(self, name: str, script: str) -> Path:
        """A program of this name, first in PATH."""
        path = self.make("bin") / name
        path.write_text("#!/bin/sh\n" + textwrap.dedent(script) + "\n")
        path.chmod(0o755)
        found = self.env["PATH"].split(os.pathsep)
        if str(path.parent) not in found:
            self.env["PATH"] = os.pathsep.join([str(path.parent), *found])
        return path

    def open_to_others(self) -> None:
        """Let other users pass through the directories of the test."""
        for place in (self.folder, *self.folder.parents):
            if place.stat().st_uid == os.geteuid() and str(place) != "/":
                place.chmod(place.stat().st_mode | 0o011)

    def fake_pass(self, script: str) -> None:
        """A passBin, which the user that mission runs it as can reach."""
        self.open_to_others()
        self.config["passBin"] = str(self.stand_in("fake-pass", script))

    def keep_mail(self, **options) -> Path:
        """Mail is on, and a sendmail puts each message into this directory."""
        mails = self.make("mails")
        self.stand_in("sendmail", f"exec cat > '{mails}'/$$.eml")
        self.config["user"]["email"] = "alice@example.com"
        self.config["mail"] = {"enabled": True, "type": "sendmail",
                               **options}
        return mails

    def patch(self, text: str = "", **limits: float) -> None:
        """Change mission in each start from now on, its built-in tasks too:
        limits by the names of its constants, or `text`, executed with the
        module as `k`."""
        for name, value in limits.items():
            self.patches.append(f"assert k.{name} > 0\nk.{name} = {value!r}")
        self.patches.append(textwrap.dedent(text))

    def write(self) -> None:
        text = json.dumps(self.config, indent=4)
        # A mission that was just started may be reading it.
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            self.path.write_text(text)
        self.path.chmod(0o600)

    def command(self, *args: str) -> list[str]:
        text = "\n".join(self.patches)
        patch = f"text = {text!r}\nexec(text)"
        command = [*program("mission", self.python, patch), "-c",
                   str(self.path), *args]
        return self.host.command(command) if self.host else command

    def mission(self, *args: str, timeout: float = 60, write: bool = True,
                **options) -> Result:
        """Run mission with the configuration; wait for its end."""
        if write:
            self.write()
        done = subprocess.run(
            self.command(*args), env=self.env, cwd=str(self.folder),
            stdin=subprocess.DEVNULL, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"),
                      done.stderr.decode("utf-8", "replace"))

    def headless(self, *args: str, **options) -> Result:
        return self.mission("run", "--headless", *args, **options)

    def start(self, *args: str, **options) -> subprocess.Popen:
        """Start mission and do not wait (end it with `ended`)."""
        self.write()
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen(
            self.command(*args), env=self.env, cwd=str(self.folder),
            stdin=subprocess.DEVNULL, **options)

    def log_files(self) -> list[Path]:
        return sorted(self.logs.glob("*.txt"), key=lambda p: p.stat().st_mtime)

    def log(self) -> str:
        """The newest headless log."""
        return self.log_files()[-1].read_text()

    def history(self) -> list[dict]:
        files = sorted(self.state.glob("*/history.jsonl"))
        return [json.loads(line) for file in files
                for line in file.read_text().splitlines()]

    def outcomes(self) -> dict[str, str]:
        """Of each task of the last run: ok, failed or skipped."""
        return {task["slug"]: task["outcome"]
                for task in self.history()[-1]["tasks"]}

    def outbox(self) -> list[Path]:
        return sorted(self.state.glob("*/outbox/*.eml"))


UNFINISHED = ("running", "queued")      # states of a run
# The log of a run: headers of three lines, and lines with an elapsed column,
# which is Go's duration cut to milliseconds, as in the original.
LOG_RULE = "# " + "\u2014" * 47
LOG_HEADER = re.compile(f"^{LOG_RULE}\n# (.*)\n{LOG_RULE}\n\n", re.M)
LOG_LINE = re.compile(r"^\[((?:\d+h)?(?:\d+m)?\d+(?:\.\d+)?m?s) *\] ?(.*)$")


def log_titles(log: str) -> list[str]:
    return LOG_HEADER.findall(log)


def log_section(log: str, title: str) -> str:
    """The text below a header, up to the next one."""
    parts = LOG_HEADER.split(log)
    return parts[parts.index(title) + 1]


def log_texts(log: str) -> list[str]:
    """The lines without their elapsed column. Other controls than a newline
    are left in them."""
    return [found[2] for line in log.split("\n")
            for found in [LOG_LINE.match(line)] if found]


# --- access control lists ---------------------------------------------------

# Tags of an entry, from acl(5) and linux/posix_acl.h.
ACL_OWNER, ACL_USER, ACL_OWNING_GROUP, ACL_GROUP, ACL_MASK, ACL_OTHER = (
    0x01, 0x02, 0x04, 0x08, 0x10, 0x20)
ACL_NOBODY = 0xffffffff     # the id of an entry without a user


def acl(*entries: tuple, mask: int = 7) -> bytes:
    """A list as the kernel keeps it: `entries` (tag, permissions, id), and
    those of the mode."""
    found = sorted([(ACL_OWNER, 6, ACL_NOBODY),
                    (ACL_OWNING_GROUP, 4, ACL_NOBODY),
                    (ACL_OTHER, 4, ACL_NOBODY), (ACL_MASK, mask, ACL_NOBODY),
                    *entries])
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry) for entry in found)


def set_acl(path: Path, *entries: tuple, kind: str = "access",
            **options) -> None:
    """Give a file a list. A directory stays one that all can enter."""
    before = os.lstat(path).st_mode
    try:
        os.setxattr(path, f"system.posix_acl_{kind}", acl(*entries, **options))
    except OSError as error:
        absent(f"no access control lists in {path}: {error}")
    if kind == "access":
        os.chmod(path, os.lstat(path).st_mode | before & 0o111)


# --- git of the tests' own, never through mission ---------------------------

GIT_IDENTITY = {f"GIT_{role}_{what}": value
                for role in ("AUTHOR", "COMMITTER")
                for what, value in (("NAME", "Test"),
                                    ("EMAIL", "t@localhost"))}


def git(folder, *args: str, uid: int | None = None, host=None,
        **env: str) -> Result:
    """git in a directory, as the user `uid`, or in the namespace of `host`."""
    need("git")
    become = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    command = ["git", "-C", str(folder), *args]
    done = subprocess.run(
        host.command(command) if host else command, timeout=60, **become,
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": "/",
             "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C", **GIT_IDENTITY,
             **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    return Result(done.returncode,
                  done.stdout.decode("utf-8", "surrogateescape"),
                  done.stderr.decode("utf-8", "replace"))


def must_git(folder, *args: str, **options) -> str:
    """What git printed. It must have succeeded."""
    done = git(folder, *args, **options)
    assert done.code == 0, (args, done)
    return done.out.strip()


def init_repository(folder, **options) -> Path:
    need("git")
    must_git(folder, "init", "-q", **options)
    must_git(folder, "symbolic-ref", "HEAD", "refs/heads/main", **options)
    return Path(folder)


def make_repository(folder: Path, uid: int | None = None, file: str = "file",
                    text: str = "first\n") -> Path:
    """A repository of the user's with one file in its first commit. git
    makes it once; the others are copies."""
    need("git")
    made = SCRATCH / f"repository-{os.getpid()}-{file}"
    if not made.exists():
        made.mkdir()
        (made / file).write_text(text)
        init_repository(made)
        for sample in (made / ".git/hooks").glob("*.sample"):
            sample.unlink()
        must_git(made, "add", "-A")
        must_git(made, "commit", "-q", "-m", "first")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    if uid:
        own(folder, uid)
    return folder


def is_committed(folder, **options) -> bool:
    """Is everything committed, and the repository sound?"""
    status = git(folder, "status", "--porcelain", **options)
    check = git(folder, "fsck", "--full", "--strict", **options)
    return status.code == check.code == 0 and not status.out \
        and not re.search("error|missing", check.out + check.err)


def count_commits(folder, **options) -> int:
    return int(must_git(folder, "rev-list", "--count", "HEAD", **options))


def commit_subjects(folder) -> list[str]:
    """Those of a repository's commits, newest first; none without a commit.
    """
    return git(folder, "log", "--format=%s").out.splitlines()


class Koi:
    """The test's own koid: a home, tabs, and what koitab says.

    `host` is a Host with more users, for a koid that root runs for them.
    `patch` changes the program: see program().
    """

    def __init__(self, folder: Path, host: "Host | None" = None,
                 python: str = SHARED_PYTHON):
        self.folder, self.host, self.python = Path(folder), host, python
        self.home = self.folder / "koi"
        self.env = {"PATH": os.environ.get("PATH", os.defpath),
                    "HOME": str(self.folder), "KOI_HOME": str(self.home)}
        self.daemon: subprocess.Popen | None = None
        self.said = self.folder / "koid.log"
        self.installed = False      # started as root's is, by its first lines
        self.patch = ""
        for path in (self.home, self.home / "tabs"):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)

    @property
    def user(self) -> str:
        return pwd.getpwuid(os.geteuid()).pw_name

    def tab(self, text: str, user: str | None = None) -> Path:
        """Install a tab as koitab does: whole, by rename."""
        path = self.home / "tabs" / (user or self.user)
        fresh = path.with_suffix(".new")
        fresh.write_text(textwrap.dedent(text))
        fresh.chmod(0o600)
        fresh.rename(path)
        return path

    def command(self, *args: str) -> list[str]:
        start = [str(ROOT / "koitab.py")] if self.installed else program(
            "koitab", self.python, self.patch)
        return [*start, *args]

    def set_constants(self, **values) -> "Koi":
        """Change constants of koitab's, so that a test need not wait."""
        for name, value in values.items():
            assert hasattr(load("koitab"), name), name
            self.patch += f"k.{name} = {value!r}\n"
        return self

    def spawn(self, *args: str, wrap: tuple = (), **env: str
              ) -> subprocess.Popen:
        """Start koid, below `wrap`, and do not wait for it."""
        command = [*wrap, *self.command("daemon", *args)]
        command = self.host.command(command) if self.host else command
        with open(self.said, "ab") as log:
            self.daemon = subprocess.Popen(
                command, env={**self.env, **env}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, cwd=str(self.folder))
        return self.daemon

    def start(self, *args: str, wrap: tuple = (), **env: str) -> "Koi":
        """Start koid and wait until it answers."""
        self.spawn(*args, wrap=wrap, **env)
        wait_until(self.answers, 30, f"koid to answer\n{self.log()}")
        return self

    def answers(self) -> bool:
        if self.daemon.poll() is not None:
            pytest.fail(f"koid ended: {self.log()}")
        try:
            self.ask("status")
        except load("koitab").Error:
            return False
        return True

    def log(self) -> str:
        return self.said.read_text() if self.said.exists() else ""

    @contextlib.contextmanager
    def link(self):
        """A Link of koitab's to this koid."""
        before = os.environ.get("KOI_HOME")
        os.environ["KOI_HOME"] = str(self.home)
        try:
            yield load("koitab").DaemonClient(load("koitab").Machine())
        finally:
            os.environ.pop("KOI_HOME")
            if before is not None:
                os.environ["KOI_HOME"] = before

    def ask(self, op: str, **fields) -> dict:
        """A reply of koid's (or of the files). Raises koitab.Error."""
        with self.link() as link:
            reply = link.ask(op, **fields)
            self.output = reply.pop("output", b"")
            return reply

    def run(self, job: str, user: str = "", **args: str
            ) -> tuple[int, bytes, bytes, dict]:
        """Run a job and wait: its number, stdout, stderr, how it ended."""
        koitab = load("koitab")
        with self.link() as link:
            run, connection, data = link.attach(job, args, user)
        with connection:
            connection.settimeout(60)
            chunks = [data]
            while chunks[-1] or len(chunks) == 1:
                chunks.append(connection.recv(65_536))
        data = b"".join(chunks)
        streams: dict[int, list] = {0: [], 1: [], 2: [], 3: []}
        for stream, _, part in koitab.read_frames(data):
            streams[stream].append(part)
        return (run, b"".join(streams[1]), b"".join(streams[2]),
                json.loads(b"".join(streams[3]) or b"{}"))

    def follow(self, job: str, **args: str) -> tuple:
        """Start a job: its run, and a connection that its output comes
        from, as frames."""
        with self.link() as link:
            run, connection, rest = link.attach(job, args)
        connection.settimeout(60)
        return run, connection, rest

    def launch(self, job: str, **args: str) -> int:
        """Start a job and do not wait for it: its run."""
        run, connection, _ = self.follow(job, **args)
        connection.close()
        return run

    def history(self, **fields) -> list[dict]:
        return self.ask("history", **fields)["runs"]

    def row(self, run: int) -> dict:
        return next(row for row in self.history(limit=1000)
                    if row["run"] == run)

    def end_of(self, run: int, seconds: float = 30) -> dict:
        """The row of a run, when it has ended."""
        def done():
            row = self.row(run)
            return row if row["state"] not in UNFINISHED else None
        return wait_until(done, seconds, f"run {run} to end\n{self.log()}")

    def unfinished(self) -> list[dict]:
        return [run for run in self.history(limit=1000)
                if run["state"] in UNFINISHED]

    def header(self, run: int):
        """The header of a run's file; None while there is none."""
        with contextlib.suppress(FileNotFoundError):
            return load("koitab").parse_header(
                (self.home / "runs" / str(run)).read_bytes())
        return None

    def running(self, run: int):
        """The header of a run, once its job has been started."""
        def begun():
            header = self.header(run)
            return header if header and header.phase == load(
                "koitab").RUNNING else None
        return wait_until(begun, 30, f"run {run} to begin\n{self.log()}")

    def problems(self) -> str:
        return "\n".join(self.ask("status")["problems"])

    def names(self) -> list[str]:
        return [job["name"] for job in self.ask("jobs")["jobs"]]

    def meta(self, **values: str | None) -> dict:
        """What a koid that has ended has noted for the next one, changed:
        None removes a note."""
        with contextlib.closing(
                sqlite3.connect(self.home / "history.db")) as db, db:
            for name, value in values.items():
                db.execute("delete from meta where name = ?", (name,))
                if value is not None:
                    db.execute("insert into meta values (?, ?)",
                               (name, value))
            return dict(db.execute("select name, value from meta"))

    def ended(self, job: str | None = None, count: int = 1,
              seconds: float = 30, **fields) -> list[dict]:
        """Return the newest runs of a job, once `count` have ended."""
        def done():
            runs = [run for run in self.history(
                **({"job": job} if job else {}), **fields)
                if run["state"] not in UNFINISHED]
            return runs if len(runs) >= count else None
        return wait_until(done, seconds, f"{count} runs of {job} to end\n"
                          f"{self.log()}")

    def text_of(self, run: int) -> str:
        """What a run wrote, both streams."""
        self.ask("log", run=run)
        return load("koitab").output_text(self.output).decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End koid by its pid; its exit status."""
        if self.daemon and self.daemon.poll() is None:
            self.daemon.send_signal(number)
            self.daemon.wait(30)
        return self.daemon.returncode if self.daemon else 0

    def end_jobs(self) -> None:
        """End what the test's jobs left: by the pids in the runs' files."""
        koitab = load("koitab")
        for file in (self.home / "runs").glob("*"):
            header = self.header(file.name)
            if header and header.phase == koitab.RUNNING:
                koitab.Machine().signal_job(header, signal.SIGKILL)


def some_user() -> str:
    """A user mission may name: the caller, or for root an account that
    every system has."""
    if AS_ROOT:
        return "daemon"
    return pwd.getpwuid(os.getuid()).pw_name


def system_accounts(file: str) -> str:
    """The lines of a passwd or group file without those of people, who may
    have the names or ids of the tests' users."""
    return "".join(
        line for line in Path(file).read_text().splitlines(keepends=True)
        if line.count(":") < 2 or not 1000 <= int(
            line.split(":")[2] or 0) < 60_000)


class Host:
    """A mount namespace of the test's own, with the users alice and mallory,
    homes for them, and anything bound over. Invisible outside; root only."""

    def __init__(self, folder: Path):
        need("unshare")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.binds: list[tuple[str, str]] = []
        self.setup: list[str] = []      # more shell lines, run as root
        self.home = {}
        passwd, group = map(system_accounts, ("/etc/passwd", "/etc/group"))
        for name, uid in ((ALICE, ALICE_UID), (MALLORY, MALLORY_UID)):
            home = self.folder / "home" / name
            home.mkdir(parents=True, exist_ok=True)
            home.chmod(0o755)
            os.chown(home, uid, uid)
            self.home[name] = home
            passwd += f"{name}:x:{uid}:{uid}:{name}:{home}:/bin/sh\n"
            group += f"{name}:x:{uid}:\n"
        for name, text in (("passwd", passwd), ("group", group)):
            (self.folder / name).write_text(text)
            self.bind(self.folder / name, f"/etc/{name}")

    def bind(self, source, target) -> None:
        """A mount needs its mount point: skip where that is missing."""
        if str(target).startswith(("/etc/", "/usr/")) \
                and not os.path.exists(target):
            absent(f"{target} is missing")
        self.binds.append((str(source), str(target)))

    def command(self, command: list[str]) -> list[str]:
        lines = [f"mount --bind '{source}' '{target}'"
                 for source, target in self.binds] + self.setup
        script = " && ".join(lines + ['exec "$@"'])
        return ["unshare", "-m", "sh", "-c", script, "sh", *command]

    def run(self, command: list[str], user: str | None = None,
            **options) -> Result:
        if user:
            uid = {ALICE: ALICE_UID, MALLORY: MALLORY_UID}[user]
            command = ["setpriv", "--reuid", str(uid), "--regid", str(uid),
                       "--clear-groups", *command]
        options.setdefault("timeout", 60)
        done = subprocess.run(self.command(command), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              **options)
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"),
                      done.stderr.decode("utf-8", "replace"))


def process_state(pid: int) -> str:
    """As ps shows it: R, S, T; "" when the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0].replace("Z", "")


def is_alive(pid: int) -> bool:
    return process_state(pid) != ""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process of the test's that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children_of(pid: int) -> list[int]:
    try:
        return list(map(int, Path(
            f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def megabytes_of(pid: int) -> float:
    """The memory that a process has in use."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor_seconds(pid: int) -> float:
    """For how long a process has run: exactly, where the kernel has
    schedstat; else in hundredths."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(
            ")")[2].split()
        return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(pid: int, seconds: float = 0.1) -> None:
    """Wait until a process does nothing for so long: one that spins never
    does."""
    def idle() -> bool:
        before = processor_seconds(pid)
        time.sleep(seconds)     # the length is what is tested
        return processor_seconds(pid) == before
    wait_until(idle, 20, f"process {pid} to be idle")


def own(path, uid: int) -> None:
    """Give a tree to a user (test set-up only: not safe against races)."""
    path = Path(path)
    os.chown(path, uid, uid, follow_symlinks=False)
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            own(entry, uid)


def owner(path) -> int:
    return os.lstat(path).st_uid


def mode(path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def ended(process: subprocess.Popen, seconds: float = 30) -> Result:
    """Wait for a started process; kill it (ours alone) if it will not end."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        pytest.fail(f"still running after {seconds} s")
    return Result(process.returncode, (out or b"").decode("utf-8", "replace"),
                  (err or b"").decode("utf-8", "replace"))


@contextlib.contextmanager
def stopping(process: subprocess.Popen):
    """A helper process of a test, ended by its pid at the end."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()

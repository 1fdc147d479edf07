"""What users and other programs see, compared with the files in golden/.

A scenario runs the programs for real and writes down what they print, mail,
post and answer, with their exit statuses. What differs from run to run is
replaced by a placeholder (PLACEHOLDERS). After a wanted change:

    GOLDEN=accept make test

rewrites the files; `git diff tests/golden` then shows the change.
"""

from __future__ import annotations

import contextlib
import difflib
import email
import email.policy
import http.client
import http.server
import json
import os
import re
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

import support
from dashboard_rig import (HOST, HOST_TOKEN, OPERATOR_TOKEN, VIEWER_TOKEN,
                           DashboardProcess, encode_request, frames, piece,
                           sync_payload)
from servers import Service, Web, certificate

GOLDEN = Path(__file__).resolve().parent / "golden"
ACCEPT = os.environ.get("GOLDEN") == "accept"

# The dashboard's clock is stopped at 2005-03-18T01:58:31Z, so that its
# answers need no placeholder. A date in the past is never "now" (is_now).
NOW = 1_111_111_111
AROUND_NOW = 2 * 86_400         # seconds


# ==========================================================================
# Placeholders
# ==========================================================================


def is_now(seconds: float) -> bool:
    return abs(time.time() - seconds) < AROUND_NOW


def stamp_or_now(match) -> str:
    """A date of today is different in the next run; others are tested."""
    text = match[0].replace("Z", "+00:00").replace(" ", "T")
    stamp = datetime.fromisoformat(re.sub(r"\.\d+", "", text))
    return "<time>" if is_now(stamp.timestamp()) else match[0]


def number_or_now(match) -> str:
    number = float(match[0])
    return "<seconds>" if is_now(number) else "<ms>" if is_now(
        number / 1000) else match[0]


# Applied in this order, after the paths and ports of the scenario.
PLACEHOLDERS: list[tuple[str, str | Callable]] = [
    # What mission adds for anyone but root.
    (r"( recorded for \S+) by this user", r"\1"),
    # Dates in RFC 3339, and seconds and milliseconds since 1970.
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?",
     stamp_or_now),
    (r"\b\d{10,13}(\.\d+)?\b", number_or_now),
    # The date of a mail (RFC 5322), and of the name of a log.
    (r"(?m)^(! |\| |  )Date: .*", r"\1Date: <date>"),
    (r"\b\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d(-2)?\.txt\b",
     "<time>.txt"),
    # How long something took: mission's column of times, its sentences, the
    # columns of both histories, bars, JSON, metrics.
    (r"(?m)^(\| |  )\[[0-9hms.]+ *\] ", r"\1[<took>] "),
    (r"(TaskFinish .* in|run finished in|, since <time>) \(?[0-9hms.]+\)?",
     r"\1 <took>"),
    (r"(?m)^(\| [0-9a-f]{8}  <time>) +[0-9hms.]+  ", r"\1  <took>  "),
    (r"(?m)^(\| +\d+  <time>  .*?  manual  ) +[0-9hms.]+  ", r"\1<took>  "),
    (r"[▁▂▃▄▅▆▇█]", "▇"),
    (r"(?m)▇  [0-9hms.]+$", "▇  <took>"),
    (r'"(seconds|ms)": \d+(\.\d+)?', r'"\1": <took>'),
    (r"(mission_\w+_duration_seconds(\{.*\})?) \d+(\.\d+)?", r"\1 <took>"),
    # The number of commits of a dashboard, and of its connections.
    (r'("seq": )\d+', r"\1<seq>"),
    (r'("change": )\d+', r"\1<change>"),
    (r"(?m)(koi_web_connections) \d+$", r"\1 <number>"),
    # Identifiers that are made at random, some cut to 8 digits.
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b",
     "<uuid>"),
    (r"(?m)(^\| |\brun )[0-9a-f]{8}(?=  <time>| of <time>)", r"\1<id>"),
    (r"\b[0-9a-f]{64}\b", "<64 hex>"),
    (r"\b[0-9a-f]{32}\b", "<32 hex>"),
    (r"\b[0-9a-f]{16}\b", "<16 hex>"),
    (r'("Key": )"[0-9a-f]{12}"', r'\1"<encrypted>"'),
    (r'(\\"Key\\": )\\"[0-9a-f]{12}\\"', r'\1\\"<encrypted>\\"'),
    (r'("epoch": )\d{6,}', r"\1<epoch>"),
    (r"<ms>-[0-9a-f]{8}", "<ms>-<8 hex>"),
    (r'("data": )"[A-Za-z0-9+/=]+"', r'\1"<base64>"'),
    (r'\b(pid"?:?) \d+\b', r"\1 <pid>"),
    (r"127\.0\.0\.1:(?!8077\b)\d{4,5}\b", "127.0.0.1:<port>"),
    # A commit of mission's, and who runs it.
    (r"\] [0-9a-f]{7,12} (?=manual run)", "] <commit> "),
    (r"mission <(root|op)@", "mission <USER@"),
    # What Python adds to a traceback: frames of mission's, and carets.
    (r'(?m)^.*  File "CHECKOUT/mission\.py", line \d+.*\n.*\n', ""),
    (r"(?m)^.*\] +[~^]+\n", ""),
    # A cron that runs on this machine.
    (r"(?m)^.*cron is running \(pid <pid>\).*\n", ""),
]


# ==========================================================================
# Scenarios
# ==========================================================================

# Patches of the programs: the user is called op and lives in $HOME, and the
# machine is called web1, wherever the test runs.
PERSON = """
import os, pwd, types
uid = os.getuid(){or_another}
me = types.SimpleNamespace(
    pw_name="op", pw_passwd="x", pw_uid=uid, pw_gid=uid or os.getgid(),
    pw_gecos="", pw_dir=os.environ["HOME"], pw_shell="/bin/sh")
by_uid, by_name = pwd.getpwuid, pwd.getpwnam
pwd.getpwuid = lambda number: me if number == uid else by_uid(number)
pwd.getpwnam = lambda name: me if name == "op" else by_name(name)
os.uname = lambda: os.uname_result(("Linux", "web1", "6.1", "#1", "x86_64"))
"""
# mission wants an unprivileged user, also when root runs it.
NOBODY = 65534
MISSION = PERSON.format(or_another=f" or {NOBODY}") + \
    'k.HOST = "web1"\nk.lock_home = k.state_home\n'
KOITAB = PERSON.format(or_another="") + """
k.SENDMAILS = (os.environ["HOME"].replace("/home", "/bin/sendmail"),)
"""
# A passphrase costs 0.3 s of hashing, on purpose.
QUICK = """
import hashlib
slow = hashlib.pbkdf2_hmac
hashlib.pbkdf2_hmac = lambda *how: slow(*how[:3], 1)
"""
# Executed first: serves commands from a process that has loaded the program
# once. Each command is its own process, forked here, which continues with
# the other patches and `main`. Loading anew takes 20 times as long.
FORK = """
import os
orders = os.fdopen(os.dup(0), "rb", buffering=0)
for line in orders:
    child = os.fork()
    if not child:
        break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, b"%d\\n" % status)
else:
    os._exit(0)
orders.close()
order = eval(line)
os.environ.clear()
os.environ.update(order["env"])
os.chdir(order["cwd"])
for number, (path, flags) in enumerate(order["files"]):
    file = os.open(path, flags)
    os.dup2(file, number)
    os.close(file)
sys.argv[:] = order["argv"]
"""
DASHBOARD = """
import os, time
os.environ["TZ"] = "UTC"
time.tzset()
os.uname = lambda: os.uname_result(("Linux", "web1", "6.1", "#1", "x86_64"))
"""
FROZEN = f"import time; time.time = lambda: {NOW}.0\n"

SENDMAIL = """\
#!/bin/sh
# Keeps each mail: the arguments, then the message.
mail=$(mktemp {folder}/mail/.XXXXXX)
{{ echo "sendmail $*"; cat; }} >"$mail"
mv "$mail" "{folder}/mail/$(basename "$mail" | tr -d .)"
"""

SCENARIOS: dict[str, Callable] = {}
ROOT_ONLY: set[str] = set()


def scenario(function: Callable) -> Callable:
    """Mark a function as a scenario; its name is that of the golden file."""
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


def roots_scenario(function: Callable) -> Callable:
    ROOT_ONLY.add(function.__name__.replace("_", "-"))
    return scenario(function)


class Server:
    """A program that runs one command after the other (see FORK)."""

    def __init__(self, name: str, python: str, patch: str):
        self.name = name
        self.process = subprocess.Popen(
            support.program(name, python, QUICK + FORK + patch), bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"TZ": "UTC", "LC_ALL": "C.UTF-8"})

    def run(self, args: list[str], folder: Path, env: dict[str, str],
            said: str, called: str = "") -> support.Result:
        files = [folder / f".{name}" for name in ("in", "out", "err")]
        files[0].write_text(said)
        order = {"argv": [called or self.name, *args], "env": env,
                 "cwd": str(folder), "files": [
                     (str(files[0]), os.O_RDONLY), *(
                         (str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                         for path in files[1:])]}
        self.process.stdin.write(repr(order).encode() + b"\n")
        if not select.select([self.process.stdout], [], [], 60)[0]:
            pytest.fail(f"{self.name} {args}: still running after 60 s")
        status = int(self.process.stdout.readline())
        out, err = (path.read_bytes().decode("utf-8", "backslashreplace")
                    for path in files[1:])
        for path in files:
            path.unlink()
        return support.Result(status, out, err)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def servers():
    with contextlib.ExitStack() as exits:
        found = {
            "mission": Server("mission", support.PYTHON, MISSION),
            "koitab": Server("koitab", support.SHARED_PYTHON, KOITAB)}
        for server in found.values():
            exits.callback(server.close)
        yield found


class Daemon(support.Koi):
    """A koid that takes its user for op, and this machine for web1."""

    def __init__(self, stage: Stage):
        super().__init__(stage.folder)
        self.env = stage.env

    def command(self, *args: str) -> list[str]:
        return [*support.program("koitab", self.python, KOITAB), *args]


class Stage:
    """Runs the programs of one scenario, and writes down what they say."""

    def __init__(self, folder: Path, servers: dict[str, Server],
                 exits: contextlib.ExitStack):
        self.folder, self.servers, self.exits = folder, servers, exits
        self.text: list[str] = []
        for name in ("bin", "mail", "home"):
            (folder / name).mkdir()
        self.env = {
            "PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": f"{folder}/home", "KOI_HOME": f"{folder}/koi",
            "MISSION_STATE": f"{folder}/state", "TZ": "UTC",
            "LC_ALL": "C.UTF-8"}
        self.before: list[str] = []     # setpriv, for another user
        self.known: list[tuple[str, str]] = []  # text, its placeholder
        self.know(str(folder), "DIR")
        self.know(str(support.ROOT), "CHECKOUT")
        self.know(support.PYTHON, "PYTHON")
        self.know(support.SHARED_PYTHON, "PYTHON")

    def know(self, text: str, placeholder: str) -> None:
        self.known.append((text, placeholder))

    def become_user(self) -> None:
        """Run the programs as an ordinary user, also when root tests."""
        if support.AS_ROOT:
            support.need("setpriv")
            self.before = ["setpriv", "--reuid", str(NOBODY), "--regid",
                           str(NOBODY), "--clear-groups"]
            support.own(self.folder, NOBODY)
            for folder in (self.folder.parent, self.folder.parent.parent):
                folder.chmod(folder.stat().st_mode | 0o011)

    def program(self, name: str, script: str) -> None:
        """The scenario's own program, found first in PATH."""
        path = self.folder / "bin" / name
        path.write_text(script)
        path.chmod(0o755)

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
        return path

    # --- what is written down

    def note(self, text: str) -> None:
        """A headline."""
        self.text.append(f"\n# {text}\n")

    def show(self, text: str, mark: str = "  ") -> None:
        """Lines, each behind a mark; a missing last newline shows."""
        for line in text.splitlines(keepends=True):
            self.text.append(f"{mark}{line}")
            if not line.endswith("\n"):
                self.text.append(" <no newline>\n")

    def show_json(self, value) -> None:
        self.show(json.dumps(value, indent=2, ensure_ascii=False,
                             sort_keys=True) + "\n")

    # --- what is run

    def ended(self, result: support.Result, shown: str) -> support.Result:
        self.text.append(f"\n$ {shown}\n")
        self.show(result.out, "| ")
        self.show(result.err, "! ")
        self.text.append(f"exit {result.code}\n")
        return result

    def command(self, name: str, *args: str) -> list[str]:
        """A command that is started without a Server."""
        python, patch = (support.PYTHON, MISSION) if name == "mission" \
            else (support.SHARED_PYTHON, KOITAB)
        return [*self.before, *support.program(name, python, patch), *args]

    def run(self, name: str, *args: str, said: str = "", called: str = "",
            env: dict | None = None) -> support.Result:
        env = {**self.env, **(env or {})}
        if self.before:
            done = subprocess.run(
                self.command(name, *args), env=env, cwd=str(self.folder),
                timeout=60, input=said.encode(), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE)
            result = support.Result(
                done.returncode, done.stdout.decode(), done.stderr.decode())
        else:
            result = self.servers[name].run(list(args), self.folder, env,
                                            said, called)
        return self.ended(result, shlex.join([called or name, *args]))

    def mission(self, *args: str, **how) -> support.Result:
        return self.run("mission", *args, **how)

    def koitab(self, *args: str, **how) -> support.Result:
        return self.run("koitab", *args, **how)

    def start(self, name: str, *args: str) -> subprocess.Popen:
        """Start a program; `finish` writes down how it ends."""
        return self.exits.enter_context(support.stopping(subprocess.Popen(
            self.command(name, *args), env=self.env, cwd=str(self.folder),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)))

    def finish(self, process: subprocess.Popen, shown: str) -> None:
        self.ended(support.ended(process), shown)

    def daemon(self) -> Daemon:
        koi = Daemon(self)

        def end() -> None:
            koi.stop(signal.SIGKILL)
            koi.end_jobs()

        self.exits.callback(end)
        return koi.start()

    def dashboard(self, patch: str = "") -> DashboardProcess:
        """A dashboard in UTC, on a machine that is called web1."""
        return DashboardProcess(
            self.folder, rounds="", patch=patch + DASHBOARD
            + f"k.SENDMAILS = ('{self.folder}/bin/sendmail',)")

    def typed_secret(self, said: str) -> str:
        """The passphrase that was printed; from here on a placeholder."""
        secret = re.search(r"^passphrase +(\S+)$", said, re.M)[1]
        self.know(secret, "<passphrase>")
        return secret

    def mails(self, count: int, in_order: bool = True) -> None:
        """Record the mails given to sendmail, once there are `count`."""
        folder = self.folder / "mail"
        found = support.wait_until(
            lambda: len(list(folder.glob("[!.]*"))) >= count and sorted(
                folder.glob("[!.]*"), key=lambda path:
                path.stat().st_mtime_ns if in_order else path.read_bytes()),
            20, f"{count} mails")
        for path in found:
            self.note("mail")
            self.show_mail(path.read_bytes())
            path.unlink()

    def show_mail(self, data: bytes) -> None:
        """The arguments of sendmail, the headers, and the body decoded, for
        where quoted-printable breaks a line depends on what is replaced."""
        args, _, mail = data.partition(b"\n")
        message = email.message_from_bytes(mail, policy=email.policy.default)
        self.show(args.decode() + "\n")
        for name, value in message.raw_items():
            self.show(f"{name}: {value}\n")
        self.show("\n" + message.get_content())

    def golden(self) -> str:
        """What was written down, with placeholders."""
        text = "".join(self.text).lstrip("\n")
        for known, placeholder in sorted(
                self.known, key=lambda pair: -len(pair[0])):
            text = text.replace(known, placeholder)
        for pattern, replacement in PLACEHOLDERS:
            text = re.sub(pattern, replacement, text)
        return text


# ==========================================================================
# mission
# ==========================================================================

BAD_CONFIG = """\
{
    // Nearly every line of this file is wrong.
    "tasks": [
        { "slug": "mail", "type": "exce", "scheduled": "yes" },
        { "slug": "Mail Box", "type": "exec" },
        { "slug": "mail", "type": "exec", "timout": "1h" },
        { "slug": "photos", "type": "exec", "timeout": "soon", "retries": -1 },
        { "slug": "offsite", "type": "exec", "needs": ["fotos", "offsite"] },
        { "type": "builtin", "nice": 40, "minFree": { "moon": "5X" } },
    ],
    "user": { "name": "no-such-user", "email": "not an address" },
    "storage": {
        "tasks": { "path": "missing/tasks" },
        "logs": { "path": 7 },
        "Logs": { "path": "elsewhere", "chwon": true },
    },
    "ping": { "enabled": true, "endpoint": "ftp://example.com", "retries": 0 },
    "mail": { "enabled": true, "type": "pigeon", "on": "sometimes" },
    "filters": ["(", 3],
    "logs": { "keep": "many", "max": "1Z" },
    "trust": "everybody",
    "unknown": null
}
"""


class MissionStage(Stage):
    """A configuration with tasks, which `support.Scratch` writes."""

    def __init__(self, stage: Stage):
        vars(self).update(vars(stage))
        self.scratch = support.Scratch(self.folder, user="op")
        self.config = self.scratch.config

    def mission(self, *args: str, **how) -> support.Result:
        self.scratch.write()
        return super().mission(*args, **how)

    def tasks(self) -> None:
        """Tasks with every kind of end."""
        task = self.scratch.task
        task("good", "echo copied 3 files; echo to stderr >&2")
        task("secret", "echo token=abc123; echo 'sending incremental file "
             "list'; printf 'bold \\033[1m and no newline'", name="Secrets")
        task("bad", "echo broken; exit 3", retries=1)
        task("after-bad", "echo never", needs=["bad"])
        task("slow", "exec sleep 60", timeout="100ms")
        task("killed", "kill -9 $$")
        self.scratch.builtin("python", """
            def run(args, log):
                log("from Python")
                raise RuntimeError("no such cloud")
            """)
        task("manual", "echo by hand", scheduled=False)
        task("last", "echo afterwards", post=True)
        self.config["filters"] = ["^sending incremental file list$"]
        self.config["redact"] = ["token=[^ ]+"]


MISSION_COMMANDS = ["init", "run", "list", "check", "dump", "history",
                    "status", "log", "new", "unit", "completion"]


@scenario
def mission_help(stage: Stage) -> None:
    whole = stage.mission("--help").out
    stage.mission("--version")
    show_help(stage, "mission", [
        ["-h"], *([name, "--help"] for name in MISSION_COMMANDS)], whole)


def show_help(stage: Stage, name: str, commands: list[list[str]],
              whole: str) -> None:
    """The help of many commands; what equals the whole help is only named."""
    for words in commands:
        before = len(stage.text)
        if getattr(stage, name)(*words).out == whole:
            stage.text[before + 1:-1] = [
                f"(the same text as {name} --help)\n"]


@scenario
def mission_usage(stage: Stage) -> None:
    stage = MissionStage(stage)
    stage.scratch.task("good", "echo good")
    for words in (
            [], ["frob"], ["chekc"], ["run", "now"], ["list", "--frob"],
            ["-x"], ["--jso"], ["log", "a", "b"], ["new"], ["new", "A b"],
            ["new", "a", "b"], ["completion"], ["completion", "csh"],
            ["unit"], ["unit", "socket"], ["history", "-n", "0"],
            ["history", "-n", "many"],
            ["run", "--wait", "soon"], ["run", "-t"], ["-c"],
            ["check", "-c", "missing.json"], ["check", "-c", "."],
            ["run", "-t", "godo"], ["run", "-t", "nothing-like-it"],
            ["history"], ["log"], ["log", "a1"]):
        stage.mission(*words)
    for name, data in (("not-utf8", b'{"tasks": "\xff"}'),
                       ("cut", b'{"tasks": ['), ("list", b"[]"),
                       ("comma", b'{"tasks": [], "user" {}}'),
                       ("text", b"hello"), ("twice", b'{"a": 1, "a": 2}'),
                       ("empty", b"")):
        path = stage.folder / f"{name}.json"
        path.write_bytes(data)
        path.chmod(0o600)
        stage.mission("-c", path.name, "check")


@scenario
def mission_completion(stage: Stage) -> None:
    for shell in ("bash", "zsh", "fish"):
        stage.mission("completion", shell)


@scenario
def mission_init(stage: Stage) -> None:
    stage.env["SUDO_USER"] = "op"       # for root; else the user is op anyway
    stage.mission("init")
    stage.note("mission.config.json")
    stage.show((stage.folder / "mission.config.json").read_text())
    stage.mission("init")
    stage.mission("-c", "other.json", "init")
    stage.mission("-c", "missing/other.json", "init")


@scenario
def mission_check(stage: Stage) -> None:
    stage.file("bad.json", BAD_CONFIG)
    stage = MissionStage(stage)
    stage.tasks()
    stage.mission("check")
    for command in ("check", "list", "dump", "run"):
        stage.mission("-c", "bad.json", command)
    stage.note("a script that cannot run, and a missing one")
    stage.scratch.task("not-executable", "echo").chmod(0o644)
    stage.scratch.task("no-interpreter", "#!/no/such/shell\n")
    stage.scratch.entry("missing", "exec")
    stage.mission("check")


@scenario
def mission_list(stage: Stage) -> None:
    stage = MissionStage(stage)
    stage.tasks()
    stage.mission("list")
    stage.mission("list", "-v")
    stage.mission("list", "--json")
    stage.mission("dump")


@scenario
def mission_new(stage: Stage) -> None:
    stage = MissionStage(stage)
    stage.scratch.task("good", "echo good")
    stage.mission("new", "databases")
    stage.show((stage.scratch.tasks / "databases/run").read_text())
    stage.mission("new", "databases")


@scenario
def mission_dry_run(stage: Stage) -> None:
    """Every kind of step."""
    stage.program("sendmail", "#!/bin/sh\n")
    stage = MissionStage(stage)
    stage.tasks()
    stage.scratch.storage("sync", chown=True)
    stage.config["user"]["email"] = "op@example.com"
    stage.config["mail"] = {"enabled": True, "type": "sendmail"}
    stage.config["ping"] = {"enabled": True, "start": True, "fail": True,
                            "endpoint": "https://hc.example/%s"}
    stage.config["metrics"] = {"textfile": "mission.prom"}
    stage.mission("run", "--dry-run")
    stage.mission("run", "--dry-run", "--headless")
    stage.mission("run", "--dry-run", "-t", "manual", "-t", "good")


@scenario
def mission_run_by_hand(stage: Stage) -> None:
    stage = MissionStage(stage)
    stage.tasks()
    stage.mission("run")
    stage.mission("run", "-t", "good", "-t", "manual")
    stage.mission("run", "-q", "-v", "-t", "after-bad")
    stage.mission("history")
    stage.mission("history", "-n", "1", "--json")
    stage.mission("log")


@scenario
def mission_headless_run(stage: Stage) -> None:
    """The log, mails, pings and metrics of a bad and of a good run."""
    stage.program("sendmail", SENDMAIL.format(folder=stage.folder))
    stage = MissionStage(stage)
    stage.tasks()
    with Web() as web:
        stage.know(f":{web.port}", ":<port>")
        stage.config["user"]["email"] = "op@example.com"
        stage.config["mail"] = {"enabled": True, "type": "sendmail"}
        stage.config["ping"] = {"enabled": True, "start": True, "fail": True,
                                "log": True, "endpoint": web.url + "/%s"}
        stage.config["metrics"] = {"textfile": str(
            stage.folder / "mission.prom")}
        for words in ([], ["-t", "good"]):
            stage.mission("run", "--headless", *words)
            stage.note("the log")
            stage.show(stage.scratch.log())
            stage.mails(2)
            for request in web.requests:
                stage.note(f"ping: {request.method} {request.path}")
                stage.show_json(request.query)
                stage.show(request.text)
            del web.requests[:]
            stage.note("metrics")
            stage.show((stage.folder / "mission.prom").read_text())
        stage.mission("history")
        stage.mission("history", "--json")
        stage.mission("log")


@scenario
def mission_delivery_fails(stage: Stage) -> None:
    """A good run whose mail and ping are refused; then one that sends."""
    stage.program("sendmail", "#!/bin/sh\ncat >/dev/null\nexit 75\n")
    stage = MissionStage(stage)
    stage.scratch.task("good", "echo good")
    stage.config["user"]["email"] = "op@example.com"
    stage.config["mail"] = {"enabled": True, "type": "sendmail",
                            "start": False}
    with Web(404, 200) as web:
        stage.know(f":{web.port}", ":<port>")
        stage.config["ping"] = {"enabled": True, "endpoint": web.url}
        stage.mission("run", "--headless")
        stage.note("the log")
        stage.show(stage.scratch.log())
        stage.program("sendmail", SENDMAIL.format(folder=stage.folder))
        stage.mission("run", "--headless")
        stage.mails(2)
        stage.mission("history")


@scenario
def mission_stopped_and_busy(stage: Stage) -> None:
    """A second run, a signal, and a run that was killed."""
    stage = MissionStage(stage)
    go = stage.folder / "go"
    stage.scratch.task("wait", f"echo $$ >'{go}.new'; mv '{go}.new' '{go}'; "
                       "exec sleep 60")
    stage.scratch.task("next", "echo next")
    stage.scratch.write()
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = stage.start("mission", "run")
        support.wait_until(go.exists, 30, "the task")
        pid = int(go.read_text())
        go.unlink()
        stage.mission("run")
        stage.mission("history")
        process.send_signal(number)
        stage.finish(process, f"mission run     # and "
                     f"{number.name} to it")
    stage.mission("history")
    stage.mission("run", "-t", "next")
    stage.mission("history")
    os.kill(pid, signal.SIGKILL)    # what the killed mission left


@scenario
def mission_commit(stage: Stage) -> None:
    support.need("git")
    stage = MissionStage(stage)
    sync = stage.scratch.storage("sync", commit=True)
    subprocess.run(["git", "init", "-q", "-b", "main", str(sync)], check=True)
    stage.scratch.task("good", 'date +%N >"$SYNC_DIR/file"')
    stage.mission("run")
    stage.mission("history", "--json")



# ==========================================================================
# koitab and koid
# ==========================================================================

GOOD_TAB = """\
# What this machine does.
MAILTO=""
CRON_TZ=UTC
[Backups]
"Nightly"    30 2 * * *   /usr/local/bin/backup
KOI_TIMEOUT=10m
"Check"      */15 9-17 * * mon-fri /usr/local/bin/check
@reboot echo started
@daily echo "no name" % input % more
[For the office]
"Say hi"     @manual      echo {{To}} {{Times, int, 1}}
"Publish"    @manual      echo {{Title}} {{Kind, choice(a|b), a}} {{Day, date}}
"""
BAD_TAB = """\
MAILTO=two people
KOI_OVERLAP=perhaps
KOI_TIMEOUT=soon
CRON_TZ=Atlantis/Capital
61 2 * * * echo minute
5.5 * * * * echo fraction
* * 30 2 * echo never
* * * * echo four fields
"Twice" @manual echo 1
"Twice" @manual echo 2
"Quoted" @manual echo "{{To}}"
"Type" @manual echo {{To, colour}}
"Default" 0 3 * * * echo {{To}}
"Evaluated" @manual sh -c {{Code}}
"Choice" @manual echo {{A, choice(x|y), z}}
[Section
@never echo
"Open @manual echo
%
0 3 * * *
0 3 * * * echo no newline"""
KOITAB_COMMANDS = ["run", "next", "history", "log", "kill", "status",
                   "import", "page", "daemon", "dashboard", "unit",
                   "source",
                   "completion"]


@scenario
def koitab_help(stage: Stage) -> None:
    whole = stage.koitab("--help").out
    for words in (["--version"], ["-V"]):
        stage.koitab(*words)
    show_help(stage, "koitab", [
        ["-h"], ["-d", "--help"], ["-l", "--help"],
        *([name, "--help"] for name in KOITAB_COMMANDS)], whole)
    for called in ("koid", "crontab"):
        stage.koitab("--version", called=called)


@scenario
def koitab_usage(stage: Stage) -> None:
    stage.file("tab", GOOD_TAB)
    for words in (
            ["missing-file"], ["hsitory"], ["pause"], ["help"],
            ["tab", "more"], ["-l", "tab"], ["-l", "-r"], ["-l", "-n", "3"],
            ["-x"], ["--frob"], ["-u"],
            ["-T"], ["-T", "missing-file"],
            ["-n", "0", "next"], ["-n", "many", "history"],
            ["next", "a", "b"], ["next", "--from", "tomorrow", "--tab",
                                 "tab"],
            ["next", "--tab", "missing-file"], ["next", "--on", "web2"],
            ["history", "a", "b"], ["history", "--utc"], ["log"],
            ["log", "1", "2"], ["kill"], ["kill", "Nightly"], ["run"],
            ["status", "now"], ["import", "all"], ["page", "ftp://x"],
            ["daemon", "now"], ["daemon", "--json"], ["unit"],
            ["unit", "cron"], ["unit", "daemon", "--listen", "0.0.0.0:1"],
            ["completion"], ["completion", "csh"], ["dashboard", "now"],
            ["dashboard", "--listen", "everywhere"],
            ["dashboard", "--listen", "0.0.0.0:8077"],
            ["dashboard", "--cert", "cert.pem"],
            ["dashboard", "--name", "two words"],
            ["dashboard", "--behind-proxy", "proxy"],
            ["dashboard", "--backup", "copy", "--db", "missing.db"],
            ["dashboard", "--cert", "no.pem", "--key", "no.pem"]):
        stage.koitab(*words)
    stage.koitab("frob", called="crontab")
    stage.koitab("frob", called="koid")


@scenario
def koitab_dashboard_usage(stage: Stage) -> None:
    """koitab -d and run --on, typed wrong or on a machine without one."""
    for words in (
            ["-d"], ["-d", "frob"], ["-d", "new", "a", "b"], ["-d", "join"],
            ["-d", "show", "x"], ["-d", "show", "--json"],
            ["-d", "join", "ftp://koi.example"],
            ["-d", "join", "http://koi.example:8077"],
            ["-d", "join", "http://127.0.0.1:1/#xyz"],
            ["-d", "new", "--ca", "missing.pem", "https://koi.example"],
            ["-d", "new", "--password", "-"], ["-d", "show"],
            ["-d", "rotate"], ["-d", "off"], ["run", "--on", "web2", "x"],
            ["page", "--json"]):
        stage.koitab(*words)
    stage.koitab("-d", "join", "http://127.0.0.1:1")
    stage.koitab("-d", "join", "https://127.0.0.1:1")
    stage.koitab("-d", "join", "https://127.0.0.1:1", said="words\n")


@scenario
def koitab_completion(stage: Stage) -> None:
    for shell in ("bash", "zsh", "fish"):
        stage.koitab("completion", shell)
    stage.koitab("-", said=GOOD_TAB)
    stage.koitab("completion", "names")


UNITS = (["daemon"], ["daemon", "--system"], ["dashboard"],
         ["dashboard", "--listen", "0.0.0.0:443", "--name", "koi.example",
          "--cert", "cert.pem", "--key", "key.pem", "--behind-proxy",
          "10.0.0.2"],
         ["dashboard", "--cert", "missing.pem", "--key", "key.pem"])


def make_certificate(stage: Stage) -> None:
    """The files that UNITS names. The programs look into them."""
    made = certificate(stage.folder)
    for name, path in (("cert.pem", made.cert), ("key.pem", made.key)):
        stage.file(name, Path(path).read_text())


@scenario
def koitab_as_a_user(stage: Stage) -> None:
    make_certificate(stage)
    stage.become_user()
    for words in UNITS:
        stage.koitab("unit", *words)
    stage.koitab("-u", "root", "-l")
    stage.koitab("daemon", "--system")


@roots_scenario
def koitab_as_root(stage: Stage) -> None:
    stage.koitab("-u", "no-such-user", "-l")
    stage.koitab("-u", "nobody", "-l")
    stage.koitab("-u", "nobody", "history")
    del stage.env["KOI_HOME"]
    make_certificate(stage)
    for words in UNITS:
        stage.koitab("unit", *words)


@scenario
def koitab_test_of_a_tab(stage: Stage) -> None:
    stage.file("good", GOOD_TAB)
    stage.file("bad", BAD_TAB)
    stage.koitab("-T", "good")
    stage.koitab("-T", "bad")


@scenario
def koitab_install(stage: Stage) -> None:
    """As crontab(1), without a koid."""
    stage.file("good", GOOD_TAB)
    stage.file("bad", BAD_TAB)
    stage.program("editor", '#!/bin/sh\necho "@daily echo new" >>"$1"\n')
    stage.program("looker", "#!/bin/sh\nexit 0\n")
    stage.program("quitter", "#!/bin/sh\nexit 3\n")
    edit = {"EDITOR": "editor", "TMPDIR": str(stage.folder)}
    stage.koitab("-l")
    stage.koitab("-r")
    stage.koitab("bad")
    stage.koitab("good")
    stage.koitab("-l")
    stage.koitab("-e", env=edit)
    stage.koitab("-e", env={**edit, "VISUAL": "looker"})
    stage.koitab("-e", env={**edit, "VISUAL": "quitter"})
    stage.koitab("next", "-n", "1", "--from", "2005-03-18", "--utc")
    stage.koitab("status")
    stage.koitab("history")
    stage.koitab("run", "Nightly")
    stage.koitab("kill", "1")
    stage.koitab("log", "1")
    stage.koitab("-r", "-i", said="n\n")
    stage.koitab("-r", "-i", said="perhaps\ny\n")
    stage.koitab("-l", called="crontab")


@scenario
def koitab_next(stage: Stage) -> None:
    stage.file("tab", GOOD_TAB.replace(
        "CRON_TZ=UTC", "CRON_TZ=CET-1CEST,M3.5.0,M10.5.0/3"))
    start = ["--tab", "tab", "--from", "2005-03-25T12:00:00+01:00"]
    stage.koitab("next", *start)
    stage.koitab("next", *start, "--utc", "-n", "1")
    stage.koitab("next", *start, "--json", "-n", "2")
    stage.koitab("next", *start, "Nightly", "-n", "3")
    stage.koitab("next", *start, "Backups/Nightly", "--json", "--utc")
    stage.koitab("next", *start, "Nihgtly")
    stage.koitab("next", "--tab", "-", "--from", "2005-03-25",
                 said='"Leap" 0 0 29 2 * echo {{A, int, 1}}\n0 5 * * echo\n')


JOBS_TAB = """\
[Backups]
"Good" @manual echo out
"Bad" @manual echo broken >&2; exit 3
"Killed" @manual kill -9 $$
"Long" @manual echo begun; sleep 60
[Office]
"Say" @manual echo {{To}} {{Times, int, 1}}; echo {{Key, secret, none}}
"Good" @manual echo another
"Colour" @manual printf '\\033[31mred\\033[0m no newline'
KOI_TIMEOUT=1s
"Timed" @manual exec sleep 60
"""


@scenario
def koitab_run(stage: Stage) -> None:
    koi = stage.daemon()
    stage.koitab("-", said=JOBS_TAB)
    for words in (
            ["Backups/Good"], ["Good"], ["Bad"], ["Killed"], ["Timed"],
            ["Gud"],
            ["Nothing like it"], ["Say"], ["Say", "To"], ["Say", "Tp=x"],
            ["Say", "To=a", "To=b"], ["Say", "To=a", "Times=many"],
            ["Say", "To=o'brien", "Times=2"], ["Colour"], ["Bad", "To=x"],
            ["Bad", "--json"], ["Bad", "--url", "http://127.0.0.1:1"]):
        stage.koitab("run", *words)
    stage.koitab("run", "Say", "To=x", "Key=-", said="hidden\n")
    stage.koitab("history")
    stage.koitab("history", "-n", "2", "Backups/Good")
    stage.koitab("history", "-n", "1", "--json", "Say")
    stage.koitab("log", "Bad")
    stage.koitab("log", "1")
    stage.koitab("log", "--json", "1")
    stage.koitab("log", "Killed")
    stage.koitab("log", "99")
    stage.koitab("log", "Nothing like it")
    stage.koitab("status")
    stage.koitab("status", "--json")
    stage.koitab("kill", "99")
    stage.koitab("kill", "1")
    stage.koitab("kill", "x")
    number = koi.history()[0]["run"] + 1
    long = stage.start("koitab", "run", "Long")
    support.wait_until(lambda: koi.history()[0]["run"] == number, 20, "Long")
    support.wait_until(lambda: "begun" in koi.text_of(number), 20, "Long")
    stage.koitab("status")
    stage.koitab("kill", str(number))
    stage.finish(long, "koitab run Long")
    koi.stop()
    stage.note("koid's log")
    stage.show(koi.log())
    stage.koitab("history", "-n", "1")


# m h dom mon dow command; with what koi cannot take as it is.
CRON_TAB = """\
MAILTO=ops@example.com
*/5 * * * * /usr/bin/poll
0 3 * * * echo a % b
0 3 * * * echo a % b
RANDOM_DELAY=5
5.5 * * * * echo fraction
@reboot echo up {{now}}
what is this
"""


@scenario
def koitab_import(stage: Stage) -> None:
    """A crontab of cron's. For root it reads /etc/crontab, so: as a user."""
    stage.become_user()
    stage.program("crontab", f"#!/bin/sh\ncat <<'END'\n{CRON_TAB}END\n")
    stage.koitab("import")
    stage.program("crontab", "#!/bin/sh\necho no crontab for op >&2; exit 1\n")
    stage.koitab("import")


@scenario
def koid_mails(stage: Stage) -> None:
    """What cron would mail, of jobs at the start of the machine."""
    stage.program("sendmail", SENDMAIL.format(folder=stage.folder))
    stage.koitab("-", said="""\
@reboot echo to its user
MAILTO=ops@example.com
MAILFROM=cron@example.com
CONTENT_TYPE="text/html; charset=utf-8"
@reboot cat; exit 3 % <b>input</b> % é
@reboot -n echo not mailed, for it went well
MAILTO=""
@reboot echo not mailed
""")
    koi = stage.daemon()
    koi.ended(count=4)
    stage.mails(2, in_order=False)
    stage.koitab("status")
    koi.stop()
    stage.note("koid's log")
    stage.show(koi.log())


# ==========================================================================
# A dashboard, and what hosts send to it
# ==========================================================================


def wait_until_sent(koi: Daemon) -> None:
    """Until the dashboard has the list of jobs and all runs."""
    def is_sent() -> bool:
        state = koi.ask("status")["dashboard"]
        return state and not state["unsent"] and not state["problems"]

    support.wait_until(is_sent, 30, f"the link\n{koi.log()}")


@scenario
def koitab_with_a_dashboard(stage: Stage) -> None:
    koi = stage.daemon()
    stage.koitab("-", said=JOBS_TAB + '"Daily" 0 3 * * * echo daily\n')
    koi.run("Colour")
    with stage.dashboard() as house:
        url = f"http://127.0.0.1:{house.port}"
        secret = stage.typed_secret(stage.koitab(
            "-d", "new", url, "--plain-http",
            said=house.founding_token()).out)
        wait_until_sent(koi)
        stage.koitab("-d", "show")
        stage.koitab("-d", "new", url)
        stage.koitab("status")
        for host, words, said in (
                ("web1", ["Say", "To=x", "Times=2", "Key=-"],
                 secret + "\nhidden"),
                ("web1", ["Say", "To=x", "Key=hidden"], secret),
                ("web1", ["Bad"], secret), ("web1", ["Killed"], secret),
                ("web2", ["Bad"], secret), ("web1", ["Bda"], secret),
                ("web1", ["Daily"], secret), ("web1", ["Say"], secret),
                ("web1", ["Bad"], "wrong"), ("web1", ["Bad"], "")):
            stage.koitab("run", "--on", host, *words, said=said + "\n")
        stage.koitab("history")
        stage.koitab("-d", "rotate", said="wrong\n")
        stage.typed_secret(
            stage.koitab("-d", "rotate", said=secret + "\n").out)
        stage.koitab("-d", "join", url)
        stage.koitab("-d", "off")
        stage.koitab("-d", "show")
        stage.koitab("-d", "join", url, said="wrong\n")
        stage.koitab("-d", "join", url, "--plain-http", said="wrong\n")
        house.stop()
    stage.note("the dashboard's log")
    stage.show(house.log())


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    """Hands a request on to a dashboard."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self) -> None:
        proxy = self.server.service
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        entry = {"sent": json.loads(body)} if self.path.endswith("/sync") \
            else {}
        proxy.keep(entry)
        wire = http.client.HTTPConnection("127.0.0.1", proxy.target)
        wire.request(self.command, self.path, body or None, {
            name: value for name, value in self.headers.items()
            if name in ("Authorization", "Content-Type")})
        answer = wire.getresponse()
        data = answer.read()
        wire.close()
        if entry:
            proxy.keep({**entry, "answer": json.loads(data)})
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_DELETE = do_GET


class Proxy(Service):
    """In front of a dashboard; keeps what hosts send, and the answers."""

    handler = ProxyHandler

    def __init__(self, target: int):
        super().__init__()
        self.target, self.kept = target, []

    def keep(self, entry: dict) -> None:
        with self.changed:
            self.kept.append(entry)
            self.changed.notify_all()

    def wait_for(self, part: str, name: str) -> dict:
        """The first entry whose part has something under this name."""
        def found() -> dict | None:
            return next((entry for entry in self.kept
                         if entry.get(part, {}).get(name)), None)

        with self.changed:
            assert self.changed.wait_for(found, 30), (part, name, self.kept)
            return found()


@scenario
def sync_payloads(stage: Stage) -> None:
    """What an agent posts, and what it is answered. Polls and deliveries go
    out side by side, so they are shown by what is in them."""
    koi = stage.daemon()
    stage.koitab("-", said="""\
[Backups]
"Good" @manual echo out
"Bad" @manual echo broken >&2; exit 3
"Say" @manual echo {{To}} {{Times, int, 1}} {{Key, secret}}
"Nightly" 0 3 * * * echo nightly
""")
    koi.run("Good")
    koi.run("Bad")
    with stage.dashboard() as house, Proxy(house.port) as proxy:
        secret = stage.typed_secret(stage.koitab(
            "-d", "new", f"http://127.0.0.1:{proxy.port}", "--plain-http",
            said=house.founding_token()).out)
        for part, name in (("sent", "wait"), ("sent", "records"),
                           ("answer", "acked"), ("answer", "missing_output"),
                           ("sent", "outputs")):
            proxy.wait_for(part, name)
        stage.note("The first poll, and the answer")
        first = next(entry for entry in proxy.kept if "answer" in entry)
        stage.show_json(first)
        stage.note("A poll that waits")
        stage.show_json({**proxy.wait_for("sent", "wait")["sent"],
                         "list_sha": "<the list that was sent>"})
        for name in ("records", "list", "next", "outputs"):
            stage.note(f"A delivery's {name!r}")
            stage.show_json(proxy.wait_for("sent", name)["sent"][name])
        stage.note("The answer to records")
        stage.show_json(next(
            entry["answer"] for entry in proxy.kept
            if "answer" in entry and entry["sent"].get("records")))
        stage.koitab("run", "--on", "web1", "Say", "To=x", "Key=-",
                     said=secret + "\nhidden\n")
        stage.note("A poll's answer with a request")
        answer = proxy.wait_for("answer", "requests")["answer"]
        stage.show_json(answer["requests"])
        stage.note("A delivery's 'results'")
        stage.show_json(proxy.wait_for("sent", "results")["sent"][
            "results"])


# --- a made-up history ------------------------------------------------------


def job(tag: str, **fields) -> str:
    """A job in a host's list: the text that its requests name by hash."""
    return json.dumps({
        "user": "op", "tag": tag, "section": "Night", "name": tag.title(),
        "label": tag.title(), "when": "0 3 * * *", "words": "At 03:00",
        "command": f"do {tag}", "params": [], "confirm": "no", **fields})


def record(run: int, state: str, tag: str = "backup", **fields) -> dict:
    """A run; by its number so many hours ago, it took 90 seconds."""
    began = NOW - 3600 * (10 - run)
    has_run, has_ended = state in ("running", "done"), state == "done"
    return {
        "run": run, "change": run, "user": "op", "tag": tag, "section":
        "Night", "name": tag.title(), "label": tag.title(), "trigger":
        "schedule", "state": state, "due": began, "requested_at": None,
        "started": began if has_run else None,
        "ended": began + 90 if has_ended else None,
        "exit": 0 if has_ended else None, "signal": None,
        "reason": "", "args": {}, "attempt": 1, "count": 1, "bytes": 0,
        "cut": False, "size": 0, "next": None, "nonce": "", **fields}


def made_up_history(dash: str) -> list[dict]:
    """The sync payloads of a host, one after the other."""
    output = frames("copying\nno space left on device\n") \
        + frames("tar: error\n", 2)
    listed = json.dumps({
        "v": 1, "dash": dash, "host": HOST, "key": "0" * 16,
        "name": "web1", "at": 1, "jobs": [
            job("backup"), job("rotate", section="", when="@daily"),
            job("say", when="@manual", words="By hand", params=[
                {"name": "To", "type": "string", "default": None,
                 "choices": []}])]})
    return [
        {"list": {"body": listed, "mac": "e" * 64},
         "next": {"op\nbackup": NOW + 3600, "op\nsay": None}},
        {"problems": ["tab: a line is wrong"],
         "records": [
            record(1, "done"),
            record(2, "done", exit=3, bytes=41, size=len(output)),
            record(3, "missed", count=4),
            record(4, "done", exit=None, signal=9, reason="killed by op"),
            record(5, "skipped", reason="the run before it goes on"),
            record(6, "unstartable", reason="there is no user gone"),
            record(7, "done", attempt=2, trigger="retry"),
            record(8, "done", tag="say", trigger="manual", args={"To": "x"}),
            record(9, "done", tag="rotate", section="", exit=1,
                   reason="timeout after 1m"),
            record(10, "running", tag="rotate", section="")],
         "outputs": [piece(2, 0, output)]}]


class Viewer:
    """Asks a dashboard, and writes down the answers."""

    def __init__(self, stage: Stage, house: DashboardProcess):
        self.stage, self.house = stage, house

    def ask(self, method: str, path: str, body=None,
            token: str = OPERATOR_TOKEN, headers: bool = False, **more):
        reply = self.house.ask(method, path, body, token, **more)
        stage = self.stage
        stage.text.append(f"\n> {method} {path}\n")
        if body is not None and not isinstance(body, bytes):
            stage.show(json.dumps(body, ensure_ascii=False) + "\n", "> ")
        stage.text.append(f"{reply.status} {reply.headers['content-type']}\n"
                          if reply.body else f"{reply.status}\n")
        for name, value in sorted(reply.headers.items()) if headers else ():
            stage.show(f"{name}: {value}\n", "< ")
        if "json" in reply.headers.get("content-type", ""):
            stage.show_json(reply.json)
        else:
            stage.show(reply.body.decode("utf-8", "backslashreplace"))
        return reply

    def quietly(self, method: str, path: str, body=None,
                token: str = OPERATOR_TOKEN):
        reply = self.house.ask(method, path, body, token)
        assert reply.status < 300, (path, reply)
        return reply.json


@contextlib.contextmanager
def made_up_dashboard(stage: Stage):
    """A dashboard with a history and a stopped clock."""
    with stage.dashboard(FROZEN) as house:
        house.set_up()
        viewer = Viewer(stage, house)
        for payload in made_up_history(house.dash):
            viewer.quietly("POST", "/api/v1/sync", sync_payload(
                now=NOW, **payload), HOST_TOKEN)
        yield viewer


@scenario
def dashboard_answers(stage: Stage) -> None:
    """The answers of the routes that read."""
    with made_up_dashboard(stage) as viewer:
        state = viewer.ask("GET", "/api/v1/state").json
        ids = {each["name"]: each["id"] for each in state["jobs"]}
        runs = viewer.ask("GET", f"/api/v1/jobs/{ids['Backup']}/runs?limit=3"
                          ).json["runs"]
        viewer.ask("GET", f"/api/v1/jobs/{ids['Backup']}/runs?before="
                   f"{runs[-1]['id']}", token=VIEWER_TOKEN)
        run = next(each["id"] for each in viewer.quietly(
            "GET", f"/api/v1/jobs/{ids['Backup']}/runs")["runs"]
            if each["exit"] == 3)
        for path in (f"runs/{run}", f"runs/{run}/raw",
                     "search?q=space", "search?q=nothing", "audit",
                     f"day?from={NOW - 43_200}&to={NOW}", "channels",
                     f"hosts/{HOST}/list",
                     f"salt?dash={viewer.house.dash}"):
            viewer.ask("GET", f"/api/v1/{path}")
        viewer.ask("HEAD", f"/api/v1/runs/{run}/output", headers=True)
        viewer.ask("GET", "/metrics", token=VIEWER_TOKEN)
        viewer.ask("GET", "/healthz", token="", headers=True)
        key = state["dash"]["badge_key"]
        stage.know(key, "<badge key>")
        stage.know(state["dash"]["ping_key"], "<ping key>")
        for name in ("all.svg", "all.json", "backup.json", "say.svg",
                     "no-such-job.svg", "all.png"):
            viewer.ask("GET", f"/badge/{key}/{name}", token="")


@scenario
def dashboard_checks(stage: Stage) -> None:
    """Checks and pings."""
    with made_up_dashboard(stage) as viewer:
        check = viewer.ask("POST", "/api/v1/checks", {
            "name": "Nightly", "slug": "nightly", "kind": "cron", "schedule":
            "0 3 * * *", "tz": "UTC", "grace": 600, "tags": "a b"}).json["id"]
        key = viewer.quietly("GET", "/api/v1/state")["dash"][
            "ping_key"]
        stage.know(key, "<ping key>")
        rid = "11111111-2222-3333-4444-555555555555"
        for method, path, body in (
                ("GET", f"{check}/start?rid={rid}", None),
                ("POST", f"{check}/fail?rid={rid}", b"disk full\n"),
                ("GET", f"{check}/3", None), ("GET", f"{check}/300", None),
                ("GET", check, None), ("POST", f"{check}/log", b"a note"),
                ("GET", f"{key}/nightly", None),
                ("GET", f"{key}/weekly", None),
                ("GET", f"{key}/weekly?create=1", None),
                ("GET", f"{key}/weekly/what", None),
                ("GET", rid, None)):
            viewer.ask(method, f"/ping/{path}", body, token="")
        viewer.ask("GET", f"/api/v1/checks/{check}/pings")
        viewer.ask("GET", f"/api/v1/checks/{check}/pings/2/body")
        for body in ({"do": "pause"}, {"do": "resume"}, {"grace": 5},
                     {"name": "Each night"}, {"do": "frob"},
                     {"do": "delete"}):
            viewer.ask("POST", f"/api/v1/checks/{check}", body)
        stage.note("the checks of /api/v1/state")
        stage.show_json(viewer.quietly("GET", "/api/v1/state")["checks"])


@scenario
def dashboard_actions(stage: Stage) -> None:
    """What is done on the page, requests to run among it."""
    with made_up_dashboard(stage) as viewer:
        jobs = {each["name"]: each["id"] for each in viewer.quietly(
            "GET", "/api/v1/state")["jobs"]}
        nonce, ms = "5" * 32, NOW * 1000
        body = json.dumps({
            "v": 1, "do": "run", "key": "0" * 16, "dash": viewer.house.dash,
            "host": HOST, "user": "op", "tag": "say", "job":
            "a" * 64, "args": {"To": "x"}, "secrets": {}, "nonce": nonce,
            "iat": ms, "exp": ms + 300_000})
        sent = {"host": HOST, "body": body, "mac": "f" * 64}
        viewer.ask("POST", "/api/v1/requests", sent)
        viewer.ask("POST", "/api/v1/requests", {
            **sent, "body": body.replace('"run"', '"frob"')})
        viewer.ask("GET", f"/api/v1/requests/{nonce}")
        stage.note("the host is handed the request, and refuses it")
        for fields in ({}, {"results": [{
                "nonce": nonce, "state": "refused", "reason":
                "the job is another one", "run": None}]}):
            viewer.ask("POST", "/api/v1/sync", sync_payload(
                now=NOW, **fields), HOST_TOKEN)
        viewer.ask("GET", f"/api/v1/requests/{nonce}")
        with viewer.house.client() as client:
            client.send(encode_request(
                client.port, "GET", "/api/v1/stream", None, OPERATOR_TOKEN))
            stage.note("GET /api/v1/stream, with a snooze after it")
            stage.text.append(f"{client.head()[0]}\n")
            stage.show_json(json.loads(client.line()))
            viewer.quietly("POST", "/api/v1/snooze", {
                "subject": f"job:{jobs['Rotate']}", "until": NOW + 60})
            stage.show_json(json.loads(client.line()))
        for path, body in (
                ("snooze", {"subject": f"job:{jobs['Backup']}",
                            "until": NOW + 3600}),
                ("snooze", {"subject": "job:99", "until": NOW}),
                ("channels", {"kind": "mail", "target": "nobody"}),
                ("channels", {"kind": "webhook", "target": "ftp://x"}),
                ("channels", {"do": "delete", "id": 99}),
                ("forget", {"job": jobs["Backup"]}),
                ("hosts", {"host": "9" * 32, "name": "web2",
                           "token_sha256": "8" * 64}),
                ("rotate", {"salt": "1" * 32, "rounds": 1,
                            "api_sha256": "2" * 64})):
            viewer.ask("POST", f"/api/v1/{path}", body)
        viewer.ask("DELETE", f"/api/v1/hosts/{'9' * 32}")
        viewer.ask("GET", "/api/v1/audit")


@scenario
def dashboard_refusals(stage: Stage) -> None:
    """What is not allowed, and the log of it: 20 lines in 10 seconds are
    the most that it gets."""
    with made_up_dashboard(stage) as viewer:
        for method, path, body, more in (
                ("GET", "/", None, {"headers": True, "Host": "evil.example"}),
                ("GET", "/api/v1/state", None, {"token": ""}),
                ("GET", "/api/v1/state", None, {"token": "f" * 64}),
                ("GET", "/api/v1/state", None, {
                    "token": HOST_TOKEN}),
                ("POST", "/api/v1/snooze", {}, {"token": VIEWER_TOKEN}),
                ("POST", "/api/v1/snooze", {}, {}),
                ("POST", "/api/v1/snooze", b"{", {
                    "Content_Type": "application/json"}),
                ("POST", "/api/v1/snooze", b"{}", {}),
                ("POST", "/api/v1/snooze", b"{}", {
                    "Content_Encoding": "gzip"}),
                ("GET", "/api/v1/state", None, {
                    "Origin": "http://evil.example"}),
                ("GET", "/api/v2/state", None, {})):
            viewer.ask(method, path, body, **more)
        viewer.house.stop()
        stage.note("the log")
        stage.show(viewer.house.log())


@scenario
def dashboard_bad_requests(stage: Stage) -> None:
    with made_up_dashboard(stage) as viewer:
        port = viewer.house.port
        for method, path, body, more in (
                ("DELETE", "/api/v1/state", None, {}),
                ("PUT", "/healthz", None, {}),
                ("GET", "/api/v1/jobs/99/runs", None, {}),
                ("GET", "/api/v1/runs/99", None, {}),
                ("GET", "/api/v1/day", None, {}),
                ("GET", "/api/v1/search?q=", None, {}),
                ("GET", "/api/v1/jobs/1/runs?limit=x", None, {}),
                ("POST", "/api/v1/dashboards", {
                    "salt": "00" * 16, "rounds": 600_000,
                    "api_sha256": "1" * 64}, {}),
                ("POST", "/api/v1/sync", {"v": 9}, {
                    "token": HOST_TOKEN}),
                ("POST", "/api/v1/sync", sync_payload(v=9, now=NOW), {
                    "token": HOST_TOKEN})):
            viewer.ask(method, path, body, **more)
        for raw in (b"GET / HTTP/2.0\r\n\r\n", b"hello\r\n\r\n",
                    b"GET / HTTP/1.1\r\n\r\n",
                    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length:"
                    b" 1\r\nContent-Length: 2\r\n\r\n" % port):
            with viewer.house.client() as client:
                reply = client.send(raw).reply()
            stage.note(repr(raw.decode()))
            stage.text.append(f"{reply.status}\n")
            stage.show_json(reply.json)
        viewer.house.stop()
        stage.note("the log")
        stage.show(viewer.house.log())


@scenario
def dashboard_notifications(stage: Stage) -> None:
    """What mail and a webhook are handed."""
    stage.program("sendmail", SENDMAIL.format(folder=stage.folder))
    with Web() as web, stage.dashboard(FROZEN) as house:
        stage.know(f":{web.port}", ":<port>")
        house.set_up()
        viewer = Viewer(stage, house)
        for kind, target in (("mail", "ops@example.com"),
                             ("webhook", web.url)):
            viewer.ask("POST", "/api/v1/channels",
                       {"kind": kind, "target": target})
        first, _ = made_up_history(house.dash)
        for fields in (first, {"records": [record(1, "done", exit=3)]},
                       {"records": [record(2, "done")]}):
            viewer.quietly("POST", "/api/v1/sync", sync_payload(
                now=NOW, **fields), HOST_TOKEN)
            # What comes while a channel is busy may wait for 5 seconds.
            if fields is not first:
                support.wait_until(lambda: all(
                    each["last"] for each in viewer.quietly(
                        "GET", "/api/v1/channels")["channels"]), 20,
                    "the first notifications")
        stage.mails(2)
        with web.changed:
            assert web.changed.wait_for(lambda: len(web.requests) >= 2, 20)
        for request in web.requests:
            stage.note(f"{request.method} {request.path}")
            for name, value in sorted(request.headers.items()):
                if name not in ("host", "content-length", "connection"):
                    stage.show(f"{name}: {value}\n")
            stage.show_json(json.loads(request.text))
        viewer.ask("POST", "/api/v1/channels", {"do": "test", "id": 1})
        stage.mails(1)
        viewer.ask("GET", "/api/v1/channels")


# ==========================================================================
# The test
# ==========================================================================


def golden_file(name: str) -> Path:
    return GOLDEN / f"{name}.txt"


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=support.root_only if name in ROOT_ONLY else ())
    for name in SCENARIOS])
def test_output_equals_the_golden_file_of_its_scenario(
        name, servers, tmp_path):
    tmp_path.chmod(0o755)
    path = golden_file(name)
    with contextlib.ExitStack() as exits:
        stage = Stage(tmp_path, servers, exits)
        SCENARIOS[name](stage)
    found = stage.golden()
    if ACCEPT:
        path.write_text(found, encoding="utf-8")
        return
    wanted = path.read_text(encoding="utf-8") if path.exists() else ""
    if found != wanted:
        diff = "".join(difflib.unified_diff(
            wanted.splitlines(keepends=True), found.splitlines(keepends=True),
            f"tests/golden/{path.name}", "what the programs say now"))
        pytest.fail(
            f"{diff}\nIf this change is wanted: GOLDEN=accept make test, "
            "then read `git diff tests/golden`.", pytrace=False)


def test_each_golden_file_has_a_scenario():
    for path in GOLDEN.iterdir() if ACCEPT else ():
        if path.stem not in SCENARIOS:
            path.unlink()
    assert {path.name for path in GOLDEN.iterdir()} == {
        golden_file(name).name for name in SCENARIOS}

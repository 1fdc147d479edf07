"""The nights of a real server.

Dumps of SQLite and PostgreSQL, documents that rsync copies into a git
repository, an archive of tar, and all of it stored by restic on a USB disk
and by borg on a network drive. cron's part is `env -i`, msmtp hands the
mails to a server, a monitor takes the pings. Each test is a night in which
something is wrong, and what the administrator sees of it in the morning:
mail, pings, history, status and metrics. The server is a mount namespace
with file systems of its own.
"""

from __future__ import annotations

import contextlib
import glob
import datetime
import json
import os
import pwd
import re
import signal
import sqlite3
import subprocess
import textwrap
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

import servers
import support

pytestmark = support.root_only

HOST = os.uname().nodename
BACKUP, USB, NAS = (Path(path) for path in (
    "/mnt/backup", "/media/usb", "/media/nas"))
CONFIG, METRICS = BACKUP / "mission.json", BACKUP / "metrics/mission.prom"
# What hangs is given up sooner than on a real server.
SHORT_LIMITS = "".join(
    f"assert k.{name}\nk.{name} = {value}\n" for name, value in {
    "ANSWER_SECONDS": 1.0, "SILENT_SECONDS": 2.0, "LOG_SECONDS": 1.0,
    "KILLED_SECONDS": 0.3, "TERM_TO_KILL": 0.3, "KILL_TO_GONE": 0.3}.items())
SUCCESS, FAILURE = (["GET /check/start", f"POST /check{end}"]
                    for end in ("", "/fail"))

SETUP = """
mount -t tmpfs -o mode=755 tmpfs {folder}/etc
cp -a /etc/. {folder}/etc
cp {folder}/settings/* {folder}/etc
mount --move {folder}/etc /etc
for place in /run /var/lib /home /media; do
    mount -t tmpfs -o mode=755 tmpfs $place
done
truncate -s 24M {folder}/disk.img
mkfs.ext4 -q -F -m 0 -N 1024 {folder}/disk.img
mount -o loop {folder}/disk.img /mnt
cd /mnt
mkdir backup state /var/lib/mission /media/usb /media/nas /media/away \\
    /media/remote
mkdir backup/tasks backup/logs backup/sync backup/archive backup/metrics
mount --bind state /var/lib/mission
mount -t tmpfs -o mode=755 tmpfs /media/usb
install -d -o postgres -m 750 backup/dumps
install -d -o alice /home/alice /home/alice/documents /home/alice/photos
cp {folder}/app.db /home/alice
setpriv --reuid alice --regid alice --clear-groups sh -ec '
    cd /home/alice
    echo "Dear Sir," > documents/letter
    seq 2000 > documents/numbers
    git init -q repository'
chown alice:alice backup/sync
mv /home/alice/repository/.git backup/sync
echo ready
exec sleep 900
"""
SCRIPTS = {
    "databases": """\
        #!/bin/bash
        set -euo pipefail
        "$PGBIN/pg_dumpall" > "$DUMPS_DIR/all.sql.new"
        mv "$DUMPS_DIR/all.sql.new" "$DUMPS_DIR/all.sql"
        """,
    "app": f"""\
        #!{support.SHARED_PYTHON} -IS
        import contextlib, os, sqlite3
        with contextlib.closing(sqlite3.connect("/home/alice/app.db")) as db:
            text = "\\n".join(db.iterdump())
        with open(os.environ["SYNC_DIR"] + "/app.sql", "w") as file:
            file.write(text)
        print(len(text), "characters dumped")
        """,
    "documents": 'rsync -av --delete /home/alice/documents "$SYNC_DIR/"',
    "home": 'tar -cf "$ARCHIVE_DIR/home.tar" -C / home/alice',
    "restic": 'restic -r "$USB_DIR/restic" backup "$DUMPS_DIR" "$SYNC_DIR"',
    "borg": 'borg create "$NAS_DIR/borg::$MISSION_RUN_ID" "$DUMPS_DIR"'
            ' "$SYNC_DIR" /home/alice/photos',
    "offsite": 'rsync -a --delete "$ARCHIVE_DIR/" "$USB_DIR/archive/"',
}
TASKS = [
    {"slug": "databases", "user": "postgres"},
    {"slug": "app"},
    {"slug": "documents", "okStatuses": [24]},
    {"slug": "home"},
    {"slug": "restic", "storages": ["usb"], "warnStatuses": [3],
     "needs": ["databases"], "parallel": "offsite"},
    {"slug": "borg", "storages": ["nas"], "warnStatuses": [1],
     "needs": ["databases"], "parallel": "offsite"},
    {"slug": "offsite", "storages": ["usb"], "needs": ["home"],
     "post": True},
]


class Cluster:
    """A PostgreSQL server with a database, in its own directory."""

    def __init__(self, folder: Path):
        self.bin = max(glob.glob("/usr/lib/postgresql/*/bin"), default="")
        if not os.path.exists(f"{self.bin}/initdb"):
            support.absent("PostgreSQL is missing: apt-get install "
                           "postgresql (make parts)")
        self.folder, user = folder, pwd.getpwnam("postgres")
        folder.mkdir(mode=0o700)
        os.chown(folder, user.pw_uid, user.pw_gid)
        self.run("initdb", "-N", "-A", "trust", str(folder / "data"))
        self.server = subprocess.Popen(
            [*self.become(), f"{self.bin}/postgres", "-D",
             str(folder / "data"), "-k", str(folder), "-c",
             "listen_addresses=", "-c", "fsync=off"],
            stderr=subprocess.DEVNULL)
        support.wait_until(lambda: (folder / ".s.PGSQL.5432").exists()
                           and not self.call("psql", "-c", "select 1"
                                             ).returncode,
                           20, "PostgreSQL")
        self.run("psql", "-c", "create table customers as "
                 "select 'customer ' || n from generate_series(1, 50) n")

    def become(self) -> list[str]:
        return ["setpriv", "--reuid=postgres", "--regid=postgres",
                "--clear-groups"]

    def call(self, program: str, *arguments: str):
        return subprocess.run(
            [*self.become(), f"{self.bin}/{program}", *arguments],
            env={"PGHOST": str(self.folder), "PATH": os.defpath},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd="/", timeout=60)

    def run(self, program: str, *arguments: str) -> None:
        done = self.call(program, *arguments)
        assert done.returncode == 0, done

    def close(self) -> None:
        self.server.send_signal(signal.SIGINT)      # disconnects clients
        self.server.wait(20)


def configuration(cluster: Cluster, ping_url: str) -> dict:
    """The configuration of the server's backup."""
    env = {
        "PGBIN": cluster.bin, "PGHOST": str(cluster.folder),
        "RESTIC_PASSWORD": "restic's", "BORG_PASSPHRASE": "borg's",
        "RESTIC_CACHE_DIR": "/var/lib/restic",
        "BORG_BASE_DIR": "/var/lib/borg"}
    return {
        "tasks": [{"type": "exec", "scheduled": True, "storages": [],
                   **task} for task in TASKS],
        "defaults": {"timeout": "1m", "env": env},
        "user": {"name": "alice", "email": "admin@example.org"},
        "storage": {**{name: {"path": name} for name in (
            "tasks", "logs", "dumps", "archive")},
            "sync": {"path": "sync", "chown": True, "commit": True},
            "usb": {"path": str(USB), "mounted": True},
            "nas": {"path": str(NAS), "mounted": True}},
        "ping": {"enabled": True, "endpoint": ping_url, "start": True,
                 "fail": True, "log": True},
        "mail": {"enabled": True, "type": "sendmail"},
        "filters": ["^sending incremental file list$"],
        "metrics": {"textfile": "metrics/mission.prom"},
        "logs": {"keep": 3}}


class Night:
    """A run as the administrator sees it in the morning."""

    def __init__(self, server, result, mails, pings):
        self.result, self.mails, self.pings = result, mails, pings
        self.history = server.history()
        self.record = self.history[-1]
        self.status = server.mission("status", "--max-age", "26h")
        self.metrics = server.metrics()

    @property
    def outcomes(self) -> dict[str, str]:
        return {task["slug"]: task["outcome"]
                for task in self.record["tasks"]}

    @property
    def mail(self) -> servers.ReceivedMail:
        """The mail of the finish, which is the last one."""
        return self.mails[-1]


class Server:
    """A mount namespace with a disk (/mnt), homes, a USB disk and a network
    drive (/media), and its own settings in /etc."""

    def __init__(self, folder: Path, cluster: Cluster, sink, web):
        self.folder, self.sink, self.web = folder, sink, web
        self.drives: list[subprocess.Popen] = []
        self.last_good: Night | None = None
        self.config, self.holder = configuration(cluster, web.url), None
        self.write_settings()

    def start(self) -> None:
        """Mount everything, and prepare the first night."""
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-ec", SETUP.format(folder=self.folder)],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        if not self.holder.stdout.readline():
            support.absent("cannot mount the file systems of a server")
        for slug, script in SCRIPTS.items():
            self.write_script(slug, script)
        self.write_config()
        self.nas = self.mount_drive(NAS)
        env = self.config["defaults"]["env"]
        for command in (f"restic init -r {USB}/restic",
                        f"borg init -e repokey {NAS}/borg"):
            done = self.run("env", *map("=".join, env.items()),
                            *command.split())
            assert done.code == 0, done

    def write_settings(self) -> None:
        """Write the files that the server has in /etc, and its database."""
        with contextlib.closing(sqlite3.connect(
                self.folder / "app.db")) as db, db:
            db.execute("create table orders as select 4711 number")
        (self.folder / "etc").mkdir()
        settings = self.folder / "settings"
        settings.mkdir()
        account = f"alice:x:{support.ALICE_UID}:{support.ALICE_UID}"
        for name, text in (
                ("passwd", support.system_accounts("/etc/passwd")
                 + f"{account}:Alice:/home/alice:/bin/sh\n"),
                ("group", support.system_accounts("/etc/group")
                 + f"alice:x:{support.ALICE_UID}:\n"),
                ("msmtprc", "account default\nhost 127.0.0.1\ntls off\n"
                 f"port {self.sink.port}\nauth off\nset_date_header off\n"
                 "from backup@example.org\nset_from_header off\n")):
            (settings / name).write_text(text)

    # --- programs on the server -------------------------------------------

    def command(self, *command: str) -> list[str]:
        return ["nsenter", "-r", "-m", "-t", str(self.holder.pid), *command]

    def run(self, *command: str, **options) -> support.Result:
        done = subprocess.run(self.command(*command), timeout=120,
                              stdin=subprocess.DEVNULL, **options,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def must(self, *command: str) -> str:
        done = self.run(*command)
        assert done.code == 0, (command, done)
        return done.out

    def see(self, path: Path) -> Path:
        """A file of the server, from outside."""
        return Path(f"/proc/{self.holder.pid}/root{path}")

    def mission(self, *arguments: str, patch: str = "") -> support.Result:
        """mission as cron would start it, but with nothing at all in its
        environment. `patch`: see support.program."""
        return self.run("env", "-i", *support.program("mission", patch=patch),
                        "-c", str(CONFIG), *arguments)

    def night(self, *arguments: str, **options) -> Night:
        """A headless run, and what came of it."""
        mails, pings = len(self.sink.mails), len(self.web.requests)
        result = self.mission("run", "--headless", *arguments, **options)
        night = Night(self, result, self.sink.mails[mails:],
                     self.web.asked()[pings:])
        if not result.code:
            self.last_good = night
        return night

    def history(self) -> list[dict]:
        return json.loads(self.mission("history", "--json").out)

    def metrics(self) -> dict[str, float]:
        """The series of the configuration, without that label; of a task
        "task_success app"."""
        lines = self.see(METRICS).read_text().splitlines()
        found = [re.fullmatch(
            rf'mission_(\w+){{config="{CONFIG}"(?:,task="(.*)")?}} (.*)',
            line) for line in lines if not line.startswith("#")]
        return {" ".join(filter(None, line.group(1, 2))): float(line[3])
                for line in found}

    def git(self, *arguments: str) -> str:
        return self.must("setpriv", "--reuid=alice", "--regid=alice",
                         "--clear-groups", "git", "-C", f"{BACKUP}/sync",
                         *arguments)

    # --- files and drives ---------------------------------------------------

    def write_script(self, slug: str, text: str) -> None:
        if not text.lstrip().startswith("#!"):
            text = f"#!/bin/sh\nexec {text}\n"
        folder = self.see(BACKUP / "tasks" / slug)
        folder.mkdir(exist_ok=True)
        (folder / "run").write_text(textwrap.dedent(text))
        (folder / "run").chmod(0o755)

    def write_config(self, **changes) -> None:
        path = self.see(CONFIG)
        path.write_text(json.dumps({**self.config, **changes}))
        path.chmod(0o600)

    def mount_drive(self, target: Path, source: Path | None = None
                    ) -> subprocess.Popen:
        """Mount a network drive; the process that answers for it. While that
        is stopped, calls to the drive cannot even be killed."""
        far, near, here = (Path(f"/media/remote/{target.name}.{end}")
                           for end in ("far", "near", "here"))
        self.must("mkdir", "-p", str(far), str(near), str(here))
        if source:
            self.must("mount", "--bind", str(source), str(far))
        for source, place in ((far, near), (near, here)):
            self.drives.append(subprocess.Popen(
                self.command("bindfs", "-f", str(source), str(place))))
            support.wait_until(lambda place=place: not self.run(
                "mountpoint", "-q", str(place)).code, 10, "the drive")
        self.must("mount", "--bind", str(here), str(target))
        return self.drives[-2]

    def unmount(self, place) -> None:
        """Unmount, when what hung there has ended."""
        support.wait_until(lambda: not self.run("umount", str(place)).code,
                           10, f"the unmounting of {place}")

    @contextlib.contextmanager
    def stopped(self, drive: subprocess.Popen):
        """The network drive hangs."""
        drive.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            drive.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def changed(self, **scripts: str):
        """Some tasks have another script."""
        try:
            for slug, text in scripts.items():
                self.write_script(slug, text)
            yield
        finally:
            for slug in scripts:
                self.write_script(slug, SCRIPTS[slug])

    @contextlib.contextmanager
    def configured(self, **changes):
        """The configuration is another one."""
        try:
            self.write_config(**changes)
            yield
        finally:
            self.write_config()

    def close(self) -> None:
        for drive in reversed(self.drives):
            drive.send_signal(signal.SIGCONT)
            drive.kill()
            drive.wait()
        if self.holder:
            self.holder.kill()
            self.holder.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server after two good nights."""
    support.need("restic", "borg", "rsync", "setfacl", "bindfs", "git",
                 "fusermount3", "sendmail", "unshare", "nsenter", "setpriv",
                 "mkfs.ext4")
    folder = tmp_path_factory.mktemp("server")
    for place in (folder, folder.parent):
        place.chmod(0o755)
    with contextlib.ExitStack() as stack:
        cluster = Cluster(folder / "postgres")
        stack.callback(cluster.close)
        sink, web = (stack.enter_context(service)
                     for service in (servers.Sink(), servers.Web()))
        server = Server(folder, cluster, sink, web)
        stack.callback(server.close)
        server.start()
        yield server


@pytest.fixture
def last_good(server) -> Night:
    """The last night in which all was well."""
    return server.last_good or server.night()




def is_good(night: Night) -> None:
    """Nothing is wrong, wherever the administrator looks."""
    assert (night.result.code, night.result.err) == (0, ""), night.result
    assert [mail.subject.partition(" in ")[0] for mail in night.mails] == [
        f"{HOST}: run started", f"{HOST}: run finished"]
    assert night.mail.text.startswith("All tasks succeeded.\n")
    assert night.pings == SUCCESS
    assert night.record["result"] == "ok"
    assert set(night.outcomes.values()) == {"ok"}
    assert night.status.code == 0, night.status
    assert night.status.out.startswith("OK: last run: "
                                       + night.record["start"])
    assert night.metrics["run_success"] == 1
    assert night.metrics["last_success_seconds"] == int(
        seconds_of(night))


def has_failed(night: Night, last_good: Night, *problems: str) -> None:
    """Mail, ping, history, status and metrics report a failure; `problems`
    are the lines of the mail that sum it up."""
    assert night.result.code == 1, night.result
    closing = night.result.err.splitlines()[-1]
    assert closing.startswith("mission: error: "), night.result
    assert closing.endswith(" emitted during the run")
    assert f"{HOST}: [FAILURE] run finished in " in night.mail.subject
    assert night.mail.recipients == ["admin@example.org"]
    summary = [line[2:] for line in night.mail.text.splitlines()
               if line.startswith("- ")]
    for problem in problems:
        assert any(line.startswith(problem) for line in summary), summary
    assert night.pings == FAILURE
    assert night.record["result"] == "failed"
    assert night.status.code == 2, night.status
    assert night.record["start"] in night.status.out
    assert night.metrics["last_success_seconds"] == int(
        seconds_of(last_good))


def only_delivery_failed(night: Night, *sources: str) -> None:
    """The tasks went well, and these could not be written."""
    assert night.result.code == 74, night.result
    assert f"{HOST}: [WARNING] run finished in " in night.mail.subject
    for text in night.result.err.splitlines()[-1], night.mail.text:
        assert "all tasks succeeded, but log: " in text
        assert all(f"{source}: " in text for source in sources), text
    assert night.pings == SUCCESS[:1]       # the start: neither end
    assert night.record["result"] == "undelivered"
    assert night.status.code == 1, night.status
    assert night.record["start"] in night.status.out


def seconds_of(night: Night) -> float:
    """When the run of a night began, in seconds since 1970."""
    return datetime.datetime.fromisoformat(night.record["start"]).timestamp()


def test_successful_night_stores_files_that_can_be_restored(server):
    night = server.night()
    is_good(night)
    log = server.see(Path(night.record["log"])).read_text()
    assert "sending incremental file list" in log
    assert "sending incremental file list" not in night.mail.text
    assert "documents/letter" in night.mail.text
    assert server.git("status", "--porcelain") == ""
    assert server.git("show", "HEAD:documents/letter") == "Dear Sir,\n"
    assert "4711" in server.git("show", "HEAD:app.sql")
    stored = BACKUP / "dumps/all.sql"
    assert "customer 42" in server.see(stored).read_text()
    env = [*map("=".join, server.config["defaults"]["env"].items())]
    for command in (f"restic -r {USB}/restic dump latest {stored}",
                    f"borg extract --stdout {NAS}/borg::"
                    f"{night.record['id']} {str(stored)[1:]}"):
        restored = server.must("env", *env, *command.split())
        assert restored == server.see(stored).read_text()
    names = server.must("tar", "-tf", f"{USB}/archive/home.tar").split()
    assert "home/alice/documents/numbers" in names


def test_night_with_a_notice_succeeds_with_a_warning_mail(server, last_good):
    server.must("mv", "/home/alice/photos", "/home/alice/pictures")
    night = server.night()
    server.must("mv", "/home/alice/pictures", "/home/alice/photos")
    assert night.result.code == 0, night.result
    assert f"{HOST}: [WARNING] run finished" in night.mail.subject
    assert night.mail.text.startswith(
        "All tasks succeeded.\nborg ended with a notice: exit status 1.\n")
    assert night.pings == SUCCESS and night.record["result"] == "ok"
    assert night.status.code == 1 and "borg: exit status 1" in night.status.out
    assert night.metrics["run_success"] == 1


def test_night_without_its_disk_fails_only_the_tasks_that_need_it(
        server, last_good):
    server.must("mount", "--move", str(USB), "/media/away")
    night = server.night()
    server.must("mount", "--move", "/media/away", str(USB))
    has_failed(night, last_good,
               "restic: storage usb: /media/usb is not mounted",
               "offsite: storage usb: /media/usb is not mounted")
    assert set(night.outcomes.values()) == {"ok", "failed"}
    assert night.outcomes["restic"] == night.outcomes["offsite"] == "failed"
    assert "restic failed" in night.status.out
    assert night.metrics["run_success"] == 0
    assert night.metrics["task_success restic"] == 0
    assert night.metrics["task_success borg"] == 1
    assert list(server.see(USB).iterdir()), "it is mounted again"


def test_night_with_a_hanging_drive_fails_only_its_task(server, last_good):
    with server.stopped(server.nas):
        night = server.night(patch=SHORT_LIMITS)
    has_failed(night, last_good, "borg: storage nas: /media/nas does not "
               "answer")
    assert [slug for slug, outcome in night.outcomes.items()
            if outcome != "ok"] == ["borg"]
    assert night.metrics["task_success borg"] == 0
    assert night.metrics["task_success offsite"] == 1


def test_night_with_a_drive_that_hangs_during_its_task_fails_that_task(
        server, last_good):
    script = SCRIPTS["borg"]
    with server.configured(tasks=[
            {**task, "timeout": "8s"} if task["slug"] == "borg" else task
            for task in server.config["tasks"]]), server.changed(
            borg=f"#!/bin/sh\nkill -STOP {server.nas.pid}\nexec {script}"):
        try:
            night = server.night(patch=SHORT_LIMITS)
        finally:
            server.nas.send_signal(signal.SIGCONT)
    assert [slug for slug, outcome in night.outcomes.items()
            if outcome != "ok"] == ["borg"]
    has_failed(night, last_good, "borg: cannot be killed")
    is_good(server.night())


def test_night_that_fills_the_disk_fails_and_sends_its_mail(server, last_good):
    """State, logs, metrics and the repository are on that disk."""
    server.must("sh", "-c", "head -c 40M /dev/urandom > "
                "/home/alice/film; seq 99999 > /home/alice/documents/new")
    night = server.night()
    server.must("sh", "-c", f"rm /home/alice/film {BACKUP}/archive/*")
    has_failed(night, last_good,
               "offsite: skipped, because home failed",
               "home: exit status 2",
               f"commitRepositories: {BACKUP}/sync: git add: exit status 128")
    assert "tar: /mnt/backup/archive/home.tar: " in night.mail.text
    is_good(server.night())             # and not: the last one was killed


# ext4 has a little room again when it knows where the data go.
FILL = {"space": "cat /dev/zero > /mnt/filler/0; sync -f /mnt; "
                 "dd if=/dev/zero of=/mnt/filler/1 bs=1k",
        "inodes": "i=0; while touch /mnt/filler/$i; do i=$((i + 1)); done"}


@pytest.fixture(params=FILL)
def full(request, server, last_good):
    """The server with a disk that has been full for a while."""
    root_file = server.see(BACKUP / "sync/root")
    root_file.write_text("root's\n")
    server.must("sh", "-c", "mkdir /mnt/filler; rm -f /mnt/backup/dumps/*.new")
    assert "No space left" in server.run("sh", "-c", FILL[request.param]).err
    server.fill = FILL[request.param]
    yield server
    server.run("rm", "-r", "/mnt/filler")
    root_file.unlink()


def test_night_on_a_full_disk_fails_and_sends_its_mail(full, last_good):
    # What the tasks before it have freed is used up again.
    with full.changed(home=f"#!/bin/sh\n{full.fill}\nexit 2"):
        night = full.night()
    full.must("rm", "-r", "/mnt/filler")
    has_failed(night, last_good,
               "home: exit status 2", "commitRepositories: ")
    assert support.owner(full.see(BACKUP / "sync/root")) == support.ALICE_UID
    assert full.mission("run", "-t", "app").code == 0     # it knows the end
    assert [run["result"] for run in full.history()[-2:]] == [
        "failed", "ok"]


def test_successful_night_on_a_full_disk_is_only_undelivered(full, last_good):
    storage = full.config["storage"]
    with full.configured(tasks=[
            task for task in full.config["tasks"] if task["slug"] in (
                "databases", "restic")], storage={**storage, "sync": {
                    "path": "sync", "chown": True}}), full.changed(
                    databases="true"):
        night = full.night()
    full.must("rm", "-r", "/mnt/filler")
    assert support.owner(full.see(BACKUP / "sync/root")) == support.ALICE_UID
    only_delivery_failed(night, "log")
    assert full.mission("run", "-t", "app").code == 0
    assert [run["result"] for run in full.history()[-2:]] == [
        "undelivered", "ok"]


def test_night_does_not_wait_for_an_unrelated_disk_that_hangs(
        server, last_good):
    stuck = Path("/media/remote/old")
    server.must("mkdir", str(stuck), "/media/old")
    drive = server.mount_drive(stuck)
    server.must("sh", "-ec", f"truncate -s 8M {stuck}/image; "
                f"mkfs.ext4 -q -F {stuck}/image; "
                f"mount -o loop {stuck}/image /media/old; "
                "seq 99999 > /media/old/dirty")
    server.see(BACKUP / "sync/new").write_text("to be committed\n")
    with server.stopped(drive):
        night = server.night()
    server.unmount("/media/old")
    is_good(night)
    assert server.git("show", "HEAD:new") == "to be committed\n"


def test_night_with_a_hanging_log_directory_is_only_undelivered(
        server, last_good):
    logs = BACKUP / "logs"
    drive = server.mount_drive(logs)
    with server.stopped(drive):
        night = server.night(patch=SHORT_LIMITS)
    server.unmount(logs)
    only_delivery_failed(night, "log")
    assert "/mnt/backup/logs: does not answer" in night.mail.text
    assert night.outcomes == last_good.outcomes
    assert night.metrics["run_success"] == 1


def test_night_with_a_hanging_configuration_is_exit_status_78(
        server, last_good):
    before, drive = server.history(), server.mount_drive(BACKUP, BACKUP)
    with server.stopped(drive):
        status = server.mission("status", patch=SHORT_LIMITS)
        result = server.mission("run", "--headless", patch=SHORT_LIMITS)
    server.unmount(BACKUP)
    error = f"{CONFIG}: does not answer"
    assert (result.code, result.err) == (78, f"mission: error: {error}\n")
    assert (status.code, status.out) == (3, f"UNKNOWN: {error}\n")
    assert server.history() == before


def test_nights_after_the_clock_was_set_back_keep_their_logs_and_history(
        server, last_good):
    offset = server.folder / "offset"
    offset.write_text("172800")             # two days ahead
    clock = f"""
now = k.Clock.now
k.Clock.now = lambda clock: now(clock) + float(open({str(offset)!r}).read())
"""
    ahead = server.night(patch=clock)
    assert ahead.result.code == 0 and ahead.pings == SUCCESS
    log = server.see(Path(ahead.record["log"]))
    os.utime(log, (seconds_of(ahead),) * 2)
    with server.changed(app=f"#!/bin/sh\necho 0 > {offset}"):
        middle = server.night(patch=clock)      # this task sets it back
    for night in ahead, middle:
        assert night.status.code == 1 and "in the future" in night.status.out
    assert middle.result.code == 0 and middle.pings == SUCCESS
    assert 0 < middle.metrics["run_duration_seconds"] < 60
    age = time.time() - parsedate_to_datetime(middle.mail["Date"]).timestamp()
    assert abs(age) < 60
    night = server.night()
    is_good(night)
    assert seconds_of(night) < seconds_of(middle)
    assert [run["id"] for run in night.history[-3:]] == [
        each.record["id"] for each in (ahead, middle, night)]
    logs = {path.name for path in server.see(BACKUP / "logs").iterdir()}
    assert len(logs) == 3 and Path(night.record["log"]).name in logs
    assert night.mail.text.splitlines()[1].endswith(night.record["log"])
    assert "FinishTime" in server.mission("log").out


def test_night_with_a_configuration_writable_by_an_access_list_is_refused(
        server, last_good):
    before = server.history()
    server.must("setfacl", "-m", "u:postgres:rw", str(CONFIG))
    night = server.night()
    server.must("setfacl", "-b", str(CONFIG))
    assert night.result.code == 78
    assert night.result.err == (
        f"mission: error: {CONFIG} is not trusted: {CONFIG} is writable by "
        f"postgres (access control list)\n"
        f"mission: hint: setfacl -b {CONFIG}\n")
    assert night.mails == night.pings == []
    assert night.history == before

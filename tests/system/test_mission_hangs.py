"""A file system that hangs costs mission what is on it, and no more.

The file system is bindfs in a mount namespace of the test's own. While the
process is stopped nothing there is answered, as with a dead NFS server. On
top of a stopped bindfs a second one makes calls that cannot even be killed.
"""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

import servers
import support

pytestmark = support.root_only
LIMITS = {"ANSWER_SECONDS": 0.6, "SILENT_SECONDS": 2.0, "LOG_SECONDS": 0.6,
          "KILLED_SECONDS": 0.3}


class Mounts:
    """A mount namespace with bindfs mounts, for `Scratch.host`."""

    def __init__(self):
        support.need("unshare", "bindfs", "fusermount3")
        if not os.path.exists("/dev/fuse"):
            support.absent("/dev/fuse is missing")
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", "echo; exec sleep 600"],
            stdout=subprocess.PIPE)
        self.holder.stdout.readline()
        self.servers: list[subprocess.Popen] = []

    def command(self, command: list[str]) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-m", *command]

    def mount(self, source, target) -> subprocess.Popen:
        """Mount a directory over another one; the process that serves it."""
        server = subprocess.Popen(self.command(
            ["bindfs", "-f", str(source), str(target)]))
        self.servers.append(server)
        support.wait_until(lambda: subprocess.run(
            self.command(["mountpoint", "-q", str(target)])).returncode == 0,
            10, "the mount")
        return server

    def close(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGCONT)
        for server in reversed(self.servers):
            server.kill()
            server.wait()
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def mounts():
    found = Mounts()
    yield found
    found.close()


@pytest.fixture
def night(scratch, mounts):
    """A run with mail and ping; `hang(folder)` makes a directory hang."""
    with servers.Web() as served:
        scratch.mails = scratch.keep_mail(start=False)
        scratch.config["ping"] = {"enabled": True, "endpoint": served.url,
                                  "fail": True}
        scratch.task("a", 'echo a >> "$TASKS_DIR/../ran"')
        scratch.patch(**LIMITS)
        scratch.host, scratch.served = mounts, served

        def hang(folder, stop: bool = True) -> subprocess.Popen:
            """Let a directory hang. Calls to it cannot be killed."""
            inner = scratch.make(f"{folder.name}.inner")
            lower = scratch.make(f"{folder.name}.lower")
            server = mounts.mount(lower, inner)
            mounts.mount(inner, folder)
            if stop:
                server.send_signal(signal.SIGSTOP)
            return server

        scratch.hang = hang
        yield scratch


def ran(night) -> int:
    path = night.folder / "ran"
    return path.read_text().count("a") if path.exists() else 0


@pytest.mark.parametrize("options", [{}, {"chown": True}, {"commit": True}])
def test_storage_that_hangs_is_an_error_of_its_housekeeping(night, options):
    out = night.storage("out", **options)
    night.hang(out)
    for count in (1, 2):
        result = night.headless()
        assert ran(night) == count
        assert night.outcomes() == {"a": "ok"}
        assert result.code == (1 if options else 0), result
        if options:
            assert f"{out} does not answer" in night.log()
        assert len(list(night.mails.iterdir())) == count
        assert len(night.served.asked()) == count
    assert "does not answer" in night.mission("check").err


def test_storage_that_hangs_fails_only_the_tasks_that_need_it(night):
    out = night.storage("out")
    night.task("b", "echo b", minFree={"out": "1K"})
    night.hang(out)
    assert night.headless().code == 1
    assert night.outcomes() == {"a": "ok", "b": "failed"}
    assert f"storage out: {out} does not answer" in night.log()


def test_log_directory_that_hangs_stops_no_task(night):
    night.hang(night.logs)
    result = night.headless()
    assert ran(night) == 1
    assert result.code == 74, result
    assert "does not answer" in result.err.splitlines()[0]
    (mail,) = night.mails.iterdir()
    assert "could not be written" in mail.read_text()


@pytest.mark.parametrize("folder, statuses", [
    ("logs", {"log": 1}), ("state", {"log": 1, "history": 1, "status": 3})])
def test_history_that_hangs_is_an_error(night, folder, statuses):
    server = night.hang(night.make(folder), stop=False)
    assert night.headless().code == 0
    server.send_signal(signal.SIGSTOP)
    for command in {"history", "status"} - statuses.keys():
        assert night.mission(command).code == 0
    for command, code in statuses.items():
        result = night.mission(command)
        assert result.code == code, result
        assert "does not answer" in result.out + result.err


def test_path_directory_that_hangs_is_skipped(night):
    """The programs of the directories after it are found."""
    hung = night.make("hung")
    night.env["PATH"] = f"{hung}:{night.env['PATH']}"
    night.hang(hung)
    assert night.mission("check").code == 0
    result = night.headless()
    assert (result.code, ran(night)) == (0, 1), result
    assert len(list(night.mails.iterdir())) == 1


def test_log_directory_that_hangs_during_a_run_stops_no_task(night):
    server = night.hang(night.logs, stop=False)
    night.task("b", f"kill -STOP {server.pid}; echo b")
    night.task("c", 'echo a >> "$TASKS_DIR/../ran"')
    result = night.headless()
    assert result.code == 74, result
    assert night.outcomes() == {"a": "ok", "b": "ok", "c": "ok"}
    assert len(list(night.mails.iterdir())) == 1


def test_configuration_that_hangs_is_exit_status_78(night):
    folder = night.make("etc")
    night.hang(folder)
    night.path = folder / "m.json"
    result = night.mission("run", "--headless", write=False)
    assert result.code == 78 and "does not answer" in result.err, result
    night.env["MISSION_STATE"] = str(night.state)
    for command, code in (("check", 78), ("history", 78), ("log", 78),
                          ("status", 3)):
        result = night.mission(command, write=False)
        assert result.code == code, result
        assert "does not answer" in result.out + result.err


def test_tasks_that_hang_fail_and_the_mail_goes_out(night):
    tasks = night.make("hung")
    night.config["storage"]["tasks"]["path"] = str(tasks)
    night.hang(tasks)
    result = night.headless()
    assert result.code == 1 and ran(night) == 0, result
    assert night.outcomes() == {"a": "failed"}
    assert "does not answer" in night.log()
    assert len(list(night.mails.iterdir())) == 1


def test_chown_that_hangs_times_out_and_sigterm_ends_the_run(night):
    out = night.storage("out", chown=True)
    server = night.hang(out, stop=False)
    night.task("stop", f'touch "$OUT_DIR/f"; kill -STOP {server.pid}')
    # The check before it would notice: let it hang in the chown itself.
    night.patch("""
        k.Runner.refuse_storage = lambda self, storage, source: False
        """)
    assert night.headless().code == 1
    assert "no answer within 2s" in night.log()
    night.config["tasks"] = night.config["tasks"][:1]
    night.patch(SILENT_SECONDS=600.0, TERM_TO_KILL=0.5)
    process = night.start("run", "--headless")
    support.wait_until(lambda: len(night.log_files()) == 2
                       and "Chown" in night.log(), 20, "the chown")
    process.terminate()
    result = support.ended(process, 30)     # and not after 600 s
    assert result.code == 143, result
    assert len(list(night.mails.iterdir())) == 2


def test_commit_syncs_only_the_file_system_of_the_repository(night):
    other = night.make("other")
    night.hang(other)
    support.make_repository(night.storage("sync", commit=True))
    night.task("b", 'echo x > "$SYNC_DIR/new"')
    result = night.headless()
    assert result.code == 0, result

"""What process koid is: its names in ps, and its duties as process 1."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest

import dashboard_rig
import support
from support import wait_until

koitab = support.load("koitab")
pytestmark = support.root_only


class Container(support.Koi):
    """koid as process 1 of a PID namespace, as in a container."""

    def begin(self, *args: str, **env: str) -> "Container":
        support.need("unshare", "nsenter", "ps")
        self.spawn(*args, wrap=("unshare", "-pf", "--mount-proc",
                                "--kill-child"), **env)
        wait_until(self.answers, 30, f"koid to answer\n{self.log()}")
        return self

    @property
    def koid(self) -> int:
        """koid's process ID outside."""
        return support.children_of(self.daemon.pid)[0]

    def inside(self, *command: str) -> str:
        """What a command in the namespace prints."""
        return subprocess.run(
            ["nsenter", "-t", str(self.koid), "-p", "-m", *command],
            stdout=subprocess.PIPE, check=True, timeout=30,
            env=self.env).stdout.decode()


@pytest.fixture
def container(tmp_path):
    container = Container(tmp_path)
    yield container
    container.stop(9)


# --- names ------------------------------------------------------------------

def test_pgrep_pidof_and_ps_find_only_koid(container):
    """Also while a job runs, whose supervisor is a fork of koid."""
    container.installed = True
    container.tab('"it" @manual sleep 600\n')
    container.begin()
    run = container.launch("it")
    container.running(run)
    assert container.inside("pgrep", "koid") == "1\n"
    assert container.inside("pidof", "koid") == "1\n"
    assert container.inside("ps", "-C", "koid", "-o", "pid=").split() == ["1"]
    rows = container.inside("ps", "-eo", "comm=,args=").splitlines()
    shown = sorted(" ".join(row.split()) for row in rows if "koi" in row)
    assert shown == ["koi-run koi-run 1", "koid koid"]


def test_the_arguments_of_koid_show_what_it_serves(container):
    container.begin("--system")
    cmdline = Path(f"/proc/{container.koid}/cmdline").read_bytes()
    assert cmdline.rstrip(b"\0").split(b"\0") == [b"koid", b"--system"]
    assert "\ufffd" not in cmdline.decode("utf-8", "replace")


def test_koid_is_started_again_without_a_program_in_its_arguments(
        tmp_path, monkeypatch):
    """Where the arguments cannot be overwritten (macOS), they name the
    program and its options, and no text of a loader."""
    calls = []
    monkeypatch.setattr(koitab.os, "execv", lambda *args: calls.append(args))
    monkeypatch.setattr(koitab.os, "dup2", lambda *args: calls.append(args))
    monkeypatch.setattr(koitab.sys, "argv", ["/usr/local/bin/koid", "-x"])
    koitab.load_again()
    (loader, zero), (program, words) = calls
    assert zero == 0
    assert words == [program, "-IS", "-", "/usr/local/bin/koid", "-x"]
    assert os.read(loader, 65_536).decode() == koitab.LOADER
    os.close(loader)


def test_the_dashboard_is_called_koi_dashboard(tmp_path):
    with dashboard_rig.DashboardProcess(tmp_path) as dashboard:
        pid = dashboard.process.pid
        assert Path(f"/proc/{pid}/comm").read_text() == "koi-dashboard\n"
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert words[:2] == [b"koi-dashboard", b"--listen"]


# --- process 1 --------------------------------------------------------------

def test_koid_as_the_init_process_reaps_an_orphan_at_once(container):
    """When no run ends, no client asks, and nothing is scheduled."""
    fifo = container.folder / "fifo"
    os.mkfifo(fifo)
    container.tab('"it" @manual (setsid sh -c "exec 2>&-; read line < '
                  f'{fifo}" orphan >/dev/null 2>&1 &)\n')
    container.begin()
    assert container.run("it")[3]["exit"] == 0
    wait_until(lambda: not container.unfinished(), 30, "the end of the run")
    def processes() -> int:
        return len(container.inside("ps", "-eo", "pid=").split()) - 1
    wait_until(lambda: processes() == 2, 30, "the end of the supervisor")
    assert "orphan" in container.inside("ps", "-eo", "args=")
    fifo.write_text("end\n")
    wait_until(lambda: processes() == 1, 10, "koid to reap the orphan")


# --- koid --container -------------------------------------------------------

def test_a_container_gives_its_environment_to_jobs(container):
    """The tab and the user's account count before it."""
    container.tab('MINE=tab\n"it" @manual env\n')
    container.begin("--container", PATH="/srv/bin:/usr/bin:/bin",
                    TOKEN="two words", MINE="container", HOME="/nonexistent",
                    NOTIFY_SOCKET="/run/none")
    shown = dict(line.partition("=")[::2] for line in
                 container.run("it")[1].decode().splitlines())
    assert shown["PATH"] == "/srv/bin:/usr/bin:/bin"
    assert (shown["TOKEN"], shown["MINE"]) == ("two words", "tab")
    assert shown["HOME"] == pwd.getpwuid(os.geteuid()).pw_dir
    assert "NOTIFY_SOCKET" not in shown


def test_jobs_outside_a_container_do_not_get_the_environment_of_koid(
        container):
    container.tab('"it" @manual env\n')
    container.begin(PATH="/srv/bin:/usr/bin:/bin", TOKEN="two words")
    shown = container.run("it")[1].decode().splitlines()
    assert "PATH=/usr/bin:/bin" in shown and "TOKEN=two words" not in shown


def test_a_container_logs_to_its_stdout(container):
    container.tab('"it" @manual echo hi\nbad line\n')
    container.spawn("--container", wrap=(
        "unshare", "-pf", "--mount-proc", "--kill-child", "sh", "-c",
        f'exec "$@" 2> {container.folder}/stderr', "sh"))
    wait_until(container.answers, 30, "koid to answer")
    container.run("it")
    lines = wait_until(lambda: container.log().count("\n") > 2
                       and container.log().splitlines(), 10, "the log")
    texts = [line.partition(" ")[2] for line in lines]
    assert f"koid: koid {koitab.VERSION}: 1 job" in texts
    assert f"CRON: ({container.user}) CMD (echo hi)" in texts
    assert any("tabs/" in text for text in texts)
    assert len(texts) == len(set(texts))
    assert (container.folder / "stderr").read_text() == ""


def test_each_start_of_a_container_runs_the_boot_jobs(container):
    """In it nothing of the one before it is left, whatever its PIDs are."""
    container.tab('"up" @reboot true\n"long" @manual sleep 600\n')
    container.begin("--container")
    container.ended("up")
    run = container.launch("long")
    container.running(run)
    container.stop(9)
    container.begin("--container")
    container.ended("up", 2)
    row = container.end_of(run)
    assert (row["state"], row["reason"]) == ("interrupted",
                                             "the machine went down")


# --- one boot, without the history ------------------------------------------

def test_jobs_of_a_boot_run_once_though_the_history_is_removed(tmp_path):
    koi = support.Koi(tmp_path)
    koi.tab('"up" @reboot true\n"long" @manual sleep 600\n')
    koi.start()
    koi.ended("up")
    run = koi.launch("long")
    koi.running(run)
    koi.stop()
    for file in koi.home.glob("history.db*"):
        file.unlink()
    koi.start()
    try:
        rows = koi.history()
        assert [(row["run"], row["state"]) for row in rows] \
            == [(run, "running")]
        koi.ask("kill", run=run)
        assert koi.end_of(run)["signal"] == 15
    finally:
        koi.stop()
        koi.end_jobs()

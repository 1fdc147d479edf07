"""What process koid is: its names in ps, and its duties as process 1."""

from __future__ import annotations

import os
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

def test_pgrep_pidof_and_ps_find_koid_and_nothing_else(container):
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

def test_koid_as_process_1_reaps_an_orphan_at_once(container):
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

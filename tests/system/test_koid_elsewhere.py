"""koid on macOS and FreeBSD, which are simulated: see simulated_machine.py.

No such machine was there. What is tested is that nothing of Linux's that
these systems lack is needed: /proc, /run, timerfd, pidfd, memfd, SIGIO for
directories, setresuid, more than 16 groups, posix_spawn in a session.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

import dashboard_rig
import support
from support import ALICE, ALICE_UID, wait_until

koitab = support.load("koitab")
pytestmark = support.root_only

HIDDEN = ["mount -t tmpfs -o ro tmpfs /run", "umount -l /proc",
          "mount -t tmpfs -o ro tmpfs /proc"]


class Elsewhere(support.Koi):
    """koid on a machine that is simulated."""

    def __init__(self, folder: Path, platform: str, has_boot_id: bool = True):
        super().__init__(folder)
        self.platform, self.boot = platform, self.folder / "boot"
        self.has_boot_id = has_boot_id
        self.boot.write_text("first")
        self.place = support.Host(self.folder / "host")
        self.var = self.folder / "var"
        for name in ("run", "lib", "tmp", "spool/cron"):
            (self.var / name).mkdir(parents=True)
        self.place.bind(self.var, "/var")
        self.place.setup += HIDDEN

    def command(self, *args: str) -> list[str]:
        python, *flags = support.program("koitab", self.python, self.patch)
        cached = flags.index(str(support.ROOT / "tests/cached.py"))
        return self.place.command([
            python, *flags[:cached],
            str(support.ROOT / "tests/simulated_machine.py"), self.platform,
            str(self.boot) if self.has_boot_id else "", *flags[cached + 1:],
            *args])

    def koitab(self, *args: str, stdin: str = "") -> support.Result:
        done = support.subprocess.run(
            self.command(*args), env=self.env, input=stdin,
            encoding="utf-8", stdout=-1, stderr=-1, timeout=60)
        return support.Result(done.returncode, done.stdout, done.stderr)

    def restart(self, number: int = signal.SIGKILL) -> None:
        self.stop(number)
        self.start()

    def end_jobs(self) -> None:
        for file in (self.home / "runs").glob("*"):
            header = self.header(file.name)
            if header and header.phase == koitab.RUNNING:
                with contextlib.suppress(OSError):
                    os.killpg(header.job, signal.SIGKILL)


@pytest.fixture(params=["darwin", "freebsd14"])
def koi(request, tmp_path):
    koi = Elsewhere(tmp_path, request.param)
    yield koi
    koi.stop()
    koi.end_jobs()


def test_job_survives_the_end_of_koid_and_its_output_is_kept(koi):
    fifo = koi.folder / "fifo"
    os.mkfifo(fifo)
    koi.tab(f'"it" @manual echo before; read word < {fifo}; echo $word\n')
    koi.start()
    run = koi.launch("it")
    koi.running(run)
    for number in (signal.SIGKILL, signal.SIGTERM):
        koi.restart(number)
        assert [row["run"] for row in koi.unfinished()] == [run]
    fifo.write_text("after\n")
    row = koi.end_of(run)
    assert (row["state"], row["exit"]) == ("done", 0)
    assert koi.text_of(run) == "before\nafter\n"


def test_a_job_that_was_adopted_can_be_killed(koi):
    koi.tab('"it" @manual sleep 600\n')
    koi.start()
    run = koi.launch("it")
    koi.running(run)
    koi.restart()
    koi.ask("kill", run=run)
    assert koi.end_of(run)["signal"] == signal.SIGTERM


def test_a_second_run_is_skipped_while_an_adopted_one_is_running(koi):
    koi.tab('KOI_OVERLAP=skip\n"it" @manual sleep 600\n')
    koi.start()
    run = koi.launch("it")
    koi.running(run)
    koi.restart()
    with pytest.raises(koitab.Error, match="still"):
        koi.launch("it")
    assert koi.row(run)["state"] == "running"


def test_run_of_a_killed_supervisor_is_interrupted(koi):
    koi.tab('"it" @manual sleep 600\n')
    koi.start()
    run = koi.launch("it")
    header = koi.running(run)
    koi.restart()
    os.kill(header.supervisor, signal.SIGKILL)
    row = koi.end_of(run)
    os.killpg(header.job, signal.SIGKILL)
    assert (row["state"], row["reason"]) == ("interrupted",
                                             "the supervisor was killed")


@pytest.mark.parametrize("has_boot_id", [True, False])
def test_jobs_of_a_boot_run_once_however_often_koid_is_restarted(
        koi, has_boot_id):
    koi.has_boot_id = has_boot_id
    koi.tab('"up" @reboot echo up\n"now" @manual true\n')
    koi.start()
    koi.ended("up")
    for _ in range(2):
        koi.restart()
        koi.run("now")
    assert len(koi.history(job="up")) == 1


def test_jobs_of_a_boot_run_again_after_the_next_boot(koi):
    koi.tab('"up" @reboot true\n"long" @manual sleep 600\n')
    koi.start()
    koi.ended("up")
    run = koi.launch("long")
    header = koi.running(run)
    koi.stop(signal.SIGKILL)
    for pid in (header.supervisor, header.job):
        os.kill(pid, signal.SIGKILL)
    koi.boot.write_text("second")
    koi.start()
    koi.ended("up", 2)
    row = koi.end_of(run)
    assert (row["state"], row["reason"]) == ("interrupted",
                                             "the machine went down")


def test_changed_boot_id_does_not_end_a_job(koi):
    """kern.boottime of a BSD does when the clock is set."""
    koi.tab('"long" @manual sleep 600\n')
    koi.start()
    run = koi.launch("long")
    koi.running(run)
    koi.stop(signal.SIGKILL)
    koi.boot.write_text("second")
    koi.start()
    assert koi.row(run)["state"] == "running"
    koi.ask("kill", run=run)
    assert koi.end_of(run)["signal"] == signal.SIGTERM


def test_socket_of_the_koid_of_root_is_below_var_run(koi):
    del koi.env["KOI_HOME"]
    koi.home = koi.var / "lib/koi"
    koi.spawn("--system")
    wait_until((koi.var / "run/koi/koid.sock").exists, 30, "the socket")
    assert int((koi.var / "run/cron.pid").read_text()) == koi.daemon.pid
    wait_until(lambda: koi.koitab("status").out, 30, "koid to answer")
    assert (koi.var / "run/crond.reboot").exists()


def test_jobs_of_a_user_with_more_than_sixteen_groups_run(koi):
    """The user's own group is among those that are left."""
    koi.place.home[ALICE].chmod(0o755)
    koi.tab('"it" @manual id -u; id -g\n', ALICE)
    koi.tab('"it" @manual id -u; id -G\n')
    koi.start()
    run, out, err, end = koi.run("it")
    uid, groups = out.decode().splitlines()
    assert (end["exit"], err, uid) == (0, b"", "0")
    assert groups.split()[0] == "0" and len(groups.split()) == 16
    with koi.link() as link:
        run, connection, _ = link.attach("it", {}, ALICE)
        connection.close()
    koi.end_of(run)
    assert [str(ALICE_UID)] * 2 == [
        word for word in koi.text_of(run).split() if word.isdigit()]


def test_socket_with_a_long_path_is_reachable(koi):
    koi.home = koi.folder / ("d" * 100)
    koi.home.mkdir(mode=0o700)
    (koi.home / "tabs").mkdir(mode=0o700)
    koi.env["KOI_HOME"] = str(koi.home)
    koi.tab('"it" @manual echo hi\n')
    koi.start()
    assert koi.run("it")[1] == b"hi\n"
    done = koi.koitab("run", "it")
    assert (done.code, done.out, done.err) == (0, "hi\n", "")


@pytest.mark.parametrize("shell, why", [
    ("/nonexistent/sh", "No such file or directory"),
    ("/etc/passwd", "Permission denied")])
def test_a_shell_that_cannot_be_started_is_recorded(koi, shell, why):
    koi.tab(f'SHELL={shell}\n"it" @manual echo hi\n')
    koi.start()
    row = koi.end_of(koi.launch("it"))
    assert row["state"] == "unstartable"
    assert f"failed to start: {shell}: {why}" in row["reason"]


def test_run_is_shown_by_a_dashboard_on_the_simulated_machine(koi, tmp_path):
    """All three are on such a machine: the dashboard, koid and its agent
    (which is a fresh Python, and so the one of this machine)."""
    start = koi.place.command(["python"])[:-1]
    wrapper = tmp_path / "start"
    wrapper.write_text(
        "#!/bin/sh\npython=$1; shift 3\n"
        f'exec "$python" -IS {support.ROOT}/tests/simulated_machine.py '
        f'{koi.platform} "" "$@"\n')
    wrapper.chmod(0o755)
    koi.patch = dashboard_rig.FEW_ROUNDS + dashboard_rig.QUICK_TO_RETRY \
        + dashboard_rig.PLAIN_HTTP
    koi.tab('"it" @manual echo hi\n')
    with dashboard_rig.DashboardProcess(
            tmp_path / "dashboard",
            prefix=(*start, str(wrapper))) as dashboard:
        koi.start()
        done = koi.koitab("-d", "new", dashboard.url,
                          stdin=dashboard.founding_token())
        assert done.code == 0, done
        koi.run("it")
        wait_until(lambda: dashboard.rows(
            "select state from runs") == [("done",)], 30,
            f"the run to arrive\n{koi.log()}\n{dashboard.log()}")
        assert koi.koitab("status").code == 0
        dashboard.assert_no_bugs()


def test_a_job_has_its_session_signals_and_descriptors(koi):
    koi.tab('"it" @manual trap; ls /dev/fd/ 2>&1; ps -o sid= -p $$ 2>&1; '
            'kill -TERM $$; echo ignored\n')
    koi.start()
    _, out, _, end = koi.run("it")
    assert (end["signal"], b"ignored" in out) == (signal.SIGTERM, False)


@pytest.mark.parametrize("bug", ["NotImplementedError", "MemoryError",
                                 "AttributeError", "UnicodeEncodeError("
                                 "'utf-8', 'x', 0, 1, 'why')"])
@pytest.mark.parametrize("where", ["start_session", "drop_privileges"])
def test_any_exception_makes_a_run_unstartable(tmp_path, where, bug):
    koi = support.Koi(tmp_path)
    koi.patch = (f"def fail(*_args, **_named):\n    raise {bug}\n"
                 f"assert k.{where}\nk.{where} = fail\n")
    koi.tab('"it" @manual echo hi\n')
    koi.start()
    try:
        row = koi.end_of(koi.launch("it"))
        assert row["state"] == "unstartable"
        assert re.search(r"failed to start: [\w']", row["reason"])
        assert koi.unfinished() == []
    finally:
        koi.stop()


def test_a_run_without_a_lock_is_adopted_on_linux(tmp_path):
    """An earlier koid started it, or the file system has no locks: the
    supervisor's PID and its start are known anyway."""
    koi = support.Koi(tmp_path)
    koi.patch = "assert k.is_supervised\nk.is_supervised = lambda *_: False\n"
    koi.tab('"it" @manual sleep 600\n')
    koi.start()
    try:
        run = koi.launch("it")
        koi.running(run)
        koi.stop(signal.SIGKILL)
        koi.start()
        koi.ask("kill", run=run)
        assert koi.end_of(run)["signal"] == signal.SIGTERM
    finally:
        koi.stop()
        koi.end_jobs()

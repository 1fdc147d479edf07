"""Whatever goes wrong around one task is the failure of that task alone."""

from __future__ import annotations

import json
import os
import signal

import pytest

import servers
import support


def test_storage_that_vanishes_fails_only_the_task_that_wants_space_there(
        scratch):
    scratch.storage("out")
    scratch.task("a", 'rmdir "$OUT_DIR"')
    scratch.task("b", "echo b", minFree={"out": "1K"})
    scratch.task("c", "echo c", needs=["b"])
    scratch.task("d", "echo d")
    result = scratch.mission("run")
    assert result.code == 1
    assert scratch.outcomes() == {"a": "ok", "b": "failed", "c": "skipped",
                                  "d": "ok"}
    assert "fault in mission" not in result.out + result.err


def test_parallel_task_runs_though_its_neighbour_cannot_start(scratch):
    scratch.storage("out")
    scratch.task("z", 'rmdir "$OUT_DIR"')
    scratch.task("x", "echo x", parallel="g")
    scratch.task("y", "echo y", parallel="g", minFree={"out": "1K"})
    scratch.mission("run")
    assert scratch.outcomes() == {"z": "ok", "x": "ok", "y": "failed"}


@support.root_only
def test_account_that_vanishes_fails_its_task_and_orphans_no_other(scratch):
    mark = scratch.folder / "gone"
    scratch.patch(f"""
        import os
        found = k.account_of
        k.account_of = lambda user: None if user == "daemon" \\
            and os.path.exists({str(mark)!r}) else found(user)
        """)
    scratch.task("z", f"touch '{mark}'")
    scratch.task("x", "sleep 0.3; exit 1", parallel="g")
    scratch.task("y", "echo y", parallel="g", user="daemon")
    scratch.task("after", "echo after", needs=["x"])
    result = scratch.mission("run")
    assert scratch.outcomes() == {"z": "ok", "x": "failed", "y": "failed",
                                  "after": "skipped"}
    assert 'unknown user "daemon"' in result.out


def test_bug_in_reading_the_output_of_a_task_does_not_orphan_it(scratch):
    scratch.patch("""
        def fail(*_): raise ZeroDivisionError("a bug")
        k.OutputDecoder.take = fail
        """)
    scratch.task("x", 'echo x; sleep 0.3; echo y >> "$TASKS_DIR/done"')
    scratch.task("z", "echo z")
    result = scratch.mission("run")
    assert result.code == 1
    assert (scratch.tasks / "done").exists()
    assert set(scratch.outcomes().values()) == {"failed"}
    assert "a bug" in result.out


# --- what fails after the tasks ---------------------------------------------


def test_run_whose_history_cannot_grow_is_not_reported_as_killed(scratch):
    scratch.task("a", "echo a")
    assert scratch.mission("run").code == 0
    before = len(scratch.history())
    full = """
        import os
        def fail(*_): raise OSError(28, "No space left on device")
        k.StateDirectory.add_to_history = fail
        """
    patches = list(scratch.patches)
    scratch.patch(full)
    result = scratch.mission("run")
    assert result.code == 74
    assert "history" in result.err
    shown = json.loads(scratch.mission("history", "--json").out)
    assert [run["verdict"] for run in shown] == ["ok", "trouble"]
    scratch.patches = patches
    result = scratch.mission("run")
    assert result.code == 0, result
    assert [run["verdict"] for run in scratch.history()[before:]] == [
        "trouble", "ok"]


@pytest.fixture
def served():
    """A monitor for pings: the paths that were requested."""
    with servers.Web() as server:
        yield server


def test_success_ping_is_not_sent_when_the_metrics_cannot_be_written(
        scratch, served):
    scratch.task("a", "echo a")
    scratch.config["ping"] = {"enabled": True, "endpoint": served.url}
    scratch.config["metrics"] = {"textfile": "/nonexistent/x.prom"}
    result = scratch.headless()
    assert result.code == 74
    assert served.asked() == []
    assert scratch.history()[-1]["verdict"] == "trouble"


def test_full_temporary_directory_does_not_keep_mail_from_going_out(scratch):
    mails = scratch.keep_mail(start=False)
    scratch.task("a", "echo a")
    scratch.patch("""
        import tempfile
        def fail(*_, **__): raise FileNotFoundError(2, "No usable directory")
        tempfile.TemporaryFile = tempfile.mkstemp = fail
        """)
    assert scratch.headless().code == 0
    assert len(list(mails.iterdir())) == 1


# --- metrics ---------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["run"], ["run", "-t", "good"], ["run", "--headless", "-t", "good"]])
def test_partial_or_manual_run_does_not_touch_the_metrics(scratch, arguments):
    textfile = scratch.folder / "m.prom"
    scratch.config["metrics"] = {"textfile": str(textfile)}
    scratch.task("bad", "exit 1")
    scratch.task("good", "echo hi")
    assert scratch.headless().code == 1
    before = textfile.read_text()
    assert f'mission_run_success{{config="{scratch.path}"}} 0' in before
    scratch.mission(*arguments)
    assert textfile.read_text() == before


# --- how a run is started ---------------------------------------------------


def test_reader_that_closes_the_pipe_does_not_end_the_run(scratch):
    scratch.task("a", "seq 100000")
    scratch.task("b", "echo b")
    read, write = os.pipe()
    process = scratch.start("run", stdout=write, stderr=write)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(60) == 0
    assert scratch.outcomes() == {"a": "ok", "b": "ok"}
    assert scratch.mission("run").code == 0


def test_run_under_nohup_ignores_a_hangup(scratch):
    scratch.task("a", 'kill -HUP $PPID; echo a')
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = scratch.mission("run")
    finally:
        signal.signal(signal.SIGHUP, old)
    assert result.code == 0, result


def test_umask_of_a_run_is_not_that_of_the_caller(scratch):
    out = scratch.storage("out")
    scratch.task("a", 'date > "$OUT_DIR/f"; umask')
    old = os.umask(0)
    try:
        result = scratch.mission("run")
    finally:
        os.umask(old)
    assert "0022" in result.out
    assert (out / "f").stat().st_mode & 0o777 == 0o644

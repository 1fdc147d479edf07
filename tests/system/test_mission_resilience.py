"""Whatever goes wrong around one task is the failure of that task alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import servers
import support


def test_vanished_storage_fails_only_the_task_that_requires_space_there(
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
    assert "internal error" not in result.out + result.err


def test_parallel_task_runs_though_its_neighbour_cannot_start(scratch):
    scratch.storage("out")
    scratch.task("z", 'rmdir "$OUT_DIR"')
    scratch.task("x", "echo x", parallel="g")
    scratch.task("y", "echo y", parallel="g", minFree={"out": "1K"})
    scratch.task("needs-y", "echo", parallel="g2", needs=["y"])
    scratch.task("fails", "exit 1", parallel="g2", retries=1)
    result = scratch.mission("run")
    assert scratch.outcomes() == {"z": "ok", "x": "ok", "y": "failed",
                                  "needs-y": "skipped", "fails": "failed"}
    for line in ("] ERROR: y: ", "] WARN: needs-y: skipped, because y",
                 "] fails: attempt 1 of 2 failed", "] ERROR: fails: exit"):
        assert line in result.out, result


@support.root_only
def test_account_that_vanishes_fails_its_task_and_orphans_no_other(scratch):
    scratch.open_to_others()
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
    assert 'user "daemon" does not exist' in result.out


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


# --- what fails after the tasks --------------------------------------------


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
    assert [run["result"] for run in shown] == ["ok", "undelivered"]
    status = scratch.mission("status")
    assert (status.code, status.err) == (1, ""), status
    scratch.patches = patches
    result = scratch.mission("run")
    assert result.code == 0, result
    assert [run["result"] for run in scratch.history()[before:]] == [
        "undelivered", "ok"]


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
    assert scratch.history()[-1]["result"] == "undelivered"


def test_mail_is_sent_with_a_full_temporary_directory(scratch):
    mails = scratch.keep_mail(start=False)
    scratch.task("a", "echo a")
    scratch.patch("""
        import tempfile
        def fail(*_, **__): raise FileNotFoundError(2, "No usable directory")
        tempfile.TemporaryFile = tempfile.mkstemp = fail
        """)
    assert scratch.headless().code == 0
    assert len(list(mails.iterdir())) == 1


# --- what is wrong, and what a run does --------------------------------------
# `check` reports each of these; a run is made without what cannot be used.


def alarmed(scratch, served) -> None:
    """A task that runs, mail, and pings of success and failure."""
    scratch.mails = scratch.keep_mail(start=False)
    scratch.task("a", 'echo a; echo a >> "$TASKS_DIR/ran"')
    scratch.config["ping"] = {"enabled": True, "endpoint": served.url,
                              "fail": True}


def mails_of(scratch) -> list[str]:
    return [path.read_text() for path in sorted(scratch.mails.iterdir())]


UNDELIVERED = {
    "CA of the pings": lambda config: config["ping"].update(
        caFile="/nonexistent/ca.pem"),
    "endpoint": lambda config: config["ping"].update(endpoint="nonsense"),
    "passBin": lambda config: config.update(passBin="/nonexistent/pass"),
    "mail address": lambda config: config["user"].update(email="nonsense"),
    "SMTP host": lambda config: config.update(mail={
        "enabled": True, "type": "smtp", "start": False}),
    "metrics directory": lambda config: config.update(metrics={
        "textfile": "/nonexistent/x.prom"}),
    "filter": lambda config: config.update(filters=["secret", "(unclosed"]),
}


@pytest.mark.parametrize("mistake", UNDELIVERED)
def test_impossible_delivery_stops_no_task_and_is_exit_status_74(
        scratch, served, mistake):
    alarmed(scratch, served)
    UNDELIVERED[mistake](scratch.config)
    checked = scratch.mission("check")
    assert checked.code == 78 and len(checked.err.splitlines()) == 2, checked
    result = scratch.headless()
    assert result.code == 74, result
    assert (scratch.tasks / "ran").exists()
    assert served.asked() == []         # neither success nor failure
    assert scratch.history()[-1]["result"] == "undelivered"


def test_missing_sendmail_stops_no_task_and_the_mail_waits(scratch, served):
    alarmed(scratch, served)
    scratch.patch("""
        found = k.find_program
        k.find_program = lambda name: None if name == "sendmail" \\
            else found(name)
        """)
    assert "sendmail is not in PATH" in scratch.mission("check").err
    result = scratch.headless()
    assert result.code == 74, result
    assert len(scratch.outbox()) == 1


def test_missing_notify_send_is_a_line_in_the_log(scratch, served):
    alarmed(scratch, served)
    scratch.config["notify"] = {"enabled": True}
    scratch.patch("""
        found = k.find_program
        k.find_program = lambda name: None if name == "notify-send" \\
            else found(name)
        """)
    assert "notify-send is not installed" in scratch.mission("check").err
    assert scratch.headless().code == 0
    assert "NotifyFailure" in scratch.log()


def test_invalid_filter_keeps_the_log_out_of_mail_and_ping(scratch, served):
    alarmed(scratch, served)
    scratch.task("b", "echo the-secret")
    scratch.config["ping"]["log"] = True
    scratch.config["filters"] = ["the-secret", "(unclosed"]
    scratch.task("c", "exit 1")
    assert scratch.headless().code == 1
    (mail,) = mails_of(scratch)
    assert "the-secret" in scratch.log()
    assert "the-secret" not in mail and "a filter is invalid" in mail
    assert served.asked() == ["GET /check/fail"]    # not POST with the log


@pytest.mark.parametrize("options", [
    pytest.param({"chown": True}, marks=support.root_only),
    {"commit": True}, {}])
def test_missing_storage_is_an_error_only_of_its_housekeeping(
        scratch, served, options):
    alarmed(scratch, served)
    out = scratch.storage("out", **options)
    out.rmdir()
    assert "does not exist" in scratch.mission("check").err
    result = scratch.headless()
    assert scratch.outcomes() == {"a": "ok"}
    assert result.code == (1 if options else 0), result
    (mail,) = mails_of(scratch)
    assert ("does not exist" in mail) == bool(options)


def test_commit_without_a_repository_is_an_error_of_housekeeping(
        scratch, served):
    alarmed(scratch, served)
    scratch.storage("out", commit=True)
    assert "is not a git repository" in scratch.mission("check").err
    assert scratch.headless().code == 1
    assert scratch.outcomes() == {"a": "ok"}
    assert "is not a git repository" in scratch.log()


@support.root_only
def test_chown_of_a_directory_of_the_system_is_refused_and_tasks_run(
        scratch, served):
    alarmed(scratch, served)
    scratch.config["storage"]["out"] = {"path": "/usr/share", "chown": True}
    scratch.patch("""
        def fail(*_, **__): raise SystemExit("chown")
        k.chown_tree = fail
        """)
    assert scratch.headless().code == 1
    assert "is a system directory" in scratch.log()
    assert scratch.outcomes() == {"a": "ok"}


def test_only_the_task_of_an_unknown_user_fails(scratch, served):
    alarmed(scratch, served)
    scratch.task("b", "echo b", user="nosuchuser")
    assert "nosuchuser" in scratch.mission("check").err
    assert scratch.headless().code == 1
    assert scratch.outcomes() == {"a": "ok", "b": "failed"}


@support.root_only
def test_error_of_a_program_on_a_noexec_mount_names_the_mount(scratch, host):
    scratch.host = host
    scratch.task("a", "echo a")
    host.setup.append(f"mount --bind '{scratch.tasks}' '{scratch.tasks}' && "
                      f"mount -o remount,bind,noexec '{scratch.tasks}'")
    result = scratch.mission("check")
    assert "is on a file system mounted noexec" in result.err, result


def test_timeout_of_zero_is_an_error(scratch):
    scratch.task("a", "echo a", timeout="0s")
    assert "above zero" in scratch.mission("check").err


# --- a run that cannot start -------------------------------------------------


IMPOSSIBLE = {
    "unknown key": lambda config: config.update(nonsense=1),
    "wrong type": lambda config: config.update(passBin=1),
    "unknown user": lambda config: config["user"].update(name="nosuchuser"),
    "redact": lambda config: config.update(redact=["(unclosed"]),
    "needs": lambda config: config["tasks"][0].update(needs=["nosuch"]),
}


@pytest.mark.parametrize("mistake", IMPOSSIBLE)
def test_run_that_cannot_begin_sends_the_failure_mail_and_ping(
        scratch, served, mistake):
    alarmed(scratch, served)
    IMPOSSIBLE[mistake](scratch.config)
    result = scratch.headless()
    assert result.code == 78, result
    assert not (scratch.tasks / "ran").exists()
    (mail,) = mails_of(scratch)
    assert "[FAILURE]" in mail and "could not start" in mail
    assert result.err.splitlines()[0].split(": ")[1] in mail
    assert "/fail" in served.asked()[0]
    assert scratch.mission("run").code == 78        # by hand: stderr says it
    assert len(mails_of(scratch)) == len(served.asked()) == 1


@pytest.mark.parametrize("section", ["mail", "ping"])
def test_alert_is_sent_without_the_sections_that_are_invalid(
        scratch, served, section):
    alarmed(scratch, served)
    scratch.config[section]["nonsense"] = 1
    assert scratch.headless().code == 78
    assert len(mails_of(scratch)) == (section == "ping")
    assert len(served.asked()) == (section == "mail")


def test_alert_fetches_no_password(scratch, served):
    alarmed(scratch, served)
    scratch.fake_pass("touch asked; echo secret")
    scratch.config["mail"] = {"enabled": True, "type": "smtp", "smtp": {
        "host": "127.0.0.1", "port": 9, "user": "u", "passName": "p"}}
    scratch.config["nonsense"] = 1
    assert scratch.headless().code == 78
    assert not list(scratch.folder.rglob("asked"))
    assert "/fail" in served.asked()[0]


@pytest.mark.parametrize("change, mails, pings", [
    ({"mail": {"on": "never"}}, 0, 1), ({"ping": {"fail": False}}, 1, 0),
    ({"mail": {"on": "failure"}}, 1, 1)])
def test_alert_follows_ping_fail_and_mail_on(
        scratch, served, change, mails, pings):
    alarmed(scratch, served)
    for section, values in change.items():
        scratch.config[section].update(values)
    scratch.config["nonsense"] = 1
    assert scratch.headless().code == 78
    assert (len(mails_of(scratch)), len(served.asked())) == (mails, pings)


def test_lock_that_is_held_alerts_once_for_each_holder(scratch, served):
    alarmed(scratch, served)
    gate = scratch.folder / "gate"
    os.mkfifo(gate)
    for holder in (1, 2):
        scratch.config["tasks"] = []
        scratch.task("b", f'touch "$TASKS_DIR/held{holder}"; '
                     'read x < "$GATE"', env={"GATE": str(gate)})
        process = scratch.start("run")
        support.wait_until((scratch.tasks / f"held{holder}").exists, 20,
                           "the holder")
        for _ in range(2):
            result = scratch.headless(write=False)
            assert result.code == 75 and f"pid {process.pid}" in result.err
        assert len(mails_of(scratch)) == len(served.asked()) == holder
        gate.write_text("go\n")
        assert support.ended(process).code == 0
    assert "another run is active" in mails_of(scratch)[0]


@support.root_only
def test_untrusted_configuration_is_used_for_nothing(scratch, served):
    alarmed(scratch, served)
    syslog = scratch.folder / "syslog"
    scratch.patch(f"""
        import syslog
        def log(_level, text):
            with open({str(syslog)!r}, "a") as file: file.write(text)
        syslog.syslog = log
        """)
    scratch.config["nonsense"] = 1
    scratch.write()
    scratch.path.chmod(0o666)
    result = scratch.headless(write=False)
    assert result.code == 78
    line, hint = result.err.splitlines()
    assert "is writable by everyone" in line
    assert hint == f"mission: hint: chmod o-w {scratch.path}"
    assert "is writable by everyone" in syslog.read_text()
    assert mails_of(scratch) == served.asked() == []
    assert not scratch.state.exists() or scratch.history() == []


# --- the lock ----------------------------------------------------------------


def test_variables_do_not_change_the_path_of_the_lock(scratch, tmp_path):
    scratch.patches.remove(support.LOCK_IN_STATE)
    homes = [tmp_path / "one", tmp_path / "two"]
    gate = scratch.folder / "gate"
    os.mkfifo(gate)
    mark = scratch.folder / "mark"
    scratch.task("a", f'touch "{mark}"; read x < "{gate}"')
    if not support.AS_ROOT:     # the account's home, but not that of a person
        scratch.patch(f"""
            found = k.account_of
            k.account_of = lambda user: found(user).replace(
                home={str(scratch.home)!r})
            """)
    scratch.env.update(XDG_STATE_HOME=str(homes[0]), HOME=str(homes[0]),
                       MISSION_STATE=str(homes[0]))
    process = scratch.start("run")
    support.wait_until(mark.exists, 20, "the task")
    scratch.env.update(XDG_STATE_HOME=str(homes[1]), HOME=str(homes[1]),
                       MISSION_STATE=str(homes[1]))
    result = scratch.mission("run", write=False)
    assert result.code == 75 and f"pid {process.pid}" in result.err, result
    gate.write_text("go\n")
    assert support.ended(process).code == 0
    lock = support.load("mission").lock_home() if support.AS_ROOT else ""
    for path in Path(lock).glob(f"{scratch.path.name[:14]}*") if lock else ():
        shutil.rmtree(path)


def test_relative_paths_start_from_the_target_of_a_symbolic_link(
        scratch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    scratch.config["storage"]["tasks"]["path"] = "tasks"
    scratch.task("a", "echo a")
    scratch.write()
    link = elsewhere / "m.json"
    link.symlink_to(scratch.path)
    scratch.path = link
    result = scratch.mission("run", write=False)
    assert result.code == 0, result
    assert json.loads(scratch.mission("dump", write=False).out)[
        "storage"]["tasks"]["path"] == str(scratch.tasks)

# --- metrics --------------------------------------------------------------


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


# --- how a run is started --------------------------------------------------


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


def test_run_does_not_inherit_the_umask_of_the_caller(scratch):
    out = scratch.storage("out")
    scratch.task("a", 'date > "$OUT_DIR/f"; umask')
    old = os.umask(0)
    try:
        result = scratch.mission("run")
    finally:
        os.umask(old)
    assert "0022" in result.out
    assert (out / "f").stat().st_mode & 0o777 == 0o644

"""Exit statuses of tasks that are not failures, and `mission status`."""

from __future__ import annotations

import json

import pytest

import support

mission = support.load("mission")


def mails(folder) -> list[str]:
    return sorted(path.read_text() for path in folder.iterdir())


def test_ok_status_is_a_success(scratch):
    scratch.task("rsync", "exit 24", okStatuses=[24], retries=3)
    scratch.task("after", "echo after", needs=["rsync"])
    result = scratch.headless()
    assert (result.code, result.err) == (0, "")
    assert scratch.outcomes() == {"rsync": "ok", "after": "ok"}
    assert "TaskFinish rsync: exit 24" in scratch.log()


def test_warn_status_is_a_success_with_a_notice(scratch):
    folder = scratch.keep_mail(start=False)
    scratch.task("borg", "exit 1", warnStatuses=[1], retries=3)
    scratch.task("after", "echo after", needs=["borg"])
    result = scratch.headless()
    assert (result.code, result.err) == (0, "")
    assert scratch.outcomes() == {"borg": "ok", "after": "ok"}
    mail, = mails(folder)
    assert "[WARNING] run finished" in mail
    assert "borg: exit status 1" in scratch.log()
    status = scratch.mission("status")
    assert status.code == 1 and status.err == ""
    assert status.out.startswith("WARNING: ") and "borg" in status.out


def test_skip_status_is_neither_success_nor_failure_and_skips_dependents(
        scratch):
    scratch.task("laptop", "exit 75", skipStatuses=[75], retries=3)
    scratch.task("after", "echo after", needs=["laptop"])
    scratch.task("last", "echo last", needs=["after"])
    result = scratch.headless()
    assert (result.code, result.err) == (0, "")
    assert scratch.outcomes() == {"laptop": "skipped", "after": "skipped",
                                  "last": "skipped"}


def test_skip_status_has_no_metric_of_success_or_failure(scratch):
    textfile = scratch.folder / "m.prom"
    scratch.config["metrics"] = {"textfile": str(textfile)}
    scratch.task("laptop", "exit 75", skipStatuses=[75])
    scratch.task("after", "echo after", needs=["laptop"])
    scratch.task("bad", "exit 1")
    scratch.task("blocked", "echo blocked", needs=["bad"])
    assert scratch.headless().code == 1
    assert [line for line in textfile.read_text().splitlines()
            if line.startswith("mission_task_success{")] == [
        f'mission_task_success{{config="{scratch.path}",task="{slug}"}} 0'
        for slug in ("bad", "blocked")]


def test_other_statuses_and_time_limits_stay_failures(scratch):
    scratch.task("other", "exit 2", okStatuses=[24], warnStatuses=[1],
                 skipStatuses=[75])
    scratch.task("slow", "trap 'exit 24' TERM; sleep 60 & wait", timeout="1s",
                 okStatuses=[24])
    assert scratch.headless().code == 1
    assert scratch.outcomes() == {"other": "failed", "slow": "failed"}


@pytest.mark.parametrize("lists, word", [
    ({"okStatuses": [1], "warnStatuses": [1]}, "warnStatuses"),
    ({"warnStatuses": [3], "skipStatuses": [2, 3]}, "skipStatuses"),
    ({"okStatuses": [0]}, "okStatuses"), ({"okStatuses": [256]}, "okSt"),
    ({"okStatuses": [True]}, "okSt"), ({"skipStatuses": 75}, "skipSt"),
])
def test_check_refuses_statuses_in_two_lists_or_out_of_range(scratch, lists,
                                                             word):
    scratch.task("a", "true", **lists)
    result = scratch.mission("check")
    assert result.code == 78 and f"tasks[0].{word}" in result.err


# --- mission status -------------------------------------------------------


def test_status_follows_the_last_complete_run(scratch):
    scratch.task("good", "echo good")
    run = scratch.task("bad", "exit 1")
    assert scratch.mission("status").code == 3          # no run yet
    scratch.headless()
    result = scratch.mission("status")
    assert (result.code, result.err) == (2, "")
    assert result.out.startswith("CRITICAL: ") and "bad" in result.out
    scratch.headless("-t", "good")      # a partial run does not end it
    assert scratch.mission("status").code == 2
    run.write_text("#!/bin/sh\n")
    scratch.headless("-t", "bad")       # the failed task has succeeded since
    result = scratch.mission("status", "--max-age", "26h")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("OK: ")
    found = json.loads(scratch.mission("status", "--json").out)
    assert found["status"] == 0 and found["reasons"] == []


@pytest.mark.parametrize("words", [
    ["status", "--max-age", "soon"], ["status", "--frob"], ["status", "x"],
    ["--headless", "status"]])
def test_status_of_wrong_usage_is_unknown_on_stdout(scratch, words):
    scratch.task("a", "true")
    result = scratch.mission(*words)
    assert (result.code, result.err) == (3, "")
    assert result.out.startswith("UNKNOWN: ") and result.out.count("\n") == 1


def test_status_is_unknown_when_the_state_cannot_be_read(scratch):
    scratch.task("a", "echo a")
    assert scratch.headless().code == 0
    state, = scratch.state.iterdir()
    (state / "current.json").write_text('{"id": "x", "phase": "tasks"}')
    (state / "lock").unlink()
    (state / "lock").mkdir()
    result = scratch.mission("status")
    assert (result.code, result.err) == (3, "")
    assert result.out.startswith("UNKNOWN: ")


def test_status_of_an_invalid_configuration_is_unknown(scratch):
    scratch.task("a", "true")
    scratch.headless()
    scratch.config["typo"] = 1
    result = scratch.mission("status")
    assert (result.code, result.err) == (3, "")
    assert "typo" in result.out and "UNKNOWN" in result.out


def run(result="ok", at=1000.0, partial=False, **tasks) -> dict:
    return mission.past_run(
        {**mission.RUN_IN_PROGRESS, "id": str(at), "started": at}, result,
        seconds=10.0,
        partial=partial, tasks=[
            {"slug": slug, "outcome": outcome.rstrip("!"), "seconds": 1.0,
             "attempts": 1, "notice": "exit status 1" if outcome.endswith("!")
             else ""} for slug, outcome in tasks.items()])


@pytest.mark.parametrize("runs, max_age, expected", [
    ([run(a="ok", b="ok")], None, 0),
    ([run(a="ok", b="ok")], 100.0, 0),
    ([run(a="ok", b="ok")], 80.0, 2),               # too old
    ([run(a="ok", b="ok", at=2000.0)], 80.0, 1),    # the clock was set back
    ([run(a="ok", b="ok", at=2000.0)], None, 0),
    ([run("failed", a="ok", b="failed")], None, 2),
    ([run("failed", a="ok", b="ok")], None, 2),     # housekeeping
    ([run("undelivered", a="ok", b="ok")], None, 1),
    ([run(a="ok!", b="ok")], None, 1),
    ([run(a="ok", b="ok"), run("lost", 1050.0)], None, 2),
    ([run("lost"), run(a="ok", b="ok", at=1050.0)], None, 0),
    ([run(a="ok", b="ok"), run("running", 1050.0)], None, 0),
    ([run("stopped", a="ok", b="skipped")], None, 2),
    ([run("failed", a="failed", b="ok"),
      run(at=1050.0, partial=True, a="ok")], None, 0),
    ([run(a="ok", b="ok"), run("failed", 1050.0, True, a="failed")], None, 2),
    ([run(a="ok", b="ok"), run(at=1050.0, a="ok", b="skipped")], None, 0),
    ([run(a="ok", b="ok"), run(at=1050.0, a="ok", b="skipped")], 80.0, 2),
    ([run(a="ok")], None, 1),                       # b has not run yet
    ([run(at=1000.0, partial=True, a="ok", b="ok")], None, 3),
    ([], None, 3),
])
def test_health_is_determined_by_the_history(runs, max_age, expected):
    status, reasons = mission.health(["a", "b"], runs, max_age, 1100.0)
    assert status == expected, reasons
    assert bool(reasons) == (expected != 0)

"""Defaults of tasks, the limit of a whole run, and storages that a task
needs."""

from __future__ import annotations

import json

import pytest


def test_defaults_apply_to_tasks_without_their_own_values(scratch):
    scratch.config["defaults"] = {"timeout": "2h", "retries": 2, "nice": 5,
                                  "retryDelay": "1s", "env": {"A": "default"}}
    scratch.task("plain", "true")
    scratch.task("own", "true", timeout="5m", retries=0, nice=0,
                 env={"B": "own"})
    found = json.loads(scratch.mission("dump").out)
    plain, own = found["tasks"]
    assert {key: plain[key] for key in scratch.config["defaults"]} \
        == {**scratch.config["defaults"], "timeout": "2h0m0s"}
    assert (own["timeout"], own["retries"], own["nice"]) == ("5m0s", 0, 0)
    assert own["env"] == {"B": "own"} and own["retryDelay"] == "1s"
    (scratch.folder / "again.json").write_text(json.dumps(found))
    again = scratch.mission("-c", str(scratch.folder / "again.json"), "dump")
    assert json.loads(again.out) == found


def test_check_reports_an_invalid_default_once(scratch):
    scratch.config["defaults"] = {"retries": -1, "timout": "1s"}
    scratch.task("a", "true")
    scratch.task("b", "true")
    result = scratch.mission("check")
    assert result.code == 78
    assert "defaults.retries: invalid value -1 (expected" in result.err
    assert "defaults.timout: unknown key (did you mean timeout?)" in result.err
    assert "2 errors" in result.err


def test_run_timeout_stops_the_running_task_and_skips_the_rest(scratch):
    out = scratch.storage("out", chown=True)
    (out / "file").write_text("x")
    scratch.config["runTimeout"] = "1s"
    scratch.task("slow", "sleep 60", retries=5)
    scratch.task("rest", "echo never")
    scratch.task("last", "echo never", post=True)
    result = scratch.mission("run", timeout=30)
    assert result.code == 1
    assert scratch.outcomes() == {"slow": "failed", "rest": "skipped",
                                  "last": "skipped"}
    assert "time limit of 1s for the run reached" in result.out
    assert "Chown" not in result.out


def test_check_refuses_a_limit_of_zero(scratch):
    scratch.config["runTimeout"] = "0s"
    scratch.task("a", "true", timeout="0s")
    result = scratch.mission("check")
    assert result.code == 78
    assert "runTimeout" in result.err and "tasks[0].timeout" in result.err


def test_task_fails_if_a_storage_it_needs_is_missing(scratch):
    scratch.config["storage"]["disk"] = {"path": str(scratch.folder / "disk")}
    scratch.task("needs-it", "echo never", storages=["disk"])
    scratch.task("other", "echo ran")
    result = scratch.mission("run")
    assert result.code == 1
    assert scratch.outcomes() == {"needs-it": "failed", "other": "ok"}
    assert "disk does not exist" in result.out


def test_mounted_storage_must_be_a_mount_point_for_every_task(scratch):
    out = scratch.storage("disk", mounted=True, chown=True)
    (out / "file").write_text("x")
    scratch.task("mounts-it", "echo ran", storages=[])
    scratch.task("plain", "echo never")
    scratch.task("listed", "echo ran", storages=["logs"])
    result = scratch.mission("run")
    assert result.code == 1
    assert scratch.outcomes() == {"mounts-it": "ok", "plain": "failed",
                                  "listed": "ok"}
    assert f"{out} is not mounted" in result.out
    assert "chownFiles: " in result.out


@pytest.mark.root_only
def test_storage_mounted_by_a_task_is_used_by_later_tasks(host, alice):
    out = alice.storage("disk", mounted=True, chown=True)
    alice.task("mount", f"mount -t tmpfs -o mode=755 tmpfs {out}",
               storages=[])
    alice.task("backup", 'echo x > "$DISK_DIR/file"', needs=["mount"])
    result = alice.mission("run")
    assert (result.code, result.err) == (0, ""), result.out


def test_check_refuses_an_unknown_storage_of_a_task(scratch):
    scratch.task("a", "true", storages=["lgs"])
    result = scratch.mission("check")
    assert result.code == 78
    assert ("tasks[0].storages.lgs: unknown storage (did you mean logs?)"
            in result.err)

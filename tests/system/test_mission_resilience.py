"""Whatever goes wrong around one task is the failure of that task alone."""

from __future__ import annotations

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

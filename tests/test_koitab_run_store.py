"""RunStore: the history survives a power cut, a full disk and damage."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import support

koitab = support.load("koitab")
TAB = '''[Night]
"Backup" 0 3 * * * backup
@hourly crawl
'''
BACKUP, CRAWL = koitab.parse_tab(TAB).jobs


def store_at(path, writing: bool = True):
    store = koitab.RunStore(str(path), writing)
    store.moved = store.open()
    return store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.db"


@pytest.fixture
def store(path):
    return store_at(path)


def whose(job) -> tuple[str, str]:
    return "alice", koitab.storable("\0".join(job.identity()))


def add(store, state: str = "done", job=BACKUP, **fields) -> int:
    """Add a run, as koid does; its number."""
    key = store.job_key(whose(job), job)
    store.last += 1
    statements = [store.insert({"id": store.last, "job": key, "state": state,
                           "trigger": "schedule", **fields})]
    if state == "done":
        statements.append(("insert into output values (?, ?)",
                      (store.last, b"output %d" % store.last)))
    store.write(statements)
    return store.last


def numbers(store) -> list[int]:
    return [run["run"] for run in store.runs("1 order by r.id")]


# ==========================================================================
# What is written
# ==========================================================================

def test_history_syncs_every_commit_to_disk(store):
    assert store.db.value("pragma journal_mode") == "wal"
    assert store.db.value("pragma synchronous") == 2         # FULL


def test_history_is_accessible_to_its_owner_only(store, path):
    assert support.mode(path) == 0o600
    add(store)
    assert {support.mode(file) for file in path.parent.glob("history.db*")
            } == {0o600}


def test_run_is_read_with_its_job(store):
    run = add(store, exit=3, due=1.5, started=2.5, ended=3.5, bytes=7,
              args='{"To": "bob"}', cut=1)
    assert store.runs("r.id = ?", run) == [{
        "run": run, "job": 1, "user": "alice", "section": "Night",
        "name": "Backup", "label": "Backup", "tag": BACKUP.tag,
        "identity": "name\0Night\0Backup", "trigger": "schedule",
        "state": "done", "due": 1.5, "requested_at": None, "started": 2.5,
        "ended": 3.5, "exit": 3, "signal": None, "reason": "",
        "args": {"To": "bob"}, "attempt": 1, "count": 1, "bytes": 7,
        "cut": True, "mail": "", "change": 1}]
    assert store.output(run) == b"output 1" and store.output(99) == b""


def test_run_is_updated_and_meta_values_are_replaced(store):
    run = add(store, "running")
    store.write([store.update(run, state="done", exit=0, reason="x'; drop"),
                 store.set_meta("boot", "one"), store.set_meta("boot", "two")])
    shown, = store.runs("1")
    assert (shown["state"], shown["reason"]) == ("done", "x'; drop")
    assert store.get_meta("boot") == "two" and store.get_meta("other") == ""


def test_statements_are_carried_out_together_or_not_at_all(store):
    run = add(store)
    with pytest.raises(koitab.Error):
        store.write([store.set_meta("a", "1"), store.insert({"id": run})])
    assert store.get_meta("a") == "" and not store.db.in_transaction


def test_job_keeps_its_number_permanently(store, path):
    add(store, job=BACKUP)
    add(store, job=CRAWL)
    add(store, job=BACKUP)
    assert [run["job"] for run in store.runs("1 order by r.id")] == [1, 2, 1]
    again = store_at(path)
    add(again, job=CRAWL)
    assert again.runs("r.id = 4")[0]["job"] == 2


def test_bytes_that_are_not_utf_8_are_stored_in_a_job(store):
    job, = koitab.parse_tab("@hourly echo \udcff\n").jobs
    add(store, job=job)
    assert store.runs("1")[0]["label"] == "echo \\udcff"


# ==========================================================================
# Numbers continue, old runs go
# ==========================================================================

def test_no_number_is_given_twice(store, path):
    for _ in range(5):
        add(store)
    store.write(store.prune(1, 2))
    assert numbers(store) == [4, 5]
    again = store_at(path)
    assert again.last == 5 and again.last_job == 1
    assert add(again) == 6


@pytest.mark.parametrize("keep, states, left", [
    (3, "ddddd", [3, 4, 5]),
    (1, "ddddd", [5]),
    (5, "ddddd", [1, 2, 3, 4, 5]),
    (9, "ddddd", [1, 2, 3, 4, 5]),
    (2, "rdddq", [1, 4, 5]),            # what is not over is never removed
    (1, "ddddr", [5]),
    (2, "msuid", [4, 5]),
])
def test_a_job_keeps_its_newest_runs(store, keep, states, left):
    names = {"d": "done", "r": "running", "q": "queued", "m": "missed",
             "s": "skipped", "u": "unstartable", "i": "interrupted"}
    for letter in states:
        add(store, names[letter])
    other = add(store, job=CRAWL)
    store.write(store.prune(1, keep))
    assert numbers(store) == [*left, other]
    for run in range(1, 6):
        assert bool(store.output(run)) == (
            run in left and states[run - 1] == "d")


# ==========================================================================
# Damage
# ==========================================================================

def garbage(path):
    path.write_bytes(os.urandom(20_000))


def empty(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2 + 100])


def a_page_of_noise(path):
    """In the middle: the first page is sound, and so it can be opened."""
    data = bytearray(path.read_bytes())
    data[3 * 4096:5 * 4096] = b"\xa5" * 8192
    path.write_bytes(data)


def a_leaf_of_noise(path):
    """Damage a page that contains only some of the runs."""
    data = bytearray(path.read_bytes())
    page = data.rindex(b"a reason a reason") // 4096 * 4096
    data[page:page + 4096] = b"\xa5" * 4096
    path.write_bytes(data)


def another_program(path):
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("create table runs (id integer)")
    db.commit()
    db.close()


def a_damaged_header(path):
    data = bytearray(path.read_bytes())
    data[0:16] = b"SQLite format 9\0"
    path.write_bytes(data)


def no_tables(path):
    db = sqlite3.connect(path)
    db.execute("drop table runs")
    db.commit()
    db.close()


DAMAGES = [garbage, empty, half, a_page_of_noise, a_leaf_of_noise,
           another_program, a_damaged_header, no_tables]


def filled(path) -> None:
    """A history of some pages, all in the one file."""
    store = store_at(path)
    for _ in range(200):
        add(store, reason="a reason " * 20)
    store.db.execute("pragma wal_checkpoint(truncate)")
    store.db.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_history_is_moved_aside_and_reported(path, damage):
    filled(path)
    damage(path)
    damaged = path.read_bytes()
    store = store_at(path)
    aside, = [file for file in path.parent.iterdir()
              if ".corrupt-" in file.name
              and not file.name.endswith(("-wal", "-shm"))]
    assert "the history was damaged" in store.moved
    assert str(aside) in store.moved
    assert aside.stat().st_size >= len(damaged)
    assert numbers(store) == [] and add(store) == 1
    store.db.close()
    assert store_at(path).moved == ""


def no_output(path):
    db = sqlite3.connect(path)
    db.execute("drop table output")
    db.commit()
    db.close()


def noise_in_the_output(path):
    db = sqlite3.connect(path)
    page, = db.execute("select rootpage from sqlite_master where "
                       "name = 'output'").fetchone()
    db.close()
    data = bytearray(path.read_bytes())
    data[(page - 1) * 4096:page * 4096] = b"\xa5" * 4096
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [no_output, noise_in_the_output])
def test_history_found_damaged_by_a_write_is_moved_aside_by_the_next_koid(
        path, damage):
    """What a run wrote is not looked through at each start. If it turns out
    to be damaged, koid may end, but it must not end again and again."""
    filled(path)
    damage(path)
    for _ in range(2):
        store = store_at(path)
        with contextlib.suppress(koitab.Error):
            add(store)
        store.db.close()
    store = store_at(path)
    assert add(store) and not store.waiting
    assert [file for file in path.parent.iterdir()
            if ".corrupt-" in file.name]


def test_two_damaged_histories_are_both_kept(path):
    for text in (b"one " * 100, b"two " * 100):
        path.write_bytes(text)
        store_at(path).db.close()
        for file in path.parent.glob("history.db*"):
            if "corrupt" not in file.name:
                file.unlink()
    kept = {file.read_bytes()[:4] for file in path.parent.glob("*corrupt*")}
    assert kept == {b"one ", b"two "}


def test_reader_does_not_move_a_damaged_history(path):
    garbage(path)
    before = path.read_bytes()
    with pytest.raises(koitab.Error, match="history.db"):
        store_at(path, writing=False)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["history.db"]


def test_reader_of_a_missing_history_finds_no_runs(path):
    assert numbers(store_at(path, writing=False)) == []
    assert not path.exists()


def test_history_of_a_newer_koi_is_refused_unchanged(path):
    filled(path)
    db = sqlite3.connect(path)
    db.execute("pragma user_version=99")
    db.close()
    with pytest.raises(koitab.Error) as error:
        store_at(path)
    assert "newer koi (schema 99)" in error.value.message
    assert error.value.hint
    assert not list(path.parent.glob("*corrupt*"))


def test_history_that_cannot_be_opened_is_an_error_and_unchanged(path):
    path.mkdir()
    with pytest.raises(koitab.Error, match="unable to open"):
        store_at(path)
    assert path.is_dir()


# ==========================================================================
# A full disk
# ==========================================================================

def fill(store) -> None:
    """From now on the file may not grow, as on a full disk."""
    count = store.db.value("pragma page_count")
    assert store.db.value(f"pragma max_page_count={count}") == count


def room(store) -> None:
    store.db.execute("pragma max_page_count=1000000")


def test_statements_wait_while_the_disk_is_full_and_are_written_later(store):
    add(store)
    fill(store)
    big = store.set_meta("big", "x" * 100_000)
    assert store.write([big]) is False
    assert "full" in store.problem
    assert store.write([store.set_meta("small", "y")]) is False
    assert store.get_meta("small") == ""       # in order, after the first
    assert not store.db.in_transaction
    room(store)
    assert store.write([]) is True
    assert (store.get_meta("big")[:1], store.get_meta("small")) == ("x", "y")
    assert store.problem == "" and not store.waiting


def test_newest_waiting_statements_are_kept(store, monkeypatch):
    monkeypatch.setattr(koitab, "MOST_WAITING", 10)
    fill(store)
    store.write([store.set_meta("big", "x" * 100_000)])
    for number in range(30):
        store.write([store.set_meta(f"n{number}", "y" * 100_000)])
    assert len(store.waiting) == 10
    room(store)
    store.write([])
    assert store.get_meta("n20") and not store.get_meta("n19")


def test_statements_wait_while_another_process_locks_the_history(store, path):
    store.db.execute("pragma busy_timeout=10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    assert store.write([store.set_meta("a", "1")]) is False
    assert "locked" in store.problem
    other.execute("rollback")
    assert store.write([]) is True and store.get_meta("a") == "1"


DRIVER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("koitab", sys.argv[1])
koitab = sys.modules["koitab"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(koitab)
store = koitab.RunStore(sys.argv[2] + "/history.db")
store.open()
ballast = sys.argv[2] + "/ballast"
with open(ballast, "wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError:
        pass
first = store.write([store.set_meta("big", "x" * 100_000)])
second = store.write([store.set_meta("small", "y")])
trouble = store.problem
os.unlink(ballast)
third = store.write([])
print(first, second, third, store.get_meta("small"),
      len(store.get_meta("big")))
print(trouble)
"""


@support.root_only
def test_history_survives_a_full_file_system(tmp_path):
    support.need("unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", 'mount -t tmpfs -o size=1m none "$1";'
         ' exec "$2" -c "$3" "$4" "$1"', "sh", str(disk), sys.executable,
         DRIVER, str(Path(koitab.__file__))], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=60)
    answers, error = done.stdout.decode().splitlines()
    assert answers == "False False True y 100000"
    assert "full" in error or "I/O" in error


def test_database_of_another_program_or_version_is_refused_unchanged(path):
    """The database of a dashboard, and a history of an older koi."""
    for pragma, words in (("application_id=7", "not a koi history"),
                          ("user_version=0", "an older koi")):
        path.unlink(missing_ok=True)
        filled(path)
        db = sqlite3.connect(path)
        db.execute(f"pragma {pragma}")
        db.close()
        before = path.read_bytes()
        with pytest.raises(koitab.Error, match=words) as error:
            store_at(path)
        assert str(path) in error.value.message
        assert f"mv {path} " in error.value.hint
        assert path.read_bytes() == before
        assert not list(path.parent.glob("*corrupt*"))

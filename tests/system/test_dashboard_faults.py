"""The dashboard's database: kills, full disks, damage, older copies."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dashboard_rig
import support
from dashboard_rig import HOST, InProcessDashboard, frames, piece

koitab = support.load("koitab")
TESTS = str(Path(dashboard_rig.__file__).parent)


pytestmark = pytest.mark.usefixtures("small_ballast")


# ==========================================================================
# kill -9
# ==========================================================================

# Writes records, outputs, pings and failures as fast as it can, and says
# on its standard output what was acknowledged.
WRITER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from dashboard_rig import (
    HOST, HOST_TOKEN, InProcessDashboard, frames, koitab, piece)
koitab.BALLAST, koitab.LEFT_WAITING = 65536, 1_000_000
dashboard = InProcessDashboard(sys.argv[2], koitab.Clock(), fresh=False,
                               durable=True)
access = dashboard.principal_of(HOST_TOKEN)
dashboard.change = dashboard.number = int(sys.argv[3])
key = dashboard.rows("select ping_key from dashboard")[0][0]
dashboard.dashboard.start()

def say(text):
    def then(result, error):
        os.write(1, (text if not error else f"error {error!r}").encode()
                 + b"\\n")
    return then

while True:
    data = frames(f"needle {dashboard.number + 1}\\n" * 20)
    for _ in range(5):
        record = dashboard.record(exit=dashboard.number % 2, size=len(data))
        dashboard.dashboard.write(
            dashboard.dashboard.host_sync.sync, access.host, {
            "v": 3, "host": HOST, "epoch": 1,
            "instance": "1-aaaaaaaa", "records": [record],
            "outputs": [piece(record["run"], 0, data)]},
            dashboard.now, then=say(f"run {record['run']}"))
        dashboard.dashboard.write(
            dashboard.dashboard.checks.ping, key, "beat",
            str(dashboard.number % 2),
            {"method": "GET"}, dashboard.now,
            then=say(f"ping {dashboard.number}"))
    dashboard.dashboard.do(lambda db: None)
"""


def test_acknowledged_writes_survive_any_kill(tmp_path):
    """Kills at random moments: each acknowledged run and ping is there
    once, what is there is whole, and no letter is there twice."""
    path, seed = tmp_path / "d.db", int(os.environ.get("SEED", "7"))
    dashboard = InProcessDashboard(path, koitab.Clock())
    dashboard.join()
    dashboard.channel()
    dashboard.ping(dashboard.state["dash"]["ping_key"], "beat", create=True)
    dashboard.dashboard.close()
    chance, acknowledged, number = random.Random(seed), set(), 0
    for _ in range(20 if support.FULL else 6):
        writer = subprocess.Popen(
            [sys.executable, "-B", "-c", WRITER, TESTS, str(path),
             str(number)], stdout=subprocess.PIPE)
        told = b"".join(writer.stdout.readline()
                        for _ in range(chance.randrange(40, 120)))
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.read()
        writer.stdout.close()
        writer.wait()
        said = told.decode().rpartition("\n")[0].splitlines()
        assert not [line for line in said if "error" in line]
        acknowledged.update(said)
        dashboard = InProcessDashboard(path, koitab.Clock(), fresh=False)
        kept = {n for n, in dashboard.rows("select n from runs")}
        assert {int(line[4:]) for line in said if line.startswith("run")
                } <= kept, seed
        number = max(kept)
        assert_whole(dashboard)
        dashboard.dashboard.close()
    runs = {int(line[4:]) for line in acknowledged if line[0] == "r"}
    pings = sum(line[0] == "p" for line in acknowledged)
    dashboard = InProcessDashboard(path, koitab.Clock(), fresh=False)
    assert len(runs) > 100 and pings > 100
    assert dashboard.rows("select count(*), count(distinct n) from runs")[0][
        0] >= len(runs)
    assert dashboard.rows("select n from checks")[0][0] >= pings
    dashboard.dashboard.close()


def assert_whole(dashboard) -> None:
    """What hangs together was written together."""
    assert dashboard.dashboard.db.value("pragma integrity_check") == "ok"
    assert dashboard.rows(
        "select r.id from runs r left join outputs o on o.run = r.id group by"
        " r.id having sum(length(o.data)) <> r.have or r.have <> r.size"
    ) == []
    assert dashboard.rows("select max(change) from runs") == dashboard.rows(
        "select acked from epochs")
    assert dashboard.rows('select max(p.n) = c.n from pings p, checks c') == [
        (1,)]
    # Each failure after a success was notified once, and its end once.
    told = dashboard.rows(
        "select key from notifications where subject = 'job:1' order "
                          "by id")
    states = [bool(status) for status, in dashboard.rows(
        "select exit from runs order by id")]
    turns = sum(a != b for a, b in zip([False, *states], states))
    assert len(told) == len(set(told)) == turns


# ==========================================================================
# A full disk
# ==========================================================================

FILLER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from dashboard_rig import (
    FakeClock, InProcessDashboard, frames, koitab, piece)
folder = sys.argv[2]
clock = FakeClock()
dashboard = InProcessDashboard(folder + "/d.db", clock, durable=True)
web1 = dashboard.join()

def fill(text):
    count = 0
    while True:
        data = frames((text * 4000 + "\\n") * 8)
        record = dashboard.record(size=len(data))
        try:
            dashboard.runs(web1, record)
            dashboard.sync(web1, outputs=[piece(record["run"], 0, data)])
        except koitab.DiskFull as error:
            return count, error.status
        count += 1

count, status = fill("x" * 7)
print("full", count > 5, status, len(dashboard.state["jobs"]) == 1,
      os.path.exists(folder + "/d.db.ballast"),
      dashboard.dashboard.problem_list != [])
try:
    dashboard.runs(web1, dashboard.record())
    print("kept?!")
except koitab.DiskFull:
    print("still full")
clock.time += 100 * 86400       # the outputs are too old now
for _ in range(200):
    clock.time += 1
    dashboard.run_chores()
    if not dashboard.dashboard.full:
        break
print("room", dashboard.dashboard.full, dashboard.dashboard.problem_list,
      os.path.exists(folder + "/d.db.ballast"))
dashboard.runs(web1, dashboard.record())
print("outputs", dashboard.rows("select count(*) from outputs")[0][0],
      "runs", dashboard.rows("select count(*) from runs")[0][0] > count,
      dashboard.dashboard.db.value("pragma integrity_check"),
      dashboard.dashboard.broken == "")
again, status = fill("y" * 7)
print("again", again > 5, status)
"""


@support.root_only
def test_dashboard_on_a_full_file_system_frees_space_by_deleting_a_host(
        tmp_path):
    support.need("unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", 'mount -t tmpfs -o size=24m none "$1"'
         '; exec "$2" -B -c "$3" "$4" "$1"', "sh", str(disk), sys.executable,
         FILLER, TESTS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=60)
    assert done.stdout.decode().splitlines() == [
        "full True 507 True False True", "still full", "room False [] True",
        "outputs 0 runs True ok True", "again True 507"]


# ==========================================================================
# Damage
# ==========================================================================

PAGE = 4096


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


DAMAGES = {
    "zero length": lambda path: os.truncate(path, 0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one page": lambda path: os.truncate(path, PAGE),
    "header": lambda path: overwrite(path, 0, b"garbage" * 20),
    "schema": lambda path: overwrite(path, 100, b"\xa5" * 3900),
    "text": lambda path: path.write_text("this is no database\n" * 500),
    "another": lambda path: (path.unlink(), another(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}


def another(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("create table runs (id)")
    db.commit()
    db.close()


def old_dashboard(path: Path) -> InProcessDashboard:
    dashboard = InProcessDashboard(path)
    web1 = dashboard.join()
    for number in range(30):
        data = frames(f"line {number}\n" * 50)
        dashboard.runs(web1, dashboard.record(size=len(data),
                                              tag=f"job{number}",
                                              exit=number % 2))
        dashboard.sync(web1, outputs=[piece(dashboard.number, 0, data)])
    dashboard.run_chores()
    dashboard.dashboard.db.execute(
        "pragma wal_checkpoint(truncate)").fetchall()
    dashboard.dashboard.close()
    return dashboard


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_database_is_reported_and_left_unchanged(tmp_path, damage):
    path = tmp_path / "d.db"
    old_dashboard(path)
    for ending in ("-wal", "-shm"):
        Path(str(path) + ending).unlink(missing_ok=True)
    DAMAGES[damage](path)
    before = path.read_bytes() if path.is_file() else None
    for _ in range(2):
        with pytest.raises(koitab.Error) as told:
            InProcessDashboard(path, fresh=False)
        assert str(path) in told.value.message
        if damage != "a folder":
            assert "backup" in told.value.hint
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("seed", range(25 if support.FULL else 6))
def test_randomly_damaged_database_is_refused_or_read_without_wrong_rows(
        tmp_path, seed):
    """Pages of garbage anywhere: it is refused at the start, or the pages
    that are whole are shown and the others told; never an unknown fault."""
    path = tmp_path / "d.db"
    old_dashboard(path)
    chance = random.Random(seed)
    pages = path.stat().st_size // PAGE
    for _ in range(3):
        overwrite(path, chance.randrange(1, pages) * PAGE,
                  chance.randbytes(PAGE))
    try:
        dashboard = InProcessDashboard(path, fresh=False)
    except koitab.Error as error:
        assert "backup" in error.hint
        return
    assert dashboard.rows("select count(*) from dashboard") == [(1,)]
    for question in (lambda: dashboard.state, lambda: dashboard.ask(
            dashboard.dashboard.runs.text, 5), lambda: dashboard.ask(
            dashboard.dashboard.search.find, "line 12")):
        try:
            question()
        except koitab.Error as error:
            assert error.status in (404, 500)
    dashboard.run_chores()
    dashboard.dashboard.close()


@pytest.mark.parametrize("ending", ["-wal", "-shm", ".ballast", ".lock"])
def test_database_opens_without_any_one_of_its_side_files(tmp_path, ending):
    path = tmp_path / "d.db"
    old_dashboard(path)
    Path(str(path) + ending).unlink(missing_ok=True)
    dashboard = InProcessDashboard(path, fresh=False)
    assert len(dashboard.state["jobs"]) == 30
    assert Path(str(path) + ".ballast").stat().st_size == 65_536
    dashboard.dashboard.close()


def test_backup_that_locks_the_database_only_delays_writes(tmp_path):
    dashboard = InProcessDashboard(tmp_path / "d.db", koitab.Clock())
    web1 = dashboard.join()
    dashboard.dashboard.start()
    other = sqlite3.connect(dashboard.path, isolation_level=None)
    other.execute("begin immediate")
    told = []
    dashboard.dashboard.write(dashboard.dashboard.host_sync.sync, web1.host, {
        "v": 3, "host": HOST, "epoch": 1, "instance": "1-aaaaaaaa",
        "records": [dashboard.record()]}, dashboard.now,
        then=lambda *how: told.append(how))
    time.sleep(0.5)
    assert told == [] and dashboard.ask(dashboard.dashboard.health) == "OK"
    other.execute("rollback")
    other.close()
    support.wait_until(lambda: told, 5)
    assert told[0][0]["acked"] == 1
    dashboard.dashboard.stop()


def test_locked_database_is_reported_at_the_start(tmp_path):
    path = tmp_path / "d.db"
    old_dashboard(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    script = ("import sys; sys.path.insert(0, sys.argv[1]); "
              "import dashboard_rig, sqlite3; real = sqlite3.connect; "
              "sqlite3.connect = lambda *a, **k: "
              "real(*a, **{**k, 'timeout': 0.2}); "
              "dashboard_rig.InProcessDashboard(sys.argv[2], fresh=False)")
    done = subprocess.run([sys.executable, "-B", "-c", script, TESTS,
                           str(path)], stderr=subprocess.PIPE)
    other.close()
    assert b"locked" in done.stderr.splitlines()[-1]

"""What one host, client or user sends too much of harms no other one."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

import support
from dashboard_rig import (BACK_TO_SCHEMA_6, NOW, FakeClock, frames, piece,
                           spec)

koitab = support.load("koitab")
OTHER = "d4" * 16
HOUR = 3600

pytestmark = pytest.mark.usefixtures("small_ballast")


@pytest.fixture
def web2(dashboard, web1):
    """A second host; web1 is the one that floods. A channel has the id 1."""
    dashboard.channel()
    access = dashboard.join(OTHER, "web2")
    dashboard.sync(access, list={**dashboard.list_of(access, spec()), **{
        "body": json.dumps({"v": 1, "dash": dashboard.dash, "host": OTHER,
                            "key": "0" * 16, "name": "web2", "at": 1,
                            "jobs": [spec()]})}})
    return access


def deliver(dashboard, refuse=lambda row: False) -> list[dict]:
    """Deliver what is due now on the channel, and return it. A receiver may
    refuse some: then the rest waits, as with a real one."""
    alerts, found = dashboard.dashboard.alerts, []
    while True:
        rows = dashboard.do(alerts.take_due, 1, dashboard.now)
        for row in rows:
            error = "it answered 400" if refuse(row) else ""
            dashboard.do(alerts.mark_delivered, row["id"], error,
                         dashboard.now)
            if error:
                return found
            found.append(row)
        if not rows:
            return found


def titles(rows: list[dict]) -> list[str]:
    return [row["title"] for row in rows]


def flood(dashboard, access, jobs: int = 300) -> None:
    """Let many jobs of a host fail, work again, and fail."""
    for status in (1, 0, 1):
        records = dashboard.failing(jobs)
        dashboard.runs(access, *({**each, "exit": status} for each in records))


WEB2_FAILED = "Night/Backup on web2 failed"


def test_flood_of_one_host_delays_no_alert_of_another(dashboard, web1, web2):
    flood(dashboard, web1)
    dashboard.runs(web2, dashboard.record(exit=1))
    assert WEB2_FAILED in titles(deliver(dashboard))
    for status in (0, 1):
        flood(dashboard, web1)
        dashboard.runs(web2, dashboard.record(exit=status))
        assert "Night/Backup on web2 " + ("failed" if status else
                                          "works again") in titles(
            deliver(dashboard))


def test_notifications_of_a_host_that_wait_are_bounded(dashboard, web1, web2):
    for _ in range(3):
        flood(dashboard, web1)
    waiting, = dashboard.rows("select count(*) from notifications")[0]
    assert waiting <= koitab.LEFT_WAITING
    first = [row for row in deliver(dashboard) if row["kind"] == "digest"]
    left_out = sum(int(line.split()[1].replace(",", ""))
                   for line in first[0]["text"].splitlines()
                   if line.endswith("more on web1"))
    assert left_out > 500


def test_alert_whose_beginning_was_left_out_has_no_end(dashboard, web1, web2):
    dashboard.runs(web1, *dashboard.failing(koitab.LEFT_WAITING))
    dashboard.runs(web1, dashboard.record(tag="late", name="Late", exit=1))
    deliver(dashboard)
    dashboard.runs(web1, dashboard.record(tag="late", name="Late"))
    dashboard.clock.time += 61
    assert deliver(dashboard) == []


def test_alert_that_was_notified_always_has_an_end(dashboard, web1, web2):
    dashboard.runs(web1, dashboard.record(exit=1))
    assert titles(deliver(dashboard)) == ["Night/Backup on web1 failed"]
    dashboard.runs(web1, *dashboard.failing(koitab.LEFT_WAITING + 9))
    dashboard.runs(web1, dashboard.record())
    dashboard.clock.time += 61
    digest, = deliver(dashboard)
    assert digest["title"] == "200 alerts began, 1 ended"
    assert digest["text"].endswith("and 160 more on web1")


def test_receiver_that_refuses_the_text_of_one_host_gets_that_of_others(
        dashboard, web1, web2):
    for record in dashboard.failing(5):
        dashboard.runs(web1, record)
    dashboard.runs(web2, dashboard.record(exit=1))
    found = []
    for _ in range(3):
        found += deliver(dashboard, lambda row: "on web1" in row["title"])
        dashboard.clock.time += 15
    assert titles(found) == [WEB2_FAILED]


def test_receiver_that_is_down_during_a_flood_gets_one_digest(
        dashboard, web1, web2):
    for _ in range(20):
        flood(dashboard, web1, 30)
        deliver(dashboard, lambda row: True)
        dashboard.clock.time += 61
    assert dashboard.rows("select count(*) from notifications where kind = "
                          "'digest'") == [(1,)]
    dashboard.clock.time += 2 * HOUR
    assert any(row["kind"] == "digest" for row in deliver(dashboard))


def test_digest_of_many_hosts_begins_with_one_line_of_each(dashboard, web1,
                                                           web2):
    names = [f"host{number}" for number in range(koitab.MOST_OF_CHANNEL)]
    dashboard.runs(web1, *dashboard.failing(60))
    for number, name in enumerate(names):
        access = dashboard.join(f"{number:032x}", name)
        dashboard.runs(access, dashboard.record(exit=1))
    digest, = deliver(dashboard)
    lines = digest["text"].splitlines()
    assert {f"Night/Backup on {name} failed" for name in names} < set(lines)
    assert lines[-1] == "and 50 more on web1"


def test_flood_of_checks_hides_no_alert_of_a_host(dashboard, web1, web2):
    for number in range(100):
        dashboard.ping(dashboard.ping_key, f"c{number}", "fail", create=True)
    dashboard.runs(web1, dashboard.record(exit=1))
    found = deliver(dashboard)
    assert "Night/Backup on web1 failed" in titles(found)
    digest = next(row for row in found if row["kind"] == "digest")
    assert digest["text"].endswith("and 50 more of checks")


def test_alert_of_a_host_whose_clock_is_ahead_begins_now(dashboard, web1,
                                                         web2):
    dashboard.runs(web1, dashboard.record(exit=1, ended=NOW + 400 * 86_400))
    assert dashboard.state["alerts"][0]["since"] == NOW


def test_output_that_one_host_withholds_delays_no_other_host(dashboard, web1,
                                                             web2):
    data = frames("oops\n")
    dashboard.runs(web1, dashboard.record(exit=1, size=99))
    number = dashboard.number + 1
    dashboard.runs(web2, dashboard.record(exit=1, size=len(data)))
    dashboard.sync(web2, outputs=[piece(number, 0, data)])
    assert titles(deliver(dashboard)) == [WEB2_FAILED]


@pytest.mark.parametrize("counts, shares, sent, plan", [
    ({"a": 10}, {}, 0, {}),
    ({"a": 11}, {}, 0, {"a": 60}),
    ({"a": 1}, {"a": (10, 500)}, 10, {"a": 560}),
    ({"a": 99, "b": 1}, {"a": (10, 500)}, 10, {"a": 560}),
    ({"a": 1, "b": 1}, {"a": (10, 500)}, 39, {"a": 760, "b": 760})])
def test_digests_are_planned_for_the_sources_with_too_many(counts, shares,
                                                           sent, plan):
    assert koitab.plan_digests(counts, shares, sent, 700) == plan


def test_notifications_of_schema_7_are_delivered_after_the_upgrade(
        dashboard, web1, web2):
    dashboard.runs(web1, dashboard.record(exit=1))
    dashboard.dashboard.db.connection.executescript(
        BACK_TO_SCHEMA_6 + "pragma user_version=7;")
    after = dashboard.reopen()
    assert titles(deliver(after)) == ["Night/Backup on web1 failed"]


# --- lists, records and outputs of a host


def test_removed_jobs_of_one_user_make_room_for_new_jobs_of_others(dashboard,
                                                                   web1):
    dashboard.dashboard.hosts.most_jobs = 4
    root = spec("backup", user="root")
    for turn in range(5):
        dashboard.sync(web1, list=dashboard.list_of(web1, root, *(
            spec(f"t{turn}-{number}", user="alice") for number in range(3))))
    dashboard.sync(web1, list=dashboard.list_of(
        web1, root, spec("restore", user="root")))
    shown = {job["tag"]: job["removed"] for job in dashboard.state["jobs"]}
    assert shown["backup"] is False and shown["restore"] is False
    assert len(shown) <= 16
    assert dashboard.state["hosts"][0]["problems"] == []


def test_output_of_a_run_is_ended_once(dashboard, web1, monkeypatch):
    """Ending reads all of it: 200 times a sync, it held the writer up."""
    ended, data = [], frames("x\n")
    end_output = koitab.Runs.end_output
    monkeypatch.setattr(koitab.Runs, "end_output", lambda self, db, run, now: (
        ended.append(run), end_output(self, db, run, now)))
    record = dashboard.record(size=len(data) + 1)
    dashboard.runs(web1, record)
    number = record["run"]
    for _ in range(3):
        dashboard.sync(web1, outputs=[piece(number, 0, data)] + 9 * [
            {"run": number, "deleted": True}])
        dashboard.runs(web1, dashboard.record(run=number, size=99))
    assert ended == [1]


def test_flips_of_a_check_are_bounded(dashboard, monkeypatch):
    monkeypatch.setattr(koitab, "KEEP_FLIPS", 50)
    check = dashboard.do(dashboard.dashboard.checks.create, {"name": "x"},
                         NOW)["id"]
    for number in range(300):
        dashboard.ping(check, action=("success", "fail")[number % 2])
    count, newest = dashboard.rows("select count(*), max(id) from flips")[0]
    assert count <= 150 and newest == 300


# --- what people look at


def test_runs_of_one_host_hide_no_run_of_another_in_a_day(dashboard, web1,
                                                          web2, monkeypatch):
    monkeypatch.setattr(koitab, "MOST_BARS", 40)
    for state in ("running", "done"):
        dashboard.runs(web1, *(dashboard.record(
            state, started=NOW - 10 * (state == "running"), ended=None)
            for _ in range(100)))
    dashboard.runs(web2, dashboard.record(started=NOW + 1, ended=NOW + 2))
    day = dashboard.dashboard.overview.day
    found = dashboard.ask(day, NOW, NOW + 86_400)
    assert found["to"] == NOW + 86_400
    bars = {row["job"]: row["bars"] for row in found["rows"]}
    assert len(bars) == 2 and min(map(len, bars.values())) == 1


def test_search_finds_what_waits_for_the_index_behind_a_flood(dashboard, web1,
                                                             web2):
    def write(access, text: str) -> None:
        data = frames(text)
        record = dashboard.record(size=len(data))
        dashboard.runs(access, record)
        dashboard.sync(access, outputs=[piece(record["run"], 0, data)])

    dashboard.pass_time(0)                  # chores are due later
    write(web2, "needle\n")
    for _ in range(110):
        write(web1, "hay\n")
    assert dashboard.rows("select count(*) from unindexed") == [(111,)]
    found = dashboard.ask(dashboard.dashboard.search.find, "needle")
    assert len(found["matches"]) == 1


def test_audit_keeps_the_newest_changes_of_checks_and_all_others(
        dashboard, monkeypatch):
    monkeypatch.setattr(koitab, "KEEP_CHECK_AUDIT", 5)
    checks, rules = dashboard.dashboard.checks, dashboard.dashboard.rules
    dashboard.do(rules.change_settings, {"failures": 2}, dashboard.now)
    check = dashboard.do(checks.create, {"name": "x"}, dashboard.now)["id"]
    for number in range(20):
        dashboard.do(checks.change, check, {"name": f"x{number}"},
                     dashboard.now)
    dashboard.clock.time += 61
    dashboard.run_chores()
    rows = dashboard.ask(rules.audit.page)["rows"]
    assert [row["what"] for row in rows] == ["check"] * 5 + ["settings"]
    assert rows[0]["label"] == "x18"        # the name before the last edit


def test_epochs_of_a_host_are_bounded(dashboard, web1):
    for epoch in range(1, 250):
        dashboard.runs(web1, dashboard.record(), epoch=epoch)
    count, = dashboard.rows("select count(*) from epochs")[0]
    assert 1 <= count <= koitab.MOST_EPOCHS
    assert dashboard.sync(web1, epoch=249)["acked"] == dashboard.change


def test_search_continues_after_outputs_that_used_up_its_time(
        dashboard, web1, web2, monkeypatch):
    def write(access, text: str) -> None:
        data = frames(text)
        record = dashboard.record(size=len(data))
        dashboard.runs(access, record)
        dashboard.sync(access, outputs=[piece(record["run"], 0, data)])

    search = dashboard.dashboard.search
    search.index = ""
    write(web2, "needle\n")
    for _ in range(5):
        write(web1, "hay\n")
    ticks = iter(range(10_000))
    monkeypatch.setattr(koitab.time, "monotonic", lambda: next(ticks) * 0.4)
    found, before, turns = {"matches": [], "more": True}, None, 0
    while not found["matches"] and found["more"] and turns < 10:
        found = dashboard.ask(search.find, "needle", None, before)
        before, turns = found["before"], turns + 1
    assert found["matches"] and turns > 1


# --- users of koid


class ControlRig:
    """koid's end of the control socket, for users of these uids. A request
    {"took": SECONDS} takes koid as long."""

    def __init__(self):
        self.clock, self.poller = FakeClock(), koitab.Poller()
        self.server = koitab.ControlServer(
            SimpleNamespace(machine=SimpleNamespace(clock=self.clock),
                            answer=self.answer),
            SimpleNamespace(log=None), self.poller)
        self.answered: list[int] = []

    def answer(self, caller, request: dict) -> tuple[dict, bytes]:
        self.answered.append(caller.uid)
        self.clock.time += request["took"]
        return {}, b""

    def ask(self, uid: int, took: float):
        """Send a request as a user; return the client's end."""
        ours, theirs = socket.socketpair()
        self.server.add_connection(theirs, koitab.Caller(uid, f"u{uid}"))
        ours.sendall(koitab.format_line({"op": "list", "took": took}))
        return ours

    def turn(self) -> list[int]:
        """Let koid's loop turn once; return who was answered."""
        before = len(self.answered)
        self.server.check(self.clock.time)
        self.poller.dispatch(self.poller.wait(0))
        return self.answered[before:]


def test_user_with_slow_requests_waits_between_them():
    rig = ControlRig()
    alice, bob = 61_001, 61_002
    held = [rig.ask(alice, 2.0) for _ in range(3)]
    assert rig.turn() == [alice]
    assert rig.turn() == rig.turn() == []
    assert rig.poller.wait(0) == []         # koid sleeps until then
    held.append(rig.ask(bob, 0.0))
    assert rig.turn() == [bob]
    rig.clock.time += 8
    assert rig.turn() == [alice]
    gone = rig.ask(alice, 2.0)
    gone.close()
    assert rig.turn() == [] and len(rig.server.connections) == 1
    rig.clock.time = rig.server.wake_at()
    assert rig.turn() == [alice]
    for client in held:
        client.close()


def test_ranges_of_a_field_are_parsed_like_single_values():
    field = koitab.SCHEDULE_FIELDS[0]
    for low, high in ((0, 59), (7, 7), (5, 58), (58, 5)):
        for step in (*range(1, 66), 10**9):
            assert field.parse(f"{low}-{high}/{step}") == sum(
                1 << value for value in range(low, high + 1, step))

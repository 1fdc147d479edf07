"""Pings: what pings Healthchecks can ping this, and means the same."""

from __future__ import annotations

import calendar
import time

import pytest

import support
from dashboard_rig import NOW, OPERATOR_TOKEN, refused

koitab = support.load("koitab")
RID, OTHER = ("12345678-1234-1234-1234-1234567890ab",
              "aaaaaaaa-1234-1234-1234-1234567890ab")
DAY, HOUR = 86_400, 3600


pytestmark = pytest.mark.usefixtures("small_ballast")


def make(dashboard, **fields) -> str:
    return dashboard.do(dashboard.dashboard.checks.create, {
        "name": "Backup", "slug": "backup", **fields}, dashboard.now)["id"]


def change(dashboard, check: str, **fields) -> dict:
    return dashboard.do(dashboard.dashboard.checks.change,
                        check,
                        fields, dashboard.now)


@pytest.fixture
def check(dashboard):
    return make(dashboard)


def shown(dashboard, check: str = "") -> dict:
    return next(each for each in dashboard.state["checks"]
                if check in ("", each["id"]))


def pings(dashboard, check: str) -> list[dict]:
    return dashboard.ask(dashboard.dashboard.checks.list_pings,
                         check)["pings"]


def flips(dashboard) -> list[tuple]:
    return dashboard.rows("select old, new, reason from flips order by id")


# ==========================================================================
# Addresses and answers
# ==========================================================================

@pytest.mark.parametrize("action, kind, status, state", [
    ("success", "success", None, "up"), ("start", "start", None, "new"),
    ("fail", "fail", None, "down"), ("log", "log", None, "new"),
    ("0", "success", 0, "up"), ("1", "fail", 1, "down"),
    ("255", "fail", 255, "down"), ("007", "fail", 7, "down")])
@pytest.mark.parametrize("by_slug", [False, True])
def test_each_ping_url_records_its_result(
        dashboard, check, by_slug, action, kind, status, state):
    where = (dashboard.ping_key, "backup") if by_slug else (check,)
    assert dashboard.ping(*where, action=action) == (200, "OK")
    ping, = pings(dashboard, check)
    assert (ping["kind"], ping["exit"]) == (kind, status)
    assert shown(dashboard)["state"] == state
    assert shown(dashboard)["n"] == 1


@pytest.mark.parametrize("key, slug, action, call, answer", [
    ("UUID", None, "256", {}, (400, "invalid url format")),
    ("UUID", None, "99999999999999999999", {}, (400, "invalid url format")),
    ("UUID", None, "success", {"rid": "x"}, (400, "invalid uuid format")),
    ("UUID", None, "log", {"rid": RID[:-1]}, (400, "invalid uuid format")),
    ("UUID", None, "success", {"rid": RID.replace("-", "")},
     (400, "invalid uuid format")),
    ("UUID", None, "success", {"rid": ""}, (400, "invalid uuid format")),
    ("UUID", None, "success", {"rid": RID.upper()}, (200, "OK")),
    (RID, None, "success", {}, (404, "not found")),
    ("nothing", None, "success", {}, (404, "not found")),
    ("KEY", "Backup", "success", {}, (400, "invalid url format")),
    ("KEY", "no/slug", "success", {}, (400, "invalid url format")),
    ("KEY", "", "success", {}, (400, "invalid url format")),
    ("KEY", "other", "success", {}, (404, "not found")),
    ("KEY", "backup", "256", {}, (400, "invalid url format")),
    ("wrong-key", "backup", "success", {}, (404, "not found")),
    ("wrong-key", "x", "success", {"create": True}, (404, "not found")),
    ("KEY", "backup", "success", {"create": True}, (200, "OK")),
    ("KEY", "fresh", "success", {"create": True}, (201, "Created")),
    ("KEY", "fresh", "start", {"create": True, "rid": RID},
     (201, "Created")),
    ("KEY", "fresh", "success", {"create": True, "rid": "x"},
     (400, "invalid uuid format"))])
def test_ping_responses_equal_those_of_healthchecks(
        dashboard, check, key, slug, action, call, answer):
    key = {"UUID": check, "KEY": dashboard.ping_key}.get(key, key)
    assert dashboard.ping(key, slug, action, **call) == answer
    assert len(dashboard.state["checks"]) == 1 + (answer[0] == 201)


def test_a_uuid_may_be_in_upper_case(dashboard, check):
    assert dashboard.ping(check.upper()) == (200, "OK")


def test_a_slug_of_two_checks_is_ambiguous(dashboard, check):
    """An older koi took a second one."""
    other = make(dashboard, slug="other")
    dashboard.dashboard.db.update("checks", {"slug": "backup"}, uuid=other)
    assert dashboard.ping(dashboard.ping_key, "backup") == (
        409, "ambiguous slug")


def test_check_created_by_ping_defaults_to_1_day_period_1_hour_grace(
        dashboard):
    dashboard.ping(dashboard.ping_key, "my_job-1", create=True)
    check = shown(dashboard)
    assert {name: check[name] for name in ("name", "slug", "kind", "period",
                                           "grace", "tz", "state", "n")} == {
        "name": "my_job-1", "slug": "my_job-1", "kind": "simple",
        "period": DAY, "grace": HOUR, "tz": "UTC", "state": "up", "n": 1}


@pytest.mark.parametrize("query, wanted", [
    ({"period": 600.0, "grace": 120.0}, {"kind": "simple", "period": 600.0,
                                         "grace": 120.0}),
    ({"schedule": "*/5 * * * *", "tz": "Europe/Berlin"},
     {"kind": "cron", "schedule": "*/5 * * * *", "tz": "Europe/Berlin",
      "grace": 3600.0})])
def test_first_ping_may_set_the_schedule_of_its_check(
        dashboard, query, wanted):
    fields = koitab.new_check_fields(query)
    for _ in range(2):      # what a later ping says changes nothing
        dashboard.ping(dashboard.ping_key, "x" * 200, create=True,
                       fields=fields)
        check = shown(dashboard)
        assert {name: check[name] for name in wanted} == wanted
        assert check["slug"] == "x" * 200
        fields = {"period": 60.0}


@pytest.mark.parametrize("fields", [
    {"period": 5.0}, {"schedule": "x", "kind": "cron"},
    {"schedule": "* * * * *", "kind": "cron", "tz": "No/Where"}])
def test_first_ping_with_an_invalid_schedule_creates_no_check(
        dashboard, fields):
    with refused(400):
        dashboard.ping(dashboard.ping_key, "a", create=True, fields=fields)
    assert dashboard.state["checks"] == []


def test_a_check_with_an_unknown_field_is_refused_by_its_name(dashboard,
                                                              check):
    with refused(400) as refusal:
        make(dashboard, periode=3)
    assert "periode" in refusal.message
    with refused(400) as refusal:
        change(dashboard, check, nam="b")
    assert "nam" in refusal.message


@pytest.mark.parametrize("name", ["", " ", None])
def test_a_check_without_a_name_is_refused(dashboard, check, name):
    with refused(400) as refusal:
        make(dashboard, name=name, slug="a")
    assert "name" in refusal.message
    with refused(400):
        change(dashboard, check, name=name or "")


def test_a_second_check_with_a_slug_is_refused_by_its_name(dashboard, check):
    with refused(409) as refusal:
        make(dashboard, name="Other")
    assert "backup" in refusal.message and "Backup" in refusal.message
    other = make(dashboard, name="Other", slug="other")
    with refused(409):
        change(dashboard, other, slug="backup")
    change(dashboard, other, name="Again", slug="other")
    make(dashboard, name="Third", slug="")
    make(dashboard, name="Fourth", slug="")


def test_number_of_checks_is_limited_and_twice_as_high_for_pings(
        dashboard, monkeypatch):
    monkeypatch.setattr(koitab, "MOST_CHECKS", 2)
    make(dashboard)
    make(dashboard, slug="")
    with refused(403):
        make(dashboard, slug="")
    answers = [dashboard.ping(dashboard.ping_key, f"a{number}", create=True)[0]
               for number in range(3)]
    assert answers == [201, 201, 404]


def test_check_with_too_many_bodies_loses_only_its_own_oldest_bodies(
        dashboard, check):
    other = make(dashboard, slug="other")
    body_of = dashboard.dashboard.checks.ping_body
    dashboard.ping(other, body=b"mine")
    for number in range(60):
        dashboard.ping(check, body=b"%03d" % number + b"x" * 9_997)
    kept, = dashboard.rows('select sum(length(body)) from pings where '
                           '"check" = 1')
    assert koitab.PING_BODIES - 10_000 < kept[0] <= koitab.PING_BODIES
    assert dashboard.ask(body_of, check, 60).startswith(b"059")
    with refused(404) as refusal:
        dashboard.ask(body_of, check, 1)
    assert "was removed" in refusal.message
    assert pings(dashboard, check)[-1]["size"] == 10_000
    assert dashboard.ask(body_of, other, 1) == b"mine"


@pytest.mark.parametrize("body, kept", [
    (b"", b""), (b"x" * 10_000, b"x" * 10_000),
    (b"x" * 10_001, b"x" * 10_000), (b"\0\xff\r\n", b"\0\xff\r\n")])
def test_body_of_a_ping_is_stored_unchanged_up_to_its_limit(
        dashboard, check, body, kept):
    dashboard.ping(check, body=body)
    assert dashboard.ask(dashboard.dashboard.checks.ping_body, check,
                         1) == kept
    assert pings(dashboard, check)[0]["size"] == len(kept)


def test_ping_is_stored_with_its_client_exit_status_and_last_line(
        dashboard, check):
    dashboard.ping(check, action="3", rid=RID, ua="x" * 300, ip="10.0.0.1",
                   method="POST", body=b"one\n\x1b[1mtwo\n")
    assert pings(dashboard, check) == [{
        "n": 1, "at": NOW, "kind": "fail", "exit": 3, "rid": RID,
        "method": "POST", "ua": "x" * 200, "ip": "10.0.0.1", "size": 12,
        "duration": None, "line": "two"}]


def test_check_keeps_its_last_hundred_pings(dashboard, check):
    for _ in range(250):
        dashboard.dashboard.write(dashboard.dashboard.checks.ping, check, None,
                                  "success",
                                  {"method": "GET"}, NOW)
    dashboard.dashboard.run_once()
    numbers = [row["n"] for row in pings(dashboard, check)]
    assert numbers == list(range(250, 150, -1))
    assert dashboard.rows("select count(*) from pings") == [(150,)]
    page = dashboard.ask(dashboard.dashboard.checks.list_pings, check, 200)
    assert page["pings"][0]["n"] == 199


def test_check_for_post_only_ignores_other_methods_with_200_ok(dashboard):
    check = make(dashboard, methods="POST")
    assert dashboard.ping(check, method="GET") == (200, "OK")
    assert shown(dashboard)["state"] == "new"
    assert pings(dashboard, check)[0]["kind"] == "ign"
    dashboard.ping(check, method="POST")
    assert shown(dashboard)["state"] == "up"


# ==========================================================================
# Starts, ends, durations
# ==========================================================================

@pytest.mark.parametrize("rids, seconds, started", [
    # rid of the start and of the end -> duration, and is it still open?
    ((None, None), 5.0, False), ((RID, RID), 5.0, False),
    ((RID, RID.upper()), 5.0, False), ((RID, OTHER), None, True),
    ((RID, None), None, False), ((None, RID), None, True)])
def test_end_of_a_run_is_matched_to_the_start_with_its_rid(
        dashboard, check, rids, seconds, started):
    dashboard.ping(check, action="start", rid=rids[0])
    dashboard.pass_time(5)
    dashboard.ping(check, rid=rids[1])
    found = shown(dashboard)
    assert (found["last_duration"], found["started"]) == (seconds, started)
    assert pings(dashboard, check)[0]["duration"] == seconds
    assert found["state"] == "up"


def test_failure_closes_a_start_with_any_rid(dashboard, check):
    dashboard.ping(check, action="start", rid=RID)
    dashboard.ping(check, action="fail", rid=OTHER)
    assert not shown(dashboard)["started"]


def test_start_does_not_count_as_a_ping_of_the_schedule(dashboard, check):
    dashboard.ping(check)
    dashboard.pass_time(100)
    dashboard.ping(check, action="start")
    assert shown(dashboard)["last_ping"] == NOW
    assert shown(dashboard)["last_start"] == NOW + 100


def test_duration_of_more_than_three_days_is_discarded(dashboard):
    check = make(dashboard, grace=365 * DAY, period=365 * DAY)
    dashboard.ping(check, action="start")
    dashboard.pass_time(72 * HOUR + 1)
    dashboard.ping(check)
    assert shown(dashboard)["last_duration"] is None
    assert pings(dashboard, check)[0]["duration"] is None


def test_recent_runs_of_a_check_have_their_results(dashboard, check):
    assert dashboard.state
    for action in ("start", "success", "log", "fail", "0", "9"):
        dashboard.ping(check, action=action)
    recent = shown(dashboard)["recent_runs"]
    assert [(each[0], each[3]) for each in recent] == [
        (2, "o"), (4, "f"), (5, "o"), (6, "f")]
    recent = shown(dashboard)["recent_runs"]
    assert dashboard.reopen().state["checks"][0]["recent_runs"] == recent


# ==========================================================================
# States
# ==========================================================================

@pytest.mark.parametrize("fields, story", [
    # what happens -> (seconds later, state)
    ({}, [("success", 0, "up"), (None, DAY - 1, "up"), (None, 1, "late"),
          (None, HOUR - 1, "late"), (None, 1, "down"),
          ("success", 0, "up")]),
    ({}, [("fail", 0, "down"), (None, 9 * DAY, "down"),
          ("success", 1, "up")]),
    ({}, [("start", 0, "new"), (None, HOUR - 1, "new"), (None, 1, "down"),
          ("success", 9, "up")]),
    ({}, [("success", 0, "up"), ("start", DAY / 2, "up"),
          (None, HOUR, "down")]),
    ({}, [("success", 0, "up"), ("start", DAY + 60, "late"),
          (None, HOUR - 61, "late"), (None, 2, "down")]),
    ({}, [("log", 0, "new"), (None, 99 * DAY, "new")]),
    ({"period": 60, "grace": 60}, [("success", 0, "up"), (None, 119, "late"),
                                   (None, 1, "down")]),
    # its own limit for the start: the run may last as long as it may
    ({"start_within": 600, "run_limit": 6 * HOUR}, [
        ("success", 0, "up"), (None, DAY + 599, "late"), (None, 1, "down")]),
    ({"start_within": 600, "run_limit": 6 * HOUR}, [
        ("success", 0, "up"), ("start", DAY + 500, "up"),
        (None, 6 * HOUR - 1, "up"), (None, 1, "down")]),
    ({"run_limit": 600}, [
        ("success", 0, "up"), (None, DAY + HOUR - 1, "late"),
        (None, 1, "down")]),
    ({"run_limit": 600}, [("start", 0, "new"), (None, 599, "new"),
                          (None, 1, "down")]),
    ({"start_within": 600}, [
        ("success", 0, "up"), ("start", DAY + 1, "up"),
        (None, HOUR - 1, "up"), (None, 1, "down")])], ids=str)
def test_state_of_a_check_follows_its_pings_and_the_time(
        dashboard, fields, story):
    check = make(dashboard, **fields)
    for action, later, state in story:
        dashboard.pass_time(later)
        if action:
            dashboard.ping(check, action=action)
        assert shown(dashboard)["state"] == state, (action, later)


def test_change_to_down_is_recorded_at_its_due_time(dashboard, check):
    dashboard.ping(check)
    dashboard.pass_time(3 * DAY)
    assert dashboard.rows("select at, old, new from flips order by id") == [
        (NOW, "new", "up"), (NOW + DAY + HOUR, "up", "down")]
    dashboard.pass_time(DAY)
    assert len(flips(dashboard)) == 2


def test_downtime_of_the_dashboard_does_not_count_for_deadlines(dashboard,
                                                                check):
    def is_down(after: float) -> list[str]:
        reopened.pass_time(after)
        return reopened.take_notifications()

    dashboard.channel()
    dashboard.ping(check)
    dashboard.pass_time(HOUR)
    dashboard.do(dashboard.dashboard.checks.store_alive)
    dashboard.clock.time += 9 * DAY
    reopened = dashboard.reopen()
    assert is_down(0) == [] and reopened.state["checks"][0]["state"] == "up"
    reopened.do(reopened.dashboard.checks.store_alive)
    reopened.clock.time += DAY              # and once more
    reopened = reopened.reopen()
    assert is_down(DAY - 1) == []
    assert is_down(1) == ["Backup is down"]
    assert reopened.state["checks"][0]["state"] == "down"


def test_downtime_of_the_dashboard_does_not_expire_an_open_start(
        dashboard, check):
    dashboard.channel()
    dashboard.ping(check, action="start")
    dashboard.do(dashboard.dashboard.checks.store_alive)
    dashboard.clock.time += DAY
    reopened = dashboard.reopen()
    reopened.pass_time(HOUR - 1)
    assert reopened.take_notifications() == []
    reopened.pass_time(1)
    assert reopened.take_notifications() == ["Backup is down"]


def utc(text: str) -> float:
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize("schedule, tz, last, expected", [
    ("0 3 * * *", "UTC", "2026-01-10 02:59:59", "2026-01-10 03:00:00"),
    ("0 3 * * *", "UTC", "2026-01-10 03:00:00", "2026-01-11 03:00:00"),
    ("0 3 * * *", "Europe/Berlin", "2026-01-10 02:30:00",
     "2026-01-11 02:00:00"),
    # 02:30 is skipped on 29 March 2026 in Berlin: right after the jump
    ("30 2 * * *", "Europe/Berlin", "2026-03-28 02:00:00",
     "2026-03-29 01:00:00"),
    # and comes twice on 25 October: the first of them
    ("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00:00",
     "2026-10-25 00:30:00"),
    ("30 2 * * *", "Europe/Berlin", "2026-10-25 00:31:00",
     "2026-10-26 01:30:00"),
    ("@daily", "America/New_York", "2026-07-01 05:00:00",
     "2026-07-02 04:00:00"),
    ("0 0 31 2 *", "UTC", "2026-01-01 00:00:00", None)])
def test_cron_check_is_due_in_the_time_of_its_zone(
        dashboard, schedule, tz, last, expected):
    dashboard.clock.time = utc(last)
    check = make(dashboard, kind="cron", schedule=schedule, tz=tz)
    dashboard.ping(check)
    assert shown(dashboard)["next"] == (expected and utc(expected))
    if expected:
        dashboard.pass_time(utc(expected) + HOUR - 1 - dashboard.now)
        assert shown(dashboard)["state"] == "late"
        dashboard.pass_time(1)
        assert shown(dashboard)["state"] == "down"
    else:
        dashboard.pass_time(900 * DAY)
        assert shown(dashboard)["state"] == "up"


def test_check_with_an_unknown_zone_still_accepts_pings(dashboard, check):
    dashboard.do(lambda db: db.execute(
        "update checks set kind = 'cron', tz = 'Mars/Olympus'"))
    assert dashboard.ping(check) == (200, "OK")
    for _ in range(3):
        dashboard.pass_time(HOUR)
    assert "Mars" in shown(dashboard)["words"]
    assert dashboard.dashboard.broken == ""


# ==========================================================================
# Pausing, editing
# ==========================================================================

def test_ping_resumes_a_paused_check_unless_resumed_by_hand_only(dashboard):
    for manual, state in ((False, "up"), (True, "paused")):
        check = make(dashboard, slug="", manual_resume=manual)
        dashboard.ping(check, action="start")
        change(dashboard, check, do="pause")
        assert not shown(dashboard, check)["started"]
        dashboard.pass_time(30 * DAY)
        assert shown(dashboard, check)["state"] == "paused"
        dashboard.ping(check)
        assert shown(dashboard, check)["state"] == state
    assert pings(dashboard, check)[0]["kind"] == "ign"
    change(dashboard, check, do="resume")
    assert shown(dashboard, check)["state"] == "new"
    assert shown(dashboard, check)["last_ping"] is None


def test_check_that_is_not_paused_cannot_be_resumed(dashboard, check):
    with refused(409):
        change(dashboard, check, do="resume")


def test_deleted_check_is_removed_with_its_pings(dashboard, check):
    dashboard.ping(check)
    change(dashboard, check, do="delete")
    assert dashboard.state["checks"] == []
    assert dashboard.ping(check) == (404, "not found")
    assert dashboard.rows("select count(*) from pings") == [(0,)]
    dashboard.pass_time(9 * DAY)


def test_edit_changes_only_the_given_fields(dashboard, check):
    dashboard.ping(check)
    change(dashboard, check, do="edit", period=3600, tags="a b")
    found = shown(dashboard)
    assert (found["period"], found["tags"], found["name"], found["state"]
            ) == (3600, "a b", "Backup", "up")
    dashboard.pass_time(2 * HOUR)
    assert shown(dashboard)["state"] == "down"      # by the new period


@pytest.mark.parametrize("fields", [
    {"period": 59}, {"period": 0}, {"period": 366 * DAY}, {"grace": "1"},
    {"start_within": 5}, {"slug": "Über"}, {"slug": "a b"}, {"kind": "x"},
    {"kind": "cron", "schedule": "* * *"}, {"methods": "PUT"},
    {"kind": "cron", "schedule": "61 * * * *"}, {"name": "a\0b"},
    {"kind": "cron", "schedule": "* * * * *", "tz": "Mars/Olympus"},
    {"kind": "cron", "schedule": "* * * * *", "tz": "../../etc/passwd"},
    {"manual_resume": 1}, {"tags": []}, {"desc": "\ud800"}], ids=str)
def test_invalid_check_is_refused(dashboard, fields):
    with refused(400):
        make(dashboard, **fields)
    assert dashboard.state["checks"] == []


def test_flips_are_kept_for_three_months(dashboard, check):
    dashboard.ping(check)
    dashboard.ping(check, action="fail")
    dashboard.clock.time += 94 * DAY
    dashboard.run_chores()
    assert flips(dashboard) == []
    assert OPERATOR_TOKEN      # what a check is stays
    assert len(dashboard.state["checks"]) == 1

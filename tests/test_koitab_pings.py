"""Pings: what pings Healthchecks can ping this, and means the same."""

from __future__ import annotations

import calendar
import time

import pytest

import houses
import support
from houses import NOW, House
from test_koitab_hub import refused

koitab = support.load("koitab")
RID, OTHER = ("12345678-1234-1234-1234-1234567890ab",
              "aaaaaaaa-1234-1234-1234-1234567890ab")
DAY, HOUR = 86_400, 3600


@pytest.fixture(autouse=True)
def small_ballast(monkeypatch):
    monkeypatch.setattr(koitab, "BALLAST", 65_536)


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path / "dashboard.db")
    house.key = house.state["dash"]["ping_key"]
    yield house
    house.hub.close()


def make(house, **fields) -> str:
    return house.do(house.hub.make_check, house.dash, {
        "name": "Backup", "slug": "backup", **fields}, house.now)["id"]


def change(house, check: str, **fields) -> dict:
    return house.do(house.hub.change_check, house.dash, check, fields,
                    house.now)


@pytest.fixture
def check(house):
    return make(house)


def shown(house, check: str = "") -> dict:
    return next(each for each in house.state["checks"]
                if check in ("", each["id"]))


def pings(house, check: str) -> list[dict]:
    return house.ask(house.hub.pings, house.dash, check)["pings"]


def flips(house) -> list[tuple]:
    return house.rows("select old, new, reason from flips order by id")


# ==========================================================================
# Addresses and answers
# ==========================================================================

@pytest.mark.parametrize("action, kind, status, state", [
    ("success", "success", None, "up"), ("start", "start", None, "new"),
    ("fail", "fail", None, "down"), ("log", "log", None, "new"),
    ("0", "success", 0, "up"), ("1", "fail", 1, "down"),
    ("255", "fail", 255, "down"), ("007", "fail", 7, "down")])
@pytest.mark.parametrize("by_slug", [False, True])
def test_each_address_says_how_it_went(house, check, by_slug, action, kind,
                                       status, state):
    where = (house.key, "backup") if by_slug else (check,)
    assert house.ping(*where, action=action) == (200, "OK")
    ping, = pings(house, check)
    assert (ping["kind"], ping["exit"]) == (kind, status)
    assert shown(house)["state"] == state
    assert shown(house)["n"] == 1


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
def test_the_answers_are_those_of_healthchecks(house, check, key, slug,
                                               action, call, answer):
    key = {"UUID": check, "KEY": house.key}.get(key, key)
    assert house.ping(key, slug, action, **call) == answer
    assert len(house.state["checks"]) == 1 + (answer[0] == 201)


def test_a_uuid_may_be_in_upper_case(house, check):
    assert house.ping(check.upper()) == (200, "OK")


def test_a_slug_of_two_checks_is_ambiguous(house, check):
    make(house)
    assert house.ping(house.key, "backup") == (409, "ambiguous slug")


def test_a_check_made_by_its_first_ping_has_a_day_and_an_hour(house):
    house.ping(house.key, "my_job-1", create=True)
    check = shown(house)
    assert {name: check[name] for name in ("name", "slug", "kind", "period",
                                           "grace", "tz", "state", "n")} == {
        "name": "my_job-1", "slug": "my_job-1", "kind": "simple",
        "period": DAY, "grace": HOUR, "tz": "UTC", "state": "up", "n": 1}


def test_checks_have_a_limit_and_pings_may_make_twice_as_many(house,
                                                              monkeypatch):
    monkeypatch.setattr(koitab, "MOST_CHECKS", 2)
    make(house)
    make(house)
    with refused(403):
        make(house)
    answers = [house.ping(house.key, f"a{number}", create=True)[0]
               for number in range(3)]
    assert answers == [201, 201, 404]


@pytest.mark.parametrize("body, kept", [
    (b"", b""), (b"x" * 10_000, b"x" * 10_000),
    (b"x" * 10_001, b"x" * 10_000), (b"\0\xff\r\n", b"\0\xff\r\n")])
def test_a_body_is_kept_raw_up_to_its_limit(house, check, body, kept):
    house.ping(check, body=body)
    assert house.ask(house.hub.ping_body, house.dash, check, 1) == kept
    assert pings(house, check)[0]["size"] == len(kept)


def test_what_is_kept_of_a_ping(house, check):
    house.ping(check, action="3", rid=RID, ua="x" * 300, ip="10.0.0.1",
               method="POST", body=b"one\n\x1b[1mtwo\n")
    assert pings(house, check) == [{
        "n": 1, "at": NOW, "kind": "fail", "exit": 3, "rid": RID,
        "method": "POST", "ua": "x" * 200, "ip": "10.0.0.1", "size": 12,
        "duration": None, "line": "two"}]


def test_of_the_pings_of_a_check_the_last_hundred_stay(house, check):
    for _ in range(250):
        house.hub.write(house.hub.ping, check, None, "success",
                        {"method": "GET"}, NOW)
    house.hub.turn()
    numbers = [row["n"] for row in pings(house, check)]
    assert numbers == list(range(250, 150, -1))
    assert house.rows("select count(*) from pings") == [(150,)]
    page = house.ask(house.hub.pings, house.dash, check, 200)
    assert page["pings"][0]["n"] == 199


def test_by_post_only_another_method_is_ignored_and_answered_ok(house):
    check = make(house, methods="POST")
    assert house.ping(check, method="GET") == (200, "OK")
    assert shown(house)["state"] == "new"
    assert pings(house, check)[0]["kind"] == "ign"
    house.ping(check, method="POST")
    assert shown(house)["state"] == "up"


# ==========================================================================
# Starts, ends, durations
# ==========================================================================

@pytest.mark.parametrize("rids, seconds, started", [
    # rid of the start and of the end -> duration, and is it still open?
    ((None, None), 5.0, False), ((RID, RID), 5.0, False),
    ((RID, RID.upper()), 5.0, False), ((RID, OTHER), None, True),
    ((RID, None), None, False), ((None, RID), None, True)])
def test_an_end_belongs_to_the_start_of_its_rid(house, check, rids, seconds,
                                                started):
    house.ping(check, action="start", rid=rids[0])
    house.after(5)
    house.ping(check, rid=rids[1])
    found = shown(house)
    assert (found["last_duration"], found["started"]) == (seconds, started)
    assert pings(house, check)[0]["duration"] == seconds
    assert found["state"] == "up"


def test_a_failure_closes_any_start(house, check):
    house.ping(check, action="start", rid=RID)
    house.ping(check, action="fail", rid=OTHER)
    assert not shown(house)["started"]


def test_a_start_is_not_a_ping_for_the_schedule(house, check):
    house.ping(check)
    house.after(100)
    house.ping(check, action="start")
    assert shown(house)["last_ping"] == NOW
    assert shown(house)["last_start"] == NOW + 100


def test_a_duration_of_more_than_three_days_is_none(house):
    check = make(house, grace=365 * DAY, period=365 * DAY)
    house.ping(check, action="start")
    house.after(72 * HOUR + 1)
    house.ping(check)
    assert shown(house)["last_duration"] is None
    assert pings(house, check)[0]["duration"] is None


def test_the_strip_shows_ends(house, check):
    assert house.state
    for action in ("start", "success", "log", "fail", "0", "9"):
        house.ping(check, action=action)
    assert [(each[0], each[3]) for each in shown(house)["strip"]] == [
        (2, "o"), (4, "f"), (5, "o"), (6, "f")]
    strip = shown(house)["strip"]
    assert house.again().state["checks"][0]["strip"] == strip


# ==========================================================================
# States
# ==========================================================================

@pytest.mark.parametrize("fields, story", [
    # what happens -> (seconds later, state)
    ({}, [("success", 0, "up"), (None, DAY - 1, "up"), (None, 1, "grace"),
          (None, HOUR - 1, "grace"), (None, 1, "down"),
          ("success", 0, "up")]),
    ({}, [("fail", 0, "down"), (None, 9 * DAY, "down"),
          ("success", 1, "up")]),
    ({}, [("start", 0, "new"), (None, HOUR - 1, "new"), (None, 1, "down"),
          ("success", 9, "up")]),
    ({}, [("success", 0, "up"), ("start", DAY / 2, "up"),
          (None, HOUR, "down")]),
    ({}, [("success", 0, "up"), ("start", DAY + 60, "grace"),
          (None, HOUR - 61, "grace"), (None, 2, "down")]),
    ({}, [("log", 0, "new"), (None, 99 * DAY, "new")]),
    ({"period": 60, "grace": 60}, [("success", 0, "up"), (None, 119, "grace"),
                                   (None, 1, "down")]),
    # a limit of its own for the start: the run may last as long as it may
    ({"start_within": 600, "run_limit": 6 * HOUR}, [
        ("success", 0, "up"), (None, DAY + 599, "grace"), (None, 1, "down")]),
    ({"start_within": 600, "run_limit": 6 * HOUR}, [
        ("success", 0, "up"), ("start", DAY + 500, "up"),
        (None, 6 * HOUR - 1, "up"), (None, 1, "down")]),
    ({"run_limit": 600}, [
        ("success", 0, "up"), (None, DAY + HOUR - 1, "grace"),
        (None, 1, "down")]),
    ({"run_limit": 600}, [("start", 0, "new"), (None, 599, "new"),
                          (None, 1, "down")]),
    ({"start_within": 600}, [
        ("success", 0, "up"), ("start", DAY + 1, "up"),
        (None, HOUR - 1, "up"), (None, 1, "down")])], ids=str)
def test_a_checks_state(house, fields, story):
    check = make(house, **fields)
    for action, later, state in story:
        house.after(later)
        if action:
            house.ping(check, action=action)
        assert shown(house)["state"] == state, (action, later)


def test_going_down_is_kept_at_the_time_it_was_due(house, check):
    house.ping(check)
    house.after(3 * DAY)
    assert house.rows("select at, old, new from flips order by id") == [
        (NOW, "new", "up"), (NOW + DAY + HOUR, "up", "down")]
    house.after(DAY)
    assert len(flips(house)) == 2


def test_what_went_down_while_the_dashboard_was_off_is_told_after(house,
                                                                  check):
    house.channel()
    house.ping(check)
    house.clock.time += 9 * DAY
    again = house.again()
    again.hub.turn()
    assert again.told() == ["Backup is overdue"]
    assert again.state["checks"][0]["state"] == "down"


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
def test_a_cron_check_is_expected_by_the_clock_of_its_zone(
        house, schedule, tz, last, expected):
    house.clock.time = utc(last)
    check = make(house, kind="cron", schedule=schedule, tz=tz)
    house.ping(check)
    assert shown(house)["next"] == (expected and utc(expected))
    if expected:
        house.after(utc(expected) + HOUR - 1 - house.now)
        assert shown(house)["state"] == "grace"
        house.after(1)
        assert shown(house)["state"] == "down"
    else:
        house.after(900 * DAY)
        assert shown(house)["state"] == "up"


def test_a_zone_that_is_gone_does_not_stop_pings(house, check):
    house.do(lambda db: db.execute(
        "update checks set kind = 'cron', tz = 'Mars/Olympus'"))
    assert house.ping(check) == (200, "OK")
    for _ in range(3):
        house.after(HOUR)
    assert "Mars" in shown(house)["words"]
    assert house.hub.broken == ""


# ==========================================================================
# Pausing, editing
# ==========================================================================

def test_a_paused_check_wakes_with_a_ping_unless_by_hand_only(house):
    for manual, state in ((False, "up"), (True, "paused")):
        check = make(house, manual_resume=manual)
        house.ping(check, action="start")
        change(house, check, do="pause")
        assert not shown(house, check)["started"]
        house.after(30 * DAY)
        assert shown(house, check)["state"] == "paused"
        house.ping(check)
        assert shown(house, check)["state"] == state
    assert pings(house, check)[0]["kind"] == "ign"
    change(house, check, do="resume")
    assert shown(house, check)["state"] == "new"
    assert shown(house, check)["last_ping"] is None


def test_only_what_is_paused_can_be_resumed(house, check):
    with refused(409):
        change(house, check, do="resume")


def test_a_deleted_check_is_gone_with_its_pings(house, check):
    house.ping(check)
    change(house, check, do="delete")
    assert house.state["checks"] == []
    assert house.ping(check) == (404, "not found")
    assert house.rows("select count(*) from pings") == [(0,)]
    house.after(9 * DAY)


def test_an_edit_changes_what_it_says_and_nothing_else(house, check):
    house.ping(check)
    change(house, check, do="edit", period=3600, tags="a b")
    found = shown(house)
    assert (found["period"], found["tags"], found["name"], found["state"]
            ) == (3600, "a b", "Backup", "up")
    house.after(2 * HOUR)
    assert shown(house)["state"] == "down"      # by the new period


@pytest.mark.parametrize("fields", [
    {"period": 59}, {"period": 0}, {"period": 366 * DAY}, {"grace": "1"},
    {"start_within": 5}, {"slug": "Über"}, {"slug": "a b"}, {"kind": "x"},
    {"kind": "cron", "schedule": "* * *"}, {"methods": "PUT"},
    {"kind": "cron", "schedule": "61 * * * *"}, {"name": "a\0b"},
    {"kind": "cron", "schedule": "* * * * *", "tz": "Mars/Olympus"},
    {"kind": "cron", "schedule": "* * * * *", "tz": "../../etc/passwd"},
    {"manual_resume": 1}, {"tags": []}, {"desc": "\ud800"}], ids=str)
def test_a_check_that_is_odd_is_refused(house, fields):
    with refused(400):
        make(house, **fields)
    assert house.state["checks"] == []


def test_flips_are_kept_for_three_months(house, check):
    house.ping(check)
    house.ping(check, action="fail")
    house.clock.time += 94 * DAY
    house.rest()
    assert flips(house) == []
    assert houses.OPERATOR      # what a check is stays
    assert len(house.state["checks"]) == 1

"""The read API has the fields that `koitab help api` promises."""

from __future__ import annotations

import json
import re

import pytest

import support
from dashboard_rig import (HOST, HOST_TOKEN, OPERATOR_TOKEN, SECONDS,
                           VIEWER_TOKEN, encode_request, frames, piece, spec,
                           sync_payload)

NOW = 1_800_000_000.0
CHAPTER = support.load("koitab").topic_text("api").partition(
    "\nREADING\n")[2].partition("\nHEALTHCHECKS' API\n")[0]


def terms(first: str) -> dict[str, list[str]]:
    """The terms that begin with `first`, and the fields in the first sentence
    of each, which are words with commas between them."""
    block = next(block for block in CHAPTER.split("\n\n")
                 if block.startswith(f"  {first}\n"))
    rows = re.findall(r"^  (\S+)\n((?:      .+\n?)+)", block, re.M)
    return {term: re.findall(r"\w+", sentence) if re.fullmatch(
        r"\w+(, \w+)*", sentence) else [] for term, sentence in (
        (term, " ".join(text.split()).partition(".")[0])
        for term, text in rows)}


ANSWERS, OBJECTS = terms("state"), terms("host")


def record(number: int, **fields) -> dict:
    """A run of the job "backup"; it failed, unless `fields` say more."""
    return {
        "run": number, "change": number, "user": "root", "tag": "backup",
        "section": "Night", "name": "Backup", "label": "Backup",
        "trigger": "schedule", "state": "done", "due": NOW + number,
        "requested_at": None, "started": NOW + number,
        "ended": NOW + number + 1, "exit": 1, "signal": None, "reason": "",
        "args": {}, "attempt": 1, "count": 1, "bytes": 0, "cut": False,
        "size": 0, "next": None, "nonce": "", **fields}


@pytest.fixture(scope="module")
def house(server):
    """A dashboard with one of everything."""
    server.set_up()
    data = frames("needle\n")
    for payload in (
            {"list": {"mac": "e" * 64, "body": json.dumps({
                "v": 1, "dash": server.dash, "host": HOST, "key": "0" * 16,
                "name": "web1", "at": 1, "jobs": [spec()]})}},
            {"records": [record(1, exit=0), record(2, size=len(data))]},
            {"outputs": [piece(2, 0, data)]}):
        reply = server.ask("POST", "/api/v1/sync", sync_payload(**payload),
                           HOST_TOKEN)
        assert reply.status == 200, reply
    server.check = server.add_check()
    assert server.ask("POST", f"/ping/{server.check}/1", b"oops\n"
                      ).status == 200
    return server


def get(house, path: str, **headers):
    reply = house.ask("GET", f"/api/v1/{path}", token=VIEWER_TOKEN,
                      **{"Accept": None, **headers})
    assert reply.status == 200, reply
    return reply


def path_of(house, documented: str) -> str:
    """A documented path with the values of this dashboard."""
    for word, value in (("JOB", "1"), ("RUN", "2"), ("CHECK", house.check),
                        ("/N/", "/1/"), ("TEXT", "needle"),
                        ("from=TIME", f"from={NOW}"),
                        ("to=TIME", f"to={NOW + 60}")):
        documented = documented.replace(word, value)
    return documented


def missing(fields: list[str], found: dict) -> set[str]:
    assert fields
    return set(fields) - set(found)


@pytest.mark.parametrize("documented", [
    name for name in ANSWERS if not name.startswith("stream")])
def test_answer_has_its_documented_fields(house, documented):
    reply = get(house, path_of(house, documented))
    if ANSWERS[documented]:
        assert missing(ANSWERS[documented], reply.json) == set()
    else:
        assert b"needle" in reply.body or b"oops" in reply.body


def test_object_has_its_documented_fields(house):
    state = get(house, "state").json
    check, = state["checks"]
    job, = state["jobs"]
    found = {
        "host": [*state["hosts"]], "job": [job, get(house, "runs/2").json[
            "job"]], "check": [check], "alert": state["alerts"],
        "run": [job["last"], get(house, "runs/2").json["run"],
                *get(house, "jobs/1/runs").json["runs"],
                get(house, "search?q=needle").json["matches"][0]["run"]],
        "ping": get(house, f"checks/{check['id']}/pings").json["pings"],
        "audit": get(house, "audit").json["rows"]}
    assert set(found) == set(OBJECTS)
    for kind, objects in found.items():
        assert objects, kind
        for each in objects:
            assert missing(OBJECTS[kind], each) == set(), kind
    assert set(job["failing"]) == {"since", "count", "last_ok", "line"}
    day, = get(house, f"day?from={NOW}&to={NOW + 60}").json["rows"]
    assert set(day) == {"job", "bars", "missing"}
    assert [bar[2:] for bar in day["bars"]] == [["o", 1], ["f", 2]]


def numbers_like_times(value, path: str = "") -> list[str]:
    """The paths of numbers that can only be seconds since 1970, without
    those in the page's own fields."""
    inner = value.items() if isinstance(value, dict) else enumerate(
        value if isinstance(value, list) else ())
    here = [path] if isinstance(value, (int, float)) and value > 1e9 else []
    return here + [found for name, each in inner for found in
                   numbers_like_times(each, f"{path}.{name}")
                   if name not in ("seq", "recent_runs", "new_runs")]


@pytest.mark.parametrize("documented", [
    name for name in ANSWERS
    if not name.startswith("stream") and "raw" not in name
    and "/output" not in name and "/body" not in name])
def test_times_in_answers_are_rfc_3339(house, documented):
    path = path_of(house, documented)
    found = get(house, path).json
    assert numbers_like_times(found) == []
    seconds = get(house, path, Accept=SECONDS).json
    assert numbers_like_times(seconds) or not re.search(
        r"\d{4}-\d\d-\d\dT", json.dumps(found))


def test_time_of_a_run_has_its_fraction_and_offset(house):
    run = get(house, "runs/2").json["run"]
    assert re.fullmatch(r"2027-01-15T\d\d:\d\d:02[+-]\d\d:\d\d",
                        run["started"])
    now = get(house, "state").json["now"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?"
                        r"[+-]\d\d:\d\d", now)


@pytest.mark.parametrize("day", [
    f"from={NOW}&to={NOW + 60}",
    "from=2027-01-15T08:00:00Z&to=2027-01-15T09:01:00%2B01:00",
    "from=2027-01-15T08:00:00.000Z&to=2027-01-15T08:01:00Z"])
def test_time_in_a_query_is_rfc_3339_or_seconds(house, day):
    rows = get(house, f"day?{day}").json["rows"]
    assert [bar[3] for bar in rows[0]["bars"]] == [1, 2]
    house.ask("POST", "/api/v1/snooze", {"subject": f"host:{HOST}",
                                         "until": 0}, OPERATOR_TOKEN)
    newest = get(house, "audit").json["rows"][0]["at"]
    before = get(house, "audit?before=" + newest.replace("+", "%2B")).json
    assert newest not in [row["at"] for row in before["rows"]]


def test_invalid_time_in_a_query_is_refused(house):
    reply = house.ask("GET", "/api/v1/day?from=yesterday&to=1",
                      token=VIEWER_TOKEN)
    assert reply.status == 400 and reply.json["error"] == \
        "from is not a time such as 2026-11-30T08:00:00+01:00"


def test_stream_has_its_documented_fields(house):
    fields = ANSWERS["stream?since=SEQ"]
    since, seen = get(house, "state").json["seq"], {}
    with house.client() as client:
        client.send(encode_request(
            house.port, "GET", f"/api/v1/stream?since={since}",
            token=VIEWER_TOKEN, Accept=None))
        client.head()
        house.ask("POST", "/api/v1/sync", sync_payload(
            records=[record(3)]), HOST_TOKEN)
        house.ask("POST", f"/ping/{house.check}/0")
        house.ask("POST", f"/api/v1/checks/{house.check}",
                  {"name": "other", "do": "edit"}, OPERATOR_TOKEN)
        house.register_host("d4" * 16, "e5" * 32)
        house.ask("POST", f"/ping/{house.check}/1")
        while set(fields) - set(seen):
            change = json.loads(client.line())
            assert numbers_like_times(change) == []
            seen.update(change)
    assert "deleted" in fields and len(fields) == 7


def test_an_error_has_its_documented_fields(house):
    reply = house.ask("GET", "/api/v1/runs/99", token=VIEWER_TOKEN)
    assert reply.status == 404 and set(reply.json) == {"error", "hint"}
    for name in ("error", "hint"):
        assert re.search(rf"An error has [^.]*\b{name}\b",
                         " ".join(CHAPTER.split()))

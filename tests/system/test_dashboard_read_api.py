"""The read API has the fields that `koitab help api` promises."""

from __future__ import annotations

import json
import re

import pytest

import support
from dashboard_rig import (HOST, HOST_TOKEN, OPERATOR_TOKEN, VIEWER_TOKEN,
                           encode_request, frames, piece, spec, sync_payload)

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


def get(house, path: str):
    reply = house.ask("GET", f"/api/v1/{path}", token=VIEWER_TOKEN)
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


def test_stream_has_its_documented_fields(house):
    fields = ANSWERS["stream?since=SEQ"]
    since, seen = get(house, "state").json["seq"], {}
    with house.client() as client:
        client.send(encode_request(
            house.port, "GET", f"/api/v1/stream?since={since}",
            token=VIEWER_TOKEN))
        client.head()
        house.ask("POST", "/api/v1/sync", sync_payload(
            records=[record(3)]), HOST_TOKEN)
        house.ask("POST", f"/ping/{house.check}/0")
        house.ask("POST", f"/api/v1/checks/{house.check}",
                  {"name": "other", "do": "edit"}, OPERATOR_TOKEN)
        house.register_host("d4" * 16, "e5" * 32)
        house.ask("POST", f"/ping/{house.check}/1")
        while set(fields) - set(seen):
            seen.update(json.loads(client.line()))
    assert "deleted" in fields and len(fields) == 7


def test_an_error_has_its_documented_fields(house):
    reply = house.ask("GET", "/api/v1/runs/99", token=VIEWER_TOKEN)
    assert reply.status == 404 and set(reply.json) == {"error", "hint"}
    for name in ("error", "hint"):
        assert re.search(rf"An error has [^.]*\b{name}\b",
                         " ".join(CHAPTER.split()))

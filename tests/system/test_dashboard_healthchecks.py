"""Healthchecks' management API v3, as its clients use it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess

import pytest

import support
from dashboard_rig import (OPERATOR_TOKEN, VIEWER_TOKEN, DashboardProcess,
                           new_token)

koitab = support.load("koitab")

CHECKS_TOKEN = "c4" * 32
PACKAGES = support.ROOT / ".test-env/healthchecks-io"
PYTHON = "/usr/bin/python3"     # for which `make parts` fetches them
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


@pytest.fixture(scope="module")
def house(server):
    """A dashboard with a token of each role that may use the API."""
    server.set_up()
    made = server.ask("POST", "/api/v1/tokens",
                      new_token("checks", CHECKS_TOKEN), OPERATOR_TOKEN)
    assert made.status == 200, made
    return server


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    """A dashboard behind a proxy on this machine."""
    with DashboardProcess(tmp_path_factory.mktemp("proxied"), "--name",
                          "koi.example", "--behind-proxy", "127.0.0.1"
                          ) as found:
        yield found.set_up()


def call(house, method: str, path: str, body=None, key: str = CHECKS_TOKEN,
         version: int = 3):
    """The reply to a request with Healthchecks' header, and a body as curl
    sends it: of no declared type."""
    data = None if body is None else json.dumps(body).encode()
    return house.ask(method, f"/api/v{version}/{path}", data,
                     X_Api_Key=key or None)


def save(house, status: int = 201, **fields) -> dict:
    """Add or find a check."""
    reply = call(house, "POST", "checks/", fields)
    assert reply.status == status, reply
    return reply.json


def test_check_has_the_fields_of_healthchecks(house):
    made = save(house, name="Backup", slug="bk", tags="prod www", desc="d",
                timeout=3600, grace=60)
    place = f"{house.url}/api/v3/checks/{made['uuid']}"
    assert made == {
        "name": "Backup", "slug": "bk", "tags": "prod www", "desc": "d",
        "grace": 60, "timeout": 3600, "n_pings": 0, "status": "new",
        "started": False, "last_ping": None, "next_ping": None,
        "last_duration": None, "manual_resume": False, "methods": "",
        "uuid": made["uuid"], "channels": "*",
        "ping_url": f"{house.url}/ping/{made['uuid']}", "update_url": place,
        "pause_url": f"{place}/pause", "resume_url": f"{place}/resume"}
    assert house.ask("GET", f"/ping/{made['uuid']}").status == 200
    after = call(house, "GET", f"checks/{made['uuid']}").json
    assert after["status"] == "up" and after["n_pings"] == 1
    assert re.fullmatch(TIME, after["last_ping"])
    assert re.fullmatch(TIME, after["next_ping"])


def test_viewer_gets_unique_keys_and_no_ping_urls(house):
    made = save(house, name="seen")
    key = hashlib.sha1(made["uuid"].encode()).hexdigest()
    for path in (f"checks/{key}", f"checks/{made['uuid']}"):
        seen = call(house, "GET", path, key=VIEWER_TOKEN)
        assert seen.status == 200 and seen.json["unique_key"] == key
        assert made["uuid"].encode() not in seen.body
        assert set(made) - set(seen.json) == {
            "uuid", "ping_url", "update_url", "pause_url", "resume_url",
            "channels"}
    assert key in {each["unique_key"] for each in call(
        house, "GET", "checks/", key=VIEWER_TOKEN).json["checks"]}
    assert call(house, "GET", f"checks/{key}/flips/",
                key=VIEWER_TOKEN).json == []
    for method, path in (("POST", "checks/"), ("DELETE", f"checks/{key}"),
                         ("POST", f"checks/{key}"),
                         ("POST", f"checks/{key}/pause"),
                         ("GET", f"checks/{key}/pings/")):
        assert call(house, method, path, key=VIEWER_TOKEN,
                    body={} if method == "POST" else None).status == 403


@pytest.mark.parametrize("key, status", [
    ("", 401), ("f" * 64, 401), ("metrics", 401), (OPERATOR_TOKEN, 200),
    (f"checks-{CHECKS_TOKEN}", 200)])
def test_api_key_determines_the_status(house, key, status):
    reply = call(house, "GET", "checks/", key=key)
    assert reply.status == status
    assert status == 200 or reply.json["error"]


def test_checks_token_is_refused_on_all_other_routes(house):
    for path in ("state", "hosts", "tokens", "audit"):
        assert call(house, "GET", path, version=1).status == 404
        assert house.ask("GET", f"/api/v1/{path}",
                         token=CHECKS_TOKEN).status in (403, 405)
    assert house.ask("GET", "/metrics", token=CHECKS_TOKEN).status == 403


def test_list_is_filtered_by_slug_and_by_all_tags(house):
    for slug, tags in (("f1", "red blue"), ("f2", "red"), ("f3", "redder")):
        save(house, name=slug, slug=slug, tags=tags)

    def slugs(query: str) -> list[str]:
        found = call(house, "GET", f"checks/?{query}")
        assert found.status == 200, found
        return [check["slug"] for check in found.json["checks"]]

    assert slugs("slug=f2") == ["f2"]
    assert slugs("slug=none") == []
    assert slugs("tag=red") == ["f1", "f2"]
    assert slugs("tag=red&tag=blue") == ["f1"]
    assert slugs("tag=red&slug=f2") == ["f2"]


def test_unique_fields_select_an_existing_check_for_the_edit(house):
    first = save(house, name="U", tags="u", timeout=120, unique=["name"])
    again = save(house, 200, name="U", timeout=180, unique=["name"])
    assert again == {**first, "timeout": 180}
    by_two = save(house, 200, name="U2", tags="u", timeout=180,
                  unique=["timeout", "tags"])
    assert by_two["uuid"] == first["uuid"] and by_two["name"] == "U2"
    # A field that the request does not have equals nothing.
    other = save(house, name="U2", unique=["name", "slug"])
    assert other["uuid"] != first["uuid"]
    assert save(house, name="U2", unique=[])["uuid"] not in (
        first["uuid"], other["uuid"])


def test_edit_changes_only_the_given_fields(house):
    made = save(house, name="E", timeout=120)
    path = f"checks/{made['uuid']}"
    cron = call(house, "POST", path, {"schedule": "5 3 * * *",
                                      "tz": "Europe/Riga"}).json
    assert (cron["schedule"], cron["tz"]) == ("5 3 * * *", "Europe/Riga")
    assert "timeout" not in cron and cron["name"] == "E"
    both = save(house, name="B", timeout=120, schedule="1 1 * * *")
    assert both["schedule"] == "1 1 * * *"
    assert call(house, "POST", path, {"timeout": 300}).json["timeout"] == 300


def test_check_is_paused_resumed_and_deleted(house):
    path = f"checks/{save(house, name='P')['uuid']}"
    assert call(house, "POST", f"{path}/resume", {}).status == 409
    paused = house.ask("POST", f"/api/v3/{path}/pause", b"",
                       X_Api_Key=CHECKS_TOKEN)
    assert (paused.status, paused.json["status"]) == (200, "paused")
    assert call(house, "POST", f"{path}/resume", {}).json["status"] == "new"
    assert call(house, "DELETE", path).json["name"] == "P"
    assert call(house, "GET", path).status == 404
    assert call(house, "DELETE", path).status == 404


@pytest.mark.parametrize("status, fields, says", [
    (400, {}, "name"), (400, {"name": "x", "periode": 3}, "periode"),
    (400, {"name": "x", "timeout": 59}, "period"),
    (400, {"name": "x", "schedule": "* *"}, "schedule"),
    (400, {"name": "x", "schedule": "1 1 1 1 1", "tz": "Mars/X"}, "Mars/X"),
    (400, {"name": "x", "unique": ["uuid"]}, "unique"),
    (400, {"name": "x", "unique": [[]]}, "unique"),
    (400, {"name": "x", "channels": "ops"}, "channels"),
    (400, {"name": 7}, "name"), (409, {"name": "x", "slug": "taken"},
                                 "taken")])
def test_error_is_json_and_names_the_field(house, status, fields, says):
    call(house, "POST", "checks/", {"name": "taken", "slug": "taken"})
    reply = call(house, "POST", "checks/", fields)
    assert reply.status == status, reply
    assert says in reply.json["error"]


def test_pings_and_flips_are_listed(house):
    uuid = save(house, name="F", methods="")["uuid"]
    for path, body in (("/start", b""), ("/3", b"oops\n"), ("", b"")):
        assert house.ask("POST", f"/ping/{uuid}{path}?rid={uuid}",
                         body).status == 200
    good, bad, start = call(house, "GET",
                            f"checks/{uuid}/pings/").json["pings"]
    assert [each["type"] for each in (good, bad, start)] == [
        "success", "fail", "start"]
    assert (bad["n"], bad["exitstatus"], bad["method"], bad["rid"]) == (
        2, 3, "POST", uuid)
    assert bad["duration"] >= 0 and good["body_url"] is None
    assert bad["remote_addr"] == "127.0.0.1" and bad["scheme"] == "http"
    assert re.fullmatch(TIME, bad["date"])
    body = call(house, "GET", bad["body_url"].partition("/api/v3/")[2])
    assert (body.status, body.body) == (200, b"oops\n")
    flips = call(house, "GET", f"checks/{uuid}/flips/").json
    assert [flip["up"] for flip in flips] == [1, 0]
    assert re.fullmatch(TIME, flips[0]["timestamp"])
    for query, count in (("seconds=3600", 2), ("start=0", 2), ("end=9", 0),
                         ("start=99999999999", 0), ("seconds=0", 0)):
        assert len(call(house, "GET", f"checks/{uuid}/flips/?{query}").json
                   ) == count, query


@pytest.mark.parametrize("version", [1, 2, 3])
def test_all_versions_of_the_api_give_the_same_answers(house, version):
    assert "checks" in call(house, "GET", "checks/", version=version).json
    assert call(house, "GET", "checks", version=version).status == 200
    assert call(house, "GET", "status/", version=version).body == b"OK"


@pytest.mark.parametrize("headers, url", [
    ({}, "https://koi.example"), ({"X_Forwarded_Proto": "http"},
                                  "http://koi.example"),
    ({"X_Forwarded_Proto": "https", "X_Forwarded_Prefix": "/koi"},
     "https://koi.example/koi")])
def test_urls_behind_a_proxy_are_the_public_ones(proxied, headers, url):
    made = proxied.ask(
        "POST", "/api/v3/checks", {"name": "x"}, OPERATOR_TOKEN,
        Host="koi.example", X_Forwarded_For="203.0.113.9", **headers)
    assert made.json["ping_url"] == f"{url}/ping/{made.json['uuid']}"


# Drives the client as its users do; prints what it found.
CLIENT = """
import json, sys
from healthchecks_io import (BadAPIRequestError, CheckCreate,
                             CheckNotFoundError, CheckTrap, CheckUpdate,
                             Client, HCAPIAuthError)
url, key, viewer, version = sys.argv[1:]
def client(key):
    return Client(api_key=key, api_url=url + "/api/", ping_url=url + "/ping/",
                  api_version=int(version))
found, api = {}, client(key)
made = api.create_check(CheckCreate(
    name="v" + version, tags="pypi", timeout=600, unique=["name"]))
found["made"] = [made.name, made.timeout, made.status]
again = api.create_check(CheckCreate(
    name="v" + version, tags="pypi", timeout=900, unique=["name"]))
found["again"] = [again.uuid == made.uuid, again.timeout]
found["update"] = api.update_check(made.uuid, CheckUpdate(desc="new")).desc
with CheckTrap(api, uuid=made.uuid) as trap:
    trap.add_log("a line")
found["ping"] = api.exit_code_ping(3, uuid=made.uuid, data="oops")
found["pings"] = [(each.number_of_pings, each.type)
                  for each in api.get_check_pings(made.uuid)]
found["flips"] = [each.up for each in api.get_check_flips(made.uuid)]
found["recent"] = len(api.get_check_flips(made.uuid, seconds=3600))
found["list"] = [check.name for check in api.get_checks(tags=["pypi"])
                 if check.uuid == made.uuid]
seen, = [check for check in client(viewer).get_checks(tags=["pypi"])
         if check.name == made.name]
found["viewer"] = [seen.uuid, len(seen.unique_key), seen.status, client(
    viewer).get_check(seen.unique_key).name]
found["channels"] = [each.kind for each in api.get_integrations()]
found["pause"] = api.pause_check(made.uuid).status
found["delete"] = api.delete_check(made.uuid).name
for name, error, act in (
        ("gone", CheckNotFoundError, lambda: api.get_check(made.uuid)),
        ("key", HCAPIAuthError, lambda: client("f" * 64).get_checks()),
        ("bad", BadAPIRequestError, lambda: api.create_check(
            CheckCreate(name="x", timeout=1)))):
    try:
        found[name] = repr(act())
    except error:
        found[name] = True
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def channels(house):
    """Two channels, of which one has a secret in its URL."""
    for kind, target in (("mail", "ann@example.org"),
                         ("webhook", "https://chat.example.org/hook/s3cret")):
        made = house.ask("POST", "/api/v1/channels", {
            "kind": kind, "target": target}, OPERATOR_TOKEN)
        assert made.status == 200, made


def test_channels_are_listed_without_what_may_be_secret(house, channels):
    listed = call(house, "GET", "channels/").json["channels"]
    assert all(isinstance(each.pop("id"), str) for each in listed)
    assert listed == [{"name": "ann@example.org", "kind": "email"},
                      {"name": "https://chat.example.org",
                       "kind": "webhook"}]
    assert call(house, "GET", "channels/", key=VIEWER_TOKEN).status == 403


@pytest.mark.parametrize("version", [1, 2, 3])
def test_client_from_pypi_works(house, channels, version):
    if not PACKAGES.is_dir():
        support.absent("healthchecks-io is missing: make parts")
    done = subprocess.run(
        [PYTHON, "-B", "-c", CLIENT, house.url, CHECKS_TOKEN, VIEWER_TOKEN,
         str(version)], env={"PYTHONPATH": str(PACKAGES)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    name = f"v{version}"
    assert json.loads(done.stdout) == {
        "made": [name, 600, "new"], "again": [True, 900], "update": "new",
        "ping": [True, "OK"], "pings": [[3, "fail"], [2, "success"],
                                        [1, "start"]],
        "flips": [0, 1], "recent": 2, "list": [name],
        "viewer": [None, 40, "down", name],
        "channels": ["email", "webhook"], "pause": "paused",
        "delete": name, "gone": True, "key": True, "bad": True}


def test_dashboard_has_logged_no_bug(house):
    house.assert_no_bugs()

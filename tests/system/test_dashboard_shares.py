"""Shares of clients: what one of them uses up is not that of the others."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess

import support
from dashboard_rig import (HOST, HOST_TOKEN, OPERATOR_TOKEN, VIEWER_TOKEN,
                           DashboardProcess, HttpClient, encode_request,
                           frames, piece, sync_payload, token_of)

koitab = support.load("koitab")
OTHER = "d4" * 16

SLOW_STATE = """
import os
def wait():
    while not os.path.exists({gate!r}):
        k.time.sleep(0.02)
state = k.Dashboard.state
k.Dashboard.state = lambda *values: wait() or state(*values)
k.MOST_OF_CLIENT = 4
"""


def test_one_access_token_does_not_use_up_the_queries_of_others(tmp_path):
    gate = tmp_path / "gate"
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, patch=SLOW_STATE.format(gate=str(gate))) as found:
        found.set_up()
        clients = [stack.enter_context(found.client()).send(encode_request(
            found.port, "GET", "/api/v1/state", token=VIEWER_TOKEN))
            for _ in range(10)]
        assert found.ask("GET", "/api/v1/audit",
                         token=OPERATOR_TOKEN).status == 200
        assert found.ask("GET", "/healthz").status == 200
        gate.touch()
        statuses = sorted(client.reply().status for client in clients)
        assert statuses == [200] * 4 + [503] * 6
        assert found.ask("GET", "/api/v1/state",
                         token=VIEWER_TOKEN).status == 200
        found.assert_no_bugs()


def test_refusals_of_one_client_leave_room_in_the_log_for_others(tmp_path):
    with DashboardProcess(tmp_path, "--behind-proxy", "127.0.0.1") as found:
        for client in ("203.0.113.1", "203.0.113.2"):
            for _ in range(koitab.LINES_IN_TIME):
                found.ask("GET", "/nope", X_Forwarded_For=client)
        assert "203.0.113.2 GET /nope: 404" in found.log()


def test_many_changes_make_a_page_reload_everything_once(tmp_path):
    """A host that floods would have every page load the state for ever."""
    with DashboardProcess(tmp_path, patch="k.MOST_MARKED = 0\n"
                          "k.RESET_PAUSE = 3.0") as found:
        found.set_up()
        with found.client() as stream:
            stream.send(encode_request(
                found.port, "GET", "/api/v1/stream?since=0",
                token=VIEWER_TOKEN))
            stream.head()
            lines = [stream.line()]
            for number in range(10):
                found.register_host(f"{number:032x}", f"{number:064x}")
            lines.append(stream.line())
            found.stop()
            lines += stream.read_to_end().split()
        assert {line.strip() for line in lines} == {b'{"reset":true}'}
        assert len(lines) <= 3


def begin_sync(found, length: int = 8_000_000) -> HttpClient:
    """Begin a sync of web1, and send a part of its body."""
    return found.client().send(encode_request(
        found.port, "POST", "/api/v1/sync", token=HOST_TOKEN,
        Content_Type="application/json", Content_Length=length) + b"{")


def test_one_host_has_few_requests_at_once_and_takes_little_memory(tmp_path):
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path) as found:
        found.set_up()
        clients = [stack.enter_context(begin_sync(found))
                   for _ in range(koitab.MOST_OF_HOST + 3)]
        for client in clients[koitab.MOST_OF_HOST:]:
            assert client.reply().status == 503
        found.register_host(OTHER, token_of(OTHER))
        assert found.ask("POST", "/api/v1/sync", sync_payload(OTHER),
                         token_of(OTHER)).status == 200
        for client in clients:
            client.sock.close()
        support.wait_until(lambda: found.ask(
            "POST", "/api/v1/sync", sync_payload(), HOST_TOKEN).status == 200,
            20)


def test_body_of_a_dashboard_to_create_is_not_read_without_the_token(
        tmp_path):
    with DashboardProcess(tmp_path) as found, found.client() as client:
        client.send(encode_request(
            found.port, "POST", "/api/v1/dashboards", token="0" * 64,
            Content_Type="application/json", Content_Length=60_000))
        assert client.reply().status == 403


def test_clients_that_send_bodies_slowly_make_room_for_others(tmp_path):
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, patch="k.MOST_CONNECTIONS = 20") as found:
        found.set_up()
        uuid = found.add_check()
        for _ in range(20):
            client = stack.enter_context(found.client())
            client.send(encode_request(
                found.port, "POST", f"/ping/{uuid}", Content_Length=9,
                Expect="100-continue"))
            assert client.head()[0] == 100      # it waits for the body
        assert found.ask("GET", "/healthz").body == b"OK"


def test_pings_with_bodies_to_one_check_are_bounded(tmp_path):
    """Each may be a megabyte, and local clients have no other limit."""
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, patch="k.MOST_OF_CLIENT = 3") as found:
        found.set_up()
        mine = found.add_check()
        other = found.ask("POST", "/api/v1/checks", {"name": "other"},
                          OPERATOR_TOKEN).json["id"]
        for _ in range(3):
            client = stack.enter_context(found.client())
            client.send(encode_request(
                found.port, "POST", f"/ping/{mine}", Content_Length=1_000_000,
                Expect="100-continue"))
            assert client.head()[0] == 100
        assert found.ask("POST", f"/ping/{mine}", b"x").status == 503
        assert found.ask("GET", f"/ping/{mine}").status == 200
        assert found.ask("POST", f"/ping/{other}", b"x").status == 200


LARGE_STATE = """
k.MOST_OF_CLIENT = 3
state = k.Dashboard.state
k.Dashboard.state = lambda *values: {**state(*values), "pad": "x" * 2**25}
"""


def test_client_that_does_not_read_holds_few_responses(tmp_path):
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, patch=LARGE_STATE) as found:
        found.set_up()
        for _ in range(3):
            client = stack.enter_context(found.client())
            client.send(encode_request(found.port, "GET", "/api/v1/state",
                                       token=VIEWER_TOKEN))
            assert client.head()[0] == 200
        assert found.ask("GET", "/api/v1/audit",
                         token=VIEWER_TOKEN).status == 503
        assert found.ask("GET", "/api/v1/audit",
                         token=OPERATOR_TOKEN).status == 200
        client.sock.close()
        support.wait_until(lambda: found.ask(
            "GET", "/api/v1/audit", token=VIEWER_TOKEN).status == 200, 20)


def test_connections_of_one_token_make_room_for_others(tmp_path):
    """A viewer that follows all changes many times kept everyone out."""
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, patch="k.MOST_CONNECTIONS = 20") as found:
        found.set_up()
        operator = stack.enter_context(found.client())
        assert operator.ask("GET", "/api/v1/audit",
                            token=OPERATOR_TOKEN).status == 200
        for _ in range(22):
            client = stack.enter_context(found.client())
            client.send(encode_request(found.port, "GET", "/api/v1/stream",
                                       token=VIEWER_TOKEN))
            assert client.head()[0] == 200
        assert found.ask("GET", "/healthz").status == 200
        assert operator.ask("GET", "/api/v1/audit",
                            token=OPERATOR_TOKEN).status == 200


NINE_CONNECTIONS = """
import socket, sys
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(sys.argv[1])
    sock.sendall(b"G")
    return sock
held = [connect() for _ in range(9)]
print([sock.recv(12).decode() for sock in held[5:]])
"""


@support.root_only
def test_local_user_has_a_share_of_the_connections_to_the_socket(tmp_path):
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(directory.stat().st_mode | 0o055)
    with DashboardProcess(tmp_path, patch="k.MOST_UNPROVEN = 5") as found:
        path = str(tmp_path / koitab.dashboard_socket_name(found.port))
        refused = subprocess.run(
            ["/usr/bin/python3", "-c", NINE_CONNECTIONS, path], user=65534,
            stdout=subprocess.PIPE, check=True, timeout=60).stdout
        assert refused.count(b"503") == 4
        assert found.ask("GET", "/healthz").status == 200


# --- what a viewer may not learn

VALUES = {"HOST": HOST, "JOB": "1", "RUN": "1", "N": "1", "NONCE": "0" * 32,
          "KEY": "0" * 32, "NAME": "all.svg"}


def crawl(found, checks: tuple) -> bytes:
    """All that a viewer gets: each route, for each of these checks, with
    good and bad fields."""
    seen = b""
    for path in {route.path for route in koitab.ROUTES
                 if route.method == "GET" and "stream" not in route.path}:
        for check in checks if "CHECK" in path else ("",):
            words = [{"CHECK": check, **VALUES}.get(word, word)
                     for word in path.split("/")]
            for query, accept in (
                    ("", None), ("", "gzip"), ("?before=x", None),
                    ("?q=ping&from=1&to=9999999999", None)):
                reply = found.ask("GET", "/".join(words) + query,
                                  token=VIEWER_TOKEN, Accept_Encoding=accept,
                                  Accept=koitab.SECONDS_JSON)
                if accept and "content-encoding" in reply.headers:
                    seen += gzip.decompress(reply.body)
                seen += reply.body + repr(reply.headers).encode()
    return seen


def secret_job(found, address: str, number: int = 1) -> None:
    """A job of web1 whose command and output have what can ping."""
    job = {"user": "root", "tag": f"t{number}", "section": "", "name": "",
           "label": f"curl https://koi/ping/{address}"}
    data = frames(f"GET /ping/{address}\n")
    for fields in (
            {"list": {"mac": "e" * 64, "body": json.dumps({
                "v": 1, "dash": found.dash, "host": HOST, "key": "0" * 16,
                "name": "web1", "at": 1, "jobs": [json.dumps({
                    **job, "when": "@manual", "words": "", "params": [],
                    "command": job["label"], "confirm": "no"})]})}},
            {"records": [{
                **job, "run": number, "change": number, "state": "done",
                "trigger": "manual", "started": 1.0, "ended": 2.0, "exit": 1,
                "size": len(data)}]},
            {"outputs": [piece(number, 0, data)]}):
        reply = found.ask("POST", "/api/v1/sync", sync_payload(**fields),
                          HOST_TOKEN)
        assert reply.status == 200, reply


def test_no_answer_to_a_viewer_has_what_could_ping(tmp_path):
    with DashboardProcess(tmp_path) as found, found.client() as stream:
        found.set_up()
        uuid = found.add_check()
        secret_job(found, uuid)
        key, state = koitab.hashed_uuid(uuid), found.ask(
            "GET", "/api/v1/state", token=OPERATOR_TOKEN).json
        ping_key = state["dash"]["ping_key"]
        secret_job(found, f"{ping_key}/slug", 2)
        stream.send(encode_request(
            found.port, "GET", f"/api/v1/stream?since={state['seq']}",
            token=VIEWER_TOKEN))
        stream.head()
        for path, body in (
                (f"/ping/{uuid}/fail", b"oops"),
                ("/api/v1/snooze", {"subject": f"check:{uuid}",
                                    "until": "well"}),
                ("/api/v1/snooze", {"subject": f"check:{uuid}", "until": 0}),
                (f"/api/v1/checks/{uuid}", {"do": "pause"}),
                (f"/api/v1/checks/{uuid}", {"do": "resume"}),
                (f"/api/v1/checks/{uuid}", {"name": "new"}),
                (f"/ping/{uuid}/1", b"oops"),
                (f"/ping/{ping_key}/slug?create=1", b""),
                (f"/api/v3/checks/{uuid}/pause", {})):
            reply = found.ask("POST", path, body, OPERATOR_TOKEN)
            assert reply.status in (200, 201), path
        seen = crawl(found, (key, "0" * 40))
        found.ask("POST", f"/api/v1/checks/{uuid}", {"do": "delete"},
                  OPERATOR_TOKEN)
        while b'"deleted"' not in seen:
            seen += stream.line()
    assert seen.count(key.encode()) > 6 and b"snooze" in seen
    assert b"curl https://koi/ping/***" in seen
    assert uuid.encode() not in seen and ping_key.encode() not in seen


def test_viewer_cannot_search_for_what_could_ping(tmp_path):
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        uuid = found.add_check()
        secret_job(found, uuid)
        for token, count in ((OPERATOR_TOKEN, 1), (VIEWER_TOKEN, 0)):
            matches = found.ask("GET", f"/api/v1/search?q={uuid[:5]}",
                                token=token).json["matches"]
            assert len(matches) == count

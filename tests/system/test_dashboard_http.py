"""The dashboard over real sockets: hostile, slow, silent or many clients."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import random
import resource
import select
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
import warnings
from pathlib import Path

import pytest

import servers
import support
from dashboard_rig import (HOST, HOST_TOKEN, OPERATOR_TOKEN, STAY_ROOT,
                           VIEWER_TOKEN, DashboardProcess, HttpClient,
                           encode_request, new_token, sync_payload)

koitab = support.load("koitab")


# Tests that come by a proxy send its X-Forwarded-For themselves.
PROXIED = ("--behind-proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def server(server):
    """A dashboard that most tests share: they leave it as it was."""
    server.set_up()
    server.uuid = server.add_check()
    return server


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return servers.certificate(tmp_path_factory.mktemp("cert"))


@pytest.fixture(scope="module")
def trust(made):
    return ssl.create_default_context(cafile=made.cert)


def busy(process, seconds: float) -> float:
    """The share of a core that a process takes."""
    def used() -> float:
        with open(f"/proc/{process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


# --- pages and plain answers ----------------------------------------------


def test_page_has_a_content_security_policy_with_its_hashes(server):
    reply = server.ask("GET", "/")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["content-security-policy"] == \
        koitab.page_policy_of(reply.body.decode())
    assert reply.headers["cache-control"] == "no-cache"
    assert "set-cookie" not in reply.headers
    again = server.ask("GET", "/", If_None_Match=reply.headers["etag"])
    assert (again.status, again.body) == (304, b"")


def test_page_and_state_are_compressed_for_clients_that_accept_it(server):
    for path, most in (("/", 65_000), ("/api/v1/state", 10_000)):
        plain = server.ask("GET", path, token=OPERATOR_TOKEN)
        packed = server.ask("GET", path, token=OPERATOR_TOKEN,
                            Accept_Encoding="br;q=1, gzip;q=0.5")
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.headers["vary"] == "Accept-Encoding"
        assert len(packed.body) < most
        text = gzip.decompress(packed.body)
        assert text == plain.body or json.loads(text).keys() \
            == json.loads(plain.body).keys()
        for refused in ("", "identity", "gzip;q=0", "gzip;q=0.000", "x-gzip"):
            assert "content-encoding" not in server.ask(
                "GET", path, token=OPERATOR_TOKEN,
                Accept_Encoding=refused).headers, refused


@pytest.mark.parametrize("path", ["/", "/healthz", "/api/v1/state"])
def test_head_is_answered_like_get_without_a_body(server, path):
    with server.client() as client:
        whole = client.ask("GET", path, token=OPERATOR_TOKEN)
        head = client.ask("HEAD", path, token=OPERATOR_TOKEN)
        assert head.status == whole.status == 200
        assert head.headers.keys() == whole.headers.keys()
        assert client.ask("GET", "/healthz").body == b"OK"


def test_metrics_require_a_token(server):
    assert server.ask("GET", "/metrics").status == 401
    reply = server.ask("GET", "/metrics", token=VIEWER_TOKEN)
    assert reply.headers["content-type"].startswith("text/plain; version=0")
    assert b"\nkoi_http_connections " in reply.body


def test_badge_is_served_as_svg_or_json(server):
    key = server.ask("GET", "/api/v1/state",
                     token=OPERATOR_TOKEN).json["dash"][
        "badge_key"]
    picture = server.ask("GET", f"/badge/{key}/all.svg")
    assert picture.headers["content-type"] == "image/svg+xml"
    assert picture.headers["cache-control"] == "no-cache"
    assert picture.headers["access-control-allow-origin"] == "*"
    assert picture.body.startswith(b"<svg ")
    assert server.ask("GET", f"/badge/{key}/all.json").json[
        "schemaVersion"] == 1
    assert server.ask("GET", f"/badge/{key}/all.png").status == 404


# --- a connection serves many requests, in order --------------------------


def test_pipelined_requests_are_answered_in_order(server):
    port = server.port
    with server.client() as client:
        client.send(b"".join([
            encode_request(port, "GET", "/api/v1/state", token=OPERATOR_TOKEN),
            encode_request(port, "GET", "/healthz"),
            encode_request(port, "POST", f"/ping/{server.uuid}",
                           b"x" * 50_000),
            encode_request(port, "GET", "/nothing"),
            encode_request(port, "HEAD", "/"), encode_request(port, "GET",
                                                              "/healthz")]))
        assert "seq" in client.reply().json
        assert client.reply().body == b"OK"
        assert client.reply().status == 200
        assert client.reply().status == 404
        assert client.reply("HEAD").status == 200
        assert client.reply().body == b"OK"


def test_a_hundred_pipelined_pings_are_answered(server):
    with server.client() as client:
        client.send(encode_request(server.port, "GET", f"/ping/{server.uuid}")
                    * 100)
        assert {client.reply().body for _ in range(100)} == {b"OK"}


def test_a_request_may_come_byte_by_byte(server):
    data = encode_request(server.port, "POST", f"/ping/{server.uuid}/fail",
                          b"abc")
    with server.client() as client:
        for at in range(len(data)):
            client.send(data[at:at + 1])
        assert client.reply().body == b"OK"
        assert client.ask("GET", "/healthz").body == b"OK"


def test_connection_close_and_http_1_0_close_the_connection(server):
    for data in (encode_request(server.port, "GET", "/healthz",
                                Connection="close"),
                 b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n"):
        with server.client() as client:
            reply = client.send(data).reply()
            assert (reply.status, reply.body) == (200, b"OK")
            assert reply.headers["connection"] == "close"
            assert client.is_closed()


def test_half_closed_client_is_still_answered(server):
    with server.client() as client:
        client.send(encode_request(server.port, "GET", "/api/v1/state",
                                   token=OPERATOR_TOKEN))
        client.sock.shutdown(socket.SHUT_WR)
        assert client.reply().status == 200
        assert client.is_closed()


def test_continue_response_is_sent_when_expected(server):
    with server.client() as client:
        client.send(encode_request(server.port, "POST", f"/ping/{server.uuid}",
                                   None,
                                   Content_Length=3, Expect="100-continue"))
        assert client.head()[0] == 100
        assert client.send(b"abc").reply().status == 200
        client.send(encode_request(server.port, "POST", f"/ping/{server.uuid}",
                                   None, Content_Length=10**9,
                                   Expect="100-continue"))
        assert client.reply().status == 413
        assert client.is_closed()
    assert server.ask("POST", f"/ping/{server.uuid}", b"a",
                      Expect="tea").status == 417


# --- what is refused ------------------------------------------------------

SMUGGLED = (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")


@pytest.mark.parametrize("lines", [
    b"Transfer-Encoding: gzip\r\n", b"Transfer-Encoding: xchunked\r\n",
    b"Content-Length: 4\r\nContent-Length: 40\r\n",
    b"Content-Length : 4\r\n", b"Content-Length: 4\r\n folded: x\r\n",
    b"X: a\rContent-Length: 4\r\n", b"X: a\nContent-Length: 4\r\n",
    b"no colon\r\nContent-Length: 4\r\n", b"X\0: a\r\n", b"\x0bX: a\r\n",
    b"Content-Length: +4\r\n", b"Content-Length: 4_0\r\n",
    b"Content-Length: -1\r\n", b"Content-Length: \xb2\r\n",
    b"Content-Length: 0x4\r\n", b"Content-Length: 4, 4\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Encoding: gzip\r\nContent-Length: 4\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    b"Host: localhost\r\nContent-Length: 4\r\n"])
def test_body_cannot_contain_a_smuggled_request(server, lines):
    head = b"POST /ping/" + server.uuid.encode() + b" HTTP/1.1\r\nHost: " \
        b"localhost\r\n" + lines + b"\r\n"
    with server.client() as client:
        reply = client.send(head + b"0\r\n\r\n" + SMUGGLED).reply()
        assert reply.status in (400, 413, 415, 501), reply
        assert reply.headers["connection"] == "close"
        assert client.is_closed()


def encode_chunks(body: bytes, size: int) -> bytes:
    """A body in chunks of `size` bytes."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (
        body[at:at + size] for at in range(0, len(body), size))) \
        + b"0\r\n\r\n"


def test_a_ping_may_come_in_chunks_up_to_the_limit(server):
    path = f"/ping/{server.uuid}"
    with server.client() as client:
        for _ in range(2):      # what follows on the connection is understood
            client.send(encode_request(server.port, "POST", path, None,
                                       Transfer_Encoding="chunked")
                        + encode_chunks(b"all is well", 4))
            assert client.reply().status == 200
        client.send(encode_request(server.port, "POST", path, None,
                                   Transfer_Encoding="chunked")
                    + encode_chunks(b"x" * (2**20 + 1), 5000))
        assert client.reply().status == 413
        assert client.is_closed() and not client.reset
    ping = server.ask("GET", f"/api/v1/checks/{server.uuid}/pings",
                      token=VIEWER_TOKEN).json["pings"][0]
    assert (ping["line"], ping["size"]) == ("all is well", 11)
    with server.client() as client:
        client.send(encode_request(
            server.port, "POST", "/api/v1/snooze", None, OPERATOR_TOKEN,
            Transfer_Encoding="chunked", Content_Type="application/json")
            + b"2\r\n{}\r\n0\r\n\r\n")
        assert client.reply().status == 501
        assert client.is_closed()


APACHE = """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/pid
ErrorLog {folder}/log
Listen 127.0.0.1:{port}
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
ProxyPass / http://127.0.0.1:{target}/
"""


def test_oversized_body_gets_status_413_through_apache(server, tmp_path):
    support.need("apache2")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "apache.conf"
    config.write_text(APACHE.format(
        folder=tmp_path, port=port, target=server.port,
        modules="/usr/lib/apache2/modules"))
    apache = subprocess.Popen(
        ["/usr/sbin/apache2", "-X", "-f", str(config)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def connected():
            with contextlib.suppress(OSError):
                return HttpClient(port)
        with support.wait_until(connected, 10, "apache") as client:
            assert client.ask("POST", f"/ping/{server.uuid}", b"x" * 2**23,
                              Host=f"127.0.0.1:{server.port}").status == 413
    finally:
        apache.terminate()
        apache.wait()


def test_a_get_with_a_body_is_refused(server):
    with server.client() as client:
        client.send(encode_request(server.port, "GET", "/healthz", SMUGGLED))
        assert client.reply().status == 400
        assert client.is_closed()


@pytest.mark.parametrize("data", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /\r\n",
    b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0", b"\r\n\r\n",
    b"GET / HTTP/1.1\n\n", b"HELP\n", b"GET http://evil/ HTTP/1.1\r\n\r\n"
    b"Host: localhost\r\n\r\n"])
def test_bytes_that_are_not_http_get_status_400_without_a_timeout(
        server, data):
    with server.client() as client:
        if data == b"GET /\r\n":        # half a head: more may come
            data += b"\r\n"
        # It does not wait for the rest, as the client waits no 20 s.
        assert client.send(data).reply().status == 400
        assert client.is_closed()


@pytest.mark.parametrize("target", [
    "/../../etc/passwd", "/%2e%2e/etc/passwd", "//evil.example/", "/a%00b",
    "http://evil.example/x", "/\xff", "/api/v1/../state", "/index.html",
    "/api/v1/runs/1/output/", "/static/koitab.py", "*"])
def test_path_without_a_route_is_not_found(server, target):
    reply = server.ask("GET", target, token=OPERATOR_TOKEN)
    assert reply.status in (400, 404)
    assert b"root:" not in reply.body


def test_a_head_has_limits(server):
    many = {f"X_{number}": "y" for number in range(70)}
    large = {f"X_{number}": "y" * 1000 for number in range(20)}
    assert server.ask("GET", "/healthz", **many).status == 431
    assert server.ask("GET", "/healthz", **large).status == 431
    assert server.ask("GET", "/" + "x" * 8192).status == 414
    with server.client() as client:      # one that never ends
        client.send(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 4000)
        assert client.reply().status == 431
        assert client.is_closed()


@pytest.mark.parametrize("path, most, token", [
    ("/api/v1/snooze", 2**16, OPERATOR_TOKEN), ("/api/v1/requests", 2**20,
                                                OPERATOR_TOKEN),
    ("/api/v1/sync", 2**23, HOST_TOKEN), ("/ping/UUID", 2**20, "")])
def test_body_over_its_limit_gets_status_413(server, path, most, token):
    path = path.replace("UUID", server.uuid)
    reply = server.ask("POST", path, b"x" * (most + 1), token,
                       Content_Type="application/json")
    assert reply.status == 413, reply
    reply = server.ask("POST", path, b" " * most, token,
                       Content_Type="application/json")
    assert reply.status == (200 if "ping" in path else 400), reply


def test_a_body_without_a_valid_key_is_not_read(server):
    reply = server.ask("POST", "/api/v1/sync", b"x" * 2**22,
                       Content_Type="application/json")
    assert reply.status == 401


def test_refusal_reaches_a_client_that_is_still_sending_its_body(server):
    """A socket that is closed over what it has not read sends a reset."""
    with server.client() as client:
        client.send(encode_request(server.port, "POST", "/api/v1/snooze",
                                   b"x" * 300_000, "f" * 64,
                                   Content_Type="application/json"))
        assert client.reply().status == 413
        assert client.is_closed() and not client.reset


def test_input_of_a_client_that_sends_ahead_is_not_read(server):
    with server.client() as host:
        settled(host, server, 25)
        host.sock.settimeout(0.2)
        sent = 0
        with contextlib.suppress(socket.timeout):
            while sent < 50_000_000:
                sent += host.sock.send(b"x" * 65_536)
        assert sent < 30_000_000


@pytest.mark.parametrize("headers, status", [
    ({"Content_Type": "text/plain"}, 415), ({"Content_Type": None}, 415),
    ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content_Type": "application/json", "Content_Encoding": "gzip"}, 415),
    ({"Content_Type": "Application/JSON; charset=utf-8"}, 400)])
def test_a_body_that_is_not_json_is_refused(server, headers, status):
    reply = server.ask("POST", "/api/v1/snooze", b"x=1", OPERATOR_TOKEN,
                       **headers)
    assert reply.status == status


@pytest.mark.parametrize("method, path, allowed", [
    ("POST", "/", "GET"), ("PUT", "/api/v1/checks", "POST"),
    ("GET", "/api/v1/sync", "POST"), ("DELETE", "/healthz", "GET")])
def test_wrong_method_gets_status_405_with_the_allowed_methods(
        server, method, path, allowed):
    reply = server.ask(method, path, token=OPERATOR_TOKEN)
    assert (reply.status, reply.headers["allow"]) == (405, allowed)


def test_random_errors_in_a_head_cause_no_internal_error(server):
    """Most go through the parser alone, some over a connection."""
    chance = random.Random(105)
    good = encode_request(1, "POST", "/api/v1/sync?a=b", b"{}", OPERATOR_TOKEN)
    parts = [b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"HTTP/1.1", b"%", b"/",
             b"Content-Length: 9\r\n", b"Transfer-Encoding: x\r\n",
             b"\xff\xfe", b"\r\n\r\n", b"GET / HTTP/1.1\r\n", b"..", b"\t",
             b"Host: localhost\r\n", b"Expect: 100-continue\r\n"]

    def wrong() -> bytes:
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data) + 1)
            if chance.random() < 0.3:
                del data[at:at + chance.randint(1, 20)]
            elif chance.random() < 0.3:
                data[at:at + 1] = bytes([chance.randrange(256)])
            else:
                data[at:at] = chance.choice(parts)
        return bytes(data)

    for _ in range(10_000 if support.FULL else 1_250):
        data = wrong()
        end = data.find(b"\r\n\r\n")
        head = data if end < 0 else data[:end + 2]
        try:
            if head and not koitab.partial_head_error(head) and end >= 0:
                koitab.find_routes(koitab.parse_head(head[:-2]).path)
        except koitab.Error as error:
            assert 400 <= error.status < 600
    for _ in range(500 if support.FULL else 60):
        with server.client() as client:
            client.send(wrong())
            client.sock.shutdown(socket.SHUT_WR)
            client.read_to_end()
            assert client.data[:9] in (b"HTTP/1.1 ", b"")
    assert server.ask("GET", "/healthz").status == 200
    server.assert_no_bugs()


# --- who calls, and from where --------------------------------------------


@pytest.mark.parametrize("path", ["/", "/healthz", "/api/v1/state", "/nope"])
def test_an_unknown_host_name_is_refused_for_every_path(server, path):
    reply = server.ask("GET", path, token=OPERATOR_TOKEN, Host="evil.example")
    assert reply.status == 421
    assert "--name" in reply.json["hint"]


def test_host_names_given_with_option_name_are_allowed(tmp_path):
    with DashboardProcess(tmp_path, "--name", "Koi.example", "--name",
                          "b.example:444") as found:
        for host, status in (("koi.example", 200), ("KOI.EXAMPLE:1", 200),
                             ("b.example:444", 200), ("b.example", 421),
                             ("localhost:9", 200), ("10.0.0.1", 421)):
            assert found.ask("GET", "/", Host=host).status == status


@pytest.mark.parametrize("origin, path, status, allowed", [
    (None, "/api/v1/state", 200, None),
    ("http://127.0.0.1:PORT", "/api/v1/state", 200, None),
    ("https://127.0.0.1:PORT", "/api/v1/state", 200, None),
    ("http://127.0.0.1:1", "/api/v1/state", 403, None),
    ("http://evil.example", "/api/v1/state", 403, None),
    ("http://evil.example", "/", 403, None), ("null", "/", 403, None),
    ("evil", "/api/v1/state", 403, None),
    ("null", "/api/v1/state", 200, "null"),
    ("null", "/api/v1/salt", 200, "null"),
    ("http://evil.example", "/ping/UUID", 200, "*"),
    (None, "/ping/UUID", 200, "*")])
def test_pages_of_other_origins_are_refused(server, origin, path, status,
                                            allowed):
    origin = origin and origin.replace("PORT", str(server.port))
    reply = server.ask("GET", path.replace("UUID", server.uuid),
                       token=OPERATOR_TOKEN,
                       Origin=origin)
    assert reply.status == status
    assert reply.headers.get("access-control-allow-origin") == allowed


def test_a_page_from_a_file_may_send_preflight_requests(server):
    reply = server.ask("OPTIONS", "/api/v1/requests", Origin="null",
                       Access_Control_Request_Method="POST",
                       Access_Control_Request_Headers="authorization")
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == "null"
    assert "Authorization" in reply.headers["access-control-allow-headers"]
    refused = server.ask("OPTIONS", "/api/v1/requests",
                         Origin="https://evil.example")
    assert refused.status == 403
    assert "access-control-allow-origin" not in refused.headers


def test_a_page_from_a_file_cannot_create_a_dashboard(server):
    reply = server.ask("POST", "/api/v1/dashboards", {}, Origin="null")
    assert reply.status == 403
    assert "access-control-allow-origin" not in reply.headers


def path_of(route) -> str:
    values = {"HOST": HOST, "NONCE": "e5" * 16, "JOB": "1", "RUN": "1",
              "N": "1", "CHECK": "0b5f1c2e-1111-4222-8333-444455556666",
              "KEY": "abc", "NAME": "all.svg", "ACTION": "pause"}
    return "/".join(values.get(word, word)
                    for word in route.path.split("/"))


def test_token_of_another_role_is_refused_on_every_route(server):
    wrong = []
    for role, token in (("checks", "c4" * 32), ("metrics", "e5" * 32)):
        assert server.ask("POST", "/api/v1/tokens", new_token(role, token),
                          OPERATOR_TOKEN).status == 200
    for route in koitab.ROUTES:
        if route.role == "anyone":
            continue
        body = b"[]" if route.method == "POST" else None
        for token, role in ((OPERATOR_TOKEN, "operator"), (VIEWER_TOKEN,
                                                           "viewer"),
                            (f"view-{VIEWER_TOKEN}", "viewer"),
                            ("checks-" + "c4" * 32, "checks"),
                            ("metrics-" + "e5" * 32, "metrics"),
                            (HOST_TOKEN, "host"), ("", "")):
            if role in koitab.TOKEN_ROLES[route.role]:
                continue
            reply = server.ask(route.method, path_of(route), body, token,
                               Content_Type="application/json")
            if reply.status != (403 if role else 401):
                wrong.append((route, role, reply))
    assert wrong == []


def test_viewer_can_read_the_state_and_change_nothing(server):
    assert server.ask("GET", "/api/v1/state", token=VIEWER_TOKEN).json[
        "role"] == "viewer"
    assert server.ask("POST", "/api/v1/snooze", {
        "subject": "job:1", "until": 0}, VIEWER_TOKEN).status == 403


def test_wrong_keys_are_throttled_and_valid_keys_are_not(tmp_path):
    with DashboardProcess(tmp_path, *PROXIED,
                          patch="k.MISS_PAUSE = 0.0") as found:
        found.set_up()
        where = {"X_Forwarded_For": "203.0.113.9"}
        replies = [found.ask("GET", "/api/v1/state", token="f" * 64, **where)
                   for _ in range(12)]
        assert [reply.status for reply in replies] == [401] * 10 + [429] * 2
        assert 55 <= int(replies[-1].headers["retry-after"]) <= 61
        for token in (OPERATOR_TOKEN, VIEWER_TOKEN):
            assert found.ask("GET", "/api/v1/state", token=token,
                             **where).status == 200
        assert found.ask("POST", "/api/v1/sync", sync_payload(), HOST_TOKEN,
                         **where).status == 200
        assert found.ask("GET", "/api/v1/state", token="f" * 64).status == 401


def test_wrong_keys_from_many_addresses_do_not_lock_out_other_clients(
        tmp_path):
    with DashboardProcess(tmp_path, *PROXIED,
                          patch="k.MISS_PAUSE = 0.0") as found:
        found.set_up()
        with found.client() as client:
            for number in range(310):
                assert client.ask(
                    "GET", "/api/v1/state", token="f" * 64,
                    X_Forwarded_For=f"203.0.113.{number % 31}").status == 401
            assert client.ask("GET", "/api/v1/state", token=OPERATOR_TOKEN,
                              X_Forwarded_For="198.51.100.1").status == 200


def test_only_wrong_keys_are_answered_with_a_delay(tmp_path):
    with DashboardProcess(tmp_path, patch="k.MISSES = 0\n"
                          "k.MISS_PAUSE = 600.0") as found:
        found.set_up()
        with found.client() as client:
            client.send(encode_request(found.port, "GET", "/api/v1/state",
                                       token="f" * 64))
            assert found.ask("GET", "/api/v1/state",
                             token=OPERATOR_TOKEN).status == 200
            readable, _, _ = select.select([client.sock], [], [], 0)
            assert not readable


def test_the_log_contains_neither_keys_nor_queries(tmp_path):
    with DashboardProcess(tmp_path, *PROXIED) as found:
        found.set_up()
        found.ask("GET", "/api/v1/state?secret=1", token="deadbeef" * 8,
                  X_Forwarded_For="203.0.113.10")
        found.ask("GET", "/api/v1/nope\x7f")
        found.ask("GET", "/" + "0123456789abcdef" * 4)
        found.ask("GET", "/ping/0b5f1c2e-1111-4222-8333-444455556666?rid=x")
        log = found.log()
    assert "203.0.113.10 GET /api/v1/state: 401" in log
    for secret in ("secret", "deadbeef", "0123456789abcdef", OPERATOR_TOKEN,
                   VIEWER_TOKEN,
                   HOST_TOKEN, "0b5f1c2e", "rid", "\x1b", "\x7f"):
        assert secret not in log


def test_repeated_refusals_do_not_fill_the_log(tmp_path):
    with DashboardProcess(tmp_path, patch="k.LINES_TIME = 0.3") as found:
        began = time.monotonic()
        with found.client() as client:
            for _ in range(200):
                assert client.ask("GET", "/nope").status == 404
        said = support.wait_until(lambda: "refusals left out" in found.log(
            ) and found.log(), 30)
        # A busy machine needs longer than one span for the requests.
        spans = 2 + int((time.monotonic() - began) / 0.3)
        assert said.count(" 404 ") <= spans * koitab.LINES_IN_TIME
        assert found.ask("GET", "/nope").status == 404


# --- pings ----------------------------------------------------------------


def test_ping_is_answered_as_by_healthchecks(server):
    for method, path in (("GET", ""), ("HEAD", ""), ("POST", "/start"),
                         ("GET", "/fail"), ("GET", "/log"), ("GET", "/7"),
                         ("GET", "/")):
        for prefix in ("/ping", ""):
            reply = server.ask(method, f"{prefix}/{server.uuid}{path}")
            assert reply.status == 200
            assert reply.body == (b"" if method == "HEAD" else b"OK")
            assert reply.headers["access-control-allow-origin"] == "*"
            assert reply.headers["ping-body-limit"] == "10000"
    unknown = server.ask("GET", "/ping/11111111-2222-3333-4444-555555555555")
    assert (unknown.status, unknown.body) == (404, b"not found")
    assert unknown.headers["content-type"].startswith("text/plain")


# --- hosts wait without a thread ------------------------------------------


def waiting(server) -> int:
    text = server.ask("GET", "/metrics", token=VIEWER_TOKEN).body.decode()
    return int(text.split("\nkoi_http_long_polls ")[1].split()[0])


def an_order(server, nonce: str = "1" * 32) -> dict:
    """A request for the host; its body is the host's to judge."""
    return {"host": HOST, "mac": "0" * 64, "body": json.dumps({
        "v": 1, "do": "run", "nonce": nonce, "iat": int(time.time() * 1000),
        "exp": int(time.time() * 1000) + 300_000, "host": HOST,
        "dash": server.dash,
        "key": "0" * 16, "user": "root", "tag": "t" * 12, "job": "0" * 64,
        "args": {}, "secrets": {}})}


def settled(client: HttpClient, server, wait: float) -> None:
    """A long poll that waits, with nothing left to be said at once."""
    first = client.ask("POST", "/api/v1/sync", sync_payload(), HOST_TOKEN)
    assert first.status == 200, first
    client.send(encode_request(server.port, "POST", "/api/v1/sync",
                               sync_payload(wait=wait), HOST_TOKEN))
    support.wait_until(lambda: waiting(server) == 1, 10, "the poll to wait")


def test_waiting_poll_of_a_host_is_answered_with_a_request(server):
    with server.client() as host, server.client() as page:
        settled(host, server, 25)
        asked = page.ask("POST", "/api/v1/requests", an_order(server),
                         OPERATOR_TOKEN)
        assert (asked.status, asked.json["state"]) == (202, "waiting")
        reply = host.reply().json
        assert reply["requests"][0]["mac"] == "0" * 64
        assert waiting(server) == 0


def test_poll_is_answered_as_fast_as_other_requests(tmp_path):
    took, usual = [], []
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        with found.client() as host, found.client() as page:
            for number in range(10):
                settled(host, found, 25)
                begin = time.monotonic()
                found.ask("GET", "/api/v1/state", token=OPERATOR_TOKEN)
                usual.append(time.monotonic() - begin)
                begin = time.monotonic()
                page.ask("POST", "/api/v1/requests", an_order(
                    found, f"{number:032x}"), OPERATOR_TOKEN)
                assert host.reply().json["requests"]
                took.append(time.monotonic() - begin)
    # Usually it is as quick as one answer. The machine may be busy.
    assert sorted(took)[5] < 20 * sorted(usual)[5] + 0.1, (took, usual)


def test_a_request_made_before_the_poll_is_answered_at_once(server):
    server.ask("POST", "/api/v1/requests", an_order(server, "2" * 32),
               OPERATOR_TOKEN)
    reply = server.ask("POST", "/api/v1/sync", sync_payload(wait=25),
                       HOST_TOKEN)
    assert reply.json["requests"]
    # A client gives up after 20 s.


def test_poll_is_answered_after_its_time_limit(server):
    with server.client() as host:
        begin = time.monotonic()
        settled(host, server, 0.7)
        assert host.reply().json["requests"] == []
        assert time.monotonic() - begin > 0.6
        assert waiting(server) == 0


def test_a_sync_with_records_is_acknowledged_at_once(server):
    host, token = "12" * 16, "34" * 32
    server.register_host(host, token)
    with server.client() as client:
        client.ask("POST", "/api/v1/sync", sync_payload(host), token)
        for sent in ({"records": [a_record(1, b"")]}, {"results": [
                {"nonce": "9" * 32, "state": "refused", "run": None,
                 "reason": "x"}]}):
            reply = client.ask("POST", "/api/v1/sync", sync_payload(
                host, wait=25, **sent), token)
            assert reply.json["acked"] == 10


def test_poll_ends_when_the_host_closes_the_connection(server):
    with server.client() as host:
        settled(host, server, 25)
    support.wait_until(lambda: waiting(server) == 0, 5, "it to be forgotten")


def test_request_pipelined_after_a_poll_is_answered_after_it(server):
    with server.client() as host:
        settled(host, server, 0.5)
        host.send(encode_request(server.port, "GET", "/healthz"))
        assert host.reply().json["requests"] == []
        assert host.reply().body == b"OK"


def test_newer_poll_of_a_host_ends_the_older_one(server):
    """Or a connection that broke would be handed what the other waits for."""
    with server.client() as old, server.client() as new:
        settled(old, server, 25)
        new.ask("POST", "/api/v1/sync", sync_payload(), HOST_TOKEN)
        new.send(encode_request(server.port, "POST", "/api/v1/sync",
                                sync_payload(wait=25), HOST_TOKEN))
        assert old.reply().json["requests"] == []
        support.wait_until(lambda: waiting(server) == 1, 10)
        server.ask("POST", "/api/v1/requests", an_order(server, "3" * 32),
                   OPERATOR_TOKEN)
        assert new.reply().json["requests"]


def test_poll_of_a_removed_host_gets_status_401(server):
    server.register_host("77" * 16, "88" * 32)
    with server.client() as host:
        host.ask("POST", "/api/v1/sync", sync_payload("77" * 16),
                 "88" * 32)
        host.send(encode_request(server.port, "POST", "/api/v1/sync",
                                 sync_payload("77" * 16, wait=25), "88" * 32))
        support.wait_until(lambda: waiting(server) == 1, 10)
        assert server.ask("DELETE", f"/api/v1/hosts/{'77' * 16}",
                          token=OPERATOR_TOKEN).status == 200
        assert host.reply().status == 401


# --- what a host has sent, as a browser asks for it -----------------------


def frames_of(*texts: str) -> bytes:
    return b"".join(koitab.frame(koitab.STDOUT, 1000 * number, text.encode())
                    for number, text in enumerate(texts))


def a_record(number: int, frames: bytes, **changes) -> dict:
    now = time.time()
    return {"run": number, "change": number * 10, "user": "root",
            "tag": "abc123abc123", "section": "", "name": "Nightly",
            "label": "<img src=x onerror=alert(1)>", "trigger": "schedule",
            "state": "done", "due": now - 60, "requested_at": None,
            "started": now - 60, "ended": now - 50, "exit": 0,
            "signal": None, "reason": "", "args": {}, "attempt": 1,
            "count": 1, "bytes": 5, "cut": False, "size": len(frames),
            "next": None, "nonce": "", **changes}


@pytest.fixture(scope="module")
def told(server):
    """Return the ID and frames of a run that a host sent completely."""
    frames = frames_of("<script>alert(1)</script>\n", "needle\n",
                       "x" * 900_000, "\x1b[31mred\x1b[0m\n")
    host, token = "ab" * 16, "cd" * 32
    server.register_host(host, token)
    first = server.ask("POST", "/api/v1/sync", sync_payload(
        host, records=[a_record(1, frames)], wait=25), token).json
    assert (first["acked"], first["missing_output"]) == (10, [[1, 0]])
    server.ask("POST", "/api/v1/sync", sync_payload(host, outputs=[
        {"run": 1, "at": 0, "data": base64.b64encode(frames).decode()}]),
        token)
    state = server.ask("GET", "/api/v1/state", token=VIEWER_TOKEN).json
    job = next(job for job in state["jobs"] if job["host"] == host)
    return job["id"], job["last"]["id"], frames


def test_a_run_is_shown_with_its_job(server, told):
    job, run, frames = told
    whole = server.ask("GET", f"/api/v1/runs/{run}", token=VIEWER_TOKEN).json
    assert whole["run"]["have"] == len(frames)
    assert whole["job"]["label"] == "<img src=x onerror=alert(1)>"
    runs = server.ask("GET", f"/api/v1/jobs/{job}/runs?limit=5",
                      token=VIEWER_TOKEN)
    assert [each["id"] for each in runs.json["runs"]] == [run]
    assert server.ask("GET", f"/api/v1/jobs/{job}/runs?before={run}",
                      token=VIEWER_TOKEN).json["runs"] == []


def test_pieces_of_an_output_make_up_the_whole(server, told):
    _, run, frames = told
    data, path = b"", f"/api/v1/runs/{run}/output"
    while len(data) < len(frames):
        reply = server.ask("GET", f"{path}?from={len(data)}&len=99999",
                           token=VIEWER_TOKEN)
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.headers["x-koi-size"] == str(len(frames))
        assert reply.headers["x-koi-live"] == "0"
        assert reply.body
        data += reply.body
    assert data == frames
    # It has ended, so nothing is waited for: a client gives up after 20 s.
    assert server.ask("GET", f"{path}?from={len(data)}&wait=25",
                      token=VIEWER_TOKEN).body == b""


def test_raw_output_is_served_as_plain_text(server, told):
    reply = server.ask("GET", f"/api/v1/runs/{told[1]}/raw",
                       token=VIEWER_TOKEN)
    assert reply.body == b"".join(part for _, _, part in koitab.read_frames(
        told[2]))
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["content-disposition"].startswith("attachment")
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_search_finds_text_in_outputs(server, told):
    for text in ("needle", "needle' or 1=1 --", '"needle" NEAR x', "%"):
        reply = server.ask("GET", "/api/v1/search?q=" + "".join(
            f"%{byte:02x}" for byte in text.encode()), token=VIEWER_TOKEN)
        assert reply.status == (200 if len(text) > 1 else 400), reply
        assert len(reply.json.get("matches", ())) == (text == "needle")
    for query in ("", "q=", "q=" + "x" * 201, "q=a%00b", "q=ab&job=x"):
        assert server.ask("GET", f"/api/v1/search?{query}",
                          token=VIEWER_TOKEN).status == 400


def test_day_and_audit_are_served_and_invalid_queries_are_refused(
        server, told):
    now = time.time()
    day = server.ask("GET", f"/api/v1/day?from={now - 3600}&to={now:.1f}",
                     token=VIEWER_TOKEN).json
    assert told[1] in [bar[3] for row in day["rows"] for bar in row["bars"]]
    for query in ("", "from=1", "from=5&to=1", "from=a&to=b", "from=1&to=1e9",
                  "from=-1&to=9"):
        assert server.ask("GET", f"/api/v1/day?{query}",
                          token=VIEWER_TOKEN).status == 400
    rows = server.ask("GET", "/api/v1/audit", token=VIEWER_TOKEN).json["rows"]
    assert rows
    assert server.ask("GET", f"/api/v1/audit?before={rows[-1]['at']}",
                      token=VIEWER_TOKEN).json["rows"] == []


def test_checks_and_channels_are_created_changed_and_deleted(server):
    uuid = server.ask("POST", "/api/v1/checks", {
        "name": "<b>", "slug": "b", "period": 3600, "grace": 60},
                      OPERATOR_TOKEN
        ).json["id"]
    path = f"/api/v1/checks/{uuid}"
    server.ask("POST", f"/ping/{uuid}", b"<script>" + b"x" * 20_000,
               User_Agent="curl <i>", X_Forwarded_For="203.0.113.5")
    ping = server.ask("GET", f"{path}/pings",
                      token=VIEWER_TOKEN).json["pings"][0]
    assert (ping["ua"], ping["ip"], ping["size"]) == (
        "curl <i>", "127.0.0.1", 10_000)
    body = server.ask("GET", f"{path}/pings/{ping['n']}/body",
                      token=VIEWER_TOKEN)
    assert body.body == b"<script>" + b"x" * 9_992
    assert body.headers["content-type"].startswith("text/plain")
    for do, status in (("pause", 200), ("resume", 200), ("resume", 409),
                       ("delete", 200), ("delete", 404), ("nope", 404)):
        assert server.ask("POST", path, {"do": do},
                          OPERATOR_TOKEN).status == status
    made = server.ask("POST", "/api/v1/channels", {
        "kind": "mail", "target": "a@example.org"}, OPERATOR_TOKEN)
    assert made.status == 200
    assert [each["id"] for each in server.ask(
        "GET", "/api/v1/channels", token=VIEWER_TOKEN).json["channels"]] == [
            made.json["id"]]
    assert server.ask("POST", "/api/v1/channels", {
        "do": "delete", "id": made.json["id"]}, OPERATOR_TOKEN).status == 200


def test_viewer_gets_no_ping_url_and_no_secret_of_a_channel(server):
    uuid = server.ask("POST", "/api/v1/checks", {
        "name": "seen by viewers", "period": 3600, "grace": 60},
                      OPERATOR_TOKEN).json["id"]
    key = hashlib.sha1(uuid.encode()).hexdigest()
    for kind in ("webhook", "ntfy"):
        server.ask("POST", "/api/v1/channels", {
            "kind": kind, "target": "http://u:S3CRET@127.0.0.1:9/S3CRET?"
            "t=S3CRET"}, OPERATOR_TOKEN)
    seen = b""
    with stream(server, now_of(server)) as client:
        server.ask("POST", f"/ping/{uuid}/fail", b"oops")
        changes = client.line()
        server.ask("POST", f"/api/v1/checks/{uuid}", {"do": "pause"},
                   OPERATOR_TOKEN)
        server.ask("POST", f"/ping/{uuid}/fail", b"oops")
        seen += changes + client.line() + client.line()
        for route in koitab.ROUTES:
            if route.role == "viewer" and not route.path.endswith("stream"):
                path = route.path.replace("CHECK", key).replace("/N/", "/1/")
                seen += server.ask("GET", path, token=VIEWER_TOKEN).body
        server.ask("POST", f"/api/v1/checks/{uuid}", {"do": "delete"},
                   OPERATOR_TOKEN)
        seen += client.line()
    first = json.loads(changes)
    assert first["checks"][0]["id"] == key
    assert first["alerts"][0]["subject"] == f"check:{key}"
    assert seen.count(key.encode()) > 6 and b"oops" in seen
    assert b'"http://127.0.0.1:9"' in seen
    assert uuid.encode() not in seen and b"S3CRET" not in seen
    assert server.ask("POST", f"/ping/{key}").status == 404
    for channel in server.ask("GET", "/api/v1/channels",
                              token=VIEWER_TOKEN).json["channels"]:
        server.ask("POST", "/api/v1/channels", {
            "do": "delete", "id": channel["id"]}, OPERATOR_TOKEN)


def test_reply_to_a_test_notification_says_whether_it_was_accepted(server):
    def send_test(port: int) -> dict:
        channel = server.ask("POST", "/api/v1/channels", {
            "kind": "webhook", "target": f"http://127.0.0.1:{port}/x"},
            OPERATOR_TOKEN).json["id"]
        answer = server.ask("POST", "/api/v1/channels", {
            "do": "test", "id": channel}, OPERATOR_TOKEN).json
        server.ask("POST", "/api/v1/channels", {
            "do": "delete", "id": channel}, OPERATOR_TOKEN)
        assert answer.pop("id") == channel
        return answer

    def take() -> None:
        connection, _ = receiver.accept()
        with connection, connection.makefile("rb") as request:
            length, line = 0, b"-"
            while line.strip():
                name, _, value = line.partition(b":")
                length = int(value) if name == b"Content-Length" else length
                line = request.readline()
            request.read(length)
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    receiver = socket.create_server(("127.0.0.1", 0))
    port, thread = receiver.getsockname()[1], threading.Thread(target=take)
    thread.start()
    assert send_test(port) == {"delivered": True, "error": ""}
    thread.join()
    receiver.close()
    answer = send_test(port)
    assert not answer["delivered"] and "refused" in answer["error"]


def test_first_ping_over_http_may_set_the_schedule_of_its_check(server):
    state = server.ask("GET", "/api/v1/state", token=OPERATOR_TOKEN).json
    path = f"/ping/{state['dash']['ping_key']}/asked"
    assert server.ask("GET", path + "?create=1&period=soon").status == 400
    assert server.ask("GET", path + "?create=1&period=5").status == 400
    made = server.ask("GET", path + "?create=1&grace=120&schedule=*/5+*+*+*+*"
                      "&tz=Europe/Berlin")
    assert made.status == 201, made
    check, = (each for each in server.ask(
        "GET", "/api/v1/state", token=OPERATOR_TOKEN).json["checks"]
        if each["slug"] == "asked")
    assert (check["kind"], check["schedule"], check["tz"], check["grace"]) \
        == ("cron", "*/5 * * * *", "Europe/Berlin", 120)
    assert server.ask("POST", f"/api/v1/checks/{check['id']}", {
        "do": "delete"}, OPERATOR_TOKEN).status == 200


def test_output_of_a_followed_run_is_requested_and_streamed(server):
    host, token = "ef" * 16, "01" * 32
    server.register_host(host, token)
    going = a_record(1, b"", state="running", ended=None, exit=None,
                     tag="livelivelive")
    server.ask("POST", "/api/v1/sync", sync_payload(
        host, records=[going]), token)
    state = server.ask("GET", "/api/v1/state", token=VIEWER_TOKEN).json
    run = next(job for job in state["jobs"] if job["host"] == host)[
        "running"][0]
    with server.client() as agent, server.client() as page:
        agent.ask("POST", "/api/v1/sync", sync_payload(host), token)
        agent.send(encode_request(server.port, "POST", "/api/v1/sync",
                                  sync_payload(host, wait=25), token))
        support.wait_until(lambda: waiting(server) == 1, 10)
        page.send(encode_request(server.port, "GET",
                                 f"/api/v1/runs/{run}/output?from"
                                 "=0&wait=25", token=VIEWER_TOKEN))
        assert agent.reply().json["live"] == {"1": 0}
        frames = frames_of("hello\n")
        agent.ask("POST", "/api/v1/sync", sync_payload(host, live=[
            {"run": 1, "at": 0, "data": base64.b64encode(frames).decode()}]),
            token)
        reply = page.reply()
        assert (reply.body, reply.headers["x-koi-live"]) == (frames, "1")
        page.send(encode_request(server.port, "GET",
                                 f"/api/v1/runs/{run}/output?from"
                                 f"={len(frames)}&wait=0.5",
                                 token=VIEWER_TOKEN))
        reply = page.reply()
        assert (reply.status, reply.body) == (200, b"")
    assert waiting(server) == 0


def test_rotated_key_is_refused_and_its_streams_are_closed(tmp_path):
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        with stream(found, now_of(found)) as client:
            made = found.ask("POST", "/api/v1/rotate", {
                "salt": "11" * 16, "rounds": 600_000,
                "api_sha256": koitab.sha256_hex("e" * 64)}, OPERATOR_TOKEN)
            assert made.status == 200
            client.read_to_end()
        assert found.ask("GET", "/api/v1/state",
                         token=OPERATOR_TOKEN).status == 401
        for token in ("e" * 64, VIEWER_TOKEN):
            assert found.ask("GET", "/api/v1/state",
                             token=token).status == 200


def test_revoked_access_token_is_refused_and_its_streams_are_closed(tmp_path):
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        found.ask("POST", "/api/v1/tokens",
                  new_token("viewer", "f" * 64, "wall"), OPERATOR_TOKEN)
        with stream(found, now_of(found)) as client:
            assert found.ask("POST", "/api/v1/tokens", {
                "do": "revoke", "name": "viewer"}, OPERATOR_TOKEN
                             ).status == 200
            client.read_to_end()
        assert found.ask("GET", "/api/v1/state",
                         token=VIEWER_TOKEN).status == 401
        assert found.ask("GET", "/api/v1/state", token="f" * 64).status == 200
        wall, = found.ask("GET", "/api/v1/tokens",
                          token=OPERATOR_TOKEN).json["tokens"]
        assert wall["name"] == "wall" and wall["used"] >= wall["created"]


def test_a_dashboard_is_created_once_with_the_founding_token(tmp_path):
    asked = {"salt": "11" * 16, "rounds": 600_000, "api_sha256": "e" * 64}
    with DashboardProcess(tmp_path) as found:
        file, token = Path(f"{found.db}.founding"), found.founding_token()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for wrong in ("", "0" * 64, token[1:]):
            refused = found.ask("POST", "/api/v1/dashboards", asked, wrong)
            assert refused.status == 403, wrong
            assert "founding token" in refused.json["error"]
        assert found.ask("GET", "/api/v1/salt").status == 404
        found.stop()
        found.start()
        assert found.ask("POST", "/api/v1/dashboards", asked,
                         token).status == 403
        found.set_up()
        assert not file.exists() and "next: " in found.log()
        refused = found.ask("POST", "/api/v1/dashboards", asked, token)
        assert refused.status == 403
        assert "-d join" in refused.json["hint"]
        salt = found.ask("GET", "/api/v1/salt").json
        assert (salt["dash"], salt["rounds"]) == (found.dash, 600_000)
        found.stop()
        found.start()
        assert "next: " not in found.logs[-1].read_text()
        found.assert_no_bugs()


def test_attempts_to_create_a_dashboard_are_throttled(tmp_path):
    with DashboardProcess(tmp_path, *PROXIED,
                          patch="k.MISS_PAUSE = 0.0") as found:
        far = {"X_Forwarded_For": "203.0.113.1"}
        statuses = [found.ask("POST", "/api/v1/dashboards", {},
                              **far).status for _ in range(11)]
        assert statuses == [403] * 10 + [429]
        found.set_up()


# --- browsers follow ------------------------------------------------------


@contextlib.contextmanager
def stream(server, since: int):
    with server.client() as client:
        client.send(encode_request(server.port, "GET",
                                   f"/api/v1/stream?since={since}",
                                   token=VIEWER_TOKEN))
        status, headers = client.head()
        assert (status, headers["content-type"].split(";")[0]) == (
            200, "application/x-ndjson")
        yield client


def changed(server, number: int) -> None:
    server.register_host(f"{number:032x}", f"{number:064x}")


def now_of(server) -> int:
    return server.ask("GET", "/api/v1/state", token=VIEWER_TOKEN).json["seq"]


def test_browser_gets_changes_and_resumes_after_a_reconnect(server):
    since = now_of(server)
    changed(server, 1)
    with stream(server, since) as client:
        first = json.loads(client.line())
        assert first["seq"] > since
        assert [host["id"] for host in first["hosts"]] == [f"{1:032x}"]
        changed(server, 2)
        second = json.loads(client.line())
        assert second["seq"] > first["seq"]
        assert "wake" not in second and "live" not in second
    changed(server, 3)
    with stream(server, first["seq"]) as client:
        assert json.loads(client.line()) == second
        assert json.loads(client.line())["hosts"][0]["id"] == f"{3:032x}"


@pytest.mark.parametrize("since", [0, 10**17])
def test_stream_from_an_unknown_change_begins_with_a_reset(server, since):
    with stream(server, since) as client:
        assert json.loads(client.line()) == {"reset": True}


def test_idle_stream_sends_empty_lines(tmp_path):
    with DashboardProcess(tmp_path, patch="k.HEARTBEAT = 0.2") as found:
        found.set_up()
        with stream(found, now_of(found)) as client:
            while client.data.count(b"\n") < 3:
                assert client.more()
            assert client.data.strip() == b""


LARGE = """
heard = k.Api.on_changes
def large(self, changes):
    heard(self, {**changes, "pad": "x" * 500_000}
          if "seq" in changes else changes)
k.Api.on_changes = large
"""


def test_browser_that_does_not_read_is_dropped_and_others_continue(tmp_path):
    with DashboardProcess(tmp_path,
                          patch=LARGE + "k.WRITE_TIME = 0.5") as found:
        found.set_up()
        since = now_of(found)
        with found.client() as slow, stream(found, since) as quick:
            slow.send(encode_request(found.port, "GET",
                                     "/api/v1/stream?since=0",
                                     token=VIEWER_TOKEN))
            slow.head()
            for number in range(40):
                changed(found, number + 1)
                assert json.loads(quick.line())["hosts"][0][
                    "id"] == f"{number + 1:032x}"
            support.wait_until(lambda: connections(found) == 1, 10)
            # What was on its way is there, and then comes the end.
            slow.read_to_end()
            assert b'"host 0000"' in slow.data
            assert slow.data.count(b"\n") < 40
        found.assert_no_bugs()


def test_browser_that_reads_too_late_gets_a_reset(tmp_path):
    with DashboardProcess(tmp_path, patch=LARGE) as found:
        found.set_up()
        with stream(found, now_of(found)) as slow, \
                stream(found, now_of(found)) as quick:
            for number in range(40):    # 20 MB, and 4 MiB are remembered
                changed(found, number + 1)
                assert quick.line()
            while json.loads(slow.line()) != {"reset": True}:
                pass
            changed(found, 41)
            assert json.loads(slow.line())["hosts"][0]["id"] == f"{41:032x}"


# --- many, slow and silent ------------------------------------------------


@contextlib.contextmanager
def silent(port: int, count: int, data: bytes = b""):
    """Connections that say nothing, or only so much."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(
                ("127.0.0.1", port), 20))
            if data:
                sock.sendall(data)
        yield


def open_many(count: int = 2000) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


@pytest.mark.parametrize("data", [b"", b"GET / HT"])
def test_silent_clients_do_not_delay_other_clients(server, data):
    open_many()
    with silent(server.port, 500, data), server.client(seconds=8) as client:
        # Of a silent caller it would hear for 10 s that nothing comes.
        assert client.ask("GET", "/api/v1/state", token=OPERATOR_TOKEN
                          ).status == 200


def test_silent_tls_clients_do_not_delay_other_clients(tmp_path, made, trust):
    open_many()
    with DashboardProcess(tmp_path, "--cert", made.cert, "--key", made.key,
                          tls=trust) as found, silent(found.port, 500):
        with found.client(seconds=8) as client:
            assert client.ask("GET", "/healthz").body == b"OK"
        found.assert_no_bugs()


def test_client_that_sends_too_slowly_gets_status_408(tmp_path):
    patch = "k.HEAD_TIME = k.BODY_TIME = 0.3"
    with DashboardProcess(tmp_path, patch=patch) as found:
        found.set_up()
        for data in (b"GET / HTTP/1.1\r\nX: ", encode_request(
                found.port, "POST", "/api/v1/sync", None, HOST_TOKEN,
                Content_Length=999, Content_Type="application/json")):
            with found.client() as client:
                client.send(data)
                begin = time.monotonic()
                while not select.select([client.sock], [], [], 0.05)[0]:
                    client.send(b"x")
                    assert time.monotonic() - begin < 20
                assert client.reply().status == 408
                assert client.is_closed()
        with found.client() as client:      # who said nothing at all
            assert client.is_closed()


def test_an_idle_connection_is_closed(tmp_path):
    patch = "k.IDLE_TIME = 0.3"
    with DashboardProcess(tmp_path,
                          patch=patch) as found, found.client() as client:
        assert client.ask("GET", "/healthz").status == 200
        assert client.is_closed()


def test_a_client_that_reads_nothing_is_dropped(tmp_path):
    patch = ("k.WRITE_TIME = 0.5\n"
             "k.page_text = lambda server=None: 'x' * 30_000_000")
    with DashboardProcess(tmp_path, patch=patch) as found:
        with found.client() as client:
            client.send(encode_request(found.port, "GET", "/"))
            support.wait_until(lambda: connections(found) == 1, 10)
            support.wait_until(lambda: connections(found) == 0, 10)
        with found.client() as client:      # who takes them all gets all
            assert len(client.ask("GET", "/").body) == 30_000_000
        assert rss(found.process.pid) < 250_000


def connections(found) -> int:
    """Established connections of a process, seen from outside."""
    with open(f"/proc/{found.process.pid}/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return sum(row[1].endswith(f":{found.port:04X}") and row[3] in (
        "01", "04", "05", "08") and row[9] != "0" for row in rows)


def rss(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return int(file.read().split("VmRSS:")[1].split()[0])


NOT_NEAR = "k.is_loopback = lambda address: False\n"


def test_address_may_have_few_unauthenticated_clients_and_many_hosts(tmp_path):
    with DashboardProcess(tmp_path) as near:
        near.set_up()
    patch = NOT_NEAR + "k.MOST_UNPROVEN, k.MOST_OF_ADDRESS = 8, 30"
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, "--plain-http", patch=patch) as found:
        for _ in range(20):
            host = stack.enter_context(found.client())
            assert host.ask("POST", "/api/v1/sync", sync_payload(),
                            HOST_TOKEN).status == 200
        strangers = [stack.enter_context(found.client()) for _ in range(9)]
        assert strangers[-1].reply().status == 503
        assert strangers[-1].is_closed()
        assert host.ask("GET", "/healthz").status == 200
        assert "503 too many connections" in found.log()


# Calls that wait until the file at {gate} is there.
WAITING = """
import os, time
def wait():
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
"""


SLOW_HEALTH = WAITING + """
k.MOST_UNPROVEN = 3
health = k.Dashboard.health
k.Dashboard.health = lambda *values: wait() or health(*values)
"""


def test_clients_behind_a_proxy_are_counted_one_by_one(tmp_path):
    gate = tmp_path / "gate"
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, *PROXIED,
            patch=SLOW_HEALTH.format(gate=str(gate))) as found:
        clients = [stack.enter_context(found.client()).send(encode_request(
            found.port, "GET", "/healthz", X_Forwarded_For="1.1.1.1, "
            f"203.0.113.{number // 5}")) for number in range(10)]
        refused = [3, 4, 8, 9]
        assert {clients[at].reply().status for at in refused} == {503}
        gate.touch()
        assert {client.reply().status for at, client in enumerate(clients)
                if at not in refused} == {200}
        assert found.ask("GET", "/healthz", X_Forwarded_For="203.0.113.0"
                         ).status == 200        # they have been counted off


@pytest.mark.parametrize("options, header, seen", [
    ((), "203.0.113.5", "127.0.0.1"),
    (("--behind-proxy", "10.0.0.9"), "203.0.113.5", "127.0.0.1"),
    (PROXIED, "1.1.1.1,203.0.113.5:99", "203.0.113.5"),
    (PROXIED + ("--behind-proxy", "10.0.0.9"), "1.1.1.1, 203.0.113.5, "
     "10.0.0.9", "203.0.113.5")])
def test_client_address_is_taken_only_from_a_configured_proxy(
        tmp_path, options, header, seen):
    with DashboardProcess(tmp_path, *options) as found:
        uuid = found.set_up().add_check()
        found.ask("GET", f"/ping/{uuid}", X_Forwarded_For=header)
        pings = found.ask("GET", f"/api/v1/checks/{uuid}/pings",
                          token=OPERATOR_TOKEN).json["pings"]
        assert [ping["ip"] for ping in pings] == [seen]


def test_a_proxy_that_names_no_client_is_logged_once(tmp_path):
    with DashboardProcess(tmp_path, *PROXIED) as found:
        for header in (None, "unknown"):
            found.ask("GET", "/healthz", X_Forwarded_For=header)
        assert found.log().count("without a valid X-Forwarded-For") == 1


def test_an_unknown_ping_is_refused_before_its_body_arrives(server):
    key = server.ask("GET", "/api/v1/state", token=OPERATOR_TOKEN).json[
        "dash"]["ping_key"]
    for path in ("/ping/11111111-2222-3333-4444-555555555555",
                 f"/ping/{key}x/backup?create=1"):
        with server.client() as client:
            client.send(encode_request(server.port, "POST", path,
                                       Content_Length=1_000_000))
            reply = client.reply()
            assert (reply.status, reply.body) == (404, b"not found")


def test_longest_silent_connection_is_closed_for_a_new_one(tmp_path):
    """The client that was silent for the longest time is disconnected."""
    with DashboardProcess(tmp_path,
                          patch="k.MOST_CONNECTIONS = 20") as found, silent(
            found.port, 60):
        assert found.ask("GET", "/healthz").body == b"OK"


# --- what fails -----------------------------------------------------------


def test_dashboard_without_descriptors_pauses_and_continues(tmp_path):
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        pid = found.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        with found.client() as known:
            assert known.ask("GET", "/healthz").status == 200
            resource.prlimit(pid, resource.RLIMIT_NOFILE,
                             (used + 2, before[1]))
            with silent(found.port, 30):
                support.wait_until(lambda: "cannot accept" in found.log(), 10)
                assert known.ask("GET", "/").status == 200
                assert busy(found.process, 0.5) < 0.5
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert found.ask("GET", "/healthz").status == 200
        found.assert_no_bugs()


NO_THREAD = """
import threading
start = threading.Thread.start
def refuse(self):
    if self.name.startswith("ThreadPoolExecutor"):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = refuse
"""


def test_dashboard_without_threads_refuses_only_queries(tmp_path):
    with DashboardProcess(tmp_path, patch=NO_THREAD) as found:
        found.set_up()
        uuid = found.add_check()
        for _ in range(2):
            reply = found.ask("GET", "/api/v1/state", token=OPERATOR_TOKEN)
            assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert found.ask("GET", "/").status == 200
        assert found.ask("GET", f"/ping/{uuid}").status == 200
        found.assert_no_bugs()


SLOW = WAITING + """
state = k.Dashboard.state
k.Dashboard.state = lambda *values: wait() or state(*values)
k.MOST_READS = 6
"""


def test_too_many_concurrent_queries_get_status_503(tmp_path):
    gate = tmp_path / "gate"
    with contextlib.ExitStack() as stack, DashboardProcess(
            tmp_path, patch=SLOW.format(gate=str(gate))) as found:
        found.set_up()
        uuid = found.add_check()
        clients = [stack.enter_context(found.client()).send(encode_request(
            found.port, "GET", "/api/v1/state", token=OPERATOR_TOKEN))
            for _ in range(10)]
        assert found.ask("GET", f"/ping/{uuid}").status == 200
        support.wait_until(lambda: len(select.select(
            [client.sock for client in clients], [], [], 0)[0]) == 4, 20)
        gate.touch()
        statuses = sorted(client.reply().status for client in clients)
        assert statuses == [200] * 6 + [503] * 4


def test_internal_error_is_logged_in_one_line_and_gets_status_500(tmp_path):
    patch = "k.Dashboard.state = lambda *values: 1 / 0"
    with DashboardProcess(tmp_path, patch=patch) as found:
        found.set_up()
        assert found.ask("GET", "/api/v1/state",
                         token=OPERATOR_TOKEN).status == 500
        assert "internal error (please report): ZeroDivisionError: " \
            in found.log()
        assert "Traceback" not in found.log()
        assert found.ask("GET", "/healthz").status == 200


BROKEN = """
def broken(self, db):
    self.give_up("the disk lies")
    raise k.Error("no", "", 503)
k.Dashboard.health = broken
"""


def test_damaged_database_ends_the_dashboard_with_the_reason(tmp_path):
    with DashboardProcess(tmp_path, patch=BROKEN) as found:
        assert found.ask("GET", "/healthz").status == 503
        assert found.process.wait(10) == 1
        assert "the dashboard cannot continue: the disk lies" in found.log()


def test_all_modules_are_imported_at_the_start(tmp_path):
    """A Python that is upgraded underneath has no files for us any more."""
    patch = """
serve_requests = k.HttpServer.serve
async def serve(self, ready):
    import builtins
    known, load = set(sys.modules), builtins.__import__
    def only_known(name, *rest):
        if name not in known:
            raise ImportError(f"{name} is loaded late")
        return load(name, *rest)
    builtins.__import__ = only_known
    await serve_requests(self, ready)
k.HttpServer.serve = serve
"""
    with DashboardProcess(tmp_path, patch=patch) as found:
        found.set_up()
        uuid = found.add_check()
        badge = found.ask("GET", "/api/v1/state",
                          token=OPERATOR_TOKEN).json["dash"][
            "badge_key"]
        for path in ("/", f"/ping/{uuid}?rid={uuid}", "/metrics", "/healthz",
                     f"/badge/{badge}/all.svg", "/api/v1/search?q=abc",
                     f"/api/v1/checks/{uuid}/pings", "/api/v1/audit"):
            assert found.ask("GET", path,
                             token=OPERATOR_TOKEN).status == 200, path
        for path in ("/nope", "/%", "/api/v1/runs/1/output"):
            assert found.ask("GET", path, token=OPERATOR_TOKEN).status in (400,
                                                                           404)
        assert found.ask("POST", "/api/v1/sync", sync_payload(
            ), HOST_TOKEN).status == 200
        found.assert_no_bugs()


@support.root_only
def test_pings_on_a_full_disk_get_status_503_and_reads_continue(tmp_path):
    support.need("unshare")
    folder = tmp_path / "disk"
    folder.mkdir()
    prefix = ("unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=24m "
              f"none '{folder}' && exec \"$@\"", "sh")
    with DashboardProcess(tmp_path, prefix=prefix,
                          db=f"{folder}/d.db") as found:
        found.set_up()
        uuid = found.add_check()
        path = f"/proc/{found.process.pid}/root{folder}/fill"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while os.write(fd, b"x" * 4096):
                pass
        os.close(fd)
        with found.client() as client:
            for _ in range(3000):
                reply = client.ask("POST", f"/ping/{uuid}", b"x" * 10_000)
                if reply.status != 200:
                    break
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) > 0
        assert found.ask("POST", "/api/v1/checks", {"name": "a"},
                         OPERATOR_TOKEN).status == 507
        assert found.ask("GET", "/api/v1/state",
                         token=OPERATOR_TOKEN).status == 200
        os.unlink(path)
        support.wait_until(lambda: found.ask(
            "POST", f"/ping/{uuid}", b"x").status == 200, 10)
        found.assert_no_bugs()


# --- TLS ------------------------------------------------------------------


def test_https_needs_tls_1_2_and_reads_its_certificate_again(tmp_path, made,
                                                             trust):
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_bytes(open(made.cert, "rb").read())
    key.write_bytes(open(made.key, "rb").read())
    with DashboardProcess(tmp_path, "--cert", str(cert), "--key", str(key),
                          tls=trust) as found:
        found.set_up()
        shown = found.client().sock.getpeercert(True)
        assert ":".join(f"{byte:02X}" for byte in hashlib.sha256(
            shown).digest()) in found.log()
        assert "warning: " in found.log() and "expires on" in found.log()
        assert "expires on" in found.ask("GET", "/api/v1/state",
                                         token=OPERATOR_TOKEN
                                         ).json["problems"][0]
        old = ssl.create_default_context(cafile=made.cert)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # that it is old
            old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
            old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, OSError)):
            HttpClient(found.port, old)
        fresh = servers.certificate(tmp_path)
        cert.write_bytes(open(fresh.cert, "rb").read())
        found.process.send_signal(signal.SIGHUP)    # not its key: refused
        support.wait_until(lambda: "not reloaded" in found.log(), 10)
        assert found.ask("GET", "/healthz").body == b"OK"
        key.write_bytes(open(fresh.key, "rb").read())
        found.process.send_signal(signal.SIGHUP)
        support.wait_until(lambda: "was reloaded" in found.log(), 10)
        with pytest.raises(ssl.SSLError):
            found.ask("GET", "/healthz")
        found.tls = ssl.create_default_context(cafile=fresh.cert)
        assert found.ask("GET", "/healthz").body == b"OK"
        found.assert_no_bugs()


def test_tls_connection_takes_little_memory(tmp_path, made, trust):
    with DashboardProcess(tmp_path, "--cert", made.cert, "--key", made.key,
                          tls=trust) as found, contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(found.client()).ask("GET", "/healthz")
        before = rss(found.process.pid)
        for _ in range(100):
            stack.enter_context(found.client()).ask("GET", "/healthz")
        assert rss(found.process.pid) - before < 100 * 120      # kB


@pytest.mark.parametrize("shown", [True, False])
def test_closed_connections_leave_no_open_socket_and_no_error(
        tmp_path, made, trust, shown):
    """No open socket, and no error in the log."""
    options = ("--cert", made.cert, "--key", made.key) if shown else ()
    with DashboardProcess(tmp_path, *options,
                          tls=trust if shown else None) as found:
        found.set_up()
        since = now_of(found)
        before = sockets(found)
        for _ in range(3):
            with found.client() as host, stream(found, since), \
                    found.client() as half, HttpClient(found.port) as noise:
                settled(host, found, 25)
                half.send(encode_request(found.port, "POST", "/ping/a/b",
                                         None, Content_Length=9) + b"half")
                noise.send(b"GET")
        support.wait_until(lambda: sockets(found) <= before, 10)
        with found.client() as host, stream(found, since):
            settled(host, found, 25)
            assert found.stop() == 0
        found.assert_no_bugs()


def sockets(found) -> int:
    """How many sockets a process has open."""
    folder, count = f"/proc/{found.process.pid}/fd", 0
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):    # closed since then
            count += os.readlink(f"{folder}/{name}").startswith("socket:")
    return count


def test_noise_on_the_tls_port_is_not_logged_as_an_error(tmp_path, made,
                                                         trust):
    with DashboardProcess(tmp_path, "--cert", made.cert, "--key", made.key,
                          tls=trust) as found:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 99,
                     os.urandom(200), b""):
            with HttpClient(found.port) as client:
                client.send(data)
                client.sock.shutdown(socket.SHUT_WR)
                client.read_to_end()
        assert found.ask("GET", "/healthz").body == b"OK"
        found.assert_no_bugs()


# --- the command ----------------------------------------------------------


def typed(folder, *argv: str) -> support.Result:
    done = subprocess.run(
        [*support.program("koitab"), *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=30,
        stderr=subprocess.PIPE, env={
            "PATH": os.environ["PATH"], "HOME": str(folder),
            "KOI_HOME": str(folder / "koi")})
    return support.Result(done.returncode, done.stdout.decode(),
                          done.stderr.decode())


@pytest.mark.parametrize("argv, said", [
    (["--listen", "0.0.0.0:0"], "plain http"),
    (["--listen", "[::]:0"], "plain http"),
    (["--listen", "127.0.0.1:0", "--listen", "0.0.0.0:0"], "plain http"),
    (["--cert", "a"], "go together"), (["--key", "a"], "go together"),
    (["--listen", "nonsense"], "ADDRESS:PORT"),
    (["--name", "a b"], "not a host name"),
    (["--behind-proxy", "x"], "not an address"),
    (["--number", "1"], "is not an option of")])
def test_unsafe_or_wrong_options_are_refused(tmp_path, argv, said):
    done = typed(tmp_path, "dashboard", *argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.err and "Traceback" not in done.err


def test_a_missing_certificate_is_reported(tmp_path):
    done = typed(tmp_path, "dashboard", "--cert", "/nope", "--key", "/nope")
    assert done.code == 1
    assert "/nope cannot be used: No such file" in done.err


def test_a_port_in_use_is_reported(tmp_path, server):
    done = typed(tmp_path, "dashboard", "--listen", f"127.0.0.1:{server.port}",
                 "--db", str(tmp_path / "db"), *STAY_ROOT)
    assert done.code == 1
    assert "Address already in use" in done.err


def test_a_second_process_on_a_database_is_refused(tmp_path, server):
    done = typed(tmp_path, "dashboard", "--listen", "127.0.0.1:0", "--db",
                 server.db, *STAY_ROOT)
    assert done.code == 1 and "another dashboard" in done.err, done
    assert server.ask("GET", "/healthz").status == 200


def test_plain_http_beyond_loopback_gets_a_warning(tmp_path):
    with DashboardProcess(tmp_path, "--listen", "0.0.0.0:0", "--plain-http"
                          ) as found:
        assert "warning: this is plain http" in found.log()
        assert found.ask("GET", "/", Host="10.1.2.3:80").status == 200
        assert found.ask("GET", "/", Host="evil.example").status == 421


def test_start_prints_the_url_and_the_next_command(server):
    url = f"http://127.0.0.1:{server.port}"
    assert f"listens at {url}\n" in server.log()
    assert f"next: koitab -d new {url}; then open {url}" in server.log()


def test_the_database_is_readable_only_by_its_owner(tmp_path):
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        for path in tmp_path.glob("dashboard.db*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_backup_is_made_while_the_dashboard_runs(tmp_path, server):
    copy = tmp_path / "copy"
    done = typed(tmp_path, "dashboard", "--db", server.db, "--backup",
                 str(copy))
    assert (done.code, done.err) == (0, "")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with DashboardProcess(tmp_path, db=str(copy)) as found:
        assert found.ask("GET", "/api/v1/state",
                         token=OPERATOR_TOKEN).json["checks"]
    done = typed(tmp_path, "dashboard", "--backup", str(copy))
    assert (done.code, "does not exist" in done.err) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_answers_waiting_polls_and_ends_the_dashboard(tmp_path, number):
    with DashboardProcess(tmp_path) as found:
        found.set_up()
        since = now_of(found)
        with found.client() as host, found.client() as idle, \
                stream(found, since) as page, silent(found.port, 20):
            settled(host, found, 25)
            assert idle.ask("GET", "/healthz").status == 200
            found.process.send_signal(number)
            assert found.process.wait(15) == 0      # the poll is for 25 s
            assert host.reply().json["requests"] == []
            assert host.is_closed() and idle.is_closed()
            page.read_to_end()
        found.assert_no_bugs()


def test_running_write_is_answered_before_the_dashboard_ends(tmp_path):
    gate = tmp_path / "gate"
    patch = (WAITING + "ping, k.STOP_TIME = k.PingChecks.ping, 20\n"
             "k.PingChecks.ping = lambda *values: wait() or ping(*values)"
             ).format(gate=str(gate))
    with DashboardProcess(tmp_path, patch=patch) as found:
        found.set_up()
        uuid = found.add_check()
        with found.client() as client, found.client() as idle:
            assert idle.ask("GET", "/healthz").status == 200
            client.send(encode_request(found.port, "GET", f"/ping/{uuid}"))
            client.send(encode_request(found.port, "GET", "/healthz"))
            assert found.ask("GET", "/healthz").status == 200
            found.process.send_signal(signal.SIGTERM)
            assert idle.is_closed()     # it has begun to end
            gate.touch()
            assert found.process.wait(30) == 0
            reply = client.reply()
            assert (reply.status, reply.body) == (200, b"OK")
            assert client.is_closed()


def test_systemd_accepts_the_unit(tmp_path):
    support.need("systemd-analyze")
    made = servers.certificate(tmp_path)
    for options in ([], ["--listen", "0.0.0.0:443", "--cert", made.cert,
                         "--key", made.key, "--name", "koi.example"]):
        unit = tmp_path / "koi-dashboard.service"
        done = typed(tmp_path, "unit", "dashboard", *options)
        assert (done.code, done.err) == (0, "")
        unit.write_text(done.out)
        check = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=no",
             str(unit)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
        assert "koi-dashboard.service" not in check.stdout.decode(), check

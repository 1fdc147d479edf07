"""HttpServer and Api: parsing, access, limits, responses, long polls."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import inspect
import json
import random
import re
import xml.etree.ElementTree
import uuid
import zlib

import pytest

import support

koitab = support.load("koitab")
UUID = "0b5f1c2e-1111-4222-8333-444455556666"


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1")


def refused(question, *values) -> koitab.Error:
    with pytest.raises(koitab.Error) as caught:
        question(*values)
    return caught.value


# --- a head, and what is wrong with it ------------------------------------


def test_a_head_becomes_a_request():
    request = koitab.parse_head(head(
        "POST /api/v1/sync?a=1&b HTTP/1.1", "Host: koi.example:8077",
        "Content-Length: 12", "User-Agent:  curl/8 \t", "X-Empty:",
        "Accept: a", "accept: b", "Content-Type: Application/JSON; x=y"))
    assert (request.method, request.path, request.query) == (
        "POST", "/api/v1/sync", "a=1&b")
    assert (request.length, request.content_type, request.keeps_alive) == (
        12, "application/json", True)
    assert request.headers["user-agent"] == "curl/8"
    assert request.headers["accept"] == "a, b"
    assert request.headers["x-empty"] == ""


@pytest.mark.parametrize("version, header, keeps", [
    ("HTTP/1.1", "X: y", True), ("HTTP/1.0", "X: y", False),
    ("HTTP/1.0", "Connection: keep-alive", False),
    ("HTTP/1.1", "Connection: close", False),
    ("HTTP/1.1", "Connection: Upgrade, CLOSE", False),
    ("HTTP/1.1", "Connection: keep-alive", True)])
def test_a_connection_is_kept_only_when_both_sides_allow_it(version, header,
                                                            keeps):
    request = koitab.parse_head(head(f"GET / {version}", "Host: x", header))
    assert request.keeps_alive is keeps


@pytest.mark.parametrize("line, status", [
    ("GET /", 400), ("GET  / HTTP/1.1", 400), ("GET / HTTP/1.1 ", 400),
    (" GET / HTTP/1.1", 400), ("", 400), ("GET /\tHTTP/1.1", 400),
    ("GET / HTTP/0.9", 400), ("GET / HTTP/9.9", 400), ("GET / HTTP/2.0", 400),
    ("GET / HTTP/1.99999999999999999999", 400), ("GET / http/1.1", 400),
    ("GET / HTTP/1", 400), ("GET / HTTP/1.2", 400), ("GET / HTTP/01.1", 400),
    ("BREW / HTTP/1.1", 501), ("get / HTTP/1.1", 501),
    ("CONNECT x:443 HTTP/1.1", 501), ("TRACE / HTTP/1.1", 501),
    ("GET http://evil.example/ HTTP/1.1", 400), ("OPTIONS * HTTP/1.1", 400),
    ("GET //evil.example/ HTTP/1.1", 400), ("GET /a//b HTTP/1.1", 400),
    ("GET /../../etc/passwd HTTP/1.1", 400), ("GET /a/./b HTTP/1.1", 400),
    ("GET /%2e%2e/etc/passwd HTTP/1.1", 400), ("GET /a%00b HTTP/1.1", 400),
    ("GET /a\\b HTTP/1.1", 400), ("GET /a;b HTTP/1.1", 400),
    ("GET /a#b HTTP/1.1", 400), ("GET /\xff HTTP/1.1", 400),
    ("GET /a\x01b HTTP/1.1", 400), ("GET /a?\x7f HTTP/1.1", 400),
    ("GET ?a HTTP/1.1", 400), ("GET a HTTP/1.1", 400)])
def test_an_ambiguous_request_line_is_refused(line, status):
    assert refused(koitab.parse_head, head(line, "Host: x")).status == status


@pytest.mark.parametrize("lines, status", [
    (["Content-Length : 5"], 400), (["Host : x"], 400), ([" folded: x"], 400),
    (["A: b", "\tfolded"], 400), (["no colon"], 400), ([": empty"], 400),
    (["A\x00: b"], 400), (["A: b\x01"], 400), (["A: \x7f"], 400),
    (["A: a\x00b"], 400), (["A b: c"], 400), (["\xe4: b"], 400),
    (["A(b): c"], 400), ([""], 400),
    (["Content-Length: 5", "Content-Length: 5"], 400),
    (["Content-Length: 5", "content-length: 6"], 400),
    (["Content-Length: 5, 5"], 400), (["Content-Length: -1"], 400),
    (["Content-Length: +2"], 400), (["Content-Length: 1_0"], 400),
    (["Content-Length: \xb2"], 400), (["Content-Length: abc"], 400),
    (["Content-Length: 0x5"], 400), (["Content-Length:"], 400),
    (["Content-Length: 5 5"], 400), (["Content-Length: 5.0"], 400),
    (["Content-Length: 12345678901234567890"], 413),
    (["Transfer-Encoding: gzip, chunked"], 501),
    (["Transfer-Encoding: identity"], 501), (["Transfer-Encoding:"], 501),
    (["Transfer-Encoding: chunked", "Content-Length: 5"], 501),
    (["Host: y"], 400), (["Authorization: a", "authorization: b"], 400),
    (["Origin: a", "Origin: b"], 400),
    (["Content-Type: a", "Content-Type: b"], 400)])
def test_ambiguous_headers_are_refused(lines, status):
    error = refused(koitab.parse_head, head(
        "POST / HTTP/1.1", "Host: x", *lines))
    assert error.status == status


@pytest.mark.parametrize("data, status", [
    (b"3\r\nabc\r\n0\r\n\r\nnext", b"abc"), (b"0\r\n\r\nnext", b""),
    (b"a\r\n0123456789\r\n00\r\n\r\nnext", b"0123456789"),
    (b"3\r\nab\r\n0\r\n\r\n", 400), (b"3\r\nabcd\r\n0\r\n\r\n", 400),
    (b"3;x=y\r\nabc\r\n0\r\n\r\n", 400), (b"0\r\nX: y\r\n\r\n", 400),
    (b" 3\r\nabc\r\n0\r\n\r\n", 400), (b"+3\r\nabc\r\n0\r\n\r\n", 400),
    (b"0x3\r\nabc\r\n0\r\n\r\n", 400), (b"\r\nabc\r\n0\r\n\r\n", 400),
    (b"3\nabc\n0\n\n0123456789", 400), (b"fffffffff\r\n", 400),
    (b"b\r\n0123456789a\r\n0\r\n\r\n", 413), (b"7fffffff\r\n", 413),
    (b"5\r\n01234\r\n6\r\n012345\r\n0\r\n\r\n", 413)])
@pytest.mark.parametrize("step", [1, 100])
def test_chunks_become_a_body_however_they_are_cut(data, status, step):
    buffer, body = bytearray(), bytearray()

    def ends() -> bool:
        for at in range(0, len(data), step):
            buffer.extend(data[at:at + step])
            if koitab.take_chunks(buffer, body, 10):
                buffer.extend(data[at + step:])
                return True
        return False

    if isinstance(status, int):
        assert refused(ends).status == status
    else:
        assert (ends(), body, buffer) == (True, status, b"next")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_methods_without_a_body_refuse_one(method):
    lines = f"{method} / HTTP/1.1", "Host: x"
    assert refused(koitab.parse_head, head(
        *lines, "Transfer-Encoding: chunked")).status == 501
    assert refused(koitab.parse_head, head(
        *lines, "Content-Length: 5")).status == 400
    assert koitab.parse_head(head(*lines, "Content-Length: 0")).length == 0


def test_a_head_without_host_is_refused():
    assert refused(koitab.parse_head, head("GET / HTTP/1.1")).status == 400


def test_a_head_has_at_most_64_header_lines():
    lines = [f"X-{number}: y" for number in range(63)]
    assert koitab.parse_head(head("GET / HTTP/1.1", "Host: x", *lines))
    error = refused(koitab.parse_head, head(
        "GET / HTTP/1.1", "Host: x", *lines, "One: more"))
    assert error.status == 431


@pytest.mark.parametrize("data, why", [
    (b"\x16\x03\x01\x02\x00\x01", "plain http"), (b"\r\nGET /", "not an HTTP"),
    (b"get / HTTP/1.1\r\n", "not an HTTP"), (b"\x00", "not an HTTP"),
    (b"GET / HTTP/1.1\n", "half of CR LF"), (b"G\rX", "half of CR LF"),
    (b"GET / HTTP/1.1\r\nX: a\rContent-Length: 5\r\n", "half of CR LF"),
    (b"GET / HTTP/1.1\r\nX: a\n\r\n", "half of CR LF"), (b"GE\0T", "NUL"),
    (b"GET / HTTP/1.1\r\r\n", "half of CR LF"), (b"SSH-2.0-x\n", "half of")])
def test_bytes_that_cannot_begin_a_request_are_recognized(data, why):
    assert why in koitab.partial_head_error(data)


def test_every_beginning_of_a_valid_head_is_accepted():
    data = b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n"
    errors = [koitab.partial_head_error(data[:end])
              for end in range(1, len(data))]
    assert set(errors) == {""}


@pytest.mark.parametrize("data, end, status", [
    (b"G" * koitab.LONGEST_LINE, -1, None),
    (b"G" * koitab.LONGEST_LINE + b"\r\n", -1, None),
    (b"G" * (koitab.LONGEST_LINE + 1), -1, 414),
    (b"G" * (koitab.LONGEST_LINE + 1) + b"\r\n", -1, 414),
    (b"G\r\n" + b"x" * (koitab.LONGEST_HEAD - 3), -1, None),
    (b"G\r\n" + b"x" * (koitab.LONGEST_HEAD - 2), -1, 431),
    (b"G\r\n", koitab.LONGEST_HEAD - 4, None),
    (b"G\r\n", koitab.LONGEST_HEAD - 3, 431)])
def test_request_line_and_head_have_a_largest_size(data, end, status):
    if status is None:
        koitab.check_head_size(data, end)
    else:
        assert refused(koitab.check_head_size, data, end).status == status


@pytest.mark.parametrize("query, fields", [
    ("", {}), ("a=1&b=", {"a": "1", "b": ""}), ("a", {"a": ""}),
    ("q=a+b%20c%C3%A4", {"q": "a b cä"}), ("q=a=b", {"q": "a=b"}),
    ("tag=x&q=1&tag=y", {"tag": "x y", "q": "1"})])
def test_a_query_becomes_fields(query, fields):
    assert koitab.parse_query(query) == fields


@pytest.mark.parametrize("query", [
    "a=1&a=2", "tag=x&tag=y&a=1&a=2", "a=%ff",
    "&".join(f"a{n}=1" for n in range(17))])
def test_invalid_query_is_refused(query):
    assert refused(koitab.parse_query, query).status == 400


@pytest.mark.parametrize("body", [
    b"", b"[]", b"1", b"null", b"{", b"\xff{}", b'{"a":NaN}',
    b'{"a":Infinity}', b'{"a":1e999}', b'{"a":9999999999999999999}',
    b'{"a":"\\ud800"}', b'{"\\udfff":1}', b"[" * 100_000, b"\xef\xbb\xbf{}",
    b'{"a":' * 100_000, '{"a":1}'.encode("utf-16")])
def test_json_that_sqlite_cannot_store_is_refused(body):
    assert refused(koitab.parse_body, body).status == 400


def test_body_of_very_many_values_is_refused_before_it_is_parsed():
    """Each empty list of three bytes would take 64."""
    with pytest.raises(koitab.Error) as error:
        koitab.parse_body(b'{"a":[' + b"[]," * koitab.MOST_VALUES + b"0]}")
    assert error.value.status == 413


def test_a_body_becomes_a_dictionary():
    assert koitab.parse_body(b'{"a":"\\ud83d\\ude00","b":1.5,"c":-7}') == {
        "a": "\U0001f600", "b": 1.5, "c": -7}


# --- who calls whom -------------------------------------------------------


@pytest.mark.parametrize("host, believed", [
    ("localhost:8077", True), ("LOCALHOST", True), ("127.0.0.1:8077", True),
    ("127.0.0.1", True), ("127.9.9.9:1", True), ("[::1]:8077", True),
    ("[::1]", True), ("koi.example", True), ("KOI.example:443", True),
    ("other.example:8443", True), ("other.example", False),
    ("other.example:1", False), ("evil.example:8077", False), ("", False),
    ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
    ("10.0.0.1:8077", False), ("[fe80::1]:8077", False), ("::1", False),
    ("localhost:80:80", False), ("localhost:", False), ("localhost:x", False),
    ("user@localhost", False), ("localhost/evil", False),
    ("2130706433", False),
    ("localhost, evil.example", False), ("l\xf6calhost", False),
    ("localhost:99999999", False), ("[localhost]", False)])
def test_only_configured_host_names_are_allowed(host, believed):
    names = frozenset(["koi.example", "other.example:8443"])
    assert koitab.is_allowed_host(host, names, False) is believed


@pytest.mark.parametrize("host, believed", [
    ("10.0.0.1:8077", True), ("[fe80::1]:8077", True),
    ("evil.example:8077", False), ("0.0.0.0", True), ("1.2.3", False)])
def test_ip_address_is_an_allowed_host_if_the_server_listens_on_a_network(
        host, believed):
    assert koitab.is_allowed_host(host, frozenset(), True) is believed


@pytest.mark.parametrize("url, host", [
    ("https://koi.example", "koi.example"), ("http://[::1]:8077/", "::1"),
    ("https://koi.example:8077/koi", "koi.example"),
    ("https://koi.example/a-b/~c_d/e.f/", "koi.example")])
def test_url_of_a_dashboard_may_have_a_path(url, host):
    assert koitab.check_dashboard_url(url) == host


@pytest.mark.parametrize("rest", [
    "//", "/a//b", "/.", "/../x", "/a/.b", "/%2e", "/a;b", "/a\\b", "/\xe4",
    "/a?b", "/a#b", "/a b", "/a\n", ":0", ":99999"])
def test_url_of_a_dashboard_with_a_path_that_needs_escapes_is_refused(rest):
    assert "is not a dashboard URL" in refused(
        koitab.check_dashboard_url, f"https://koi.example{rest}").message


@pytest.mark.parametrize("address, network", [
    ("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"),
    ("2001:db8:1:2:3::4", "2001:0db8:0001:0002"),
    ("fe80::1%eth0", "fe80:0000:0000:0000"), ("?", "?"), ("", "?")])
def test_clients_are_counted_by_their_network(address, network):
    assert koitab.network_of(address) == network


@pytest.mark.parametrize("text, found", [
    ("127.0.0.1:8077", ("127.0.0.1", 8077)), ("[::1]:80", ("::1", 80)),
    ("localhost:0", ("127.0.0.1", 0)), ("0.0.0.0:8077", ("0.0.0.0", 8077))])
def test_a_listen_address_is_parsed(text, found):
    assert koitab.listen_address(text) == found


@pytest.mark.parametrize("text", [
    "", "8077", ":8077", "127.0.0.1", "::1:80", "koi.example:80", "1.2.3:4",
    "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:x"])
def test_an_invalid_listen_address_is_refused(text):
    assert "ADDRESS:PORT" in refused(koitab.listen_address, text).message


def test_eleventh_wrong_key_in_a_minute_has_to_wait():
    throttle = koitab.LoginThrottle()
    assert [throttle.add_miss("a", 1000.0 + number) for number in range(12)
            ] == [0] * 10 + [51, 50]
    assert throttle.add_miss("b", 1012.0) == 0
    assert throttle.add_miss("a", 1060.0) == 0


def test_wrong_keys_from_many_networks_do_not_fill_the_memory():
    throttle = koitab.LoginThrottle()
    for number in range(koitab.MOST_NETWORKS + 100):
        throttle.add_miss(str(number), 0.0)
    assert len(throttle.misses) == koitab.MOST_NETWORKS
    assert str(koitab.MOST_NETWORKS + 99) in throttle.misses


def test_a_network_may_have_few_unproven_and_many_proven_connections():
    limits = koitab.ConnectionLimits()
    for _ in range(koitab.MOST_UNPROVEN):
        assert limits.has_room_for("a")
        limits.add("a")
    assert not limits.has_room_for("a")
    assert limits.has_room_for("b") and limits.has_room_for(None)
    while limits.networks["a"][0] < koitab.MOST_OF_ADDRESS:
        limits.mark_proven("a")
        assert limits.has_room_for("a")
        limits.add("a")
    limits.mark_proven("a")
    assert not limits.has_room_for("a")
    limits.remove("a", True)
    assert limits.has_room_for("a")


def test_network_without_connections_is_removed():
    limits = koitab.ConnectionLimits()
    for network in ("a", None):
        limits.add(network)
        limits.mark_proven(network)
        limits.remove(network, True)
        limits.add(network)
        limits.remove(network, False)
    assert (limits.count, limits.networks) == (0, {})


def test_the_server_is_full_at_its_limit():
    limits = koitab.ConnectionLimits()
    limits.most = 2
    limits.add("a")
    assert not limits.is_full
    limits.add(None)
    assert limits.is_full
    assert limits.has_room_for("b")     # of its own


@pytest.mark.parametrize("header, address", [
    ("203.0.113.5", "203.0.113.5"), ("203.0.113.5:99", "203.0.113.5"),
    ("1.1.1.1, 203.0.113.5", "203.0.113.5"), ("x,2001:DB8::1", "2001:db8::1"),
    ("[2001:db8::1]:80", "2001:db8::1"), ("", ""), ("unknown", ""),
    ("203.0.113.5, unknown", ""), ("1.1.1.1,203.0.113.5, 10.0.0.2",
                                   "203.0.113.5"),
    ("203.0.113.5, ::ffff:10.0.0.2,127.0.0.1", "203.0.113.5"),
    ("unknown, 10.0.0.2", ""), ("10.0.0.2", "10.0.0.2")])
def test_client_is_the_last_forwarded_address_that_is_not_a_proxy(
        header, address):
    assert koitab.forwarded_address(header, {"10.0.0.2", "127.0.0.1"}
                                    ) == address


# --- routes ---------------------------------------------------------------


def handler_of(method: str, path: str) -> tuple:
    """(name of the handler, values in the path), or ()."""
    routes, values = koitab.find_routes(path)
    return (routes[method].handler.__name__, *values) \
        if method in routes else ()


@pytest.mark.parametrize("method, path, found", [
    ("GET", "/", ("show_page",)), ("GET", "/healthz", ("show_health",)),
    ("POST", "/api/v1/sync", ("sync",)),
    ("GET", "/api/v1/runs/12", ("show_run", 12)),
    ("GET", "/api/v1/runs/12/output", ("read_output", 12)),
    ("DELETE", f"/api/v1/hosts/{'a' * 32}", ("remove_host", "a" * 32)),
    ("GET", f"/api/v1/checks/{UUID}/pings/7/body",
     ("show_ping_body", UUID, 7)),
    ("GET", "/badge/abc/all.svg", ("show_badge", "abc", "all.svg")),
    ("GET", "/api/v1/sync", ()), ("GET", "/api/v1/runs/x", ()),
    ("GET", "/api/v1/runs/-1", ()), ("GET", "/api/v1/runs/12/", ()),
    ("GET", "/api/v1/runs/9999999999999999999", ()), ("GET", "/api", ()),
    ("GET", "/api/v1/runs/١٢", ()), ("GET", "/API/v1/state", ()),
    ("GET", "/index.html", ()), ("GET", "/healthz/", ()),
    ("DELETE", f"/api/v1/hosts/{'A' * 32}", ()),
    ("DELETE", f"/api/v1/hosts/{'a' * 31}", ())])
def test_path_matches_at_most_one_route(method, path, found):
    assert handler_of(method, path) == found


@pytest.mark.parametrize("path, found", [
    (f"/ping/{UUID}", (UUID, None, "success")),
    (f"/ping/{UUID}/", (UUID, None, "success")),
    (f"/{UUID}", (UUID, None, "success")),
    (f"/ping/{UUID}/start", (UUID, None, "start")),
    (f"/{UUID}/fail", (UUID, None, "fail")),
    (f"/ping/{UUID}/log", (UUID, None, "log")),
    (f"/ping/{UUID}/0", (UUID, None, "0")),
    (f"/ping/{UUID}/256", (UUID, None, "256")),
    ("/ping/key/slug", ("key", "slug", "success")),
    ("/key/slug", ("key", "slug", "success")),
    ("/ping/key/slug/start", ("key", "slug", "start")),
    ("/key/slug/7", ("key", "slug", "7")),
    ("/ping/key/Slug", ("key", "Slug", "success")),
    (f"/ping/{UUID}/slug", (UUID, "slug", "success")),
    (f"/ping/{UUID}/start/", (UUID, None, "start")),
    ("/ping/key/slug/", ()), ("/ping/key/slug/stop", ()), ("/ping", ()),
    ("/ping/key", ()), ("/ping/", ()), ("/ping/key/a.b", ()),
    ("/ping/key/slug/start/x", ()), (f"/ping/{UUID.upper()}", ())])
def test_pings_have_the_paths_of_healthchecks(path, found):
    routes, values = koitab.find_routes(path)
    assert values == found
    assert sorted(routes) == (["GET", "POST"] if found else [])


def test_every_handler_has_one_route_or_one_for_each_method():
    handlers = {name for name, value in vars(koitab).items()
                if inspect.iscoroutinefunction(value)}
    routes = [*koitab.ROUTES, *koitab.PING_ROUTES.values()]
    assert {route.handler.__name__ for route in routes} == handlers
    assert len({route.handler for route in koitab.ROUTES}) == len(
        koitab.ROUTES) == len({(route.method, route.path)
                               for route in koitab.ROUTES})
    for route in routes:
        title = route.handler.__doc__.partition(": ")[0].partition("?")[0]
        assert title == (f"{route.method} {route.path}"
                         if route.path != "PING" else "GET, POST /ping/...")


def test_viewers_have_no_route_that_changes_something():
    for route in koitab.ROUTES:
        assert route.role in ("anyone", *koitab.TOKEN_ROLES)
        if route.method != "GET" and route.path != "/api/v1/dashboards":
            assert "viewer" not in koitab.TOKEN_ROLES[route.role]
        assert 0 < route.body <= koitab.SYNC_BODY


# --- what is answered -----------------------------------------------------


def fields_of(data: bytes) -> dict:
    lines = data.decode("ascii").split("\r\n")
    assert lines[-2:] == ["", ""]
    return dict(line.split(": ", 1) for line in lines[1:-2])


def test_every_response_has_the_security_headers():
    fields = fields_of(koitab.head_bytes(koitab.Response(
        body=b"12345"), False))
    assert fields == {
        "Content-Type": "text/plain; charset=utf-8", "Content-Length": "5",
        "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin"}


def state_with(command: str, secret: str) -> dict:
    """An overview with a key, and with the jobs of two users."""
    jobs = [{"host": "h", "user": user, "command": text, "recent_runs": [
        (4, 1000.5, 1.2345, "o"), (9, 1060.25, None, "m")]}
        for user, text in (("ann", command), ("root", f"x {secret}"),
                           ("ann", "another command"))]
    return {"dash": {"ping_key": secret}, "checks": [], "jobs": jobs}


def test_compressed_state_has_the_recent_runs_in_columns():
    parts = koitab.state_parts(state_with("a", "b"))
    packed = koitab.gzip_parts(parts)
    found = json.loads(gzip.decompress(packed))
    assert [job["user"] for job in found["jobs"]] == ["ann", "ann", "root"]
    assert found["jobs"][0]["recent_runs"] == {
        "id": [4, 5], "at": [1000, 60], "how": "om", "took": [1.23, None]}
    empty = {**state_with("a", "b"), "jobs": []}
    assert json.loads(gzip.decompress(koitab.gzip_parts(
        koitab.state_parts(empty))))["jobs"] == []


def test_length_of_the_compressed_state_reveals_no_secret():
    """A job's command that has the key or another user's text in it is
    packed no better than one that has not."""
    secret = random.Random(5).randbytes(40).hex()
    other = random.Random(6).randbytes(40).hex()
    right, wrong = (len(koitab.gzip_parts(koitab.state_parts(
        state_with(f"guess {guess}", secret)))) for guess in (secret, other))
    assert abs(right - wrong) < 6       # other digits, not fewer
    assert len(zlib.compress((secret + secret).encode())) + 30 \
        < len(zlib.compress((secret + other).encode()))


def test_name_of_a_check_reveals_no_uuid_by_the_length_of_the_state():
    """Anyone with the ping key chooses the names of new checks."""
    uuids = [str(uuid.UUID(bytes=random.Random(seed).randbytes(16)))
             for seed in (7, 8)]
    right, wrong = (len(koitab.gzip_parts(koitab.state_parts({
        **state_with("a", "b"), "checks": [
            {"id": uuids[0], "name": "x", "recent_runs": []},
            {"id": "y", "name": f"is it {guess}", "recent_runs": []}]})))
        for guess in uuids)
    assert abs(right - wrong) < 6


def test_state_of_300_jobs_and_100_checks_has_at_most_200_kb():
    chance = random.Random(9)

    def history() -> list:
        return [(number * 301, 1.8e9 + number * 300 + chance.random(),
                 chance.uniform(1, 20), chance.choice("oooooof"))
                for number in range(90)]
    run = {"started": 1.8e9, "ended": 1.8e9 + 7.125, "exit": 0, "args": {},
           "line": "17,204 files, 3 changed", "trigger": "schedule"}
    state = {"checks": [{
        "id": str(uuid.UUID(bytes=chance.randbytes(16))),
        "name": f"Check {number}", "desc": "Ask in the office.", "period":
        86400, "words": "every day", "recent_runs": history()}
        for number in range(100)], "jobs": [{
            "id": number, "host": f"{number % 20:032x}", "user": "root",
            "tag": chance.randbytes(4).hex(), "name": f"Job {number}",
            "command": f"/usr/local/bin/job --number {number} | logger",
            "last": run, "recent_runs": history()} for number in range(300)]}
    assert len(koitab.gzip_parts(koitab.state_parts(state))) < 200_000


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "ä", "\0", "\x1b"])
def test_foreign_text_cannot_add_a_response_header(value):
    response = koitab.Response(headers=(("X", value),))
    with pytest.raises(AssertionError):
        koitab.head_bytes(response, False)


def test_a_response_of_unknown_length_closes_the_connection():
    fields = fields_of(koitab.head_bytes(koitab.Response(
        stream=print), True))
    assert "Content-Length" not in fields
    assert fields["Connection"] == "close"


@pytest.mark.parametrize("status", [204, 304])
def test_a_response_without_a_body_has_no_length(status):
    fields = fields_of(koitab.head_bytes(koitab.Response(status), False))
    assert "Content-Length" not in fields


def test_the_policy_allows_only_the_scripts_in_the_page():
    page = "<style>a{}</style><body><script>'ä<b>'</script>"
    policy = koitab.page_policy_of(page)
    for text, name in (("a{}", "style"), ("'ä<b>'", "script")):
        digest = hashlib.sha256(text.encode()).digest()
        assert f"{name}-src 'sha256-{base64.b64encode(digest).decode()}';" \
            in policy
    for part in ("default-src 'none'", "base-uri 'none'", "form-action "
                 "'none'", "frame-ancestors 'none'", "connect-src 'self'",
                 "require-trusted-types-for 'script'"):
        assert part in policy
    assert "unsafe" not in policy
    assert "script-src 'none'; style-src 'none'" in koitab.page_policy_of("")


@pytest.mark.parametrize("text", [
    '"><script>alert(1)</script>', "a & b", "\x00\x1b", "\ud800", "x" * 999])
def test_a_badge_is_valid_xml_for_any_text(text):
    data = koitab.badge_svg(text, text, text)
    clean = re.sub(rb"[\0\x1b]", b"", data)
    root = xml.etree.ElementTree.fromstring(clean)
    assert {part.tag.rpartition("}")[2] for part in root.iter()} == {
        "svg", "rect", "g", "text"}
    assert not any(name.startswith("on") for part in root.iter()
                   for name in part.attrib)


def test_a_badge_has_the_colour_of_its_name_or_grey():
    assert b"#c62828" in koitab.badge_svg("a", "down", "red")
    assert b"#616161" in koitab.badge_svg("a", "b", 'red" onload="x')


def test_errors_are_json_with_a_hint():
    response = koitab.error_response(koitab.Error("no", "yes", 404))
    assert response.status == 404
    assert json.loads(response.body) == {"error": "no", "hint": "yes"}
    assert koitab.error_response(koitab.Error("bug")).status == 500
    assert dict(koitab.error_response(koitab.TooManyRequests("no",
                                                             61)).headers) == {
        "Retry-After": "61"}


# --- changes that are followed --------------------------------------------


def test_browser_that_reconnects_gets_the_changes_it_missed():
    stream = koitab.ChangeStream()
    stream.clear(10)
    for seq in (12, 13, 20):
        stream.add(seq, b"%d\n" % seq, b"")
    assert stream.since(9) == stream.since(-1) == koitab.START_OVER
    assert stream.since(10) == b"12\n13\n20\n"
    assert stream.since(12) == stream.since(12) == b"13\n20\n"
    assert stream.since(20) == b""
    assert stream.since(10, "viewer") == b""


@pytest.mark.parametrize("size", [10, koitab.MOST_CHANGE_BYTES // 50])
def test_stream_from_a_dropped_change_starts_over(size):
    stream = koitab.ChangeStream()
    for seq in range(1, 2001):
        stream.add(seq, b"x" * size, b"")
    assert stream.bytes <= koitab.MOST_CHANGE_BYTES
    assert len(stream.lines) <= koitab.MOST_CHANGES
    assert stream.since(stream.first - 1) == koitab.START_OVER
    assert len(stream.since(stream.first)) == size * len(stream.lines)
    assert len(stream.lines) == 2000 - stream.first


def test_stream_from_before_a_reset_starts_over():
    stream = koitab.ChangeStream()
    stream.add(1, b"x", b"")
    stream.clear(5)
    assert stream.since(4) == koitab.START_OVER
    assert (stream.since(5), stream.bytes) == (b"", 0)


# --- long polls ----------------------------------------------------------

TOPIC = ("host", "a")


def test_poll_waits_for_a_change():
    async def waits() -> list:
        polls, found = {}, []
        with koitab.LongPoll(polls, TOPIC) as poll:
            task = asyncio.ensure_future(poll.wait(25))
            await asyncio.sleep(0)
            found.append(task.done())
            next(iter(polls[TOPIC])).event.set()
            found.append(await task)
            found.append(await poll.wait(0))    # it was news only once
        return found

    assert asyncio.run(waits()) == [False, True, False]


def test_change_between_the_query_and_the_wait_is_not_missed():
    async def waits() -> bool:
        with koitab.LongPoll({}, TOPIC) as poll:
            poll.event.set()
            return await poll.wait(25)

    assert asyncio.run(waits())


@pytest.mark.parametrize("error", [None, koitab.Error("gone", "", 401)])
def test_ended_poll_is_answered_at_once(error):
    async def waits() -> bool:
        with koitab.LongPoll({}, TOPIC) as poll:
            poll.end(error)
            return await poll.wait(25)

    if error:
        assert refused(asyncio.run, waits()) is error
    else:
        assert asyncio.run(waits()) is False


def test_ended_poll_is_removed():
    async def waits() -> tuple:
        polls = {}
        with koitab.LongPoll(polls, TOPIC):
            with koitab.LongPoll(polls, TOPIC):
                two = len(polls[TOPIC])
            one = len(polls[TOPIC])
        return two, one, polls

    assert asyncio.run(waits()) == (2, 1, {})


# --- certificates ---------------------------------------------------------


def test_the_expiry_of_a_certificate_is_read(tmp_path):
    import servers
    made = servers.certificate(tmp_path)
    certificate = koitab.Certificate(made.cert, made.key)
    certificate.load()
    now = koitab.Clock().now()
    assert abs(certificate.expires - now - 2 * 86400) < 3600
    assert "expires on" in certificate.problem(now)
    assert "expired on" in certificate.problem(now + 3 * 86400)
    assert certificate.problem(now - 13 * 86400) == ""
    shown = support.subprocess.run(
        ["openssl", "x509", "-in", made.cert, "-noout", "-fingerprint",
         "-sha256"], stdout=support.subprocess.PIPE, check=True).stdout
    assert shown.decode().strip().endswith(certificate.fingerprint)


def test_the_expiry_of_an_expired_certificate_is_read(tmp_path):
    import servers
    made = servers.certificate(tmp_path, expired=True)
    certificate = koitab.Certificate(made.cert, made.key)
    certificate.load()
    assert "expired on" in certificate.problem(koitab.Clock().now())


def test_the_expiry_of_a_certificate_from_an_authority_is_read(tmp_path):
    """Not the authority's, whose certificate is in the file as well."""
    authority = made_certificate(tmp_path, "authority", 4000)
    leaf = made_certificate(tmp_path, "leaf", 20, authority)
    chain = tmp_path / "chain.pem"
    chain.write_text(leaf[0].read_text() + authority[0].read_text())
    certificate = koitab.Certificate(str(chain), str(leaf[1]))
    certificate.load()
    days = (certificate.expires - koitab.Clock().now()) / 86400
    assert 19 < days < 21


def made_certificate(folder, name: str, days: int, authority=None) -> tuple:
    """Paths of a certificate and its key; without an authority it is one."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text(f"basicConstraints=CA:"
                          f"{'FALSE' if authority else 'TRUE'}\n")
    by = ["-CA", authority[0], "-CAkey", authority[1], "-CAcreateserial"] \
        if authority else ["-signkey", key]
    support.need("openssl")
    for command in (
            ["req", "-new", "-newkey", "ec", "-pkeyopt",
             "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
             "-keyout", key, "-out", request],
            ["x509", "-req", "-in", request, "-days", str(days), "-extfile",
             extensions, *by, "-out", cert]):
        support.subprocess.run(["openssl", *command], check=True,
                               stdout=support.subprocess.DEVNULL,
                               stderr=support.subprocess.DEVNULL)
    return cert, key


@pytest.mark.parametrize("cert, key", [
    ("gone", "gone"), ("/", "/"), ("empty", "empty"), ("text", "text")])
def test_an_unusable_certificate_is_refused(tmp_path, monkeypatch, cert, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("no certificate\n")
    error = refused(koitab.Certificate(cert, key).load)
    assert cert in error.message and "PEM" in error.hint

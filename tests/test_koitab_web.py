"""Web: what is read out of bytes, who may ask for what, and what is said."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import xml.etree.ElementTree

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
    request = koitab.read_head(head(
        "POST /api/v1/sync?a=1&b HTTP/1.1", "Host: koi.example:8077",
        "Content-Length: 12", "User-Agent:  curl/8 \t", "X-Empty:",
        "Accept: a", "accept: b", "Content-Type: Application/JSON; x=y"))
    assert (request.method, request.path, request.query) == (
        "POST", "/api/v1/sync", "a=1&b")
    assert (request.length, request.kind, request.keeps) == (
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
def test_a_connection_is_kept_when_both_sides_may(version, header, keeps):
    request = koitab.read_head(head(f"GET / {version}", "Host: x", header))
    assert request.keeps is keeps


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
def test_a_first_line_that_is_not_plain_is_refused(line, status):
    assert refused(koitab.read_head, head(line, "Host: x")).status == status


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
    (["Transfer-Encoding: chunked"], 501),
    (["Transfer-Encoding: identity"], 501), (["Transfer-Encoding:"], 501),
    (["Transfer-Encoding: chunked", "Content-Length: 5"], 501),
    (["Host: y"], 400), (["Authorization: a", "authorization: b"], 400),
    (["Origin: a", "Origin: b"], 400),
    (["Content-Type: a", "Content-Type: b"], 400)])
def test_headers_that_could_be_read_in_two_ways_are_refused(lines, status):
    error = refused(koitab.read_head, head(
        "POST / HTTP/1.1", "Host: x", *lines))
    assert error.status == status


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_some_methods_have_no_body(method):
    lines = f"{method} / HTTP/1.1", "Host: x"
    assert refused(koitab.read_head, head(
        *lines, "Content-Length: 5")).status == 400
    assert koitab.read_head(head(*lines, "Content-Length: 0")).length == 0


def test_a_host_is_needed():
    assert refused(koitab.read_head, head("GET / HTTP/1.1")).status == 400


def test_so_many_header_lines_and_no_more():
    lines = [f"X-{number}: y" for number in range(63)]
    assert koitab.read_head(head("GET / HTTP/1.1", "Host: x", *lines))
    error = refused(koitab.read_head, head(
        "GET / HTTP/1.1", "Host: x", *lines, "One: more"))
    assert error.status == 431


@pytest.mark.parametrize("data, why", [
    (b"\x16\x03\x01\x02\x00\x01", "plain http"), (b"\r\nGET /", "no HTTP"),
    (b"get / HTTP/1.1\r\n", "no HTTP"), (b"\x00", "no HTTP"),
    (b"GET / HTTP/1.1\n", "half of CR LF"), (b"G\rX", "half of CR LF"),
    (b"GET / HTTP/1.1\r\nX: a\rContent-Length: 5\r\n", "half of CR LF"),
    (b"GET / HTTP/1.1\r\nX: a\n\r\n", "half of CR LF"), (b"GE\0T", "NUL"),
    (b"GET / HTTP/1.1\r\r\n", "half of CR LF"), (b"SSH-2.0-x\n", "half of")])
def test_what_is_no_http_is_seen_at_once(data, why):
    assert why in koitab.early_fault(data)


def test_a_head_that_comes_byte_by_byte_has_no_fault_on_the_way():
    data = b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n"
    assert [koitab.early_fault(data[:end]) for end in range(1, len(data))
            if koitab.early_fault(data[:end])] == []


def test_a_head_has_a_longest_line_and_a_size():
    room = koitab.LONGEST_LINE
    assert koitab.head_fault(b"G" * room, -1) is None
    assert koitab.head_fault(b"G" * room + b"\r\n", -1) is None
    assert koitab.head_fault(b"G" * (room + 1), -1).status == 414
    assert koitab.head_fault(b"G" * (room + 1) + b"\r\n", -1).status == 414
    long = b"G\r\n" + b"x" * (koitab.LONGEST_HEAD - 3)
    assert koitab.head_fault(long, -1) is None
    assert koitab.head_fault(long + b"x", -1).status == 431
    assert koitab.head_fault(long, len(long) - 4) is None
    assert koitab.head_fault(long, len(long) - 3).status == 431


@pytest.mark.parametrize("query, fields", [
    ("", {}), ("a=1&b=", {"a": "1", "b": ""}), ("a", {"a": ""}),
    ("q=a+b%20c%C3%A4", {"q": "a b cä"}), ("q=a=b", {"q": "a=b"})])
def test_a_query_becomes_fields(query, fields):
    assert koitab.read_query(query) == fields


@pytest.mark.parametrize("query", [
    "a=1&a=2", "a=%ff", "&".join(f"a{n}=1" for n in range(17))])
def test_a_query_that_is_odd_is_refused(query):
    assert refused(koitab.read_query, query).status == 400


@pytest.mark.parametrize("body", [
    b"", b"[]", b"1", b"null", b"{", b"\xff{}", b'{"a":NaN}',
    b'{"a":Infinity}', b'{"a":1e999}', b'{"a":9999999999999999999}',
    b'{"a":"\\ud800"}', b'{"\\udfff":1}', b"[" * 100_000, b"\xef\xbb\xbf{}",
    b'{"a":' * 100_000, '{"a":1}'.encode("utf-16")])
def test_json_that_nothing_could_hold_is_refused(body):
    assert refused(koitab.read_json, body).status == 400


def test_json_of_a_request():
    assert koitab.read_json(b'{"a":"\\ud83d\\ude00","b":1.5,"c":-7}') == {
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
def test_only_names_of_ours_are_believed(host, believed):
    names = frozenset(["koi.example", "other.example:8443"])
    assert koitab.is_allowed_host(host, names, False) is believed


@pytest.mark.parametrize("host, believed", [
    ("10.0.0.1:8077", True), ("[fe80::1]:8077", True),
    ("evil.example:8077", False), ("0.0.0.0", True), ("1.2.3", False)])
def test_beyond_loopback_any_address_is_believed(host, believed):
    assert koitab.is_allowed_host(host, frozenset(), True) is believed


@pytest.mark.parametrize("address, network", [
    ("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"),
    ("2001:db8:1:2:3::4", "2001:0db8:0001:0002"),
    ("fe80::1%eth0", "fe80:0000:0000:0000"), ("?", "?"), ("", "?")])
def test_callers_are_counted_by_their_network(address, network):
    assert koitab.network_of(address) == network


@pytest.mark.parametrize("text, found", [
    ("127.0.0.1:8077", ("127.0.0.1", 8077)), ("[::1]:80", ("::1", 80)),
    ("localhost:0", ("127.0.0.1", 0)), ("0.0.0.0:8077", ("0.0.0.0", 8077))])
def test_where_to_listen(text, found):
    assert koitab.listen_address(text) == found


@pytest.mark.parametrize("text", [
    "", "8077", ":8077", "127.0.0.1", "::1:80", "koi.example:80", "1.2.3:4",
    "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:x"])
def test_where_one_cannot_listen(text):
    assert "ADDRESS:PORT" in refused(koitab.listen_address, text).message


def test_ten_wrong_keys_and_the_address_has_to_wait_longer_each_time():
    guard, now, waits = koitab.LoginThrottle(), 1000.0, []
    for _ in range(4):
        for _ in range(10):
            assert guard.wait("a", now) == 0
            guard.miss("a", now)
        waits.append(guard.wait("a", now))
        now += waits[-1]
    assert waits == [61, 121, 241, 481]
    assert guard.wait("b", now) == 0


def test_a_wrong_key_now_and_then_bans_nobody():
    guard = koitab.LoginThrottle()
    for minute in range(100):
        for _ in range(9):
            guard.miss("a", minute * 61.0)
        assert guard.wait("a", minute * 61.0) == 0


def test_when_all_guess_together_those_who_were_known_come_in():
    guard = koitab.LoginThrottle()
    guard.good("home", 0.0)
    for number in range(koitab.MISSES_IN_ALL):
        assert guard.wait("new", 1.0) == 0
        guard.miss(f"bot {number}", 1.0)
    assert guard.wait("new", 1.0) == 60
    assert guard.wait("home", 1.0) == 0
    guard.miss("bot", 70.0)
    assert guard.wait("new", 70.0) == 0


def test_who_guesses_from_everywhere_does_not_fill_the_memory():
    guard = koitab.LoginThrottle()
    for number in range(koitab.MOST_STRANGERS + 100):
        guard.miss(str(number), 0.0)
        guard.good(str(number), 0.0)
    assert len(guard.misses) == len(guard.known) == koitab.MOST_STRANGERS


def test_an_address_has_room_for_some_strangers_and_for_many_hosts():
    crowd = koitab.ConnectionLimits()
    for _ in range(koitab.MOST_UNPROVEN):
        assert crowd.admits("a")
        crowd.enter("a")
    assert not crowd.admits("a")
    assert crowd.admits("b") and crowd.admits(None)
    while crowd.of["a"][0] < koitab.MOST_OF_ADDRESS:
        crowd.prove("a")
        assert crowd.admits("a")
        crowd.enter("a")
    crowd.prove("a")
    assert not crowd.admits("a")
    crowd.leave("a", True)
    assert crowd.admits("a")


def test_a_crowd_that_has_left_is_forgotten():
    crowd = koitab.ConnectionLimits()
    for network in ("a", None):
        crowd.enter(network)
        crowd.prove(network)
        crowd.leave(network, True)
        crowd.enter(network)
        crowd.leave(network, False)
    assert (crowd.all, crowd.of) == (0, {})


def test_a_full_house_admits_nobody():
    crowd = koitab.ConnectionLimits()
    crowd.most = 2
    crowd.enter("a")
    crowd.enter(None)
    assert not crowd.admits("b") and not crowd.admits(None)
    assert crowd.admits("b", room=False)


# --- routes ---------------------------------------------------------------


def deed_of(method: str, path: str) -> tuple:
    routes, values = koitab.found_routes(path)
    return (routes[method].handler, *values) if method in routes else ()


@pytest.mark.parametrize("method, path, found", [
    ("GET", "/", ("page",)), ("GET", "/healthz", ("healthz",)),
    ("POST", "/api/v1/sync", ("sync",)),
    ("GET", "/api/v1/runs/12", ("run", "12")),
    ("GET", "/api/v1/runs/12/output", ("output", "12")),
    ("DELETE", f"/api/v1/hosts/{'a' * 32}", ("leave", "a" * 32)),
    ("GET", f"/api/v1/checks/{UUID}/pings/7/body", ("ping_body", UUID, "7")),
    ("GET", "/badge/abc/all.svg", ("badge", "abc", "all.svg")),
    ("GET", "/api/v1/sync", ()), ("GET", "/api/v1/runs/x", ()),
    ("GET", "/api/v1/runs/-1", ()), ("GET", "/api/v1/runs/12/", ()),
    ("GET", "/api/v1/runs/9999999999999999999", ()), ("GET", "/api", ()),
    ("GET", "/api/v1/runs/١٢", ()), ("GET", "/API/v1/state", ()),
    ("GET", "/index.html", ()), ("GET", "/healthz/", ()),
    ("DELETE", f"/api/v1/hosts/{'A' * 32}", ()),
    ("DELETE", f"/api/v1/hosts/{'a' * 31}", ())])
def test_a_path_is_one_of_the_table_or_none(method, path, found):
    assert deed_of(method, path) == found


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
    routes, values = koitab.found_routes(path)
    assert values == found
    assert sorted(routes) == (["GET", "POST"] if found else [])


def test_every_route_has_a_deed_and_every_deed_a_route():
    deeds = {route.handler
             for route in [*koitab.ROUTES, *koitab.PING.values()]}
    assert deeds == {name[3:] for name in vars(koitab.Api)
                     if name.startswith("do_")}


def test_what_changes_something_is_for_operators_or_hosts():
    for route in koitab.ROUTES:
        assert route.role in ("anyone", *koitab.WHO)
        if route.method != "GET" and route.handler != "create_dashboard":
            assert "viewer" not in koitab.WHO[route.role]
        assert bool(route.body) == (route.method == "POST")


# --- what is answered -----------------------------------------------------


def fields_of(data: bytes) -> dict:
    lines = data.decode("ascii").split("\r\n")
    assert lines[-2:] == ["", ""]
    return dict(line.split(": ", 1) for line in lines[1:-2])


def test_every_answer_says_what_a_browser_must_not_do():
    fields = fields_of(koitab.head_bytes(koitab.Response(), 5, False))
    assert fields == {
        "Content-Type": "text/plain; charset=utf-8", "Content-Length": "5",
        "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin"}


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "ä", "\0", "\x1b"])
def test_nothing_that_others_said_stands_in_a_head(value):
    response = koitab.Response(headers=(("X", value),))
    with pytest.raises(AssertionError):
        koitab.head_bytes(response, 0, False)


def test_an_answer_without_a_length_ends_with_the_connection():
    fields = fields_of(koitab.head_bytes(koitab.Response(), None, True))
    assert "Content-Length" not in fields
    assert fields["Connection"] == "close"


@pytest.mark.parametrize("status", [204, 304])
def test_some_answers_have_no_length(status):
    fields = fields_of(koitab.head_bytes(koitab.Response(status), 0, False))
    assert "Content-Length" not in fields


def test_the_policy_lets_the_page_run_what_stands_in_it_alone():
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
def test_a_badge_is_xml_whatever_stands_in_it(text):
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


def test_who_comes_back_gets_what_he_missed():
    feed = koitab.ChangeStream(10, 0.0)
    for seq in (12, 13, 20):
        feed.add(seq, b"%d\n" % seq)
    assert feed.since(9) is None
    assert feed.since(10) == [b"12\n", b"13\n", b"20\n"]
    assert feed.since(12) == feed.since(12) == [b"13\n", b"20\n"]
    assert feed.since(20) == []


@pytest.mark.parametrize("size", [10, koitab.MOST_CHANGE_BYTES // 50])
def test_changes_of_long_ago_are_forgotten_and_that_is_known(size):
    feed = koitab.ChangeStream(0, 0.0)
    for seq in range(1, 2001):
        feed.add(seq, b"x" * size)
    assert feed.bytes <= koitab.MOST_CHANGE_BYTES
    assert len(feed.lines) <= koitab.MOST_CHANGES
    assert feed.since(feed.first - 1) is None
    assert len(feed.since(feed.first)) == len(feed.lines) == 2000 - feed.first


def test_after_a_reset_nothing_older_is_known():
    feed = koitab.ChangeStream(0, 0.0)
    feed.add(1, b"x")
    feed.clear(5)
    assert feed.since(4) is None
    assert (feed.since(5), feed.bytes) == ([], 0)


# --- long polls ----------------------------------------------------------


class Loop:
    """A loop that does nothing by itself."""

    def call_later(self, _seconds, deed):
        self.late = deed
        return self

    def cancel(self):
        self.late = None


class Polled(koitab.RequestContext):
    """A visit that remembers what was done."""


@pytest.fixture
def wait():
    """A long poll, and what happened to it."""
    visit = Polled.__new__(Polled)
    visit.connection = koitab.HttpConnection.__new__(koitab.HttpConnection)
    visit.connection.api = site = koitab.Api(None, "")
    site.loop, visit.stream, visit.connection.ended = Loop(), None, False
    visit.done = []
    return koitab.Wait(visit, ("host", "a"), 25,
                       lambda: visit.done.append("again"))


def test_a_poll_rests_until_something_happens(wait):
    wait.rest(lambda: wait.context.done.append("last"))
    assert (wait.context.done, wait.context.waits) == ([], True)
    wait.stir()
    assert (wait.context.done, wait.context.waits) == (["again"], False)


def test_what_happens_between_the_question_and_the_rest_is_not_missed(wait):
    wait.stir()
    assert wait.context.done == []          # the question is still under way
    wait.rest(lambda: wait.context.done.append("last"))
    assert wait.context.done == ["again"]
    wait.rest(lambda: wait.context.done.append("last"))
    assert wait.context.done == ["again"]


def test_a_poll_whose_time_is_over_answers_with_what_there_is(wait):
    wait.rest(lambda: wait.context.done.append("last"))
    wait.context.connection.api.loop.late()
    assert wait.context.done == ["last"]


def test_a_poll_whose_time_is_over_while_it_asks_answers_after_that(wait):
    wait.context.connection.api.loop.late()
    assert wait.context.done == []
    wait.rest(lambda: wait.context.done.append("last"))
    assert wait.context.done == ["last"]


def test_who_hung_up_while_his_poll_asked_does_not_rest(wait):
    wait.context.connection.ended = True
    wait.rest(lambda: wait.context.done.append("last"))
    assert (wait.context.done, wait.resting) == (["last"], False)


def test_a_poll_that_has_ended_is_forgotten(wait):
    site = wait.context.connection.api
    other = koitab.Wait(wait.context, ("host", "a"), 25, None)
    assert len(site.waiting["host", "a"]) == 2
    wait.context.wait = wait
    wait.end()
    assert list(site.waiting["host", "a"]) == [other]
    other.end()
    assert (site.waiting, site.loop.late) == ({}, None)


# --- certificates ---------------------------------------------------------


def test_the_expiry_of_a_certificate_is_read(tmp_path):
    import servers
    made = servers.certificate(tmp_path)
    certificate = koitab.Certificate(made.cert, made.key)
    certificate.load()
    now = koitab.Clock().now()
    assert abs(certificate.expires - now - 2 * 86400) < 3600
    assert "expires on" in certificate.trouble(now)
    assert "expired on" in certificate.trouble(now + 3 * 86400)
    assert certificate.trouble(now - 13 * 86400) == ""
    shown = support.subprocess.run(
        ["openssl", "x509", "-in", made.cert, "-noout", "-fingerprint",
         "-sha256"], stdout=support.subprocess.PIPE, check=True).stdout
    assert shown.decode().strip().endswith(certificate.print)


@pytest.mark.parametrize("data", [
    b"", b"\x30", b"\x30\x00", b"\x30\x82\xff\xff", b"\x30\x03\x02\x01\x05",
    bytes(range(256))])
def test_what_is_no_certificate_is_seen(data):
    with pytest.raises(ValueError):
        koitab.expiry_of(data)


def test_the_last_time_of_two_digits_is_in_2049():
    def der(tag: int, *parts: bytes) -> bytes:
        data = b"".join(parts)
        return bytes([tag, len(data)]) + data

    def made(tag: int, text: bytes) -> bytes:
        return der(0x30, der(0x30, der(0xA0), der(2, b"1"), der(0x30),
                             der(0x30), der(0x30, der(tag, b"x"),
                                            der(tag, text))))

    assert koitab.expiry_of(made(0x17, b"491231235959Z")) == 2524607999
    assert koitab.expiry_of(made(0x17, b"700101000000Z")) == 0
    assert koitab.expiry_of(made(0x18, b"20500101000000Z")) == 2524608000


@pytest.mark.parametrize("cert, key", [
    ("gone", "gone"), ("/", "/"), ("empty", "empty"), ("text", "text")])
def test_a_certificate_that_cannot_be_used_is_told(tmp_path, monkeypatch,
                                                   cert, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("no certificate\n")
    error = refused(koitab.Certificate(cert, key).load)
    assert cert in error.message and "PEM" in error.hint

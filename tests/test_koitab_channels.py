"""Channels: how a notification goes out, and what its receiver gets."""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import http.server
import json
import re
import socket
import stat
import textwrap
import threading
import time
import types

import pytest

import servers
import support
from dashboard_rig import HOST, NOW, InProcessDashboard, frames, piece, refused

koitab = support.load("koitab")
DAY, HOUR = 86_400, 3600


pytestmark = pytest.mark.usefixtures("small_ballast")


@pytest.fixture(autouse=True)
def mail_channel(dashboard):
    """Somebody is notified."""
    dashboard.channel()


class Listener(http.server.BaseHTTPRequestHandler):
    """Keeps the requests, and answers with `status`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        if self.server.sleeps:
            time.sleep(self.server.sleeps)
        if self.server.hold:
            self.server.hold.wait(20)
            return
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def listener():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    server.got, server.status, server.sleeps = [], 200, 0
    server.hold = None          # an event before which nothing is answered
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def deliver(dashboard, url: str = "") -> None:
    """Deliver what is due, with a dashboard that runs step by step."""
    notifier = koitab.Notifier(dashboard.dashboard, url=url)
    threads = notifier.deliver_due()
    step_until(dashboard, lambda: not any(thread.is_alive()
                                          for thread in threads))


def step_until(dashboard, is_done) -> None:
    """Let the dashboard write what other threads want written, until."""
    until = time.monotonic() + 10
    while not is_done():
        dashboard.dashboard.run_once()
        time.sleep(0.002)
        assert time.monotonic() < until
    dashboard.dashboard.run_once()


@pytest.fixture
def quiet(dashboard):
    """No channel but those that the test makes."""
    dashboard.do(dashboard.dashboard.alerts.change_channel,
                 {"do": "delete", "id": 1}, NOW)
    return dashboard


def fail(dashboard) -> None:
    web1 = dashboard.join()
    dashboard.runs(web1, dashboard.record(exit=1, name='Bäck"up\r\nBcc: x'))


def test_webhook_receives_json_with_an_idempotency_key(quiet, listener):
    quiet.channel("webhook", listener.url + "/hook?a=b")
    fail(quiet)
    deliver(quiet)
    (path, headers, body), = listener.got
    body = json.loads(body)
    assert path == "/hook?a=b"
    assert headers["Idempotency-Key"] == body["key"]
    assert (body["kind"], body["status"], body["alerts"][0]["subject"],
            body["dash"]) == ("failed", "firing", "job:1", quiet.dash)
    assert quiet.rows("select * from notifications") == []
    channel, = quiet.ask(quiet.dashboard.alerts.list_channels,
                         "operator")["channels"]
    assert (channel["last"], channel["error"]) == (NOW, "")


def bodies(dashboard, listener, url: str = "") -> list[dict]:
    """The bodies of webhooks that are due."""
    listener.got.clear()
    deliver(dashboard, url)
    return [json.loads(body) for _, _, body in listener.got]


def test_notification_of_an_alert_names_its_time_host_and_next_step(
        quiet, listener):
    quiet.channel("webhook", listener.url)
    web1, data = quiet.join(), frames("start\nno space\n", 2)
    quiet.runs(web1, quiet.record(exit=3, size=len(data), run=17))
    quiet.sync(web1, outputs=[piece(17, 0, data)])
    body, = bodies(quiet, listener, "https://koi.example.org")
    began = koitab.format_rfc3339(NOW)
    assert {**body, "dash": "", "alerts": []} == {
        "key": "1-failed-firing-2", "status": "firing", "kind": "failed",
        "title": "Night/Backup on web1 failed", "time": began, "dash": "",
        "text": "Night/Backup on web1: exit status 3\n\nstart\nno space",
        "link": "https://koi.example.org/#/run/1", "alerts": []}
    assert body["alerts"] == [{
        "id": "1-failed", "status": "firing", "kind": "failed",
        "subject": "job:1", "title": body["title"],
        "text": "Night/Backup on web1: exit status 3", "startsAt": began,
        "endsAt": "", "host": "web1", "section": "Night", "job": "Backup",
        "check": "", "run": 17, "command": "koitab log 17",
        "link": body["link"], "output": "start\nno space"}]
    quiet.clock.time += HOUR
    quiet.runs(web1, quiet.record(run=18))
    body, = bodies(quiet, listener, "https://koi.example.org")
    end, = body["alerts"]
    ended = koitab.format_rfc3339(NOW + HOUR)
    assert (body["status"], end["id"], end["startsAt"], end["endsAt"]) == (
        "resolved", "1-failed", began, ended)
    assert body["text"] == (
        f"Night/Backup on web1 works again. The alert lasted from {began} to "
        f"{ended}:\nNight/Backup on web1: exit status 3")
    assert body["link"] == "https://koi.example.org/#/job/1"


def test_recovery_of_a_check_reaches_the_channels_that_got_its_failure(
        dashboard):
    """Another channel, which does not answer, has not got it yet."""
    broken = dashboard.channel(target="broken@example.org")
    check = dashboard.do(dashboard.dashboard.checks.create, {"name": "Sync"},
                         NOW)["id"]
    dashboard.ping(check)
    dashboard.ping(check, action="fail")
    for number, channel in dashboard.rows(
            "select id, channel from notifications"):
        if channel != broken:
            dashboard.do(dashboard.dashboard.alerts.mark_delivered, number, "",
                         NOW)
    dashboard.dashboard.db.execute(
        "update notifications set due = ?", dashboard.now + 30)
    dashboard.ping(check)
    assert dashboard.rows("select channel, title from notifications") == [
        (1, "Sync is up")]


def test_digest_has_an_entry_for_each_alert(quiet, listener):
    quiet.channel("webhook", listener.url)
    quiet.runs(quiet.join(), *quiet.failing(60))
    body, = bodies(quiet, listener)
    assert body["kind"] == "digest" and len(body["alerts"]) == 60
    assert {(each["status"], each["host"]) for each in body["alerts"]} == {
        ("firing", "web1")}


def test_id_of_a_check_that_could_ping_is_in_no_notification(quiet, listener):
    quiet.channel("webhook", listener.url)
    check = quiet.do(quiet.dashboard.checks.create, {"name": "Sync"},
                     NOW)["id"]
    quiet.ping(check, action="fail")
    body, = bodies(quiet, listener, "https://koi.example.org")
    assert body["alerts"][0]["check"] == "Sync"
    assert check not in json.dumps(body)


@pytest.mark.parametrize("text, lines", [
    ("\n".join(map(str, range(20))), list(map(str, range(10, 20)))),
    ("é" * 9000, ["é" * 300]), ("a\n\n\x1b[31mb\x1b[0m\n", ["a", "b"]),
    ("", [])])
def test_notification_has_few_last_lines_cut_between_characters(text, lines):
    assert koitab.last_lines(frames(text), bad=False) == lines


@pytest.mark.parametrize("names, proxies, cert, place, url", [
    ((), (), "", ("127.0.0.1", 8077), "http://127.0.0.1:8077"),
    ((), (), "c", ("::1", 8077), "https://[::1]:8077"),
    ((), (), "c", ("0.0.0.0", 8077), "https://web1:8077"),
    (("koi.example",), (), "c", ("::", 443), "https://koi.example:443"),
    (("koi.example:99",), (), "", ("::", 8077), "http://koi.example:99"),
    (("koi.example",), ("::1",), "", ("::1", 8077), "https://koi.example")])
def test_links_in_notifications_have_the_public_url(
        names, proxies, cert, place, url):
    options = types.SimpleNamespace(
        names=names, proxies=proxies, cert=cert,
        machine=types.SimpleNamespace(host=lambda: "web1"))
    assert koitab.public_url(options, [place]) == url


def test_ntfy_message_has_a_title_a_priority_and_a_tag(quiet, listener):
    quiet.channel("ntfy", listener.url + "/topic")
    fail(quiet)
    deliver(quiet)
    (path, headers, body), = listener.got
    assert headers["Title"].startswith("=?utf-8?")
    assert headers["Priority"] == "high" and headers["Tags"] == "warning"
    assert "Bcc" not in headers and b"exit status 1" in body


def test_password_in_a_url_is_sent_and_never_shown(quiet, listener):
    url = listener.url.replace("http://", "http://me:geh%20eim@")
    quiet.channel("webhook", url)
    listener.status = 500
    fail(quiet)
    deliver(quiet)
    assert listener.got[0][1]["Authorization"] == "Basic bWU6Z2VoIGVpbQ=="
    channel, = quiet.ask(quiet.dashboard.alerts.list_channels,
                         "operator")["channels"]
    assert "geh" not in json.dumps(channel) and "***@" in channel["target"]


def test_token_of_ntfy_is_sent_as_the_password_of_an_empty_user(
        quiet, listener):
    quiet.channel("ntfy", listener.url.replace("//", "//:tk_abcdefgh@") + "/t")
    fail(quiet)
    deliver(quiet)
    (_, headers, _), = listener.got
    assert headers["Authorization"] == "Basic " + base64.b64encode(
        b":tk_abcdefgh").decode()


@pytest.mark.parametrize("status, words", [
    (500, "HTTP status 500"), (404, "HTTP status 404"),
    (302, "redirects are not followed")])
def test_failed_delivery_is_repeated_for_a_day(quiet, listener, status, words):
    quiet.channel("webhook", listener.url)
    check = quiet.do(quiet.dashboard.checks.create, {"name": "x"},
                     NOW)["id"]
    quiet.ping(check, action="fail")
    listener.status = status
    deliver(quiet)
    channel, = quiet.ask(quiet.dashboard.alerts.list_channels,
                         "operator")["channels"]
    assert words in channel["error"] and channel["last"] is None
    deliver(quiet)
    assert len(listener.got) == 1       # not at once
    waits = []
    for _ in range(12):
        due, = quiet.rows("select due from notifications")[0]
        waits.append(due - quiet.now)
        quiet.clock.time = due
        deliver(quiet)
    assert waits[:3] == [15, 30, 60] and max(waits) == HOUR
    keys = {dict(headers)["Idempotency-Key"]
            for _, headers, _ in listener.got}
    assert len(keys) == 1
    quiet.clock.time = NOW + DAY + 1
    deliver(quiet)
    assert quiet.rows("select * from notifications") == []


def test_channel_that_hangs_does_not_delay_another_channel(
        quiet, listener, monkeypatch):
    monkeypatch.setattr(koitab, "SEND_SECONDS", 0.3)
    dead = socket.socket()
    dead.bind(("127.0.0.1", 0))
    dead.listen()               # it accepts, and never says a word
    quiet.channel("webhook", f"http://127.0.0.1:{dead.getsockname()[1]}/")
    quiet.channel("webhook", listener.url)
    fail(quiet)
    deliver(quiet)
    dead.close()
    assert len(listener.got) == 1
    errors = [channel["error"] != "" for channel in quiet.ask(
        quiet.dashboard.alerts.list_channels, "operator")["channels"]]
    assert errors == [True, False]


def test_one_thread_delivers_all_notifications_of_a_channel(quiet, listener):
    quiet.channel("webhook", listener.url)
    listener.sleeps = 0.2
    fail(quiet)
    notifier = koitab.Notifier(quiet.dashboard)
    threads = notifier.deliver_due() + notifier.deliver_due()
    while any(thread.is_alive() for thread in threads):
        quiet.dashboard.run_once()
        time.sleep(0.002)
    assert len(listener.got) == 1


def test_slow_response_ends_with_a_timeout(monkeypatch):
    monkeypatch.setattr(koitab, "SEND_SECONDS", 0.4)
    server = socket.create_server(("127.0.0.1", 0))
    over, finished = threading.Event(), []

    def drip():
        connection, _ = server.accept()
        try:
            connection.sendall(b"HTTP/1.1 ")
            for _ in range(300):
                connection.sendall(b"x")
                if over.wait(0.05):
                    break
            else:
                finished.append(True)
        except OSError:
            pass
        connection.close()

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(koitab.ConnectionFailed):
        koitab.post(f"http://127.0.0.1:{server.getsockname()[1]}/",
                    b"", {})
    over.set()
    thread.join()
    assert not finished
    server.close()


def test_mail_goes_through_sendmail_with_clean_headers(dashboard, tmp_path,
                                                       monkeypatch):
    program, kept = tmp_path / "sendmail", tmp_path / "mail"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {kept}.args\n"
                       f"exec cat > {kept}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(koitab, "SENDMAILS", (str(program),))
    fail(dashboard)
    deliver(dashboard)
    assert (tmp_path / "mail.args").read_text() == "-i -- ops@example.org\n"
    message = email.message_from_bytes(kept.read_bytes(),
                                       policy=email.policy.default)
    assert message["Bcc"] is None and message["To"] == "ops@example.org"
    assert message["Subject"] == \
        r'koi: Night/Bäck"up\x0d\x0aBcc: x on web1 failed'
    host = koitab.Machine().host()
    assert message["From"] == f"koi <koi@{host}>"
    assert message["Message-ID"] and "exit status 1" in message.get_content()
    assert dashboard.rows("select * from notifications") == []


def test_error_of_sendmail_is_shown_with_its_channel(
        dashboard, tmp_path, monkeypatch):
    program = tmp_path / "sendmail"
    program.write_text("#!/bin/sh\necho no route >&2; exit 75\n")
    program.chmod(0o755)
    monkeypatch.setattr(koitab, "SENDMAILS", (str(program),))
    fail(dashboard)
    deliver(dashboard)
    channel, = dashboard.ask(
        dashboard.dashboard.alerts.list_channels, "operator")["channels"]
    assert channel["error"] == "sendmail failed: no route"


@pytest.mark.parametrize("kind, target", [
    ("mail", "-oQ/tmp"), ("mail", "a@b c@d"), ("mail", "root"),
    ("mail", "a@b\nBcc: c"), ("mail", "a@b,c@d"), ("webhook", "ftp://x/"),
    ("webhook", "file:///etc/passwd"), ("webhook", "http://"),
    ("webhook", "http://x/ y"), ("webhook", "http://x/\r\nA: b"),
    ("ntfy", "javascript:1"), ("ntfy", "http://x:99999/"), ("sms", "1"),
    ("ntfy", "https://ntfy.sh/"), ("ntfy", "https://:tk_a@ntfy.sh"),
    ("webhook", "http://é/"), ("webhook", "http://x:0/")])
def test_invalid_channel_is_refused(dashboard, kind, target):
    with refused(400):
        dashboard.channel(kind, target)


def test_test_notification_is_sent_on_request(quiet, listener):
    channel = quiet.channel("webhook", listener.url)
    quiet.do(quiet.dashboard.alerts.change_channel,
             {"do": "test", "id": channel}, NOW)
    deliver(quiet)
    assert json.loads(listener.got[0][2])["kind"] == "test"
    with refused(404):
        quiet.do(quiet.dashboard.alerts.change_channel,
                 {"do": "test", "id": 99}, NOW)


def test_failed_test_notification_is_not_repeated(quiet, listener):
    channel = quiet.channel("webhook", listener.url)
    listener.status = 500
    alerts = quiet.dashboard.alerts
    test = quiet.do(alerts.change_channel, {"do": "test", "id": channel}, NOW)
    assert quiet.ask(alerts.test_result, test) is None
    deliver(quiet)
    assert quiet.ask(alerts.test_result, test) == {
        "id": channel, "delivered": False, "error": "HTTP status 500"}
    assert quiet.rows("select * from notifications") == []


def test_notification_is_sent_after_a_crash(quiet, listener):
    """A notification is written in the transaction of its cause."""
    quiet.channel("webhook", listener.url)
    fail(quiet)
    reopened = quiet.reopen()
    deliver(reopened)
    assert len(listener.got) == 1
    more = reopened.reopen()
    more.pass_time(60)
    deliver(more)
    assert len(listener.got) == 1


def test_the_notifier_delivers_a_new_notification_at_once(tmp_path, listener):
    dashboard = InProcessDashboard(tmp_path / "d.db", koitab.Clock())
    dashboard.channel("webhook", listener.url)
    web1 = dashboard.join()
    dashboard.dashboard.start()
    notifier = koitab.Notifier(dashboard.dashboard)
    notifier.start()
    time.sleep(0.1)             # it waits by now
    dashboard.dashboard.do(dashboard.dashboard.host_sync.sync, web1.host, {
        "v": 3, "host": HOST, "epoch": 1, "instance": "1-aaaaaaaa",
        "records": [{**dashboard.record(exit=1), "ended": time.time()}]},
        time.time())
    support.wait_until(lambda: listener.got, 20)
    support.wait_until(lambda: dashboard.rows(
        "select * from notifications") == [], 5)
    notifier.stop()
    dashboard.dashboard.stop()


def test_mail_is_sent_from_the_address_of_its_channel(
        quiet, tmp_path, monkeypatch):
    program, kept = tmp_path / "sendmail", tmp_path / "mail"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {kept}.args\n"
                       f"exec cat > {kept}\n")
    program.chmod(0o755)
    monkeypatch.setattr(koitab, "SENDMAILS", (str(program),))
    add(quiet, "mail", "ops@example.org", {"from": "koi@example.net"})
    fail(quiet)
    deliver(quiet)
    assert (tmp_path / "mail.args").read_text() == \
        "-i -f koi@example.net -- ops@example.org\n"
    message = email.message_from_bytes(kept.read_bytes())
    assert message["From"] == "koi <koi@example.net>"


# --- a mail server

ACCOUNT = "koi", "op en:sesame"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return servers.certificate(tmp_path_factory.mktemp("certificate"))


def add(dashboard, kind: str, target: str, options: dict) -> int:
    """Add a channel with options; return its id."""
    return dashboard.do(dashboard.dashboard.alerts.change_channel, {
        "kind": kind, "target": target, "options": options}, NOW)["id"]


def add_smtp(dashboard, sink, **options) -> int:
    return add(dashboard, "smtp", "ops@example.org", {
        "host": "localhost", "port": sink.port, "security": sink.security,
        **options})


def shown(dashboard, role: str = "operator") -> dict:
    """The last channel as a role sees it."""
    return dashboard.ask(dashboard.dashboard.alerts.list_channels,
                         role)["channels"][-1]


@pytest.mark.parametrize("security", ["starttls", "tls", "none"])
def test_mail_is_sent_to_the_mail_server_after_the_login(
        quiet, security, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.cert))
    with servers.Sink(security, certificate, ACCOUNT) as sink:
        add_smtp(quiet, sink, user=ACCOUNT[0], password=ACCOUNT[1],
                 **{"from": "koi@example.net"})
        fail(quiet)
        deliver(quiet)
    mail, = sink.mails
    assert (mail.sender, mail.recipients, mail.login, mail.secure) == (
        "<koi@example.net>", ["ops@example.org"], ACCOUNT, security != "none")
    assert mail["From"] == "koi <koi@example.net>"
    assert "exit status 1" in mail.text and mail["Bcc"] == "None"
    assert sink.commands[-1].upper() == "QUIT" and b"\n" not in \
        sink.wires[0].replace(b"\r\n", b"")
    assert quiet.rows("select * from notifications") == []
    assert (shown(quiet)["error"], shown(quiet)["last"]) == ("", NOW)


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_mail_server_with_an_untrusted_certificate_gets_no_password(
        quiet, security, certificate):
    with servers.Sink(security, certificate, ACCOUNT) as sink:
        add_smtp(quiet, sink, user=ACCOUNT[0], password=ACCOUNT[1])
        fail(quiet)
        deliver(quiet)
    assert sink.logins == [] and "certificate" in shown(quiet)["error"]
    assert len(quiet.rows("select * from notifications")) == 1


def test_mail_server_without_starttls_gets_no_mail(quiet):
    with servers.Sink("none") as sink:
        add_smtp(quiet, sink, security="starttls")
        fail(quiet)
        deliver(quiet)
    assert sink.mails == [] and "STARTTLS" in shown(quiet)["error"]
    assert len(quiet.rows("select * from notifications")) == 1


@pytest.mark.parametrize("verb, reply, is_repeated", [
    ("RCPT", "451 4.3.0 later", True), ("DATA", "452 no room", True),
    ("MAIL", "421 4.3.2 closing", True), ("EHLO", "421 busy", True),
    ("RCPT", "550 5.1.1 unknown user", False),
    ("MAIL", "553 not your address", False),
    ("DATA", "554 5.7.1 looks like spam", False)])
def test_mail_that_is_refused_permanently_is_not_repeated(
        quiet, verb, reply, is_repeated):
    with servers.Sink("none") as sink:
        sink.answers[verb] = reply
        if verb == "EHLO":
            sink.answers["HELO"] = reply
        add_smtp(quiet, sink)
        fail(quiet)
        deliver(quiet)
        assert len(quiet.rows("select * from notifications")) == is_repeated
        assert shown(quiet)["error"] == f"the mail server answered {reply}"
        sink.answers.clear()
        quiet.clock.time += 15
        deliver(quiet)
        assert len(sink.mails) == is_repeated


def test_refused_login_is_reported_without_the_password(quiet):
    with servers.Sink("none", account=ACCOUNT) as sink:
        sink.answers["AUTH"] = "535 5.7.8 no: op en:sesame"
        add_smtp(quiet, sink, user="koi@x", password=ACCOUNT[1])
        fail(quiet)
        deliver(quiet)
    assert shown(quiet)["error"].endswith("answered 535 5.7.8 no: ...")


def test_mail_server_that_sends_nothing_ends_with_a_timeout(
        quiet, monkeypatch):
    monkeypatch.setattr(koitab, "SEND_SECONDS", 0.3)
    with servers.Sink("none") as sink:
        sink.silent = True
        add_smtp(quiet, sink)
        fail(quiet)
        deliver(quiet)
        assert shown(quiet)["error"] == "no answer in time"


def test_slow_mail_server_ends_with_a_timeout(monkeypatch):
    """Each byte comes in time; the whole has a limit."""
    monkeypatch.setattr(koitab, "SEND_SECONDS", 0.4)
    server, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip():
        connection, _ = server.accept()
        with contextlib.suppress(OSError):
            connection.sendall(b"220-")
            while not over.wait(0.05):
                connection.sendall(b"x")
        connection.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    notifier = koitab.Notifier(None)
    monkeypatch.setattr(notifier, "mail_fields", lambda _: {
        "to": "a@b", "sender": "", "subject": "", "text": "", "key": "k",
        "at": NOW})
    try:
        with pytest.raises(OSError):
            notifier.send_smtp({"target": "a@b", "options": {
                "host": "127.0.0.1", "port": server.getsockname()[1],
                "security": "none"}})
        assert not over.is_set()
    finally:
        over.set()
        thread.join(20)
        server.close()


def test_password_of_a_mail_server_is_never_shown(quiet):
    add(quiet, "smtp", "ops@example.org", {
        "host": "mail.example.org", "user": "koi", "password": "sesame"})
    channel = shown(quiet)
    assert channel["options"] == {
        "security": "starttls", "port": 587, "host": "mail.example.org",
        "user": "koi", "password": "***"}
    assert "options" not in shown(quiet, "viewer")


@pytest.mark.parametrize("kind, options", [
    ("mail", {"from": "koi"}), ("mail", {"from": "-oQ@x"}),
    ("mail", {"form": "a@b"}), ("ntfy", {"from": "a@b"}), ("smtp", {}),
    ("smtp", {"host": "a b"}), ("smtp", {"host": "x", "port": 0}),
    ("smtp", {"host": "x", "security": "ssl"}), ("mail", []),
    ("smtp", {"host": "x", "user": "u"}),
    ("smtp", {"host": "x", "password": "p"}),
    ("smtp", {"host": "x", "user": "ü", "password": "p"}),
    ("smtp", {"host": "x", "user": "u\r\n", "password": "p"}),
    ("smtp", {"host": "x", "security": "none", "user": "u",
              "password": "p"})])
def test_invalid_options_of_a_channel_are_refused(dashboard, kind, options):
    with refused(400):
        add(dashboard, kind, "https://ntfy.sh/x" if kind == "ntfy"
            else "ops@example.org", options)


def test_result_of_a_test_notification_is_its_own(quiet, listener,
                                                  monkeypatch):
    """What was due before the test hangs, and then fails."""
    monkeypatch.setattr(koitab, "SEND_SECONDS", 0.5)
    channel = quiet.channel("webhook", listener.url)
    fail(quiet)
    listener.hold = threading.Event()
    alerts, notifier = quiet.dashboard.alerts, koitab.Notifier(quiet.dashboard)
    threads = notifier.deliver_due()
    step_until(quiet, lambda: listener.got)
    test = quiet.do(alerts.change_channel, {"do": "test", "id": channel}, NOW)
    held, listener.hold = listener.hold, None
    threads += notifier.deliver_due()
    step_until(quiet, lambda: quiet.ask(alerts.test_result, test))
    assert quiet.ask(alerts.test_result, test) == {
        "id": channel, "delivered": True, "error": ""}
    step_until(quiet, lambda: not any(each.is_alive() for each in threads))
    held.set()
    assert shown(quiet)["error"]


def test_test_is_delivered_though_other_notifications_have_just_failed(
        quiet, listener):
    channel = quiet.channel("webhook", listener.url)
    fail(quiet)
    alerts = quiet.dashboard.alerts
    row, = quiet.do(alerts.take_due, channel, NOW)
    test = quiet.do(alerts.change_channel, {"do": "test", "id": channel}, NOW)
    quiet.do(alerts.mark_delivered, row["id"], "it answered 500", NOW)
    deliver(quiet)
    assert quiet.ask(alerts.test_result, test)["delivered"]


def test_two_tests_at_once_have_a_result_each(quiet, listener):
    channel = quiet.channel("webhook", listener.url)
    alerts = quiet.dashboard.alerts
    tests = [quiet.do(alerts.change_channel, {"do": "test", "id": channel},
                      NOW) for _ in range(2)]
    deliver(quiet)
    assert len(listener.got) == 2
    assert [quiet.ask(alerts.test_result, each)["delivered"]
            for each in tests] == [True, True]


def test_test_from_before_a_restart_is_not_delivered(quiet, listener):
    channel = quiet.channel("webhook", listener.url)
    quiet.do(quiet.dashboard.alerts.change_channel,
             {"do": "test", "id": channel}, NOW)
    reopened = quiet.reopen()
    deliver(reopened)
    assert listener.got == []
    assert reopened.rows("select * from notifications") == []


# --- edits

def edit(dashboard, **fields) -> None:
    dashboard.do(dashboard.dashboard.alerts.change_channel,
                 {"do": "edit", **fields}, dashboard.now)


def test_edited_channel_keeps_its_history_and_what_waits(quiet, listener):
    channel = quiet.channel("webhook", listener.url + "/old")
    listener.status = 500
    fail(quiet)
    deliver(quiet)
    listener.status, listener.got[:] = 200, []
    edit(quiet, id=channel, target=listener.url + "/new")
    assert shown(quiet)["error"] == ""
    deliver(quiet)
    assert [path for path, _, _ in listener.got] == ["/new"]
    assert (shown(quiet)["id"], shown(quiet)["last"]) == (channel, NOW)
    with refused(404):
        edit(quiet, id=99, target=listener.url)


def stored_options(dashboard) -> dict:
    return json.loads(dashboard.rows(
        "select options from channels order by id desc")[0][0])


def test_edit_keeps_the_secrets_that_are_shown_as_stars(quiet):
    channel = add(quiet, "smtp", "ops@example.org", {
        "host": "mail.example.org", "user": "koi", "password": "sesame"})
    edit(quiet, id=channel, target="dba@example.org",
         options={**shown(quiet)["options"], "from": "koi@example.org"})
    assert shown(quiet)["target"] == "dba@example.org"
    assert stored_options(quiet)["password"] == "sesame"
    assert stored_options(quiet)["from"] == "koi@example.org"
    hook = add(quiet, "webhook", "https://u:pw@example.org/x", {
        "headers": {"X-Key": "sesame", "X-Old": "1"}, "body": '{"a": "***"}'})
    edit(quiet, id=hook, target=shown(quiet)["target"], options={
        "headers": {"X-Key": "***", "X-New": "2"}})
    assert stored_options(quiet) == {"headers": {"X-Key": "sesame",
                                                 "X-New": "2"}}
    assert quiet.rows("select target from channels where id = ?", hook) == [
        ("https://u:pw@example.org/x",)]


@pytest.mark.parametrize("kind, target, options, changes", [
    ("smtp", "ops@example.org", {"host": "mail.example.org", "user": "koi",
                                 "password": "sesame"},
     {"options": {"host": "evil.example", "port": 587, "security": "starttls",
                  "user": "koi", "password": "***"}}),
    ("webhook", "https://example.org/x", {"headers": {"X-Key": "sesame"}},
     {"target": "https://evil.example/x"}),
    ("webhook", "https://u:pw@example.org/x", {},
     {"target": "https://***@evil.example/x"}),
    ("webhook", "https://u:pw@example.org/x", {}, {"kind": "ntfy", "target":
                                                   "https://***@evil/x"})])
def test_edit_sends_no_kept_secret_to_another_server(quiet, kind, target,
                                                     options, changes):
    channel = add(quiet, kind, target, options)
    before = quiet.rows("select * from channels")
    with refused(400) as error:
        edit(quiet, id=channel, **changes)
    assert "***" in error.message
    assert quiet.rows("select * from channels") == before


# --- webhooks with headers and a body

def utf16(text: str) -> int:
    """The length of a text as JavaScript counts it, which is the largest."""
    return len(text.encode("utf-16-le")) // 2


def check_slack(body: dict) -> list[str]:
    """Block Kit: a section's text has 1 to 3,000 characters, and needs no
    escapes as plain text."""
    texts = []
    assert body.keys() == {"blocks"} and 1 <= len(body["blocks"]) <= 50
    for block in body["blocks"]:
        assert block.keys() == {"type", "text"}
        assert block["type"] == "section"
        assert block["text"].keys() == {"type", "text"}
        assert block["text"]["type"] == "plain_text"
        texts.append(block["text"]["text"])
        assert 1 <= utf16(texts[-1]) <= 3000
    return texts


def check_discord(body: dict) -> list[str]:
    """Execute Webhook: one of content, embeds; 10 embeds at most with a
    title of 256, a description of 4,096 and 6,000 characters in all."""
    assert body.keys() == {"embeds"} and 1 <= len(body["embeds"]) <= 10
    embed, = body["embeds"]
    assert embed.keys() == {"title", "description"}
    assert 1 <= utf16(embed["title"]) <= 256
    assert 1 <= utf16(embed["description"]) <= 4096
    assert sum(map(utf16, embed.values())) <= 6000
    return list(embed.values())


def check_teams(body: dict) -> list[str]:
    """A message of Workflows: at most 28 KB, with adaptive cards."""
    assert len(json.dumps(body)) <= 28 * 1024
    assert body["type"] == "message"
    attachment, = body["attachments"]
    assert attachment["contentType"] == \
        "application/vnd.microsoft.card.adaptive"
    assert attachment["contentUrl"] is None
    card = attachment["content"]
    assert card["type"] == "AdaptiveCard" and card["version"] == "1.4"
    assert card["$schema"].endswith("/adaptive-card.json")
    assert {block["type"] for block in card["body"]} == {"TextBlock"}
    assert all(block["text"] and block["wrap"] for block in card["body"])
    return [block["text"] for block in card["body"]]


def check_gotify(body: dict) -> list[str]:
    """POST /message: a text, which is required, a title, and a whole number
    as priority."""
    assert body.keys() == {"title", "message", "priority"}
    assert body["message"] and type(body["priority"]) is int
    return [body["title"], body["message"]]


SERVICES = {"Slack": check_slack, "Discord": check_discord,
            "Teams": check_teams, "Gotify": check_gotify}


def recipe(service: str) -> tuple[dict, str]:
    """Headers and body of a service, as the topic `alerts` prints them."""
    chapter = koitab.topic_text("alerts").partition(
        f"\n{service.upper()}\n")[2]
    body = textwrap.dedent(re.search(
        r"body:\n\n((?:    .+\n)+)", chapter)[1])
    header = re.search(r"header:\n\n    (.+): (.+)\n", chapter.partition(
        "body:")[0])
    return {header[1]: header[2]} if header else {}, body


@pytest.mark.parametrize("output", [
    "", "no space", "x" * 400 + "\n",
    "\U0001f4a5\\\"'{{title}}<!here>" + "\U0001f4a5" * 300 + "\n"],
    ids=["none", "one line", "long", "wide"])
@pytest.mark.parametrize("service", SERVICES)
def test_documented_template_produces_a_valid_message_of_the_service(
        quiet, listener, service, output):
    headers, body = recipe(service)
    add(quiet, "webhook", listener.url, {"headers": headers, "body": body})
    web1, data = quiet.join(), frames(output * 10, 2)
    for name in ("Bäck\"up\\", "\U0001f4a5" * 300):
        listener.got.clear()
        quiet.runs(web1, quiet.record(exit=1, size=len(data), name=name,
                                      tag=name[:3], run=17 + len(name)))
        if data:
            quiet.sync(web1, outputs=[piece(17 + len(name), 0, data)])
        deliver(quiet, "https://koi.example.org")
        (_, sent, posted), = listener.got
        texts = SERVICES[service](json.loads(posted))
        assert name[:9] in texts[0] and "exit status 1" in texts[1]
        assert output.strip()[:7] in texts[1]
        assert headers.items() <= sent.items()


def test_alert_fills_the_placeholders_of_a_body(quiet, listener):
    names = (*koitab.NOTIFICATION_FIELDS, *koitab.ALERT_FIELDS)
    add(quiet, "webhook", listener.url, {
        "headers": {"content-type": "application/vnd.x+json"},
        "body": json.dumps({name: "{{ %s }}" % name for name in names})})
    quiet.runs(quiet.join(), quiet.record(exit=3, run=17))
    deliver(quiet, "https://koi.example.org")
    (_, headers, body), = listener.got
    assert headers["Content-Type"] == "application/vnd.x+json"
    found = json.loads(body)
    assert (found["host"], found["run"], found["endsAt"], found["job"]) == (
        "web1", "17", "", "Backup")
    assert found["link"] == "https://koi.example.org/#/run/1"


def test_digest_and_test_leave_the_fields_of_an_alert_empty(quiet, listener):
    channel = add(quiet, "webhook", listener.url, {
        "body": '{"a": "{{kind}}", "b": "{{host}}"}'})
    quiet.runs(quiet.join(), *quiet.failing(60))
    quiet.do(quiet.dashboard.alerts.change_channel,
             {"do": "test", "id": channel}, NOW)
    deliver(quiet)
    assert sorted(json.loads(body)["a"] for _, _, body in listener.got) == [
        "digest", "test"]
    assert {json.loads(body)["b"] for _, _, body in listener.got} == {""}


@pytest.mark.parametrize("options, words", [
    ({"body": '{"a": "{{titel}}"}'}, 'placeholder "titel"'),
    ({"body": '{"a": "{{}}"}'}, 'placeholder ""'),
    ({"body": '{"a": {{title}}}'}, "not JSON"), ({"body": "{"}, "not JSON"),
    ({"body": '{"a": "{{text:many}}"}'}, "not JSON"),
    ({"body": 1}, "body has the wrong type"),
    ({"headers": {"A b": "x"}}, 'an invalid "A B"'),
    ({"headers": {"A": "x\r\nB: y"}}, 'an invalid "A"'),
    ({"headers": {"A": "é"}}, 'an invalid "A"'),
    ({"headers": {"Host": "x"}}, 'an invalid "Host"'),
    ({"headers": {"content-LENGTH": "0"}}, "an invalid"),
    ({"headers": {"A": 1}}, "headers"), ({"method": "PUT"}, "method")])
def test_webhook_that_cannot_be_sent_is_refused(dashboard, options, words):
    with refused(400) as error:
        add(dashboard, "webhook", "https://example.org/", options)
    assert words in error.message


def test_values_of_headers_are_never_shown(quiet, listener):
    add(quiet, "webhook", listener.url, {
        "headers": {"X-Gotify-Key": "sesame"}, "body": '{"a": "{{text}}"}'})
    assert shown(quiet)["options"] == {"headers": {"X-Gotify-Key": "***"},
                                       "body": '{"a": "{{text}}"}'}
    assert "options" not in shown(quiet, "viewer")

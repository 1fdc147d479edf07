"""Delivery: mail, pings and notifications, into real servers and programs.

A test server keeps what it was sent; tests say what must (not) be in it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import os
import re
import shlex
import shutil
import signal
import socket
import tempfile
import time
import urllib.parse
import uuid
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
import servers
import support

ADDRESS = "nobody@mission.invalid"      # goes nowhere, should it get out
RUNAWAY = r"(a+)+$"
BOMB = "a" * 60 + "!"                   # RUNAWAY needs 2**60 steps for it
DURATION = r"(\d+h)?(\d+m)?[\d.]+m?s"


# ==========================================================================
# Small words for the tests below
# ==========================================================================

def by_smtp(scratch, sink, **smtp) -> None:
    """Mail goes straight to the sink; no program needed."""
    scratch.patch("assert k.MAIL_PAUSES\nk.MAIL_PAUSES = (0, 0)")
    scratch.config["user"]["email"] = ADDRESS
    scratch.config["mail"] = {
        "enabled": True, "type": "smtp",
        "smtp": {"host": "127.0.0.1", "port": sink.port, "security": "none",
                 "from": "backup@mission.invalid", **smtp}}


def by_sendmail(scratch) -> None:
    scratch.config["user"]["email"] = ADDRESS
    scratch.config["mail"] = {"enabled": True, "type": "sendmail"}


def msmtp(scratch, port: int) -> None:
    """The real sendmail program of msmtp-mta hands over to `port`.

    For root its settings are /etc/msmtprc, in a mount namespace with a copy
    of /etc; an ordinary user has ~/.msmtprc.
    """
    support.need("sendmail")
    if os.path.basename(os.path.realpath(support.find("sendmail"))) \
            != "msmtp":
        support.absent("sendmail is another program: apt-get install "
                       "msmtp-mta (make parts)")
    by_sendmail(scratch)
    settings = (scratch.folder / "msmtprc") if support.AS_ROOT \
        else scratch.home / ".msmtprc"
    settings.write_text(
        f"account default\nhost 127.0.0.1\nport {port}\ntls off\nauth off\n"
        "from backup@mission.invalid\nset_date_header off\n"
        "set_from_header off\n")
    settings.chmod(0o644 if support.AS_ROOT else 0o600)
    if support.AS_ROOT and not scratch.host:
        support.need("unshare")
        etc = scratch.make("etc")
        scratch.host = support.Host(scratch.folder / "host")
        scratch.host.setup += [
            f"mount -t tmpfs -o mode=755 none '{etc}'",
            f"cp -a /etc/. '{etc}'", f"cp -a '{settings}' '{etc}/msmtprc'",
            f"mount --move '{etc}' /etc"]


def pinging(scratch, url: str, **options) -> None:
    scratch.config["ping"] = {"enabled": True, "endpoint": url, **options}


def undelivered(result) -> None:
    """The tasks were well, delivery was not: 74, and one line says so."""
    assert result.code == 74, result
    assert result.err.startswith("mission: "), result
    assert "Traceback" not in result.err


@pytest.fixture
def sink():
    with servers.Sink() as sink:
        yield sink


@pytest.fixture
def web():
    with servers.Web() as web:
        yield web


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return servers.certificate(tmp_path_factory.mktemp("certificate"))


# ==========================================================================
# Mail: what is sent, and when
# ==========================================================================

def test_a_headless_run_mails_its_start_and_its_finish(scratch, sink):
    by_smtp(scratch, sink)
    scratch.task("one", "echo hello")
    result = scratch.headless()
    assert result.code == 0 and not result.err, result
    name = re.escape(socket.gethostname())
    start, finish = sink.wait(2)
    assert re.fullmatch(f"{name}: run started", start.subject)
    assert re.fullmatch(f"{name}: run finished in {DURATION}",
                        finish.subject)
    for received in sink.mails:
        assert received.recipients == [ADDRESS]
        assert received["To"] == ADDRESS
        assert received.message["From"].addresses[0].addr_spec \
            == "backup@mission.invalid"
        assert received["MIME-Version"] == "1.0"
        assert received.message.get_content_type() == "text/plain"
        assert received.message.get_content_charset() == "utf-8"
        sent = parsedate_to_datetime(received["Date"])
        age = datetime.datetime.now(datetime.timezone.utc) - sent
        assert abs(age.total_seconds()) < 120
        assert re.fullmatch(r"<[^<>@\s]+@[^<>@\s]+>", received["Message-ID"])
    assert start["Message-ID"] != finish["Message-ID"]


def test_a_failed_run_says_failure_in_its_subject(scratch, sink):
    by_smtp(scratch, sink)
    scratch.task("one", "exit 3")
    assert scratch.headless().code == 1
    start, finish = sink.wait(2)
    assert "[FAILURE]" not in start.subject
    name = re.escape(socket.gethostname())
    assert re.fullmatch(rf"{name}: \[FAILURE\] run finished in {DURATION}",
                        finish.subject)


@pytest.mark.parametrize("mail, script, sent", [
    ({},                               "true",  ["start", "finish"]),
    ({},                               "false", ["start", "FAILURE"]),
    ({"on": "always", "start": False}, "true",  ["finish"]),
    ({"on": "always", "start": False}, "false", ["FAILURE"]),
    ({"on": "failure"},                "true",  []),
    ({"on": "failure"},                "false", ["FAILURE"]),
    ({"on": "never"},                  "false", []),
    ({"enabled": False},               "false", []),
])
def test_mail_on_and_mail_start_decide_which_mails_are_sent(
        scratch, sink, mail, script, sent):
    by_smtp(scratch, sink)
    scratch.config["mail"].update(mail)
    scratch.task("one", script)
    result = scratch.headless()
    assert result.code == (0 if script == "true" else 1), result
    kinds = [re.search("FAILURE|start|finish", subject)[0]
             for subject in sink.subjects()]
    assert kinds == sent


@pytest.mark.parametrize("args", [["run"], ["run", "--headless", "--dry-run"],
                                  ["check"]])
def test_only_a_headless_run_sends_mail_and_pings(scratch, sink, web, args):
    by_smtp(scratch, sink)
    pinging(scratch, web.url, start=True, fail=True, log=True)
    scratch.task("one", "exit 3")
    assert scratch.mission(*args).code == (1 if args == ["run"] else 0)
    assert sink.sessions == 0 and web.requests == []


def test_the_mail_is_a_summary_line_and_the_log(scratch, sink):
    by_smtp(scratch, sink)
    scratch.task("one", "echo zażółć 日本 🎉; echo 'two  spaces '")
    scratch.headless()
    text = sink.wait(2)[1].text
    summary, rest = text.split("\n\n", 1)
    assert "All tasks succeeded." in summary
    assert not summary.startswith(("#", "["))
    assert rest.lstrip("\n").startswith("# —")
    assert "] zażółć 日本 🎉\n" in text and "] two  spaces \n" in text
    assert "# Task: One\n" in text and "FinishTime" in text
    # All that the log had when the mail was made is in the mail.
    until = scratch.log().split("FinishTime")[0].rstrip()
    assert until[until.index("# Task"):] in text


HOSTILE_LINES = {      # for printf '%b'
    "a single dot": r".", "two dots": r"..", "a dot and text": r".quit",
    "invalid UTF-8": r"\377\376 broken",
    "an encoded surrogate": r"\355\240\200 lone",
    "an overlong line": "x" * 5000,
    "smuggled commands": r"a\r\n.\r\nMAIL FROM:<x@mission.invalid>\r\nb",
    "a dot between carriage returns": r"a\r.\rb",
    "control characters": r"\033[2J\007\000\013\014\302\205\342\200\250",
    "From at the start": "From nobody Sat Nov 21",
}


def test_task_output_cannot_break_the_mail(scratch, sink):
    by_smtp(scratch, sink)
    scratch.task("one", "\n".join(
        f"echo before {name}; printf '%b\\n' '{line}'; echo after {name}"
        for name, line in HOSTILE_LINES.items()))
    assert scratch.headless().code == 0
    assert len(sink.mails) == 2
    received, wire = sink.mails[1], sink.wires[1]
    for name in HOSTILE_LINES:
        assert f"] before {name}\n" in received.text
        assert f"] after {name}\n" in received.text
    assert "] .\n" in received.text and "x" * 5000 in received.text
    assert "FinishTime" in received.text and not received.message.defects
    assert re.search(rb"(?<!\r)\n|\r(?!\n)|\0|\x1b", wire) is None
    assert max(map(len, wire.split(b"\r\n"))) <= 998    # RFC 5322, 2.1.1


@pytest.mark.parametrize("script", [
    "seq -f 'line %g of many, many lines' 20000",   # in big pieces
    """i=0
    while [ $i -lt 20000 ]; do i=$((i+1))
        echo "line $i of many, many lines"; done""",
], ids=["fast", "slow"])
def test_middle_of_a_long_log_is_cut_and_its_size_is_stated(
        scratch, sink, script):
    by_smtp(scratch, sink)
    scratch.task("one", script)
    assert scratch.headless().code == 0
    text = sink.wait(2)[1].text
    assert 150_000 < len(text.encode()) < 205_000
    numbers = [int(n) for n in re.findall(r"\] line (\d+) ", text)]
    assert numbers[0] == 1 and numbers[-1] == 20000
    steps = [(a, b) for a, b in zip(numbers, numbers[1:]) if b != a + 1]
    (last, first), = steps      # one gap, and both sides worth reading
    assert last > 1000 and first < 19000
    mark = text.split(f"] line {last} ")[1].split("] line")[0]
    assert str(first - last - 1) in mark.replace(",", "")


def test_huge_line_does_not_exceed_the_size_of_the_mail(scratch, sink):
    by_smtp(scratch, sink)
    scratch.task("one", "echo before; head -c 3000000 /dev/zero "
                        "| tr '\\0' x; echo; echo after")
    assert scratch.headless().code == 0
    text = sink.wait(2)[1].text
    assert "] before\n" in text and "] after\n" in text
    assert len(text.encode()) < 210_000


# ==========================================================================
# Filters and redactions
# ==========================================================================

def after_headers(text: str) -> list[str]:
    """The lines of the only task, without times."""
    lines = text.split("# Task: One\n")[1].split("\n")[2:]
    lines = [re.sub(r"^\[[^]]*\] ?", "", line) for line in lines]
    return [line for line in lines if line]


@pytest.mark.parametrize("filters, said, mailed", [
    ([], "a b", ["a", "b"]),
    (["^a$"], "a b", ["<<1 lines filtered>>", "b"]),
    (["^a$"], "xa ax a", ["xa", "ax", "<<1 lines filtered>>"]),
    (["^s", "t$"], "a s1 s2 1t b s3 c",
     ["a", "<<3 lines filtered>>", "b", "<<1 lines filtered>>", "c"]),
    (["."], "a b c", ["<<3 lines filtered>>"]),
    ([r"\bpass=[[:alnum:]]+"], "x pass=abc", ["x", "<<1 lines filtered>>"]),
    (["(?i)KEY"], "x mykey", ["x", "<<1 lines filtered>>"]),
])
def test_filtered_lines_are_counted_in_their_place_in_the_mail(
        scratch, sink, filters, said, mailed):
    by_smtp(scratch, sink)
    scratch.config["filters"] = filters
    scratch.task("one", f"printf '%s\\n' {said}")
    assert scratch.headless().code == 0
    lines = after_headers(sink.wait(2)[1].text)
    # `1 line filtered` is as good; what counts is the number and the place.
    lines = [line.replace("1 line ", "1 lines ") for line in lines]
    if filters == ["."]:    # also takes whatever mission itself says
        assert not {"a", "b", "c"} & set(lines)
        assert "lines filtered>>" in "".join(lines)
    else:
        assert lines[:len(mailed)] == mailed
    assert after_headers(scratch.log())[:len(said.split())] == said.split()


def test_filter_matches_the_whole_line_before_it_is_cut(scratch, sink):
    by_smtp(scratch, sink)
    scratch.config["filters"] = ["password=.*hidden$"]
    scratch.task("one", "printf 'password=top'; head -c 300000 /dev/zero "
                        "| tr '\\0' x; echo hidden; echo after")
    assert scratch.headless().code == 0
    text = sink.wait(2)[1].text
    assert "password=top" not in text and "hidden" not in text
    assert "] after\n" in text and "xxxx" not in text


def test_a_runaway_filter_withholds_the_line_and_the_run_continues(
        scratch, sink, web):
    by_smtp(scratch, sink)
    pinging(scratch, web.url, log=True)
    scratch.patch(LINE_SECONDS=0.3)
    scratch.config["filters"] = ["^nothing$", RUNAWAY]
    scratch.task("one", f"echo before; echo {BOMB}; echo after")
    scratch.task("two", "echo the second")
    began = time.monotonic()
    result = scratch.headless()
    assert time.monotonic() - began < 30
    assert result.code in (0, 1), result
    received = sink.wait(2)[1]
    assert BOMB not in received.text and "aaaaaaaa!" not in received.text
    assert "] before\n" in received.text and "] after\n" in received.text
    assert "] the second\n" in received.text
    assert re.search("withheld", received.text)
    assert not any(BOMB.encode() in r.body for r in web.requests)
    assert BOMB in scratch.log()


def test_many_hostile_lines_are_withheld_within_seconds(scratch, sink):
    by_smtp(scratch, sink)
    scratch.patch(LINE_SECONDS=0.2, ALL_SECONDS=1)
    scratch.config["filters"] = [RUNAWAY]
    scratch.task("one", f"for i in $(seq 300); do echo {BOMB}; done; "
                        "echo after")
    began = time.monotonic()
    assert scratch.headless().code in (0, 1)
    assert time.monotonic() - began < 20        # not 300 times 0.2 s
    text = sink.wait(2)[1].text
    assert BOMB not in text and "FinishTime" in text
    assert scratch.log().count(BOMB) == 300


def test_redactions_apply_to_mail_log_and_ping(scratch, sink, web):
    by_smtp(scratch, sink)
    pinging(scratch, web.url, log=True)
    scratch.config["redact"] = [r"token=\w+"]
    scratch.task("one", "echo a token=geheim b")
    assert scratch.headless().code == 0
    texts = [sink.wait(2)[1].text, scratch.log(), web.requests[-1].text]
    assert all("geheim" not in text for text in texts)
    assert all("a *** b" in text for text in texts)


# ==========================================================================
# Headers: no value becomes another header, an option or an address
# ==========================================================================

HOSTILE = [
    "-oQ/tmp@mission.invalid", "-X/etc/cron.d/x", "-bs", "--", "",
    "nobody", "@mission.invalid", "nobody@", "a b@mission.invalid",
    "a@mission.invalid, b@mission.invalid", "a@mission.invalid;b",
    "a@mission.invalid\nBcc: b@mission.invalid", "a@mission.invalid\r",
    "a@mission.invalid\n", "a@mission.invalid\x00", "|/bin/sh@x",
    "a@b@c", "<-oQ@mission.invalid>", "N <-f@mission.invalid>",
    "a@-mission.invalid", "a@mission.invalid <b@mission.invalid",
]


def config_error(scratch, capsys, path: str) -> str:
    """What `check` says, in this process: a table of cases is quick."""
    scratch.write()
    code = support.load("mission").main(["-c", str(scratch.path), "check"])
    said = capsys.readouterr().err
    assert code == 78 and f" {path}: " in said, said
    assert re.search("[\0-\x09\x0b-\x1f\x7f]", said) is None
    return said


@pytest.mark.parametrize("address", HOSTILE)
def test_hostile_mail_address_is_an_error(scratch, capsys, address):
    by_smtp(scratch, servers.Sink(port=1))
    scratch.config["user"]["email"] = address
    scratch.task("one", "true")
    config_error(scratch, capsys, "user.email")


@pytest.mark.parametrize("key", ["user.email", "mail.smtp.from"])
def test_hostile_mail_address_gets_no_mail_and_stops_no_task(
        scratch, sink, key):
    by_smtp(scratch, sink)
    part = scratch.config["user"] if key == "user.email" \
        else scratch.config["mail"]["smtp"]
    part[key.split(".")[-1]] = "-oQ/tmp@mission.invalid"
    ran = scratch.folder / "ran"
    scratch.task("one", f"touch '{ran}'")
    result = scratch.headless()
    assert result.code == 74 and key in result.err, result
    assert sink.sessions == 0 and ran.exists()


@pytest.mark.parametrize("address", [
    "nobody@mission.invalid", "Anon <nobody@mission.invalid>",
    "Zoë Ångström <nobody@mission.invalid>",
    "no.body+backup@mission.invalid", "root@localhost",
])
def test_valid_mail_address_is_accepted(scratch, sink, address):
    by_smtp(scratch, sink)
    scratch.config["user"]["email"] = address
    scratch.task("one", "true")
    assert scratch.headless().code == 0
    received = sink.wait(2)[0]
    assert received.recipients == [re.search(r"[^<> ]+@[^<> ]+", address)[0]]
    assert received.message["To"].addresses[0].addr_spec \
        == received.recipients[0]


@pytest.mark.parametrize("name", [
    "=?UTF-8?Q?a=0ABcc:_x@mission.invalid?=",
    "=?utf-8?b?CkJjYzogeEBtaXNzaW9uLmludmFsaWQ=?=",
    "zoë =?UTF-8?Q?=0D=0ABcc:_x@mission.invalid?=",
    "a, b@mission.invalid", 'quoted" <x@mission.invalid>,', "(comment",
    "N\u2028Bcc: x@mission.invalid", "N\x1b[2J", "N\x0bBcc: x",
])
def test_a_display_name_adds_no_header_and_no_recipient(scratch, sink, name):
    by_smtp(scratch, sink)
    scratch.config["user"]["email"] = f"{name} <{ADDRESS}>"
    scratch.task("one", "true")
    result = scratch.headless()
    if result.code == 74:
        assert "user.email" in result.err and sink.sessions == 0
        return
    assert result.code == 0, result
    for received in sink.wait(2):
        assert received.recipients == [ADDRESS]
        assert received.message["Bcc"] is None
        assert len(received.message["To"].addresses) == 1
        assert b"\nBcc" not in received.data


class Named:
    """Runs a command on a host of that name, in a UTS namespace."""

    def __init__(self, name: bytes):
        self.name = name

    def command(self, command: list[str]) -> list[str]:
        script = ("import os, socket, sys\n"
                  "socket.sethostname(os.fsencode(sys.argv[1]))\n"
                  "os.execv(sys.argv[2], sys.argv[2:])")
        return ["unshare", "-u", support.PYTHON, "-IS", "-c", script,
                os.fsdecode(self.name), *command]


@support.root_only
@pytest.mark.parametrize("name", [
    b"box.mission.invalid", "zoë-日本".encode(), b"x" * 64, b" ",
    b"box\r\n\r\nbody", b"box\x0b\nBcc: x@mission.invalid",
    "\x1b[2Jbox\u2028\u0085\u202egnp".encode(), b"=?UTF-8?Q?=0ABcc:_x?=",
    "zoë =?UTF-8?Q?=0ABcc:_x?=".encode(), b"\xff\xfe", b"-oQ/tmp 50%s%d",
    b"a/../b?c#d&e=f", b"<x@y> [FAILURE]",
])
def test_any_host_name_is_escaped_in_subject_and_url(scratch, sink, web, name):
    support.need("unshare")
    scratch.host = Named(name)
    by_smtp(scratch, sink)
    del scratch.config["mail"]["smtp"]["from"]      # made from the host name
    scratch.config["mail"]["start"] = False
    pinging(scratch, web.url + "/%s/end")
    scratch.task("one", "true")
    result = scratch.headless()
    assert result.code == 0, result
    received, = sink.wait(1)
    assert received.recipients == [ADDRESS] and not received.message.defects
    assert received.message["Bcc"] is None
    assert len(received.message.get_all("Subject")) == 1
    assert re.fullmatch(r"<[!-~]+@[!-~]+>", received["Message-ID"].strip())
    head = received.data.split(b"\r\n\r\n")[0]
    assert re.search(rb"[^\t\r\n -~]|\nBcc", head) is None
    assert re.search("[\0-\x1f\x7f-\x9f\u2028\u202e]",
                     received.subject) is None
    assert re.search(f": run finished in {DURATION}$", received.subject)
    path, = [request.path for request in web.requests]
    match = re.fullmatch(r"/check/([A-Za-z0-9%_.~-]+)/end", path)
    assert match, path
    if name == b"a/../b?c#d&e=f":
        assert match[1] == urllib.parse.quote(name, safe="")


# ==========================================================================
# sendmail: the real program, and programs that misbehave
# ==========================================================================

def test_mail_goes_through_the_real_sendmail(scratch, sink):
    msmtp(scratch, sink.port)
    scratch.env["PATH"] = "/usr/bin:/bin"       # cron's: without /usr/sbin
    scratch.task("one", "echo zażółć 日本; echo .; echo after; exit 1")
    result = scratch.headless()
    assert result.code == 1, result
    start, finish = sink.wait(2)
    assert start.subject.endswith(": run started")
    assert "[FAILURE] run finished in" in finish.subject
    for received in (start, finish):
        assert received.recipients == [ADDRESS] == [received["To"]]
        assert received["From"] != "None" and received["Date"] != "None"
    assert "] zażółć 日本\n" in finish.text
    assert "] .\n" in finish.text and "] after\n" in finish.text


def test_mail_refused_by_sendmail_is_sent_with_the_next_run(scratch):
    port = servers.free_port()
    msmtp(scratch, port)
    scratch.config["mail"]["start"] = False
    scratch.task("one", "echo the first")
    result = scratch.headless()
    undelivered(result)
    waiting, = scratch.outbox()
    assert support.mode(waiting) == 0o600
    assert support.mode(waiting.parent) & 0o077 == 0
    before = servers.ReceivedMail("", [], waiting.read_bytes(), None, False)
    scratch.task("two", "echo the second")
    with servers.Sink(port=port) as sink:
        assert scratch.headless().code == 0
        late, new = sink.wait(2)
    assert scratch.outbox() == []
    assert late["Message-ID"] == before["Message-ID"] != new["Message-ID"]
    assert late["Date"] == before["Date"] and late.recipients == [ADDRESS]
    assert "] the first\n" in late.text and "] the second\n" in new.text


def test_temporarily_refused_mail_stays_in_the_outbox(scratch):
    with servers.Sink() as sink:
        msmtp(scratch, sink.port)
        sink.answers["RCPT"] = "451 try again later"
        scratch.task("one", "true")
        undelivered(scratch.headless())
        assert sink.mails == [] and len(scratch.outbox()) == 2
        sink.answers.clear()
        assert scratch.headless().code == 0
        subjects = [subject.split(": ")[1].split(" in ")[0]
                    for subject in sink.subjects()]
        # The start mail of the first night was not delivered: a warning.
        assert subjects == ["run started", "[WARNING] run finished",
                            "run started", "run finished"]
        assert scratch.outbox() == []


@pytest.mark.parametrize("script", [
    "cat >/dev/null; exit 75", "exec <&-; exit 1", "kill -9 $$",
    "yes no | head -c 5000000 >&2; exit 68",
])
def test_failing_sendmail_loses_no_mail(scratch, script):
    """Case: also a mail larger than a pipe, to one that does not read."""
    by_sendmail(scratch)
    scratch.stand_in("sendmail", script)
    scratch.config["mail"]["start"] = False
    scratch.task("one", "head -c 150000 /dev/zero | tr '\\0' x; echo")
    result = scratch.headless()
    undelivered(result)
    waiting, = scratch.outbox()
    assert support.mode(waiting) == 0o600
    assert b"run finished in" in waiting.read_bytes()
    scratch.stand_in("sendmail", f"exec cat >'{scratch.folder}/sent'")
    scratch.headless()
    assert scratch.outbox() == []


def test_hanging_sendmail_is_killed_and_loses_no_mail(scratch):
    by_sendmail(scratch)
    scratch.stand_in("sendmail", f"echo $$ >>'{scratch.folder}/pids'\n"
                                 "exec sleep 300")
    scratch.patch(MAIL_SECONDS=1)
    scratch.task("one", "true")
    began = time.monotonic()
    undelivered(scratch.headless())
    assert time.monotonic() - began < 20
    assert len(scratch.outbox()) == 2
    for pid in (scratch.folder / "pids").read_text().split():
        assert not os.path.exists(f"/proc/{pid}")


def test_hanging_mail_server_ends_with_a_timeout(scratch, sink):
    sink.silent = True
    by_smtp(scratch, sink)
    scratch.patch(MAIL_SECONDS=1)
    scratch.task("one", "true")
    began = time.monotonic()
    undelivered(scratch.headless())
    assert time.monotonic() - began < 20
    assert len(scratch.outbox()) == 2


def test_mail_that_sendmail_read_only_partly_stays_in_the_outbox(scratch):
    by_sendmail(scratch)
    scratch.stand_in("sendmail", "head -c 10 >/dev/null; exit 0")
    scratch.config["mail"]["start"] = False
    scratch.task("one", "head -c 150000 /dev/zero | tr '\\0' x; echo")
    undelivered(scratch.headless())
    assert len(scratch.outbox()) == 1


def test_sendmail_removed_during_the_run_loses_no_mail(scratch):
    by_sendmail(scratch)
    sendmail = scratch.stand_in("sendmail", "exec cat >/dev/null")
    scratch.task("one", f"echo '#!/no/such/interpreter' >'{sendmail}'")
    undelivered(scratch.headless())
    waiting, = scratch.outbox()
    assert b"run finished" in waiting.read_bytes()


@support.root_only
def test_a_missing_sendmail_stops_no_task(scratch):
    support.need("unshare")
    scratch.host = support.Host(scratch.folder / "host")
    for folder in ("/usr/local/sbin", "/usr/sbin", "/usr/bin", "/usr/lib"):
        if os.path.exists(f"{folder}/sendmail"):
            scratch.host.bind("/dev/null",
                              os.path.realpath(f"{folder}/sendmail"))
    by_sendmail(scratch)
    ran = scratch.folder / "ran"
    scratch.task("one", f"touch '{ran}'")
    result = scratch.headless()
    assert result.code == 74 and "sendmail" in result.err, result
    assert ran.exists()


def test_sendmail_gets_an_address_and_no_environment_of_the_caller(scratch):
    by_sendmail(scratch)
    scratch.stand_in("sendmail", f"""
        {{ printf '%s\\n' "$@"; env; }} >>'{scratch.folder}/asked'
        exec cat >/dev/null""")
    scratch.env.update({"SECRET": "geheim", "BASH_ENV": "/x",
                        "LD_LIBRARY_PATH": "/x"})
    scratch.config["mail"]["start"] = False
    scratch.task("one", "true")
    assert scratch.headless().code == 0
    asked = (scratch.folder / "asked").read_text()
    words = asked.split("\n")
    assert words[words.index("--") + 1] == ADDRESS
    assert "-i" in words or "-oi" in words
    assert "geheim" not in asked and "LD_LIBRARY_PATH" not in asked


def test_every_problem_is_in_the_log_and_one_line_is_on_stderr(scratch):
    by_sendmail(scratch)
    scratch.stand_in("sendmail", "cat >/dev/null; printf 'no\\033[2J\\nx' >&2;"
                                 " exit 75")
    scratch.task("one", "true")
    result = scratch.headless()
    undelivered(result)
    assert result.err.count("\n") == 1 and "\x1b" not in result.err, result
    assert "75" in scratch.log() and "\x1b" not in scratch.log()
    assert scratch.history()[-1]["result"] == "undelivered"


def test_exit_status_of_a_failed_task_wins_over_an_unsent_mail(scratch):
    by_sendmail(scratch)
    scratch.stand_in("sendmail", "cat >/dev/null; exit 75")
    scratch.task("one", "exit 3")
    assert scratch.headless().code == 1


# ==========================================================================
# SMTP: logins, TLS, and servers that lie
# ==========================================================================

ACCOUNT = ("backup", "pa ss-wörd'\"$x")


@pytest.fixture(scope="module")
def store():
    """A real pass store of alice (as root) or of a scratch home."""
    with contextlib.ExitStack() as stack:
        # gpg-agent's socket needs a short path.
        folder = Path(tempfile.mkdtemp(prefix="m-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        if support.AS_ROOT:
            support.need("unshare", "setpriv")
            host = support.Host(folder)
            uid = str(support.ALICE_UID)
            store = servers.PassStore(
                host.home[support.ALICE], lambda command: host.command(
                    ["setpriv", "--reuid", uid, "--regid", uid,
                     "--clear-groups", *command]))
            store.host = host
        else:
            store = servers.PassStore()
            store.host, store.program = None, store.wrapper(folder)
        stack.enter_context(store)
        store.insert("mail/backup", ACCOUNT[1])
        yield store


def logging_in(scratch, store, sink, security: str, **smtp) -> None:
    """Mail through the sink, with the password from the store."""
    by_smtp(scratch, sink, security=security, user=ACCOUNT[0],
            passName="mail/backup", **smtp)
    scratch.host = store.host
    if store.host:
        scratch.config["user"]["name"] = support.ALICE
        scratch.config["passBin"] = support.find("pass")
    else:
        scratch.config["passBin"] = str(store.program)


@pytest.mark.parametrize("security", ["starttls", "tls", "none"])
def test_smtp_logs_in_with_the_password_from_pass(scratch, store, certificate,
                                                  security):
    with servers.Sink(security, certificate, ACCOUNT) as sink:
        logging_in(scratch, store, sink, security, caFile=certificate.cert)
        scratch.task("one", "echo hello")
        result = scratch.headless()
        assert result.code == 0, result
        start, finish = sink.wait(2)
    assert {received.login for received in (start, finish)} == {ACCOUNT}
    assert finish.secure == (security != "none")
    assert finish.recipients == [ADDRESS] and "] hello\n" in finish.text


@pytest.fixture(scope="module")
def certificate_of(tmp_path_factory):
    """A function: a certificate by its mistake. Each is made once."""
    folder = tmp_path_factory.mktemp("certificates")

    @functools.lru_cache(maxsize=None)
    def make(mistake: str | None) -> servers.Certificate:
        return servers.certificate(
            folder, expired=mistake == "expired", names="DNS:other.invalid"
            if mistake == "other host" else "IP:127.0.0.1,DNS:localhost")
    return make


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("mistake", ["unknown", "expired", "other host"])
def test_invalid_certificate_of_the_mail_server_is_refused(
        scratch, store, certificate_of, security, mistake):
    certificate = certificate_of(mistake)
    trusted = {} if mistake == "unknown" else {"caFile": certificate.cert}
    with servers.Sink(security, certificate, ACCOUNT) as sink:
        logging_in(scratch, store, sink, security, **trusted)
        scratch.task("one", "true")
        result = scratch.headless()
        undelivered(result)
        assert sink.mails == [] and sink.logins == []
    assert len(scratch.outbox()) == 2
    assert "certificate" in (scratch.log() + result.err).lower()


@pytest.mark.parametrize("name, answers", [
    ("not offered",    {}),
    ("refused",        {"STARTTLS": "454 TLS not available"}),
    ("a yes, no TLS",  {"STARTTLS": "220 go on"}),
    ("offered, a lie", {"EHLO": "250-sink\r\n250-STARTTLS\r\n250 AUTH PLAIN",
                        "STARTTLS": "502 what"}),
])
def test_mail_is_not_sent_without_starttls(scratch, store, name, answers):
    with servers.Sink("none", account=ACCOUNT) as sink:
        sink.answers.update(answers)
        logging_in(scratch, store, sink, "starttls")
        scratch.task("one", "true")
        undelivered(scratch.headless())
        assert sink.mails == [] and sink.logins == []
        assert not [line for line in sink.commands
                    if line.upper().startswith(("AUTH", "MAIL"))]
    assert len(scratch.outbox()) == 2


def test_server_without_tls_on_the_tls_port_is_refused(scratch, sink):
    by_smtp(scratch, sink, security="tls")
    scratch.task("one", "true")
    undelivered(scratch.headless())
    assert sink.mails == []


def test_mail_waits_after_a_wrong_password_that_is_never_shown(
        scratch, store, tmp_path, certificate):
    with servers.Sink("tls", certificate, ("backup", "another")) as sink:
        logging_in(scratch, store, sink, "tls", caFile=certificate.cert)
        scratch.task("one", "true")
        result = scratch.headless()
        undelivered(result)
        assert sink.logins and sink.mails == []
    assert len(scratch.outbox()) == 2
    texts = [path.read_text() for path in
             scratch.log_files() + scratch.outbox()]
    texts += [result.err, str(scratch.history())]
    assert not any(ACCOUNT[1] in text for text in texts)


@pytest.mark.parametrize("script", [
    "exit 1", "echo no >&2; exit 1", "exit 0", "echo",
    "head -c 100000 /dev/zero | tr '\\0' x",
])
def test_mail_waits_if_the_password_is_missing(scratch, sink, script):
    by_smtp(scratch, sink, user="backup", passName="mail/backup")
    scratch.fake_pass(script)
    scratch.task("one", "true")
    result = scratch.headless()
    undelivered(result)
    assert sink.mails == [] and len(scratch.outbox()) == 2
    assert "fake-pass" in scratch.log() and "xxxx" not in scratch.log()
    assert "denied" not in scratch.log()


def test_password_is_the_first_line_of_the_output_of_pass(scratch):
    with servers.Sink(account=("backup", "geheim")) as sink:
        by_smtp(scratch, sink, user="backup", passName="mail/backup")
        scratch.fake_pass("printf '%s\\n' geheim 'url: x'")
        scratch.task("one", "true")
        assert scratch.headless().code == 0
        assert len(sink.mails) == 2


@pytest.mark.parametrize("verb, answer", [
    ("EHLO", "500 what"), ("EHLO", "250 " + "x" * 100_000),
    ("MAIL", "550 not from you"), ("RCPT", "451 later"),
    ("DATA", "554 no\x1b[2J"),
])
def test_permanently_refused_mail_stays_in_the_outbox(
        scratch, sink, verb, answer):
    sink.answers[verb] = answer
    if verb == "EHLO":
        sink.answers["HELO"] = "500 what"
    by_smtp(scratch, sink)
    scratch.config["mail"]["start"] = False
    scratch.task("one", "true")
    result = scratch.headless()
    undelivered(result)
    assert len(scratch.outbox()) == 1 and sink.mails == []
    assert "\x1b" not in result.err + scratch.log()
    sink.answers.clear()
    assert scratch.headless().code == 0
    assert len(sink.mails) == 2 and scratch.outbox() == []


def test_a_refused_mail_does_not_stop_the_others(scratch, sink):
    """The outbox is tried again as a whole; what works goes out."""
    by_smtp(scratch, sink)
    scratch.task("one", "true")
    sink.answers["RCPT"] = "550 no such user"
    undelivered(scratch.headless())
    scratch.outbox()[0].write_bytes(b"\xff not a mail\n")
    sink.answers.clear()
    scratch.headless()
    subjects = sink.subjects()
    assert sum("run finished" in subject for subject in subjects) >= 1
    assert subjects[-1].split(": ")[1].startswith("run finished")


# ==========================================================================
# Mail: several recipients, the sender, and another try
# ==========================================================================

OTHER = "other@mission.invalid"


def to_both(scratch) -> None:
    scratch.config["user"]["email"] = [ADDRESS, f"Ops <{OTHER}>"]
    scratch.config["mail"]["start"] = False
    scratch.task("one", "echo hello")


def test_every_recipient_is_in_the_header_and_in_the_envelope(scratch, sink):
    by_smtp(scratch, sink)
    to_both(scratch)
    scratch.config["user"]["email"].append(ADDRESS)     # once is enough
    assert scratch.headless().code == 0
    received, = sink.wait(1)
    assert received.recipients == [ADDRESS, OTHER]
    assert received["To"] == f"{ADDRESS}, {OTHER}"


def test_refused_recipient_is_reported_and_the_others_get_the_mail(scratch,
                                                                   sink):
    by_smtp(scratch, sink)
    to_both(scratch)
    sink.refuse(OTHER, "550 no such user")
    result = scratch.headless()
    undelivered(result)
    assert result.err == (
        "mission: error: all tasks succeeded, but mailFinish: "
        f"{OTHER}: 127.0.0.1:{sink.port}: 550 no such user\n")
    received, = sink.wait(1)
    assert received.recipients == [ADDRESS]
    assert sink.sessions == 1 and scratch.outbox() == []


def test_mail_waits_for_a_temporarily_refused_recipient(scratch, sink):
    by_smtp(scratch, sink)
    to_both(scratch)
    sink.refuse(OTHER, "452 mailbox full")
    result = scratch.headless()
    undelivered(result)
    assert f"{OTHER}: 127.0.0.1:{sink.port}: 452 mailbox full; queued" \
        in result.err
    assert sink.sessions == 3 and len(scratch.outbox()) == 1
    sink.refused.clear()
    assert scratch.headless().code == 0
    assert [received.recipients for received in sink.wait(3)] \
        == [[ADDRESS], [OTHER], [ADDRESS, OTHER]]
    first, late, _ = sink.mails
    assert first["Message-ID"] == late["Message-ID"] and not scratch.outbox()


def test_mail_goes_to_the_valid_addresses_of_a_list(scratch, sink):
    by_smtp(scratch, sink)
    to_both(scratch)
    scratch.config["user"]["email"].append("nobody")
    result = scratch.headless()
    undelivered(result)
    assert 'user.email: invalid email address "nobody"' in result.err
    assert sink.wait(1)[0].recipients == [ADDRESS, OTHER]


@pytest.mark.parametrize("path, value", [
    (("user", "email"), ["nobody"]), (("mail", "smtp", "host"), "")])
def test_outbox_waits_until_the_configuration_is_valid(scratch, sink, path,
                                                       value):
    by_smtp(scratch, sink)
    to_both(scratch)
    sink.answers["MAIL"] = "550 no"
    undelivered(scratch.headless())
    sink.answers.clear()
    section = scratch.config
    for key in path[:-1]:
        section = section[key]
    before, section[path[-1]] = section[path[-1]], value
    undelivered(scratch.headless())
    assert len(scratch.outbox()) == 1 and sink.mails == []
    section[path[-1]] = before
    assert scratch.headless().code == 0
    assert scratch.outbox() == [] and len(sink.wait(2)) == 2


def test_sendmail_is_called_for_each_recipient(scratch):
    """msmtp gives up the whole mail if the server refuses one recipient."""
    by_sendmail(scratch)
    to_both(scratch)
    scratch.stand_in("sendmail", f"""
        for to do :; done
        [ "$to" != {ADDRESS} ] || exit 67
        exec cat >'{scratch.folder}'/"$to" """)
    result = scratch.headless()
    undelivered(result)
    assert f"{ADDRESS}: sendmail: exit status 67; queued" in result.err
    assert (scratch.folder / OTHER).exists() and len(scratch.outbox()) == 1
    scratch.stand_in("sendmail", f"printf '%s\\n' \"$*\" "
                                 f">>'{scratch.folder}/calls'; cat >/dev/null")
    assert scratch.headless().code == 0
    assert (scratch.folder / "calls").read_text().splitlines() == [
        f"-i -- {ADDRESS}", f"-i -- {ADDRESS}", f"-i -- {OTHER}"]


@pytest.mark.parametrize("replies", [
    ["451 later", "250 ok"], ["421 busy", "450 greylisted", "250 ok"]])
def test_temporarily_refused_mail_is_sent_again(scratch, sink, replies):
    by_smtp(scratch, sink)
    scratch.config["mail"]["start"] = False
    sink.answers["MAIL"] = list(replies)
    scratch.task("one", "true")
    result = scratch.headless()
    assert result.code == 0, result
    assert sink.sessions == len(replies) and len(sink.mails) == 1
    assert f"127.0.0.1:{sink.port}: {replies[0]}; next attempt in" \
        in scratch.log()


@pytest.mark.parametrize("reply, sessions", [("451 later", 3),
                                             ("550 not from you", 1)])
def test_mail_is_tried_three_times_unless_it_is_refused_permanently(
        scratch, sink, reply, sessions):
    by_smtp(scratch, sink)
    scratch.config["mail"]["start"] = False
    sink.answers["MAIL"] = reply
    scratch.task("one", "true")
    result = scratch.headless()
    undelivered(result)
    assert sink.sessions == sessions and len(scratch.outbox()) == 1
    assert result.err == (
        "mission: error: all tasks succeeded, but mailFinish: "
        f"127.0.0.1:{sink.port}: {reply}; queued, the next run sends it "
        "again\n")


def test_tasks_do_not_wait_for_a_server_that_refuses_the_start_mail(
        scratch, sink):
    by_smtp(scratch, sink)
    sink.answers["MAIL"] = "451 later"
    pipe = scratch.folder / "pipe"
    scratch.task("one", f"mkfifo '{pipe}'; cat '{pipe}'")
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        support.wait_until(pipe.exists, what="the task")
        before = sink.sessions
        pipe.write_text("")
        support.ended(process)
    assert (before, sink.sessions) == (1, 4)


def test_a_signal_ends_the_wait_for_the_mail_server(scratch):
    port = servers.free_port()
    by_smtp(scratch, servers.Sink(port=port))
    scratch.config["mail"]["start"] = False
    scratch.patch("k.MAIL_PAUSES = (3600.0, 0)")
    scratch.task("one", "true")
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        support.wait_until(lambda: scratch.log_files() and "next attempt"
                           in scratch.log(), what="the first try")
        assert f"127.0.0.1:{port}: connection refused; next attempt in 1h" \
            in scratch.log()
        process.terminate()
        result = support.ended(process, 20)
    assert result.code == 128 + signal.SIGTERM, result
    assert len(scratch.outbox()) == 1


@pytest.mark.parametrize("mail, smtp, sender", [
    ("Backup <a@mission.invalid>", None, "a@mission.invalid"),
    ("a@mission.invalid", "b@mission.invalid", "b@mission.invalid")])
def test_mail_from_is_the_sender_of_smtp(scratch, sink, mail, smtp, sender):
    by_smtp(scratch, sink)
    del scratch.config["mail"]["smtp"]["from"]
    scratch.config["mail"]["from"] = mail
    if smtp:
        scratch.config["mail"]["smtp"]["from"] = smtp
    scratch.task("one", "true")
    assert scratch.headless().code == 0
    for received in sink.wait(2):
        assert received.sender == f"<{sender}>"
        assert received["From"] == sender


def test_mail_from_is_the_sender_of_sendmail(scratch):
    by_sendmail(scratch)
    scratch.config["mail"].update({"from": "a@mission.invalid",
                                   "start": False})
    scratch.stand_in("sendmail", f"{{ echo \"$*\"; cat; }} "
                                 f">'{scratch.folder}/mail'")
    scratch.task("one", "true")
    assert scratch.headless().code == 0
    call, first = (scratch.folder / "mail").read_text().splitlines()[:2]
    assert call == f"-i -f a@mission.invalid -- {ADDRESS}"
    assert first == "From: a@mission.invalid"


@pytest.mark.parametrize("sender", ["a@b\nBcc: c@mission.invalid", "-f@b.c",
                                    "a@b.c, d@e.f"])
def test_an_invalid_sender_sends_no_mail_and_stops_no_task(scratch, sink,
                                                           sender):
    by_smtp(scratch, sink)
    scratch.config["mail"]["from"] = sender
    scratch.task("one", "true")
    result = scratch.headless()
    undelivered(result)
    assert "mail.from" in result.err and sink.sessions == 0
    assert scratch.outcomes() == {"one": "ok"}


# ==========================================================================
# Pings
# ==========================================================================

def test_endpoint_is_requested_once_after_a_successful_run(scratch, web):
    pinging(scratch, web.url + "?a=b")
    scratch.task("one", "true")
    result = scratch.headless()
    assert result.code == 0 and not result.err, result
    assert web.asked() == ["GET /check"]
    assert web.requests[0].query["a"] == "b" and not web.requests[0].body
    assert "PingResponse" in scratch.log() and "OK" in scratch.log()


@pytest.mark.parametrize("script, asked", [
    ("true", ["GET /check/start", "GET /check"]),
    ("false", ["GET /check/start", "GET /check/fail"]),
])
def test_start_success_and_fail_share_one_run_id(scratch, web, script, asked):
    pinging(scratch, web.url, start=True, fail=True)
    scratch.task("one", script)
    scratch.headless()
    assert web.asked() == asked
    rids = {request.query["rid"] for request in web.requests}
    assert len(rids) == 1 and uuid.UUID(rids.pop())


def test_a_failed_run_pings_only_with_ping_fail(scratch, web):
    pinging(scratch, web.url)
    scratch.task("one", "false")
    scratch.task("two", "true")
    assert scratch.headless().code == 1
    assert web.requests == []


def test_the_start_ping_comes_before_the_first_task(scratch, web):
    pinging(scratch, web.url, start=True)
    scratch.task("one", f"ls '{scratch.folder}/asked'")
    web.note, note = lambda request: (
        (scratch.folder / "asked").touch(), note(request))[1], web.note
    assert scratch.headless().code == 0


@pytest.mark.parametrize("script, path", [("true", "/check"),
                                          ("false", "/check/fail")])
def test_the_log_is_posted_with_the_finish(scratch, web, script, path):
    pinging(scratch, web.url, start=True, fail=True, log=True)
    scratch.config["filters"] = ["^secret"]
    scratch.task("one", f"echo hello ż; echo secret sauce; {script}")
    scratch.headless()
    finish = web.requests[-1]
    assert (finish.method, finish.path) == ("POST", path)
    assert "] hello ż\n" in finish.text and "sauce" not in finish.text
    assert "filtered>>" in finish.text and "FinishTime" in finish.text
    assert web.requests[0].query["rid"] == finish.query["rid"]


def test_a_long_log_is_posted_from_its_end(scratch, web):
    pinging(scratch, web.url, log=True)
    scratch.task("one", "seq 100000")
    assert scratch.headless().code == 0
    body = web.requests[-1].body
    assert len(body) <= 100_000         # Healthchecks' limit
    assert b"] 100000\n" in body and b"] 1\n" not in body
    assert b"FinishTime" in body


@pytest.mark.parametrize("endpoint, path, query", [
    ("/%s",        "/HOST",      {}),
    ("/a%20b/%s",  "/a%20b/HOST", {}),
    ("/%s/%s",     "/HOST/HOST", {}),
    ("/x?h=%s",    "/x",         {"h": "HOST"}),
    ("/100%25/%d", "/100%25/%d", {}),
    ("/%73",       "/%73",       {}),
    ("",           "/",          {}),
    ("?a=1",       "/",          {"a": "1"}),
    ("/a#part",    "/a",         {}),
    ("/ż%20",      "/%C5%BC%20", {}),
])
def test_percent_s_in_a_url_becomes_the_host_name(
        scratch, web, endpoint, path, query):
    name = socket.gethostname()
    pinging(scratch, f"http://127.0.0.1:{web.port}{endpoint}")
    scratch.task("one", "true")
    assert scratch.headless().code == 0
    request, = web.requests
    assert request.path == path.replace("HOST", name)
    for key, value in query.items():
        assert request.query[key] == value.replace("HOST", name)


def test_path_of_the_ping_kind_is_inserted_before_the_query(scratch, web):
    pinging(scratch, web.url + "/?create=1&x=%20", start=True, fail=True)
    scratch.task("one", "false")
    scratch.headless()
    assert [r.path.replace("//", "/") for r in web.requests] \
        == ["/check/start", "/check/fail"]
    assert all(r.query["create"] == "1" and r.query["x"] == " "
               and "rid" in r.query for r in web.requests)


@pytest.mark.parametrize("answers, tries, code", [
    ([200], 1, 0), ([201], 1, 0), ([204], 1, 0),
    ([500, 200], 2, 0), ([429, 503, 200], 3, 0), (["close", 200], 2, 0),
    ([500], 2, 74), ([429], 2, 74), ([502], 2, 74), (["close"], 2, 74),
    ([404], 1, 74), ([409], 1, 74), ([410], 1, 74), ([400], 1, 74),
    ([401], 1, 74), ([304], None, 74), (["garbage"], 2, 74),
    (["huge head"], None, 74),
])
def test_http_status_decides_whether_a_ping_succeeded(
        scratch, answers, tries, code):
    with servers.Web(*answers) as web:
        scratch.patch(support.NO_PAUSES)
        pinging(scratch, web.url, retries=max(2, tries or 0))
        scratch.task("one", "true")
        result = scratch.headless()
    if code == 74:
        undelivered(result)
        if isinstance(answers[0], int):
            assert str(answers[0]) in scratch.log()
    assert result.code == code, result
    assert tries in (len(web.requests), None)


def test_refused_connection_is_retried(scratch):
    web = servers.Web(port=servers.free_port())
    pinging(scratch, web.url, retries=4, timeout="5s")
    scratch.task("one", "true")
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        support.wait_until(lambda: scratch.log_files() and "refused" in
                           scratch.log(), what="the first try", seconds=20)
        with web:
            result = support.ended(process)
            assert result.code == 0, result
    assert web.asked() == ["GET /check"]


def test_an_unreachable_monitor_is_a_delivery_failure(scratch):
    pinging(scratch, f"http://127.0.0.1:{servers.free_port()}/x", retries=1)
    scratch.task("one", "true")
    undelivered(scratch.headless())


@pytest.mark.parametrize("mistake", ["hang", "drip head", "drip body"])
def test_time_limit_applies_to_the_whole_request(scratch, mistake):
    with servers.Web(mistake) as web:
        pinging(scratch, web.url, timeout="1s", retries=1)
        scratch.task("one", "true")
        began = time.monotonic()
        result = scratch.headless()
        assert time.monotonic() - began < 8
        assert len(web.requests) == 1
    if mistake == "drip body":    # the status was known: success either way
        assert result.code in (0, 74), result
    else:
        undelivered(result)


def test_server_that_never_completes_the_tls_handshake_times_out(scratch):
    with servers.Sink() as silent:
        silent.silent = True
        pinging(scratch, f"https://127.0.0.1:{silent.port}/", timeout="1s",
                retries=1)
        scratch.task("one", "true")
        began = time.monotonic()
        undelivered(scratch.headless())
        assert time.monotonic() - began < 8


def test_huge_response_body_is_not_read_completely(scratch):
    with servers.Web("huge body") as web:
        pinging(scratch, web.url, retries=1)
        scratch.task("one", "true")
        scratch.headless()
        assert len(web.requests) == 1
    assert web.megabytes < 100
    assert len(scratch.log()) < 20_000


@pytest.mark.parametrize("body", [
    b"OK\nERROR: forged\n# Task: forged\n[0s        ] forged\r\n",
    "\x1b[2Ja\u2028b\u202ec".encode() + b"\xff", b"x" * 5000, b"",
])
def test_response_is_logged_as_one_escaped_line(scratch, body):
    with servers.Web(body) as web:
        pinging(scratch, web.url)
        scratch.task("one", "true")
        assert scratch.headless().code == 0
    lines = [line for line in scratch.log().split("\n")
             if "PingResponse" in line]
    assert len(lines) == 1 and len(lines[0]) < 1000
    assert re.search("^(ERROR|# Task: forged|\\[0s +\\] forged)",
                     scratch.log(), re.M) is None
    assert re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]",
                     scratch.log()) is None


@pytest.mark.parametrize("body, code", [
    (b"OK", 0), (b"OK (not found)", 74)])
def test_response_that_repeats_the_ping_url_is_logged_without_it(
        scratch, body, code):
    mails = scratch.keep_mail(start=False)
    with servers.Web(body + b" /check/5f1c-abcd?key=t0ken-1 5f1c-abcd, "
                     b"t0ken-1") as web:
        pinging(scratch, web.url + "/5f1c-abcd?key=t0ken-1", start=True)
        scratch.task("one", "true", ping=web.url + "/5f1c-abcd?key=t0ken-1")
        result = scratch.headless()
    assert result.code == code and "PingResponse 200 OK" in scratch.log()
    (mail,) = mails.iterdir()
    for text in (result.err, scratch.log(), mail.read_text(),
                 str(scratch.history())):
        assert "5f1c-abcd" not in text and "t0ken-1" not in text, text


def redirected(scratch, *answers, certificate=None) -> tuple:
    with servers.Web(*answers, certificate=certificate) as web:
        options = {"caFile": certificate.cert} if certificate else {}
        pinging(scratch, web.url, retries=1, **options)
        scratch.task("one", "true")
        return scratch.headless(), web


@pytest.mark.parametrize("status, target", [
    (301, "/other"), (302, "HTTP"), (303, "other"), (307, "HTTP"),
    (308, "/other")])
def test_a_redirect_to_http_is_followed(scratch, status, target):
    with servers.Web() as other:
        target = target.replace("HTTP", f"http://127.0.0.1:{other.port}/z")
        result, web = redirected(
            scratch, servers.Redirect(target, status), 200)
        assert result.code == 0, result
        if target.startswith("http"):
            assert other.asked() == ["GET /z"]
        else:
            assert web.asked() == ["GET /check", "GET /other"]


@pytest.mark.parametrize("count, code", [(3, 0), (4, 74), (99, 74)])
def test_fourth_redirect_is_refused(scratch, count, code):
    result, web = redirected(
        scratch, *[servers.Redirect(f"/{n}") for n in range(count)], 200)
    assert result.code == code, result
    assert len(web.requests) == 4


@pytest.mark.parametrize("target", [
    "file:///etc/passwd", "ftp://127.0.0.1:1/x", "data:text/plain,OK",
    "http:///x", "http://127.0.0.1:99999/", "http://[::1", "",
])
def test_redirect_to_another_scheme_is_refused(scratch, target):
    result, web = redirected(scratch, servers.Redirect(target))
    undelivered(result)
    assert len(web.requests) <= 4
    assert "root:" not in scratch.log()


def test_a_redirect_from_https_to_http_is_refused(scratch, certificate):
    with servers.Web() as plain:
        result, web = redirected(scratch, servers.Redirect(plain.url),
                                 certificate=certificate)
        undelivered(result)
        assert len(web.requests) == 1 and plain.requests == []


def test_a_redirect_from_http_to_https_is_followed(scratch, certificate):
    with servers.Web(certificate=certificate) as safe, \
            servers.Web(servers.Redirect(safe.url)) as web:
        pinging(scratch, web.url, caFile=certificate.cert)
        scratch.task("one", "true")
        assert scratch.headless().code == 0
        assert len(safe.requests) == 1


@pytest.mark.parametrize("mistake", ["unknown", "expired", "other host", None])
def test_certificate_of_an_endpoint_is_verified(
        scratch, certificate_of, mistake):
    certificate = certificate_of(mistake)
    options = {} if mistake == "unknown" else {"caFile": certificate.cert}
    with servers.Web(certificate=certificate) as web:
        pinging(scratch, web.url, retries=1, **options)
        scratch.task("one", "true")
        result = scratch.headless()
        assert len(web.requests) == (0 if mistake else 1)
    assert result.code == (74 if mistake else 0), result


@pytest.mark.parametrize("endpoint", [
    "file:///etc/passwd", "ftp://127.0.0.1/x", "data:,OK", "URL:file:///x",
    "127.0.0.1:80/x", "//127.0.0.1/x", "http:///x", "http:127.0.0.1",
    "http://a b/", "http://a/\nb", "http://a/\r\nX: y", "http://a/\x00",
    "http://a/\x1b[2J", "http://a/\x7f", "https://", "", " http://a/",
    "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://[::1/",
    "http://@:/",
])
def test_endpoint_with_another_scheme_is_refused(scratch, capsys, endpoint):
    pinging(scratch, endpoint)
    scratch.task("one", "true")
    config_error(scratch, capsys, "ping.endpoint")


def test_proxy_and_ca_of_the_caller_are_not_used(scratch, web):
    with servers.Web() as proxy:
        at = f"http://127.0.0.1:{proxy.port}"
        scratch.env.update({"http_proxy": at, "HTTP_PROXY": at,
                            "all_proxy": at})
        pinging(scratch, web.url)
        scratch.task("one", "true")
        assert scratch.headless().code == 0
        assert proxy.requests == [] and len(web.requests) == 1


def test_a_failed_start_ping_does_not_stop_the_backup(scratch):
    with servers.Web("hang") as web:
        pinging(scratch, web.url, start=True, timeout="1s", retries=1)
        ran = scratch.folder / "ran"
        scratch.task("one", f"touch '{ran}'")
        undelivered(scratch.headless())
        assert ran.exists()
        assert web.asked()[0] == "GET /check/start"


def test_exit_status_of_a_failed_task_wins_over_a_failed_ping(scratch):
    with servers.Web(500) as web:
        pinging(scratch, web.url, fail=True, retries=1)
        scratch.task("one", "exit 3")
        result = scratch.headless()
        assert result.code == 1, result
        assert web.asked() == ["GET /check/fail"]


def test_success_is_not_pinged_after_a_failed_mail(scratch, web):
    """`The ping goes out when the run would exit 0`: this one would not."""
    by_sendmail(scratch)
    scratch.stand_in("sendmail", "cat >/dev/null; exit 75")
    pinging(scratch, web.url, start=True, fail=True)
    scratch.task("one", "true")
    undelivered(scratch.headless())
    assert "GET /check" not in web.asked()


# ==========================================================================
# Pings: of tasks, endpoints of their own, proxies, and what stays secret
# ==========================================================================

def test_each_task_with_a_ping_url_pings_its_result(scratch, web):
    base = f"http://127.0.0.1:{web.port}"
    pinging(scratch, web.url, fail=True)
    for slug, script, options in [
            ("good", "true", {}),
            ("bad", "false", {}),
            ("noted", "exit 1", {"warnStatuses": [1]}),
            ("idle", "exit 75", {"skipStatuses": [75]}),
            ("after-bad", "true", {"needs": ["bad"]}),
            ("after-idle", "true", {"needs": ["idle"]}),
            ("unpinged", "true", {}),
            ("last", "true", {"post": True})]:
        if slug != "unpinged":
            options["ping"] = f"{base}/{slug}?key=%s"
        scratch.task(slug, script, **options)
    assert scratch.headless().code == 1
    assert web.asked() == [
        "GET /good", "GET /bad/fail", "GET /noted", "GET /after-bad/fail",
        "GET /last", "GET /check/fail"]
    assert web.requests[1].query == {"key": socket.gethostname()}


def test_task_ping_is_sent_if_the_run_has_no_endpoint(scratch, web):
    scratch.task("one", "true", ping=web.url)
    assert scratch.mission("run").code == 0 and web.asked() == []
    assert scratch.headless().code == 0
    assert web.asked() == ["GET /check"]


def test_failed_task_ping_prevents_the_success_ping(scratch, web):
    with servers.Web(503) as broken:
        scratch.patch(support.NO_PAUSES)
        pinging(scratch, web.url, retries=2, fail=True)
        scratch.task("one", "true", ping=broken.url + "/token?key=token")
        scratch.task("two", "true")
        result = scratch.headless()
        undelivered(result)
        assert len(broken.requests) == 2 and web.asked() == []
    assert result.err == (
        "mission: error: all tasks succeeded, but ping one: "
        f"http://127.0.0.1:{broken.port}/: HTTP 503 Service Unavailable\n")
    assert "token" not in scratch.log()
    assert scratch.outcomes() == {"one": "ok", "two": "ok"}


def test_invalid_ping_url_of_a_task_is_a_delivery_problem(
        scratch, web, capsys):
    pinging(scratch, web.url)
    scratch.task("one", "true", ping="ftp://secret@x/")
    scratch.task("two", "true", ping=web.url + "/two")
    assert "secret" not in config_error(scratch, capsys, "tasks[0].ping")
    result = scratch.headless()
    undelivered(result)
    assert "ping one: tasks[0].ping: invalid URL" in result.err
    assert "secret" not in result.err and web.asked() == ["GET /check/two"]


def test_a_stopped_run_pings_the_failure_of_its_tasks(scratch, web):
    started = scratch.folder / "started"
    scratch.task("one", f"touch '{started}'; exec sleep 60",
                 ping=web.url + "/one")
    scratch.task("two", "true", ping=web.url + "/two")
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        support.wait_until(started.exists, what="the task")
        process.terminate()
        support.ended(process)
    assert web.asked() == ["GET /check/one/fail", "GET /check/two/fail"]


@pytest.mark.parametrize("script, last", [("true", "GET /check"),
                                          ("false", "GET /down")])
def test_start_and_fail_endpoints_are_used_as_written(
        scratch, web, script, last):
    base = f"http://127.0.0.1:{web.port}"
    pinging(scratch, web.url, startEndpoint=f"{base}/up?h=%s",
            failEndpoint=f"{base}/down?h=%s", log=True)
    scratch.task("one", script)
    scratch.headless()
    assert [asked.replace("POST", "GET") for asked in web.asked()] \
        == ["GET /up", last]
    assert web.requests[0].query == {"h": socket.gethostname()}
    assert ("rid" in web.requests[1].query) == (script == "true")
    assert b"FinishTime" in web.requests[1].body


@pytest.mark.parametrize("key", ["endpoint", "startEndpoint", "failEndpoint",
                                 "proxy"])
def test_invalid_ping_endpoint_stops_no_task(scratch, web, key):
    pinging(scratch, web.url, start=True, **{key: "nonsense"}) \
        if key != "endpoint" else pinging(scratch, "nonsense")
    scratch.task("one", "true")
    result = scratch.headless()
    undelivered(result)
    assert f"ping.{key}: invalid URL" in result.err and not web.requests
    assert scratch.outcomes() == {"one": "ok"}


def test_user_and_password_of_a_url_are_sent_and_never_shown(scratch, sink):
    by_smtp(scratch, sink)
    with servers.Web(403) as web:
        url = f"http://me:p%40ss-w0rd@127.0.0.1:{web.port}/token?key=token"
        pinging(scratch, url, fail=True, start=True, log=True, retries=1)
        scratch.task("one", "true", ping=url)
        plan = scratch.mission("run", "--dry-run", "--headless")
        result = scratch.headless()
        undelivered(result)
    wanted = "Basic " + base64.b64encode(b"me:p@ss-w0rd").decode()
    assert {request.headers["authorization"] for request in web.requests} \
        == {wanted}
    assert web.requests[0].headers["host"] == f"127.0.0.1:{web.port}"
    place = f"http://127.0.0.1:{web.port}/"
    assert f"{place}: HTTP 403 Forbidden" in result.err
    assert f"ping {place} " in plan.out
    texts = [result.err, result.out, plan.out, plan.err, scratch.log(),
             str(scratch.history()), *(each.text for each in sink.wait(2))]
    for text in texts:
        assert not re.search("w0rd|token|me:", text), text


def test_password_is_sent_only_to_the_same_server_after_a_redirect(scratch):
    with servers.Web() as other, servers.Web() as web:
        web.answers = [servers.Redirect(f"http://127.0.0.1:{web.port}/a"),
                       servers.Redirect(f"http://127.0.0.1:{other.port}/b")]
        pinging(scratch, f"http://me:secret@127.0.0.1:{web.port}/check")
        scratch.task("one", "true")
        assert scratch.headless().code == 0
    assert ["authorization" in each.headers for each in
            web.requests + other.requests] == [True, True, False]


def test_proxy_gets_the_request_and_its_password(scratch):
    with servers.Proxy() as proxy:
        pinging(scratch, "http://me:secret@hc.invalid:81/x?a=b",
                proxy=f"http://you:hidden@127.0.0.1:{proxy.port}")
        scratch.task("one", "true")
        result = scratch.headless()
    assert result.code == 0, result
    assert proxy.targets() == ["GET http://hc.invalid:81/x?a=b"]
    headers = proxy.requests[0].headers
    assert headers["host"] == "hc.invalid:81"
    for name, pair in (("authorization", b"me:secret"),
                       ("proxy-authorization", b"you:hidden")):
        assert headers[name] == "Basic " + base64.b64encode(pair).decode()


def test_proxy_tunnels_tls_and_sees_no_secret(scratch, certificate):
    with servers.Proxy() as proxy, \
            servers.Web(certificate=certificate) as web:
        pinging(scratch, web.url.replace("//", "//me:secret@"),
                proxy=f"http://you:hidden@127.0.0.1:{proxy.port}",
                caFile=certificate.cert)
        scratch.task("one", "true")
        result = scratch.headless()
        assert result.code == 0, result
    assert proxy.targets() == [f"CONNECT 127.0.0.1:{web.port}"]
    assert "authorization" not in proxy.requests[0].headers
    assert "proxy-authorization" in proxy.requests[0].headers
    assert "authorization" in web.requests[0].headers
    assert "proxy-authorization" not in web.requests[0].headers


def test_an_unreachable_proxy_is_named(scratch):
    port = servers.free_port()
    pinging(scratch, "http://hc.invalid/token", retries=1,
            proxy=f"http://you:hidden@127.0.0.1:{port}")
    scratch.task("one", "true")
    assert scratch.headless().err == (
        "mission: error: all tasks succeeded, but ping: http://hc.invalid/ "
        f"through http://127.0.0.1:{port}/: connection refused\n")


@pytest.mark.parametrize("answer, words", [
    (404, "HTTP 404 Not Found"),
    ("close", "no complete HTTP response"),
    ("garbage", "no complete HTTP response"),
    ("huge head", "no complete HTTP response"),
])
def test_message_of_a_failed_ping_names_the_server_and_the_reason(
        scratch, answer, words):
    with servers.Web(answer) as web:
        pinging(scratch, web.url + "/token", retries=1)
        scratch.task("one", "true")
        result = scratch.headless()
    assert result.err == ("mission: error: all tasks succeeded, but ping: "
                          f"http://127.0.0.1:{web.port}/: {words}\n")


def test_dry_run_lists_mails_and_pings_with_the_reason_for_unsent_ones(
        scratch):
    pinging(scratch, "https://hc.invalid/token/%s", fail=True,
            failEndpoint="https://down.invalid/token")
    scratch.config["user"]["email"] = [ADDRESS, OTHER]
    scratch.config["mail"] = {"enabled": True, "type": "smtp"}
    scratch.task("one", "true", ping="http://one.invalid/token")
    plan = scratch.mission("run", "--dry-run", "--headless")
    assert plan.code == 0, plan
    steps = [line.split(". ", 1)[-1] for line in plan.out.splitlines()]
    assert f"mail {ADDRESS}, {OTHER}: run started" in steps
    run = scratch.tasks / "one" / "run"
    assert (f"run the task one ({run}) and ping http://one.invalid/ (fail, if"
            " it does not succeed)") in steps
    assert ("ping https://hc.invalid/ if everything succeeded, mails included"
            "; ping https://down.invalid/ (fail) if a task, chown or commit "
            "failed") in steps
    assert "     problem: mail.smtp.host: missing or invalid host " \
        in plan.out
    by_hand = scratch.mission("run", "--dry-run").out
    assert f"run the task one ({run})\n" in by_hand
    assert ".invalid" not in by_hand.split("problem:")[0]


# ==========================================================================
# Stopped by a signal
# ==========================================================================

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT,
                                    signal.SIGHUP])
def test_a_stopped_run_still_mails_and_pings_its_failure(scratch, sink, web,
                                                         number):
    by_smtp(scratch, sink)
    pinging(scratch, web.url, start=True, fail=True)
    started = scratch.folder / "started"
    scratch.task("one", f"touch '{started}'; exec sleep 60")
    scratch.task("two", "echo never")
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        support.wait_until(started.exists, what="the task")
        process.send_signal(number)
        result = support.ended(process)
    assert result.code == 128 + number, result
    start, finish = sink.wait(2)
    assert "[FAILURE] run finished in" in finish.subject
    assert "two" in finish.text and "] never" not in finish.text
    assert web.asked() == ["GET /check/start", "GET /check/fail"]


def test_signal_during_the_delivery_ends_the_delivery(scratch):
    """The endpoint hangs; mission does not wait for it after SIGTERM."""
    with servers.Web("hang") as web:
        pinging(scratch, web.url, timeout="40s", retries=9)
        scratch.task("one", "true")
        process = scratch.start("run", "--headless")
        with support.stopping(process):
            with web.changed:
                assert web.changed.wait_for(lambda: web.requests, 20)
            process.terminate()
            result = support.ended(process, 20)
    assert result.code in (74, 128 + signal.SIGTERM), result


# ==========================================================================
# Notifications
# ==========================================================================

@pytest.fixture
def desk(scratch, open_desk):
    """A desk of the user that mission notifies: alice's when root asks."""
    scratch.config["notify"] = {"enabled": True}
    if open_desk.host:
        scratch.host = open_desk.host
        scratch.config["user"]["name"] = support.ALICE
    open_desk.shown()           # of the test before
    return open_desk


@pytest.fixture(scope="module")
def open_desk():
    support.need("Xvfb", "dbus-daemon", "dunst", "dunstctl", "notify-send")
    # Sockets need short paths.
    folder = Path(tempfile.mkdtemp(prefix="m-"))
    folder.chmod(0o755)
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if support.AS_ROOT:
            support.need("unshare", "setpriv")
            host = at_alices_desk(folder, runtime)
            uid = str(support.ALICE_UID)
            desk = servers.Desk(runtime, lambda command: host.command(
                ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups",
                 *command]))
            desk.host = host
        else:
            desk = servers.Desk(runtime)
            desk.host = None
        yield stack.enter_context(desk)


def at_alices_desk(folder: Path, runtime: Path) -> support.Host:
    """A host where `runtime` is alice's /run/user/1500."""
    uid = support.ALICE_UID
    os.chown(runtime, uid, uid)
    host = support.Host(folder)
    host.setup += ["mount -t tmpfs -o mode=755 none /run",
                   f"mkdir -p /run/user/{uid}",
                   f"mount --bind '{runtime}' /run/user/{uid}"]
    return host


def with_bus(scratch, desk) -> None:
    """An ordinary user's session says where its bus is."""
    if not support.AS_ROOT:
        scratch.env.update({
            name: desk.env[name] for name in
            ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY")})


@pytest.mark.parametrize("args", [["run"], ["run", "--headless"]])
@pytest.mark.parametrize("script, last", [
    ("true", "run finished in"), ("false", "finished with errors"),
])
def test_start_and_finish_are_notified_on_the_desktop(
        scratch, desk, args, script, last):
    with_bus(scratch, desk)
    scratch.task("one", script)
    scratch.mission(*args)
    start, finish = desk.shown()
    assert "run started" in text_of(start).lower()
    assert last in text_of(finish).lower()
    assert re.search(f"in {DURATION}", text_of(finish))


def text_of(note: dict) -> str:
    return f"{note['summary']} {note['body']}"


def test_option_quiet_shows_no_desktop_notification(scratch, desk):
    with_bus(scratch, desk)
    scratch.task("one", "true")
    assert scratch.mission("-q", "run").code == 0
    assert desk.shown() == []


def notify_send(scratch, script: str) -> Path:
    """A stand-in that writes down its arguments; where they are. The user
    has a desktop session: there is a bus."""
    asked = scratch.folder / "asked"
    asked.touch()
    asked.chmod(0o666)
    scratch.open_to_others()
    scratch.stand_in("notify-send", f"""
        printf '%s\\n' "$@" "uid=$(id -u)" "bus=$DBUS_SESSION_BUS_ADDRESS" \\
            "secret=$SECRET" >>{shlex.quote(str(asked))}
        """ + script)
    scratch.config["notify"] = {"enabled": True}
    runtime = scratch.make("runtime")
    (runtime / "bus").touch()
    if support.AS_ROOT:
        support.need("unshare")
        scratch.config["user"]["name"] = support.ALICE
        scratch.host = at_alices_desk(scratch.folder / "host", runtime)
    else:
        scratch.env["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={runtime}/bus"
    return asked


def test_notify_send_runs_as_the_user_with_a_clean_environment(scratch):
    asked = notify_send(scratch, "exit 0")
    scratch.env["SECRET"] = "geheim"
    scratch.task("one", "true", name="<b>bold</b> & --icon=x")
    scratch.task("two", "false", name="--help")
    assert scratch.mission("run").code == 1
    words = asked.read_text().split("\n")
    uid = support.ALICE_UID if support.AS_ROOT else os.getuid()
    assert words.count(f"uid={uid}") == 2
    assert "secret=geheim" not in words
    assert words.count("--") == 2       # nothing after it is an option
    texts = [words[n + 1] for n, word in enumerate(words) if word == "--"]
    assert "started" in texts[0] and "finished with errors" in texts[1]
    assert not re.search("<b>|&(?!amp;|lt;|gt;)", "".join(words))
    if support.AS_ROOT:
        assert f"bus=unix:path=/run/user/{uid}/bus" in words


@pytest.mark.parametrize("script", [
    "exit 1", "echo 'no bus' >&2; exit 1", "kill -9 $$",
    "head -c 1000000 /dev/zero; exit 3",
])
def test_failed_notification_does_not_fail_a_successful_backup(
        scratch, web, script):
    asked = notify_send(scratch, script)
    pinging(scratch, web.url)
    scratch.task("one", "true")
    result = scratch.headless()
    assert result.code == 0 and not result.err, result
    assert asked.read_text().count("uid=") == 2
    assert scratch.log().count("NotifyFailure") == 2
    assert web.asked() == ["GET /check"]
    assert scratch.history()[-1]["result"] == "ok"


def test_hanging_notify_send_ends_with_a_timeout(scratch):
    asked = notify_send(scratch, "exec sleep 300")
    scratch.patch(DESKTOP_SECONDS=1)
    scratch.task("one", "true")
    began = time.monotonic()
    result = scratch.headless()
    assert time.monotonic() - began < 20
    assert result.code == 0 and asked.read_text().count("uid=") == 2, result


def test_missing_session_bus_is_a_line_in_the_log_and_exit_status_0(scratch):
    """The real notify-send, and a user who is not logged in."""
    support.need("notify-send")
    scratch.config["notify"] = {"enabled": True}
    if support.AS_ROOT:
        scratch.host = support.Host(scratch.folder / "host")
        scratch.host.setup += ["mount -t tmpfs -o mode=755 none /run"]
        scratch.config["user"]["name"] = support.ALICE
    else:
        scratch.env["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/no/such/bus"
    scratch.task("one", "true")
    result = scratch.headless()
    assert result.code == 0 and not result.err, result
    assert scratch.log().count("NotifyFailure") == 2

"""koid and a dashboard: what is sent, once each; which requests are carried
out; and that nothing a dashboard does or fails to do hurts the jobs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

import lying_dashboard
import servers
import support
from lying_dashboard import DASH, HOST, KEY, request_for, text_of

koitab = support.load("koitab")

TAB = """\
[Office]
"Hello" @manual printf '%s|' {{To}} {{Times, int, 1}} {{Loud, bool, false}}
"Secret" @manual echo "<$KOI_ARG_1>" {{Password, secret}}
"Long" @manual echo begun; while :; do sleep 0.1; echo more; done
"Plain" @manual echo plain
KOI_CONFIRM=cli
"Terminal" @manual echo no
KOI_CONFIRM=no
[Nightly]
"Backup" 0 3 * * * echo backup
"""


@pytest.fixture
def dashboard():
    with lying_dashboard.Dashboard() as dashboard:
        yield dashboard


@pytest.fixture
def linked(koi, dashboard):
    """A koid that joined the dashboard."""
    koi.tab(TAB.replace("'%s|'", r"'\%s|'"))
    lying_dashboard.join_dashboard(koi, dashboard.url)
    koi.start()
    return koi


def ask(dashboard, body: dict) -> dict:
    dashboard.ask(text_of(body))
    return dashboard.result(body["nonce"])


# --- what is sent


def test_jobs_runs_and_output_reach_the_dashboard_once_each(linked, dashboard):
    for number in range(5):
        linked.run("Hello", To=f"ann {number}")
    dashboard.wait_for(lambda: [
        record["state"] for record in dashboard.records.values()
    ] == ["done"] * 5 and len(dashboard.outputs) == 5, what="five runs")
    text = koitab.output_text(bytes(dashboard.outputs[3]))
    assert text == b"ann 2|1|false|"
    assert dashboard.order == sorted(set(dashboard.order))
    assert dashboard.records[1]["args"] == {
        "To": "ann 0", "Times": "1", "Loud": "false"}
    listed = dashboard.lists[-1]
    assert koitab.list_mac(KEY, listed["body"]) == listed["mac"]
    assert set(dashboard.specs()) == {
        "Hello", "Secret", "Long", "Plain", "Terminal", "Backup"}


def test_runs_from_before_the_join_are_sent(koi, dashboard):
    koi.tab('"Plain" @manual echo plain\n')
    koi.start()
    for _ in range(3):
        koi.run("Plain")
    lying_dashboard.join_dashboard(koi, dashboard.url)
    assert koi.ask("relink")["linked"]
    dashboard.wait_for(lambda: len(dashboard.outputs) == 3)


def test_changed_tab_is_sent_again(linked, dashboard):
    assert "Plain" in dashboard.specs()
    linked.tab('"Other" @manual echo other\n')
    dashboard.wait_for(lambda: set(dashboard.specs()) == {"Other"})


def test_job_list_contains_pauses_and_their_ends(linked, dashboard):
    def paused():
        return list(json.loads(dashboard.lists[-1]["body"])["paused"].items())

    tag = json.loads(dashboard.specs()["Plain"])["tag"]
    assert paused() == []
    linked.ask("pause", job="Plain")
    dashboard.wait_for(lambda: paused() == [(f"{linked.user}\n{tag}", 0)])
    linked.ask("resume", job="Plain")
    dashboard.wait_for(lambda: paused() == [])


def test_output_of_a_followed_run_is_sent_live(linked, dashboard):
    result = ask(dashboard, request_for(dashboard.specs()["Long"]))
    run = str(result["run"])
    with dashboard.turn:
        dashboard.followed[run] = 0
        dashboard.turn.notify_all()
    dashboard.wait_for(lambda: b"begun\n" in koitab.output_text(bytes(
        dashboard.live.get(run, b""))))
    size = len(dashboard.live[run])
    dashboard.wait_for(lambda: len(dashboard.live[run]) > size)
    text = koitab.output_text(bytes(dashboard.live[run]))
    assert text.startswith(b"begun\nmore\n") and text.count(b"begun") == 1
    linked.ask("kill", run=int(run))


# --- requests


def test_signed_request_runs_the_job_as_its_user(linked, dashboard):
    spec = dashboard.specs()["Hello"]
    for value in ("o'brien", "$(id)", "\U0001f603", "a\tb", "-n", "{{x}}"):
        result = ask(dashboard, request_for(spec, {
            "To": value, "Times": "3", "Loud": "true"}))
        assert result["state"] == "accepted", result
        run = linked.ended(count=1)
        support.wait_until(lambda: linked.history(
            limit=1)[0]["state"] == "done")
        assert linked.text_of(result["run"]) == f"{value}|3|true|"
    run = linked.history(limit=1)[0]
    assert run["trigger"] == "manual" and run["args"]["Times"] == "3"


def test_secret_argument_reaches_the_job_and_is_not_sent_back(
        linked, dashboard):
    result = ask(dashboard, request_for(
        dashboard.specs()["Secret"], secrets={"Password": "hunter2 \u00e9"}))
    assert result["state"] == "accepted"
    dashboard.wait_for(lambda: dashboard.outputs.get(result["run"]))
    told = json.dumps(dashboard.payloads) + str(dashboard.outputs)
    assert "hunter2" not in told
    assert linked.text_of(result["run"]) == "<******> ******\n"
    assert "hunter2" not in linked.log()


WRONG = {   # what is changed -> a word of the reason
    "other host": ({"host": "b2" * 16}, "another host"),
    "other dashboard": ({"dash": "0" * 16}, "another dashboard"),
    "other keys": ({"key": "0" * 16}, "other keys"),
    "other user": ({"user": "somebody"}, "job does not exist"),
    "unknown job": ({"tag": "0" * 12}, "job does not exist"),
    "changed job": ({"job": "0" * 64}, "changed since"),
    "expired": ({"iat": 1_600_000_000_000, "exp": 1_600_000_300_000},
                "expired"),
    "future": ({"iat": 4_000_000_000_000, "exp": 4_000_000_300_000},
               "future"),
    "missing argument": ({"args": {"To": "x"}}, "arguments"),
    "unknown argument": ({"args": {"To": "x", "Times": "1", "Loud": "true",
                                   "More": "x"}}, "arguments"),
    "wrong int": ({"args": {"To": "x", "Times": "0x10", "Loud": "true"}},
                  "whole number"),
    "wrong bool": ({"args": {"To": "x", "Times": "1", "Loud": "True"}},
                   "expected true or false"),
    "control": ({"args": {"To": "x\x1b", "Times": "1", "Loud": "true"}},
                "control character"),
    "too long": ({"args": {"To": "x" * 4097, "Times": "1", "Loud": "true"}},
                 "longer than"),
    "a secret that is none": ({"secrets": {"To": "00"}}, "arguments"),
}


def test_mismatched_signed_request_is_refused_with_the_reason(
        linked, dashboard):
    spec = dashboard.specs()["Hello"]
    for what, (changes, word) in WRONG.items():
        result = ask(dashboard, request_for(spec, **{
            "args": {"To": "x", "Times": "1", "Loud": "true"}, **changes}))
        assert result["state"] == "refused", what
        assert word in result["reason"], (what, result)
        assert result["run"] is None
    for name, word in (("Backup", "@manual"), ("Terminal", "koitab run")):
        result = ask(dashboard, request_for(dashboard.specs()[name]))
        assert result["state"] == "refused" and word in result["reason"]
    assert linked.history() == []


def test_replayed_request_starts_no_run(linked, dashboard):
    """Not at once, nor after a restart, nor after kill -9."""
    body = request_for(dashboard.specs()["Plain"])
    first = ask(dashboard, body)
    assert first["state"] == "accepted"
    for number in (None, 15, 9):
        if number:
            linked.stop(number)
            linked.start()
        before = len(dashboard.results)
        dashboard.ask(text_of(body))
        dashboard.wait_for(lambda known=before: len(
            dashboard.results) > known)
        assert dashboard.results[-1]["run"] == first["run"]
        assert "used before" in dashboard.results[-1]["reason"]
    assert len(linked.ended()) == 1


def test_a_request_from_before_a_restored_backup_is_refused(koi, dashboard):
    koi.tab('"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(koi, dashboard.url)
    koi.start()
    body = request_for(dashboard.specs()["Plain"])
    koi.stop()
    database = koi.home / "history.db"
    copy = database.read_bytes()        # made before the request was used
    koi.start()
    assert ask(dashboard, body)["state"] == "accepted"
    koi.ended()
    koi.stop()
    for ending in ("", "-wal", "-shm"):
        (koi.home / f"history.db{ending}").unlink(missing_ok=True)
    (koi.home / "restored").write_bytes(copy)
    (koi.home / "restored").chmod(0o600)
    (koi.home / "restored").rename(database)
    koi.start()
    before = len(dashboard.results)
    dashboard.ask(text_of(body))
    dashboard.wait_for(lambda: len(dashboard.results) > before)
    assert dashboard.results[-1]["state"] == "refused"
    assert "too old" in dashboard.results[-1]["reason"]
    assert koi.history() == []


def test_mutated_and_replayed_requests_are_not_executed(linked, dashboard):
    """Through the whole way: dashboard, child, koid. (The verification
    itself meets 100,000 in test_koitab_keys.py.)"""
    rng, spec = random.Random(11), dashboard.specs()["Plain"]
    body = text_of(request_for(spec))
    mac = koitab.run_mac(KEY, body)
    raw, sent = body.encode(), 0
    with dashboard.turn:
        count = 2000 if support.FULL else 500
        for _ in range(count):
            at = rng.randrange(len(raw))
            data = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(7)]
                                    ) + raw[at + 1:]
            dashboard.requests.append({"body": data.decode(), "mac": mac})
            sent += 1
            if len(dashboard.requests) == 250:
                dashboard.turn.notify_all()
                dashboard.turn.wait_for(lambda: not dashboard.requests, 20)
        dashboard.requests += [
            {}, {"body": 7, "mac": mac}, {"body": body}, {"mac": mac},
            {"body": body, "mac": mac.upper()}, {"body": None, "mac": None}]
        dashboard.turn.notify_all()
    last = request_for(spec)
    assert ask(dashboard, last)["state"] == "accepted"
    assert [run["run"] for run in linked.ended()] == [
        dashboard.result(last["nonce"])["run"]]
    assert all(result["state"] == "refused" for result
               in dashboard.results if result["nonce"] != last["nonce"])
    assert len(linked.log()) < 20_000       # nor is the log flooded
    assert sent == count


def test_a_run_is_killed_only_by_a_signed_request(linked, dashboard):
    result = ask(dashboard, request_for(dashboard.specs()["Long"]))
    run, now = result["run"], int(time.time() * 1000)
    epoch = dashboard.payloads[-1]["epoch"]
    kill = {"v": 1, "do": "kill", "key": koitab.key_id(KEY), "dash": DASH,
            "host": HOST, "user": linked.user, "run": run, "epoch": epoch,
            "iat": now, "exp": now + 300_000}

    def told(**changes):
        return ask(dashboard, {**kill, "nonce": os.urandom(16).hex(),
                               **changes})

    for changes, word in (({"epoch": epoch + 1}, "not running"),
                          ({"run": run + 1}, "not running"),
                          ({"user": "somebody"}, "another user")):
        assert word in told(**changes)["reason"]
    assert told()["state"] == "accepted"
    run, = linked.ended()
    assert (run["signal"], run["reason"]) == (15, "killed from the dashboard")
    assert "not running" in told()["reason"]


def test_a_request_that_cannot_be_recorded_is_refused(koi, dashboard):
    """A full disk: nothing runs that could be forgotten, and run again."""
    koi.tab('"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(koi, dashboard.url)
    support.need("strace")
    koi.start(wrap=("strace", "-D", "-qq", "-o", "/dev/null", "-P",
                    f"{koi.home}/history.db-wal", "-e", "trace=pwrite64",
                    "-e", "inject=pwrite64:error=ENOSPC:when=40+"))
    spec, outcomes = dashboard.specs()["Plain"], []
    for _ in range(40):
        outcomes.append(ask(dashboard, request_for(spec)))
        if outcomes[-1]["state"] == "refused":
            break
    assert "recorded" in outcomes[-1]["reason"]


def test_request_starts_its_job_without_waiting_for_a_poll(linked, dashboard):
    """Asked of an idle koid; the figures are tests/bench/dashboard.py's."""
    spec = dashboard.specs()["Plain"]
    asked = time.time()
    result = ask(dashboard, request_for(spec))
    run = support.wait_until(lambda: linked.ended())[0]
    assert run["run"] == result["run"]
    assert run["started"] - asked < koitab.HOLD     # no poll has to end first


# --- a dashboard that is away, slow, lying, or mad

def answer(acked: int, missing: str = "[]", requests: str = "[]") -> tuple:
    return 200, {}, (f'{{"acked": {acked}, "missing_output": {missing}, '
                     f'"live": {{}}, "requests": {requests}}}').encode()


NONSENSE = {
    "not JSON": (200, {}, b"<html>bad gateway</html>"),
    "empty": (200, {}, b""),
    "a list": (200, {}, b"[]"),
    "fields of other types": (200, {}, json.dumps({
        "acked": "1", "missing_output": {}, "live": [],
        "requests": 7}).encode()),
    "deep": (200, {}, b"[" * 100_000),
    "a huge number": (200, {}, b'{"acked": 1' + b"0" * 5000 + b"}"),
    "cut": (200, {}, b'{"acked": 1, "missing_output": ['),
    "502": (502, {}, b"<html>"), "500": (500, {}, b""),
    "507": (507, {}, b'{"error": "the disk is full"}'),
    "426": (426, {}, b""), "429": (429, {"Retry-After": "1"}, b"{}"),
    "a redirect": (302, {"Location": "http://127.0.0.1:1/steal"}, b""),
    "hang up": "hang up",
    "keeps nothing": answer(0),
    "always wants more": answer(99, "[[1, 0]]"),
    "a flood of requests": answer(99, "[]", json.dumps(
        [{"body": "{}", "mac": "0" * 64}] * 101)),
}


@pytest.fixture
def hasty(koi):
    """A koid whose link tries again at once; all else is the same."""
    return koi.set_constants(PAUSE_FIRST=0.02, PAUSE_LONGEST=0.05, HOLD=0.5)


def test_invalid_replies_are_reported_and_jobs_continue_and_no_run_is_lost(
        hasty):
    now = {"what": "not JSON", "met": 0}

    def twist(_payload, _handler):
        now["met"] += 1
        return NONSENSE.get(now["what"])

    hasty.tab('"Plain" @manual echo plain\n')
    with lying_dashboard.Dashboard(twist) as dashboard:
        lying_dashboard.join_dashboard(hasty, dashboard.url)
        hasty.start()
        chosen = support.sample(NONSENSE, "deep", "502", "a redirect",
                                "hang up", "a flood of requests")
        for what in chosen:
            now.update(what=what, met=0)
            met = support.wait_until(lambda: now["met"] > 3, what=what)
            assert hasty.run("Plain")[1] == b"plain\n", what
            assert met and support.wait_until(lambda: hasty.ask("status")[
                "dashboard"]["problems"], what=what)
        now["what"] = ""
        dashboard.wait_for(lambda: len(dashboard.outputs) == len(chosen))
        assert dashboard.order == sorted(set(dashboard.order))
        support.wait_until(lambda: not hasty.ask("status")["dashboard"][
            "problems"], 30, "the trouble to be over")


@pytest.mark.parametrize("status, words", [
    (401, "this host is not a member"), (403, "this host was refused"),
    (409, "duplicate host ID")])
def test_agent_refused_by_the_dashboard_stops_polling(koi, status, words):
    asked = []

    def twist(payload, _handler):
        asked.append(payload)
        return status, {}, b'{"error": "no"}'

    koi.tab('"Plain" @manual echo plain\n')
    with lying_dashboard.Dashboard(twist) as dashboard:
        lying_dashboard.join_dashboard(koi, dashboard.url)
        koi.start()
        support.wait_until(lambda: words in " ".join(koi.ask("status")[
            "dashboard"]["problems"]))
        assert koi.run("Plain")[1] == b"plain\n"
        assert len(asked) <= 2              # one a thread, then minutes


def test_jobs_run_without_a_dashboard_and_their_runs_are_sent_later(koi):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    koi.tab('"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(koi, f"http://127.0.0.1:{port}")
    koi.start()
    for _ in range(3):
        koi.run("Plain")
    problems = support.wait_until(
        lambda: koi.ask("status")["dashboard"]["problems"])
    assert len(problems) == 1 and re.fullmatch(
        rf"down since 2\S+: http://127\.0\.0\.1:{port}: connection refused "
        r"\(next try at 2\S+\)", problems[0]), problems
    assert koi.log().count("connection refused") == 1


def test_dashboard_that_never_answers_does_not_delay_jobs(koi):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        koi.tab('"Plain" @manual echo plain\n')
        lying_dashboard.join_dashboard(koi, "http://127.0.0.1:%d"
                          % silent.getsockname()[1])
        koi.start()
        first, _ = silent.accept()
        assert koi.run("Plain")[1] == b"plain\n"
        first.close()


def test_record_that_is_always_refused_is_skipped_and_the_rest_are_sent(hasty):
    koi = hasty

    def twist(payload, _handler):
        if any(record["run"] == 2 for record in payload.get("records", ())):
            return 400, {}, b'{"error": "I do not like it"}'

    koi.tab('"Plain" @manual echo plain\n')
    koi.start()
    for _ in range(4):
        koi.run("Plain")
    with lying_dashboard.Dashboard(twist) as dashboard:
        lying_dashboard.join_dashboard(koi, dashboard.url)
        koi.ask("relink")
        dashboard.wait_for(lambda: {1, 3, 4} <= set(dashboard.outputs), 30)
        assert 2 not in dashboard.records
        assert "run 2" in " ".join(koi.ask("status")["dashboard"]["problems"])


def test_refused_job_list_does_not_cause_records_to_be_skipped(hasty):
    """A proxy, say, that lets only short payloads through."""
    def twist(payload, _handler):
        if "list" in payload:
            return 413, {}, b"<html>too large"

    hasty.tab('"Plain" @manual echo plain\n')
    hasty.start()
    for _ in range(6):
        hasty.run("Plain")
    with lying_dashboard.Dashboard(twist) as dashboard:
        lying_dashboard.join_dashboard(hasty, dashboard.url)
        hasty.ask("relink")
        dashboard.wait_for(lambda: set(range(1, 7)) <= set(
            dashboard.records), 30)
        assert "left out" not in hasty.log()
        assert "413" in " ".join(support.wait_until(lambda: hasty.ask(
            "status")["dashboard"]["problems"]))


def test_dashboard_restored_from_a_backup_gets_all_records_again(
        linked, dashboard):
    for _ in range(3):
        linked.run("Plain")
    dashboard.wait_for(lambda: len(dashboard.outputs) == 3)
    with dashboard.turn:            # it was restored from a backup
        dashboard.acked, dashboard.records, dashboard.outputs = 0, {}, {}
        dashboard.lists.clear()
        dashboard.followed["999"] = 0        # so that it answers at once
        dashboard.turn.notify_all()
    dashboard.wait_for(lambda: len(dashboard.outputs) == 3
                       and dashboard.lists)


# --- the child


def child_of(koi) -> int:
    return support.wait_until(
        lambda: support.children_of(koi.daemon.pid), what="the child")[0]


def test_killed_agent_is_restarted(linked, dashboard):
    dashboard.specs()
    before = child_of(linked)
    os.kill(before, 9)
    support.wait_until(lambda: not koitab.process_start_time(before))
    result = ask(dashboard, request_for(dashboard.specs()["Plain"]))
    assert result["state"] == "accepted"
    assert child_of(linked) != before


def test_frozen_agent_is_replaced_and_reported(linked, dashboard):
    """Its parent alone sees that a process was stopped."""
    linked.stop()
    linked.set_constants(AGENT_SILENCE=2.0, RESTART_FIRST=3.0).start()
    frozen = child_of(linked)
    os.kill(frozen, signal.SIGSTOP)
    problem = support.wait_until(lambda: linked.ask("status")["dashboard"][
        "problems"], 30)
    assert problem == ["agent gave no sign of life for 2s; restarting in 3s"]
    assert f"dashboard: {problem[0]}\n" in linked.log()
    assert not koitab.process_start_time(frozen)
    assert child_of(linked) != frozen


def test_agent_without_a_reachable_dashboard_reports_to_koid(koi):
    """It reports in each pause between tries, however long that is."""
    koi.patch += f"""
text = k.agent_program().replace("PAUSE_FIRST, PAUSE_LONGEST = 1.0, 60.0",
    "PAUSE_FIRST, PAUSE_LONGEST = 0.1, 9.0").replace("HOLD = 25", "HOLD = 0.1")
assert "HOLD = 0.1" in text and "= 0.1, 9.0" in text
k.agent_program = lambda *names: text
heard, answer = [], k.AgentBroker.state
def counted(self, request):
    heard.append(request)
    if len(heard) == 40:
        open({str(koi.folder / "alive")!r}, "w").close()
    return answer(self, request)
k.AgentBroker.state = counted
"""
    lying_dashboard.join_dashboard(koi, "http://127.0.0.1:9")
    koi.start()
    support.wait_until((koi.folder / "alive").exists, 30)


def test_agent_pauses_for_less_than_the_limit_of_koid():
    assert koitab.HOLD + koitab.PATIENCE + 30 == koitab.AGENT_SILENCE


def test_agent_ends_with_koid(linked, dashboard):
    dashboard.specs()
    child = child_of(linked)
    linked.stop(9)
    support.wait_until(lambda: not koitab.process_start_time(child))


def memory_of(pid: int) -> bytes:
    """What the process has in its memory, but for what it cannot change."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem",
                                                 "rb", 0) as memory:
        for line in maps:
            place, rights, *_ = line.split()
            start, end = (int(part, 16) for part in place.split("-"))
            if rights.startswith("rw"):
                memory.seek(start)
                with contextlib.suppress(OSError):      # [vvar]
                    found.append(memory.read(end - start))
    return b"".join(found)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, value in (
        line.split(":", 1) for line in lines)}


@support.root_only
def test_agent_is_a_fresh_process_that_has_no_rights(linked, dashboard):
    support.need_capability("CAP_SYS_PTRACE")       # to see what it holds
    dashboard.specs()
    child = child_of(linked)
    status, uid = status_of(child), os.geteuid() or koitab.AGENT_UID
    assert status["Name"] == "koi-agent"
    assert status["Uid"] == " ".join([str(uid)] * 4)
    assert status["NoNewPrivs"] == "1"
    assert {status[f"Cap{kind}"] for kind in (
        "Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    limits = Path(f"/proc/{child}/limits").read_text()
    for name, most in (("Max file size", 0), ("Max core file size", 0),
                       ("Max open files", 16), ("Max processes", 64)):
        assert re.search(f"^{name} +{most} +{most} ", limits, re.M), limits
    assert Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[1:] == [
        b"-IS", b"-", b"koi-agent", b""]
    variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    assert {each.partition(b"=")[0] for each in variables if each} == {
        b"PATH", b"LANG"}
    held = {os.readlink(f"/proc/{child}/fd/{fd}").partition(":")[0]
            for fd in os.listdir(f"/proc/{child}/fd")}
    assert held == {"/memfd", os.devnull, "socket"}


@support.root_only
def test_host_key_is_in_the_memory_of_koid_and_not_of_the_agent(
        linked, dashboard):
    """A fork of koid's would have both, and koid's code."""
    support.need_capability("CAP_SYS_PTRACE")
    dashboard.specs()
    koids, agents = map(memory_of, (linked.daemon.pid, child_of(linked)))
    assert KEY not in agents
    for secret in (KEY.hex().encode(), b"adopt_orphans"):
        assert secret in koids and secret not in agents
    for known in (lying_dashboard.TOKEN.encode(), b"missing_output"):
        assert known in agents


def test_agent_reports_when_the_dashboards_certificate_expires(koi, dashboard):
    certificate = servers.certificate(koi.folder)
    dashboard.socket = certificate.context().wrap_socket(
        dashboard.socket, server_side=True)
    end = subprocess.run(
        ["openssl", "x509", "-noout", "-enddate", "-in", certificate.cert],
        stdout=subprocess.PIPE, check=True).stdout.decode()
    expires = ssl.cert_time_to_seconds(end.strip().partition("=")[2])
    koi.tab('"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(
        koi, dashboard.url.replace("http:", "https:"),
        ca=Path(certificate.cert).read_text())
    koi.start()
    sent = dashboard.payloads
    dashboard.wait_for(lambda: sent and sent[-1].get(
        "certificate_expires") == expires, what=f"the expiry {expires}")
    assert "certificate_expires" not in sent[0]       # not known yet


def test_agent_ends_when_the_host_leaves_the_dashboard(linked, dashboard):
    dashboard.specs()
    child = child_of(linked)
    (linked.home / "keys").unlink()
    assert not linked.ask("relink")["linked"]
    support.wait_until(lambda: not koitab.process_start_time(child))
    assert linked.ask("status")["dashboard"] is None
    assert linked.run("Plain")[1] == b"plain\n"


@pytest.mark.parametrize("spoil, why", [
    (lambda path: path.chmod(0o644), "0600"),
    (lambda path: path.write_text(""), "not used"),
    (lambda path: path.write_text('{"v": 1}'), "missing"),
    (lambda path: path.write_text(path.read_text()[:-9]), "not used"),
    (lambda path: path.write_text(path.read_text().replace(
        '"v": 1', '"v": 2')), "version")])
def test_untrusted_key_file_is_not_used(koi, dashboard, spoil, why):
    koi.tab('"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(koi, dashboard.url)
    spoil(koi.home / "keys")
    koi.start()
    state = koi.ask("status")
    assert why in " ".join(state["problems"]) and state["dashboard"] is None
    assert koi.run("Plain")[1] == b"plain\n" and dashboard.payloads == []


# --- a child that is ours no more

HOSTILE = """
import json, os, select, signal, socket, time

def run_agent():
    connection = socket.socket(fileno=3)
    try:
{deeds}
        end = select.poll()
        end.register(connection, 0)
        end.poll(60_000)        # until koid closes it
    finally:
        os._exit(0)
"""
QUESTION = 'json.dumps({"op": "batch", "after": 0, "most": 200, ' \
    '"list_sha": ""}).encode() + b"\\n"'


class Hostile(support.Koi):
    """A koid whose child was taken over, and does this."""

    def begin(self, deeds: str, tab: str = '"Plain" @manual echo plain\n'):
        program = HOSTILE.format(deeds=textwrap.indent(deeds, " " * 8))
        self.patch += "k.RESTART_FIRST, k.RESTART_LONGEST = 0.1, 1.0\n" \
            f"k.agent_program = lambda *names: {program!r}\n"
        self.tab(tab)
        lying_dashboard.join_dashboard(self, "http://127.0.0.1:9")
        self.start()


@pytest.fixture
def hostile(tmp_path):
    koi = Hostile(tmp_path)
    yield koi
    koi.stop(9)
    koi.end_jobs()


@pytest.mark.parametrize("said", [
    r'b"x\n"', r'b"[]\n"', r'b"\xff\n"', r'b"\n" * 200_000',
    r'b"[" * 100_000 + b"\n"', 'b"x" * 9_000_000',
    r"""b'{"op": ["batch"]}\n'""",
    r"""b'{"op": "output", "run": "x", "at": 0}\n'"""])
def test_agent_is_restarted_after_an_invalid_request(hostile, said):
    hostile.begin(f"connection.sendall({said})")
    first = child_of(hostile)
    support.wait_until(lambda: not koitab.process_start_time(first))
    support.wait_until(lambda: child_of(hostile) != first)
    assert hostile.run("Plain")[1] == b"plain\n"
    assert support.processor_seconds(hostile.daemon.pid) < 2
    assert len(hostile.log()) < 5000


def test_agent_that_reads_no_replies_does_not_fill_the_memory(hostile):
    """Its questions are short, and the answers are not."""
    tab = "".join(f'"Job {n}" @manual echo {"x" * 900}\n'
                  for n in range(1000)) + '"Plain" @manual echo plain\n'
    hostile.begin("while True: connection.sendall(" + QUESTION + " * 500)",
                  tab)
    before = support.megabytes_of(hostile.daemon.pid)
    support.wait_until(lambda: hostile.log().count("restarting in") > 2)
    assert hostile.run("Plain")[1] == b"plain\n"
    assert support.megabytes_of(hostile.daemon.pid) < before + 60


def test_two_causes_of_one_outage_are_one_problem_and_one_line(hostile):
    hostile.begin("""\
lines = connection.makefile("rb")
for step, problem, retry in (("poll", "no answer in time", 9e9),
                             ("send", "connection refused", 5),
                             ("agent", "all said", 0)):
    connection.sendall(json.dumps({"op": "state", "about": step,
        "problem": problem, "retry": retry}).encode() + b"\\n")
    while lines.readline() == b'{"news": 1}\\n':
        pass
lines.read()        # or koid would miss it, which is another problem
""")
    support.wait_until(lambda: "all said" in hostile.log())
    outage, last = hostile.ask("status")["dashboard"]["problems"]
    assert "no answer in time (next" in outage and last == "all said"
    assert "connection refused" not in hostile.log()


def test_agent_that_reads_no_reply_costs_koid_no_cpu_time(hostile):
    tab = "".join(f'"Job {n}" @manual echo {"x" * 900}\n'
                  for n in range(1000)) + '"Plain" @manual echo plain\n'
    hostile.begin(f"connection.sendall({QUESTION})\n"
                  "while len(connection.recv(999, socket.MSG_PEEK)) < 999:\n"
                  "    time.sleep(0.01)     # until the answer has begun\n"
                  "connection.sendall(b'x')", tab)
    support.wait_until_idle(child_of(hostile))
    support.wait_until_idle(hostile.daemon.pid)
    assert hostile.run("Plain")[1] == b"plain\n"


def test_agent_with_ever_new_problems_fills_neither_log_nor_memory(hostile):
    count = 20_000 if support.FULL else 4000
    hostile.begin(f"""\
lines = connection.makefile("rb")
for n in range({count}):
    connection.sendall(json.dumps({{
        "op": "state", "about": "send", "problem": f"no {{n}}",
        "sent": n % 2}}).encode() + b"\\n")
    while lines.readline() == b'{{"news": 1}}\\n':
        pass""", '"Plain" @manual echo plain\n"Other" @manual echo other\n')
    for _ in range(2):
        hostile.run("Plain")
    before = support.megabytes_of(hostile.daemon.pid)
    support.wait_until(lambda: f": no {count - 1} (" in " ".join(
        hostile.ask("status")["dashboard"]["problems"]), 30)
    assert len(hostile.log()) < 5000
    assert support.megabytes_of(hostile.daemon.pid) < before + 3


def test_agent_that_ignores_signals_is_killed_for_new_keys(hostile, dashboard):
    """New keys get a new agent, whatever the old one is doing."""
    hostile.begin("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))")
    first = child_of(hostile)
    lying_dashboard.join_dashboard(hostile, dashboard.url)
    assert hostile.ask("relink")["linked"]
    support.wait_until(lambda: not koitab.process_start_time(first))
    assert support.wait_until(lambda: child_of(hostile) != first)


# --- an upgrade

UPGRADED = """\
KOI_TIMEOUT=1h
"Slow" @manual echo begun; until [ -e {gate} ]; do sleep 0.05; done; \
echo ended; exit 8
"Plain" @manual echo plain
"""


def agent_of(koi) -> int:
    """The pid of koid's agent; its other children are supervisors."""
    for pid in support.children_of(koi.daemon.pid):
        # A child may end between the two looks.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if status_of(pid)["Name"] == "koi-agent":
                return pid
    return 0


def koitab_on(koi, *args: str) -> support.Result:
    done = subprocess.run(
        koi.command(*args), env=koi.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    return support.Result(done.returncode, done.stdout.decode(),
                          done.stderr.decode())


@pytest.fixture
def upgraded(koi, dashboard):
    """A koid with a history, a running job and an agent, whose file was then
    replaced by another version; `koi.slow` and `koi.plain` are its runs."""
    program, new = koi.folder / "koitab.py", koi.folder / "new.py"
    text = (support.ROOT / "koitab.py").read_text()
    version = f'VERSION = "koitab", "{koitab.VERSION}"'
    assert version in text
    program.write_text(text)
    new.write_text(text.replace(version, 'VERSION = "koitab", "77.7"'))
    koi.command = lambda *args: [koi.python, "-IS", str(program), *args]
    koi.gate = koi.folder / "gate"
    koi.tab(UPGRADED.format(gate=koi.gate))
    lying_dashboard.join_dashboard(koi, dashboard.url)
    koi.start()
    koi.plain, koi.slow = koi.run("Plain")[0], koi.launch("Slow")
    koi.running(koi.slow)
    support.wait_until(lambda: agent_of(koi), what="the agent")
    new.replace(program)
    yield koi
    koi.gate.touch()


def test_upgrade_keeps_tab_keys_history_and_the_running_job(upgraded,
                                                            dashboard):
    koi, keys = upgraded, upgraded.home / "keys"
    before = koi.ask("list")["text"], keys.read_bytes(), koi.row(koi.plain)
    koi.stop()
    koi.start()
    assert koi.ask("status")["version"] == "77.7"
    assert before == (koi.ask("list")["text"], keys.read_bytes(),
                      koi.row(koi.plain))
    assert koi.row(koi.slow)["state"] == "running"
    koi.gate.touch()
    assert koi.end_of(koi.slow)["exit"] == 8
    koi.ask("log", run=koi.slow)
    assert b"".join(data for _, _, data in koitab.read_frames(
        koi.output)) == b"begun\nended\n"
    assert [row["run"] for row in koi.history(job="Slow")] == [koi.slow]
    dashboard.wait_for(lambda: dashboard.records.get(
        koi.slow, {}).get("state") == "done", what="the record")
    assert dashboard.payloads[-1]["version"] == "77.7"


def test_koitab_of_the_new_version_talks_to_the_old_koid(upgraded):
    assert upgraded.ask("status")["version"] == koitab.VERSION
    assert koitab_on(upgraded, "run", "Plain").out == "plain\n"
    for args in (["-l"], ["history"], ["log", "Plain"], ["next"],
                 ["status"]):
        done = koitab_on(upgraded, *args)
        assert (done.code, done.err) == (0, ""), args
    with pytest.raises(koitab.Error, match="unknown request"):
        upgraded.ask("of a later version")


@support.root_only
def test_old_koid_restarts_its_agent_by_the_text_of_its_start(upgraded):
    support.need_capability("CAP_SYS_PTRACE")
    first = agent_of(upgraded)
    os.kill(first, 9)
    again = support.wait_until(lambda: agent_of(upgraded) not in (0, first)
                               and agent_of(upgraded), what="the agent")
    program = Path(f"/proc/{again}/fd/0").read_text()
    assert "class SyncAgent" in program and "77.7" not in program


# --- what else is kept, or not


def test_request_replayed_on_a_full_disk_does_not_end_koid(koi, dashboard):
    """What was used could not be written, so nobody knows it: what is asked
    for again must not become a second row of the same."""
    support.need("strace")
    koi.tab('"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(koi, dashboard.url)
    koi.start(wrap=("strace", "-D", "-qq", "-o", "/dev/null", "-P",
                    f"{koi.home}/history.db-wal", "-e", "trace=pwrite64",
                    "-e", "inject=pwrite64:error=ENOSPC:when=40..60"))
    spec, body = dashboard.specs()["Plain"], None
    while not body or dashboard.result(body["nonce"])[
            "state"] == "accepted":
        body = request_for(spec)
        dashboard.ask(text_of(body))
    for _ in range(40):
        before = len(dashboard.results)
        dashboard.ask(text_of(body))
        dashboard.wait_for(lambda known=before: len(
            dashboard.results) > known)
        if dashboard.results[-1]["state"] == "accepted":
            break
    assert dashboard.results[-1]["state"] == "accepted", \
        dashboard.results
    run = dashboard.results[-1]["run"]
    assert koi.daemon.poll() is None, koi.log()
    for _ in range(3):      # and again, now that it is known
        before = len(dashboard.results)
        dashboard.ask(text_of(body))
        dashboard.wait_for(lambda known=before: len(
            dashboard.results) > known)
        assert dashboard.results[-1]["run"] == run


def test_host_that_left_keeps_only_the_runs_of_koi_keep(koi, dashboard):
    koi.tab('KOI_KEEP=2\n"Plain" @manual echo plain\n')
    lying_dashboard.join_dashboard(koi, dashboard.url)
    koi.start()
    dashboard.specs()
    (koi.home / "keys").unlink()
    koi.ask("relink")
    for _ in range(5):
        koi.run("Plain")
    assert len(koi.ended(count=2)) == 2
    koi.stop()
    koi.start()
    for _ in range(3):
        koi.run("Plain")
    assert len(koi.ended(count=2)) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, json.dumps({
    "v": 1, **vars(lying_dashboard.enrollment("http://127.0.0.1:9")),
    "since": "today"})])
def test_damaged_key_file_stops_no_job(koi, text):
    koi.tab('"Plain" @manual echo plain\n')
    (koi.home / "keys").write_text(text)
    (koi.home / "keys").chmod(0o600)
    koi.start()
    assert "keys: not used" in " ".join(koi.ask("status")["problems"])
    assert koi.run("Plain")[1] == b"plain\n"

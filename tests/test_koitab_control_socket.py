"""Jobs and ControlSocket: requests, callers, arguments, trusted files."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections import Counter
from types import SimpleNamespace

import pytest

import support

koitab = support.load("koitab")
Error = koitab.Error
ME = os.geteuid()
OTHER = 4_000_000_001           # a uid that is neither ours nor root's


class Host(koitab.Machine):
    """A machine with users that the test chooses, none excluded."""

    NAMES = ("alice", "mallory", "root")
    shut_out = ""

    def account(self, name):
        return koitab.Account(name, 1500, 1500, f"/home/{name}", [1500]) \
            if name in self.NAMES else None

    def user_name(self, uid):
        return "alice" if uid == ME else ""

    def access_error(self, user):
        return self.shut_out if user != "root" else ""


def admin(name: str = "alice"):
    return koitab.Caller(ME, name)


def other_user(name: str = "mallory"):
    return koitab.Caller(OTHER, name)


@pytest.fixture
def desk(tmp_path):
    """A desk where no koid runs: alice has two jobs."""
    home = tmp_path / "koi"
    (home / "tabs").mkdir(parents=True)
    for path in (home, home / "tabs"):
        path.chmod(0o700)
    tab = home / "tabs" / "alice"
    tab.write_text('[Night]\n"Hers" @manual echo {{A, string, x}}\n'
                   '0 3 * * * true\n')
    tab.chmod(0o600)
    host = Host()
    book = koitab.TabRegistry(host, str(home), False)
    book.load()
    store = koitab.RunStore(str(home / "history.db"))
    store.open()
    scheduler = SimpleNamespace(
        running_counts=dict, late=lambda user: [],
        problems_of=lambda user: [],
        kill=lambda run, why: False)
    daemon = SimpleNamespace(scheduler=scheduler, started=0.0,
                             reload=book.load)
    yield koitab.ControlService(host, str(home), book, store, daemon)
    store.db.close()


def add_runs(desk, user: str, count: int) -> None:
    """Add `count` runs of one job."""
    duty = desk.registry.scheduled_jobs[0]
    key = desk.store.job_key((user, duty.identity), duty.job)
    assert desk.store.write([
        desk.store.insert({"job": key, "trigger": "manual", "state": "done",
                           "exit": 0, "started": 1.0})
        for _ in range(count)])


# Whose tab a line is in ------------------------------------------------------


def registry(*files: tuple[str, str, str]):
    """Return the registry of a host that serves cron's files too, from path,
    user ("": a system tab) and text of each tab."""
    host = Host()
    host.tab_files = lambda home, system, known: [
        koitab.TabFile(path, user, (text,), text)
        for path, user, text in files]
    found = koitab.TabRegistry(host, "/koi", True)
    found.load()
    return found


SPOOL, KOITAB = "/var/spool/cron/crontabs/alice", "/koi/tabs/alice"


def test_braces_are_plain_text_in_crontabs_of_cron():
    found = registry(
        (KOITAB, "alice", "@daily a {{N, int, 1}}\n"),
        ("/etc/cron.d/x", "", "@daily root b {{N, int, 1}}\n"),
        (SPOOL, "alice", "@daily c {{N, int, 1}}\n"))
    assert found.problems == []
    assert {each.job.script for each in found.scheduled_jobs} == {
        'a "${KOI_ARG_1}"', "b {{N, int, 1}}", "c {{N, int, 1}}"}


def test_equal_lines_of_one_file_and_of_two_system_tabs_all_run():
    line = "* * * * * root x\n"
    found = registry(
        (SPOOL, "alice", "MODE=a\n@daily x\nMODE=b\n@daily x\n@daily x\n"),
        ("/etc/cron.d/siteA", "", f"WHO=x\n{line}"),
        ("/etc/cron.d/siteB", "", f"WHO=y\n{line}"))
    assert found.problems == []
    assert len(found.scheduled_jobs) == len(
        {each.key for each in found.scheduled_jobs}) == 5
    assert {each.job.tag for each in found.scheduled_jobs} == {
        koitab.short_hash(each.identity) for each in found.scheduled_jobs}


def test_line_in_both_a_tab_and_the_spool_runs_once():
    found = registry((KOITAB, "alice", "@daily x\n"),
                     (SPOOL, "alice", "@daily x\n@daily y\n"))
    assert [each.job.command for each in found.scheduled_jobs] == ["x", "y"]
    assert found.problems == [f"{SPOOL}:1: not used: the same job is in "
                              f"{KOITAB}:1"]


def test_next_start_is_correct_at_any_time_and_cached():
    """The next 29 February takes long to find, and 9,999 of them longer."""
    found = registry((KOITAB, "alice", "*/7 * * * * x\n0 0 29 2 * y\n"))
    often, seldom = found.scheduled_jobs
    now = 1_795_348_800         # 2026-11-22 12:00:00 UTC
    for step in (0, 1, 419, 420, 421, -1, 840, -86_400, 86_400 * 900):
        for each in (often, seldom):
            assert found.next_start(each, now + step) == each.schedule.next(
                now + step, found.zones[""])
    due = found.next_start(seldom, now)
    seldom.schedule = SimpleNamespace(next=None)
    assert found.next_start(seldom, now + 86_400) == due


# Whose jobs a dashboard gets -------------------------------------------------


def listed(registry) -> tuple:
    """Return how many jobs of each user are in the list for a dashboard, the
    bytes of all, and who has more."""
    broker = SimpleNamespace(registry=registry, enrollment=SimpleNamespace(
        secret=bytes(32)))
    texts, cut = koitab.AgentBroker.share_list(broker, "root")
    users = [json.loads(text)["user"] for text in texts]
    assert len(broker.scheduled_jobs) == len(texts)
    assert not texts or users[0] == "root"
    return Counter(users), sum(map(len, texts)), cut


def many(count: int, size: int = 10, text: str = "x") -> str:
    return "".join(f'"{n}" @manual echo {text * size}\n'
                   for n in range(count))


def test_dashboard_list_has_all_jobs_of_root_and_a_share_for_each_user():
    """A tab of a user's displaces neither the jobs of root nor of others."""
    alice, bob = ("/koi/tabs/alice", "alice"), ("/koi/tabs/bob", "bob")
    counts, _, cut = listed(registry(
        (*alice, many(9990)), (*bob, many(3)),
        ("/koi/tabs/root", "root", many(700))))
    assert dict(counts) == {
        "root": 700, "alice": 500, "bob": 3}
    assert cut == {"alice"}
    # Four times as long in the list as in the tab.
    counts, size, cut = listed(registry(
        (*alice, many(900, 800, "\\")), (*bob, many(3)),
        ("/koi/tabs/root", "root", many(2))))
    assert counts["root"] == 2 and counts["bob"] == 3 and cut == {"alice"}
    assert counts["alice"] > 10 and size < koitab.BYTES_OF_USER


def test_many_users_share_the_room_in_the_dashboard_list():
    tabs = [(f"/koi/tabs/user{n}", f"user{n}", many(60, 40_000))
            for n in range(5)]
    counts, size, cut = listed(registry(
        *tabs, ("/koi/tabs/root", "root", many(40, 40_000))))
    assert counts["root"] == 40 and size < koitab.BYTES_OF_LIST
    assert set(counts) - {"root"} == cut == {tab[1] for tab in tabs}
    assert len({counts[user] for user in cut}) == 1


def test_label_of_a_long_line_is_cut(desk):
    desk.registry.scheduled_jobs[:] = registry(
        (KOITAB, "alice", f"@daily echo {'x' * 90_000}\n")).scheduled_jobs
    add_runs(desk, "alice", 1)
    reply = desk.answer(admin(), {"op": "history"})
    assert len(reply[0]["runs"][0]["label"]) == koitab.LONGEST_LABEL


def test_problem_of_one_user_is_not_shown_to_others(desk):
    log = koitab.DaemonLog(desk.machine)
    log.set_problem("list alice", "too many")
    log.set_problem("disk", "full")
    scheduler = SimpleNamespace(log=log, home="/koi", registry=desk.registry)
    for user, shown in (("", ["too many", "full"]), ("bob", ["full"]),
                        ("alice", ["too many", "full"])):
        assert koitab.Scheduler.problems_of(scheduler, user) == shown


# A request is what it should be ----------------------------------------------


@pytest.mark.parametrize("line", [
    b"", b"garbage", b"null", b"[]", b'"x"', b"5", b"{", b"{}x",
    b'{"op": "list"}{}', b"\xff\xfe", b"[" * 100_000,
    b'{"a":' * 100_000, b'{"run": ' + b"9" * 1_000_000 + b"x}"])
def test_line_that_is_not_a_json_object_is_an_invalid_request(line):
    with pytest.raises(Error, match="invalid request"):
        koitab.parse_line(line)


def test_bytes_that_are_not_utf_8_are_preserved():
    request = koitab.parse_line(b'{"text": "caf\xe9"}')
    assert request["text"].encode("utf-8", "surrogateescape") == b"caf\xe9"


@pytest.mark.parametrize("op", [
    None, 5, "", "fly", "LIST", "list ", ["list"], {"op": "list"}, True,
    "answer", "__class__", "run"])
def test_unknown_operation_is_refused(desk, op):
    with pytest.raises(Error, match="unknown request"):
        desk.answer(admin(), {"op": op})


WRONG = [None, 5, 1.5, True, False, [], {}, ["x"], {"a": 1}, "x", "", "5",
         -1, 2**63, -2**63 - 1, 10**30]
RIGHT = {
    "user": ["x", "", "5"], "text": ["x", "", "5"], "job": ["x", "", "5"],
    "run": [5, -1], "limit": [5, -1], "before": [5, -1],
    "args": [{}, {"a": 1}]}


@pytest.mark.parametrize("field", RIGHT)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_field_of_another_type_is_refused(desk, monkeypatch, field, value):
    """null is not a string; true, and what SQLite cannot store, not a number.
    """
    monkeypatch.setitem(koitab.OPERATIONS, "list", lambda *_: {"ok": 1})
    right = any(value == good and type(value) is type(good)
                for good in RIGHT[field])
    request = {"op": "list", field: value}
    if right:
        assert desk.answer(admin(), request) == ({"ok": 1}, b"")
    else:
        with pytest.raises(Error, match=f"{field} has the wrong type"):
            desk.answer(admin(), request)


def test_unknown_fields_are_ignored(desk):
    reply, rest = desk.answer(admin(), {"op": "list", "uid": 0, "x": [1]})
    assert reply["text"].startswith("[Night]") and rest == b""


@pytest.mark.parametrize("limit, rows", [
    (None, 100), (0, 100), (1, 1), (250, 250), (1_200, 1_000),
    (2**40, 1_000)])
def test_reply_has_at_most_a_thousand_rows_of_history(desk, limit, rows):
    add_runs(desk, "alice", 1_200)
    request = {"op": "history"}
    if limit is not None:
        request["limit"] = limit
    assert len(desk.answer(admin(), request)[0]["runs"]) == rows


@pytest.mark.parametrize("limit", [-1, -5, -2**62])
def test_history_is_limited_for_any_value_of_limit(desk, limit):
    """To SQLite a negative one is."""
    add_runs(desk, "alice", 1_200)
    try:
        reply, _ = desk.answer(admin(), {"op": "history", "limit": limit})
    except Error:
        return
    assert len(reply["runs"]) <= koitab.MOST_ROWS


def test_tab_that_is_too_long_is_refused_before_it_is_parsed(
        desk, monkeypatch):
    monkeypatch.setattr(koitab, "parse_tab", lambda *_, **__: 1 / 0)
    with pytest.raises(Error, match="larger than"):
        desk.answer(admin(), {"op": "install", "text": "x" * (2**20 + 1)})


# Whose is it? ----------------------------------------------------------------

MUST = "must be privileged"
NO_USER = "unknown"


@support.root_only      # whose koid serves more than one user
@pytest.mark.parametrize("caller, user, whose, mine", [
    (koitab.Caller(0, "root"), None, "root", ""),
    (koitab.Caller(0, "root"), "", "root", ""),
    (koitab.Caller(0, "root"), "alice", "alice", "alice"),
    (koitab.Caller(0, "root"), "ghost", NO_USER, "ghost"),
    (koitab.Caller(0, "root"), "../x", NO_USER, "../x"),
    (other_user("mallory"), None, "mallory", "mallory"),
    (other_user("mallory"), "", "mallory", "mallory"),
    (other_user("mallory"), "mallory", "mallory", "mallory"),
    (other_user("mallory"), "alice", MUST, MUST),
    (other_user("mallory"), "root", MUST, MUST),
    (other_user("mallory"), "../x", MUST, MUST),
    (other_user("ghost"), None, NO_USER, "ghost"),
    # userdel, a container, a service: a uid without a name is not everyone.
    (other_user(""), None, "no name", "no name"),
    (other_user(""), "", "no name", "no name"),
    (other_user(""), "alice", MUST, MUST),
])
def test_user_may_name_only_their_own_account_and_root_any(
        desk, caller, user, whose, mine):
    request = {} if user is None else {"user": user}
    for ask, expected in ((desk.whose, whose), (desk.allowed_user, mine)):
        if expected in (MUST, NO_USER, "no name"):
            with pytest.raises(Error, match=expected):
                ask(caller, request)
        else:
            assert ask(caller, request) == expected


@pytest.mark.parametrize("user, whose", [
    (None, "alice"), ("alice", "alice"),
    ("mallory", "runs as an ordinary user"),
    ("root", "runs as an ordinary user")])
def test_koid_of_an_ordinary_user_serves_only_that_user(
        desk, monkeypatch, user, whose):
    monkeypatch.setattr(koitab.os, "geteuid", lambda: 1500)
    monkeypatch.setattr(Host, "user_name", lambda self, uid: "alice")
    caller = koitab.Caller(1500, "alice")
    request = {} if user is None else {"user": user}
    if whose == "alice":
        assert desk.whose(caller, request) == "alice"
    else:
        with pytest.raises(Error, match=whose):
            desk.whose(caller, request)


@pytest.mark.parametrize("caller, user, says", [
    (other_user("mallory"), None,
     "You (mallory) are not allowed to use this program (koitab)"),
    (koitab.Caller(0, "root"), "mallory",
     "The user mallory cannot use this program (koitab)"),
    (koitab.Caller(0, "root"), None, None)])
def test_excluded_user_gets_crontabs_message(
        desk, monkeypatch, caller, user, says):
    monkeypatch.setattr(koitab.os, "geteuid", lambda: 0)
    desk.machine.shut_out = "/etc/koi.deny"
    request = {} if user is None else {"user": user}
    if says is None:
        assert desk.whose(caller, request) == "root"
        return
    with pytest.raises(Error) as refused:
        desk.whose(caller, request)
    assert refused.value.message == says
    assert refused.value.hint == "see /etc/koi.deny"


@pytest.mark.parametrize("op", ["jobs", "history", "status"])
@pytest.mark.parametrize("caller", [other_user("mallory"), other_user("")])
def test_reply_contains_nothing_of_another_user(desk, op, caller):
    add_runs(desk, "alice", 3)
    try:
        reply, rest = desk.answer(caller, {"op": op})
    except Error:
        return
    assert rest == b"" and "Hers" not in json.dumps(reply)
    assert "alice" not in json.dumps(
        {key: reply[key] for key in reply if key != "home"})


@pytest.mark.parametrize("op", ["log", "kill"])
@pytest.mark.parametrize("caller", [other_user("mallory"), other_user("")])
@pytest.mark.parametrize("request_of", [{"run": 1}, {"job": "Hers"}, {}])
def test_run_of_another_user_is_not_found(desk, op, caller, request_of):
    add_runs(desk, "alice", 3)
    with pytest.raises(Error):
        desk.answer(caller, {"op": op, **request_of})


def test_caller_is_identified_by_the_kernel(monkeypatch):
    for name in ("LOGNAME", "USER", "SUDO_USER"):
        monkeypatch.setenv(name, "mallory")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller = koitab.caller_of(ours, koitab.Machine())
    assert (caller.uid, caller.name) == (ME, koitab.Machine().user_name(ME))
    assert caller.is_admin


# Which job is meant? ---------------------------------------------------------


@pytest.mark.parametrize("name, line", [
    ("Hers", 2), ("Night/Hers", 2), ("2", 2), ("3", 3), ("true", 3),
    ("echo {{A, string, x}}", 2)])
def test_job_is_found_by_name_section_line_command_or_tag(desk, name, line):
    duty = desk.registry.find_job("alice", name)
    assert duty.line == line
    assert desk.registry.find_job("alice", duty.job.tag) is duty


@pytest.mark.parametrize("user, name", [
    ("alice", "Hars"), ("alice", "9"), ("mallory", "Hers"), ("mallory", "2"),
    ("mallory", ""), ("alice", "\0"), ("alice", "\ud800"),
    ("alice", "x" * 100_000)])
def test_error_of_an_unknown_job_names_it(desk, user, name):
    with pytest.raises(Error, match="no job named"):
        desk.registry.find_job(user, name)


def test_ambiguous_job_name_is_refused_with_the_candidates(desk):
    with pytest.raises(Error, match="2 jobs are named") as refused:
        desk.registry.find_job("alice", "")
    assert all(duty.job.tag in refused.value.hint
               for duty in desk.registry.scheduled_jobs)


# Arguments -------------------------------------------------------------------


def job(line: str):
    tab = koitab.parse_tab(line + "\n")
    assert not tab.errors(), tab.errors()
    return tab.jobs[0]


FORM = '"Form" @manual echo {{S}} {{N, int, 3}} {{B, bool, false}} ' \
    '{{C, choice(a|b), a}} {{T, text, x}} {{D, date, 2026-03-29}}'


@pytest.mark.parametrize("given, values", [
    ({"S": "x"}, {"S": "x", "N": "3", "B": "false", "C": "a", "T": "x",
                  "D": "2026-03-29"}),
    ({"S": "'; id; '\"$(id)`id`\\!*~{{S}}"},
     {"S": "'; id; '\"$(id)`id`\\!*~{{S}}"}),
    ({"S": "-rf"}, {"S": "-rf"}), ({"S": "a\tb"}, {"S": "a\tb"}),
    ({"S": "x", "N": "-0"}, {"N": "-0"}),
    ({"S": "x", "N": "9" * 18}, {"N": "9" * 18}),
    ({"S": "x", "B": "true"}, {"B": "true"}),
    ({"S": "x", "C": "b"}, {"C": "b"}),
    ({"S": "x", "T": "a\nb"}, {"T": "a\nb"}),
    ({"S": "x", "D": "2024-02-29"}, {"D": "2024-02-29"}),
    ({"S": "x" * koitab.LONGEST_VALUE}, {"S": "x" * koitab.LONGEST_VALUE}),
    ({"S": "x", "T": "x\n" * (koitab.LONGEST_TEXT // 2)},
     {"T": "x\n" * (koitab.LONGEST_TEXT // 2)}),
])
def test_values_are_checked_and_defaults_filled_in(given, values):
    found = koitab.validate_arguments(job(FORM), given)
    assert set(found) == {"S", "N", "B", "C", "T", "D"}
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize("given, why", [
    ({}, "missing argument \"S\""),
    ({"S": ""}, "invalid argument \"S\": empty value"),
    ({"s": "x"}, 'unknown argument "s"'),
    ({"S": "x", "X": "y"}, 'unknown argument "X"'),
    ({"S": 5}, "not a string"), ({"S": ["x"]}, "not a string"),
    ({"S": True}, "not a string"), ({"S": {}}, "not a string"),
    ({"S": None}, "missing argument"),
    ({"S": "a\0b"}, "control character"), ({"S": "a\nb"}, "control"),
    ({"S": "\x1b[31m"}, "control"), ({"S": "\ud800"}, "not valid UTF-8"),
    ({"S": "x" * (koitab.LONGEST_VALUE + 1)}, "longer than"),
    ({"S": "é" * (koitab.LONGEST_VALUE // 2 + 1)}, "longer than"),
    ({"S": "x", "T": "x" * (koitab.LONGEST_TEXT + 1)}, "longer than"),
    ({"S": "x", "N": "1.5"}, "whole"), ({"S": "x", "N": "１２"}, "whole"),
    ({"S": "x", "N": " 5"}, "whole"), ({"S": "x", "N": "+5"}, "whole"),
    ({"S": "x", "N": "1_0"}, "whole"), ({"S": "x", "N": ""}, "whole"),
    ({"S": "x", "N": "-"}, "whole"), ({"S": "x", "N": "9" * 19}, "whole"),
    ({"S": "x", "N": "5\n"}, "whole"), ({"S": "x", "B": "True"}, "true or"),
    ({"S": "x", "B": "1"}, "true or"), ({"S": "x", "B": ""}, "true or"),
    ({"S": "x", "C": "c"}, "one of a|b"), ({"S": "x", "C": "a|b"}, "one of"),
    ({"S": "x", "D": "2026-02-29"}, "date"), ({"S": "x", "D": "heute"},
                                               "date"),
    ({"S": "x", "T": "a\rb"}, "control"),
])
def test_invalid_value_is_refused_with_the_reason(given, why):
    with pytest.raises(Error, match=why.replace("|", r"\|")):
        koitab.validate_arguments(job(FORM), given)


def test_all_values_together_fit_into_an_environment():
    form = job("@manual echo " + " ".join(
        f"{{{{P{number}, text}}}}" for number in range(5)))
    given = {f"P{number}": "é" * 32_000 for number in range(5)}
    with pytest.raises(Error, match="in total"):
        koitab.validate_arguments(form, given)
    assert koitab.validate_arguments(form, {**given, "P4": "x"})["P4"] == "x"


def test_argument_with_an_empty_default_may_be_empty():
    form = job("@manual echo {{S, string, }}")
    assert koitab.validate_arguments(form, {"S": ""}) == {"S": ""}


def test_argument_of_a_job_without_arguments_is_refused():
    with pytest.raises(Error, match="unknown argument") as refused:
        koitab.validate_arguments(job("@manual id"), {"A": "x"})
    assert refused.value.hint == "this job takes no arguments"


# The environment of a job ----------------------------------------------------


def environment(tab: str, host: dict, **more: str) -> dict:
    file = koitab.TabFile("/tab", "alice", (), "")
    duty = koitab.ScheduledJob(koitab.parse_tab(tab).jobs[0], file, "salt")
    account = koitab.Account("alice", 1500, 1500, "/home/alice", [1500])
    return koitab.job_environment(
        duty, account, {**host, **koitab.CRON_ENVIRONMENT}, **more)


USUAL = {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "HOME": "/home/alice",
         "LOGNAME": "alice", "USER": "alice"}


@pytest.mark.parametrize("tab, host, changed", [
    ("", {}, {}),
    ("A=1\n", {}, {"A": "1"}),
    ("HOME=/x\nSHELL=/bin/bash\nPATH=/p\n", {},
     {"HOME": "/x", "SHELL": "/bin/bash", "PATH": "/p"}),
    # Whose job it is, a tab does not say.
    ("LOGNAME=root\nUSER=root\n", {}, {}),
    ("", {"LANG": "C.UTF-8"}, {"LANG": "C.UTF-8"}),
    # The host's settings come first, cron's defaults and the tab's later.
    ("LANG=x\n", {"LANG": "C", "PATH": "/host", "USER": "root"},
     {"LANG": "x"}),
    ("A=1\nA=2\n", {}, {"A": "2"}), ("A=\n", {}, {"A": ""}),
    ("LD_PRELOAD=/x.so\n", {}, {"LD_PRELOAD": "/x.so"}),
    ('"B=C"=1\n', {}, {}), ("MAILTO=bob\n", {}, {"MAILTO": "bob"}),
])
def test_environment_of_a_job_comes_from_tab_and_host(tab, host, changed):
    found = environment(f"{tab}* * * * * id\n", host)
    assert found == {**USUAL, **changed}


def test_tab_cannot_override_the_variables_that_koi_sets():
    found = environment("KOI_RUN=9\nKOI_ARG_1=x\n* * * * * id\n", {},
                        KOI_RUN="5", KOI_ARG_1="y")
    assert (found["KOI_RUN"], found["KOI_ARG_1"]) == ("5", "y")


def test_assignments_above_a_job_apply_and_those_below_do_not():
    tab = koitab.parse_tab("A=1\n* * * * * x\nA=2\n* * * * * y\n")
    assert [job.environment["A"] for job in tab.jobs] == ["1", "2"]


# Addresses -------------------------------------------------------------------


@pytest.mark.parametrize("address, safe", [
    ("alice", True), ("alice@example.com", True), ("a,b@c", True),
    ("a.b+c-d_e=f/g%h:i!j@k", True), ("0day", True),
    ("", False), ("-oQ/tmp", False), ("-f root", False), ("@x", False),
    (".x", False), ("a b", False), ("a\nBcc: b", False), ("a\r", False),
    ("a\0", False), ("a;id", False), ("a|id", False), ("`id`", False),
    ("$(id)", False), ("a&b", False), ("a<b>", False), ("a'b", False),
    ('a"b', False), ("a\\b", False), ("a(b)", False), ("a*", False),
    ("a?", False), ("a~", False), ("a#b", False), ("é@x", False),
    ("a@é", False), ("٣", False), ("a\u202e", False)])
def test_mail_address_with_unsafe_characters_is_rejected(address, safe):
    assert koitab.safe_address(address) is safe


# Mail ------------------------------------------------------------------------


def mailed(output: bytes, **environment: str):
    """Return the mail about a job with this output, as a reader has it."""
    import email
    return email.message_from_bytes(koitab.mail_about(
        "alice", "web1", "alice", "echo", environment, output))


LATIN = "text/plain; charset=iso-8859-1"
OUTPUTS = [b"r\351sum\351\n", b"\377\n", b"no end of line", b"", b"\n\n",
           b"From here\n.\n", "r\u00e9sum\u00e9\n".encode(),
           b"a\r\nb\rc\n", b"a\0b\n", b"\351" * 2000 + b"\n"]


@pytest.mark.parametrize("output", OUTPUTS, ids=range(len(OUTPUTS)))
@pytest.mark.parametrize("charset", [LATIN, ""])
def test_mail_has_the_bytes_of_the_output(output, charset):
    found = mailed(output, CONTENT_TYPE=charset)
    assert found.get_payload(decode=True) == output
    assert found.get_content_type() == "text/plain"
    assert found.get_content_charset() == (
        "iso-8859-1" if charset else "utf-8")
    assert found["MIME-Version"] == "1.0"


@pytest.mark.parametrize("output", OUTPUTS, ids=range(len(OUTPUTS)))
def test_output_with_a_content_transfer_encoding_is_not_encoded_again(output):
    import base64
    written = base64.encodebytes(output)
    found = mailed(written, CONTENT_TRANSFER_ENCODING="base64")
    assert found.get_payload(decode=True) == output
    found = mailed(output, CONTENT_TRANSFER_ENCODING="8bit")
    assert found.get_payload(decode=True) == output


def test_lines_of_mail_have_at_most_998_bytes():
    message = koitab.mail_about("alice", "web1", "alice", "echo", {},
                                b"\351" * 5000)
    assert max(map(len, message.split(b"\n"))) <= 998


FAILED = {"state": "done", "exit": 1, "signal": None, "bytes": 5}


@pytest.mark.parametrize("trigger, state", [
    ("manual", ""), ("schedule", "due"), ("reboot", "due"),
    ("catch-up", "due")])
def test_retry_of_a_scheduled_run_is_mailed_and_one_by_hand_is_not(
        desk, monkeypatch, trigger, state):
    monkeypatch.setattr(koitab, "SENDMAILS", ["/bin/sh"])
    tabs = registry((KOITAB, "alice", "KOI_RETRY=1\n@daily x\n"))
    scheduled = tabs.scheduled_jobs[0]
    first = koitab.QueuedRun(scheduled, trigger, 0.0, 0.0)
    running = koitab.RunningRun(1, scheduled.key, first, supervisor=1)
    scheduler = SimpleNamespace(clock=koitab.Clock(), registry=tabs)
    retry = koitab.Scheduler.retry_of(scheduler, running, FAILED)
    mail = koitab.CronMail(desk.machine, desk.store, None)
    for queued in (first, retry):
        again = koitab.RunningRun(2, scheduled.key, queued)
        assert mail.mail_for(again, FAILED)[1] == state


@pytest.mark.parametrize("status, logged", [
    (78 << 8, "got status 78"), (9, "got status -9")])
def test_status_of_sendmail_is_logged_in_decimal(desk, status, logged):
    lines: list[str] = []
    log = SimpleNamespace(log=lambda text, bad: lines.append(text))
    mail = koitab.CronMail(desk.machine, desk.store, log)
    mail.mailers[1] = 2, "root", 0.0
    mail.take_status(1, status)
    assert logged in lines[0]


@pytest.mark.parametrize("number", [9, 40])
def test_agent_killed_by_any_signal_is_restarted(number):
    """Signal 40 has no name."""
    clock = SimpleNamespace(ticks=lambda: 5.0)
    agent = koitab.AgentProcess(
        SimpleNamespace(clock=clock), SimpleNamespace(log=lambda *_, bad: 0),
        SimpleNamespace(close=id), None)
    agent.lines = SimpleNamespace(sock=SimpleNamespace(detach=lambda: 3))
    agent.ended(number, wanted=True)
    assert f"agent killed by signal {number}" in agent.problem
    assert agent.start_at == 5.0 + koitab.RESTART_FIRST


# Who may have a tab ----------------------------------------------------------


@pytest.mark.parametrize("files, excluded_by", [
    ({}, ""),
    ({"cron.allow": "root\n"}, "cron.allow"),
    ({"cron.allow": "bob\nalice\n", "cron.deny": "alice\n"}, ""),
    ({"cron.deny": "alice\n"}, "cron.deny"),
    ({"cron.deny": "bob\n"}, ""),
    ({"cron.allow": ""}, "cron.allow"),
    ({"koi.allow": "alice\n", "cron.allow": "root\n"}, ""),
    ({"koi.deny": "bob\n", "cron.deny": "alice\n"}, ""),
    ({"koi.deny": "alice\n", "cron.allow": "alice\n"}, "koi.deny"),
])
def test_cron_allow_and_cron_deny_apply_if_koi_has_none(
        tmp_path, monkeypatch, files, excluded_by):
    monkeypatch.setattr(koitab, "ACCESS_FILES", tuple(
        (str(tmp_path / path.rpartition("/")[2]), wanted)
        for path, wanted in koitab.ACCESS_FILES))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = koitab.Machine().access_error("alice")
    assert path.rpartition("/")[2] == excluded_by
    assert koitab.Machine().access_error("root") == ""


TODAY = int(koitab.Clock().now() // 86_400)


@pytest.mark.parametrize("expires, expired", [
    ("", False), (str(TODAY + 2), False), ("18262", True), (str(TODAY), True),
    ("0", True), ("-1", False), ("x", False)])
def test_account_is_expired_from_the_day_in_shadow_on(
        tmp_path, monkeypatch, expires, expired):
    (tmp_path / "shadow").write_text(
        "root:*:1::::::\nshort:*\n"
        f"bob:!:19000:0:99999:7::{expires}:\n")
    monkeypatch.setattr(koitab, "SHADOW", str(tmp_path / "shadow"))
    machine = koitab.Machine()
    assert machine.is_expired("bob") is expired
    assert not any(map(machine.is_expired, ("root", "short", "nobody")))
    monkeypatch.setattr(koitab, "SHADOW", str(tmp_path / "none"))
    assert not machine.is_expired("bob")


def test_run_of_an_expired_account_is_recorded_and_not_started(monkeypatch):
    scheduled = registry((KOITAB, "alice", "@daily x\n")).scheduled_jobs[0]
    queued = koitab.QueuedRun(scheduled, "schedule", 0.0, 0.0)
    reasons: list[str] = []
    scheduler = SimpleNamespace(
        machine=SimpleNamespace(account=lambda user: object(),
                                is_expired=lambda user: user == "alice"),
        unstartable=lambda queued, why: reasons.append(why) or [], write=id,
        log_starts=id)
    koitab.Scheduler.start_runs(scheduler, [queued])
    assert reasons == ["the account of alice has expired"]


# Files -----------------------------------------------------------------------

REGULAR = stat.S_IFREG


def status(mode: int = REGULAR | 0o600, uid: int = 0, links: int = 1,
           size: int = 5):
    return SimpleNamespace(st_mode=mode, st_uid=uid, st_nlink=links,
                           st_size=size)


OWN, PACKAGED, SPOOLED = ((0,), 0o022, True), ((0,), 0o022, False), \
    ((0, 1500), 0o177, True)


@pytest.mark.parametrize("how, given, fault", [
    (OWN, status(), ""), (OWN, status(REGULAR | 0o644), ""),
    (OWN, status(REGULAR | 0o400), ""), (OWN, status(size=0), ""),
    (OWN, status(REGULAR | 0o620), "chmod"),
    (OWN, status(REGULAR | 0o602), "chmod"),
    (OWN, status(REGULAR | 0o666), "0666"),
    (OWN, status(uid=1500), "uid 1500"), (OWN, status(links=2), "hard link"),
    (OWN, status(links=0), "hard link"),
    (OWN, status(size=2**20), ""), (OWN, status(size=2**20 + 1), "1,048,576"),
    (OWN, status(stat.S_IFIFO | 0o600), "not a regular file"),
    (OWN, status(stat.S_IFDIR | 0o600), "not a regular file"),
    (OWN, status(stat.S_IFCHR | 0o600), "not a regular file"),
    (OWN, status(stat.S_IFLNK | 0o600), "not a regular file"),
    (OWN, status(stat.S_IFSOCK | 0o600), "not a regular file"),
    # Anyone who may link to /etc/crontab could switch it off (MDKSA-2007:234).
    (PACKAGED, status(REGULAR | 0o644, links=2), ""),
    (PACKAGED, status(REGULAR | 0o664), "chmod"),
    (PACKAGED, status(uid=1500), "uid 1500"),
    (SPOOLED, status(uid=1500), ""), (SPOOLED, status(uid=0), ""),
    (SPOOLED, status(uid=1501), "uid 1501"),
    (SPOOLED, status(REGULAR | 0o644), "chmod"),
    (SPOOLED, status(REGULAR | 0o640), "chmod"),
    (SPOOLED, status(REGULAR | 0o700), "chmod"),
    # Debian's cron wants 0600 and nothing else.
    (SPOOLED, status(REGULAR | 0o400), "chmod"),
    (SPOOLED, status(REGULAR | 0o4600), "chmod"),
    (SPOOLED, status(links=2), "hard link"),
])
def test_root_trusts_only_files_that_others_cannot_write(how, given, fault):
    found = koitab.file_error(given, *how)
    assert fault in found if fault else found == ""


@pytest.mark.parametrize("how, given, fix", [
    (OWN, status(REGULAR | 0o666), "chmod go-w"),
    (SPOOLED, status(REGULAR | 0o644), "chmod 600")])
def test_error_of_an_unsafe_file_names_the_fix(how, given, fix):
    assert fix in koitab.file_error(given, *how)


def test_symbolic_link_is_followed_only_where_packages_may_place_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("@manual id\n")
    target.chmod(0o600)
    link.symlink_to(target)
    read = koitab.Machine().tab_file
    assert read(str(link), "x", (ME,), 0o022, None)\
        .problem == "a symbolic link"
    assert read(str(link), "", (ME,), 0o022, None,
                follow=True).text == "@manual id\n"
    assert read(str(tmp_path / "none"), "x", (ME,), 0o022, None) is None


def test_fifo_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    file = koitab.Machine().tab_file(str(tmp_path / "fifo"), "x", (ME,),
                                     0o022, None)
    assert file.problem == "not a regular file"


def test_tab_names_exclude_files_left_by_editors_and_packages(tmp_path):
    for name in ("alice", "bob.smith", "a-b_c", "UPPER", "x~y", "tmpx",
                 ".hidden", "#auto#", "backup~", "tmp.12345", "alice.new"):
        (tmp_path / name).touch()
    assert koitab.tab_names(str(tmp_path)) == [
        "UPPER", "a-b_c", "alice", "bob.smith", "tmpx", "x~y"]
    assert koitab.tab_names(str(tmp_path / "none")) == []


def test_problem_of_a_tab_is_reported_until_it_is_fixed(desk):
    """Even if another tab changes in between."""
    tabs = os.path.join(desk.home, "tabs")

    def write(user: str, text: str) -> None:
        path = os.path.join(tabs, user)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o600)
        os.utime(path, ns=(len(text), len(text)))

    write("alice", '"Hers" @manual id\n\0\n')
    desk.registry.load()
    assert "NUL" in " ".join(desk.registry.problems)
    write("mallory", "@manual id\n")
    desk.registry.load()
    assert "NUL" in " ".join(desk.registry.problems)
    write("alice", '"Hers" @manual true\n')
    desk.registry.load()
    assert desk.registry.problems == []


# What does koid say about its agent? -----------------------------------------

def test_reason_shared_by_both_connections_is_shown_and_logged_once(desk):
    lines: list = []
    log = SimpleNamespace(log=lambda text, bad=False: lines.append(text))
    broker = koitab.AgentBroker(
        SimpleNamespace(machine=desk.machine, registry=desk.registry,
                        store=desk.store, clock=koitab.Clock(), log=log),
        koitab.Poller())
    broker.enrollment = SimpleNamespace(url="https://koi", name="web1")
    for about in ("poll", "send", "poll"):
        broker.state({"about": about, "problem": "Connection refused",
                      "retry": 2})
    problem, = broker.shown()["problems"]
    assert re.fullmatch(r"down since 2\S+: https://koi: Connection refused "
                        r"\(next try at 2\S+\)", problem)
    assert lines == ["dashboard: https://koi: Connection refused"]
    broker.state({"about": "send", "problem": "timeout"})
    assert len(broker.shown()["problems"]) == 1
    broker.state({"about": "poll", "problem": ""})
    broker.state({"about": "send", "problem": ""})
    assert broker.shown()["problems"] == []


# Who shares a supervisor? ----------------------------------------------------

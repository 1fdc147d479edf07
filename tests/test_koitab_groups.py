"""KOI_ONE_OF: which jobs a group can share, and by which name of a start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import koi_group
import support

koitab = support.load("koitab")
MINUTE = 60


def at(text: str) -> int:
    """The instant of a time in UTC."""
    days, clock = text.split()
    hour, minute = map(int, clock.split(":"))
    return koitab.days_since_epoch(*map(int, days.split("-"))) * 86400 \
        + hour * 3600 + minute * 60


def parse(line: str, settings: str = "KOI_ONE_OF=web\n", salt: str = "s"):
    return koitab.parse_tab(f"{settings}{line}\n", salt=salt)


@pytest.mark.parametrize("line, why", [
    ("* * * * * true", "KOI_ONE_OF is for named jobs"),
    ('"A" @manual true', "KOI_ONE_OF is not for @manual"),
    ('"A" @reboot true', "KOI_ONE_OF is not for @reboot"),
])
def test_job_that_hosts_cannot_share_is_refused(line, why):
    tab = parse(line)
    assert tab.jobs == []
    assert [why in error.why for error in tab.errors()] == [True]
    assert parse(line, "KOI_ONE_OF=web\nKOI_ONE_OF=\n").errors() == []


@pytest.mark.parametrize("name, valid", [
    ("web", True), ("web-2.eu_x", True), ("", True), ("a/b", False),
    ("a b", False), ("\u00e4", False), ("a" * 101, False)])
def test_group_name_is_accepted_or_rejected_by_its_characters(name, valid):
    tab = parse('"A" * * * * * true', f"KOI_ONE_OF={name}\n")
    assert (not tab.errors()) == valid
    assert tab.jobs[0].settings.one_of == (name if valid else "")


def test_job_with_after_is_allowed_in_a_group():
    tab = parse('"A" * * * * * true\n"B" @after "A" true')
    assert tab.errors() == [] and len(tab.jobs) == 2


def test_tilde_has_one_value_on_all_hosts_of_a_group_for_any_command():
    def minutes(command: str, salt: str, name: str = "A", **settings):
        job, = parse(f'"{name}" ~ * * * * {command}', salt=salt,
                     **settings).jobs
        return job.schedule.minutes
    assert minutes("one", "host1") == minutes("two", "host2")
    assert len({minutes("one", "x", name) for name in "ABCDEFGH"}) > 1
    alone = {minutes("one", salt, settings="") for salt in "abcdefgh"}
    assert len(alone) > 1


@pytest.mark.parametrize("zone, tz, error", [
    ("Europe/Berlin", "", True), ("Europe/London", "", True),
    ("UTC", "", False), ("Etc/UTC", "", False),
    ("Europe/Berlin", "CRON_TZ=Asia/Tokyo\n", False)])
def test_entry_needs_a_zone_unless_the_machine_has_utc(zone, tz, error):
    machine = koitab.Machine()
    local = machine.zone(zone)
    tab = parse('"A" 0 1 * * * true\n"B" @after "A" true',
                f"{tz}KOI_ONE_OF=web\n")
    koitab.check_zones(tab, SimpleNamespace(
        zone=machine.zone, local_zone=lambda: local))
    assert [each.line for each in tab.errors()] == [2] * error
    if error:
        assert "needs CRON_TZ" in tab.errors()[0].why
        assert koitab.check_zones(parse('"A" 0 1 * * * true', ""),
                                  SimpleNamespace(local_zone=None)) == {}


@pytest.mark.parametrize("schedule, due, name, instant", [
    ("30 2 * * *", "2026-06-01 0:30", "2026-06-01T02:30 Europe/Berlin",
     "2026-06-01 0:30"),
    ("*/30 2 * * *", "2026-06-01 0:30", "2026-06-01T00:30 UTC",
     "2026-06-01 0:30"),
    # In the gap it starts at 03:00, for a minute that no clock shows.
    ("30 2 * * *", "2026-03-29 1:00", "2026-03-29T02:30 Europe/Berlin",
     "2026-03-29 1:00"),
    # In the fold a fixed entry starts once, a wildcard entry twice.
    ("30 2 * * *", "2026-10-25 0:30", "2026-10-25T02:30 Europe/Berlin",
     "2026-10-25 0:30"),
    ("*/30 2 * * *", "2026-10-25 1:30", "2026-10-25T01:30 UTC",
     "2026-10-25 1:30"),
])
def test_all_hosts_have_one_name_for_a_start(schedule, due, name, instant):
    zone = koitab.Machine().zone("Europe/Berlin")
    job, = parse(f'"A" {schedule} true',
                 "KOI_ONE_OF=web\nCRON_TZ=Europe/Berlin\n").jobs
    (found, minute), = starts_at(job, zone, at(due))
    assert found == at(due)
    assert claimed(job, zone, minute, found) == (name, at(instant))


def claimed(job, zone, minute: int, due: int) -> tuple:
    """The name of a start and its instant, without the random word."""
    claim, instant = koitab.name_claim(job, zone, minute, due)
    return claim.split(" ", 1)[1], instant


def starts_at(job, zone, due: int):
    """(instant, local minute) of each start at an instant."""
    pairs = job.schedule.iter_starts(due - MINUTE, zone, pairs=True)
    for pair in pairs:
        if pair[0] > due:
            return
        yield pair


def test_host_that_checks_late_has_the_same_name_for_a_start():
    """Its minute is made up for four minutes later: see plan()."""
    zone = koitab.Machine().zone("Europe/Berlin")
    for schedule, name in (("0 2 * * *", "2026-06-01T02:00 Europe/Berlin"),
                           ("* * * * *", "2026-06-01T00:00 UTC")):
        job, = parse(f'"A" {schedule} true',
                     "KOI_ONE_OF=web\nCRON_TZ=Europe/Berlin\n").jobs
        assert claimed(job, zone, at("2026-06-01 2:00"), at(
            "2026-06-01 0:04")) == (name, at("2026-06-01 0:00"))


# --- options -----------------------------------------------------------------


def settings(tmp_path, **changes):
    files = {}
    for name in ("ca", "cert", "key", "password"):
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_text(f"{name}\n")
        (tmp_path / name).chmod(0o600)
    return koitab.EtcdSettings(**{
        "urls": ["https://h1:2379", "https://[::1]:2379/"], **files,
        "user": "koi", "insecure": False, **changes})


def test_claims_process_gets_contents_and_no_paths(tmp_path):
    found = settings(tmp_path)
    found.check()
    assert found.read() == {
        "urls": found.urls, "ca": "ca\n", "cert": "cert\n", "key": "key\n",
        "user": "koi", "password": "password"}


@pytest.mark.parametrize("changes, why", [
    ({"urls": ["h1:2379"]}, "invalid URL: expected https://HOST:2379"),
    ({"urls": ["https://h1/x"]}, "invalid URL"),
    ({"urls": ["https://h1:x"]}, "invalid URL"),
    ({"urls": ["https://h1", "http://h2"]}, "anyone on the network"),
    ({"key": ""}, "--etcd-cert and --etcd-key are"),
    ({"cert": ""}, "--etcd-cert and --etcd-key are"),
    ({"password": ""}, "--etcd-password-file are"),
    ({"user": ""}, "--etcd-user and"),
    ({"ca": "/no/such"}, "/no/such: No such file"),
])
def test_invalid_setting_for_etcd_is_an_error(tmp_path, changes, why):
    with pytest.raises(koitab.Error, match=why):
        settings(tmp_path, **changes).check()


@pytest.mark.parametrize("name", ["key", "password"])
def test_secret_file_that_others_can_read_is_refused(tmp_path, name):
    found = settings(tmp_path)
    (tmp_path / name).chmod(0o640)
    with pytest.raises(koitab.Error) as caught:
        found.check()
    assert caught.value.hint == f"chmod 600 {tmp_path / name}"


def test_koid_with_a_wrong_option_for_etcd_does_not_start(koi):
    for words, error in (
            (["--etcd", "http://127.0.0.1:1"], "plain http"),
            (["--etcd-user", "koi"], "--etcd-user needs --etcd URL")):
        result = support.ended(koi.spawn(*words))
        assert result.code == 2 and error in koi.log()


def test_unit_of_koid_has_the_options_for_etcd(koi, tmp_path):
    import subprocess
    (tmp_path / "ca.pem").write_text("x")
    done = subprocess.run(
        koi.command("unit", "daemon", "--etcd", "https://h1:2379", "--etcd",
                    "https://h2:2379", "--etcd-ca", "ca.pem"),
        env=koi.env, cwd=tmp_path, capture_output=True, text=True,
        timeout=60)
    assert f"daemon --etcd https://h1:2379 --etcd https://h2:2379 " \
        f"--etcd-ca {tmp_path}/ca.pem\n" in done.stdout


# --- a koid without etcd -----------------------------------------------------

SHARED = 'KOI_ONE_OF=web\nCRON_TZ=UTC\n"A" * * * * * true\n'


def test_koid_without_etcd_refuses_a_job_of_a_group(koi):
    koi.tab(SHARED + 'KOI_ONE_OF=\n"B" * * * * * true\n')
    koi.start()
    assert koi.names() == ["B"]
    assert "3:1: bad job: KOI_ONE_OF: koid runs without --etcd" \
        in koi.problems()
    reply = koi.ask("install", text=SHARED)
    assert not reply["installed"]
    assert "koid --etcd URL" in str(reply["problems"])
    assert not any("koi-claims" in (support.Path(
        f"/proc/{pid}/comm")).read_text()
        for pid in support.children_of(koi.daemon.pid))


# --- the checker of the tests with faults ------------------------------------

DUE = 6000


def verdict(executed=(("a", 1, DUE + 1),), events=(), why: str = "it says why",
            **states: str) -> list:
    """What the checker finds wrong with one start of two hosts: `states` are
    those of their records, by host, and `why` is the reason of all."""
    hosts = {host: [{"run": 1, "job": "J", "due": DUE, "state": state,
                     "reason": why, "count": 1,
                     "trigger": "schedule"}]
             for host, state in {"a": "done", "b": "elsewhere",
                                 **states}.items() if state}
    return koi_group.check({
        "expected": [("J", DUE)], "executed": executed, "events": events,
        "hosts": {"a": [], "b": [], **hosts},
        "members": ["m1", "m2", "m3"]}).wrong


NO_QUORUM = [(DUE + 5, DUE + 40, "killed", "m1"),
             (DUE + 30, DUE + 50, "cut off", "m2")]
IN_TURN = [(DUE - 5, DUE + 4, "killed", "m1"),
           (DUE + 30, DUE + 50, "cut off", "m2")]
BOTH_HOSTS = [(DUE, DUE + 2, "killed", "a"), (DUE + 3, DUE + 9, "frozen", "b")]
ONE_HOST = [(DUE - 90, DUE + 90, "killed", "a")]


@pytest.mark.parametrize("events, excused", [
    ([], False), (IN_TURN, False), (ONE_HOST, False), (NO_QUORUM, True),
    (BOTH_HOSTS, True)],
    ids=["nothing", "members in turn", "a host", "a quorum", "all hosts"])
def test_checker_requires_a_start_within_a_minute_unless_a_fault_excuses_it(
        events, excused):
    missed = verdict([], events, a="missed", b="missed")
    late = verdict([("b", 1, DUE + 61)], events, a="elsewhere", b="done")
    assert [bool(missed), bool(late)] == [not excused] * 2
    assert verdict([("b", 1, DUE + 59)], events) == []


@pytest.mark.parametrize("fault, excused", [
    ((DUE + 1, DUE + 50, "killed", "b"), True),
    ((DUE + 1, DUE + 50, "killed", "a"), False)], ids=["its own", "another"])
def test_checker_excuses_a_start_whose_maker_cannot_know_that_it_made_it(
        fault, excused):
    """The others say that it did, and its own record names a later start."""
    found = verdict([], [fault], a="elsewhere", b="missed",
                    why="a has made a later start: X")
    assert (found == []) == excused


@pytest.mark.parametrize("found, wrong", [
    ({"executed": [("a", 1, DUE), ("b", 1, DUE)]}, "was executed by"),
    ({"executed": [("a", 1, DUE), ("b", 7, DUE)]}, "has no record of it"),
    ({"b": ""}, "b has no record of J"),
    ({"executed": [], "events": NO_QUORUM, "a": "elsewhere"},
     "nobody says why"),
])
def test_checker_names_what_breaks_a_promise(found, wrong):
    assert [wrong in each for each in verdict(**found)] == [True]

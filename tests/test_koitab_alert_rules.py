"""AlertRules: begin and end of a problem are notified once each."""

from __future__ import annotations

import json

import pytest

import support
from dashboard_rig import (HOST, NOW, frames, piece,
                           refused, spec)

koitab = support.load("koitab")
DAY, HOUR = 86_400, 3600


pytestmark = pytest.mark.usefixtures("small_ballast")


@pytest.fixture(autouse=True)
def mail_channel(dashboard):
    """Somebody is notified."""
    dashboard.channel()


@pytest.fixture
def web1(dashboard, web1):
    """A host that has sent its list of two jobs."""
    dashboard.sync(web1, list=dashboard.list_of(web1, spec(), spec("crawl")))
    return web1


def alive(dashboard, access, seconds: float) -> None:
    """Time passes, and the host polls."""
    while seconds > 0:
        dashboard.pass_time(min(20, seconds))
        dashboard.sync(access)
        seconds -= 20


def kinds(dashboard) -> list[str]:
    return sorted(alert["kind"] for alert in dashboard.state["alerts"])


# ==========================================================================
# Jobs
# ==========================================================================

@pytest.mark.parametrize("bad", [{"exit": 1}, {"state": "missed"}],
                         ids=["failed", "missed"])
def test_start_on_another_host_of_the_group_ends_the_alert(
        dashboard, web1, bad):
    dashboard.runs(web1, dashboard.record(**bad))
    assert len(kinds(dashboard)) == 1
    dashboard.runs(web1, dashboard.record("elsewhere", reason="web2",
                                          started=None))
    assert kinds(dashboard) == []
    assert dashboard.job()["failing"] is None


def test_missed_start_that_ran_on_another_host_ends_its_alert(
        dashboard, web1):
    """Without etcd koid cannot know it; the record is corrected later."""
    missed = dashboard.record("missed")
    dashboard.runs(web1, missed)
    assert kinds(dashboard) == ["missed"]
    dashboard.runs(web1, dashboard.record(
        "elsewhere", run=missed["run"], reason="web2", started=None))
    assert kinds(dashboard) == []
    assert dashboard.job()["recent_runs"][-1][3] == "e"


def test_job_that_runs_on_another_host_is_not_late(dashboard, web1):
    dashboard.sync(web1, next={"root\nbackup": NOW + 100})
    alive(dashboard, web1, 120)
    dashboard.runs(web1, dashboard.record(
        "elsewhere", reason="web2", started=None, due=NOW + 100,
        next=NOW + DAY))
    alive(dashboard, web1, 600)
    assert kinds(dashboard) == []


def test_failure_and_its_end_are_notified_once_each(dashboard, web1):
    dashboard.runs(web1, dashboard.record(exit=1))
    assert dashboard.take_notifications() == ["Night/Backup on web1 failed"]
    dashboard.runs(web1, dashboard.record(exit=2))
    dashboard.runs(web1, dashboard.record(exit=3))
    assert dashboard.take_notifications() == []
    assert dashboard.state["alerts"][0]["text"] == \
        "Night/Backup on web1: exit status 3, 3 times in a row"
    dashboard.runs(web1, dashboard.record())
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 works again"]
    assert kinds(dashboard) == []
    dashboard.runs(web1, dashboard.record())
    assert dashboard.take_notifications() == []


@pytest.mark.parametrize("fields, words", [
    ({"exit": 3}, "exit status 3"), ({"exit": None, "signal": 9}, "signal 9"),
    ({"exit": 143, "reason": "timeout after 10m"}, "timeout after 10m"),
    ({"state": "interrupted"}, "interrupted"),
    ({"state": "unstartable", "reason": "no such \x1b[31m user"},
     r"no such \x1b[31m user")])
def test_notification_says_how_the_run_failed(dashboard, web1, fields, words):
    dashboard.runs(web1, {**dashboard.record(), **fields})
    assert dashboard.state["alerts"][0][
        "text"] == f"Night/Backup on web1: {words}"


def due(dashboard) -> list[dict]:
    """The notifications that the mail channel gets now."""
    return dashboard.do(dashboard.dashboard.alerts.take_due, 1, dashboard.now)


def test_notification_waits_15_seconds_for_the_output(dashboard, web1):
    data = frames("it broke\n", 2)
    dashboard.runs(web1, dashboard.record(exit=1, size=len(data)))
    assert due(dashboard) == []
    dashboard.clock.time += 15
    assert len(due(dashboard)) == 1
    dashboard.clock.time -= 15
    dashboard.sync(web1, outputs=[piece(1, 0, data)])
    notification, = due(dashboard)
    assert (notification["text"], notification["output"]) == (
        "Night/Backup on web1: exit status 1", "it broke")


@pytest.mark.parametrize("text", ["", "it broke\n"])
def test_jobs_that_fail_together_are_notified_in_one_digest(
        dashboard, web1, text):
    data = frames(text)
    dashboard.runs(web1, *dashboard.failing(60, len(data)))
    for number in range(1, 61 if text else 1):
        assert due(dashboard) == []
        dashboard.sync(web1, outputs=[piece(number, 0, data)])
    digest, = due(dashboard)
    assert digest["title"] == "60 alerts began, 0 ended"
    assert digest["text"].splitlines()[::50] == [
        "Night/Job0 on web1 failed", "and 10 more on web1"]
    assert due(dashboard) == [digest]       # until it is delivered


def test_alerts_beyond_ten_in_ten_minutes_wait_for_a_digest(dashboard, web1):
    def deliver_due() -> list[str]:
        rows = due(dashboard)
        for row in rows:
            dashboard.do(dashboard.dashboard.alerts.mark_delivered, row["id"],
                         "", dashboard.now)
        return [row["title"] for row in rows]

    dashboard.sync(web1, list=dashboard.list_of(web1, *(
        spec(f"job{number}") for number in range(13))))
    for number, record in enumerate(dashboard.failing(13)):
        dashboard.runs(web1, record)
        expected = [f"Night/Job{number} on web1 failed"] * (number < 10)
        assert deliver_due() == expected
    dashboard.clock.time += 60
    assert deliver_due() == ["3 alerts began, 0 ended"]
    dashboard.sync(web1, list=dashboard.list_of(web1))
    assert deliver_due() == []
    dashboard.clock.time += 60
    assert deliver_due() == ["0 alerts began, 13 ended"]
    dashboard.clock.time += 600
    dashboard.runs(web1, dashboard.record(exit=1, due=dashboard.now))
    assert deliver_due() == ["Night/Backup on web1 failed"]


def test_old_failures_that_arrive_late_are_shown_but_not_notified(
        dashboard, web1):
    old = NOW - 2 * DAY
    dashboard.runs(web1, dashboard.record(exit=1, due=old, started=old,
                                          ended=old))
    assert dashboard.take_notifications() == [] and dashboard.job()[
        "state"] == "failed"


def test_job_is_late_if_its_host_is_up_and_reports_no_start(dashboard, web1):
    dashboard.sync(web1, next={"root\nbackup": NOW + 100})
    alive(dashboard, web1, 189)
    assert dashboard.take_notifications() == []
    alive(dashboard, web1, 21)
    assert dashboard.take_notifications() == ["Night/Backup on web1 is late"]
    assert dashboard.job()["state"] == "late"
    alive(dashboard, web1, 600)
    assert dashboard.take_notifications() == []
    dashboard.runs(web1, dashboard.record("running", next=NOW + DAY))
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 is not late"]
    assert dashboard.job()["state"] == "running"


def test_a_job_that_starts_in_time_is_not_late(dashboard, web1):
    dashboard.sync(web1, next={"root\nbackup": NOW + 100})
    alive(dashboard, web1, 120)
    dashboard.runs(web1, dashboard.record("running", due=NOW + 100,
                                          next=NOW + 100 + DAY))
    alive(dashboard, web1, 600)
    assert dashboard.take_notifications() == []


@pytest.mark.parametrize("fields", [
    {"next": None}, {"next": NOW + 100}])       # a koid that says no more
def test_job_with_a_recorded_start_is_not_late(dashboard, web1, fields):
    dashboard.sync(web1, next={"root\nbackup": NOW + 100})
    alive(dashboard, web1, 120)
    dashboard.runs(web1, dashboard.record("running", due=NOW + 100, **fields))
    alive(dashboard, web1, 600)
    assert dashboard.take_notifications() == []


def test_job_removed_from_its_tab_is_not_late(dashboard, web1):
    dashboard.sync(web1, next={"root\nbackup": NOW + 100})
    dashboard.sync(web1, list=dashboard.list_of(web1, spec("crawl")))
    alive(dashboard, web1, 600)
    assert dashboard.take_notifications() == []


def test_a_job_is_late_by_the_clock_of_its_host(dashboard, web1):
    """It is ten minutes behind: so is what it says of the next start."""
    def pass_time(rounds: int) -> None:
        for _ in range(rounds):
            dashboard.pass_time(20)
            dashboard.sync(web1, now=dashboard.now - 600)

    dashboard.sync(web1, now=NOW - 600, next={"root\nbackup": NOW - 550})
    pass_time(6)
    assert dashboard.take_notifications() == []
    pass_time(2)
    assert dashboard.take_notifications() == ["Night/Backup on web1 is late"]


def test_missed_job_has_an_alert_until_it_runs_again(dashboard, web1):
    dashboard.runs(web1, dashboard.record("missed", count=8,
                                          reason="it was off"))
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 was missed"]
    assert dashboard.state["alerts"][0][
        "text"] == "8 starts missed: it was off"
    dashboard.runs(web1, dashboard.record("missed"))
    assert dashboard.take_notifications() == []
    dashboard.runs(web1, dashboard.record())
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 runs again"]


def twenty(dashboard, web1, seconds: float = 10) -> None:
    dashboard.runs(web1, *[dashboard.record(started=dashboard.now - seconds)
                           for _ in range(20)])


@pytest.mark.parametrize("runs, slow", [(20, True), (19, False)])
def test_unusually_slow_run_is_notified_while_it_is_running(
        dashboard, web1, runs, slow):
    dashboard.runs(web1, *[dashboard.record() for _ in range(runs)])
    dashboard.runs(web1, dashboard.record("running", started=NOW))
    alive(dashboard, web1, 29)
    assert dashboard.take_notifications() == []
    alive(dashboard, web1, 3)
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 is running unusually long"] * slow
    alive(dashboard, web1, 300)
    dashboard.runs(web1, dashboard.record(run=runs + 1, started=NOW))
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 has ended"] * slow


def test_slow_run_is_notified_after_a_restart_of_the_dashboard(
        dashboard, web1):
    twenty(dashboard, web1)
    dashboard.runs(web1, dashboard.record("running", started=NOW))
    reopened = dashboard.reopen()
    reopened.pass_time(35)
    access = reopened.principal_of(koitab.sha256_hex("token of " + HOST))
    reopened.sync(access)
    reopened.pass_time(1)
    assert reopened.take_notifications() == ["Night/Backup on web1 is running "
                                             "unusually long"]


@pytest.mark.parametrize("usual, took, fast", [
    (10, 1.9, True), (10, 2.1, False), (0.5, 0.01, False)])
def test_unusually_fast_run_is_notified(dashboard, web1, usual, took, fast):
    twenty(dashboard, web1, usual)
    dashboard.runs(web1, dashboard.record(started=NOW - took))
    assert [alert["text"] for alert in dashboard.state["alerts"]] == [
        "Night/Backup on web1 finished in 1.9s; it usually takes at least "
        "10s"] * fast
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 was unusually fast"
                                              ] * fast
    dashboard.runs(web1, dashboard.record())
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 takes its usual time again"
                                              ] * fast


# ==========================================================================
# Hosts
# ==========================================================================

def test_host_that_is_down_has_one_alert_and_its_jobs_are_unknown(
        dashboard, web1):
    dashboard.sync(web1, next={"root\nbackup": NOW + 60, "root\ncrawl": NOW +
                               60})
    dashboard.runs(web1, dashboard.record("running", started=NOW, next=NOW +
                                          60))
    dashboard.pass_time(89)
    assert dashboard.take_notifications() == []
    dashboard.pass_time(1)
    assert dashboard.take_notifications() == ["web1 is down"]
    assert dashboard.state["hosts"][0]["state"] == "down"
    assert {job["state"] for job in dashboard.state["jobs"]} == {"unknown"}
    for _ in range(50):
        dashboard.pass_time(100)
    assert dashboard.take_notifications() == [] and kinds(dashboard) == [
        "down"]
    dashboard.sync(web1)
    assert dashboard.take_notifications() == ["web1 is back"]
    assert dashboard.job()["state"] == "running"
    dashboard.pass_time(29)
    assert dashboard.take_notifications() == []   # it may have much to send
    dashboard.sync(web1)
    alive(dashboard, web1, 40)
    assert dashboard.take_notifications() == ["Night/Backup on web1 is late",
                                              "Night/Crawl on web1 is late"]


def test_host_that_may_be_down_has_no_late_jobs(dashboard, web1):
    """It was heard of shortly before the start, and not since."""
    dashboard.sync(web1, next={"root\nbackup": NOW + 10})
    dashboard.pass_time(40)
    dashboard.sync(web1)
    for _ in range(9):
        dashboard.pass_time(10)
    assert dashboard.take_notifications() == ["web1 is down"]


def test_host_that_polls_slowly_is_not_down(dashboard, web1):
    for _ in range(20):
        dashboard.pass_time(80)
        dashboard.sync(web1)
    assert dashboard.take_notifications() == []


def test_host_that_never_connected_is_new_and_not_down(dashboard):
    dashboard.join()
    dashboard.pass_time(9999)
    assert dashboard.take_notifications() == [] and dashboard.state["hosts"][
        0]["state"] == "new"


def test_check_of_a_host_just_after_a_restart_raises_no_alert(dashboard, web1):
    """The dashboard was restarted: no host can have connected yet."""
    dashboard.clock.time += DAY
    reopened = dashboard.reopen()
    reopened.do(reopened.dashboard.rules.check_host, HOST, reopened.now)
    assert reopened.take_notifications() == []


def test_hosts_have_time_to_reconnect_after_a_restart(dashboard, web1):
    dashboard.clock.time += DAY
    reopened = dashboard.reopen()
    reopened.dashboard.run_once()
    assert reopened.take_notifications() == []
    reopened.pass_time(89)
    assert reopened.take_notifications() == []
    reopened.pass_time(2)
    assert reopened.take_notifications() == ["web1 is down"]
    more = reopened.reopen()
    more.pass_time(200)
    assert more.take_notifications() == []        # it was notified
    assert more.state["hosts"][0]["state"] == "down"


# ==========================================================================
# Checks
# ==========================================================================

def test_check_is_notified_when_it_is_down_and_when_it_is_up_again(dashboard):
    check = dashboard.do(dashboard.dashboard.checks.create,
                         {"name": "Sync"},
                         NOW)["id"]
    dashboard.ping(check)
    dashboard.pass_time(DAY + HOUR)
    assert dashboard.take_notifications() == ["Sync is down"] and kinds(
        dashboard) == ["down"]
    dashboard.pass_time(DAY)
    dashboard.ping(check)
    assert dashboard.take_notifications() == ["Sync is up"] and kinds(
        dashboard) == []
    dashboard.ping(check, action="fail")
    dashboard.ping(check, action="fail")
    assert dashboard.take_notifications() == ["Sync failed"] and kinds(
        dashboard) == ["failed"]


# ==========================================================================
# The end of what is removed
# ==========================================================================

def open_alerts(dashboard) -> list:
    """What a receiver that pairs beginnings and ends has open."""
    found = {}
    for subject, kind, resolved in dashboard.rows(
            "select subject, kind, resolved from notifications order by id"):
        found[subject, kind] = not resolved
    return [key for key, is_open in found.items() if is_open]


def test_alert_ends_when_its_job_leaves_the_tab(dashboard, web1):
    dashboard.runs(web1, dashboard.record(exit=1),
                   dashboard.record(tag="crawl", name="Crawl", exit=1))
    assert len(open_alerts(dashboard)) == 2
    dashboard.sync(web1, list=dashboard.list_of(
        web1, spec("renamed"), spec("crawl")))
    assert open_alerts(dashboard) == [("job:2", "failed")]
    assert dashboard.take_notifications()[2:] == [
        "Night/Backup on web1 was removed"]


def test_alerts_end_when_their_host_is_removed(dashboard, web1):
    dashboard.runs(web1, dashboard.record(exit=1))
    dashboard.pass_time(100)
    assert sorted(open_alerts(dashboard)) == [
        (f"host:{HOST}", "down"), ("job:1", "failed")]
    dashboard.do(dashboard.dashboard.retention.delete, {"host": HOST},
                 dashboard.now)
    assert open_alerts(dashboard) == [] and kinds(dashboard) == []
    assert dashboard.take_notifications()[2:] == [
        "Night/Backup on web1 was removed", "web1 was removed"]


@pytest.mark.parametrize("action, words", [
    ("delete", "Sync was deleted"), ("pause", "Sync is paused")])
def test_alert_ends_when_its_check_is_deleted_or_paused(dashboard, action,
                                                        words):
    checks = dashboard.dashboard.checks
    check = dashboard.do(checks.create, {"name": "Sync"}, NOW)["id"]
    dashboard.ping(check, action="fail")
    dashboard.do(checks.change, check, {"do": action}, dashboard.now)
    assert open_alerts(dashboard) == [] and kinds(dashboard) == []
    assert dashboard.take_notifications() == ["Sync failed", words]


def test_slow_alert_ends_when_the_host_lost_its_history(dashboard, web1):
    twenty(dashboard, web1)
    dashboard.runs(web1, dashboard.record("running", started=NOW))
    alive(dashboard, web1, 40)
    assert open_alerts(dashboard) == [("job:1", "slow")]
    dashboard.sync(web1, epoch=2)
    assert open_alerts(dashboard) == []


def test_one_change_of_a_check_is_reported_a_minute(dashboard):
    check = dashboard.do(dashboard.dashboard.checks.create, {"name": "Sync"},
                         NOW)["id"]
    for action in ("fail", "success") * 500:
        dashboard.ping(check, action=action)
    assert dashboard.rows("select title, due from notifications") == [
        ("Sync failed", NOW), ("Sync is up", NOW + 60)]
    dashboard.ping(check, action="fail")
    assert dashboard.rows("select due from notifications where not resolved"
                          ) == [(NOW,), (NOW + 120,)]


# ==========================================================================
# Settings
# ==========================================================================

def change_settings(dashboard, **fields) -> dict:
    return dashboard.do(dashboard.dashboard.rules.change_settings, fields,
                        dashboard.now)


def test_job_alerts_after_its_third_failure_in_a_row(dashboard, web1):
    assert change_settings(dashboard, failures=3) == {
        "failures": 3, "host_down": 90}
    dashboard = dashboard.reopen()
    fails = dashboard.record(exit=1), dashboard.record(exit=1)
    dashboard.runs(web1, *fails)
    assert kinds(dashboard) == [] and dashboard.job()["state"] == "failed"
    dashboard.runs(web1, dashboard.record())            # it begins again
    dashboard.runs(web1, dashboard.record(exit=1), dashboard.record(exit=1))
    assert dashboard.take_notifications() == []
    dashboard.runs(web1, dashboard.record(exit=1))
    assert "3 times in a row" in dashboard.state["alerts"][0]["text"]
    dashboard.runs(web1, dashboard.record())
    assert len(dashboard.take_notifications()) == 2


def test_host_is_down_after_as_many_seconds_as_are_set(dashboard, web1):
    change_settings(dashboard, host_down=600)
    dashboard.pass_time(500)
    dashboard.sync(web1)
    dashboard = dashboard.reopen()
    dashboard.pass_time(599)
    assert kinds(dashboard) == []
    dashboard.pass_time(2)
    assert kinds(dashboard) == ["down"]


def test_host_that_is_down_by_a_new_setting_alerts_at_once(dashboard, web1):
    change_settings(dashboard, host_down=3600)
    dashboard.pass_time(700)
    assert kinds(dashboard) == []
    change_settings(dashboard, host_down=600)
    dashboard.pass_time(1)
    assert kinds(dashboard) == ["down"]


def test_settings_of_two_requests_at_once_are_both_kept(dashboard):
    rules = dashboard.dashboard.rules
    for fields in ({"failures": 3}, {"host_down": 300}):
        dashboard.dashboard.write(rules.change_settings, fields, NOW)
    dashboard.dashboard.run_once()
    assert rules.settings == {"failures": 3, "host_down": 300}
    assert dashboard.reopen().dashboard.rules.settings == rules.settings


@pytest.mark.parametrize("fields", [
    {"failures": 0}, {"failures": 101}, {"failures": True}, {"failures": 1.5},
    {"host_down": 59}, {"host_down": 86_401}, {"fail": 1}])
def test_setting_outside_its_limits_is_refused(dashboard, fields):
    with refused(400):
        change_settings(dashboard, **fields)
    assert dashboard.dashboard.rules.settings == {
        "failures": 1, "host_down": 90}


# ==========================================================================
# Certificates
# ==========================================================================

def own_certificate(dashboard, expires: float) -> None:
    """The dashboard has read a certificate."""
    rules = dashboard.dashboard.rules
    rules.certificate = expires
    dashboard.do(rules.check_certificate, "", dashboard.now)


def test_own_certificate_alerts_14_days_before_it_expires(dashboard, web1):
    expires = NOW + 14 * DAY + HOUR
    own_certificate(dashboard, expires)
    alive(dashboard, web1, HOUR - 60)
    assert kinds(dashboard) == []
    alive(dashboard, web1, 120)
    alert, = dashboard.state["alerts"]
    assert (alert["kind"], alert["subject"]) == (
        "certificate", "dashboard:certificate")
    assert koitab.format_rfc3339(expires) in alert["text"]
    dashboard = dashboard.reopen()
    own_certificate(dashboard, expires + 90 * DAY)
    alive(dashboard, web1, 100)
    assert kinds(dashboard) == []
    assert dashboard.take_notifications() == [
        "the dashboard's certificate expires soon",
        "the dashboard's certificate was renewed"]


def test_expiring_certificate_seen_by_several_hosts_has_one_alert(
        dashboard, web1):
    """A proxy in front of the dashboard shows its own."""
    web2 = dashboard.join("d4" * 16, "web2")
    alive(dashboard, web1, 100)
    for expires, found in ((NOW + 3 * DAY, ["certificate"]),
                           (NOW + 90 * DAY, [])):
        for host in (web1, web2):
            dashboard.sync(host, certificate_expires=expires)
            dashboard.sync(host)            # of a fresh agent: unknown
        dashboard.pass_time(1)
        assert kinds(dashboard) == found
    assert dashboard.take_notifications() == [
        "the dashboard's certificate expires soon",
        "the dashboard's certificate was renewed"]


def test_expired_certificate_alerts_until_its_host_gets_another(dashboard,
                                                               web1):
    """Its host cannot come any more, and other hosts say nothing of it."""
    alive(dashboard, web1, 100)
    web2 = dashboard.join("d4" * 16, "web2")
    dashboard.sync(web2, certificate_expires=NOW + HOUR)
    dashboard.pass_time(1)
    assert "web2 gets" in dashboard.state["alerts"][0]["text"]
    own_certificate(dashboard, NOW + 90 * DAY)
    alive(dashboard, web1, HOUR + 100)
    assert kinds(dashboard) == ["certificate", "down"]
    dashboard = dashboard.reopen()
    alive(dashboard, web1, HOUR + 100)
    assert kinds(dashboard) == ["certificate", "down"]
    dashboard.sync(web2, certificate_expires=NOW + 90 * DAY)
    dashboard.pass_time(1)
    assert kinds(dashboard) == []
    assert "the dashboard's certificate was renewed" in \
        dashboard.take_notifications()


def test_renewed_certificate_ends_the_alert_though_one_host_is_off(dashboard,
                                                                  web1):
    web2 = dashboard.join("d4" * 16, "web2")
    alive(dashboard, web1, 100)
    for host in (web1, web2):
        dashboard.sync(host, certificate_expires=NOW + DAY)
    dashboard.pass_time(1)
    assert kinds(dashboard) == ["certificate"]
    alive(dashboard, web1, 200)
    dashboard.sync(web1, certificate_expires=NOW + 90 * DAY)
    dashboard.pass_time(1)
    assert kinds(dashboard) == ["down"]


def test_alert_of_a_certificate_ends_when_its_host_is_removed(dashboard,
                                                             web1):
    alive(dashboard, web1, 100)
    dashboard.sync(web1, certificate_expires=NOW + DAY)
    dashboard.pass_time(1)
    dashboard.do(dashboard.dashboard.hosts.leave, HOST, dashboard.now)
    dashboard.pass_time(HOUR + 1)
    assert kinds(dashboard) == []
    assert dashboard.take_notifications()[-1] == \
        "the dashboard's certificate is not used any more"


def test_alert_for_a_certificate_can_be_snoozed(dashboard, web1):
    alive(dashboard, web1, 100)
    snooze(dashboard, "dashboard:certificate", HOUR)
    own_certificate(dashboard, dashboard.now + DAY)
    assert dashboard.take_notifications() == []
    assert kinds(dashboard) == ["certificate"]
    with refused(404):
        snooze(dashboard, "dashboard:x", HOUR)


# ==========================================================================
# Snooze
# ==========================================================================

def snooze(dashboard, subject: str, seconds: float) -> None:
    dashboard.do(dashboard.dashboard.rules.snooze, {
        "subject": subject, "until": dashboard.now + seconds if seconds else
        0},
        dashboard.now)


def test_snoozed_alert_is_shown_but_not_notified(dashboard, web1):
    snooze(dashboard, "job:1", HOUR)
    assert dashboard.job() is not None and dashboard.job()[
        "snoozed"] == NOW + HOUR
    dashboard.runs(web1, dashboard.record(exit=1))
    assert dashboard.take_notifications() == [] and dashboard.job()[
        "state"] == "failed"
    dashboard.runs(web1, dashboard.record())
    assert dashboard.take_notifications() == []   # its end neither


@pytest.mark.parametrize("early", [False, True])
def test_alert_that_outlasts_its_snooze_is_notified_at_its_end(
        dashboard, web1, early):
    snooze(dashboard, "job:1", HOUR)
    dashboard.runs(web1, dashboard.record(exit=1))
    if early:
        snooze(dashboard, "job:1", 0)
    else:
        alive(dashboard, web1, HOUR + 20)
    assert len(dashboard.take_notifications()) == 1 and dashboard.job()[
        "snoozed"] == 0
    dashboard.runs(web1, dashboard.record())
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 works again"]


def test_snoozed_host_is_shown_with_the_end_of_its_snooze(dashboard, web1):
    snooze(dashboard, f"host:{HOST}", HOUR)
    assert dashboard.state["hosts"][0]["snoozed"] == NOW + HOUR
    snooze(dashboard, f"host:{HOST}", 0)
    assert dashboard.state["hosts"][0]["snoozed"] == 0


def test_snooze_survives_a_restart(dashboard, web1):
    snooze(dashboard, f"host:{HOST}", HOUR)
    reopened = dashboard.reopen()
    reopened.pass_time(100)
    assert reopened.take_notifications() == []
    reopened.pass_time(HOUR)
    assert len(reopened.take_notifications()) == 1


def snooze_until(dashboard, until, subject: str = "job:1") -> None:
    dashboard.do(dashboard.dashboard.rules.snooze,
                 {"subject": subject, "until": until}, dashboard.now)


def test_known_alert_that_outlasts_its_snooze_is_notified_again(dashboard,
                                                                web1):
    dashboard.runs(web1, dashboard.record(exit=1))
    (first,), = dashboard.rows("select key from notifications")
    assert len(dashboard.take_notifications()) == 1
    snooze(dashboard, "job:1", HOUR)
    reopened = dashboard.reopen()
    alive(reopened, web1, HOUR - 20)
    assert reopened.take_notifications() == []
    alive(reopened, web1, 60)
    (again, alerts), = reopened.rows("select key, alerts from notifications")
    # Receivers drop a key that they know; the id pairs it with its end.
    assert again != first and json.loads(alerts)[0]["id"] == "1-failed"
    reopened.take_notifications()
    reopened.runs(web1, reopened.record())
    assert reopened.take_notifications() == [
        "Night/Backup on web1 works again"]


def test_snooze_until_well_ends_with_the_last_alert(dashboard, web1):
    dashboard.runs(web1, dashboard.record(exit=1))
    dashboard.take_notifications()
    snooze_until(dashboard, "well")
    shown = dashboard.state["alerts"][0]["snoozed"], dashboard.job()["snoozed"]
    assert shown == (koitab.UNTIL_WELL,) * 2
    dashboard = dashboard.reopen()
    alive(dashboard, web1, 3 * HOUR)
    dashboard.runs(web1, dashboard.record(exit=1))
    assert dashboard.take_notifications() == []
    dashboard.lines.clear()
    dashboard.runs(web1, dashboard.record())
    assert dashboard.job()["snoozed"] == 0
    assert dashboard.take_notifications() == [
        "Night/Backup on web1 works again"]
    dashboard.runs(web1, dashboard.record(exit=1))
    assert dashboard.take_notifications() == ["Night/Backup on web1 failed"]


def test_job_without_an_alert_cannot_be_snoozed_until_well(dashboard, web1):
    with refused(409):
        snooze_until(dashboard, "well")


@pytest.mark.parametrize("until", [
    NOW + HOUR, koitab.format_rfc3339(NOW + HOUR, 0),
    koitab.format_rfc3339(NOW + HOUR, 7200), "2027-01-15t09:00:00.0z"])
def test_end_of_a_snooze_is_given_in_seconds_or_as_rfc_3339(
        dashboard, web1, until):
    snooze_until(dashboard, until)
    assert dashboard.job()["snoozed"] == NOW + HOUR


@pytest.mark.parametrize("until", [
    "2027-01-15", "2027-01-15T09:00:00", "2027-02-30T09:00:00Z", "soon", "",
    None, True, -1, "2027-W01"])
def test_end_of_a_snooze_that_is_not_a_time_is_refused(dashboard, web1,
                                                       until):
    with refused(400):
        snooze_until(dashboard, until)


def test_check_is_snoozed_by_the_hash_of_its_uuid(dashboard):
    check = dashboard.do(dashboard.dashboard.checks.create, {"name": "Sync"},
                         NOW)["id"]
    snooze_until(dashboard, NOW + HOUR, "check:" + koitab.hashed_uuid(check))
    dashboard.ping(check, action="fail")
    assert dashboard.take_notifications() == []


def test_snoozed_check_is_in_the_audit_without_its_uuid(dashboard):
    check = dashboard.do(dashboard.dashboard.checks.create, {"name": "Sync"},
                         NOW)["id"]
    snooze_until(dashboard, NOW + HOUR, f"check:{check}")
    row = dashboard.ask(dashboard.dashboard.rules.audit.page)["rows"][0]
    assert (row["what"], row["label"]) == (
        "snooze", "check:" + koitab.hashed_uuid(check))
    assert check not in json.dumps(row)


@pytest.mark.parametrize("subject", [
    "job:99", "job:x", "job:", "host:" + "d" * 32, "check:1", "", "job:²",
    "moon:1", "job:" + "9" * 40])
def test_unknown_subject_cannot_be_snoozed(dashboard, web1, subject):
    with refused(404):
        snooze(dashboard, subject, 60)


def test_alerts_of_schema_8_get_their_present_kind(dashboard, web1):
    dashboard.pass_time(200)
    assert kinds(dashboard) == ["down"]
    dashboard.dashboard.db.connection.executescript(
        "update alerts set kind = 'silent'; pragma user_version=8;")
    after = dashboard.reopen()
    assert kinds(after) == ["down"]
    after.sync(web1)
    assert kinds(after) == []

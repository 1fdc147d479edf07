"""Dashboard: what hosts send is stored once, completely, and shown."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import threading
from unittest import mock

import pytest

import support
from dashboard_rig import (BACK_TO_SCHEMA_6, HOST, NOW, OPERATOR_TOKEN,
                           VIEWER_TOKEN, InProcessDashboard, frames,
                           new_token, piece, refused, spec, token_of)

koitab = support.load("koitab")
Error = koitab.Error


pytestmark = pytest.mark.usefixtures("small_ballast")


# ==========================================================================
# The file, and how it is written
# ==========================================================================

def test_database_syncs_every_commit_to_disk(tmp_path):
    dashboard = InProcessDashboard(tmp_path / "d.db", durable=True)
    assert dashboard.dashboard.db.value("pragma journal_mode") == "wal"
    assert dashboard.dashboard.db.value("pragma synchronous") == 2     # FULL
    # INCREMENTAL
    assert dashboard.dashboard.db.value("pragma auto_vacuum") == 2


def test_database_is_accessible_to_its_owner_only(dashboard, tmp_path):
    dashboard.join()
    assert {file.name: support.mode(file) for file in tmp_path.iterdir()
            } == dict.fromkeys((
                "dashboard.db", "dashboard.db-wal", "dashboard.db-shm",
                "dashboard.db.ballast", "dashboard.db.lock"), 0o600)


def test_a_second_dashboard_does_not_open_the_same_database(dashboard):
    with pytest.raises(Error, match="another dashboard"):
        InProcessDashboard(dashboard.path)


def test_database_of_a_newer_schema_is_refused_unchanged(dashboard):
    dashboard.dashboard.db.execute("pragma user_version=99")
    dashboard.dashboard.close()
    with pytest.raises(Error, match="newer koi"):
        InProcessDashboard(dashboard.path)


def test_hint_for_an_older_schema_names_the_steps_to_a_new_database(dashboard):
    dashboard.dashboard.db.execute("pragma user_version=1")
    dashboard.dashboard.close()
    with pytest.raises(Error, match="older koi") as refused:
        InProcessDashboard(dashboard.path)
    _, _, commands = refused.value.hint.partition(": ")
    subprocess.run(commands, shell=True, check=True)
    InProcessDashboard(dashboard.path).dashboard.close()


def test_failed_operation_does_not_undo_the_others(dashboard):
    def good(db, name):
        db.execute("insert into meta values (?, '1')", name)
        return name

    def bad(db):
        db.execute("insert into meta values ('half', '1')")
        raise Error("no", "", 400)

    def bug(db):
        db.execute("insert into meta values ('bug', '1')")
        db.execute("insert into nowhere values (1)")

    told = []
    for operation, *values in ((good, "a"), (bad,), (bug,), (good, "b")):
        dashboard.dashboard.write(operation, *values,
                                  then=lambda *how: told.append(how))
    dashboard.dashboard.run_once()
    assert [how[0] for how in told] == ["a", None, None, "b"]
    assert told[1][1].status == 400
    assert isinstance(told[2][1], sqlite3.OperationalError)
    assert dashboard.rows("select name from meta where value = '1' order by 1"
                          ) == [("a",), ("b",)]


def test_waiting_operations_are_written_in_one_transaction(dashboard):
    seen, commits = [], []
    dashboard.dashboard.db.connection.set_trace_callback(
        lambda text: commits.append(text) if text.lower() == "commit"
        else None)
    for number in range(50):
        dashboard.dashboard.write(lambda db, n: seen.append(n), number)
    dashboard.dashboard.run_once()
    assert seen == list(range(50))
    assert len(commits) == 2        # the group, and a chore


def test_operation_is_answered_after_its_commit(dashboard):
    """Another connection sees what was acknowledged, when it is."""
    seen = []
    dashboard.dashboard.write(lambda db: db.execute(
        "insert into meta values ('x', 'y')"), then=lambda *how: seen.append(
            dashboard.ask(lambda db: db.execute(
                "select value from meta where name = 'x'").fetchone())))
    dashboard.dashboard.run_once()
    assert seen == [("y",)]


def test_failed_operation_does_not_change_the_memory(dashboard):
    def operation(_db):
        dashboard.dashboard.changes.after_commit(lambda: done.append(1))
        raise Error("no")

    done = []
    dashboard.dashboard.write(operation)
    dashboard.dashboard.run_once()
    assert done == []


def test_read_operation_cannot_write(dashboard):
    with pytest.raises(Error):
        dashboard.ask(lambda db: db.execute("delete from meta"))


def test_writer_thread_finishes_waiting_operations_before_it_ends(tmp_path):
    hub = koitab.Dashboard(str(tmp_path / "d.db"))
    hub.open()
    hub.start()
    told = []
    for number in range(1000):
        hub.write(lambda db, n: n, number,
                  then=lambda result, _: told.append(result))
    hub.stop()
    assert told == list(range(1000))
    assert pytest.raises(Error, hub.do, lambda db: 1).value.status == 503


def test_bug_in_the_writer_thread_ends_it_and_no_caller_hangs(tmp_path):
    hub = koitab.Dashboard(str(tmp_path / "d.db"))
    hub.open()
    hub.due_timers = lambda: 1 / 0
    hub.start()
    support.wait_until(lambda: hub.broken, 5)
    assert "division" in hub.broken
    hub.thread.join()
    assert pytest.raises(Error, hub.do, lambda db: 1).value.status == 503
    hub.stop()


def test_disk_error_ends_all_writes_and_reads_continue(dashboard, monkeypatch):
    def operation(_db):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(dashboard.dashboard.db, "is_disk_full",
                        lambda: False)
    with pytest.raises(Error, match="I/O"):
        dashboard.do(operation)
    assert "I/O" in dashboard.dashboard.broken
    with pytest.raises(Error):
        dashboard.do(lambda db: 1)
    assert dashboard.ask(lambda db: 1) == 1     # reads continue


def test_full_disk_gives_507_until_there_is_room(dashboard, monkeypatch):
    def operation(_db):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(koitab.Dashboard, "make_ballast", lambda hub: room)
    room = False
    with refused(507):
        dashboard.do(operation)
    assert not os.path.exists(dashboard.path + ".ballast")
    assert "full" in dashboard.state["problems"][0]
    with refused(507):
        dashboard.do(lambda db: 1)
    room = True
    dashboard.clock.time += 3
    dashboard.run_chores()
    assert dashboard.do(lambda db: 1) == 1
    assert dashboard.dashboard.problem_list == []


def test_backup_is_complete_and_accessible_to_its_owner_only(
        dashboard, web1, tmp_path):
    dashboard.runs(web1, dashboard.record())
    dashboard.dashboard.backup(str(tmp_path / "copy.db"))
    assert support.mode(tmp_path / "copy.db") == 0o600
    dashboard.runs(web1, dashboard.record())
    copy = InProcessDashboard(tmp_path / "copy.db", fresh=False)
    assert len(copy.job()["recent_runs"]) == 1
    copy.dashboard.close()


# ==========================================================================
# Keys and dashboards
# ==========================================================================

def test_token_gives_the_access_of_its_role(dashboard, web1):
    key_of = dashboard.principal_of
    assert key_of(OPERATOR_TOKEN) == koitab.Principal("operator")
    assert key_of(VIEWER_TOKEN) == koitab.Principal("viewer", "", "viewer")
    assert key_of("view-" + VIEWER_TOKEN).role == "viewer"
    assert web1 == koitab.Principal("host", HOST)
    for token in ("", "a" * 63, "A" * 64, "f" * 64, "a" * 64 + "\n"):
        assert key_of(token) is None


def test_rotated_keys_are_refused(dashboard):
    dashboard.do(dashboard.dashboard.credentials.rotate, {
        "salt": "1" * 32, "rounds": 700_000,
        "api_sha256": koitab.sha256_hex("1" * 64)}, NOW)
    assert dashboard.principal_of(OPERATOR_TOKEN) is None
    assert dashboard.principal_of("1" * 64).role == "operator"
    assert dashboard.ask(dashboard.dashboard.credentials.salt) == {
        "dash": dashboard.dash, "salt": "1" * 32, "rounds": 700_000}


def test_the_database_holds_no_token(dashboard, web1):
    dashboard.run_chores()
    data = b"".join(open(dashboard.path + ending, "rb").read()
                    for ending in ("", "-wal"))
    assert OPERATOR_TOKEN.encode() not in data
    assert koitab.sha256_hex("token of " + HOST).encode() not in data
    assert koitab.sha256_hex(OPERATOR_TOKEN).encode() in data


@pytest.mark.parametrize("fields", [
    {"rounds": 599_999}, {"rounds": 600_000.0}, {"rounds": True},
    {"salt": "0" * 31}, {"salt": "G" * 32}, {"salt": None},
    {"api_sha256": "é" * 64}, {"api_sha256": 7}, {"rounds": 2**70}])
def test_weak_or_malformed_keys_are_refused(dashboard, fields):
    with refused(400):
        dashboard.do(dashboard.dashboard.credentials.rotate, {
            "salt": "0" * 32, "rounds": 600_000, "api_sha256": "1" * 64,
            **fields}, NOW)


def test_a_second_dashboard_is_not_created_in_a_database(dashboard):
    with refused(403) as refusal:
        dashboard.do(dashboard.dashboard.credentials.create, {
            "salt": "0" * 32, "rounds": 600_000,
            "api_sha256": "1" * 64}, NOW)
    assert refusal.message == "this server already has a dashboard"
    assert dashboard.rows("select count(*) from dashboard") == [(1,)]


def test_token_in_use_is_refused_for_another_role(dashboard, web1):
    credentials = dashboard.dashboard.credentials
    for token in (token_of(HOST), VIEWER_TOKEN, OPERATOR_TOKEN):
        used = koitab.sha256_hex(token)
        with refused(409):
            dashboard.do(credentials.rotate, {
                "salt": "0" * 32, "rounds": 600_000, "api_sha256": used}, NOW)
        with refused(409):
            dashboard.do(credentials.change_tokens,
                         new_token("checks", token, "another"), NOW)
        with refused(409):
            dashboard.do(dashboard.dashboard.hosts.join, {
                "host": "d4" * 16, "name": "x", "token_sha256": used}, NOW)


# ==========================================================================
# Access tokens
# ==========================================================================

def test_access_tokens_are_added_listed_and_revoked_one_by_one(dashboard):
    credentials = dashboard.dashboard.credentials
    dashboard.clock.time += 100
    dashboard.do(credentials.change_tokens,
                 new_token("metrics", "7" * 64, "prometheus"), dashboard.now)
    assert dashboard.principal_of("metrics-" + "7" * 64) == koitab.Principal(
        "metrics", "", "prometheus")
    credentials.used["prometheus"] = NOW + 160
    for _ in range(2):          # in memory, then from the database
        assert dashboard.ask(credentials.list_tokens) == {"tokens": [
            {"name": "prometheus", "role": "metrics", "created": NOW + 100,
             "used": NOW + 160},
            {"name": "viewer", "role": "viewer", "created": NOW,
             "used": None}]}
        dashboard.do(dashboard.dashboard.hosts.store_seen)
        assert credentials.used == {}
    dashboard.do(credentials.change_tokens,
                 {"do": "revoke", "name": "prometheus"}, NOW)
    assert dashboard.principal_of("7" * 64) is None
    assert dashboard.principal_of(VIEWER_TOKEN).role == "viewer"
    assert [(row["label"], row["state"]) for row in dashboard.ask(
        dashboard.dashboard.audit.page)["rows"][:2]] == [
            ("prometheus", "revoke"), ("prometheus", "add")]


@pytest.mark.parametrize("status, fields", [
    (409, {"name": "viewer"}), (400, {"name": " "}), (400, {"role": "host"}),
    (400, {"role": "operator"}), (400, {"sha256": "7"}), (400, {"x": 1}),
    (404, {"do": "revoke", "name": "other"})])
def test_malformed_access_token_is_refused(dashboard, status, fields):
    with refused(status):
        dashboard.do(dashboard.dashboard.credentials.change_tokens,
                     {**new_token("checks", "7" * 64), **fields}, NOW)


def form_of(dashboard) -> dict[str, list]:
    """Tables with their columns, and indexes and triggers with their SQL."""
    return {name: dashboard.rows(f"pragma table_info({name})") or [sql]
            for name, sql in dashboard.rows(
                "select name, sql from sqlite_master where name not like "
                "'sqlite_%' and name not like 'found%'")}


def test_a_key_of_viewers_is_an_access_token_after_the_upgrade(dashboard):
    db = dashboard.dashboard.db
    db.connection.executescript(f"""
        drop table tokens; alter table dashboard rename to new;
        create table dashboard (
            id integer primary key check (id = 1), dash text not null,
            salt text not null, rounds integer not null,
            api_sha256 text not null, view_sha256 text not null,
            ping_key text not null, badge_key text not null,
            created real not null);
        insert into dashboard select id, dash, salt, rounds, api_sha256,
            '{koitab.sha256_hex("8" * 64)}', ping_key, badge_key, created
            from new;
        drop table new; {BACK_TO_SCHEMA_6} pragma user_version=5;""")
    after = dashboard.reopen()
    assert after.principal_of("view-" + "8" * 64) == koitab.Principal(
        "viewer", "", "viewer key")
    assert after.principal_of(OPERATOR_TOKEN).role == "operator"
    assert after.dash == dashboard.dash
    fresh = InProcessDashboard(dashboard.path + "2")
    assert form_of(after) == form_of(fresh)
    for each in (after, fresh):
        each.dashboard.close()


# ==========================================================================
# A sync
# ==========================================================================

def test_job_list_creates_jobs_and_its_exact_text_is_kept(dashboard, web1):
    dashboard.sync(web1, list=dashboard.list_of(web1, spec(), spec("crawl")),
                   next={"root\nbackup": NOW + 60, "root\ncrawl": None})
    backup, crawl = dashboard.state["jobs"]
    assert (backup["name"], backup["words"], backup["next"]) == (
        "Backup", "At 03:00", NOW + 60)
    assert crawl["next"] is None and not crawl["removed"]
    assert dashboard.ask(dashboard.dashboard.hosts.signed_list,
                         HOST) == \
        dashboard.list_of(web1, spec(), spec("crawl"))


def test_job_has_the_description_in_its_list(dashboard, web1):
    def send(**fields):
        dashboard.sync(web1, list=dashboard.list_of(web1, spec(**fields)))

    send(about="Sends a greeting.")
    assert dashboard.job()["about"] == "Sends a greeting."
    send()          # from an older koid
    assert dashboard.job()["about"] == ""
    for wrong in (5, "x" * 301):
        with pytest.raises(koitab.Error):
            send(about=wrong)


def test_job_missing_from_the_list_is_removed_until_it_is_listed_again(
        dashboard, web1):
    dashboard.sync(web1, list=dashboard.list_of(web1, spec(), spec("crawl")))
    dashboard.sync(web1, list=dashboard.list_of(web1, spec("crawl")))
    assert [job["removed"] for job in dashboard.state["jobs"]] == [True, False]
    dashboard.sync(web1, list=dashboard.list_of(web1, spec(), spec("crawl")))
    assert not any(job["removed"] for job in dashboard.state["jobs"])


def test_job_list_contains_the_ends_of_pauses(dashboard, web1):
    body = dashboard.list_of(web1, spec(), spec("crawl"))
    for paused in ({"root\ncrawl": NOW + 60}, {"root\ncrawl": 0}, {}):
        inner = {**json.loads(body["body"]), "paused": paused}
        dashboard.sync(web1, list={**body, "body": json.dumps(inner)})
        assert [job["paused"] for job in dashboard.state["jobs"]] == [
            None, paused.get("root\ncrawl")]


def test_incomplete_job_list_of_a_user_removes_no_job_of_that_user(
        dashboard, web1):
    def remaining(*specs: str, **fields) -> set[str]:
        dashboard.sync(web1, list=dashboard.list_of(web1, *specs, **fields))
        return {job["tag"] for job in dashboard.state["jobs"]
                if not job["removed"]}

    of_alice = [spec(tag, user="alice") for tag in ("mine", "more")]
    assert remaining(spec(), spec("crawl"), *of_alice, partial=[]) == {
        "backup", "crawl", "mine", "more"}
    assert remaining(spec(), of_alice[0], partial=["alice"]) == {
        "backup", "mine", "more"}
    assert remaining(spec(), of_alice[0], partial=[]) == {"backup", "mine"}


def test_unknown_job_list_is_requested(dashboard, web1):
    assert dashboard.sync(web1)["want_list"]
    body = dashboard.list_of(web1, spec())
    sha = koitab.sha256_hex(body["body"])
    assert not dashboard.sync(web1, list=body)["want_list"]
    assert not dashboard.sync(web1, list_sha=sha)["want_list"]
    assert dashboard.sync(web1, list_sha="0" * 64)["want_list"]


def test_repeated_record_is_stored_once(dashboard, web1):
    record = dashboard.record()
    for _ in range(3):
        assert dashboard.runs(web1, record)["acked"] == 1
    assert dashboard.rows("select count(*) from runs") == [(1,)]
    assert len(dashboard.job()["recent_runs"]) == 1


def test_active_run_is_updated_and_never_returns_to_an_earlier_state(
        dashboard, web1):
    start = dashboard.record("running")
    dashboard.runs(web1, start)
    assert dashboard.job()["state"] == "running"
    end = dashboard.record(run=start["run"])
    dashboard.runs(web1, end)
    assert dashboard.job()["state"] == "ok" and dashboard.job()[
        "running"] == []
    dashboard.runs(web1, {**start, "change": 99})       # late, and wrong
    assert dashboard.job()["state"] == "ok"
    assert dashboard.rows("select count(*) from runs") == [(1,)]


def test_end_of_a_run_is_accepted_before_its_start(dashboard, web1):
    start = dashboard.record("running")
    end = dashboard.record(run=start["run"], exit=3)
    assert dashboard.runs(web1, end)["acked"] == 2
    dashboard.runs(web1, start)
    assert dashboard.job()["state"] == "failed"
    assert dashboard.job()["last"]["exit"] == 3


def test_run_of_an_unknown_job_creates_the_job(dashboard, web1):
    dashboard.runs(web1, dashboard.record(tag="gone", name="Old"))
    job, = dashboard.state["jobs"]
    assert (job["name"], job["removed"], job["state"]) == ("Old", True, "ok")


def test_runs_sent_again_with_another_tag_move_to_that_job(dashboard, web1):
    """koid sends the runs of a job that was renamed again."""
    dashboard.channel()
    output = frames("words\n")
    runs = [dashboard.record(size=len(output)), dashboard.record(exit=1)]
    dashboard.runs(web1, *runs)
    dashboard.sync(web1, outputs=[piece(
        runs[0]["run"], 0, output)])
    job = dashboard.job()["id"]
    dashboard.take_notifications()
    dashboard.runs(web1, *({**run, "tag": "renamed", "change": 50 + number}
                           for number, run in enumerate(runs)))
    renamed = dashboard.job("renamed")["id"]
    assert dashboard.rows("select job, have from runs order by id") \
        == [(renamed, len(output)), (renamed, 0)]
    assert dashboard.take_notifications() == [] and job != renamed


def test_runs_of_a_new_history_are_other_runs(dashboard, web1):
    """history.db was lost: the numbers begin again, and are other runs."""
    dashboard.runs(web1, dashboard.record(run=1, change=5))
    reopened = dashboard.record(run=1, change=1, exit=1)
    assert dashboard.sync(web1, epoch=2, records=[reopened])["acked"] == 1
    assert dashboard.rows("select count(*) from runs") == [(2,)]
    assert dashboard.sync(web1, epoch=1)["acked"] == 5


def test_a_restored_database_says_from_where_it_needs_records(dashboard, web1,
                                                              tmp_path):
    dashboard.runs(web1, *[dashboard.record() for _ in range(3)])
    dashboard.dashboard.backup(str(tmp_path / "old.db"))
    late = [dashboard.record() for _ in range(4)]
    assert dashboard.runs(web1, *late)["acked"] == 7
    old = InProcessDashboard(tmp_path / "old.db", fresh=False)
    access = old.principal_of(koitab.sha256_hex("token of " + HOST))
    assert old.sync(access, list_sha="0" * 64) == {
        "v": 3, "acked": 3, "want_list": True, "missing_output": [],
        "requests": [],
        "live": {}}
    assert old.sync(access, records=late)["acked"] == 7
    assert old.rows("select count(*) from runs") == [(7,)]
    old.dashboard.close()


def test_ids_of_runs_are_in_order_of_their_starts(dashboard, web1):
    """A long run ends after others that began later."""
    long = dashboard.record("running")
    short = dashboard.record()
    end = dashboard.record(run=long["run"], change=9)
    dashboard.runs(web1, short, end)
    assert [n for n, in dashboard.rows("select n from runs order by id")] == [
        1, 2]


ODD_FIELDS = [
    {"v": 1}, {"v": "2"}, {"host": "d" * 32}, {"epoch": -1},
    {"epoch": 2**64}, {"instance": "x"}, {"instance": "1-" + "é" * 8},
    {"instance": None}, {"now": "soon"}, {"now": float("nan")},
    {"now": float("inf")}, {"records": {}}, {"records": [7]},
    {"outputs": "x"}, {"next": []}, {"next": {"root\nbackup": "x"}},
    {"next": {"\ud800": 1}}, {"zone": "a\0b"}, {"zone": "\udfff"},
    {"list": {"body": "{", "mac": "e" * 64}},
    {"list": {"body": "[" * 100_000, "mac": "e" * 64}},
    {"list": {"body": "{}", "mac": "e" * 64}},
    {"list": {"body": '{"jobs": [3]}', "mac": "e" * 64}},
    {"list": {"body": "{}", "mac": "e" * 63}}, {"problems": 3},
    {"results": [{"nonce": "x", "state": "accepted"}]},
    {"results": [{"nonce": "0" * 32, "state": "perhaps"}]},
    {"outputs": [{"run": 1, "at": 0, "data": "!"}]},
    {"live": [{"run": "1", "at": 0, "data": ""}]}, {"offset": 1e9}]


@pytest.mark.parametrize("fields", ODD_FIELDS, ids=lambda f: str(f)[:40])
def test_sync_with_an_invalid_field_is_refused_completely(
        dashboard, web1, fields):
    with refused(403 if "host" in fields else 400):
        dashboard.sync(web1, **{"list": dashboard.list_of(web1, spec()),
                                **fields})
    assert dashboard.rows("select count(*) from jobs") == [(0,)]


ODD_RECORDS = [
    {"run": 0}, {"run": 2**63}, {"run": "1"}, {"run": 1.0}, {"run": None},
    {"change": -1}, {"change": True}, {"state": "happy"}, {"state": []},
    {"user": "a\0b"}, {"user": None}, {"tag": "\ud800"}, {"exit": "0"},
    {"exit": 2**40}, {"started": "1"}, {"started": float("nan")},
    {"ended": -1}, {"ended": 1e300}, {"due": 2**64}, {"args": []},
    {"args": {"a": 1}}, {"args": {"a": "\ud800"}}, {"args": {"\udfff": "a"}},
    {"size": -1}, {"bytes": 2**64}, {"reason": 7}, {"label": "\ud800"}]


@pytest.mark.parametrize("fields", ODD_RECORDS, ids=str)
def test_invalid_record_is_refused(dashboard, web1, fields):
    with refused(400):
        dashboard.runs(web1, dashboard.record(), dashboard.record(**fields))
    assert dashboard.rows("select count(*) from runs") == [(0,)]


@pytest.mark.parametrize("fields", [
    {"records": [{}] * 1001}, {"outputs": [{}] * 201},
    {"zone": "x" * 201}, {"next": dict.fromkeys(map(str, range(10_001)))},
    {"list": {"body": "x" * (8 * 2**20 + 1), "mac": "e" * 64}},
    {"outputs": [{"run": 1, "at": 0, "data": "A" * 6_000_000}]}])
def test_sync_with_too_many_records_is_refused(dashboard, web1, fields):
    with refused(413):
        dashboard.sync(web1, **fields)


def test_long_texts_are_cut_or_refused(dashboard, web1):
    dashboard.runs(web1, dashboard.record(reason="x" * 100_000,
                                          args={"a": "'; drop table runs --"}))
    run = dashboard.job()["last"]
    assert len(run["reason"]) == 2000
    assert run["args"] == {"a": "'; drop table runs --"}
    with refused(413):
        dashboard.runs(web1, dashboard.record(args={"a": "x" * 600_000}))


def test_labels_and_commands_are_cut_to_1_kib(dashboard, web1):
    """Twelve syncs of records with labels of 199,000 characters: the
    overview was 91 MiB, the metrics 547 MiB."""
    for number in range(12):
        dashboard.runs(web1, *(dashboard.record(
            tag=f"t{number}-{each}", label="\u00e9" * 199_000, name="")
            for each in range(40)))
    text = "\u00e9" * 50_000
    dashboard.sync(web1, list=dashboard.list_of(web1, spec(
        "backup", name="", label=text, command=text, words=text[:5000])))
    job = dashboard.job()
    assert all(len(job[name].encode()) <= 1024 and job[name].endswith("\u2026")
               for name in ("label", "command", "words"))
    assert len(json.dumps(dashboard.state, ensure_ascii=False).encode()) \
        < 2**20
    metrics = dashboard.ask(dashboard.dashboard.overview.metrics,
                            dashboard.now, {})
    assert len(metrics.encode()) < 2**14


def test_host_keeps_at_most_500_jobs_and_no_user_displaces_others(
        dashboard, web1):
    flood = [spec(f"k{number}", user="alice") for number in range(700)]
    dashboard.sync(web1, list=dashboard.list_of(
        web1, spec("backup"), *flood, spec("report", user="bob")))
    users = [job["user"] for job in dashboard.state["jobs"]]
    assert len(users) == 500
    assert {"root", "bob", "alice"} == set(users)
    host, = dashboard.state["hosts"]
    assert host["problems"] == [
        "202 jobs not shown: this dashboard accepts 500 of a host (koitab "
        "dashboard --jobs N)"]
    # Other jobs come first: those that are not shown now are not removed.
    dashboard.sync(web1, list=dashboard.list_of(
        web1, spec("backup"), *flood[::-1]))
    removed = {job["user"] for job in dashboard.state["jobs"]
               if job["removed"]}
    assert removed == {"bob"}
    dashboard.sync(web1, list=dashboard.list_of(web1, spec("backup")))
    assert dashboard.state["hosts"][0]["problems"] == []


def test_records_of_ever_new_jobs_do_not_fill_the_memory(dashboard, web1):
    dashboard.dashboard.hosts.most_jobs = 3
    records = [dashboard.record(tag=f"t{number}") for number in range(20)]
    answer = dashboard.runs(web1, *records)
    assert answer["acked"] == 20        # or the host would repeat for ever
    assert len(dashboard.state["jobs"]) == 12
    other = dashboard.join("d" * 32, "web2")
    dashboard.runs(other, dashboard.record())
    assert len(dashboard.state["jobs"]) == 13


def test_newer_of_two_koids_with_one_host_id_is_accepted(dashboard, web1):
    dashboard.sync(web1, instance="2000-aaaaaaaa")
    with refused(409) as refusal:
        dashboard.sync(web1, instance="1000-bbbbbbbb")
    assert refusal.message == "duplicate host ID: another koid uses it"
    assert dashboard.state["hosts"][0]["state"] == "duplicate"
    dashboard.sync(web1, instance="2000-aaaaaaaa")
    dashboard.sync(web1, instance="3000-cccccccc")      # a restart
    with refused(409):
        dashboard.sync(web1, instance="2000-aaaaaaaa")
    dashboard.pass_time(700)
    dashboard.sync(web1, instance="2000-aaaaaaaa")      # the other has ended
    assert dashboard.state["hosts"][0]["state"] == "up"


def test_clock_skew_of_a_host_is_shown(dashboard, web1):
    dashboard.sync(web1, now=NOW - 43)
    assert dashboard.state["hosts"][0]["skew"] == 43
    assert dashboard.state["hosts"][0]["offset"] == 3600


# ==========================================================================
# What runs have written
# ==========================================================================

TEXT = frames("one\ntwo\n") + frames("it broke\n", 2) + frames("three\n")


def test_missing_output_is_requested_piece_by_piece(dashboard, web1):
    cut = len(frames("one\n"))
    reply = dashboard.runs(web1, dashboard.record(size=len(TEXT), exit=1))
    assert reply["missing_output"] == [[1, 0]]
    reply = dashboard.sync(web1, outputs=[piece(1, 0, TEXT[:cut])])
    assert reply["missing_output"] == [[1, cut]]
    for at in (0, cut - 1, cut + 1, 10**6):         # not where it ends
        dashboard.sync(web1, outputs=[piece(1, at, TEXT[at:])])
    reply = dashboard.sync(web1, outputs=[piece(1, cut, TEXT[cut:])])
    assert reply["missing_output"] == []
    assert dashboard.ask(dashboard.dashboard.runs.output, 1, 0,
                         10**6) == (
        TEXT, len(TEXT), False, 0)
    assert dashboard.ask(dashboard.dashboard.runs.text, 1) == \
        b"one\ntwo\nit broke\nthree\n"


def test_piece_is_stored_up_to_its_last_whole_frame(dashboard, web1):
    cut = len(frames("one\n"))
    dashboard.runs(web1, dashboard.record(size=len(TEXT)))
    reply = dashboard.sync(web1, outputs=[piece(1, 0, TEXT[:cut + 5])])
    assert reply["missing_output"] == [[1, cut]]


@pytest.mark.parametrize("data", [
    b"no frames at all", b"\xff" * 40, TEXT[:-1] + b"",
    koitab.frame(9, 0, b"x") * 4], ids=["text", "ff", "cut", "stream"])
def test_invalid_output_is_not_requested_again(dashboard, web1, data):
    dashboard.runs(web1, dashboard.record(size=len(data)))
    dashboard.sync(web1, outputs=[piece(1, 0, data)])
    reply = dashboard.sync(web1, outputs=[piece(1, 0, data)])
    assert reply["missing_output"] in (
        [], [[1, len(frames("one\ntwo\nit broke\n"))]])
    dashboard.run_chores()


def test_output_that_the_host_has_lost_is_not_requested(dashboard, web1):
    reply = dashboard.runs(web1, dashboard.record(size=99))
    assert reply["missing_output"] == [[1, 0]]
    assert dashboard.sync(web1, outputs=[piece(1, 0, b"", deleted=True)]
                          )["missing_output"] == []


@pytest.mark.parametrize("size", [1, 9, 10, 30, 10**6])
def test_every_part_of_an_output_consists_of_whole_frames(
        dashboard, web1, size):
    dashboard.runs(web1, dashboard.record(size=len(TEXT)))
    dashboard.sync(web1, outputs=[piece(1, 0, TEXT)])
    at, found = 0, b""
    while at < len(TEXT):
        part, whole, _, begin = dashboard.ask(
            dashboard.dashboard.runs.output, 1, at, size)
        assert part and whole == len(TEXT) and begin == at
        found += part
        at += len(part)
    assert found == TEXT


@pytest.mark.parametrize("text, stream, status, line", [
    ("one\ntwo\n", 1, 0, "two"), ("one\ntwo\n\n  \n", 1, 0, "two"),
    ("10%\r50%\r100%\n", 1, 0, "100%"),
    ("\x1b[31mred\x1b[0m\n", 2, 1, "red"),
    ("\x1b]0;title\x07shown\n", 1, 0, "shown"),
    ("no end", 1, 0, "no end"), ("a\x07b\n", 1, 0, r"a\x07b"),
    ("x" * 999 + "\n", 1, 0, "x" * 300), ("\xff\n", 1, 0, "\xff")])
def test_last_line_is_the_one_that_a_terminal_would_show(
        dashboard, web1, text, stream, status, line):
    data = frames(text, stream)
    dashboard.runs(web1, dashboard.record(size=len(data), exit=status))
    dashboard.sync(web1, outputs=[piece(1, 0, data)])
    assert dashboard.job()["last"]["line"] == line


def test_last_line_of_a_failed_run_comes_from_its_stderr(dashboard, web1):
    for exit_status, line in ((1, "it broke"), (0, "three")):
        run = dashboard.record(size=len(TEXT), exit=exit_status)
        dashboard.runs(web1, run)
        dashboard.sync(web1, outputs=[piece(run["run"], 0, TEXT)])
        assert dashboard.job()["last"]["line"] == line


# --- live

def test_live_output_of_a_followed_run_is_requested(dashboard, web1):
    dashboard.runs(web1, dashboard.record("running"))
    assert dashboard.sync(web1)["live"] == {}
    dashboard.lines.clear()
    dashboard.dashboard.follow(1)
    dashboard.dashboard.run_once()
    assert dashboard.lines == [{"wake": [HOST]}]
    assert dashboard.sync(web1)["live"] == {"1": 0}
    data = frames("one\ntwo\n")
    reply = dashboard.sync(web1, live=[piece(1, 0, data)])
    assert reply["live"] == {"1": len(data)}
    assert dashboard.ask(dashboard.dashboard.runs.output, 1, 0,
                         999) == (
        data, len(data), True, 0)
    dashboard.pass_time(16)
    assert dashboard.sync(web1)["live"] == {}
    assert dashboard.rows("select count(*) from outputs") == [(0,)]


def test_live_output_is_stored_only_if_it_continues_the_known_part(
        dashboard, web1):
    dashboard.runs(web1, dashboard.record("running"))
    dashboard.dashboard.follow(1)
    data = frames("one\n")
    dashboard.sync(web1, live=[piece(1, 0, data)])
    dashboard.sync(web1, live=[piece(1, 5, data)])
    assert dashboard.dashboard.runs.live.get(1) == (0, data)
    dashboard.sync(web1, live=[piece(1, 50, data, reset=True)])
    assert dashboard.dashboard.runs.live.get(1) == (50, data)
    assert dashboard.ask(dashboard.dashboard.runs.output, 1, 0,
                         999)[3] == 50


def test_live_output_is_limited_and_begins_at_a_frame(dashboard, web1):
    dashboard.runs(web1, dashboard.record("running"))
    dashboard.dashboard.follow(1)
    data = koitab.frame(1, 0, b"x" * 60_000)
    for number in range(50):
        dashboard.sync(web1, live=[piece(1, number * len(data), data)])
    begin, kept = dashboard.dashboard.runs.live.get(1)
    assert len(kept) <= koitab.LIVE_ROOM and begin + len(kept) == 50 * len(
        data)
    assert begin % len(data) == 0 and begin > 0


def test_live_output_is_dropped_once_the_whole_output_is_stored(
        dashboard, web1):
    dashboard.runs(web1, dashboard.record("running"))
    dashboard.dashboard.follow(1)
    dashboard.sync(web1, live=[piece(1, 0, frames("one\n"))])
    dashboard.runs(web1, dashboard.record(run=1, size=len(TEXT)))
    assert dashboard.ask(dashboard.dashboard.runs.output, 1, 0,
                         999)[2]
    dashboard.sync(web1, outputs=[piece(1, 0, TEXT)])
    assert dashboard.dashboard.runs.live.get(1) is None
    assert dashboard.ask(dashboard.dashboard.runs.output, 1, 0,
                         999)[:3] == (
        TEXT, len(TEXT), False)


# ==========================================================================
# What is shown
# ==========================================================================

@pytest.mark.parametrize("fields, code, state", [
    ({}, "o", "ok"), ({"exit": 3}, "f", "failed"),
    ({"exit": None, "signal": 9}, "k", "failed"),
    ({"exit": 143, "reason": "timeout after 10m"}, "k", "failed"),
    ({"exit": None}, "f", "failed"),
    ({"state": "missed"}, "m", "missed"),
    ({"state": "skipped"}, "s", "skipped"),
    ({"state": "elsewhere", "started": None}, "e", "ok"),
    ({"state": "interrupted"}, "i", "failed"),
    ({"state": "unstartable"}, "u", "failed"),
    ({"state": "running", "ended": None, "exit": None}, "r", "running"),
    ({"state": "queued"}, "q", "running")])
def test_a_run_has_an_outcome_code_and_its_job_a_state(
        dashboard, web1, fields, code, state):
    dashboard.runs(web1, {**dashboard.record(), **fields})
    job = dashboard.job()
    assert (job["recent_runs"][-1][3], job["state"]) == (code, state)
    assert dashboard.reopen().job()["recent_runs"][-1][3] == code


def test_run_history_bar_shows_the_last_ninety_runs_oldest_first(
        dashboard, web1):
    assert dashboard.state      # so that it is updated, not read again
    dashboard.runs(web1, *[dashboard.record(exit=number % 2)
                           for number in range(100)])
    recent = dashboard.job()["recent_runs"]
    assert [entry[0] for entry in recent] == list(range(11, 101))
    assert recent[0][1:] == (NOW - 10, 10.0, "o")
    assert dashboard.reopen().job()["recent_runs"] == recent


def test_failing_job_has_the_time_count_and_last_line_of_its_failures(
        dashboard, web1):
    dashboard.runs(web1, dashboard.record())
    for _ in range(3):
        dashboard.clock.time += 100
        dashboard.runs(web1, dashboard.record(exit=1, size=len(TEXT)))
        dashboard.sync(web1, outputs=[piece(dashboard.number, 0, TEXT)])
    assert dashboard.job()["failing"] == {
        "since": NOW + 100, "count": 3, "last_ok": NOW, "line": "it broke"}
    dashboard.runs(web1, dashboard.record("skipped"),
                   dashboard.record("missed"))
    assert dashboard.job()["failing"]["count"] == 3
    dashboard.runs(web1, dashboard.record())
    assert dashboard.job()["failing"] is None


def test_usual_duration_is_known_after_twenty_successful_runs(dashboard, web1):
    for number in range(20):
        assert dashboard.job()["usual"] is None if number else True
        dashboard.runs(web1, dashboard.record(started=NOW - 10 - number))
    assert dashboard.job()["usual"] == [12.0, 28.0]


def test_change_is_published_after_it_is_in_the_state(dashboard, web1):
    seen = []
    dashboard.dashboard.on_changes = lambda changes: seen.append(
        (changes, dashboard.state["seq"], dashboard.job()["state"]))
    dashboard.runs(web1, dashboard.record())
    (changes, seq, state), = seen
    assert (changes["seq"], state) == (seq, "ok")
    assert [entry[3] for entry in changes["jobs"][0]["new_runs"]] == ["o"]
    assert "recent_runs" not in changes["jobs"][0]
    assert changes["runs"][0]["id"] == 1 and changes["live"] == [1]
    json.dumps(changes)


def test_change_numbers_increase_over_restarts(dashboard, web1):
    dashboard.runs(web1, dashboard.record())
    before = dashboard.state["seq"]
    dashboard.clock.time += 2
    assert dashboard.reopen().state["seq"] > before


def test_too_many_changes_are_published_as_a_reset(dashboard, web1):
    dashboard.lines.clear()
    for _ in range(3):
        dashboard.dashboard.write(
            dashboard.dashboard.host_sync.sync, web1.host, {
            "v": 3, "host": HOST, "epoch": 1, "instance": "1-aaaaaaaa",
            "records": [dashboard.record() for _ in range(900)]}, NOW)
    dashboard.dashboard.run_once()
    assert dashboard.lines[0]["reset"] and "runs" not in dashboard.lines[0]


def test_viewer_gets_no_ping_key(dashboard):
    state = dashboard.ask(dashboard.dashboard.state,
                          "viewer", NOW)
    assert state["role"] == "viewer" and state["dash"]["ping_key"] == ""
    assert dashboard.state["dash"]["ping_key"]


def test_runs_are_listed_page_by_page(dashboard, web1):
    dashboard.runs(web1, *[dashboard.record() for _ in range(25)])
    seen, before = [], None
    while True:
        page = dashboard.ask(dashboard.dashboard.runs.page, 1,
                             before, 10)
        seen += [run["id"] for run in page["runs"]]
        if not page["more"]:
            break
        before = seen[-1]
    assert seen == list(range(25, 0, -1))


def test_run_names_its_neighbours_and_the_last_successful_run(dashboard, web1):
    dashboard.runs(web1, dashboard.record(), dashboard.record(tag="crawl"),
                   dashboard.record(exit=1), dashboard.record(exit=2),
                   dashboard.record())
    shown = dashboard.ask(dashboard.dashboard.overview.run, 4)
    assert (shown["good"], shown["older"], shown["newer"]) == (1, 3, 5)
    assert shown["job"]["tag"] == "backup"


def test_failed_run_is_shown_with_the_last_lines_of_its_errors(dashboard,
                                                               web1):
    frames = b"".join(koitab.frame(stream, 0, text) for stream, text in (
        (2, b"warning\n"), (1, b"step 1\nstep 2\n"), (2, b"no space\n")))
    dashboard.runs(web1, dashboard.record(size=len(frames), exit=1),
                   dashboard.record(size=len(frames)))
    dashboard.sync(web1, outputs=[piece(run, 0, frames) for run in (1, 2)])
    lines = [dashboard.ask(dashboard.dashboard.overview.run, run)["lines"]
             for run in (1, 2)]
    assert lines == [["warning", "no space"], []]


def test_day_lists_all_runs_that_overlap_it(dashboard, web1):
    day = NOW + 86_400
    cases = [       # (started, ended, shown)
        (NOW, NOW + 60, False), (NOW, day + 60, True),
        (day - 100, day + 100, True), (day - 100, day - 50, False),
        (day + 10, day + 20, True), (day + 86_400, day + 86_500, False)]
    dashboard.runs(web1, *[dashboard.record(started=a, ended=b, due=a)
                           for a, b, _ in cases],
                   dashboard.record("running", started=NOW - 9e5),
                   dashboard.record("missed", due=day + 5))
    found = dashboard.ask(dashboard.dashboard.overview.day, day,
                          day + 86_400)
    row, = found["rows"]
    assert sorted(bar[3] for bar in row["bars"]) == sorted(
        [number for number, case in enumerate(cases, 1) if case[2]] + [7])
    assert row["missing"] == [[day + 5, 8]]
    assert (found["from"], found["to"]) == (day, day + 86_400)


def test_day_with_too_many_runs_says_where_its_list_ends(
        dashboard, web1, monkeypatch):
    monkeypatch.setattr(koitab, "MOST_BARS", 10)
    dashboard.runs(web1, *[dashboard.record(started=NOW + n, ended=NOW + n)
                           for n in range(25)])
    seen, begin = [], NOW
    while begin < NOW + 100:
        found = dashboard.ask(dashboard.dashboard.overview.day, begin,
                              NOW + 100)
        seen += [bar[3] for row in found["rows"] for bar in row["bars"]]
        begin = found["to"]
    assert sorted(set(seen)) == list(range(1, 26))


def test_metrics_are_prometheus_text(dashboard, web1):
    dashboard.runs(web1, dashboard.record(exit=1), list=dashboard.list_of(
        web1, spec(name='a"b\\c\nd')))
    text = dashboard.ask(dashboard.dashboard.overview.metrics, NOW,
                         {})
    assert 'name="a\\"b\\\\c\\nd"} 0' in text
    for line in text.splitlines():
        assert line.startswith("# ") or line.rpartition(" ")[2].replace(
            ".", "").isdigit(), line


def samples(dashboard, name: str) -> list[str]:
    """Return the samples of a metric: labels and value."""
    text = dashboard.ask(dashboard.dashboard.overview.metrics, dashboard.now,
                         {})
    return [line[len(name):] for line in text.splitlines()
            if re.match(rf"{name}\b", line)]


def test_start_on_another_host_is_ok_in_metrics_but_not_a_success_here(
        dashboard, web1):
    dashboard.runs(web1, dashboard.record(), list=dashboard.list_of(
        web1, spec()))
    name = "koi_job_last_success_timestamp_seconds"
    success = samples(dashboard, name)
    dashboard.runs(web1, dashboard.record(exit=1))
    assert samples(dashboard, "koi_job_ok")[0].endswith(" 0")
    dashboard.clock.time += 60
    dashboard.runs(web1, dashboard.record("elsewhere", reason="web2",
                                          started=None))
    assert samples(dashboard, "koi_job_ok")[0].endswith(" 1")
    assert samples(dashboard, name) == success


def test_a_removed_job_has_no_samples(dashboard, web1):
    dashboard.runs(web1, dashboard.record(exit=1),
                   list=dashboard.list_of(web1, spec()))
    assert len(samples(dashboard, "koi_job_ok")) == 1
    dashboard.sync(web1, list=dashboard.list_of(web1))
    assert samples(dashboard, "koi_job_ok") == []


def test_host_that_is_down_has_no_samples_of_unknown_values(dashboard, web1):
    dashboard.runs(web1, dashboard.record(),
                   list=dashboard.list_of(web1, spec()))
    dashboard.pass_time(300)
    assert dashboard.job()["state"] == "unknown"
    assert samples(dashboard, "koi_host_up")[0].endswith(" 0")
    assert samples(dashboard, "koi_job_ok") == []
    assert samples(dashboard, "koi_job_running") == []
    assert len(samples(dashboard, "koi_job_last_success_timestamp_seconds")
               ) == 1


def test_a_paused_check_is_not_reported_as_down(dashboard):
    uuid = dashboard.do(dashboard.dashboard.checks.create, {"name": "a"}, NOW)[
        "id"]
    assert samples(dashboard, "koi_check_up")[0].endswith(" 1")
    dashboard.do(dashboard.dashboard.checks.change, uuid, {"do": "pause"},
                 NOW)
    assert samples(dashboard, "koi_check_up") == []
    assert samples(dashboard, "koi_check_paused")[0].endswith(" 1")


def test_a_badge_shows_the_worst_of_all_hosts(dashboard, web1):
    hosts = [web1] + [dashboard.join(each * 16, "web2") for each in
                      ("d4", "e5")]
    for number, host in enumerate(hosts):
        dashboard.runs(host, dashboard.record(exit=number % 2),
                       list=dashboard.list_of(host, spec()))
    key = dashboard.state["dash"]["badge_key"]
    assert dashboard.ask(dashboard.dashboard.overview.badge, key, "backup",
                         NOW)["message"] == "failed"


def test_badge_of_a_job_without_a_name_has_no_address_that_pings(
        dashboard, web1):
    uuid = dashboard.do(dashboard.dashboard.checks.create, {"name": "Sync"},
                        NOW)["id"]
    job = {"name": "", "label": f"* * * * * curl https://koi/ping/{uuid}"}
    dashboard.runs(web1, dashboard.record(**job),
                   list=dashboard.list_of(web1, spec(**job)))
    badge = dashboard.ask(
        dashboard.dashboard.overview.badge,
        dashboard.state["dash"]["badge_key"], "backup", NOW)
    assert badge["label"] == "* * * * * curl https://koi/ping/" + "*" * 36


@pytest.mark.parametrize("size", [9 + 20, 9 + 48, 1000])
def test_reader_finds_no_address_that_pings_in_any_part_of_an_output(
        dashboard, web1, size):
    """It was printed in two parts, between which stderr came."""
    uuid = dashboard.do(dashboard.dashboard.checks.create, {"name": "Sync"},
                        NOW)["id"]
    data = frames("ping/" + uuid[:11]) + frames("oops", 2) + frames(
        uuid[11:] + "\n")
    dashboard.runs(web1, dashboard.record(size=len(data)))
    dashboard.sync(web1, outputs=[piece(1, 0, data)])
    seen, at = b"", 0
    while at < len(data):
        part = dashboard.ask(dashboard.dashboard.runs.output, 1, at, size,
                             True)[0]
        seen, at = seen + part, at + len(part)
    assert seen == data.replace(uuid[:11].encode(), b"*" * 11).replace(
        uuid[11:].encode(), b"*" * 25)


def test_badge_is_given_only_with_its_key(dashboard, web1):
    key = dashboard.state["dash"]["badge_key"]
    dashboard.runs(web1, dashboard.record(exit=1),
                   list=dashboard.list_of(web1, spec()))
    assert dashboard.ask(dashboard.dashboard.overview.badge, key, "all",
                         NOW)["message"] == "1 alert"
    assert dashboard.ask(dashboard.dashboard.overview.badge, key, "backup",
                         NOW) == {
        "label": "Backup", "message": "failed", "color": "#c32b2b"}
    with refused(404):
        dashboard.ask(dashboard.dashboard.overview.badge, "0" * 32, "all", NOW)
    with refused(404):
        dashboard.ask(dashboard.dashboard.overview.badge, key, "nothing", NOW)


# ==========================================================================
# Requests
# ==========================================================================

def request(dashboard, nonce: str = "1" * 32, **fields) -> dict:
    body = {"v": 1, "do": "run", "key": "0" * 16, "dash": dashboard.dash,
            "host": HOST, "user": "root", "tag": "backup", "job": "0" * 64,
            "args": {"To": "bob"}, "secrets": {"Pin": "00ff"},
            "nonce": nonce, "iat": int(dashboard.now * 1000),
            "exp": int(dashboard.now * 1000) + 300_000, **fields}
    return {"host": HOST, "body": json.dumps(body), "mac": "f" * 64}


def audit_rows(dashboard) -> list[dict]:
    return dashboard.ask(dashboard.dashboard.audit.page)["rows"]


@pytest.fixture
def asked(dashboard, web1):
    dashboard.sync(web1, list=dashboard.list_of(web1, spec()))
    found = request(dashboard)
    dashboard.do(dashboard.dashboard.requests.create, found, NOW)
    return found


def test_request_is_sent_to_its_host_and_its_result_is_stored(
        dashboard, web1, asked):
    signed = {"body": asked["body"], "mac": asked["mac"]}
    assert dashboard.sync(web1)["requests"] == [signed]
    assert dashboard.sync(web1)[
        "requests"] == []       # it was just handed out
    dashboard.clock.time += 31
    assert dashboard.sync(web1)["requests"] == [signed]
    dashboard.sync(web1, results=[{"nonce": "1" * 32, "state": "accepted",
                                    "run": 1, "reason": ""}])
    dashboard.runs(web1, dashboard.record("queued", nonce="1" * 32))
    dashboard.clock.time += 31
    assert dashboard.sync(web1)["requests"] == []
    assert dashboard.ask(dashboard.dashboard.requests.state,
                         "1" * 32) == {
        "nonce": "1" * 32, "state": "accepted", "reason": "", "run": 1,
        "expires": NOW + 300, "host": HOST, "job": 1, "what": "run"}


def test_waiting_request_is_shown_and_can_be_withdrawn(dashboard, web1, asked):
    waiting, = dashboard.state["requests"]
    assert (waiting["job"], waiting["host"], waiting["expires"]) == (
        1, HOST, NOW + 300)
    withdraw = dashboard.dashboard.requests.withdraw
    assert dashboard.do(withdraw, "1" * 32)["state"] == "withdrawn"
    assert dashboard.state["requests"] == []
    assert dashboard.sync(web1)["requests"] == []
    assert audit_rows(dashboard)[0]["state"] == "withdrawn"
    for nonce, status in (("1" * 32, 409), ("2" * 32, 404)):
        with refused(status):
            dashboard.do(withdraw, nonce)


def test_fetched_request_cannot_be_withdrawn(dashboard, web1, asked):
    dashboard.sync(web1)
    with refused(409):
        dashboard.do(dashboard.dashboard.requests.withdraw, "1" * 32)
    assert len(dashboard.state["requests"]) == 1


def test_repeated_request_is_stored_once(dashboard, asked):
    reopened = dashboard.do(dashboard.dashboard.requests.create, asked,
                            NOW)
    assert reopened["state"] == "waiting"
    assert dashboard.rows("select count(*) from requests") == [(1,)]
    assert dashboard.rows("select count(*) from audit where what = 'run'") == [
        (1,)]
    with refused(409):
        dashboard.do(dashboard.dashboard.requests.create,
                     request(dashboard, tag="x"), NOW)


def test_unanswered_request_expires(dashboard, web1, asked):
    dashboard.pass_time(301)
    assert dashboard.sync(web1)["requests"] == []
    dashboard.pass_time(5)
    found = dashboard.ask(dashboard.dashboard.requests.state,
                          "1" * 32)
    assert found["state"] == "expired"
    dashboard.sync(web1, results=[{"nonce": "1" * 32, "state": "accepted",
                                    "run": 1, "reason":
                                    ""}])     # it came late
    assert dashboard.ask(dashboard.dashboard.requests.state,
                         "1" * 32
                         )["state"] == "accepted"


def test_request_expires_after_a_restart_of_the_dashboard(dashboard, asked):
    reopened = dashboard.reopen()
    reopened.pass_time(310)
    assert reopened.ask(reopened.dashboard.requests.state,
                        "1" * 32
                        )["state"] == "expired"


def test_a_refusal_is_shown_with_its_reason(dashboard, web1, asked):
    dashboard.sync(web1, results=[{"nonce": "1" * 32, "state": "refused",
                                    "run": None, "reason": "its job changed"}])
    row, = [row for row in audit_rows(dashboard) if row["what"] == "run"]
    assert (row["state"], row["reason"], row["label"]) == (
        "refused", "its job changed", "Backup")
    assert row["args"] == {"To": "bob", "Pin": "******"}
    dashboard.runs(web1, dashboard.record(nonce="1" *
                                          32))      # then it ran after
    row, = [row for row in audit_rows(dashboard) if row["what"] == "run"]
    assert (row["state"], row["run"]) == ("accepted", 1)


def test_result_from_another_host_is_ignored(dashboard, asked):
    other = dashboard.join("d" * 32, "web2")
    dashboard.sync(other, results=[{"nonce": "1" * 32, "state": "refused",
                                     "run": None, "reason": "x"}])
    assert dashboard.ask(dashboard.dashboard.requests.state,
                         "1" * 32
                         )["state"] == "waiting"


@pytest.mark.parametrize("fields", [
    {"dash": "0" * 16}, {"host": "d" * 32}, {"nonce": "x"}, {"do": "dance"},
    {"exp": 1}, {"exp": 2 * 10**12}, {"exp": 1.5}, {"args": {"a": 1}},
    {"user": "a\0"}, {"secrets": []}], ids=str)
def test_invalid_request_is_refused(dashboard, web1, fields):
    with refused(400):
        dashboard.do(dashboard.dashboard.requests.create, request(
            dashboard, **{"nonce": "2" * 32, **fields}), NOW)


def test_ambiguous_request_is_refused(dashboard, web1):
    asked = request(dashboard)
    asked["body"] = asked["body"].replace('"tag":', '"tag": "a", "tag":')
    with refused(400):
        dashboard.do(dashboard.dashboard.requests.create, asked, NOW)


def test_number_of_waiting_requests_of_a_host_is_limited(dashboard, web1):
    for number in range(100):
        dashboard.do(dashboard.dashboard.requests.create, request(
            dashboard, f"{number:032x}"), NOW)
    with refused(429):
        dashboard.do(
            dashboard.dashboard.requests.create,
            request(dashboard, "f" * 32),
            NOW,
        )


def test_audit_log_is_listed_page_by_page(dashboard):
    for number in range(230):       # all at one moment
        dashboard.dashboard.audit.record(dashboard.dashboard.db, NOW, "check",
                                   label=str(number))
    seen, before = [], None
    while True:
        page = dashboard.ask(dashboard.dashboard.audit.page, before)
        seen += [int(row["label"]) for row in page["rows"]]
        if not page["more"]:
            break
        before = page["rows"][-1]["at"]
    assert seen == list(range(229, -1, -1))


# ==========================================================================
# Finding
# ==========================================================================

def written(dashboard, web1, text: str, **fields) -> int:
    """A run that wrote this; its id."""
    data = frames(text)
    record = dashboard.record(size=len(data), **fields)
    dashboard.runs(web1, record)
    dashboard.sync(web1, outputs=[piece(record["run"], 0, data)])
    return dashboard.rows("select max(id) from runs")[0][0]


def found(dashboard, text: str, *more) -> list:
    hits = dashboard.ask(dashboard.dashboard.search.find, text,
                         *more)["matches"]
    return [(hit["run"]["id"], hit["line"]) for hit in hits]


# --- quotas

OTHER = "d4" * 16


def usage(dashboard) -> dict[int, int]:
    """The bytes that are counted, which must be those that are there."""
    counted = dashboard.rows("select * from usage where runs > 0")
    assert counted == dashboard.rows(
        "select host, sum(have + length(args) + length(reason)), count(*) "
        "from runs group by host")
    return {host: size for host, size, _ in counted}


def test_host_above_its_quota_loses_only_its_own_oldest_outputs(
        dashboard, web1, monkeypatch):
    monkeypatch.setattr(koitab, "HOST_BYTES", 20_000)
    other = dashboard.join(OTHER, "web2")
    kept = written(dashboard, other, "needle of the other\n" * 500)
    mine = [written(dashboard, web1, f"needle {number} ".ljust(2000) + "\n")
            for number in range(30)]
    dashboard.run_chores()
    counted = usage(dashboard)
    assert counted[1] <= 20_000 < counted[1] + 2100 and counted[2] > 10_000
    with_output = [run for run, in dashboard.rows(
        "select id from runs where have > 0 order by id")]
    assert with_output == [kept, *mine[-9:]]
    assert {run for run, _ in found(dashboard, "needle")} == {
        kept, *mine[-9:]}
    assert dashboard.rows("select count(*) from runs") == [(31,)]
    assert dashboard.sync(web1)["missing_output"] == []


def test_host_shows_what_it_stores_and_that_this_is_all_it_may(
        dashboard, web1, monkeypatch):
    written(dashboard, web1, "one\n")
    host, = dashboard.state["hosts"]
    assert (host["bytes"], host["runs"]) == (len(frames("one\n")) + 2, 1)
    assert host["problems"] == []
    monkeypatch.setattr(koitab, "HOST_RUNS", 100)
    dashboard.runs(web1, *(dashboard.record() for _ in range(119)))
    host, = dashboard.state["hosts"]
    assert host["runs"] == 100
    problem, = host["problems"]
    assert problem.endswith("so its oldest outputs or runs are removed")


def test_host_above_its_quota_by_arguments_loses_its_oldest_runs(
        dashboard, web1, monkeypatch):
    monkeypatch.setattr(koitab, "HOST_BYTES", 20_000)
    other = dashboard.join(OTHER, "web2")
    dashboard.runs(other, dashboard.record(args={"a": "x" * 15_000}))
    for _ in range(50):
        dashboard.runs(web1, dashboard.record(args={"a": "x" * 1000}))
    assert usage(dashboard)[1] <= 20_000
    assert dashboard.rows("select count(*) from runs where host = 2") == [
        (1,)]
    newest, = dashboard.rows("select max(n) from runs where host = 1")
    assert newest == (dashboard.number,)


def test_host_above_its_quota_by_reasons_or_runs_loses_its_oldest_runs(
        dashboard, web1, monkeypatch):
    monkeypatch.setattr(koitab, "HOST_BYTES", 50_000)
    monkeypatch.setattr(koitab, "HOST_RUNS", 100)
    for reason in ("x" * 2000, ""):
        for _ in range(3):
            dashboard.runs(web1, *(dashboard.record(exit=1, reason=reason)
                                   for _ in range(50)))
            assert usage(dashboard)[1] <= 50_000
            assert dashboard.rows("select count(*) from runs")[0][0] <= 100
    newest, = dashboard.rows("select max(n) from runs where host = 1")
    assert newest == (dashboard.number,)


def test_stored_bytes_are_counted_correctly_after_changes_and_removals(
        dashboard, web1):
    written(dashboard, web1, "one\n")
    record = dashboard.record("running", args={"a": "b"})
    dashboard.runs(web1, record)
    dashboard.runs(web1, dashboard.record(run=record["run"],
                                          args={"a": "ccc"}))
    assert usage(dashboard) == {1: len(frames("one\n")) + 2 + 12}
    dashboard.do(dashboard.dashboard.retention.delete, {"host": HOST}, NOW)
    dashboard.run_chores()
    assert usage(dashboard) == {}
    assert dashboard.rows("select * from usage") == []


def test_stored_bytes_of_an_older_schema_are_counted(dashboard, web1):
    written(dashboard, web1, "one\n")
    before = usage(dashboard)
    dashboard.dashboard.db.connection.executescript(
        BACK_TO_SCHEMA_6 + "pragma user_version=6;")
    dashboard.dashboard.close()
    after = InProcessDashboard(dashboard.path, dashboard.clock, fresh=False)
    assert usage(after) == before
    after.number, after.change = dashboard.number, dashboard.change
    written(after, web1, "two\n")
    assert usage(after) == {1: 2 * before[1]}
    after.dashboard.close()


@pytest.mark.parametrize("index", ["trigram", "words", ""])
def test_a_text_is_found_in_all_outputs(dashboard, web1, index):
    dashboard.dashboard.db.execute("drop table found")
    if index:
        dashboard.dashboard.db.execute(
            "create virtual table found using fts5(text, content='', "
            f"tokenize='{'unicode61' if index == 'words' else index}')")
    dashboard.dashboard.search.index = index
    written(dashboard, web1, "nothing here\n")
    one = written(dashboard, web1, "a\nThe Needle's eye\nb\n", tag="crawl")
    two = written(dashboard, web1, "x\n\x1b[31mneed\x1b[0mle 'quote\" %_\n")
    for _ in range(2):      # before and after they are in the index
        assert found(dashboard, "NEEDLE") == [(two, "needle 'quote\" %_"),
                                              (one, "The Needle's eye")]
        assert found(dashboard, "needle", 2) == [(one, "The Needle's eye")]
        assert found(dashboard, "needle", None, two) == [
            (one, "The Needle's eye")]
        assert found(dashboard, "zebra") == []
        assert found(dashboard, "needle 'quote\"") == [(two,
                                                        "needle 'quote\" %_")]
        dashboard.run_chores()


@pytest.mark.parametrize("text", ['"', "a* OR", "NEAR(", "text:", "%%", "--",
                                  "^x", "') --"])
def test_search_text_is_never_a_query_operator(dashboard, web1, text):
    run = written(dashboard, web1, f"left {text} right\n")
    dashboard.run_chores()
    if len(text) > 1:
        assert found(dashboard, text) == [(run, f"left {text} right")]


def test_match_names_the_chunk_that_contains_it(dashboard, web1):
    data = [frames("one\n" * 9), frames("two needle\n")]
    dashboard.runs(web1, dashboard.record(size=sum(map(len, data))))
    dashboard.sync(web1, outputs=[piece(1, 0, data[0])])
    dashboard.sync(web1, outputs=[piece(1, len(data[0]), data[1])])
    hit, = dashboard.ask(dashboard.dashboard.search.find,
                         "needle")["matches"]
    assert hit["at"] == len(data[0])


def test_head_and_tail_of_long_output_are_indexed(dashboard, web1):
    line = "y" * 79 + "\n"
    run = written(dashboard, web1, "first needle\n" + line * 9000
                  + "middle needle\n" + line * 9000 + "last needle\n")
    dashboard.clock.time += 6
    dashboard.run_chores()
    assert dashboard.rows("select * from unindexed") == []
    assert found(dashboard, "first needle") == [(run, "first needle")]
    assert found(dashboard, "last needle") == [(run, "last needle")]
    assert found(dashboard, "middle needle") == []


def test_search_finds_all_matches_after_the_index_is_damaged(dashboard, web1):
    written(dashboard, web1, "one needle\n")
    dashboard.run_chores()
    dashboard.do(lambda db: db.execute("update found_data set block = x'a5'"))
    written(dashboard, web1, "two needle\n")
    dashboard.run_chores()
    try:
        found(dashboard, "needle")
    except Error as error:
        assert error.status == 500
    assert [run for run, _ in found(dashboard, "needle")] == [2, 1]
    dashboard.clock.time += 500 * 86_400
    dashboard.run_chores()
    assert dashboard.dashboard.broken == ""


def test_hundred_matches_are_listed_in_pages(dashboard, web1):
    for number in range(45):
        written(dashboard, web1, f"needle {number}\n")
    dashboard.run_chores()
    seen, before, more = [], None, True
    while more:
        page = dashboard.ask(dashboard.dashboard.search.find,
                             "needle",
                             None, before)
        seen += [hit["run"]["id"] for hit in page["matches"]]
        before, more = seen[-1], page["more"]
    assert seen == list(range(45, 0, -1))


# ==========================================================================
# Forgetting
# ==========================================================================

def test_runs_beyond_the_limit_are_thinned_out(dashboard, web1, monkeypatch):
    monkeypatch.setattr(koitab, "KEEP_RUNS", 10)
    dashboard.runs(web1, *[dashboard.record() for _ in range(30)],
                   *[dashboard.record(tag="crawl") for _ in range(5)])
    dashboard.run_chores()
    assert dashboard.rows(
        "select job, count(*), min(id) from runs group by job"
                          ) == [(1, 10, 21), (2, 5, 31)]


def test_old_runs_and_outputs_are_removed_and_failed_ones_later(
        dashboard, web1):
    good = written(dashboard, web1, "needle good\n")
    bad = written(dashboard, web1, "needle bad\n", exit=1)
    dashboard.run_chores()
    for days, outputs, runs in ((89, {good, bad}, 2), (91, {bad}, 2),
                                (179, {bad}, 2), (181, set(), 2),
                                (401, set(), 0)):
        dashboard.clock.time = NOW + days * 86_400
        dashboard.run_chores()
        assert {run for run, in dashboard.rows("select run from outputs")
                } == outputs, days
        assert {run for run, _ in found(dashboard, "needle")} == outputs
        assert dashboard.rows("select count(*) from runs") == [(runs,)]
    assert dashboard.rows(
        "select count(*) from found where found match 'needle'"
                          ) == dashboard.rows(
                              "select count(*) from found where found "
                                              "match '\"eedle g\"'") == [(0,)]
    assert dashboard.sync(web1)["missing_output"] == []


def test_unused_database_pages_are_freed(dashboard, web1, monkeypatch):
    monkeypatch.setattr(koitab, "FREE_PAGES", 50)
    for _ in range(3):
        written(dashboard, web1, ("x" * 7999 + "\n") * 120)
    size = dashboard.dashboard.db.value("pragma page_count")
    dashboard.clock.time += 100 * 86_400
    dashboard.run_chores()
    dashboard.clock.time += 301
    dashboard.run_chores()
    assert dashboard.dashboard.db.value("pragma freelist_count") <= 50
    assert dashboard.dashboard.db.value("pragma page_count") < size / 2


def test_each_step_of_retention_is_small(dashboard, web1):
    for _ in range(3):
        dashboard.runs(web1, *[dashboard.record() for _ in range(1000)])
    dashboard.clock.time += 500 * 86_400
    dashboard.dashboard.commit_batch([
        (dashboard.dashboard.retention.expire_old, (), None)])
    assert dashboard.rows("select count(*) from runs") == [(2000,)]


def test_deleted_job_is_hidden_at_once_and_removed_later(dashboard, web1):
    dashboard.runs(web1, dashboard.record(), dashboard.record(tag="crawl"))
    dashboard.sync(web1, list=dashboard.list_of(web1, spec("crawl")))
    with refused(409):
        dashboard.do(dashboard.dashboard.retention.delete, {"job": 2},
                     NOW)
    dashboard.do(dashboard.dashboard.retention.delete, {"job": 1}, NOW)
    assert [job["id"] for job in dashboard.state["jobs"]] == [2]
    with refused(404):
        dashboard.ask(dashboard.dashboard.overview.run, 1)
    dashboard.runs(web1, dashboard.record())        # it comes back: a new one
    assert [job["id"] for job in dashboard.state["jobs"]] == [2, 3]
    dashboard.clock.time += 61
    dashboard.run_chores()
    assert dashboard.rows("select job from runs order by id") == [(2,), (3,)]
    assert dashboard.rows("select id from jobs order by id") == [(2,), (3,)]


def test_deleted_host_is_removed_with_all_its_records(dashboard, web1):
    dashboard.runs(web1, dashboard.record())
    dashboard.do(dashboard.dashboard.retention.delete, {"host": HOST},
                 NOW)
    assert dashboard.state["hosts"] == dashboard.state["jobs"] == []
    assert dashboard.principal_of(koitab.sha256_hex("token of "
                                                       + HOST)) is None
    with pytest.raises(Error):
        dashboard.sync(web1)
    dashboard.clock.time += 61
    dashboard.run_chores()
    assert dashboard.rows(
        "select (select count(*) from runs), (select count(*) "
                          "from hosts), (select count(*) from jobs)") == [
                              (0, 0, 0)]
    dashboard.runs(dashboard.join(),
                   dashboard.record())        # and may join again
    assert len(dashboard.state["hosts"]) == 1


def test_a_host_that_left_keeps_its_history(dashboard, web1):
    dashboard.runs(web1, dashboard.record())
    dashboard.do(dashboard.dashboard.hosts.leave, HOST, NOW)
    assert dashboard.principal_of(koitab.sha256_hex("token of "
                                                       + HOST)) is None
    assert dashboard.state["hosts"][0]["state"] == "left"
    assert dashboard.job()["removed"]
    assert len(dashboard.job()["recent_runs"]) == 1
    dashboard.pass_time(500)
    assert dashboard.state["alerts"] == []
    dashboard.runs(dashboard.join(), dashboard.record())
    assert dashboard.state["hosts"][0]["state"] == "up"
    assert len(dashboard.job()["recent_runs"]) == 2


def test_many_threads_read_while_one_writes(tmp_path):
    dashboard = InProcessDashboard(tmp_path / "d.db", koitab.Clock())
    web1, faults = dashboard.join(), []
    dashboard.dashboard.start()

    def look():
        try:
            for _ in range(30):
                recent = [run for job in dashboard.state["jobs"]
                          for run in job["recent_runs"]]
                assert [run[0] for run in recent] == sorted(
                    run[0] for run in recent)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        dashboard.dashboard.do(dashboard.dashboard.host_sync.sync, web1.host, {
            "v": 3, "host": HOST, "epoch": 1, "instance": "1-aaaaaaaa",
            "records": [dashboard.record()]}, dashboard.now)
    for thread in threads:
        thread.join()
    recent = dashboard.job()["recent_runs"]
    dashboard.dashboard.stop()
    assert faults == [] and [entry[0] for entry in recent] == list(
        range(1, 41))


# --- nothing to do


def test_dashboard_without_work_sleeps_for_a_minute(dashboard):
    dashboard.run_chores()
    assert dashboard.dashboard.pause() == 60
    assert koitab.WRITER_SLEEP >= 60


def test_output_is_indexed_soon_after_it_arrives(dashboard, web1):
    dashboard.run_chores()
    dashboard.runs(web1, dashboard.record())
    assert dashboard.dashboard.pause() == koitab.INDEX_PAUSE


def test_notifier_without_notifications_waits_for_an_event(dashboard):
    """It would wake the processor twelve times a minute else."""
    notifier, waits = koitab.Notifier(dashboard.dashboard), []

    def wait(seconds=None) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            dashboard.do(dashboard.dashboard.alerts.change_channel, {
                "id": dashboard.channel(), "do": "test"}, dashboard.now)
        notifier.stopping = len(waits) == 2

    with mock.patch.object(dashboard.dashboard.notifications_due, "wait",
                           wait), \
            mock.patch.object(notifier, "deliver_due"):
        notifier.serve()
    assert waits == [None, koitab.DELIVERY_PAUSE]

"""KOI_ONE_OF: of several hosts, one makes each start, by a real etcd."""

from __future__ import annotations

import re
import subprocess

import pytest

import koi_group
import support
from koi_group import Group, check, record, settled

koitab = support.load("koitab")
pytestmark = support.root_only

NOON = 1_795_348_800


@pytest.fixture
def group(tmp_path):
    support.need("etcd")
    tmp_path.chmod(0o755)
    found = Group(tmp_path, NOON + 30, 0)
    yield found
    found.close()


EACH_MINUTE = "0-59 0-23 * * *"     # no wildcard entry: see cron's rules


def rows_of(host, due: float) -> list[tuple]:
    return [(row["state"], row["reason"]) for row in host.rows()
            if row["due"] == due]


def hosts_of(group: Group, due: float) -> list[str]:
    """The hosts on which a start was executed."""
    dues = {(host.name, row["run"]): row["due"] for host in group.hosts
            for row in host.rows()}
    return [host for host, run, _ in group.executed()
            if dues[host, run] == due]


def wrong_of(group: Group, due: float) -> list[str]:
    return check(record(group, due - 1, due + 1)).wrong


def start(group: Group) -> None:
    for host in group.hosts:
        host.start()
    support.wait_until(lambda: all(
        host.koi.answers() for host in group.hosts), 30, "the koids")


def test_each_start_runs_on_one_host_and_the_other_names_it(group):
    group.single(2).with_tab(["* * * * *", EACH_MINUTE])
    start(group)
    support.wait_until(lambda: len(group.executed()) >= 4, 60, "two minutes")
    settled(*group.hosts)
    due = min(row["due"] for row in group.hosts[0].rows())
    for host, other in (group.hosts, group.hosts[::-1]):
        assert {row["reason"] for row in host.rows()
                if row["state"] == "elsewhere"} <= {other.name}
    states = sorted(state for host in group.hosts
                    for state, _ in rows_of(host, due))
    assert states == ["done", "done", "elsewhere", "elsewhere"]
    assert wrong_of(group, due) == []


def koitab_says(host, *words: str) -> str:
    done = subprocess.run(host.koi.command(*words), env=host.koi.env,
                          capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_commands_show_the_group_and_the_host_that_ran_last(group):
    frozen_during_a_start(group.single(2).with_tab([EACH_MINUTE]))
    maker, other = group.hosts
    other.signal(18)
    support.wait_until(lambda: "elsewhere" in [
        row["state"] for row in other.rows()[-1:]], 60,
                       "a start of the first host")
    maker.koi.stop()
    assert re.search(r"elsewhere: a\n", koitab_says(other, "history"))
    assert re.search(r"web: job0, last on a at \d", koitab_says(
        other, "status"))
    shown = koitab_says(other, "next", "job0")
    assert "on one host of web" in shown and ": elsewhere: a\n" in shown
    other.koi.stop()
    maker.start()
    support.wait_until(maker.koi.answers)
    assert re.search(r"web: job0, last on this host \(ok\) at \d",
                     koitab_says(maker, "status"))


def test_host_that_was_down_catches_up_only_what_no_host_made(group):
    """The first host makes up for a start that nobody made; the second one
    finds that out, whether it was to make up for it or not."""
    first, second = group.single(2).hosts
    group.with_tab(["1 13 * * *", "5 13 * * *"], "KOI_CATCHUP=yes")
    group.move_to(NOON - 600)
    start(group)
    for host in group.hosts:
        host.koi.stop()
    group.move_to(NOON + 150)       # between the two starts
    first.start()
    support.wait_until(lambda: len(group.executed()) == 2, 60, "both starts")
    settled(first)
    first.koi.stop()
    second.start()
    support.wait_until(second.rows, 30, "the second host")
    settled(second)
    assert [(row["job"], row["trigger"], row["state"])
            for row in first.rows()] == [
        ("job0", "schedule", "missed"), ("job0", "catch-up", "done"),
        ("job1", "schedule", "done")]
    assert {(row["job"], row["state"], row["reason"])
            for row in second.rows()} == {
        ("job0", "elsewhere", "a"), ("job1", "elsewhere", "a")}
    assert len(group.executed()) == 2


def fail_at(group: Group, point: str, number: int,
            within: str = "10m") -> tuple:
    """Let the first host fail that comes to a point, and kill the other one,
    which else would fail there, too. Return both, and the start."""
    group.single(2).with_tab([EACH_MINUTE], f"KOI_START_WITHIN={within}")
    for host in group.hosts:
        host.rate, host.points, host.chosen = 1.0, (point,), (number,)
        host.start()
        host.rate = 0.0
    failed = support.wait_until(lambda: next((
        host for host in group.hosts if host.koi.daemon.poll() is not None
        or support.process_state(host.koi.daemon.pid) == "T"), None), 60,
        "a host to fail")
    other = next(host for host in group.hosts if host is not failed)
    other.signal(9)
    other.koi.daemon.wait(30)
    failed.signal(number)
    due = next(row["due"] for row in failed.rows()
               if row["state"] == "queued")
    other.start()
    return failed, other, due


@pytest.mark.parametrize("number", [9, 19], ids=["killed", "frozen"])
def test_another_host_makes_the_start_if_its_host_dies_before_the_record(
        group, number):
    failed, other, due = fail_at(group, "ordered", number)
    support.wait_until(lambda: hosts_of(group, due), 60, "the other host")
    failed.signal(18)
    if number == 9:
        failed.start()
    settled(*group.hosts)
    assert hosts_of(group, due) == [other.name]
    assert rows_of(failed, due) == [("elsewhere", other.name)]
    assert wrong_of(group, due) == []


def test_start_is_not_repeated_if_its_host_dies_after_the_record(group):
    failed, other, due = fail_at(group, "won", 9)
    support.wait_until(lambda: rows_of(other, due) == [
        ("elsewhere", failed.name)], 60, "the other host to see the record")
    failed.start()
    settled(*group.hosts)
    assert rows_of(failed, due) == [
        ("interrupted", "koid was stopped before the run began")]
    assert hosts_of(group, due) == []
    assert wrong_of(group, due) == []


def test_missed_start_that_its_own_host_had_recorded_is_interrupted(group):
    """koid comes back while etcd is down, so the start is missed at first."""
    failed, _, due = fail_at(group, "won", 9, "20s")
    group.members[0].kill()
    failed.start()
    support.wait_until(lambda: rows_of(failed, due)[0][0] == "missed", 60,
                       "the start to be missed")
    group.members[0].start()
    support.wait_until(lambda: rows_of(failed, due) == [
        ("interrupted", "koid was stopped before the run began")], 60,
        "the record to be corrected")


def test_koid_recognizes_a_record_made_by_an_earlier_koid(group):
    """The second koid takes over the start of the first, records it, and
    dies; the third one must not take the record for another host's."""
    host, = group.single(1).hosts
    group.with_tab([EACH_MINUTE], "KOI_START_WITHIN=10m")
    host.rate, host.chosen = 1.0, (9,)
    for host.points in (("ordered",), ("won",)):
        host.start().koi.daemon.wait(60)
    host.rate = 0.0
    due = next(row["due"] for row in host.rows() if row["state"] == "queued")
    host.start()
    settled(host)
    assert rows_of(host, due) == [
        ("interrupted", "koid was stopped before the run began")]
    assert hosts_of(group, due) == []


def frozen_during_a_start(group: Group) -> float:
    """Freeze the second host; return a start that the first one makes."""
    maker, frozen = group.hosts
    start(group)
    frozen.signal(19)
    begin = len(group.executed())
    support.wait_until(lambda: len(group.executed()) > begin + 1, 60,
                       "a start of the first host")
    settled(maker)
    return maker.rows()[-1]["due"]


def late_host(group: Group, patch: str = "") -> list[str]:
    """One host is frozen while another makes a start, dies, and loses its
    lease. Return what the checker says when the first has looked."""
    group.single(2).with_tab([EACH_MINUTE], "KOI_START_WITHIN=10m")
    for host in group.hosts:
        host.patch = patch
    due = frozen_during_a_start(group)
    maker, late = group.hosts
    maker.signal(9)
    maker.koi.daemon.wait(30)
    wait_for_no_lease(group)
    late.signal(18)
    support.wait_until(lambda: rows_of(late, due) not in (
        [], [("queued", koitab.WAITS_FOR_CLAIM)]), 30, "the late host")
    settled(late)
    return wrong_of(group, due)


def wait_for_no_lease(group: Group) -> None:
    """Until the hosts' leases have run out, two seconds after a kill."""
    client = koitab.HttpClient(group.urls[0])
    support.wait_until(lambda: b'"leases"' not in client.request(
        "POST", "/v3/lease/leases", b"{}").body, 30, "the leases to end")


def test_late_host_does_not_repeat_a_start_of_a_host_that_died(group):
    assert late_host(group) == []


def test_checker_finds_the_start_made_twice_with_a_lease_on_last(group):
    wrong = late_host(group, koi_group.LEASE_ON_LAST)
    assert len(wrong) == 1 and "was executed by" in wrong[0]


def test_start_without_etcd_is_missed_until_etcd_names_the_host_that_ran_it(
        group):
    group.single(2).with_tab([EACH_MINUTE], "KOI_START_WITHIN=20s")
    due = frozen_during_a_start(group)
    maker, late = group.hosts
    group.members[0].kill()
    late.signal(18)
    support.wait_until(lambda: [state for state, _ in rows_of(late, due)]
                       == ["missed"], 60, "the start to be missed")
    assert rows_of(late, due)[0][1].startswith(
        "not claimed in time: etcd: http://127.0.0.1")
    group.members[0].start()
    support.wait_until(lambda: rows_of(late, due) == [
        ("elsewhere", maker.name)], 60, "the record to be corrected")


def test_host_whose_clock_is_ahead_is_named_by_those_that_it_stops(group):
    host, ahead = group.single(2).with_tab([EACH_MINUTE]).hosts
    ahead.start(skew=86_400)
    support.wait_until(group.executed, 60, "a start of tomorrow")
    ahead.koi.stop()
    host.start()
    support.wait_until(host.koi.answers)
    support.wait_until(lambda: "missed" in [
        row["state"] for row in host.rows()], 60, "a missed start")
    assert {row["reason"][:48] for row in host.rows()
            if row["state"] == "missed"} == {
        "b has made a later start: 2026-11-23T13:01 Europ"}
    assert len(group.executed()) == 1


def test_etcd_that_is_not_there_when_koid_starts_is_a_problem_until_it_is(
        group):
    host, = group.single(1).with_tab([EACH_MINUTE]).hosts
    member, = group.members
    member.kill()
    host.start()
    support.wait_until(lambda: "etcd: http://127.0.0.1" in koitab_says(
        host, "status"), 30, "the problem")
    assert "connection refused" in koitab_says(host, "status")
    member.start()
    support.wait_until(group.executed, 60, "a start")
    assert "problem" not in koitab_says(host, "status")


def test_log_has_one_line_about_an_etcd_of_which_all_members_are_down(group):
    host, = group.single(1).with_tab([EACH_MINUTE]).hosts
    group.members[0].kill()
    group.urls += koi_group.free_urls()
    start(group)
    due = support.wait_until(lambda: [
        row["due"] for row in host.rows() if row["state"] == "missed"][1:],
        60, "two missed starts")
    assert len(due) == 1
    assert [line.count("connection refused") for line in
            host.koi.log().splitlines() if "refused" in line] == [3]


def test_member_of_another_etcd_is_refused(group):
    """As if each machine had an etcd of its own: two of them would make the
    same start."""
    host, = group.single(1).with_tab([EACH_MINUTE]).hosts
    client, peer = koi_group.free_urls()
    other = koi_group.Member(group.folder, "m2", None, client, peer).start()
    try:
        support.wait_until(other.answers, 60, "the other etcd")
        group.urls.append(client)
        host.start()
        support.wait_until(group.executed, 60, "a start")
        group.members[0].kill()
        support.wait_until(lambda: f"{client}: a member of another etcd"
                           in host.koi.problems(), 90, "the problem")
        due = host.rows()[-1]["due"]
        support.wait_until(lambda: host.rows()[-1]["due"] > due, 30)
        due = host.rows()[-1]["due"]
        support.wait_until(lambda: "missed" in [
            state for state, _ in rows_of(host, due)], 60, "a missed start")
    finally:
        other.kill()


# --- TLS, and a user -------------------------------------------------------


def make_certificates(folder) -> None:
    """An authority's, the server's and koid's, by the commands of `koitab
    help behaviour` for one host, and another authority's."""
    block = re.search(r"^    openssl req -x509.*\n(?:    .*\n)+",
                      koitab.topic_text("behaviour"), re.M)[0]
    for before, after in (("h1 h2 h3", "h1"),
                          ("DNS:%s' $h", "IP:127.0.0.1'")):
        assert block.count(before) == 1
        block = block.replace(before, after)
    done = subprocess.run(["sh", "-ec", block + (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=other "
        "-keyout other.key -out other.pem\n"
        "openssl x509 -req -in koi.csr -CA ca.pem -CAkey ca.key -days -1 "
        "-CAcreateserial -out old.pem\n"
        "openssl x509 -req -in h1.csr -CA ca.pem -CAkey ca.key -days -1 "
        "-CAcreateserial -extfile h1.ext -out h1-old.pem")], cwd=folder,
        capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for key in folder.glob("*.key"):
        key.chmod(0o600)
    (folder / "password").write_text("open sesame\n")
    (folder / "wrong").write_text("open\n")
    for name in ("password", "wrong"):
        (folder / name).chmod(0o600)


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """A member with TLS, client certificates and authentication, where the
    user koi may use its own keys alone: its directory and its URL."""
    support.need("etcd", "openssl")
    folder = tmp_path_factory.mktemp("secure")
    make_certificates(folder)
    client, peer = koi_group.free_urls()
    url = client.replace("http:", "https:")
    member = koi_group.Member(folder, "m1", None, url, peer, options=(
        "--cert-file", f"{folder}/h1.pem", "--key-file", f"{folder}/h1.key",
        "--trusted-ca-file", f"{folder}/ca.pem", "--client-cert-auth",
        "--auth-token-ttl", "1"))
    member.start()

    def connect():
        try:
            return koitab.EtcdMember(url, {"user": "", "password": "", **{
                name: (folder / file).read_text() for name, file in (
                    ("ca", "ca.pem"), ("cert", "koi.pem"),
                    ("key", "koi.key"))}})
        except koitab.ConnectionFailed:
            return None
    etcd = support.wait_until(connect, 60, "etcd")
    key, end = map(koitab.base64_text, ("/koi/v1/", "/koi/v10"))
    for path, body in (
            ("user/add", {"name": "root", "password": "root"}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("role/add", {"name": "koi"}),
            ("role/grant", {"name": "koi", "perm": {
                "permType": "READWRITE", "key": key, "range_end": end}}),
            ("user/add", {"name": "koi", "password": "open sesame"}),
            ("user/grant", {"user": "koi", "role": "koi"}), ("enable", {})):
        etcd.post(f"/v3/auth/{path}", body)
    yield folder, url
    member.kill()


def start_secure(koi, secure, probe: float = 3.0, **files: str):
    folder, url = secure
    files = {"ca": "ca.pem", "cert": "koi.pem", "key": "koi.key",
             "password-file": "password", **files}
    zero = koi_group.time.monotonic()   # of each test; so is the group
    koi.tab(f'MAILTO=""\nKOI_ONE_OF=g{zero}\nCRON_TZ=UTC\nKOI_START_WITHIN=15s\n'
            f'"Shared" {EACH_MINUTE} echo ran\n')
    koi.patch = koi_group.CLOCK.format(now=NOON + 40, zero=zero,
                                       speed=koi_group.SPEED, host="h1")
    koi.set_constants(**{**koi_group.FAST, "ETCD_PATIENCE": 4.0,
                         "PROBE_PAUSE": probe})
    koi.start("--etcd", url, "--etcd-user", "koi", *(
        word for name, file in files.items()
        for word in (f"--etcd-{name}", f"{folder}/{file}")))


def test_start_is_claimed_over_tls_with_a_certificate_and_a_password(
        koi, secure):
    start_secure(koi, secure)
    run = koi.ended("Shared", seconds=60)[-1]
    assert run["state"] == "done", (run, koi.problems())
    assert koi.text_of(run["run"]) == "ran\n"
    assert koi.problems() == ""


def test_expired_certificate_of_etcd_is_a_problem(koi, secure):
    folder, _ = secure
    client, peer = koi_group.free_urls()
    url = client.replace("http:", "https:")
    member = koi_group.Member(folder, "m2", None, url, peer, options=(
        "--cert-file", f"{folder}/h1-old.pem", "--key-file",
        f"{folder}/h1.key")).start()
    try:
        start_secure(koi, (folder, url))
        support.wait_until(lambda: "not trusted: certificate has expired"
                           in koi.problems(), 30, "the problem")
    finally:
        member.kill()


def test_login_is_renewed_when_etcd_has_forgotten_it(koi, secure):
    """A token ends five minutes after its last use; here after a second.
    That costs no start, and is not a problem."""
    start_secure(koi, secure, probe=2.0)
    assert [run["state"] for run in koi.ended("Shared", count=3, seconds=60)
            ] == ["done"] * 3
    assert koi.problems() == "" and "etcd" not in koi.log()


@pytest.mark.parametrize("files, problem", [
    ({"password-file": "wrong"}, "invalid user ID or password"),
    ({"ca": "other.pem"}, "certificate not trusted"),
    ({"cert": "other.pem", "key": "other.key"}, "TLS failed"),
    ({"cert": "ca.pem"}, "do not belong together"),
    ({"ca": "password"}, "TLS failed"),
    ({"cert": "old.pem"}, "TLS failed"),
    # etcd's own rule for its JSON gateway, when it asks for a password.
    ({"cert": "h1.pem", "key": "h1.key"}, "CommonName of client"),
])
def test_wrong_secret_for_etcd_is_a_problem_and_starts_nothing(
        koi, secure, files, problem):
    start_secure(koi, secure, **files)
    support.wait_until(lambda: problem in koi.problems(), 30,
                       "the problem\n" + koi.problems())
    run = koi.ended("Shared", seconds=60)[-1]
    assert run["state"] == "missed" and problem in run["reason"]

"""`koitab -d` and `koitab run --on`, as they are typed: with a dashboard and
koids that are real processes."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import ssl
import subprocess
from pathlib import Path

import pytest

import servers
import support
from dashboard_rig import DashboardHost, DashboardProcess, Operator
from support import ALICE_UID

koitab = support.load("koitab")

TAB = """\
"Say" @manual echo "to $KOI_ARG_1" {{To}}; exit 3
"Pair" @manual printf '<\\%s>' {{One}} {{Two, secret}}
"Big" @manual seq 300000; seq 20 >&2
"Slow" @manual seq 120000; sleep 1; seq 120001 300000
"Long" @manual echo begun; exec sleep 60
"Twice" @manual echo twice
"Esc" @manual printf '\\033]0;PWNED\\007visible\\n'
"Daily" 0 3 * * * echo daily
KOI_CONFIRM=yes
"Asks" @manual echo asked
KOI_CONFIRM=cli
"Here" @manual echo here
"""


@pytest.fixture(scope="module")
def ready(operator, web1_host):
    """Once the dashboard has the list of jobs."""
    operator.specs(operator.host("web1"))
    return operator


@pytest.fixture
def loose(server, tmp_path):
    """A machine that joined no dashboard, without a koid."""
    return DashboardHost(tmp_path, "loose")


@pytest.fixture
def strict(tmp_path):
    """A machine that does not permit plain http by itself."""
    return DashboardHost(tmp_path, "strict", plain_http=False)


def there(web1_host, operator, *words: str, stdin: str = "") -> support.Result:
    return web1_host.koitab("run", "--on", "web1", *words,
                            stdin=f"{operator.password}\n{stdin}")


# --- errors are reported before anything is changed


WRONG = [   # what is typed, a part of what is said, the status
    (["-d", "blah"], 'unknown action "blah" (expected new, join,', 2),
    (["-d", "join"], "missing argument URL\nkoitab: hint: koitab -d join", 2),
    (["-d", "new", "http://127.0.0.1:1", "more"], 'argument "more"', 2),
    (["-d", "show", "more"], 'unexpected argument "more"', 2),
    (["-d", "show"],
     "not a member of a dashboard\nkoitab: hint: koitab -d new; or", 1),
    (["-d", "off"], "not a member of a dashboard", 1),
    (["-d", "rotate"], "not a member of a dashboard", 1),
    (["-d", "show", "--json"], "--json is not an option of koitab -d", 2),
    (["-d", "new", "--password", "-"], "unknown option --password", 2),
    (["-d", "new", "ftp://127.0.0.1"], "not a dashboard URL", 1),
    (["-d", "new", "127.0.0.1:8077"], "not a dashboard URL", 1),
    (["-d", "new", "http://u:p@127.0.0.1"], "not a dashboard URL", 1),
    (["-d", "new", "http://127.0.0.1/a//b"], "not a dashboard URL", 1),
    (["-d", "new", "http://127.0.0.1:99999"], "not a dashboard URL", 1),
    (["-d", "new", "http://127.0.0.1/#ab"], "not a dashboard URL", 1),
    (["-d", "new", "http://192.0.2.1"], "without TLS", 1),
    (["-d", "join", "http://koi.example"], "--plain-http", 1),
    (["-d", "join", "http://127.0.0.1:1/#nonsense"], "a dashboard's ID", 1),
    (["-d", "join", "http://127.0.0.1:1"], "could take the keys", 1),
    (["-d", "join", "https://127.0.0.1:1"], "missing passphrase", 2),
    (["-d", "new", "https://127.0.0.1:1"],
     "https://127.0.0.1:1: connection refused\nkoitab: hint: koitab dashbo",
     1),
    (["-d", "new", "https://127.0.0.1:1", "--ca", "/none"],
     "--ca /none: No such file", 1),
    (["-d", "new", "https://127.0.0.1:1", "--ca", ""], "--ca", 1),
    (["-d", "new", "https://127.0.0.1:1", "--ca", "/dev/null"],
     "not a file of certificates", 1),
    (["run", "--on", "web1", "Say"], "not a member of a dashboard", 1),
    (["run", "--on", "web1", "--url", "", "Say"], "not a dashboard URL", 1),
    (["run", "--url", "http://127.0.0.1:1", "Say"],
     "--url is not an option of koitab run without --on", 2),
    (["run", "--plain-http", "Say"], "not an option of koitab run", 2),
    (["run", "--on", "", "Say"], "not a member of a dashboard", 1),
    (["page", "nonsense"], "not a dashboard URL", 1),
]


@pytest.mark.parametrize("typed, words, status", WRONG)
def test_impossible_action_is_refused_with_a_hint(
        strict, typed, words, status):
    done = strict.koitab(*typed)
    assert (words in done.err, done.code, done.out) == (True, status, ""), done
    assert all(line.startswith(("koitab: error: ", "koitab: hint: "))
               for line in done.err.splitlines())
    assert not (strict.home / "keys").exists()


def test_host_that_left_joins_again_with_the_passphrase(tmp_path, loose):
    with DashboardProcess(tmp_path / "own") as server:
        done = loose.koitab("-d", "new", server.url,
                            stdin=server.founding_token())
        assert done.code == 0 and "koid is not running" in done.err, done
        password = re.search(r"^passphrase +([a-z0-9]{4}(-[a-z0-9]{4}){4})$",
                             done.out, re.M)[1]
        dash = re.search("#([0-9a-f]{16})$", done.out, re.M)[1]
        assert support.mode(loose.home / "keys") == 0o600
        again = loose.koitab("-d", "new", server.url)
        assert again.code == 1 and "koitab: hint: koitab -d leave" \
            in again.err
        assert loose.koitab("-d", "show").code == 1     # no koid is there
        assert loose.koitab("-d", "off").code == 0
        # As a browser shows the address of a page; and with a wrong one.
        url = f"{server.url}/#{dash}"
        for word, code in (("not it", 1), (password, 0)):
            done = loose.koitab("-d", "join", url, stdin=word + "\n")
            assert done.code == code, done


def test_url_copied_from_the_browser_is_accepted(tmp_path, loose):
    with DashboardProcess(tmp_path / "own") as server:
        other = DashboardHost(tmp_path / "other", "other")
        operator = other.create_dashboard(server)
        done = loose.koitab("-d", "join", f"{server.url}/#/jobs?x=1",
                            stdin=operator.password + "\n")
        assert done.code == 0, done
        assert f"#{operator.dash}" in done.out
        # Only the first may be made here.
        third = DashboardHost(tmp_path / "third", "third")
        done = third.koitab("-d", "new", server.url)
        assert done.code == 1 and "dashboard" in done.err, done


def test_new_finds_the_founding_token_of_this_machine(tmp_path, loose):
    with DashboardProcess(loose.folder, db=f"{loose.home}/dashboard.db"
                          ) as server:
        done = loose.koitab("-d", "new", server.url)
        assert done.code == 0, done
        assert not Path(f"{server.db}.founding").exists()


def test_new_prompts_for_a_founding_token_that_it_does_not_find(
        tmp_path, loose):
    with DashboardProcess(tmp_path / "own") as server:
        done = loose.koitab("-d", "new", server.url)
        assert done.code == 2 and "missing founding token" in done.err
        done = loose.koitab("-d", "new", server.url, stdin="0" * 64)
        assert done.code == 1 and "the founding token of its" in done.err
        done = loose.koitab("-d", "new", server.url,
                            stdin=server.founding_token())
        assert done.code == 0, done


@support.root_only
@pytest.mark.parametrize("owner, mode, found", [
    (ALICE_UID, 0o600, True), (0, 0o600, False), (ALICE_UID, 0o640, False)])
def test_founding_token_is_used_only_if_the_listening_user_owns_it(
        tmp_path, owner, mode, found):
    file, token = tmp_path / "token", "ab" * 32
    file.write_text(token)
    os.chown(file, owner, owner)
    file.chmod(mode)
    assert koitab.read_own_token(str(file), {ALICE_UID}) == (
        token if found else "")
    link = tmp_path / "link"
    link.symlink_to(file)
    assert koitab.read_own_token(str(link), {ALICE_UID}) == ""


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"),
                    reason="only Linux says who listens at a port")
def test_users_that_listen_on_a_port_are_found():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert koitab.listening_users(port) == {os.geteuid()}
    assert koitab.listening_users(port) == set()


def test_invalid_key_file_can_be_removed(loose):
    keys = loose.home / "keys"
    keys.write_text("{")
    keys.chmod(0o600)
    done = loose.koitab("-d", "show")
    assert done.code == 1 and "koitab -d leave" in done.err
    done = loose.koitab("-d", "off")
    assert (done.code, done.out) == (0, ""), done
    assert "removed" in done.err and not keys.exists()


def test_show_prints_the_state_of_the_connection(server, web1_host, ready):
    done = web1_host.koitab("-d", "show")
    assert done.code == 0, done
    assert f"{server.url}/#{ready.dash}" in done.out
    assert re.search(r"^link +up$", done.out, re.M)
    assert re.search(r"^host +web1 \([0-9a-f]{32}\)$", done.out, re.M)


def test_show_does_not_request_a_dashboard_that_koid_does_not_use(
        server, loose, web1_host):
    loose.start()
    try:
        (loose.home / "keys").write_bytes((web1_host.home /
                                           "keys").read_bytes())
        (loose.home / "keys").chmod(0o600)
        done = loose.koitab("-d", "show")
        assert done.code == 1 and "does not use these keys" in done.out, done
    finally:
        loose.stop(9)


def test_https_is_trusted_with_the_given_certificate(tmp_path):
    made = servers.certificate(tmp_path)
    with DashboardProcess(
            tmp_path, "--cert", str(made.cert), "--key", str(made.key),
            tls=ssl.create_default_context(cafile=str(made.cert)),
            rounds="") as https:
        koid = DashboardHost(tmp_path / "home", "home", rounds="")
        done = koid.koitab("-d", "new", https.url)
        assert done.code == 1 and "certificate not trusted" in done.err
        assert "koitab: hint: --ca FILE" in done.err
        done = koid.koitab("-d", "new", https.url, "--ca", str(made.cert),
                           stdin=https.founding_token())
        assert done.code == 0, done
        koid.start()
        try:
            support.wait_until(lambda: koid.koitab(
                "-d", "show").out.rstrip().endswith("up"), 30)
            assert "BEGIN CERT" in (koid.home / "keys").read_text()
        finally:
            koid.stop(9)


# --- access tokens


def test_access_tokens_are_created_listed_and_revoked(
        server, web1_host, operator):
    def token(*words: str) -> support.Result:
        return web1_host.koitab("-d", "token", *words,
                                stdin=operator.password + "\n")

    made = token("new", "prometheus", "--role", "metrics")
    assert made.code == 0 and re.fullmatch(r"metrics-[0-9a-f]{64}\n",
                                           made.out), made
    assert made.err == "koitab: access token \"prometheus\", shown only " \
        "this time:\n"
    for path, status in (("/metrics", 200), ("/api/v1/state", 403)):
        assert server.ask("GET", path,
                          token=made.out.strip()).status == status
    viewer = token("new", "the wall", "--role", "viewer").out.strip()
    assert viewer.startswith("view-")
    assert server.ask("GET", "/api/v1/state", token=viewer).status == 200
    assert "already" in token("new", "the wall", "--role", "viewer").err
    listed = token("list").out.splitlines()
    assert [re.sub(r" +\S+T\S+", " TIME", line) for line in listed] == [
        "prometheus           metrics TIME  last used TIME",
        "the wall             viewer TIME  last used TIME"]
    assert token("revoke", "prometheus").code == 0
    assert server.ask("GET", "/metrics",
                      token=made.out.strip()).status == 401
    assert "no such token" in token("revoke", "prometheus").err
    assert token("revoke", "the wall").code == 0 == token("list").code


@pytest.mark.parametrize("words", [
    ("new",), ("new", "x"), ("new", "x", "--role", "root"), ("revoke",),
    ("list", "x"), ("list", "--role", "viewer"), ("frob",),
    ("revoke", "x", "--role", "viewer")])
def test_invalid_arguments_of_token_are_refused_before_the_passphrase(
        web1_host, words):
    done = web1_host.koitab("-d", "token", *words)
    assert done.code == 2 and "passphrase" not in done.err, done


def test_option_role_is_wrong_usage_for_other_actions(web1_host):
    done = web1_host.koitab("-d", "show", "--role", "viewer")
    assert done.code == 2 and "not an option of koitab -d show" in done.err


# --- rotate


def test_new_keys_are_printed_before_they_are_valid(tmp_path):
    """If koitab is killed, or cannot print, nobody is locked out."""
    with DashboardProcess(tmp_path / "own") as server:
        koid = DashboardHost(tmp_path, "rotating")
        check_rotation(server, koid, koid.create_dashboard(server))


def check_rotation(server, koid, operator) -> None:
    done = koid.koitab("-d", "rotate", stdin="not it\n")
    assert f"wrong passphrase for {server.url}\n" in done.err and not done.out
    keys = (koid.home / "keys").read_bytes()
    server.register_host("d4" * 16, "e5" * 32, operator.token)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            stopped = subprocess.run(
                [*koid.command(), "-d", "rotate"],
                env=koid.env, input=operator.password.encode() + b"\n",
                stdout=full, stderr=subprocess.PIPE, timeout=60)
        # It is reported before anything was changed.
        assert b"1 other host must join again" in stopped.stderr
        assert operator.ask("state")["dash"]["id"] == operator.dash
        assert (koid.home / "keys").read_bytes() == keys
    done = koid.koitab("-d", "rotate", stdin=f"{operator.password}\n")
    assert done.code == 0, done
    assert operator.reply("GET", "state").status == 401
    password = re.search(r"^passphrase +(\S+)$", done.out, re.M)[1]
    fresh = Operator(server, operator.dash, password)
    assert fresh.ask("state")["dash"]["id"] == operator.dash
    assert json.loads((koid.home / "keys").read_text())["key"] == fresh.key(
        fresh.host("rotating")).hex()


def test_hosts_that_have_not_joined_again_after_rotate_are_listed(tmp_path):
    with DashboardProcess(tmp_path / "own") as server:
        web1, web2 = (server.add_host(name, TAB) for name in ("web1", "web2"))
        operator = web1.create_dashboard(server)
        web2.join(operator)
        for name in ("web1", "web2"):
            operator.specs(operator.host(name))     # the list has arrived
        assert "outdated" not in web1.koitab("-d", "show").out
        done = web1.koitab("-d", "rotate", stdin=operator.password + "\n")
        password = re.search(r"^passphrase +(\S+)$", done.out, re.M)[1]
        fresh = Operator(server, operator.dash, password)
        support.wait_until(
            lambda: "outdated  web2\n" in web1.koitab("-d", "show").out, 30,
            "the list of web1 to be signed with the new keys")
        assert web1.koitab("-d", "show").code == 0
        done = web2.koitab("-d", "show")
        assert done.code == 1 and "outdated  web2\n" in done.out, done
        assert web2.koitab("-d", "off").code == 0
        web2.join(fresh)
        assert "outdated" not in web1.koitab("-d", "show").out


# --- an ordinary user, on a machine with root's koid


@support.root_only
def test_command_of_an_ordinary_user_for_the_koid_of_root_hints_at_sudo(
        tmp_path):
    patch = f"k.ROOT_SOCKET = {str(tmp_path / 'sock')!r}"
    (tmp_path / "sock").touch()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            pytest.skip(f"{folder} is closed") if str(folder) == "/" \
                else folder.chmod(folder.stat().st_mode | 0o055)
    for typed in (["-d", "new"], ["-d", "show"], ["page"],
                  ["run", "--on", "web1", "Say"]):
        done = subprocess.run(
            [*support.program("koitab", support.SHARED_PYTHON, patch), *typed],
            env={"PATH": os.defpath, "HOME": "/nonexistent"},
            input=b"", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            user="nobody", group="nogroup", extra_groups=[])
        assert done.returncode == 1, done
        assert b"runs as root\nkoitab: hint: sudo; or" in done.stderr, done


@pytest.fixture
def stopped_unit(tmp_path, monkeypatch):
    """An ordinary user on a machine where root's koid is a unit that does
    not run. Return the user's state directory."""
    (tmp_path / "koid.service").touch()
    monkeypatch.setattr(koitab, "UNIT_DIRECTORIES", (str(tmp_path),))
    monkeypatch.setattr(koitab, "ROOT_SOCKET", str(tmp_path / "sock"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("KOI_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "koi"


@pytest.mark.parametrize("request_of", ["run", "next", "history", "install"])
def test_command_of_a_user_says_that_the_unit_of_koid_is_stopped(
        stopped_unit, request_of):
    with pytest.raises(koitab.Error) as caught:
        koitab.DaemonClient(koitab.Machine()).ask(request_of)
    assert (caught.value.message, caught.value.hint) == (
        "koid is not running", "systemctl start koid")
    assert not stopped_unit.exists()


def test_user_with_a_koid_keeps_it_next_to_a_stopped_unit(stopped_unit):
    (stopped_unit / "tabs").mkdir(parents=True)
    client = koitab.DaemonClient(koitab.Machine())
    assert client.home == str(stopped_unit)
    assert client.no_daemon().hint == "koid &"


# --- run --on


def test_run_on_another_host_behaves_like_a_local_run(web1_host, ready):
    done = there(web1_host, ready, "Say", "To=o'brien")
    assert (done.code, done.out) == (3, "to o'brien o'brien\n"), done
    # What ARG=- reads comes after the passphrase.
    done = there(web1_host, ready, "Pair", "One=1", "Two=-", stdin="hunter2\n")
    assert (done.code, done.out) == (0, "<1><******>"), done
    done = there(web1_host, ready, "Asks")       # no terminal to prompt on
    assert (done.code, done.out) == (0, "asked\n"), done


WRONG_RUNS = [
    (["web1", "Sya"],
     'no job named "Sya"\nkoitab: hint: did you mean "Say"?', 1),
    (["web1", "Say"], 'missing argument "To"', 2),
    (["web1", "Say", "To=a", "To=b"], "duplicate argument", 2),
    (["web1", "Say", "Of=a"], 'no argument "Of"', 2),
    (["web1", "Say", "To=a\nb"], '"To": contains a control', 2),
    (["web1", "Daily"], "it is scheduled, not @manual", 1),
    (["web1", "Here"], "KOI_CONFIRM=cli", 1),
    (["web9", "Say"], 'no host named "web9"', 1),
    (["", "Say"], "no host named", 1),
    (["web1", "-u", "nobody-of-here", "Twice"],
      'nobody-of-here has no job named "Twice"\nkoitab: hint: '
      'koitab run -u ', 1),
]


@pytest.mark.parametrize("typed, words, status", WRONG_RUNS)
def test_job_that_cannot_run_on_the_other_host_is_refused(
        web1_host, ready, typed, words, status):
    done = web1_host.koitab("run", "--on", *typed, stdin=ready.password + "\n")
    assert (words in done.err, done.code, done.out) == (True, status, ""), done


def test_wrong_passphrase_starts_no_run(web1_host, ready):
    done = web1_host.koitab("run", "--on", "web1", "Twice", stdin="not it\n")
    assert done.code == 1 and not done.out, done


def test_host_is_identified_by_its_key_and_not_by_its_name(
        server, web1_host, ready, tmp_path):
    """A dashboard that calls one host by the name of another starts nothing
    there; the ID that it shows always means the same host."""
    db1 = server.add_host("db1", '"Twice" @manual echo I am db1\n')
    db1.join(ready)
    ids = {name: ready.host(name) for name in ("web1", "db1")}
    ready.specs(ids["db1"])
    with sqlite3.connect(server.db) as db:
        db.execute("update hosts set name = case name when 'web1' then 'db1' "
                   "when 'db1' then 'web1' else name end")
    db.close()
    try:
        done = there(web1_host, ready, "Twice")
        assert (done.code, done.out) == (1, ""), done
        assert done.err == (
            'koitab: error: the host that the dashboard calls "web1" is "db1"'
            " by its own signature\nkoitab: hint: if this host is meant: "
            f"--on {ids['db1']}\n")
        assert db1.history() == []
        done = web1_host.koitab("run", "--on", ids["db1"], "Twice",
                                stdin=ready.password + "\n")
        assert (done.code, done.out) == (0, "I am db1\n")
        assert f'koitab: "Twice" on db1 ({ids["db1"]}), as {db1.user}\n' \
            in done.err
    finally:
        assert db1.koitab("-d", "off").code == 0
        with sqlite3.connect(server.db) as db:
            db.execute("update hosts set name = 'web1' where host = ?",
                       (ids["web1"],))
        db.close()


def test_output_of_another_host_reaches_a_terminal_escaped(web1_host, ready):
    shown = support.on_terminal(
        web1_host.command("run", "--on", "web1", "Esc"), web1_host.env,
        stdin=ready.password + "\n")
    assert "\\x1b]0;PWNED\\x07visible\r\n" in shown, shown
    assert "\x1b" not in shown and "\x07" not in shown


def numbers(text: str) -> list[int]:
    return [int(line) for line in text.split("\n") if line.isdigit()]


@pytest.mark.parametrize("job", ["Big", "Slow"])
def test_head_and_tail_of_a_large_output_are_printed_once_each(
        web1_host, ready, job):
    """The rest is left out with a note, even if it was shown live."""
    done = there(web1_host, ready, job)
    assert done.code == 0, done.err[-500:]
    found = numbers(done.out)
    assert found[:50_000] == list(range(1, 50_001))
    assert found[-30_000:] == list(range(270_001, 300_001))
    assert len(set(found)) > len(found) - 3     # a number may be cut in two
    assert "left out here" in done.err
    if job == "Big":
        assert numbers(done.err) == list(range(1, 21))


def test_exit_status_of_a_killed_run_is_its_signal(web1_host, ready):
    asked = subprocess.Popen(
        web1_host.command("run", "--on", "web1", "Long"), env=web1_host.env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    asked.stdin.write(ready.password.encode() + b"\n")
    asked.stdin.close()
    assert asked.stdout.readline() == b"begun\n"    # while it continues
    run = web1_host.history(limit=1)[0]["run"]
    web1_host.ask("kill", run=run)
    assert asked.wait(20) == 128 + 15
    assert b"killed by" in asked.stderr.read()


def test_host_that_joined_again_is_found_by_its_name(server, ready, tmp_path):
    """What it was before it left is no second host of the same name."""
    web3 = server.add_host("web3", '"Twice" @manual echo twice\n')
    web3.join(ready)
    assert web3.koitab("-d", "off").code == 0
    web3.join(ready)
    hosts = [host for host in ready.ask("state")["hosts"]
             if host["name"] == "web3"]
    here = next(host["id"] for host in hosts if host["state"] != "left")
    ready.specs(here)
    done = web3.koitab("run", "--on", "web3", "Twice",
                       stdin=ready.password + "\n")
    assert (done.code, done.out) == (0, "twice\n"), done


def test_dashboard_has_logged_no_bug(server):
    server.assert_no_bugs()


# --- koitab source: what the root daemon runs

# Writes the first line of every function that koid calls after its start.
RECORD_CALLS = """
import json, os, sys, threading
run_daemon = k.run_daemon
def run_and_record(*arguments):
    called, koid = set(), os.getpid()
    def record(frame, event, _argument):
        if event == "call" and os.getpid() == koid \\
                and frame.f_code.co_filename == k.__file__:
            called.add((frame.f_code.co_firstlineno, frame.f_code.co_name))
    threading.setprofile(record)
    sys.setprofile(record)
    try:
        return run_daemon(*arguments)
    finally:
        sys.setprofile(None)
        with open(PATH, "w") as file:
            json.dump(sorted(called), file)
k.run_daemon = run_and_record
"""


def section_of_lines() -> list[koitab.Section]:
    """The section of each line of koitab.py; None for the head."""
    found = [section for section in koitab.read_sections()
             for _ in range(section.text.count("\n"))]
    lines = (support.ROOT / "koitab.py").read_text("utf-8").count("\n")
    return [None] * (lines - len(found)) + found


def test_koid_executes_only_lines_that_source_daemon_prints(tmp_path):
    """Jobs by a schedule and by hand, commands, and a dashboard."""
    calls = tmp_path / "calls"
    with DashboardProcess(tmp_path / "dashboard") as server:
        host = server.hosts["web5"] = DashboardHost(tmp_path / "home", "web5")
        host.patch += RECORD_CALLS.replace("PATH", repr(str(calls)))
        host.install('"Say" @manual echo {{To}}\n@reboot echo started\n'
                     '"Long" @manual exec sleep 60\n')
        operator = host.create_dashboard(server)
        host.start()
        operator.specs(operator.host("web5"))
        done = host.koitab("run", "--on", "web5", "Say", "To=x",
                           stdin=operator.password + "\n")
        assert (done.code, done.out) == (0, "x\n"), done
        long = subprocess.Popen(host.command("run", "Long"), env=host.env)
        run = support.wait_until(lambda: json.loads(host.koitab(
            "status", "--json").out)["running"], 30)[0]["run"]
        for typed in (["kill", str(run)], ["history"], ["log", "Say"], ["-l"],
                      ["-d", "show"], ["-r"], ["status"]):
            host.koitab(*typed)
        assert long.wait(30) == 128 + 15
        assert support.wait_until(lambda: len(host.history(limit=9)) == 3, 30)
        host.stop(15)
    home = section_of_lines()
    called = json.loads(calls.read_text())
    assert {name for _, name in called} >= {"start_manual", "serve"}
    assert {f"{home[line - 1].name}: {name}" for line, name in called
            if home[line - 1].part not in koitab.PARTS_OF_DAEMON} == set()

"""The files that root reads and writes, where another user may have made one
before: the log, the lock, the configuration, the tasks."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import struct
import time
from pathlib import Path

import pytest

import support

ALICE, MALLORY = support.ALICE_UID, support.MALLORY_UID


@pytest.fixture
def victim(tmp_path):
    """A file of root's that no one else may read or change."""
    path = tmp_path / "shadow"
    path.write_text("hush hush")
    path.chmod(0o600)
    return path


def is_intact(victim: Path) -> bool:
    return victim.read_text() == "hush hush" and support.owner(victim) == 0 \
        and support.mode(victim) == 0o600


def assert_refused(result, *words: str) -> None:
    """A mistake of the configuration, named, and no traceback."""
    assert result.code == 78 and "Traceback" not in result.err, result
    assert all(word in result.err for word in words), result


# The log ---------------------------------------------------------------------


def names_ahead(seconds: int) -> list[str]:
    """The names that logs of the next seconds would have."""
    now = int(time.time())
    return [time.strftime("%Y-%m-%d-%H-%M-%S.txt", time.localtime(now + n))
            for n in range(seconds)]


PLANTS = {
    "a link to a file": lambda path, victim: path.symlink_to(victim),
    "a link to nowhere": lambda path, victim: path.symlink_to(
        victim.parent / "planted"),
    "a hard link": lambda path, victim: os.link(victim, path),
    "a file": lambda path, victim: path.write_text("theirs"),
    "a folder": lambda path, victim: path.mkdir(),
    "a fifo": lambda path, victim: os.mkfifo(path),
}


@support.root_only
@pytest.mark.parametrize("plant", PLANTS)
def test_run_log_is_a_newly_created_file(alice, victim, plant):
    own = {}
    for name in names_ahead(60):
        for path in (name, name.replace(".txt", "-2.txt")):
            PLANTS[plant](alice.logs / path, victim)
            own[path] = os.lstat(alice.logs / path).st_ino
    os.chown(alice.logs, ALICE, ALICE)
    alice.task("one", "echo done here")
    result = alice.headless()
    assert result.code == 0, result
    fresh = [path for path in alice.logs.iterdir() if path.name not in own]
    assert len(fresh) == 1 and "done here" in fresh[0].read_text()
    assert stat.S_ISREG(os.lstat(fresh[0]).st_mode)
    assert support.mode(fresh[0]) == 0o600
    assert is_intact(victim) and not (victim.parent / "planted").exists()
    assert all(os.lstat(alice.logs / name).st_ino == inode
               for name, inode in own.items())


AWAY = {
    "moved": 'mv "$LOGS_DIR"/*.txt /',
    "removed": 'rm "$LOGS_DIR"/*.txt',
    "truncated": 'for f in "$LOGS_DIR"/*.txt; do : > "$f"; done',
    "a link now": 'rm "$LOGS_DIR"/*.txt; for n in $NAMES; do '
                  'ln -s "$VICTIM" "$LOGS_DIR/$n"; done',
    "its folder moved": 'mv "$LOGS_DIR" "$LOGS_DIR.away"',
}


@support.root_only
@pytest.mark.parametrize("how", AWAY)
def test_mail_is_complete_when_the_log_cannot_be_written(alice, victim, how):
    mails = alice.keep_mail(start=False)
    script = AWAY[how].replace(" /", f" '{alice.folder}'") \
        if how == "moved" else AWAY[how]
    alice.task("before", "echo said before")
    alice.task("away", f"{script}", env={
        "VICTIM": str(victim), "NAMES": " ".join(names_ahead(60))})
    alice.task("after", "echo said after")
    result = alice.headless()
    assert result.code in (0, 74) and is_intact(victim), result
    (mail,) = mails.iterdir()
    text = mail.read_text()
    assert "said before" in text and "said after" in text
    assert [t["outcome"] for t in alice.history()[-1]["tasks"]] == ["ok"] * 3


@support.root_only
def test_log_directory_may_be_a_symbolic_link_of_root(alice, host):
    elsewhere = host.home["alice"] / "logs"
    elsewhere.mkdir()
    alice.logs.rmdir()
    alice.logs.symlink_to(elsewhere)
    alice.config["storage"]["logs"]["chown"] = True
    alice.task("one", "echo one")
    alice.task("last", "echo the last words", post=True)
    result = alice.headless()
    assert (result.code, result.err) == (0, ""), result
    (log,) = elsewhere.glob("*.txt")
    assert "the last words" in log.read_text()
    assert "FinishTime" in log.read_text()


@support.root_only
def test_log_directory_behind_a_symbolic_link_of_the_user_is_not_used(
        alice, host, tmp_path):
    cron = tmp_path / "cron.d"
    cron.mkdir()
    link = host.home["alice"] / "logs"
    link.symlink_to(cron)
    os.chown(link, ALICE, ALICE, follow_symlinks=False)
    alice.config["storage"]["logs"]["path"] = str(link)
    alice.task("one", ":")
    result = alice.headless()
    assert list(cron.iterdir()) == []
    assert result.code != 0 and "Traceback" not in result.err, result


@support.root_only
def test_retention_removes_only_old_logs(alice, victim, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "2001-01-01-00-00-00.txt").write_text("hush hush")
    logs, old = alice.logs, [f"2001-01-0{n}-00-00-00" for n in range(1, 9)]
    for name in old[:2]:
        (logs / f"{name}.txt").touch()
    (logs / f"{old[2]}.txt").symlink_to(treasure)
    (logs / f"{old[3]}.txt").symlink_to(victim)
    (logs / f"{old[4]}.txt").mkdir()
    (logs / f"{old[4]}.txt" / "file").touch()
    os.mkfifo(logs / f"{old[5]}.txt")
    for name in ("2001-01-01.txt", "notes.txt", f"{old[6]}.txt.bak"):
        (logs / name).touch()
    support.own(logs, ALICE)
    alice.config["logs"] = {"keep": 1}
    alice.task("one", ":")
    result = alice.headless()
    assert result.code == 0, result
    assert is_intact(victim)
    assert (treasure / "2001-01-01-00-00-00.txt").read_text() == "hush hush"
    assert (logs / f"{old[4]}.txt" / "file").exists()
    left = {path.name for path in logs.iterdir()}
    assert not left & {f"{name}.txt" for name in old[:2]}
    assert left >= {"2001-01-01.txt", "notes.txt", f"{old[6]}.txt.bak"}


# The lock --------------------------------------------------------------------


@support.root_only
def test_other_users_cannot_hold_the_lock(alice, host):
    alice.task("one", ":")
    assert alice.mission("run").code == 0
    (lock,) = alice.state.glob("*/lock")
    assert support.mode(lock.parent) == 0o700
    for user in (support.ALICE, support.MALLORY):
        tried = host.run(["flock", "-n", str(lock), "true"], user=user)
        assert tried.code != 0 and "ermission denied" in tried.err


@support.root_only
def test_lock_on_the_configuration_does_not_block_a_run(alice):
    alice.task("one", ":")
    alice.write()
    alice.path.chmod(0o644)
    with open(alice.path) as config:
        fcntl.flock(config, fcntl.LOCK_EX)
        assert alice.mission("run", write=False).code == 0


STATES = {
    "mallory's": lambda home, folder: os.chown(folder, MALLORY, MALLORY),
    "open to all": lambda home, folder: folder.chmod(0o777),
    "a link": lambda home, folder: (
        folder.rename(home.parent / "away"),
        folder.symlink_to(home.parent / "away"),
        os.chown(folder, MALLORY, MALLORY, follow_symlinks=False)),
    "in a folder of mallory's": lambda home, folder: os.chown(
        home, MALLORY, MALLORY),
    "in a folder open to all": lambda home, folder: home.chmod(0o777),
}


@support.root_only
@pytest.mark.parametrize("state", STATES)
def test_state_directory_that_another_user_can_write_is_refused(alice, state):
    alice.task("one", "echo x >> ../../ran")
    assert alice.mission("run").code == 0
    (folder,) = alice.state.iterdir()
    STATES[state](alice.state, folder)
    result = alice.mission("run")
    assert result.code != 0 and "Traceback" not in result.err, result
    assert (alice.folder / "ran").read_text() == "x\n"


@support.root_only
@pytest.mark.parametrize("kind", ["junk", "a pid"])
def test_lock_file_of_an_ended_run_does_not_lock(alice, kind):
    alice.task("one", ":")
    assert alice.mission("run").code == 0
    (lock,) = alice.state.glob("*/lock")
    lock.write_text("1\n" if kind == "a pid" else "\0junk")
    assert alice.mission("run").code == 0


# The configuration -----------------------------------------------------------


def marking_task(scratch) -> Path:
    """A task that leaves a mark; the mark, which must not be there."""
    mark = scratch.folder / "ran"
    scratch.task("one", f"touch '{mark}'")
    return mark


def give(path: Path, uid: int, gid: int = 0, mode: int | None = None):
    os.chown(path, uid, gid)
    if mode is not None:
        path.chmod(mode)


INTRUDERS = {
    # name -> what happens to the configuration file and its directory
    "mallory's": lambda path: give(path, MALLORY),
    "of mallory's group": lambda path: give(path, 0, MALLORY, 0o664),
    "of everyone": lambda path: give(path, 0, 0, 0o666),
    "in mallory's folder": lambda path: give(path.parent, MALLORY),
    "in a folder of mallory's group": lambda path: give(
        path.parent, 0, MALLORY, 0o775),
    "in a folder of everyone": lambda path: give(path.parent, 0, 0, 0o777),
    "below a folder of mallory's": lambda path: give(
        path.parent.parent, MALLORY),
}


@pytest.fixture
def deep(alice):
    """alice's configuration two directories down, away from the tasks."""
    folder = alice.folder / "etc" / "mission"
    folder.mkdir(parents=True)
    alice.path = folder / "mission.config.json"
    return alice


@support.root_only
@pytest.mark.parametrize("intruder", INTRUDERS)
def test_configuration_that_another_user_can_write_is_refused(deep, intruder):
    mark = marking_task(deep)
    deep.write()
    INTRUDERS[intruder](deep.path)
    assert_refused(deep.mission("run", write=False), str(deep.path))
    assert not mark.exists()


@support.root_only
@pytest.mark.parametrize("trust, code", [(None, 0), ("user", 0),
                                         ("root", 78)])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_trust_decides_whether_the_user_may_own_the_configuration(
        deep, trust, code, what):
    marking_task(deep)
    if trust:
        deep.config["trust"] = trust
    deep.write()
    give(deep.path if what == "file" else deep.path.parent, ALICE, ALICE)
    result = deep.mission("run", write=False)
    assert result.code == code, result


LINKS = {
    # name -> (link, its target) pairs, each below the scratch directory
    "roots to a file of roots": (0, [("etc/link", "etc/mission/CONFIG")]),
    "in a folder of mallory's": (78, [("hers/link", "etc/mission/CONFIG")]),
    "over a link of mallory's": (78, [("etc/link", "hers/link"),
                                      ("hers/link", "etc/mission/CONFIG")]),
}


@support.root_only
@pytest.mark.parametrize("case", LINKS)
def test_every_symbolic_link_of_a_path_is_checked(deep, case):
    mark = marking_task(deep)
    deep.write()
    code, links = LINKS[case]
    (deep.folder / "hers").mkdir()
    for name, target in links:
        (deep.folder / name).symlink_to(
            deep.folder / target.replace("CONFIG", deep.path.name))
    os.chown(deep.folder / "hers", MALLORY, MALLORY)
    deep.path = deep.folder / links[0][0]
    result = deep.mission("run", write=False)
    assert result.code == code, result
    assert mark.exists() == (code == 0)


@support.root_only
def test_a_configuration_in_the_working_directory_is_checked_too(alice,
                                                                  host):
    mark = marking_task(alice)
    home = host.home["mallory"]
    (home / "mission.config.json").write_text(json.dumps(alice.config))
    support.own(home, MALLORY)
    result = host.run([*support.program("mission"), "run"], cwd=home,
                      env=alice.env)
    assert_refused(result, "mission.config.json")
    assert not mark.exists()


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**30)


ODD_FILES = {
    "a fifo": os.mkfifo, "a folder": os.mkdir, "a gigabyte": sparse,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "/dev/null": lambda path: path.symlink_to("/dev/null"),
    "/dev/tty": lambda path: path.symlink_to("/dev/tty"),
    "/proc/kcore": lambda path: path.symlink_to("/proc/kcore"),
    "/proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "itself": lambda path: path.symlink_to(path),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_configuration_that_is_not_a_regular_file_is_refused_at_once(
        scratch, kind):
    ODD_FILES[kind](scratch.path)
    for command in ("check", "list"):
        result = scratch.mission(command, write=False, timeout=20)
        assert_refused(result, str(scratch.path))
        assert len(result.err.splitlines()) <= 2


BOMBS = {
    "100,000 open brackets": b"[" * 100_000,
    "100,000 open braces": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"tasks": ' + b"9" * 5000 + b"}",
    "a number with a huge power": b'{"tasks": 1e999999999}',
    "infinity": b'{"tasks": Infinity}', "not a number": b'{"tasks": NaN}',
    "minus infinity": b'{"tasks": -Infinity}', "1e999": b'{"tasks": 1e999}',
    "a comment without an end": b'{"tasks": [] /* ',
    "a string without an end": b'{"tasks": "',
    "a backslash at the end": b'{"tasks": "\\',
    "half a surrogate pair": b'{"tasks": "\\ud800"}',
    "half a surrogate pair as UTF-8": b'{"tasks": "\xed\xa0\x80"}',
    "a key that stands twice": b'{"tasks": [], "tasks": []}',
    "a byte order mark": b'\xef\xbb\xbf{"tasks": []}',
    "UTF-16": '{"tasks": []}'.encode("utf-16"),
    "UTF-32": '{"tasks": []}'.encode("utf-32"),
    "latin-1": '{"tasks": "caf\xe9"}'.encode("latin-1"),
    "a NUL": b'{"tasks": "\0"}', "NULs": b"\0" * 1000,
    "nothing": b"", "a blank": b" ", "a comment alone": b"// x",
    "a list": b"[]", "a string": b'"x"', "null": b"null", "two": b"{} {}",
    "a comma alone": b"{,}", "two commas": b'{"tasks": [1,,2]}',
    "no colon": b'{"tasks" []}', "single quotes": b"{'tasks': []}",
    "a newline in a string": b'{"tasks": "a\nb"}',
    "an unknown escape": b'{"tasks": "\\x41"}',
    "a word": b'{"tasks": yes}', "a million blanks": b" " * 2**20 + b"{}",
    "escapes": b'{"\\u001b[2J": 1}', "raw escapes": b'{"\x1b[2J": 1}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_invalid_configuration_is_one_line_with_a_position(scratch, bomb):
    scratch.path.write_bytes(BOMBS[bomb])
    scratch.path.chmod(0o600)
    started = time.monotonic()
    result = scratch.mission("check", write=False, timeout=30)
    assert time.monotonic() - started < 20
    assert result.code == 78 and result.out == "", result
    lines = result.err.splitlines()
    assert "Traceback" not in result.err and "\x1b" not in result.err
    assert len(lines) < 20 and max(map(len, lines)) < 1000
    assert bomb == "a million blanks" or any(
        line.replace(str(scratch.path), "FILE").split(" ")[0].count(":") >= 2
        or f"{scratch.path}:" in line for line in lines), result


@pytest.mark.parametrize("slug", [
    "../../etc", "a/b", "..", ".", "-x", "--", "_x", "", " ", "a b", "A",
    "\uff41", "\u0661", "a\n", "a\0b", "a" * 65, "a" * 300, "a\u202eb",
    "$(id)"])
def test_invalid_slugs_are_refused(scratch, slug):
    scratch.task("one", ":")
    scratch.config["tasks"][0]["slug"] = slug
    assert_refused(scratch.mission("run"), "tasks[0].slug")


# The tasks -------------------------------------------------------------------


TASKS = {
    # name -> what happens to the script of `bad` (TASKS/bad/run)
    "mallory's": lambda run: give(run, MALLORY),
    "of mallory's group": lambda run: give(run, 0, MALLORY, 0o775),
    "of everyone": lambda run: give(run, 0, 0, 0o777),
    "its folder mallory's": lambda run: give(run.parent, MALLORY),
    "its folder of everyone": lambda run: give(run.parent, 0, 0, 0o777),
    "a link to one of mallory's": lambda run: (
        run.rename(run.with_name("real")),
        give(run.with_name("real"), MALLORY),
        run.symlink_to(run.with_name("real"))),
    "over a link of mallory's": lambda run: (
        run.rename(run.parent.parent / "real"),
        (run.parent / "hers").mkdir(),
        (run.parent / "hers" / "link").symlink_to(run.parent.parent / "real"),
        give(run.parent / "hers", MALLORY),
        run.symlink_to(run.parent / "hers" / "link")),
}


@support.root_only
@pytest.mark.parametrize("case", TASKS)
def test_root_does_not_run_a_task_that_another_user_can_write(alice, case):
    mark, good = alice.folder / "mark", alice.folder / "good"
    TASKS[case](alice.task("bad", f"touch '{mark}'"))
    alice.task("good", f"touch '{good}'")
    assert_refused(alice.mission("check"), "bad")
    result = alice.headless()
    assert not mark.exists() and result.code == 1, result
    assert good.exists(), "a broken script stops no other backup"
    outcomes = {task["slug"]: task["outcome"]
                for task in alice.history()[-1]["tasks"]}
    assert outcomes == {"bad": "failed", "good": "ok"}


@support.root_only
@pytest.mark.parametrize("change", [
    lambda folder: give(folder, MALLORY),
    lambda folder: give(folder, 0, 0, 0o777)], ids=["mallory's", "everyone's"])
@pytest.mark.parametrize("kind", ["task", "entrypoint", "builtin"])
def test_root_does_not_run_a_task_in_a_directory_of_another_user(
        alice, change, kind):
    mark = alice.folder / "mark"
    folder = alice.tasks
    if kind == "builtin":
        alice.builtin("bad", f"""
            def run(args, log):
                open({str(mark)!r}, "w").close()
            """)
    elif kind == "entrypoint":
        folder = alice.make("opt")
        (folder / "sub").mkdir()
        program = folder / "sub" / "program"
        program.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
        program.chmod(0o755)
        alice.entry("bad", "exec", entrypoint=str(program))
    else:
        alice.task("bad", f"touch '{mark}'")
    assert alice.mission("run").code == 0 and mark.exists()
    mark.unlink()
    change(folder)
    assert_refused(alice.mission("check"), str(folder))
    assert alice.mission("run").code == 1 and not mark.exists()


@support.root_only
@pytest.mark.parametrize("kind", ["task", "builtin"])
def test_task_that_another_user_can_write_is_not_opened(alice, victim, kind):
    """It could be a link to a file of root's, whose words a message quotes.
    """
    victim.write_text("#!/SECRET\nimport SECRET\n")
    victim.chmod(0o700)
    if kind == "task":
        path = alice.task("bad", ":")
    else:
        alice.builtin("bad", "x")
        path = alice.tasks / "bad" / "task.py"
    path.unlink()
    path.symlink_to(victim)
    os.chown(path, MALLORY, MALLORY, follow_symlinks=False)
    give(path.parent, MALLORY)
    check, run = alice.mission("check"), alice.headless()
    assert_refused(check, str(path.parent), "mallory")
    assert run.code == 1
    assert "SECRET" not in check.err + run.err + alice.log()
    lines = [line for line in check.err.splitlines() if "tasks[0]" in line]
    assert len(lines) == 1, check


@support.root_only
@pytest.mark.parametrize("key", ["chown", "commit"])
def test_no_file_name_behind_a_symbolic_link_of_the_user_is_shown(
        alice, host, tmp_path, key):
    theirs = support.make_repository(tmp_path / "theirs")
    (theirs / "SECRET").touch()
    os.chown(theirs / "SECRET", MALLORY, MALLORY)
    link = host.home["alice"] / "storage"
    link.symlink_to(theirs)
    os.chown(link, ALICE, ALICE, follow_symlinks=False)
    alice.config["storage"]["sync"] = {"path": str(link), key: True}
    alice.task("one", ":")
    check, run = alice.mission("check"), alice.headless()
    assert_refused(check, "storage.sync.path", "safely")
    assert run.code == 1
    assert "SECRET" not in check.err + run.err + alice.log()


@support.root_only
@pytest.mark.parametrize("trust, code", [(None, 0), ("root", 1)])
@pytest.mark.parametrize("what", ["script", "folder", "all"])
def test_trust_decides_whether_the_user_may_own_tasks(alice, trust, code,
                                                         what):
    mark = alice.folder / "mark"
    run = alice.task("one", f"touch '{mark}'")
    if trust:
        alice.config["trust"] = trust
    give({"script": run, "folder": run.parent, "all": alice.tasks}[what],
         ALICE, ALICE)
    result = alice.mission("run")
    assert result.code == code and mark.exists() == (code == 0), result


@support.root_only
def test_program_in_a_directory_of_another_user_is_skipped(alice, host):
    """The sendmail of mallory comes first in PATH and is not run."""
    mails = alice.keep_mail(start=False)
    hers, mark = host.home["mallory"], alice.folder / "mark"
    mark.touch()
    mark.chmod(0o666)
    (hers / "sendmail").write_text(f"#!/bin/sh\nid -u > '{mark}'\n")
    (hers / "sendmail").chmod(0o755)
    support.own(hers, MALLORY)
    alice.env["PATH"] = f"{hers}:{alice.env['PATH']}"
    alice.task("one", ":")
    result = alice.headless()
    assert result.code == 0 and mark.read_text() == "", result
    assert len(list(mails.iterdir())) == 1


# Access control lists and groups --------------------------------------------


LISTS = {
    # name -> (the entries, the status of `check`)
    "for mallory": ([(support.ACL_USER, 7, MALLORY)], 78),
    "for mallory's group": ([(support.ACL_GROUP, 7, MALLORY)], 78),
    "for a group that nobody knows": ([(support.ACL_GROUP, 7, 54321)], 78),
    "for a user that nobody knows": ([(support.ACL_USER, 7, 54321)], 78),
    "for mallory, to read": ([(support.ACL_USER, 5, MALLORY)], 0),
    "for alice, who is trusted": ([(support.ACL_USER, 7, ALICE)], 0),
    "for alice's group": ([(support.ACL_GROUP, 7, ALICE)], 0),
}


@support.root_only
@pytest.mark.parametrize("entries", LISTS)
@pytest.mark.parametrize("what", ["run", "its folder", "configuration",
                                  "folder above"])
def test_access_control_list_is_checked_like_a_mode(deep, entries, what):
    mark = deep.folder / "mark"
    run = deep.task("one", f"touch '{mark}'")
    deep.write()
    entries, code = LISTS[entries]
    path = {"run": run, "its folder": run.parent, "configuration": deep.path,
            "folder above": deep.path.parent.parent}[what]
    support.set_acl(path, *entries)
    result = deep.mission("check", write=False)
    assert result.code == code, result
    assert code == 0 or str(path) in result.err
    deep.mission("run", write=False)
    assert mark.exists() == (code == 0)


@support.root_only
def test_access_list_entry_for_the_user_is_refused_with_trust_root(deep):
    run = deep.task("one", ":")
    deep.config["trust"] = "root"
    deep.write()
    support.set_acl(run, (support.ACL_USER, 7, ALICE))
    assert_refused(deep.mission("check", write=False), "alice", str(run))


@support.root_only
def test_access_list_entry_disabled_by_the_mask_is_accepted(deep):
    run = deep.task("one", ":")
    support.set_acl(run, (support.ACL_USER, 7, MALLORY), mask=5)
    assert deep.mission("check").code == 0


@support.root_only
def test_default_access_list_of_a_directory_is_checked(deep):
    run = deep.task("one", ":")
    support.set_acl(run.parent, (support.ACL_USER, 7, MALLORY), kind="default")
    assert_refused(deep.mission("check"), str(run.parent))


@support.root_only
@pytest.mark.parametrize("gid, members, code", [
    (54321, None, 78),          # no such group: who is in it?
    (54321, "", 0),             # nobody
    (54321, "alice", 0),
    (54321, "alice,mallory", 78),
    (54321, "somebody-of-ldap", 78),
    (MALLORY, None, 78),        # mallory's first group
])
def test_group_write_needs_a_group_with_known_members(deep, host, gid,
                                                      members, code):
    if members is not None:
        with open(host.folder / "group", "a") as group:
            group.write(f"team:x:{gid}:{members}\n")
    run = deep.task("one", ":")
    give(run, 0, gid, 0o775)
    result = deep.mission("check")
    assert result.code == code, result


@support.root_only
@pytest.mark.parametrize("sources, code", [
    ("files systemd", 0), ("files sss", 78),
    ("files [NOTFOUND=return] ldap", 78), ("compat # sss", 0)])
def test_group_write_is_refused_if_users_cannot_be_enumerated(
        deep, host, sources, code):
    """SSSD has users that it does not enumerate: any of them can have this
    group as the first one."""
    switch = host.folder / "nsswitch.conf"
    switch.write_text(f"# sss\npasswd:  {sources}\ngroup: files sss\n")
    host.bind(switch, "/etc/nsswitch.conf")
    run = deep.task("one", ":")
    give(run, 0, ALICE, 0o775)
    result = deep.mission("check")
    assert result.code == code, result


def nfs4_acl(*entries: tuple) -> bytes:
    """(type, flags, mask, who) as the NFS client of Linux shows them."""
    data = struct.pack(">I", len(entries))
    for kind, flags, mask, who in entries:
        name = who.encode()
        data += struct.pack(">IIII", kind, flags, mask, len(name))
        data += name + b"\0" * (-len(name) % 4)
    return data


@pytest.mark.parametrize("entries, found", [
    ([(0, 0, 0x1601ff, "OWNER@"), (0, 0, 0x1200a9, "EVERYONE@")], ""),
    ([(0, 0, 0x2, "EVERYONE@")], "everyone"),
    ([(1, 0, 0x2, "EVERYONE@")], ""),                   # it denies
    ([(0, 0, 0x2, "somebody@example.org")], "somebody@example.org"),
    ([(0, 0, 0x40, "somebody@example.org")], "somebody@example.org"),
    ([(0, 0, 0x40000, "somebody@example.org")], "somebody@example.org"),
    ([(0, 0, 0x1, "somebody@example.org")], ""),        # it only reads
    ([(0, 0, 0x2, "root@example.org")], ""),
    ([(0, 0x40, 0x2, "root@example.org")], "root@example.org"),   # a group
])
def test_nfs4_access_list_is_searched_for_writers(entries, found):
    mission = support.load("mission")
    assert mission.nfs4_writer(nfs4_acl(*entries), {0}) == found


def test_truncated_nfs4_access_list_is_an_error():
    with pytest.raises(OSError):
        support.load("mission").nfs4_writer(
            nfs4_acl((0, 0, 2, "EVERYONE@"))[:-4], {0})


# Paths -----------------------------------------------------------------------


@support.root_only
@pytest.mark.parametrize("written, means", [
    ("~/sub",               "ALICE/sub"),
    ("~alice/sub",          "ALICE/sub"),
    ("~mallory/sub",        "MALLORY/sub"),
    ("~",                   "ALICE"),
    ("sub",                 "HERE/sub"),
    ("./sub/",              "HERE/sub"),
    ("sub/../sub",          "HERE/sub"),
    ("$HOME/sub",           "HERE/$HOME/sub"),
    ("sub/~",               "HERE/sub/~"),
    ("ALICE/./sub//",       "ALICE/sub"),
])
def test_path_is_expanded_the_same_way_everywhere(alice, host, written, means):
    """`~` is an expansion at the front alone, and of passwd's homes, not of
    the caller's HOME; a relative path starts at the configuration."""
    places = {"ALICE": str(host.home["alice"]), "HERE": str(alice.folder),
              "MALLORY": str(host.home["mallory"])}

    def spelt(text: str) -> str:
        for word, path in places.items():
            text = text.replace(word, path)
        return text

    Path(spelt(means)).mkdir(parents=True, exist_ok=True)
    alice.config["storage"]["sync"] = {"path": spelt(written)}
    alice.task("one", ":")
    result = alice.mission("dump")
    assert result.code == 0, result
    assert json.loads(result.out)["storage"]["sync"]["path"] == spelt(means)


@support.root_only
def test_a_home_of_an_unknown_user_is_an_error(alice):
    alice.config["storage"]["sync"] = {"path": "~nobody-of-that-name/x"}
    alice.task("one", ":")
    assert_refused(alice.mission("check"), "storage.sync.path",
                   "nobody-of-that-name")

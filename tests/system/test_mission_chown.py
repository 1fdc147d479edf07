"""What root chowns to a user, in a directory that this user can change."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

import attack
import support

pytestmark = support.root_only

ALICE, MALLORY = support.ALICE_UID, support.MALLORY_UID
# Each race lasts at least so long; tests/bench/chown_race.py runs longer.
SECONDS, PASSES = (2.0, 100) if support.FULL else (0.3, 20)


def chown_tree(tree, uid: int = ALICE, gid: int = ALICE):
    return support.load("mission").chown_tree(str(tree), uid, gid)


def named(chowned) -> str:
    """What it left alone, and why, as one text."""
    return "\n".join(f"{path}: {why}" for path, why in chowned.left)


@pytest.fixture
def arena(tmp_path, host):
    """A directory that alice can reach (`host` opens the way to it)."""
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
def tree(tmp_path):
    """A tree of alice's, with a file of root's in it."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "plain").write_text("x")
    os.chown(folder, ALICE, ALICE)
    return folder


@pytest.fixture
def victim(tmp_path):
    """A file of root outside the tree."""
    path = tmp_path / "shadow"
    path.write_text("secret")
    path.chmod(0o600)
    return path


def untouched(victim) -> bool:
    status = os.lstat(victim)
    return (status.st_uid, status.st_gid) == (0, 0) and (
        not stat.S_ISREG(status.st_mode) or victim.read_text() == "secret")


def backup(alice, host, name: str = "backup", **options) -> Path:
    """A directory below alice's home that a run of root's gives to her."""
    folder = host.home["alice"] / name
    folder.mkdir(parents=True)
    support.own(folder, ALICE)
    alice.config["storage"]["sync"] = {
        "path": str(folder), "chown": True, **options}
    return folder


# What is given over ----------------------------------------------------------


def test_regular_files_and_directories_are_chowned_and_counted(tree):
    (tree / "folder").mkdir()
    (tree / "folder" / "file").touch()
    done = chown_tree(tree)
    assert {support.owner(path) for path in tree.rglob("*")} == {ALICE}
    assert os.lstat(tree / "folder" / "file").st_gid == ALICE
    assert done.changed == 3 and done.left == []
    again = chown_tree(tree)
    assert (again.changed, again.left) == (0, [])


def test_chown_gives_the_files_of_tasks_to_the_user(alice, host):
    folder = backup(alice, host)
    alice.task("one", 'mkdir "$SYNC_DIR/new"; echo x > "$SYNC_DIR/new/file"')
    result = alice.headless()
    assert (result.code, result.err) == (0, ""), result
    assert support.owner(folder / "new" / "file") == ALICE
    assert support.owner(folder / "new") == ALICE
    assert "# Chown" in alice.log()


def test_a_symbolic_link_is_not_followed(tree, victim):
    (tree / "link").symlink_to(victim)
    (tree / "folder").symlink_to(victim.parent)
    (tree / "nowhere").symlink_to("/nonexistent")
    chown_tree(tree)
    assert untouched(victim)
    assert support.owner(victim.parent) == 0
    assert support.owner(tree / "link") == ALICE


def test_dangling_symbolic_link_stops_no_chown(tree):
    for name in "abc":
        (tree / name).symlink_to("/nonexistent")
        (tree / (name + "x")).touch()
    chown_tree(tree)
    assert {support.owner(path) for path in tree.iterdir()} == {ALICE}


# Races -----------------------------------------------------------------------


class Hung(Exception):
    """A walk that took far too long."""


@contextlib.contextmanager
def at_most(seconds: float):
    """Raise Hung in the test after `seconds`."""
    def stop(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def race(rig, walk, seconds: float = SECONDS,
         least: int = PASSES) -> tuple[int, int]:
    """(passes, stolen files) of a walk against the attacker. The group
    changes with each pass, so that there is always something to do."""
    passes, deadline = 0, time.monotonic() + seconds
    with rig.attacker():
        while (time.monotonic() < deadline or passes < least) \
                and not rig.stolen():
            with at_most(10):
                walk(rig.tree, ALICE, ALICE + passes % 2)
            passes += 1
    print(f"{walk.__name__} against {rig.kind}: {passes:,} passes, "
          f"{rig.stolen()} stolen")
    return passes, rig.stolen()


SWAPS = [("links", attack.walk_by_paths), ("inner", attack.walk_by_paths),
         ("files", attack.naive_walk)]


@pytest.mark.parametrize("kind", [kind for kind, _ in SWAPS])
def test_swapped_directory_does_not_lead_out_of_the_tree(arena, kind):
    rig = attack.Race(arena, kind)
    passes, stolen = race(rig, chown_tree)
    assert stolen == 0 and passes > 10


@pytest.mark.parametrize("kind, careless", SWAPS)
def test_naive_walk_loses_the_race_against_swaps(arena, kind, careless):
    _, stolen = race(attack.Race(arena, kind), careless, 60)
    assert stolen > 0


@pytest.mark.parametrize("kind", attack.Names.KINDS)
def test_file_is_chowned_by_name_only_where_no_user_can_swap_it(arena, kind):
    rig = attack.Names(arena, kind)

    def walk(tree, uid, gid):
        rig.reset()
        chown_tree(tree, uid, gid)

    passes, stolen = race(rig, walk)
    assert stolen == 0 and passes > 10


@pytest.mark.parametrize("kind", attack.Names.KINDS)
def test_walk_that_chowns_by_name_anywhere_loses_the_race(
        arena, kind, monkeypatch):
    mission = support.load("mission")
    monkeypatch.setattr(mission, "is_roots_alone", lambda _fd: True)
    rig = attack.Names(arena, kind)

    def walk(tree, uid, gid):
        rig.reset()
        chown_tree(tree, uid, gid)

    _, stolen = race(rig, walk, 60)
    assert stolen > 0


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_hard_link_moved_during_the_walk_is_not_counted_twice(arena, kind):
    passes, stolen = race(attack.Links(arena, kind), chown_tree)
    assert stolen == 0 and passes > 3


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_walk_that_counts_names_loses_the_race_against_hard_links(arena, kind):
    _, stolen = race(attack.Links(arena, kind), attack.counting_walk, 60)
    assert stolen > 0


def test_fifo_swapped_for_a_directory_does_not_block_the_walk(arena):
    passes, _ = race(attack.Race(arena, "fifo"), chown_tree)
    assert passes > 10


def test_os_fwalk_blocks_or_fails_at_a_swapped_fifo(arena):
    with pytest.raises((Hung, NotADirectoryError, FileNotFoundError)):
        rig = attack.Race(arena, "fifo")
        with rig.attacker():
            while True:
                with at_most(2):
                    attack.walk_of_the_library(rig.tree, ALICE, ALICE)


def test_swapped_parent_directory_is_refused_or_not_followed(arena):
    rig = attack.Race(arena, "links")
    top = rig.tree / "d" / "e"

    def walk(tree, uid, gid):
        with contextlib.suppress(OSError, support.load("mission").Error):
            chown_tree(top, uid, gid)

    passes, stolen = race(rig, walk)
    assert stolen == 0 and passes > 10


# Hard links, special files, privileges ---------------------------------------


def test_file_with_a_hard_link_outside_is_skipped_and_named(tree, victim):
    os.link(victim, tree / "hard")
    done = chown_tree(tree)
    assert untouched(victim)
    assert support.owner(tree / "plain") == ALICE
    assert "hard" in named(done) and "link" in named(done)


def test_file_with_all_hard_links_in_the_tree_is_chowned(tree):
    (tree / "deep").mkdir()
    os.link(tree / "plain", tree / "second")
    os.link(tree / "plain", tree / "deep" / "third")
    done = chown_tree(tree)
    assert support.owner(tree / "plain") == ALICE
    assert done.left == []


def test_new_snapshot_of_hard_links_is_chowned(alice, host):
    """As `cp -al` or `rsync --link-dest` make them, moments ago."""
    folder = backup(alice, host)
    alice.task("one", 'cd "$SYNC_DIR"; mkdir today\n'
               'for name in a b c; do echo x > $name; done; cp -al ? today')
    result = alice.headless()
    assert (result.code, result.err) == (0, ""), alice.log()
    assert {support.owner(path) for path in folder.rglob("*")} == {ALICE}


def test_skipped_hard_link_fails_the_run(alice, host, victim):
    folder = backup(alice, host)
    os.link(victim, folder / "hard")
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    result = alice.headless()
    assert untouched(victim)
    assert result.code == 1 and len(result.err.splitlines()) == 1, result
    assert f"{folder}/hard" in alice.log()
    assert support.owner(folder / "new") == ALICE


def test_fifos_and_sockets_do_not_block_the_walk(tree):
    import socket
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket"))
        with at_most(10):
            chown_tree(tree)
    assert support.owner(tree / "plain") == ALICE


@pytest.mark.parametrize("kind, number", [
    (stat.S_IFBLK, (7, 0)), (stat.S_IFCHR, (1, 3))], ids=["block", "char"])
def test_device_is_never_chowned_and_is_named(tree, kind, number):
    os.mknod(tree / "disk", kind | 0o660, os.makedev(*number))
    done = chown_tree(tree)
    assert support.owner(tree / "disk") == 0
    assert os.lstat(tree / "disk").st_gid == 0
    assert "disk" in named(done) and "device" in named(done)
    assert support.owner(tree / "plain") == ALICE


@pytest.mark.parametrize("mode", [
    0o4755, 0o2755, 0o6755, 0o4644, 0o2644, 0o6600], ids=oct)
def test_setuid_and_setgid_bits_are_removed(tree, mode):
    program = tree / "program"
    program.write_text("x")
    program.chmod(mode)
    chown_tree(tree)
    assert support.owner(program) == ALICE
    assert support.mode(program) == mode & 0o777


def test_setgid_bit_is_removed_if_only_the_group_changes(tree):
    """Owner alice, group root: only the group changes hands."""
    program = tree / "program"
    program.write_text("x")
    os.chown(program, ALICE, 0)
    program.chmod(0o2644)
    chown_tree(tree)
    assert os.lstat(program).st_gid == ALICE
    assert support.mode(program) == 0o644


def test_file_capabilities_are_removed(tree):
    support.need("setcap", "getcap")
    program = tree / "program"
    program.write_text("x")
    program.chmod(0o755)
    given = subprocess.run([support.find("setcap"), "cap_setuid+ep",
                            str(program)], stdin=subprocess.DEVNULL)
    if given.returncode:
        support.absent("this file system keeps no file capabilities")
    chown_tree(tree)
    seen = subprocess.run([support.find("getcap"), str(program)],
                          stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert support.owner(program) == ALICE and seen.stdout == b""


@pytest.mark.parametrize("kind", ["tmpfs", "folder", "file"])
def test_a_mount_inside_the_tree_is_not_entered(alice, host, victim, kind):
    """A bind mount of the same file system has the same device number."""
    folder = backup(alice, host)
    here = folder / "mnt"
    if kind == "file":
        here.touch()
        host.bind(victim, here)
    else:
        here.mkdir()
        elsewhere = victim.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "file").write_text("secret")
        host.bind(elsewhere, here)
        if kind == "tmpfs":
            host.binds.pop()
            host.setup = [f"mount -t tmpfs none '{here}'",
                          f"cp -p '{victim}' '{here}/file'"]
    support.own(folder, ALICE)
    seen = victim.parent / "seen"
    alice.task("one", 'echo x > "$SYNC_DIR/new"', post=False)
    alice.task("look", f"stat -c %u '{here}' > '{seen}'\n"
               f"find '{here}' -type f -exec stat -c %u {{}} + >> '{seen}'",
               post=True)
    result = alice.headless()
    assert support.owner(folder / "new") == ALICE, result
    assert set(seen.read_text().split()) == {"0"}, alice.log()
    assert untouched(victim)
    assert f"{folder}/mnt" in alice.log()


# Where the tree is -----------------------------------------------------------


def test_storage_behind_a_symbolic_link_of_the_user_is_refused(
        alice, host, victim):
    victims = victim.parent / "victims"
    victims.mkdir()
    (victims / "file").write_text("secret")
    link = host.home["alice"] / "backup"
    link.symlink_to(victims)
    os.chown(link, ALICE, ALICE, follow_symlinks=False)
    alice.config["storage"]["sync"] = {"path": str(link), "chown": True}
    alice.task("one", ":")
    result = alice.headless()
    assert untouched(victims / "file") and support.owner(victims) == 0
    assert result.code != 0 and "Traceback" not in result.err, result


@pytest.mark.parametrize("under", ["", "sub"], ids=["itself", "its parent"])
def test_a_storage_turned_into_a_link_during_the_run_is_refused(
        alice, host, victim, under):
    victims = victim.parent / "victims" / under
    victims.mkdir(parents=True)
    (victims / "file").write_text("secret")
    folder = backup(alice, host, f"backup/{under}")
    top = host.home["alice"] / "backup"
    support.own(top, ALICE)
    alice.task("one", f"mv '{top}' '{top}.away'\n"
               f"ln -s '{victim.parent}/victims' '{top}'\n"
               f"chown -h alice '{top}'")
    result = alice.headless()
    assert top.is_symlink() and folder.exists()
    assert untouched(victims / "file") and support.owner(victims) == 0
    assert result.code == 1, result
    assert str(top) in alice.log()


def test_storage_behind_a_symbolic_link_of_root_is_chowned(alice, host):
    folder = backup(alice, host)
    link = alice.folder / "link"
    link.symlink_to(folder)
    alice.config["storage"]["sync"]["path"] = str(link)
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    result = alice.headless()
    assert result.code == 0, result
    assert support.owner(folder / "new") == ALICE


# Only checked, never run: a faulty mission must not give away the host.
@pytest.mark.parametrize("path", [
    "/", "//", "/etc", "//etc", "/etc/", "/etc/../etc", "/usr", "/usr/lib",
    "/home", "/root", "/var", "/var/lib", "/tmp", "/bin", "/dev",
    "LINK TO /etc", "LINK TO /", "LINK TO THE FOLDER OF ALL",
    "FOLDER OF ALL", "HOME OF MALLORY"])
def test_system_directories_are_never_chowned(alice, host, path):
    """FOLDER OF ALL holds the configuration and the tasks."""
    words = {"FOLDER OF ALL": alice.folder, "HOME OF MALLORY":
             host.home["mallory"]}
    if path.startswith("LINK TO "):
        link = alice.folder.parent / "link"
        link.symlink_to(words.get("FOLDER" + path[15:], path[8:]))
        words[path] = link
    alice.config["storage"]["sync"] = {
        "path": str(words.get(path, path)), "chown": True}
    alice.task("one", ":")
    result = alice.mission("check")
    assert result.code == 78 and "storage.sync" in result.err, result
    assert path in words or "system" in result.err, result


@pytest.mark.parametrize("depth", ["x", "sub/x"])
def test_directory_with_files_of_a_third_user_is_refused(alice, host, depth):
    folder = backup(alice, host)
    path = folder / depth
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.chown(path, MALLORY, MALLORY)
    alice.task("one", ":")
    result = alice.mission("check")
    assert (result.code == 78) == (depth == "x"), result
    assert depth != "x" or re.search(r"\bx\b", result.err), result


# Depth and names -------------------------------------------------------------


def dig(top: Path, levels: int) -> None:
    """Directories of root's inside one another, deeper than a path can say."""
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


@pytest.mark.parametrize("levels", [400, 600, 5000])
def test_deep_tree_is_walked_or_named_without_an_exception(tree, levels):
    for name in ("aside", "beside", "zide"):
        (tree / name).mkdir()
        (tree / name / "file").touch()
    dig(tree / "beside", levels)
    try:
        try:
            with at_most(60):
                done = chown_tree(tree)
        except RecursionError:      # its traceback takes pytest minutes
            pytest.fail("RecursionError", pytrace=False)
        for name in ("aside", "beside", "zide"):
            assert support.owner(tree / name / "file") == ALICE
        assert done.left or done.changed >= levels + 7
        assert done.left == [] or levels > 500
        assert len(named(done)) < 20_000
    finally:
        subprocess.run(["rm", "-rf", str(tree)], check=True)


def test_a_run_over_a_deep_tree_ends_with_a_clean_message(alice, host):
    folder = backup(alice, host)
    alice.task("one", 'echo x > "$SYNC_DIR/new"')
    dig(folder, 5000)
    try:
        result = alice.headless()
        broken = "Traceback" in result.err + alice.log()
        assert not broken, "a traceback"
        assert result.code in (0, 1), result
        assert support.owner(folder / "new") == ALICE
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.mark.parametrize("name", [
    b"\xff" * 255, b"caf\xe9", b"a\nb", b"\x1b[2J", b"-rf", b" ", b"*",
    "\u202egnp.exe".encode()], ids=repr)
def test_files_of_any_name_are_chowned(tree, name):
    path = os.path.join(os.fsencode(tree), name)
    os.mkdir(path)
    os.close(os.open(os.path.join(path, name), os.O_CREAT | os.O_WRONLY))
    done = chown_tree(tree)
    assert os.lstat(path).st_uid == ALICE
    assert os.lstat(os.path.join(path, name)).st_uid == ALICE
    assert done.left == []


@pytest.mark.parametrize("name, shown", [
    (b"a\nFinishTime 00:00 ok", r"a\x0aFinishTime 00:00 ok"),
    (b"a\x1b[2Jb", r"a\x1b[2Jb"), (b"a\rb", r"a\x0db"),
    ("a\u202eb".encode(), r"a\u202eb"), (b"caf\xe9", "caf"),
])
def test_a_name_in_the_log_is_one_escaped_line(alice, host, victim, name,
                                                  shown):
    folder = backup(alice, host)
    os.link(victim, os.path.join(os.fsencode(folder), name))
    alice.task("one", ":")
    result = alice.headless()
    assert result.code == 1, result
    log = alice.log()
    assert shown in log
    assert not any(line.startswith("FinishTime 00:00")
                   for line in log.splitlines())
    assert "\x1b" not in log and "\u202e" not in log and "\r" not in log


def test_many_files_take_little_memory(tree):
    import tracemalloc
    for number in range(2000):
        os.close(os.open(tree / f"{number:0200}", os.O_CREAT, 0o600))
    support.load("mission")
    tracemalloc.start()
    try:
        done = chown_tree(tree)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert done.changed == 2001
    assert peak < 3 * 2**20, f"{peak:,} bytes for 2,000 names"


# Who gets it -----------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "nobody-of-that-name", "0", "1500", "4294967295", "-1", "", " ",
    "alice\n", "alice:x", "minus", "short", 1500, None])
def test_chown_accepts_only_the_name_of_a_user(alice, host, name):
    """`minus` has the uid 2^32-1 and `short` 2^16-1: to chown(2) they mean
    "do not change", and a process so started stays root's."""
    with open(host.folder / "passwd", "a") as passwd:
        passwd.write("minus:x:4294967295:4294967295::/:/bin/sh\n"
                     "short:x:65535:65535::/:/bin/sh\n")
    folder = backup(alice, host)
    (folder / "root's").touch()
    alice.config["user"]["name"] = name
    alice.task("one", f"touch '{alice.folder}/ran'")
    result = alice.headless()
    assert result.code == 78 and "user.name" in result.err, result
    assert support.owner(folder / "root's") == 0
    assert not (alice.folder / "ran").exists()


def test_root_may_be_the_user_and_chown_gives_to_root(alice):
    folder = alice.make("backup")
    alice.config["storage"]["sync"] = {"path": str(folder), "chown": True}
    alice.config["user"]["name"] = "root"
    alice.task("one", 'echo x > "$SYNC_DIR/new"; chown alice "$SYNC_DIR/new"')
    result = alice.headless()
    assert (result.code, result.err) == (0, ""), (result, alice.log())
    assert support.owner(folder / "new") == 0

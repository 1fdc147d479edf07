"""Tasks that run as another user: can that user reach the program, and do
its files stay with it?"""

from __future__ import annotations

import os

import pytest

import support

pytestmark = support.root_only

ALICE, MALLORY = support.ALICE_UID, support.MALLORY_UID


@pytest.fixture
def private(alice, host):
    """Tasks in a home directory of mode 0700, as Debian makes them."""
    home = host.home["alice"]
    alice.tasks = home / "backup" / "tasks"
    alice.tasks.mkdir(parents=True)
    support.own(home / "backup", ALICE)
    home.chmod(0o700)
    alice.config["storage"]["tasks"]["path"] = str(alice.tasks)
    return alice


def assert_silent(result) -> None:
    assert (result.code, result.out, result.err) == (0, "", "")


def test_check_names_the_directory_that_the_user_cannot_search(private, host):
    private.task("own", "echo own")
    private.task("dump", "echo dump", user=support.MALLORY)
    home = host.home["alice"]
    result = private.mission("check")
    line, closing = result.err.splitlines()
    assert line.endswith(
        f"tasks[1].slug: {home} cannot be searched by mallory "
        f"(chmod o+x {home})")
    assert result.code == 78 and "1 error" in closing
    home.chmod(0o711)
    assert_silent(private.mission("check"))


def test_run_names_the_directory_and_runs_the_other_tasks(private, host):
    private.task("own", "echo own")
    private.task("dump", "echo dump", user=support.MALLORY)
    result = private.mission("run")
    assert private.outcomes() == {"own": "ok", "dump": "failed"}
    assert f"{host.home['alice']} cannot be searched by mallory" in result.out


def test_path_is_walked_again_when_the_task_starts(private, host):
    home = host.home["alice"]
    home.chmod(0o711)
    private.task("closing", f"chmod 700 '{home}'")
    private.task("dump", "echo dump", user=support.MALLORY)
    result = private.mission("run")
    assert private.outcomes() == {"closing": "ok", "dump": "failed"}
    assert f"{home} cannot be searched by mallory" in result.out


def test_access_control_list_that_lets_the_user_pass_is_honoured(
        private, host):
    private.task("dump", "id -un", user=support.MALLORY)
    support.set_acl(host.home["alice"], (support.ACL_USER, 1, MALLORY),
                    mask=1)
    assert_silent(private.mission("check"))
    result = private.mission("run")
    assert result.code == 0 and "mallory" in result.out


@pytest.mark.parametrize("kind, letter", [("exec", "x"), ("builtin", "r")])
def test_program_that_the_user_cannot_use_is_named(alice, kind, letter):
    if kind == "exec":
        path = alice.task("dump", "echo", user=support.MALLORY)
    else:
        alice.builtin("dump", "def run(args, log): pass",
                      user=support.MALLORY)
        path = alice.tasks / "dump" / "task.py"
    path.chmod(0o700)
    result = alice.mission("check")
    assert (f"{path} cannot be used by mallory (chmod o+{letter} {path})"
            in result.err)


# --- files of the user of a task stay theirs -------------------------------


@pytest.fixture
def shared(alice, host):
    """A storage of alice's with `chown`, and a directory of mallory's."""
    folder = host.home["alice"] / "local"
    (folder / "pg").mkdir(parents=True)
    support.own(folder, ALICE)
    os.chown(folder / "pg", MALLORY, MALLORY)
    alice.config["storage"]["local"] = {"path": str(folder), "chown": True}
    return folder


def test_files_of_the_user_of_a_task_stay_theirs_in_every_run(alice, shared):
    alice.task("dump", 'date > "$LOCAL_DIR/pg/all.sql"', user=support.MALLORY)
    alice.task("own", 'date > "$LOCAL_DIR/own"')
    for _ in range(2):
        result = alice.headless()
        assert (result.code, result.err) == (0, ""), alice.log()
        assert support.owner(shared / "pg") == MALLORY
        assert support.owner(shared / "pg" / "all.sql") == MALLORY
        assert support.owner(shared / "own") == ALICE
        line, = [text for text in support.log_texts(alice.log())
                 if "left" in text]
        assert line == (f"left to the users of tasks: 2, the first of them "
                        f"{shared}/pg/all.sql")


def test_file_of_root_in_a_directory_of_the_task_user_is_chowned(
        alice, shared):
    alice.task("dump", "true", user=support.MALLORY)
    alice.task("own", 'date > "$LOCAL_DIR/pg/roots"')
    assert alice.headless().code == 0
    assert support.owner(shared / "pg" / "roots") == ALICE
    assert support.owner(shared / "pg") == MALLORY


def test_file_swapped_during_the_walk_is_not_chowned(tmp_path):
    """It was root's when its directory was read, and another user's when it
    is opened."""
    mission = support.load("mission")
    (tmp_path / "secret").write_text("secret")
    os.chown(tmp_path / "secret", MALLORY, MALLORY)
    os.chown(tmp_path, ALICE, ALICE)
    walk = mission.ChownWalk(ALICE, ALICE, kept={MALLORY})
    walk.device = tmp_path.stat().st_dev
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        walk.open_entry(fd, "secret", str(tmp_path))
    finally:
        os.close(fd)
    assert walk.left == [(f"{tmp_path}/secret", mission.KEPT)]
    assert support.owner(tmp_path / "secret") == MALLORY


def test_check_warns_of_files_of_other_users_in_a_committed_storage(
        alice, shared):
    support.own(shared, 0)
    support.init_repository(shared)
    support.own(shared, ALICE)
    alice.config["storage"]["local"]["commit"] = True
    alice.task("own", "true")
    assert_silent(alice.mission("check"))
    alice.task("dump", "true", user=support.MALLORY)
    result = alice.mission("check")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(
        "warning: storage.local.commit: chown skips the files of mallory, and "
        "git reads them as alice (use another storage for tasks with "
        "`user`)\n")

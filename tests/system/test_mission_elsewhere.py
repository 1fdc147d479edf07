"""mission on macOS and FreeBSD, which are simulated: simulated_machine.py."""

from __future__ import annotations

import pytest

import support
from support import ALICE, ALICE_UID

pytestmark = support.root_only


@pytest.fixture(params=["darwin", "freebsd14"])
def scratch(request, tmp_path):
    """A machine with alice, who has more groups than setgroups(2) takes."""
    scratch = support.Scratch(tmp_path, user=ALICE)
    scratch.open_to_others()
    host = scratch.host = support.Host(tmp_path / "host")
    host.setup += ["umount -l /proc", "mount -t tmpfs -o ro tmpfs /proc"]
    enter, cached = host.command, str(support.ROOT / "tests/cached.py")

    def command(words: list[str]) -> list[str]:
        at = words.index(cached)
        return enter([*words[:at], str(
            support.ROOT / "tests/simulated_machine.py"), request.param, "",
            *words[at + 1:]])
    host.command = command
    return scratch


def test_files_are_chowned_and_skipped_ones_are_listed_with_the_reason(
        scratch):
    store = scratch.storage("data", chown=True)
    scratch.task("it", f"cd {store}; echo 1 > plain; echo 2 > linked; "
                 "ln linked second; echo 3 > special; chmod 4755 special\n")
    done = scratch.mission("run")
    assert support.owner(store / "plain") == ALICE_UID
    assert support.owner(store / "special") == ALICE_UID
    assert support.mode(store / "special") == 0o755
    assert support.owner(store / "linked") == 0
    assert "hard links (this system has no O_PATH)" in done.out
    assert "changed without its setuid and setgid bits" in done.out


def test_task_and_commit_of_a_user_with_many_groups_succeed(scratch):
    store = scratch.storage("data", chown=True, commit=True)
    support.init_repository(store)
    support.own(store, ALICE_UID)
    scratch.task("it", f"id -u > {scratch.home}/uid; id -g >> "
                 f"{scratch.home}/uid; echo 1 > {store}/file\n",
                 user=ALICE)
    support.own(scratch.home, ALICE_UID)
    done = scratch.mission("run")
    assert done.code == 0, done
    assert (scratch.home / "uid").read_text().split() == [str(ALICE_UID)] * 2
    assert support.count_commits(store, uid=ALICE_UID) == 1

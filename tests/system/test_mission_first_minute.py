"""The README's quick start of mission works as typed, on every kind of
machine.

Its blocks are run literally by sh, without sudo, in an empty directory, with
nothing but the program and the base system on PATH.
"""

from __future__ import annotations

import json
import os
import re

import pytest

import support
from readme import commands

BLOCK = "\n".join(commands(*(
    f"Quick start: mission {number}" for number in (1, 2, 3)))).replace(
    "/srv/backup", "backup")
CONFIG = "backup/mission.config.json"


def type_block(host, tmp_path, **options) -> support.Result:
    """Type the README's block; the result of the whole."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "mission"
    program.write_text(
        f'#!/bin/sh\nexec "{support.PYTHON}" -IS '
        f'"{support.ROOT}/mission.py" "$@"\n')
    program.chmod(0o755)
    host.setup.append("mount -t tmpfs -o mode=755 tmpfs /var/lib")
    return host.run(
        ["env", "-i", f"PATH={bin_folder}:/usr/bin:/bin",
         *(f"{key}={value}" for key, value in options.pop(
             "variables", {}).items()), "sh", "-ec", BLOCK], **options)


def only_users(host, *names: str) -> None:
    """Let the host have only these ordinary users, besides the system's."""
    passwd = host.folder / "passwd"
    lines = passwd.read_text().splitlines()
    passwd.write_text("".join(
        line + "\n" for line in lines if not 1000 <= int(
            line.split(":")[2]) < 60000 or line.split(":")[0] in names))


def user_of(folder) -> str:
    text = (folder / CONFIG).read_text()
    return re.search(r'"user": \{ "name": "(.*?)"', text)[1]


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    for path in (tmp_path, folder):
        path.chmod(0o755)
    return folder


@pytest.mark.root_only
@pytest.mark.parametrize("users, variables, expected", [
    ((), {}, "root"),
    ((support.ALICE,), {}, support.ALICE),
    ((support.ALICE, support.MALLORY), {}, "root"),
    ((support.ALICE, support.MALLORY), {"SUDO_USER": support.MALLORY},
     support.MALLORY),
    ((support.ALICE,), {"SUDO_USER": "root"}, support.ALICE),
    ((support.ALICE,), {"SUDO_USER": "nobody-knows"}, support.ALICE),
])
def test_first_minute_of_root_works_as_typed(host, tmp_path, empty, users,
                                             variables, expected):
    only_users(host, *users)
    result = type_block(host, tmp_path, variables=variables, cwd=empty)
    assert (result.code, result.err) == (0, "")
    assert user_of(empty) == expected
    copied = empty / "backup/local/etc.tar.gz"
    assert support.owner(copied) == {
        "root": 0, support.ALICE: support.ALICE_UID,
        support.MALLORY: support.MALLORY_UID}[expected]
    noted = "because this host does not have exactly one" in result.out
    assert noted == (expected == "root")
    assert ("root will own all backups" in result.out) == noted
    assert support.owner(empty / "backup/tasks/etc/run") == 0


@pytest.mark.root_only
def test_first_minute_of_an_ordinary_user_works_as_typed(host, tmp_path,
                                                         empty):
    support.own(empty, support.ALICE_UID)
    result = type_block(
        host, tmp_path, user=support.ALICE, cwd=empty,
        variables={"HOME": str(host.home[support.ALICE]),
                   "SUDO_USER": support.MALLORY})
    assert (result.code, result.err) == (0, "")
    assert user_of(empty) == support.ALICE
    copied = empty / "backup/local/etc.tar.gz"
    assert support.owner(copied) == support.ALICE_UID


def test_new_requires_only_a_readable_configuration_and_task_directory(
        scratch):
    scratch.config.update(tasks=[], user={"name": "nouser"}, typo=1,
                          passBin="/srv/none")
    scratch.config["storage"]["sync"] = {"path": "/srv/none", "commit": True}
    result = scratch.mission("new", "etc")
    assert (result.code, result.err) == (0, "")
    line = json.loads(result.out.splitlines()[-1].rstrip(","))
    assert line["slug"] == "etc"
    assert os.access(scratch.tasks / "etc/run", os.X_OK)


def test_new_says_that_a_task_is_already_listed(scratch):
    scratch.entry("etc", "exec")
    result = scratch.mission("new", "etc")
    assert result.code == 0
    assert '"etc" is already listed in' in result.out
    assert "Add this line" not in result.out


@pytest.mark.root_only
def test_new_refuses_a_configuration_that_others_can_write(scratch):
    scratch.write()
    scratch.path.chmod(0o666)
    result = scratch.mission("new", "etc", write=False)
    assert result.code == 78 and not (scratch.tasks / "etc").exists()


def test_dry_run_marks_tasks_that_cannot_start(scratch):
    scratch.task("good", "echo good")
    scratch.entry("missing", "exec")
    result = scratch.mission("run", "--dry-run")
    lines = result.out.splitlines()
    place = next(number for number, line in enumerate(lines)
                 if "run the task missing" in line)
    assert "missing cannot start: " in lines[place + 1]
    assert lines[place + 1].endswith(
        f"does not exist (mission -c {scratch.path} new missing)")
    assert result.out.count("cannot start") == 1


def test_init_uses_an_existing_directory_and_refuses_a_file(scratch):
    config = scratch.folder / "new" / "m.json"
    config.parent.mkdir()
    (config.parent / "tasks").mkdir()
    (config.parent / "tasks" / "keep").write_text("x")
    (config.parent / "logs").write_text("a file")
    result = scratch.mission("-c", str(config), "init")
    assert result.code == 1 and f"{config.parent}/logs: Not a" in result.err
    assert (config.parent / "tasks" / "keep").read_text() == "x"

"""The first line of mission.py starts Python, apart from its caller's."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import support


@pytest.fixture
def installed(tmp_path):
    """mission as `make install` leaves it, in a directory with a blank."""
    folder = tmp_path / "local bin"
    folder.mkdir()
    program = folder / "mission"
    shutil.copy(support.ROOT / "mission.py", program)
    program.chmod(0o755)
    return program


def run(command: list[str], **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **env}, timeout=60,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True)


def test_mission_py_is_executable(installed):
    assert run([str(installed), "--version"]).stdout.startswith("mission ")
    link = installed.parent / "also"
    link.symlink_to(installed)
    assert run([str(link), "--version"]).stdout.startswith("mission ")


def test_arguments_reach_mission_unchanged(installed):
    result = run([str(installed), "run", "two  words", "$(id)", "*"])
    assert result.returncode == 2
    assert '"two  words"' in result.stderr


def test_the_launcher_returns_the_exit_status(installed):
    assert run([str(installed), "nonsense"]).returncode == 2
    missing = str(installed.parent / "none.json")
    assert run([str(installed), "-c", missing, "check"]).returncode == 78


def test_python_environment_of_the_caller_is_not_used(installed, tmp_path):
    canary = tmp_path / "canary"
    planted = tmp_path / "planted"
    planted.mkdir()
    for folder in (planted, installed.parent):
        for name in ("sitecustomize.py", "getopt.py", "fcntl.py"):
            (folder / name).write_text(
                f"open({str(canary)!r}, 'w').close()\n")
    run([str(installed), "--version"], PYTHONPATH=str(planted),
        PYTHONSTARTUP=str(planted / "getopt.py"))
    assert not canary.exists()


def test_start_leaves_no_compiled_file(installed):
    assert run([str(installed), "--version"]).returncode == 0
    assert [path.name for path in installed.parent.iterdir()] == ["mission"]


def test_changed_file_of_equal_size_and_time_is_executed(installed):
    """As `cp -p` and packages with SOURCE_DATE_EPOCH leave it."""
    before = run([str(installed), "--version"]).stdout
    status = installed.stat()
    text = installed.read_text(encoding="utf-8")
    number = before.split()[-1]
    other = number.translate(str.maketrans("0123456789", "9876543210"))
    installed.write_text(text.replace(f'"{number}"', f'"{other}"'),
                         encoding="utf-8")
    os.utime(installed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert installed.stat().st_size == status.st_size
    assert run([str(installed), "--version"]).stdout.split()[-1] == other


@support.root_only
def test_root_leaves_no_directory_that_others_can_write(installed, host,
                                                        tmp_path):
    """A cache of compiled code below /var/cache would be one of root's."""
    cache = tmp_path / "cache"
    cache.mkdir()
    host.bind(cache, "/var/cache")
    for umask in ("000", "002"):
        done = host.run(["sh", "-c", f"umask {umask}; exec \"$@\"", "sh",
                         str(installed), "--version"])
        assert done.code == 0, done
    assert list(cache.rglob("*")) == []


def test_first_line_is_followed_by_the_docstring():
    lines = (support.ROOT / "mission.py").read_text(
        encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/python3 -IS"
    assert lines[1].startswith('"""mission: ')

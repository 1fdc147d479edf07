"""The first line of mission.py starts Python, apart from its caller's."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import support


@pytest.fixture
def installed(tmp_path):
    """mission as `make install` leaves it, in a folder with a blank."""
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


def test_the_file_runs_as_it_is(installed):
    assert run([str(installed), "--version"]).stdout.startswith("mission ")
    link = installed.parent / "also"
    link.symlink_to(installed)
    assert run([str(link), "--version"]).stdout.startswith("mission ")


def test_words_reach_it_as_they_were_typed(installed):
    result = run([str(installed), "run", "two  words", "$(id)", "*"])
    assert result.returncode == 2
    assert '"two  words"' in result.stderr


def test_the_exit_status_is_missions(installed):
    assert run([str(installed), "nonsense"]).returncode == 2
    missing = str(installed.parent / "none.json")
    assert run([str(installed), "-c", missing, "check"]).returncode == 78


def test_nothing_of_the_callers_python_is_used(installed, tmp_path):
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


def test_first_line_is_followed_by_the_docstring():
    lines = (support.ROOT / "mission.py").read_text(
        encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/python3 -IS"
    assert lines[1].startswith('"""mission: ')

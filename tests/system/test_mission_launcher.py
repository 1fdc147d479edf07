"""The first lines of mission.py: sh starts Python, Python its cache."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import support

CACHE = "/var/cache/mission"


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


def private_cache(host: support.Host) -> None:
    """An empty /var/cache that the machine does not see."""
    host.setup.append("mount -t tmpfs -o mode=755 tmpfs /var/cache")


@support.root_only
def test_root_keeps_the_compiled_program_where_root_alone_writes(
        host, installed):
    private_cache(host)
    shell = (f"'{installed}' --version && find {CACHE} -name '*.pyc' "
             f"-exec stat -c '%u %a' {{}} + && find {CACHE} -type d "
             "-perm /022")
    result = host.run(["sh", "-c", shell])
    assert result.out.splitlines()[1:] == ["0 644"], result


@support.root_only
def test_a_changed_program_is_compiled_anew(host, installed):
    private_cache(host)
    shell = (f"'{installed}' --version && sed -i 's/^PROG, VERSION = .*/"
             f"PROG, VERSION = \"mission\", \"9.9\"/' '{installed}' && "
             f"touch -d '+5 seconds' '{installed}' && "
             f"'{installed}' --version")
    result = host.run(["sh", "-c", shell])
    assert result.out.splitlines()[-1] == "mission 9.9", result


@support.root_only
def test_a_user_can_neither_write_the_cache_nor_needs_it(host, installed):
    private_cache(host)
    for folder in list(installed.parents)[:3]:
        os.chmod(folder, 0o755)
    result = host.run([str(installed), "--version"], user=support.ALICE)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("mission ")

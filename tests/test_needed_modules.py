"""A Python without modules that the programs need, such as Debian's
python3-minimal: it is reported before anything runs."""

from __future__ import annotations

import subprocess

import pytest

import support

HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == {module!r} \\
    else find(name, *rest)
sys.builtin_module_names = set(sys.builtin_module_names) - {{{module!r}}}
"""
FIRST = {"koitab": ["daemon"], "mission": ["check"]}


@pytest.mark.parametrize("program, module", [
    (program, module) for program in FIRST
    for module in support.load(program).NEEDED_MODULES])
def test_a_missing_module_and_its_package_are_named(tmp_path, program,
                                                    module):
    done = subprocess.run(
        [*support.program(program, patch=HIDE.format(module=module)),
         *FIRST[program]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, timeout=60, cwd=str(tmp_path),
        env={"HOME": str(tmp_path), "KOI_HOME": str(tmp_path / "koi"),
             "PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines() == [
        f"{program}: error: {support.PYTHON} has no module "
        f"{module.strip('_')}", f"{program}: hint: apt-get install python3"]
    assert not (tmp_path / "koi").exists()


@pytest.mark.parametrize("program", FIRST)
def test_installed_python_has_all_required_modules(program):
    loaded = support.load(program)
    loaded.require_modules(loaded.NEEDED_MODULES)

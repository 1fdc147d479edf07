"""What every test run gets, whatever the caller's shell and TMPDIR are: a
scratch directory that every user can enter, and a clean environment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# All that the tests take over from the caller. Anything else can change what
# the programs under test do: KOI_HOME, GIT_DIR, TZ, LANG, http_proxy,
# BASH_ENV, PYTHONOPTIMIZE, PYTEST_ADDOPTS.
KEPT = ("PATH", "HOME", "STRICT", "GOLDEN")
KEPT_PREFIXES = ("TESTS_", "PYTEST_CURRENT_TEST")


def clean_environment() -> dict[str, str]:
    """Python takes UTF-8 where no locale is set."""
    return {name: value for name, value in os.environ.items()
            if name in KEPT or name.startswith(KEPT_PREFIXES)}


def is_shared(path) -> bool:
    """Can every user read this file, or enter this directory?"""
    path = Path(path)
    wanted = 0o005 if path.is_dir() or os.access(path, os.X_OK) else 0o004
    return path.stat().st_mode & wanted == wanted and all(
        parent.stat().st_mode & 0o001 for parent in path.parents)


def shared_temporary_directory() -> str:
    """Where programs can be executed, by every user: TMPDIR may be private
    (libpam-tmpdir) or mounted noexec."""
    for path in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if os.access(path, os.W_OK) and is_shared(path) \
                and not os.statvfs(path).f_flag & os.ST_NOEXEC:
            return path
    return tempfile.gettempdir()


def make_scratch_directory() -> Path:
    """Make one, of mode 0755."""
    path = Path(tempfile.mkdtemp(prefix="mission-tests-",
                                 dir=shared_temporary_directory()))
    path.chmod(0o755)
    return path

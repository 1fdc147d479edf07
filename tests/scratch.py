"""The scratch directory of a test run, which every user can enter."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def is_shared(path) -> bool:
    """Can every user read this file, or enter this directory?"""
    path = Path(path)
    wanted = 0o005 if path.is_dir() or os.access(path, os.X_OK) else 0o004
    return path.stat().st_mode & wanted == wanted and all(
        parent.stat().st_mode & 0o001 for parent in path.parents)


def make_scratch_directory() -> Path:
    """Make one, of mode 0755, where programs can be executed: TMPDIR may be
    private (libpam-tmpdir) or mounted noexec."""
    for parent in (tempfile.gettempdir(), "/var/tmp", "/tmp"):
        if is_shared(parent) and not os.statvfs(parent).f_flag & os.ST_NOEXEC:
            break
    path = Path(tempfile.mkdtemp(prefix="mission-tests-", dir=parent))
    path.chmod(0o755)
    return path

"""Fixtures, and the rule that a skipped test fails when STRICT=1."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import support  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "root_only: needs root (users, mounts)")
    if not config.option.basetemp:
        # A folder of our own: pytest's usual one is closed to other users
        # again by each session that starts beside this one.
        folder = tempfile.mkdtemp(prefix="mission-tests-")
        os.chmod(folder, 0o755)
        config.option.basetemp = os.path.join(folder, "tests")
        config.stash_of_ours = folder


def pytest_sessionfinish(session, exitstatus):
    folder = getattr(session.config, "stash_of_ours", None)
    if folder and exitstatus == 0:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if support.AS_ROOT:
        return
    root = [item for item in items if item.get_closest_marker("root_only")]
    if root:
        config.hook.pytest_deselected(items=root)
        items[:] = [item for item in items if item not in root]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and support.STRICT and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"STRICT=1: skipped: {report.longrepr}"


@pytest.fixture
def scratch(tmp_path):
    """A configuration run by this user, in a folder of its own."""
    tmp_path.chmod(0o755)
    return support.Scratch(tmp_path)


@pytest.fixture
def host(tmp_path):
    """Users alice and mallory in a mount namespace of the test's own."""
    support.need("unshare", "setpriv")
    # The namespace's users must be able to reach their homes.
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o011)
    return support.Host(tmp_path / "host")


@pytest.fixture
def alice(host, tmp_path):
    """Root runs mission for alice; her storages can be made below her home.

    The configuration, the tasks and the logs are root's.
    """
    scratch = support.Scratch(tmp_path / "root", user=support.ALICE)
    scratch.folder.chmod(0o755)
    scratch.host = host
    return scratch


@pytest.fixture
def koi(tmp_path):
    """A koid of this user's own; ended at the end, with its jobs."""
    tmp_path.chmod(0o755)
    koi = support.Koi(tmp_path)
    yield koi
    koi.stop(9)
    koi.end_jobs()

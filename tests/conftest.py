"""Fixtures, and the rule that a skipped test fails when STRICT=1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import support  # noqa: E402
from scratch import clean_environment  # noqa: E402
from scratch import shared_temporary_directory  # noqa: E402


REPORT = os.environ.get("TESTS_REPORT")     # where tests/run.py reads results


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "root_only: needs root (users, mounts)")
    os.umask(0o022)
    for name in set(os.environ) - set(clean_environment()):
        del os.environ[name]
    tempfile.tempdir = os.environ["TMPDIR"] = shared_temporary_directory()
    # nohup, or a shell that runs make in the background, ignores some; what
    # the tests start would inherit that.
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if not config.option.basetemp:
        # Not pytest's usual directory: each session closes that to other
        # users again.
        config.option.basetemp = str(support.SCRATCH / f"tests-{os.getpid()}")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0:
        shutil.rmtree(session.config.option.basetemp, ignore_errors=True)
        if not REPORT:
            shutil.rmtree(support.SCRATCH, ignore_errors=True)


def pytest_runtest_logreport(report):
    """One line of JSON for each test, when its outcome is known."""
    if REPORT and (report.failed or report.skipped or report.when == "call"):
        result = {"test": report.nodeid, "outcome": report.outcome}
        if report.skipped:
            result["reason"] = report.longrepr[2].replace("Skipped: ", "")
        with open(REPORT, "a", encoding="utf-8") as file:
            print(json.dumps(result), file=file)


def pytest_collection_modifyitems(config, items):
    """With STRICT=1 an ordinary user runs what an ordinary user can."""
    if support.AS_ROOT or not support.STRICT:
        return
    root = [item for item in items if item.get_closest_marker("root_only")]
    if root:
        config.hook.pytest_deselected(items=root)
        items[:] = [item for item in items if item not in root]


def pytest_runtest_setup(item):
    if item.get_closest_marker("root_only") and not support.AS_ROOT:
        pytest.skip("needs root")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and support.STRICT and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"STRICT=1: skipped: {report.longrepr}"


@pytest.fixture
def scratch(tmp_path):
    """A configuration run by this user, in its own directory."""
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


# --- The dashboard (dashboard_rig.py, which is imported where it is needed:
# --- it loads koitab.py)


@pytest.fixture
def small_ballast(monkeypatch):
    """A database does not begin with a reserve of megabytes."""
    monkeypatch.setattr(support.load("koitab"), "BALLAST", 65_536)


@pytest.fixture
def dashboard(tmp_path):
    """A dashboard in this process, under a fake clock."""
    import dashboard_rig
    dashboard = dashboard_rig.InProcessDashboard(tmp_path / "dashboard.db")
    yield dashboard
    dashboard.dashboard.close()


@pytest.fixture
def web1(dashboard):
    """A host of that dashboard: who a request with its token is from."""
    return dashboard.join()


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    """A process that the tests of a file share. The file's SERVER_OPTIONS
    are options of `koitab dashboard`."""
    import dashboard_rig
    with dashboard_rig.DashboardProcess(
            tmp_path_factory.mktemp("dashboard"),
            *getattr(request.module, "SERVER_OPTIONS", ())) as server:
        yield server
        server.assert_no_bugs()


@pytest.fixture(scope="module")
def web1_tab(request):
    """The tab of web1_host: the file's TAB."""
    return request.module.TAB


@pytest.fixture(scope="module")
def web1_host(server, web1_tab):
    """A koid, which is a member of the server's first dashboard with the
    fixture `operator`."""
    return server.add_host("web1", web1_tab)


@pytest.fixture(scope="module")
def operator(server, web1_host):
    return web1_host.create_dashboard(server)


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests of a file; koi.test leads to loopback, but
    is not a secure context."""
    import dashboard_rig
    with dashboard_rig.PageDriver() as browser:
        yield browser

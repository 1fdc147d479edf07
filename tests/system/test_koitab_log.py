"""koitab log -f: the output of a run as it comes."""

from __future__ import annotations

import signal
import subprocess

import pytest

TAB = """\
"it" @manual echo one; until test -e {0}/go; do sleep 0.01; done; \
printf two; echo error >&2; exit $(cat {0}/go)
KOI_OVERLAP=queue
"queue" @manual echo $KOI_RUN; until test -e {0}/go; do sleep 0.01; done
"""


@pytest.fixture
def serving(koi):
    """koid with TAB; `follow` starts a koitab log -f."""
    koi.set_constants(FOLLOW_PAUSE=0.01)
    koi.tab(TAB.format(koi.folder))
    koi.start()
    koi.follow_log = lambda *words: subprocess.Popen(
        koi.command("log", *words), env=koi.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    return koi


@pytest.mark.parametrize("status", [0, 3])
def test_log_follows_a_run_until_it_ends(serving, status):
    run = serving.launch("it")
    serving.running(run)
    with serving.follow_log("-f", "it") as log:
        assert log.stdout.readline() == b"one\n"
        assert log.poll() is None
        (serving.folder / "go").write_text(f"{status}")
        out, err = log.communicate(timeout=60)
    said = f"koitab: run {run}: exit {status}\n" if status else ""
    assert (out, err.decode()) == (b"two", "error\n" + said)
    assert log.returncode == 0
    again = serving.follow_log("--follow", str(run))    # it has ended
    assert again.communicate(timeout=60)[0] == b"one\ntwo"


def test_log_follows_a_queued_run(serving):
    first, second = serving.launch("queue"), serving.launch("queue")
    serving.running(first)
    with serving.follow_log("-f", str(second)) as log:
        (serving.folder / "go").touch()
        out, err = log.communicate(timeout=60)
    assert (out, err, log.returncode) == (b"%d\n" % second, b"", 0)


def test_log_follows_a_run_over_a_restart_of_koid(serving):
    run = serving.launch("it")
    serving.running(run)
    with serving.follow_log("-f", str(run)) as log:
        assert log.stdout.readline() == b"one\n"
        serving.stop(signal.SIGKILL)
        (serving.folder / "go").write_text("0")
        serving.start()
        assert log.communicate(timeout=60) == (b"two", b"error\n")
    assert log.returncode == 0


def test_interrupt_ends_the_log_and_not_the_run(serving):
    run = serving.launch("it")
    serving.running(run)
    with serving.follow_log("-f", "it") as log:
        assert log.stdout.readline() == b"one\n"
        log.send_signal(signal.SIGINT)
        assert log.wait(60) == 130
    (serving.folder / "go").write_text("0")
    assert serving.end_of(run)["exit"] == 0


def test_follow_and_json_are_refused(serving):
    with serving.follow_log("-f", "it", "--json") as log:
        out, err = log.communicate(timeout=60)
    assert (out, log.returncode) == (b"", 2)
    assert b"--follow cannot be combined with --json" in err

"""How koid runs a job: its environment, its records, and notifications.

Real jobs of a real koid. Where a test has to wait for a job, or a job for
the test, there is a fifo between them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import tempfile
from pathlib import Path

import pytest

import clockwork
import servers
import support
from support import ALICE, ALICE_UID, wait_until, wait_until_idle

koitab = support.load("koitab")
NOTE, STDOUT, STDERR, END = range(4)


# ==========================================================================
# Small words for the tests below
# ==========================================================================

def raw_tab(koi, text: str, user: str | None = None) -> None:
    """Write a tab unchanged; koi.tab removes the indentation."""
    koi.tab("", user).write_bytes(text.encode("utf-8", "surrogateescape"))


def serving(koi, text: str, *args, **env):
    """koid with this tab."""
    koi.tab(text)
    return koi.start(*args, **env)


def out_of(koi, job: str, **args: str) -> str:
    return koi.run(job, **args)[1].decode()


def follow(koi, job: str, **args: str) -> tuple:
    """Start a job: its number, and a connection that begins with frames."""
    run, connection, rest = koi.follow(job, **args)
    return run, Frames(connection, rest)


class Frames:
    """The frames that come out of a connection."""

    def __init__(self, connection, data: bytes):
        self.connection, self.data = connection, data
        self.close, self.send = connection.close, connection.send

    def read(self) -> bool:
        chunk = self.connection.recv(65_536)
        self.data += chunk
        return bool(chunk)

    def text(self, stream: int) -> bytes:
        return b"".join(part for number, _, part
                        in koitab.read_frames(self.data) if number == stream)

    def wait(self, text: bytes, stream: int = STDOUT) -> None:
        while text not in self.text(stream):
            assert self.read(), f"it ended without {text!r}: {self.data!r}"

    def end(self) -> dict:
        with self.connection:
            while self.read():
                pass
        return json.loads(self.text(END) or b"{}")


class Fifo:
    """A job that reads a line from it waits until it is asked to continue."""

    def __init__(self, path: Path):
        self.path = path
        self.wait = f"read x < {path}"
        self.renew()

    def renew(self) -> None:
        fresh = self.path.with_suffix(".new")
        os.mkfifo(fresh)
        fresh.rename(self.path)

    def go(self) -> None:
        """Blocks until the job has come so far. The next time it finds
        another fifo there, or it could come to this one while we have it
        open still, and be let through twice."""
        def opened():
            try:
                return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK) + 1
            except OSError:
                return 0
        fd = wait_until(opened, 30, "a job to come to the fifo") - 1
        self.renew()
        os.write(fd, b"go\n")
        os.close(fd)


@pytest.fixture
def clock(koi):
    """The clock of a koid that is started with `clock.start`."""
    return clockwork.StillClock(koi)


@pytest.fixture
def fifo(tmp_path):
    return Fifo(tmp_path / "fifo")


def streams(koi, run: int) -> tuple[bytes, bytes]:
    """What is kept of a run's stdout and of its stderr."""
    koi.ask("log", run=run)
    frames = koitab.read_frames(koi.output)
    return tuple(b"".join(part for number, _, part in frames
                          if number == stream)
                 for stream in (STDOUT, STDERR))


def short_of(run: dict) -> tuple:
    return run["trigger"], run["state"], run["exit"], run["signal"]


# ==========================================================================
# What a job gets: its environment
# ==========================================================================

ENVIRON = "cat /proc/$$/environ; :"     # as the shell was given it


def environment(output: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line
                in output.decode().split("\0") if line)


def from_host() -> set[str]:
    return set(koitab.Machine().host_environment()) - {"SHELL", "PATH"}


def test_job_has_the_environment_of_cron_and_nothing_of_koid(koi):
    serving(koi, f'"env" @manual {ENVIRON}\n', LANG="xx_XX", SECRET="of koid",
            PYTHONPATH="/tmp", LD_LIBRARY_PATH="/nowhere", TZ="UTC",
            SHELL="/bin/false", LOGNAME="nobody", MAILTO="koid@koi.invalid")
    run, out, _, _ = koi.run("env")
    found = environment(out)
    for name in from_host() - {"SHELL", "PATH", "HOME", "LOGNAME", "USER"}:
        found.pop(name)
    account = koitab.Machine().account(koi.user)
    assert found == {
        "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "HOME": account.home,
        "LOGNAME": koi.user, "USER": koi.user, "KOI_RUN": str(run)}


def test_tab_sets_every_variable_except_the_user_name(koi, tmp_path):
    support.need_zone("Europe/Berlin")
    serving(koi, f'''\
        SHELL=/bin/bash
        HOME={tmp_path}
        PATH = "/opt/bin:/bin"
        LOGNAME=mallory
        USER=mallory
        MAILTO=""
        CONTENT_TYPE=text/html
        CRON_TZ=Europe/Berlin
        'QUOTED' = ' a  b '
        FOO=$BAR # all of it
        "env" @manual {ENVIRON}
        FOO=for those below
        ''')
    found = environment(koi.run("env")[1])
    assert (found.pop("LOGNAME"), found.pop("USER")) == (koi.user, koi.user)
    for name in {"KOI_RUN"} | from_host() - {"SHELL", "HOME", "PATH"}:
        found.pop(name)
    assert found == {
        "SHELL": "/bin/bash", "HOME": str(tmp_path), "PATH": "/opt/bin:/bin",
        "MAILTO": "", "CONTENT_TYPE": "text/html", "QUOTED": " a  b ",
        "CRON_TZ": "Europe/Berlin", "FOO": "$BAR # all of it"}


@support.root_only
def test_job_gets_the_login_environment_of_the_host(koi, host, tmp_path):
    """/etc/environment and /etc/default/locale, as by cron's PAM module."""
    etc = copy_of_etc(host, tmp_path)
    (etc / "environment").write_text(
        'PATH="/from/host"\n# a comment\nexport HTTP_PROXY=http://proxy\n'
        "HOME=/from/host\nLOGNAME=host\nLANG=overruled\nQ='x y'\nno sense\n"
        "1BAD=name\n")
    (etc / "default").mkdir()
    (etc / "default/locale").write_text('LANG="de_DE.UTF-8"\nLC_ALL=C\n')
    koi.host = host
    koi.tab(f'LC_ALL=POSIX\n"hers" @manual {ENVIRON}\n', user=ALICE)
    serving(koi, f'LC_ALL=POSIX\n"his" @manual {ENVIRON}\n')
    for job, user, home in (("his", "root", "/root"),
                            ("hers", ALICE, str(host.home[ALICE]))):
        found = environment(koi.run(job, user=user)[1])
        found.pop("KOI_RUN")
        assert found == {
            "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "HOME": home,
            "LOGNAME": user, "USER": user, "LANG": "de_DE.UTF-8",
            "LC_ALL": "POSIX", "HTTP_PROXY": "http://proxy", "Q": "x y"}


# ==========================================================================
# What a job gets: its input
# ==========================================================================

INPUTS = [
    ("cat", ""),
    ("cat%", ""),
    ("cat%one", "one\n"),
    ("cat%one%two", "one\ntwo\n"),
    ("cat%one%%", "one\n\n"),
    (r"cat%5\% of \it", "5% of \\it\n"),
    (r"echo 5\%; cat", "5%\n"),
    (r"echo 5\%; cat%6\%", "5%\n6%\n"),
    ('echo "a; cat%b" is cut', None),       # quotes do not protect a %
]


def test_percent_ends_the_command_and_begins_its_standard_input(koi):
    raw_tab(koi, "".join(f'"n{number}" @manual {command}\n' for number,
                         (command, _) in enumerate(INPUTS)))
    koi.start()
    for number, (_, expected) in enumerate(INPUTS):
        _, out, err, end = koi.run(f"n{number}")
        if expected is None:
            assert end["exit"] == 2 and err
        else:
            assert (out.decode(), end["exit"]) == (expected, 0)


def test_large_standard_input_arrives_completely_and_may_be_ignored(koi):
    """More than fits into a pipe."""
    lines = [f"{number:09}" for number in range(10_000)]
    raw_tab(koi, f'"sum" @manual sha256sum%{"%".join(lines)}\n'
            f'"deaf" @manual echo well%{"%".join(lines)}\n')
    koi.start()
    expected = hashlib.sha256(("\n".join(lines) + "\n").encode()).hexdigest()
    assert out_of(koi, "sum").split()[0] == expected
    assert out_of(koi, "deaf") == "well\n"


# ==========================================================================
# What a job gets: its place
# ==========================================================================

def test_job_starts_in_its_home_directory(koi, tmp_path):
    serving(koi, f'''\
        "usual" @manual pwd
        HOME={tmp_path}
        "other" @manual pwd
        ''')
    home = os.path.realpath(koitab.Machine().account(koi.user).home)
    # The home of nobody is /nonexistent, and is not there.
    assert out_of(koi, "usual").strip() == (home if os.path.isdir(home)
                                            else "/")
    assert out_of(koi, "other") == f"{tmp_path}\n"


@pytest.mark.parametrize("home", ["/nowhere/at/all", "/etc/passwd", "''"])
def test_job_without_its_home_starts_in_the_root_directory_with_a_note(
        koi, home):
    serving(koi, f'HOME={home}\n"pwd" @manual pwd; echo "$HOME"\n')
    run, out, _, end = koi.run("pwd")
    home = home.strip("'")
    assert out.decode() == f"/\n{home}\n" and end["exit"] == 0
    text = koi.text_of(run)
    assert f"[koi: {home}: " in text and "the job runs in /]" in text


@support.root_only
def test_job_does_not_start_in_a_home_that_its_user_cannot_enter(
        koi, host, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    koi.host = host
    koi.tab(f'HOME={closed}\n"pwd" @manual pwd; id -un; id -Gn\n', user=ALICE)
    koi.start()
    run, out, _, _ = koi.run("pwd", user=ALICE)
    assert out.decode() == f"/\n{ALICE}\n{ALICE}\n"
    assert "Permission denied; the job runs in /" in koi.text_of(run)


ABOUT = """umask; nice; cut -d' ' -f1,5-7 /proc/$$/stat;
awk '/^Sig(Blk|Ign|Cgt)/ {print $1, $2}' /proc/self/status;
(: < /dev/tty) 2> /dev/null && echo a tty; ls /proc/$$/fd"""

NONE = "0" * 16
GLIBCS = "0000000180000000"     # 32 and 33: posix_spawn ignores its own two

BADLY = """
import os, signal, sys
os.umask(0o077)
signal.pthread_sigmask(signal.SIG_BLOCK, {10, 12, 15, 17, 34})
for number in (1, 2, 3, 10, 13, 20, 25, 34, 64):
    signal.signal(number, signal.SIG_IGN)
os.dup2(os.open("/etc/passwd", os.O_RDONLY), 7)
os.set_inheritable(7, True)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_job_inherits_no_process_state_from_koid(koi):
    """A umask, its own session and group, no terminal, three
    descriptors, no signal blocked or ignored."""
    command = ABOUT.replace("\n", " ")
    raw_tab(koi, f'"about" @manual {command}\nSHELL={koi.python}\n"mask" '
            "@manual import signal; print(signal.pthread_sigmask(0, []))\n")
    koi.start(wrap=(koi.python, "-c", BADLY))
    umask, nice, ids, blocked, ignored, caught, *files = out_of(
        koi, "about").splitlines()
    assert umask == "0022" and nice == str(os.nice(0))
    pid, group, session, terminal = ids.split()
    assert pid == group == session and terminal == "0"
    assert (blocked, caught) == ("SigBlk: " + NONE, "SigCgt: " + NONE)
    assert ignored in ("SigIgn: " + NONE, "SigIgn: " + GLIBCS)
    assert files == ["0", "1", "2"]
    assert out_of(koi, "mask") == "set()\n"    # dash would have emptied it


def test_jobs_started_together_do_not_share_output_session_or_descriptors(koi):
    """Forty jobs in one instant: each has its own output, session and
    descriptors."""
    raw_tab(koi, "".join(
        f'"n{number}" @reboot echo out {number}; ls /proc/$$/fd; echo err '
        f"{number} >&2; cut -d' ' -f1,6 /proc/$$/stat\n"
        for number in range(40)))
    koi.start()
    runs = koi.ended(count=40, seconds=60)
    assert [run["exit"] for run in runs] == [0] * 40
    for run in runs:
        out, err = streams(koi, run["run"])
        number = run["name"][1:]
        assert err.decode() == f"err {number}\n"
        first, *files, ids = out.decode().splitlines()
        assert (first, files) == (f"out {number}", ["0", "1", "2"])
        pid, session = ids.split()
        assert pid == session


# ==========================================================================
# How a job ends
# ==========================================================================

ENDS = [("exit 0", 0, None), ("exit 7", 7, None), ("exit 255", 255, None),
        ("no-such-program", 127, None), ("kill -TERM $$", None, 15),
        ("kill -KILL $$", None, 9), ("ulimit -c 0; kill -SEGV $$", None, 11),
        ("sh -c 'kill -9 $$'", 137, None), ("if", 2, None)]


def test_exit_status_or_signal_of_a_job_is_stored(koi):
    koi.tab("".join(f'"n{number}" @manual {command}\n' for number,
                    (command, _, _) in enumerate(ENDS)))
    koi.start()
    for number, (_, code, sign) in enumerate(ENDS):
        run, _, _, end = koi.run(f"n{number}")
        assert (end["exit"], end["signal"]) == (code, sign)
        kept = koi.end_of(run)
        assert short_of(kept) == ("manual", "done", code, sign)
        assert kept["requested_at"] <= kept["started"] <= kept["ended"] + 0.01


@pytest.mark.parametrize("shell, reason", [
    ("/no/such/shell", "No such file or directory"),
    ("/etc", "Permission denied"), ("/etc/passwd", "Permission denied"),
    ("bash", "No such file or directory")])
def test_job_whose_shell_cannot_be_started_is_unstartable(koi, shell, reason):
    serving(koi, f'SHELL={shell}\n"it" @manual echo no\nSHELL=/bin/sh\n'
            '"next" @manual echo yes\n')
    run, out, _, end = koi.run("it")
    assert not out and end["exit"] is None and end["signal"] is None
    kept = koi.end_of(run)
    assert kept["state"] == "unstartable" and kept["started"] is None
    assert f"{shell}: {reason}" in kept["reason"]
    assert koi.run("next")[1] == b"yes\n"


@support.root_only
def test_job_of_a_missing_user_is_unstartable(koi):
    koi.tab('"it" @reboot echo no\n', user="nobody-of-that-name")
    serving(koi, '"next" @manual echo yes\n')
    run, = koi.ended("it", user="nobody-of-that-name")
    assert run["state"] == "unstartable"
    assert run["reason"] == "user nobody-of-that-name does not exist"
    assert koi.run("next")[1] == b"yes\n"


# ==========================================================================
# What a job writes
# ==========================================================================

def test_both_streams_are_kept_apart_and_in_order(koi, fifo):
    serving(koi, f'"it" @manual for n in 1 2 3; do echo out $n; {fifo.wait};'
            f' echo err $n >&2; {fifo.wait}; done\n')
    run, frames = follow(koi, "it")
    for number in (1, 2, 3):
        frames.wait(b"out %d\n" % number)
        fifo.go()
        frames.wait(b"err %d\n" % number, STDERR)
        fifo.go()
    assert frames.end()["exit"] == 0
    koi.end_of(run)
    koi.ask("log", run=run)
    kept = koitab.read_frames(koi.output)
    expected = [(stream, f"{name} {number}\n".encode()) for number in
                (1, 2, 3) for stream, name in ((STDOUT, "out"),
                                               (STDERR, "err"))]
    assert [(stream, part) for stream, _, part in kept] == expected
    assert [part for stream, _, part in koitab.read_frames(frames.data)
            if stream != END] == [part for _, part in expected]
    times = [milliseconds for _, milliseconds, _ in kept]
    assert times == sorted(times)


def test_output_can_be_read_while_it_is_written(koi, fifo):
    serving(koi, f'"it" @manual printf begun; {fifo.wait}; echo " done"\n')
    run = koi.launch("it")
    wait_until(lambda: koi.text_of(run) == "begun", 30, "the beginning")
    assert koi.row(run)["state"] == "running"
    fifo.go()
    koi.end_of(run)
    assert koi.text_of(run) == "begun done\n"


def test_output_bytes_are_stored_unchanged(koi, tmp_path):
    """All bytes, no newline at the end, lines of 64 KB and of 1 KB less."""
    data = bytes(range(256)) * 100 + b"".join(
        bytes([65 + number]) * (65_536 - number) + b"\n"
        for number in range(10)) + b"\xff\xfe no newline"
    (tmp_path / "data").write_bytes(data)
    serving(koi, f'"it" @manual cat {tmp_path}/data\n')
    run, out, _, _ = koi.run("it")
    assert out == data
    kept = koi.end_of(run)
    assert (kept["bytes"], kept["cut"]) == (len(data), False)
    koi.ask("log", run=run)
    assert koitab.output_text(koi.output) == data


def test_head_and_tail_of_a_large_output_are_kept(koi):
    serving(koi, '"it" @manual seq 1 500000\n')
    run, out, _, _ = koi.run("it")
    whole = "".join(f"{number}\n" for number in range(1, 500_001))
    assert out.decode() == whole            # who watches misses nothing
    kept = koi.end_of(run)
    assert (kept["bytes"], kept["cut"]) == (len(whole), True)
    assert (kept["exit"], kept["signal"]) == (0, None)
    head, _, rest = koi.text_of(run).partition("[koi: ")
    lost, _, tail = rest.partition(" bytes left out here]\n")
    assert whole.startswith(head) and whole.endswith(tail)
    assert len(head) + int(lost.replace(",", "")) + len(tail) == len(whole)
    assert 500_000 < len(head) < 2**19 and 2**18 < len(tail) < 2**19


def test_huge_output_neither_ends_the_job_nor_fills_the_memory(koi, fifo):
    size = 200_000_000 if support.FULL else 50_000_000
    koi.installed = True
    serving(koi, f'"it" @manual head -c {size} /dev/zero; echo; echo end; '
            f'{fifo.wait}\n')
    run = koi.launch("it")
    supervisor = koi.running(run).supervisor
    wait_until(lambda: koi.header(run).total == size + 5, 120, "the end")
    status = Path(f"/proc/{supervisor}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0])
    assert streams(koi, run)[0].endswith(b"\0\nend\n")
    file = koi.home / "runs" / str(run)
    assert file.stat().st_size <= 2**20 + 256
    fifo.go()
    kept = koi.end_of(run)
    assert (kept["exit"], kept["bytes"], kept["cut"]) == (0, size + 5, True)
    assert peak < 32 * 1024, f"{peak} kB"


def test_fast_output_can_be_read_while_it_is_written(koi):
    """Its file is overwritten while we read it: what we are given must
    still be frames, and nothing else in them than it wrote."""
    serving(koi, '"it" @manual yes 0123456789\n')
    run = koi.launch("it")
    koi.running(run)
    wait_until(lambda: koi.header(run).lost, 30, "the cut")
    for _ in range(150 if support.FULL else 40):
        reply = koi.ask("log", run=run)
        frames = koitab.read_frames(koi.output)
        assert sum(9 + len(part) for _, _, part in frames) == reply["size"]
        assert {stream for stream, _, _ in frames} == {NOTE, STDOUT}
        text = b"".join(part for stream, _, part in frames
                        if stream == STDOUT)
        assert not text.strip(b"0123456789\n")
        assert len(text) > 500_000
    koi.ask("kill", run=run)


def test_process_left_by_a_job_survives_and_does_not_keep_the_run_active(
        koi, fifo, tmp_path):
    """It can write more than the 64 KB of the pipe, which has no reader, and
    is not killed."""
    koi.set_constants(LINGER=0.1)
    serving(koi, f'"it" @manual (trap "" HUP; {fifo.wait}; head -c 300000 '
            f'/dev/zero; echo $? > {tmp_path}/left) & echo done\n')
    run, out, _, end = koi.run("it")
    assert out == b"done\n" and end["exit"] == 0
    kept = koi.end_of(run)
    assert (kept["state"], kept["bytes"]) == ("done", 5)
    assert "a process that it left behind keeps its output open" \
        in koi.text_of(run)
    assert koi.ask("status")["running"] == []
    fifo.go()
    wait_until((tmp_path / "left").exists, 30, "the process left behind")
    wait_until((tmp_path / "left").read_text, 30, "its status")
    assert (tmp_path / "left").read_text() == "0\n"
    assert koi.row(run) == kept


def test_output_just_after_the_end_of_a_job_is_kept(koi):
    koi.set_constants(LINGER=30.0)     # it is late however slow the machine is
    serving(koi, '"it" @manual (sleep 0.2; echo late) & echo done\n')
    run, out, _, _ = koi.run("it")
    assert out == b"done\nlate\n" and koi.text_of(run) == "done\nlate\n"


def test_job_that_closes_its_output_continues_and_costs_no_cpu_time(koi, fifo):
    serving(koi, f'"it" @manual exec >&- 2>&-; {fifo.wait}; exit 5\n')
    run, frames = follow(koi, "it")
    header = koi.running(run)
    wait_until(lambda: not os.path.exists(f"/proc/{header.job}/fd/1"), 30,
               "the output to be closed")
    wait_until_idle(header.supervisor)
    assert koi.row(run)["state"] == "running"
    fifo.go()
    assert frames.end()["exit"] == 5
    assert koi.end_of(run)["exit"] == 5 and koi.text_of(run) == ""


# ==========================================================================
# What the KOI_ settings do
# ==========================================================================

def test_job_over_its_time_limit_gets_sigterm_and_then_sigkill(koi):
    """TERM goes to all of its group; KILL comes a little later."""
    koi.set_constants(KILL_AFTER=1.0)
    serving(koi, """\
        KOI_TIMEOUT=1s
        "good" @manual trap 'echo bye; exit 3' TERM; sleep 60 & wait
        "plain" @manual sleep 60
        "deaf" @manual trap '' TERM; echo deaf; while :; do sleep 1; done
        KOI_TIMEOUT=1m
        "quick" @manual echo quick
        KOI_TIMEOUT=0s
        "free" @manual sleep 1.5; echo free
        """)
    runs = {name: koi.launch(name) for name in
            ("good", "plain", "deaf", "quick", "free")}
    found = {name: koi.end_of(run) for name, run in runs.items()}
    assert {name: (run["exit"], run["signal"], run["reason"])
            for name, run in found.items()} == {
        "good": (3, None, "timeout after 1s"),
        "plain": (None, 15, "timeout after 1s"),
        "deaf": (None, 9, "timeout after 1s"),
        "quick": (0, None, ""), "free": (0, None, "")}
    assert koi.text_of(runs["good"]) == "bye\n"
    # `started` may be noted late: the clock for the limit runs before it.
    assert found["plain"]["ended"] - found["plain"]["started"] >= 0.5
    assert found["deaf"]["ended"] - found["deaf"]["started"] >= 1.5


def test_runs_of_a_job_may_overlap(koi, tmp_path):
    fifos = [Fifo(tmp_path / name) for name in ("one", "two")]
    serving(koi, '"it" @manual echo on; read x < {{Fifo}}\n')
    both = [follow(koi, "it", Fifo=str(fifo.path))[1] for fifo in fifos]
    for frames in both:
        frames.wait(b"on")
    assert len(koi.ask("status")["running"]) == 2
    job, = koi.ask("jobs")["jobs"]
    assert job["running"] == 2
    for fifo, frames in zip(fifos, both):
        fifo.go()
        assert frames.end()["exit"] == 0


def test_run_is_skipped_while_the_previous_one_is_running(koi, fifo):
    serving(koi, f'KOI_OVERLAP=skip\n"it" @manual echo on; {fifo.wait}\n'
            f'"other" @manual echo other\n')
    run = koi.launch("it")
    koi.running(run)
    with pytest.raises(koitab.Error, match="still running"):
        koi.run("it")
    assert out_of(koi, "other") == "other\n"
    skipped = koi.history(job="it")[0]
    assert skipped["run"] > run and skipped["state"] == "skipped"
    assert skipped["reason"] == "the previous run was still running"
    assert skipped["started"] is None
    fifo.go()
    assert koi.end_of(run)["exit"] == 0
    second = koi.launch("it")
    fifo.go()
    assert koi.end_of(second)["exit"] == 0


def test_queued_runs_start_one_after_another(koi, fifo):
    serving(koi, f'KOI_OVERLAP=queue\n"it" @manual echo {{{{N}}}}; '
            f'{fifo.wait}\n')
    runs = [follow(koi, "it", N=str(number)) for number in range(3)]
    states = [run["state"] for run in reversed(koi.history())]
    assert states == ["running", "queued", "queued"]
    for number, (run, frames) in enumerate(runs):
        frames.wait(b"%d\n" % number)
        assert [each["run"] for each in koi.ask("status")["running"]] == [run]
        fifo.go()
        assert frames.end()["exit"] == 0
    found = koi.ended(count=3)
    for later, earlier in zip(found, found[1:]):
        assert later["started"] >= earlier["ended"]


def test_run_replaces_the_previous_one(koi):
    serving(koi, 'KOI_OVERLAP=replace\n"it" @manual echo on; exec sleep '
            '{{For}}\n')
    first, frames = follow(koi, "it", For="60")
    frames.wait(b"on")
    second, _, _, end = koi.run("it", For="0")
    assert end["exit"] == 0
    assert (koi.row(first)["signal"], koi.row(first)["reason"]) == (
        15, "replaced by the next run")
    assert koi.row(second)["started"] >= koi.row(first)["ended"]


def test_failed_job_is_retried(koi, tmp_path):
    koi.set_constants(RETRY_FIRST=0.2)
    count = f"echo >> {tmp_path}/$1; [ $(wc -l < {tmp_path}/$1) -ge"
    (tmp_path / "try").write_text(f"{count} $2 ]\n")
    serving(koi, f"""\
        KOI_RETRY=2
        "never" @manual sh {tmp_path}/try never 9
        "second" @manual sh {tmp_path}/try second {{{{N, int}}}}
        "first" @manual sh {tmp_path}/try first 1
        "killed" @manual kill -9 $$
        KOI_RETRY=0
        "once" @manual sh {tmp_path}/try once 9
        """)
    for name in ("never", "first", "killed", "once"):
        koi.run(name)
    koi.run("second", N="2")

    def tries(name):
        return [(run["attempt"], *short_of(run)) for run
                in reversed(koi.history(job=name))]
    koi.ended("never", 3), koi.ended("killed", 3), koi.ended("second", 2)
    assert tries("never") == [
        (1, "manual", "done", 1, None), (2, "retry", "done", 1, None),
        (3, "retry", "done", 1, None)]
    assert tries("second") == [
        (1, "manual", "done", 1, None), (2, "retry", "done", 0, None)]
    assert koi.history(job="second")[0]["args"] == {"N": "2"}
    assert tries("first") == [(1, "manual", "done", 0, None)]
    assert tries("once") == [(1, "manual", "done", 1, None)]
    assert [each[-1] for each in tries("killed")] == [9, 9, 9]
    gaps = [later["started"] - earlier["ended"] for later, earlier in zip(
        koi.history(job="never"), koi.history(job="never")[1:])]
    assert gaps[1] >= 0.2 and gaps[0] >= 0.4, "twice as long each time"
    assert len(koi.history()) == 10


def test_killed_run_is_not_retried(koi, clock):
    koi.tab('KOI_RETRY=3\n"it" @manual exec sleep 60\n')
    clock.start(EDGE)
    run = koi.launch("it")
    koi.running(run)
    koi.ask("kill", run=run)
    assert koi.end_of(run)["signal"] == 15
    clock.elapse(koitab.RETRY_LONGEST)
    clock.seen()
    assert len(koi.history()) == 1


def test_retry_of_a_job_gets_its_secret_again(koi):
    koi.set_constants(RETRY_FIRST=0.05)
    serving(koi, 'KOI_RETRY=1\n"it" @manual echo {{Key, secret}} | wc -c; '
            'false\n')
    koi.run("it", Key="hunter2")
    for run in koi.ended(count=2):
        assert koi.text_of(run["run"]) == "8\n"
        assert run["args"] == {"Key": "******"}


def rows(koi, table: str) -> list:
    with contextlib.closing(sqlite3.connect(koi.home / "history.db")) as db:
        return [row[0] for row in db.execute(f"select * from {table}")]


def test_job_keeps_as_many_runs_as_koi_keep(koi):
    serving(koi, 'KOI_KEEP=3\n"it" @manual echo it\nKOI_KEEP=1\n'
            '"one" @manual echo one\n')
    runs = [koi.launch("it") for _ in range(6)]
    koi.run("one")
    last = koi.run("one")[0]
    for run in (*runs[-3:], last):      # they run side by side
        koi.end_of(run)
    wait_until(lambda: rows(koi, "runs") == [*runs[-3:], last], 10, "old runs"
               " to be forgotten")
    assert rows(koi, "output") == [*runs[-3:], last]
    assert not list((koi.home / "runs").iterdir())
    with pytest.raises(koitab.Error, match="no run"):
        koi.ask("log", run=runs[0])


def test_runs_that_never_began_count_for_koi_keep(koi, fifo):
    """A job that hangs, with KOI_OVERLAP=skip, must not fill the disk."""
    serving(koi, f'KOI_KEEP=3\nKOI_OVERLAP=skip\n"it" @manual {fifo.wait}\n')
    run = koi.launch("it")
    koi.running(run)
    for _ in range(10):
        with pytest.raises(koitab.Error):
            koi.run("it")
    assert rows(koi, "runs")[0] == run
    assert len(rows(koi, "runs")) <= 4
    fifo.go()


HOUR = 3600
EDGE = 1795343400       # 2026-11-22 10:30:00 UTC


def test_missed_starts_are_recorded_and_caught_up_once_with_koi_catchup(
        koi, clock):
    tab = """\
        "hourly" 59 * * * * echo hourly
        KOI_CATCHUP=yes
        "wanted" 59 * * * * echo wanted
        "daily" 59 23 * * * echo daily
        "asked" @manual echo asked
        """
    koi.tab(tab)
    clock.start(EDGE)
    koi.stop()
    koi.tab(tab + '        "new" 59 * * * * echo new\n')
    clock.start(EDGE + 48 * HOUR)
    wait_until(lambda: {run["state"] for run in koi.history()}
               == {"missed", "done"}, 30, "the catching up")
    found = {(run["name"], run["trigger"]): run for run in koi.history()}
    assert {key: (run["state"], run["count"])
            for key, run in found.items()} == {
        ("hourly", "schedule"): ("missed", 48),
        ("wanted", "schedule"): ("missed", 48),
        ("daily", "schedule"): ("missed", 2),
        ("wanted", "catch-up"): ("done", 1),
        ("daily", "catch-up"): ("done", 1)}
    missed = found["hourly", "schedule"]
    assert missed["reason"] == "koid was not running"
    assert missed["due"] == EDGE + 29 * 60
    before = koi.history()
    koi.stop()
    clock.start(EDGE + 48 * HOUR)
    assert koi.history() == before      # it is logged once


def test_reboot_jobs_run_once_after_each_boot(koi):
    tab = '"boot" @reboot echo up\n"other" @manual echo other\n'
    serving(koi, tab)
    assert short_of(*koi.ended("boot")) == ("reboot", "done", 0, None)
    koi.stop()
    serving(koi, tab + '"more" @reboot echo too late\n')
    koi.stop(signal.SIGKILL)
    koi.start()
    koi.run("other")                    # by then they would have begun
    assert [run["name"] for run in koi.history()] == ["other", "boot"]
    koi.stop()
    koi.meta(boot="another")
    koi.start()
    koi.ended("more")
    assert sorted(run["name"] for run in koi.ended(count=4)) == [
        "boot", "boot", "more", "other"]


def test_run_that_starts_too_late_is_recorded_as_late(koi, clock, fifo):
    koi.tab(f"""\
        KOI_OVERLAP=queue
        "patient" @manual {fifo.wait}
        KOI_START_WITHIN=1s
        "it" @manual {fifo.wait}
        """)
    clock.start(EDGE)
    first, second = koi.launch("it"), koi.launch("it")
    koi.running(first)
    clock.elapse(1)
    assert koi.ask("status")["late"] == []
    clock.elapse(0.5)
    assert koi.ask("status")["late"] == ["it"]
    fifo.go()
    koi.running(second)
    assert koi.row(second)["reason"].startswith("late by ")
    assert koi.ask("status")["late"] == []
    fifo.go()
    assert koi.end_of(second)["reason"].startswith("late by ")
    assert koi.row(first)["reason"] == ""


def test_due_jobs_start_at_the_minute_and_delayed_ones_wait(koi, clock):
    """And nothing else starts."""
    support.need_zone("Asia/Kabul")
    tab = """\
        "every" * * * * * echo every
        "now" 30 10 * * * echo now
        CRON_TZ=Asia/Kabul
        "Kabul" 0 15 * * * echo Kabul
        "later" 31 10 * * * echo later
        CRON_TZ=""
        "asked" @manual echo asked
        RANDOM_DELAY=1440
        "delayed" 30 10 * * * echo delayed
        """
    koi.tab(tab)
    clock.start(EDGE - 3)
    clock.elapse(2.99)
    clock.seen()
    assert koi.history() == []
    clock.elapse_to(EDGE)
    koi.ended(count=3)
    found = {run["name"]: run for run in koi.history()}
    assert {name: (run["trigger"], run["state"], run["due"])
            for name, run in found.items()} == {
        "every": ("schedule", "done", EDGE), "now": ("schedule", "done", EDGE),
        "Kabul": ("schedule", "done", EDGE),
        "delayed": ("schedule", "queued", EDGE)}
    assert {run["requested_at"] for run in found.values()} == {EDGE}
    jobs = {job["name"]: job["next"] for job in koi.ask("jobs")["jobs"]}
    assert jobs["every"] == EDGE + 60 and jobs["asked"] is None
    delay = jobs["delayed"] - EDGE - 86400
    assert 0 < delay < 1440 * 60 and delay % 60 == 0
    koi.stop()
    clock.start(EDGE)           # a restart does not end the delay
    koi.run("asked")
    assert koi.history(job="delayed")[0]["state"] == "queued"
    koi.ask("kill", run=found["delayed"]["run"])
    killed = koi.history(job="delayed")[0]
    assert (killed["state"], killed["reason"]) == (
        "skipped", f"killed by {koi.user}")


# ==========================================================================
# Secrets
# ==========================================================================

SECRET = "hunter2-Zw%9"


def in_files(koi, text: str) -> list[str]:
    """The files of koid that contain this text."""
    return [str(path) for path in [*koi.home.rglob("*"), koi.said]
            if path.is_file() and text.encode() in path.read_bytes()]


def test_secret_argument_is_visible_only_to_the_job(koi, fifo, tmp_path):
    """Not by its output, in either stream, whole or in pieces; not by the
    history, the files, or the list of processes."""
    half = len(SECRET) // 2
    serving(koi, f'''\
        "it" @manual printf %s {{{{Key, secret}}}} > {tmp_path}/given; echo \
it is {{{{Key}}}}.; echo {{{{Key}}}} >&2; cut -c1-{half} {tmp_path}/given | \
tr -d '\\n'; {fifo.wait}; cut -c{half + 1}- {tmp_path}/given; printf end
        '''.replace("%s", r"\%s"))
    run, frames = follow(koi, "it", Key=SECRET)
    frames.wait(b"it is ******.\n")
    frames.wait(b"******\n", STDERR)
    header = koi.running(run)
    assert SECRET.encode() not in Path(
        f"/proc/{header.job}/cmdline").read_bytes()
    assert not in_files(koi, SECRET)
    fifo.go()
    assert frames.end()["exit"] == 0
    assert (tmp_path / "given").read_text() == SECRET
    assert frames.text(STDOUT) == b"it is ******.\n******\nend"
    assert frames.text(STDERR) == b"******\n"
    kept = koi.end_of(run)
    assert kept["args"] == {"Key": "******"}
    assert streams(koi, run) == (b"it is ******.\n******\nend", b"******\n")
    koi.stop()
    assert not in_files(koi, SECRET)


def test_output_that_only_begins_like_a_secret_is_shown_at_the_end(koi):
    serving(koi, '"it" @manual echo {{Key, secret}} | cut -c1-3 | '
            "tr -d '\\n'; echo out | tr -d '\\n' >&2\n")
    run, out, err, _ = koi.run("it", Key="secret")
    assert (out, err) == (b"sec", b"out")
    assert streams(koi, run) == (b"sec", b"out")


# ==========================================================================
# Who waits for the output
# ==========================================================================

def test_disconnected_client_leaves_the_job_running(koi, fifo):
    serving(koi, f'"it" @manual echo on; {fifo.wait}; seq 100000; exit 3\n')
    run, frames = follow(koi, "it")
    frames.wait(b"on")
    frames.close()
    fifo.go()
    kept = koi.end_of(run)
    assert short_of(kept) == ("manual", "done", 3, None)
    assert kept["bytes"] == 588_898


def wait_until_it_waits(koi, run: int) -> None:
    """A run has written something, and its supervisor reads no more."""
    wait_until(lambda: koi.header(run).total, 30, "its output")
    wait_until_idle(koi.header(run).supervisor)


def test_slow_reader_delays_the_job_and_misses_no_output(koi, tmp_path):
    serving(koi, f'"it" @manual seq 400000; echo done > {tmp_path}/done\n')
    run, frames = follow(koi, "it")
    koi.running(run)
    wait_until_it_waits(koi, run)
    assert not (tmp_path / "done").exists()
    assert koi.header(run).total < 2_000_000
    assert frames.end()["exit"] == 0
    whole = "".join(f"{number}\n" for number in range(1, 400_001))
    assert frames.text(STDOUT) == whole.encode()
    assert (tmp_path / "done").exists()


def test_job_continues_after_its_slow_reader_disconnects(koi):
    serving(koi, '"it" @manual seq 400000\n')
    run, frames = follow(koi, "it")
    koi.running(run)
    wait_until_it_waits(koi, run)
    frames.close()
    assert koi.end_of(run)["bytes"] == 2_688_895


@pytest.mark.parametrize("number", [1, 2, 3, 15])
def test_a_signal_from_the_client_reaches_the_jobs_group(koi, number):
    serving(koi, f"""\
        "it" @manual trap 'echo shell; exit 4' {number}; sh -c "trap \
'echo child; exit' {number}; echo on; while :; do sleep 0.1; done"; echo no
        """)
    run, frames = follow(koi, "it")
    frames.wait(b"on\n")
    frames.send(bytes([19, 0, 255, 10]))     # what is not passed on
    frames.send(bytes([number]))
    assert frames.end() == {"exit": 4, "signal": None, "reason": ""}
    assert frames.text(STDOUT).split() == [b"on", b"child", b"shell"]
    assert koi.end_of(run)["reason"] == ""


def test_client_can_kill_the_job(koi):
    serving(koi, '"it" @manual trap "" TERM INT; echo on; sleep 60\n')
    _, frames = follow(koi, "it")
    frames.wait(b"on\n")
    frames.send(b"\x02\x0f\x09")
    assert frames.end()["signal"] == 9


# ==========================================================================
# Killing
# ==========================================================================

def test_kill_sends_sigterm_and_then_sigkill(koi):
    koi.set_constants(KILL_AFTER=0.3)
    serving(koi, """\
        "good" @manual trap 'echo bye; exit 3' TERM; echo on; sleep 60 & wait
        "deaf" @manual trap '' TERM; echo on; while :; do sleep 0.2; done
        """)
    for name, code, sign in (("good", 3, None), ("deaf", None, 9)):
        run, frames = follow(koi, name)
        frames.wait(b"on\n")
        koi.ask("kill", run=run)
        end = frames.end()
        assert (end["exit"], end["signal"]) == (code, sign)
        kept = koi.end_of(run)
        assert short_of(kept) == ("manual", "done", code, sign)
        assert kept["reason"] == f"killed by {koi.user}"
        with pytest.raises(koitab.Error, match="has ended"):
            koi.ask("kill", run=run)
    with pytest.raises(koitab.Error, match="no run 99"):
        koi.ask("kill", run=99)


def test_queued_run_can_be_killed(koi, fifo):
    serving(koi, f'KOI_OVERLAP=queue\n"it" @manual echo on; {fifo.wait}\n')
    first, second = follow(koi, "it"), follow(koi, "it")
    first[1].wait(b"on")
    koi.ask("kill", run=second[0])
    assert second[1].end()["reason"] == f"killed by {koi.user}"
    killed = koi.row(second[0])
    assert (killed["state"], killed["started"]) == ("skipped", None)
    fifo.go()
    assert first[1].end()["exit"] == 0
    koi.end_of(first[0])
    assert koi.unfinished() == []


# ==========================================================================
# Tabs that change
# ==========================================================================

def test_installed_tab_is_in_force_before_the_reply(koi):
    serving(koi, '"old" @manual echo old\n')
    for number in range(5):
        text = f'"new {number}" @manual echo {number}\n'
        assert koi.ask("install", text=text) == {
            "installed": True, "problems": [], "daemon": True}
        assert koi.names() == [f"new {number}"]
        assert koi.ask("list")["text"] == text
        assert (koi.home / "tabs" / koi.user).read_text() == text
        assert out_of(koi, f"new {number}") == f"{number}\n"
    koi.stop(signal.SIGKILL)
    koi.start()
    assert koi.names() == ["new 4"]
    assert koi.ask("remove")["removed"] is True and koi.names() == []
    assert koi.ask("remove")["removed"] is False


def test_invalid_tab_is_not_installed(koi):
    serving(koi, '"old" @manual echo old\n')
    reply = koi.ask("install", text='"new" @manual echo\n99 * * * * no\n')
    assert reply["installed"] is False
    assert [problem["line"] for problem in reply["problems"]] == [2]
    assert koi.names() == ["old"] and "old" in koi.ask("list")["text"]


def test_tab_edited_by_hand_is_in_force_by_the_next_minute(koi):
    koi.set_constants(SETTLE=0.05)
    serving(koi, '"old" @manual echo old\n')
    path = koi.home / "tabs" / koi.user

    def taken(*expected):
        wait_until(lambda: koi.names() == [*expected], 60, "the tab")
    path.write_text('"written" @manual echo\n')             # in place
    taken("written")
    with open(path, "a") as tab:
        tab.write('"appended" @manual echo\n99 * * * * a fault\n')
    taken("written", "appended")                # an error drops its line
    assert any(":3:1: bad minute" in text
               for text in koi.ask("status")["problems"])
    koi.tab('"renamed" @manual echo\n')                     # as vi does
    taken("renamed")
    path.chmod(0o666)                   # now others can write it
    wait_until(lambda: koi.ask("status")["problems"], 60, "the mode")
    assert koi.names() == []
    path.chmod(0o600)
    taken("renamed")
    path.unlink()
    taken()


def test_queued_run_keeps_its_values_when_the_arguments_of_its_job_change(
        koi, fifo, tmp_path):
    """It begins as requested, or the reason is recorded."""
    tab = (f'KOI_OVERLAP=queue\n"it" @manual [ -e {tmp_path}/on ] || {{ '
           f'touch {tmp_path}/on; {fifo.wait}; }}; echo {{{{A}}}}\n'
           '"other" @manual echo other\n')
    serving(koi, tab)
    first, second = koi.launch("it", A="1"), koi.launch("it", A="2")
    koi.ask("install", text=tab.replace("{{A}}", "{{B}} of {{C}}"))
    fifo.go()
    koi.end_of(first)
    assert out_of(koi, "other") == "other\n"
    kept = koi.end_of(second, 10)
    if kept["state"] == "done":
        assert koi.text_of(second) == "2\n"
    assert koi.ask("status")["problems"] == []


# ==========================================================================
# Mail
# ==========================================================================

@pytest.fixture
def sink():
    with servers.Sink() as sink:
        yield sink


def copy_of_etc(host, folder: Path) -> Path:
    """A copy of /etc for the namespace; what is put there first is in it."""
    etc, more = folder / "etc", folder / "etc-more"
    etc.mkdir()
    more.mkdir()
    host.setup += [
        f"mount -t tmpfs -o mode=755 none '{etc}'",
        f"cp -a /etc/. '{etc}'",
        # Debian's /etc/default/locale is a link, and may lead nowhere.
        f"cp -a --remove-destination '{more}/.' '{etc}'",
        f"cp '{host.folder}/passwd' '{host.folder}/group' '{etc}'",
        f"mount --move '{etc}' /etc"]
    return more


def with_msmtp(koi, host, port: int) -> None:
    """The real sendmail program of msmtp-mta hands over to `port`."""
    support.need("sendmail", "unshare")
    if os.path.basename(os.path.realpath(support.find("sendmail"))) \
            != "msmtp":
        support.absent("sendmail is another program: apt-get install "
                       "msmtp-mta (make parts)")
    settings = copy_of_etc(host, koi.folder) / "msmtprc"
    settings.write_text(
        f"account default\nhost 127.0.0.1\nport {port}\ntls off\nauth off\n"
        "from koid@koi.invalid\nset_date_header off\nset_from_header off\n"
        "set_msgid_header off\n")
    settings.chmod(0o644)
    koi.host = host


@pytest.fixture
def post(koi, host, sink):
    """koid with the real sendmail, and the server that it hands over to."""
    with_msmtp(koi, host, sink.port)
    return sink


def mailed(koi, sink, count: int) -> list:
    """The mails, when no more of them wait."""
    wait_until(lambda: not koi.unfinished() and "due" not in marks(
        koi).values(), 60, f"the mail\n{koi.log()}")
    assert len(sink.mails) == count, (sink.subjects(), koi.log())
    return sink.mails


def marks(koi) -> dict[str, str]:
    """What has become of the mail of each run."""
    return {run["label"]: run["mail"] for run in koi.history(limit=1000)}


SENT = {     # job -> MAILTO, the command, to whom
    "unset": (None, "echo it", ["root"]),
    "empty": ("", "echo it", []),
    "other": ("ops@koi.invalid", "echo it", ["ops@koi.invalid"]),
    "several": ("a@koi.invalid,b@koi.invalid", "echo it",
                ["a@koi.invalid", "b@koi.invalid"]),
    "stderr": ("ops@koi.invalid", "echo it >&2", ["ops@koi.invalid"]),
    "silent": ("ops@koi.invalid", "true", []),
    "silent and bad": ("ops@koi.invalid", "exit 3", []),
    "only failures, well": ("ops@koi.invalid", "-n echo it", []),
    "only failures, bad": ("ops@koi.invalid", "-n echo it; exit 1",
                           ["ops@koi.invalid"]),
    "only failures, killed": ("ops@koi.invalid", "-n echo it; kill -9 $$",
                              ["ops@koi.invalid"]),
}
UNSAFE = ["-oQ/tmp/queue", "-t", "@koi.invalid", "a@koi.invalid b@koi.invalid",
          "a@koi.invalid;id", "a@koi.invalid\rBcc: b@koi.invalid",
          "$LOGNAME@koi.invalid", "`id`", "|id", "<a@koi.invalid>",
          "ä@koi.invalid", "a@koi.invalid\udcff", '"a b"@koi.invalid',
          ",".join(f"user{number}@koi.invalid," for number in range(10))
          + " x@koi.invalid"]


@support.root_only
def test_mail_is_sent_by_the_rules_of_cron(koi, post):
    lines = []
    for name, (to, command, _) in SENT.items():
        lines += [f'MAILTO="{to}"'] * (to is not None) + [
            f'"{name}" @reboot {command}']
    lines += ["MAILTO=ops@koi.invalid", '"asked" @manual echo asked']
    raw_tab(koi, "\n".join(lines) + "\n")
    koi.start()
    koi.run("asked")            # who asked has seen it
    mails = mailed(koi, post, sum(bool(to) for _, _, to in SENT.values()))
    found = sorted((mail.recipients, mail.text) for mail in mails)
    assert found == sorted((to, "it\n") for _, _, to in SENT.values() if to)
    assert marks(koi) == {**{name: "sent" if to else "" for name, (_, _, to)
                             in SENT.items()}, "asked": ""}
    assert {mail.sender for mail in mails} == {"<koid@koi.invalid>"}


@support.root_only
def test_unsafe_mail_address_gets_no_mail(koi, post):
    lines = []
    for number, to in enumerate(UNSAFE):
        lines += [f"MAILTO='{to}'", f'"n{number}" @reboot echo no']
    lines += ["MAILTO=ops@koi.invalid", '"well" @reboot echo well']
    raw_tab(koi, "\n".join(lines) + "\n")
    koi.start()
    mail, = mailed(koi, post, 1)
    koi.ended(count=len(UNSAFE) + 1)
    assert mail.recipients == ["ops@koi.invalid"]
    assert marks(koi) == {"well": "sent", **{
        f"n{number}": "unsafe address" for number in range(len(UNSAFE))}}
    assert koi.log().count("UNSAFE MAIL") == len(UNSAFE)
    assert str(koi.ask("status")).count(
        "so output is not mailed") == len(set(UNSAFE))
    assert len(post.mails) == 1


@support.root_only
def test_mail_has_the_headers_of_cron_and_no_variables_of_the_tab(koi, post):
    host = os.uname().nodename.partition(".")[0]
    raw_tab(koi, "TOKEN=very-secret\n"
            '@reboot echo "Grüße"; cat%five\\%%input\n'
            "MAILFROM=koi@koi.invalid\n@reboot echo from\n"
            'MAILFROM="-f evil"\n@reboot echo unsafe; exit 1\n'
            "MAILFROM=\n"
            "CONTENT_TYPE=text/html; charset=iso-8859-1\n"
            "CONTENT_TRANSFER_ENCODING=quoted-printable\n"
            "@reboot echo \"<b>\"\n"
            "CONTENT_TYPE='text/plain\rBcc: evil@koi.invalid'\n"
            "CONTENT_TRANSFER_ENCODING=\n"
            "@reboot echo inject\x1b\rBcc: evil@koi.invalid\n")
    koi.start()
    mails = {mail.data.partition(b"\r\n\r\n")[2].split()[0].decode():
               mail for mail in mailed(koi, post, 5)}
    usual, sent_from = mails["Grüße"], mails["from"]
    assert b"From: root (Cron Daemon)\r\n" in usual.data
    assert usual["To"] == "root"
    assert usual.subject == f'Cron <root@{host}> echo "Grüße"; cat'
    assert usual["Content-Type"] == 'text/plain; charset="utf-8"'
    assert usual["Content-Transfer-Encoding"] == "8bit"
    assert usual["MIME-Version"] == "1.0"
    assert usual["Auto-Submitted"] == "auto-generated"
    assert usual.text == "Grüße\nfive%\ninput\n"
    assert sent_from["From"] == "koi@koi.invalid"
    assert b"From: root (Cron Daemon)\r\n" in mails["unsafe"].data
    assert mails["<b>"].data.count(
        b'Content-Type: text/html; charset="iso-8859-1"\r\n') == 1
    assert mails["<b>"].data.count(
        b"Content-Transfer-Encoding: quoted-printable\r\n") == 1
    for mail in mails.values():
        head = mail.data.partition(b"\r\n\r\n")[0]
        assert mail.recipients == ["root"]
        assert b"X-Cron-Env" not in mail.data
        assert b"very-secret" not in mail.data
        assert not any(line.startswith((b"Bcc", b"evil"))
                       for line in head.splitlines())
        assert b"\x1b" not in head and b"\r" not in head.replace(
            b"\r\n", b"")


TEXTS = {
    "long": b"x" * 100_000 + b"\n",
    "several-long": (b"y" * 1500 + b"\n") * 100,
    "nul": b"a\0b\n",
    "no-utf-8": b"caf\xe9 \xff\xfe\n",
    "carriage": b"10%\r20%\r\n",
    "no-newline": b"no newline",
    "dots": b".\n..\n.x\nFrom here\n",
    "header": b"Bcc: evil@koi.invalid\n\nSubject: x\n",
    "escape": b"\x1b[31mred\x1b[0m\n",
    "euro": "€ ä 🎉\n".encode(),
}


@support.root_only
def test_any_output_can_be_mailed(koi, post, tmp_path):
    """Invalid UTF-8 is replaced; all else arrives, in lines that a mail
    server takes."""
    lines = []
    for name, data in TEXTS.items():
        (tmp_path / name).write_bytes(data)
        lines.append(f'"{name}" @reboot cat {tmp_path}/{name}\n')
    raw_tab(koi, "".join(lines))
    koi.start()
    mails = mailed(koi, post, len(TEXTS))
    assert set(marks(koi).values()) == {"sent"}
    found = {mail.subject.rpartition("/")[2]: mail for mail in mails}
    for name, data in TEXTS.items():
        mail = found[name]
        expected = data.decode("utf-8", "replace").splitlines()
        assert mail.message.get_content().splitlines() == expected, name
        assert max(map(len, mail.data.split(b"\r\n"))) <= 998, name
        assert mail.recipients == ["root"]


@support.root_only
def test_large_output_is_mailed_with_the_stored_head_and_tail(koi, post):
    serving(koi, "@reboot seq 500000\n")
    mail, = mailed(koi, post, 1)
    assert mail.text.startswith("1\n2\n3\n")
    assert mail.text.endswith("\n500000\n")
    assert "bytes left out here]\n" in mail.text


@support.root_only
def test_a_job_of_a_user_is_mailed_by_that_user(koi, host, tmp_path):
    """sendmail is run as the one whose job it was, in their home, and gets
    nothing of koid's."""
    program = tmp_path / "sendmail"
    program.write_text(
        '#!/bin/sh\nexec > "$HOME/got"\nid -un; pwd; umask; echo "$@"; '
        "echo /proc/$$/fd/*; env | sort; cat\n")
    program.chmod(0o755)
    host.bind(program, os.path.realpath(support.find("sendmail")
                                        or "/usr/sbin/sendmail"))
    koi.host = host
    koi.tab("FOO=bar\nMAILTO=ops@koi.invalid\n@reboot echo hers\n",
            user=ALICE)
    koi.start(SECRET="of koid")
    home = host.home[ALICE]
    wait_until(lambda: set(marks(koi).values()) == {"sent"}, 30, koi.log)
    assert support.owner(home / "got") == ALICE_UID
    who, where, _, options, files, *rest = (home / "got").read_text(
        ).splitlines()
    assert (who, where) == (ALICE, str(home))
    assert options == "-FCronDaemon -i -B8BITMIME -oem ops@koi.invalid"
    # sh reads the directory at 3, and its script at 10.
    assert {"0", "1", "2"} <= set(map(os.path.basename, files.split())) <= {
        "0", "1", "2", "3", "10"}
    blank = rest.index("")
    begin_of_mail = next(at for at, line in enumerate(rest)
                         if line.startswith("From: "))
    variables = {line.partition("=")[0] for line in rest[:begin_of_mail]}
    assert variables - from_host() == {"HOME", "LOGNAME", "PATH", "PWD",
                                       "SHELL", "USER"}
    assert f"From: {ALICE} (Cron Daemon)" in rest[begin_of_mail:blank]
    assert rest[blank + 1:] == ["hers"]


@support.root_only
def test_user_that_stops_their_own_mails_does_not_delay_those_of_others(
        koi, host, tmp_path):
    """What runs sendmail runs as the user, who may send it a signal."""
    program, sent = tmp_path / "sendmail", tmp_path / "sent"
    program.write_text(
        "#!/bin/sh\n[ \"$(id -u)\" = 0 ] || kill -STOP $PPID $$\n"
        f"echo \"$LOGNAME\" >> {sent}\n")
    program.chmod(0o755)
    host.bind(program, os.path.realpath(support.find("sendmail")
                                        or "/usr/sbin/sendmail"))
    koi.host = host
    koi.set_constants(MAILER_TIME=3.0)
    koi.tab("MAILTO=a@koi.invalid\n" + "".join(
        f'"n{number}" @reboot echo hers\n' for number in range(6)),
        user=ALICE)
    koi.tab("MAILTO=r@koi.invalid\n@reboot sleep 1; echo roots\n")
    koi.start()
    wait_until(sent.exists, 30, koi.log)
    wait_until(lambda: list(marks(koi).values()).count("failed (status -9)")
               == 6, 60, koi.log)
    assert sent.read_text() == "root\n"


@support.root_only
def test_mail_due_when_koid_was_killed_is_sent_by_the_next_koid(koi, post):
    post.silent = True          # two mails hang, one waits
    raw_tab(koi, "".join(f'"n{number}" @reboot echo {number}\n'
                         for number in range(3)))
    koi.start()
    wait_until(lambda: list(marks(koi).values()) == ["due"] * 3
               and post.sessions == 2, 30, "letters that get stuck")
    koi.stop(signal.SIGKILL)
    post.silent = False
    koi.start()
    mails = mailed(koi, post, 3)
    assert sorted(mail.text for mail in mails) == ["0\n", "1\n", "2\n"]
    assert sorted(mail.subject.partition("> ")[2] for mail in mails
                  ) == ["echo 0", "echo 1", "echo 2"]
    koi.stop()
    koi.start()
    koi.ask("status")
    assert set(marks(koi).values()) == {"sent"} and len(post.mails) == 3


@support.root_only
def test_mail_refused_by_the_server_is_logged(koi, post):
    post.answers = {"RCPT": "550 nobody of that name"}
    serving(koi, '"it" @reboot echo it\n"other" @manual echo other\n')
    wait_until(lambda: marks(koi)["it"].startswith("failed"), 30, "the mail")
    assert "MAIL (run 1: got status" in koi.log()
    assert out_of(koi, "other") == "other\n"


@pytest.fixture
def syslog(koi, host):
    """What is said to the system's log, in a /dev of the test's own."""
    folder = tempfile.mkdtemp(prefix="koi-")        # a path that is short
    os.chmod(folder, 0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(f"{folder}/log")
        os.chmod(f"{folder}/log", 0o666)
        dev = koi.folder / "dev"
        dev.mkdir()
        host.setup += [
            f"mount -t tmpfs -o mode=755 none '{dev}'",
            f"cp -a /dev/null /dev/zero /dev/urandom /dev/tty '{dev}'",
            f"ln -s '{folder}/log' '{dev}/log'", f"mount --move '{dev}' /dev"]
        koi.host = host
        yield log
    shutil.rmtree(folder)


def logged(log, text: str) -> str:
    """The lines of the log, up to one with this text."""
    lines = []
    while not lines or text not in lines[-1]:
        assert select.select([log], [], [], 30)[0], f"no {text}: {lines}"
        lines.append(log.recv(65_536).decode())
    return "\n".join(lines)


@support.root_only
def test_missing_sendmail_is_only_logged(koi, host, syslog):
    """As cron does. And each start is logged, in cron's words."""
    for path in koitab.SENDMAILS:
        if os.path.exists(path):
            host.bind("/dev/null", os.path.realpath(path))
    serving(koi, '"it" @reboot echo it\n"other" @manual echo other\n'
            '-"unlogged" @manual echo unlogged\n')
    found = logged(syslog, "No MTA installed, discarding output")
    assert "(root) CMD (echo it)" in found
    assert marks(koi)["it"] == ""
    out_of(koi, "unlogged")
    assert out_of(koi, "other") == "other\n"
    assert "unlogged" not in logged(syslog, "(root) CMD (echo other)")
    assert "MTA" not in koi.log()


def test_supervisor_of_an_unstartable_job_exits(koi):
    serving(koi, 'SHELL=/no/such/shell\n"it" @manual true\n')
    koi.launch("it")
    assert koi.ended("it")[0]["state"] == "unstartable"
    tree = Path(f"/proc/{koi.daemon.pid}/task/{koi.daemon.pid}/children")
    wait_until(lambda: tree.read_text() == "", 10, "the supervisor to go")

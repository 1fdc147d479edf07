"""koitab as crontab(1) and next to a real koid: real processes, terminals,
editors and signals, in the test's own home."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import pwd
import select
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

import support

PROGRAM = str(support.ROOT / "koitab.py")
# The first lines of the file, which run it from Python's cache.
DAILY = "@daily x\n"
ME = pwd.getpwuid(os.geteuid()).pw_name


class Terminal:
    """A program on its own terminal: what it shows, what is typed."""

    def __init__(self, command: list[str], env: dict):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, env)
        self.shown, self.status = "", None

    def read(self, seconds: float) -> bool:
        """More of what it shows; False at its end."""
        if not select.select([self.fd], [], [], max(seconds, 0))[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:         # Linux reports EIO when no process has it open
            data = b""
        self.shown += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)

    def expect(self, text: str, seconds: float = 20) -> None:
        """Wait until it shows this."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            if time.monotonic() > deadline or not self.read(
                    deadline - time.monotonic()):
                pytest.fail(f"{text!r} is not in {self.shown!r}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C until it is heard: Python sees one that comes just
        before it begins to read only after that."""
        before = self.shown.count("\n")
        while self.shown.count("\n") == before:
            self.type("\x03")
            self.read(2)            # the echo
            self.read(2)

    def end(self, seconds: float = 20) -> support.Result:
        """Wait for its end: the status, and all that it showed."""
        deadline = time.monotonic() + seconds
        while self.read(deadline - time.monotonic()):
            if time.monotonic() > deadline:
                pytest.fail(f"still there, after {self.shown!r}")
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        return support.Result(os.waitstatus_to_exitcode(self.status),
                              self.shown, "")

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)


class Koi:
    """A home of koi's, the programs in it, and its daemon."""

    def __init__(self, folder: Path):
        self.folder, self.home = folder, folder / "koi"
        (folder / "tmp").mkdir()
        self.env = {"PATH": os.environ.get("PATH", os.defpath), "TZ": "UTC",
                    "HOME": str(folder), "KOI_HOME": str(self.home),
                    "TMPDIR": str(folder / "tmp"), "TERM": "dumb"}

    def command(self, *argv: str) -> list[str]:
        return [*support.program("koitab"), *argv]

    def start(self, *argv: str, **options) -> subprocess.Popen:
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            self.command(*argv), env=self.env, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def run(self, *argv: str, stdin: str = "") -> support.Result:
        done = subprocess.run(
            self.command(*argv), env=self.env, cwd=self.folder, timeout=60,
            input=stdin.encode(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        return support.Result(
            done.returncode, done.stdout.decode("utf-8", "replace"),
            done.stderr.decode("utf-8", "replace"))

    @contextlib.contextmanager
    def terminal(self, *argv: str):
        terminal = Terminal(self.command(*argv), self.env)
        try:
            yield terminal
        finally:
            terminal.close()

    @contextlib.contextmanager
    def daemon(self):
        with support.stopping(self.start("daemon")) as koid:
            support.wait_until((self.home / "koid.sock").exists, 20, "koid")
            yield koid
            koid.terminate()
            koid.communicate()

    def editor(self, script: str) -> None:
        """An editor that does as this script says, with the file as $1."""
        path = self.folder / "editor"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.env["EDITOR"] = str(path)

    def tab(self) -> str:
        return self.run("-l").out

    def drafts(self) -> list[Path]:
        return list((self.folder / "tmp").glob("crontab.*/crontab"))


@pytest.fixture
def koi(tmp_path):
    return Koi(tmp_path)


# --- a tab comes and goes -------------------------------------------------


@pytest.mark.parametrize("with_daemon", [False, True])
def test_a_tab_is_installed_listed_and_removed(koi, with_daemon):
    with koi.daemon() if with_daemon else contextlib.nullcontext():
        assert koi.run("-l").err.startswith("no crontab for ")
        done = koi.run("-", stdin=DAILY)
        assert (done.code, done.out) == (0, "")
        assert ("koid is not running" in done.err) is not with_daemon
        assert koi.tab() == DAILY
        bad = koi.run(stdin="61 * * * * x\n")
        assert (bad.code, koi.tab()) == (1, DAILY)
        assert bad.err.endswith("errors in crontab file, can't install.\n")
        assert koi.run("-r").code == 0
        gone = koi.run("-r")
        assert (gone.code, gone.err[:15]) == (1, "no crontab for ")


def test_a_program_that_is_called_crontab_is_crontab(koi):
    """As a link, by the first lines of the file, as a package installs
    it."""
    link = koi.folder / "crontab"
    link.symlink_to(PROGRAM)
    done = subprocess.run([str(link), "-e", "-l"], env=koi.env,
                          stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"crontab: error: usage error: only one")


@pytest.mark.parametrize("after", ["", "@daily y\n", None])
def test_replaced_tab_that_loses_a_job_is_kept_and_its_path_is_printed(
        koi, after):
    before = '"a" @daily x\n' + DAILY
    koi.run("-", stdin=before)
    argv = ["-r"] if after is None else ["-"]
    done = koi.run(*argv, stdin=after or "")
    path = koi.home / "previous" / f"{ME}:1"
    assert done.code == 0 and f"koitab: 2 jobs removed or changed; the " \
        f"previous tab is {path}\n" in done.err
    assert path.read_text() == before
    assert support.mode(path) == 0o600
    assert koi.run(str(path)).code == 0
    assert koi.run("-l").out == before


@pytest.mark.parametrize("argv", [["-r"], ["-"]])
def test_tab_that_others_may_write_can_be_replaced(koi, argv):
    koi.run("-", stdin=DAILY)
    (koi.home / "tabs" / ME).chmod(0o666)
    assert koi.run(*argv, stdin="@daily y\n").code == 0


def test_tab_that_keeps_its_jobs_is_replaced_without_a_message(koi):
    koi.run("-", stdin=DAILY)
    done = koi.run("-", stdin="A=1\n@hourly y\n" + DAILY)
    assert "previous" not in done.err
    assert not (koi.home / "previous").exists()


def test_five_previous_tabs_are_kept(koi):
    for number in range(8):
        koi.run("-", stdin=f"@daily {number}\n")
    assert {path.name: path.read_text()
            for path in (koi.home / "previous").iterdir()} == {
        f"{ME}:{age}": f"@daily {7 - age}\n" for age in range(1, 6)}


def test_tab_is_removed_although_no_copy_can_be_kept(koi):
    koi.run("-", stdin=DAILY)
    (koi.home / "previous").touch()
    done = koi.run("-r")
    assert done.code == 0
    assert "warning: the previous tab could not be kept: " in done.err


def test_option_l_on_a_terminal_escapes_control_characters(koi):
    koi.run("-", stdin="@daily evil #\r@daily good\x1b[2K\n")
    with koi.terminal("-l") as terminal:
        assert terminal.end().out == (
            "@daily evil #\\x0d@daily good\\x1b[2K\n")


@pytest.mark.parametrize("keys, removed", [
    ("y\n", True), ("n\n", False), ("\x04", False), ("x\ny\n", True)])
def test_options_r_and_i_on_a_terminal_ask_for_confirmation(
        koi, keys, removed):
    koi.run("-", stdin=DAILY)
    with koi.terminal("-r", "-i") as terminal:
        terminal.expect("crontab? (y/n) ")
        terminal.type(keys)
        assert terminal.end().code == 0
    assert (koi.tab() == "") is removed


def test_call_without_arguments_on_a_terminal_is_wrong_usage(koi):
    with koi.terminal() as terminal:
        done = terminal.end()
    assert done.code == 1
    assert "file name or - (for stdin) must be specified" in done.out
    assert not koi.home.exists()


# --- -e -------------------------------------------------------------------


def test_an_edit_is_installed_and_its_draft_is_removed(koi):
    koi.run("-", stdin=DAILY)
    koi.editor('ls -ld "$1" "${1%/*}" > "$HOME/modes"; '
               'echo "@hourly y" >> "$1"')
    with koi.terminal("-e") as terminal:
        done = terminal.end()
    assert done.code == 0
    assert "koitab: installing new crontab" in done.out
    assert koi.tab() == DAILY + "@hourly y\n"
    assert list((koi.folder / "tmp").iterdir()) == []


def test_editing_without_a_tab_starts_from_a_template(koi):
    koi.editor('cat "$1"; echo "@hourly y" >> "$1"')
    done = koi.run("-e")
    assert done.code == 0
    assert " - using an empty one\n" in done.err
    assert "# [Backups]\n" in done.out
    assert koi.tab() == done.out + "@hourly y\n"


@pytest.mark.parametrize("script", [
    "true", 'touch -d 2030-01-01 "$1"', 'cp "$1" x; mv x "$1"'])
def test_edit_without_a_change_installs_nothing(koi, script):
    for text in (None, DAILY):
        if text:
            koi.run("-", stdin=text)
        koi.editor(script)
        done = koi.run("-e")
        assert done.code == 0
        assert done.err.endswith("koitab: no changes made to crontab\n")
        assert koi.tab() == (text or "")
    assert list((koi.folder / "tmp").iterdir()) == []


def test_invalid_edit_can_be_corrected(koi):
    koi.editor('if grep -q 61 "$1"; then sed -i s/61/1/ "$1"; '
               'else echo "61 * * * * x" > "$1"; fi')
    with koi.terminal("-e") as terminal:
        terminal.expect("Do you want to retry the same edit? (Y/N) ")
        terminal.type("what\n")
        terminal.expect("Enter Y or N")
        terminal.type("y\n")
        done = terminal.end()
    assert done.code == 0
    assert "crontab:1:1: bad minute: expected 0 to 59" in done.out
    assert koi.tab() == "1 * * * * x\n"


@pytest.mark.parametrize("keys", ["n\n", "\x04", "\x03"])
def test_abandoned_invalid_edit_is_kept_and_its_path_is_printed(koi, keys):
    koi.run("-", stdin=DAILY)
    koi.editor('echo "61 * * * * x" > "$1"')
    with koi.terminal("-e") as terminal:
        terminal.expect("(Y/N) ")
        if keys == "\x03":
            terminal.interrupt()
        else:
            terminal.type(keys)
        done = terminal.end()
    draft, = koi.drafts()
    assert done.code == (130 if keys == "\x03" else 1)
    assert f"koitab: edits left in {draft}" in done.out
    assert draft.read_text() == "61 * * * * x\n"
    assert (support.mode(draft), support.mode(draft.parent)) == (
        0o600, 0o700)
    assert koi.tab() == DAILY


@pytest.mark.parametrize("script, said", [
    ("exit 3", "exited with status 3"), ("kill -9 $$", "killed; signal 9")])
def test_an_editor_that_fails_installs_nothing(koi, script, said):
    koi.run("-", stdin=DAILY)
    koi.editor(script)
    done = koi.run("-e")
    assert (done.code, koi.drafts()) == (1, [])
    assert said in done.err
    koi.editor(f'echo "@hourly y" > "$1"; {script}')
    done = koi.run("-e")            # what was typed is not thrown away
    draft, = koi.drafts()
    assert f"edits left in {draft}" in done.err
    assert koi.tab() == DAILY


@pytest.mark.parametrize("key, number", [("\x03", 2), ("\x1c", 3)])
def test_interrupt_keys_reach_the_editor_and_koitab_survives(koi, key, number):
    """It begins with what is usual, and koitab outlives them."""
    koi.editor('ulimit -c 0; echo ready; read line')
    with koi.terminal("-e") as terminal:
        terminal.expect("ready")
        terminal.type(key)
        done = terminal.end()
    assert done.code == 1
    assert f"killed; signal {number}" in done.out
    koi.editor('trap "echo heard" INT QUIT; echo ready; '
               'while [ "$line" != x ]; do read line; done; '
               'echo "@daily $line" > "$1"')
    with koi.terminal("-e") as terminal:
        terminal.expect("ready")
        terminal.type(key)
        terminal.expect("heard")
        terminal.type("\nx\n")
        assert terminal.end().code == 0
    assert koi.tab() == DAILY


def test_no_shell_reads_the_editor(koi):
    for editor in ("true; touch stolen", "$(touch stolen)", "`touch stolen`",
                   "true&&touch stolen"):
        koi.env["EDITOR"] = editor
        done = koi.run("-e")
        assert done.code == 1
        # "Permission denied": a directory in PATH is closed to this user.
        assert "No such file or directory" in done.err \
            or "Permission denied" in done.err
        assert not (koi.folder / "stolen").exists()
        assert koi.drafts() == []


@pytest.mark.parametrize("script, said", [
    ('rm "$1"; ln -s /etc/passwd "$1"', "a symbolic link"),
    ('rm "$1"; mkfifo "$1"', "not a regular file"),
    ('rm "$1"', "it was removed"),
    ('head -c 1048577 /dev/zero > "$1"', "larger than")])
def test_replaced_draft_is_refused(koi, script, said):
    koi.run("-", stdin=DAILY)
    koi.editor(script)
    done = koi.run("-e")
    assert done.code == 1
    assert said in done.err
    assert koi.tab() == DAILY


def test_concurrent_edits_do_not_overwrite_each_other(koi):
    koi.run("-", stdin=DAILY)
    other = shlex.join(koi.command("-"))
    koi.editor(f'echo "@hourly mine" >> "$1"; echo "@hourly its" | {other}')
    done = koi.run("-e")
    assert done.code == 1
    assert "has changed since you began" in done.err
    assert koi.tab() == "@hourly its\n"
    assert koi.drafts()[0].read_text() == DAILY + "@hourly mine\n"


# --- run, with a real koid -------------------------------------------------

JOBS = r'''[Jobs]
"Out" @manual printf 'one\n'; printf 'two\n' >&2; exit 3
"Say" @manual printf '\%s\n' {{To}} {{Times, int, 1}}
"Pin" @manual printf '\%s\n' {{Code, secret}} | wc -c
"Wait" @manual trap 'echo int' INT; trap 'echo term; exit 5' TERM; echo on; \
'''.rstrip("\\\n") + '''while :; do sleep 0.1; done
"Deaf" @manual trap 'echo int' INT; trap 'echo term' TERM; echo on; \
'''.rstrip("\\\n") + '''while :; do sleep 0.1; done
"Flood" @manual seq 100000; echo done > FOLDER/flooded
'''


@pytest.fixture
def live(koi):
    """A koid that has some jobs."""
    with koi.daemon():
        done = koi.run("-", stdin=JOBS.replace("FOLDER", str(koi.folder)))
        assert (done.code, done.err) == (0, "")
        yield koi
        for run in json.loads(koi.run("status", "--json").out)["running"]:
            os.kill(job_of(run, koi), signal.SIGKILL)


def job_of(run: dict, koi: Koi) -> int:
    """The process of a run."""
    data = (koi.home / "runs" / str(run["run"])).read_bytes()
    return support.load("koitab").parse_header(data).job


def test_a_run_has_the_output_and_the_status_of_its_job(live):
    done = live.run("run", "Out")
    assert (done.code, done.out, done.err) == (3, "one\n", "two\n")
    log = live.run("log", "Out")
    assert (log.code, log.out, log.err) == (0, "one\n", "two\n")
    assert "manual" in live.run("history").out
    status = live.run("status")
    assert status.code == 1
    assert "failed    Out: exit 3" in status.out


def test_arguments_are_prompted_for_on_the_terminal(live):
    with live.terminal("run", "Say") as terminal:
        terminal.expect("To: ")
        terminal.type("$(id) 'x'\n")
        done = terminal.end()
    assert done.code == 0
    assert done.out.endswith("$(id) 'x'\n1\n")


def test_secret_is_neither_echoed_nor_in_the_list_of_processes(live):
    with live.terminal("run", "Pin") as terminal:
        terminal.expect("Code (secret): ")
        terminal.type("s3cr3t\n")
        done = terminal.end()
    assert done.code == 0
    assert "s3cr3t" not in done.out
    assert done.out.strip().endswith("7")
    assert live.run("run", "Pin", "Code=-", stdin="s3cr3t\n").out == "7\n"
    assert "s3cr3t" not in live.run("history", "--json").out


def test_missing_values_are_named_without_a_terminal(live):
    done = live.run("run", "Say")
    assert (done.code, done.out) == (2, "")
    assert 'missing argument "To"' in done.err


def test_ctrl_c_sends_sigint_first_and_then_sigterm_to_the_job(live):
    with live.terminal("run", "Wait") as terminal:
        terminal.expect("on\n")
        terminal.type("\x03")
        terminal.expect("int\n")
        terminal.type("\x03")
        terminal.expect("term\n")
        done = terminal.end()
    assert done.code == 5
    assert "press Ctrl-C again to leave the job running" in done.out


def test_the_third_ctrl_c_leaves_the_job_running(live):
    with live.terminal("run", "Deaf") as terminal:
        terminal.expect("on\n")
        terminal.type("\x03")
        terminal.expect("int\n")
        terminal.type("\x03")
        terminal.expect("term\n")
        terminal.type("\x03")
        done = terminal.end()
    assert done.code == 130
    run, = json.loads(live.run("status", "--json").out)["running"]
    number = run["run"]
    assert (f"run {number} continues (koitab log {number}; koitab kill "
            f"{number})") in done.out
    log = live.run("log", str(run["run"]))
    assert log.out == "on\nint\nterm\n"
    assert log.err.endswith(f"koitab: run {run['run']}: running\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_are_passed_on_to_the_job(live, number):
    process = live.start("run", "Wait")
    assert process.stdout.readline() == b"on\n"
    process.send_signal(number)
    done = support.ended(process)
    assert done.code == (5 if number == signal.SIGTERM else 129)


def test_koitab_under_nohup_ignores_sighup(live):
    process = subprocess.Popen(
        ["nohup", *live.command("run", "Wait")], env=live.env,
        cwd=live.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"int\n"
    process.send_signal(signal.SIGTERM)
    assert support.ended(process).code == 5


def test_closed_pipe_does_not_end_the_job(live):
    process = live.start("run", "Flood")
    process.stdout.readline()
    process.stdout.close()
    assert b"continues" in process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 141
    support.wait_until((live.folder / "flooded").exists, 20, "the job")


def test_kill_ends_the_command_that_follows_the_run(live):
    process = live.start("run", "Wait")
    assert process.stdout.readline() == b"on\n"
    run, = json.loads(live.run("status", "--json").out)["running"]
    done = live.run("kill", str(run["run"]))
    assert (done.code, done.out) == (
        0, f"stopping run {run['run']} (Wait): SIGTERM sent, SIGKILL in "
        "10s\n")
    assert support.ended(process).code == 5


def test_commands_for_runs_fail_while_koid_is_not_running(koi):
    koi.run("-", stdin=JOBS)
    for argv in (["run", "Out"], ["kill", "1"], ["status"]):
        done = koi.run(*argv)
        assert done.code == 1
        assert "koid is not running" in done.err + done.out
    assert koi.run("completion", "names").out.split() == [
        "Out", "Say", "Pin", "Wait", "Deaf", "Flood"]


# --- other users, cron's tabs, units --------------------------------------


@support.root_only
def test_u_of_an_ordinary_user_is_refused(host):
    host.setup.append(f"export USER=root LOGNAME=root SUDO_USER=root "
                      f"KOI_HOME={host.home['alice']}/koi")
    command = support.program("koitab", support.SHARED_PYTHON)
    done = host.run([*command, "-u", "root", "-l"], user="alice")
    assert (done.code, done.err) == (1, "must be privileged to use -u\n")
    done = host.run([*command, "-u", "alice", "-l"], user="alice")
    assert (done.code, done.err) == (1, "no crontab for alice\n")


@support.root_only
def test_crontabs_of_debians_cron_are_imported_and_installed(host, tmp_path):
    """By the real crontab, for root and for alice."""
    support.need("crontab")
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o755)
    host.bind(spool, "/var/spool/cron/crontabs")
    for name, text in (
            ("crontab", "SHELL=/bin/bash\nMAILTO=ops\n1 2 * * * root sys\n"
             "3 4 * * * alice hers\n"), ("cron.d", None)):
        path = tmp_path / name
        if text is None:
            path.mkdir()
            (path / "pkg").write_text("5 6 * * * root pkg\n")
        else:
            path.write_text(text)
        host.bind(path, f"/etc/{name}")
    host.setup += [f"export KOI_HOME={tmp_path}/koi",
                   "echo '7 8 * * * own' | crontab -",
                   "echo '9 10 * * * alices' | crontab -u alice -"]
    koi = shlex.join(support.program("koitab", support.SHARED_PYTHON))
    done = host.run(["sh", "-ec", f"{koi} import | {koi} - && {koi} -l; "
                     f"{koi} -u alice import | {koi} -T -; "
                     f"{koi} -u alice import 2>/dev/null"])
    assert done.code == 0, done
    live = [line for line in done.out.splitlines() if line[:1] not in "#"]
    assert live == [
        "[root]", "7 8 * * * own", "[crontab]", "SHELL=/bin/bash",
        "MAILTO=ops", "1 2 * * * sys", "[pkg]", "SHELL=/bin/sh",
        "MAILTO=root", "5 6 * * * pkg",
        "[alice]", "9 10 * * * alices", "[crontab]", "SHELL=/bin/bash",
        "MAILTO=ops", "3 4 * * * hers"]
    assert "No syntax issues were found" in done.err


@support.root_only
def test_import_by_an_ordinary_user_has_only_their_crontab(host, tmp_path):
    support.need("crontab")
    program = tmp_path / "bin"
    program.mkdir(mode=0o755)
    fake = program / "crontab"      # the real one is set-gid: not in here
    fake.write_text("#!/bin/sh\n[ \"$*\" = -l ] && echo '@daily mine'\n")
    fake.chmod(0o755)
    host.setup.append(f"export PATH={program}:$PATH")
    done = host.run([*support.program("koitab", support.SHARED_PYTHON),
                     "import"], user="alice")
    assert done.code == 0, done
    assert "[alice]\n# crontab of alice\n@daily mine\n" in done.out


def test_systemd_accepts_the_unit(koi, tmp_path):
    support.need("systemd-analyze")
    for options in ([], ["--system"]):
        unit = tmp_path / "koid.service"
        unit.write_text(koi.run("unit", "daemon", *options).out)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=no",
             str(unit)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**koi.env, "SYSTEMD_LOG_LEVEL": "warning"})
        assert "koid.service" not in done.stdout.decode(), done.stdout

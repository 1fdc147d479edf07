"""What a task gets, what it may leave behind, and what becomes of its words.

The task is not to be trusted: its output goes to a log, a mail and a
terminal, and its children outlive it.
"""

from __future__ import annotations

import os
import pty
import pwd
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import support
from support import is_alive, log_texts

# What the caller may have in its environment and a task must not get.
HOSTILE = {
    "SECRET": "hunter2", "SMTP_PASSWORD": "hunter2", "LD_LIBRARY_PATH": "/x",
    "LD_PRELOAD": "libm.so.6", "PYTHONPATH": "/x", "PYTHONHOME": "/x",
    "PYTHONSTARTUP": "/x", "PERL5LIB": "/x", "BASH_ENV": "/x", "ENV": "/x",
    "IFS": "/", "CDPATH": "/", "GIT_DIR": "/x", "GIT_SSH_COMMAND": "/x",
    "SUDO_UID": "1500", "SSH_AUTH_SOCK": "/x", "OPENSSL_CONF": "/x",
    "SSL_CERT_FILE": "/x", "http_proxy": "http://127.0.0.1:9",
    "BASH_FUNC_ls%%": "() { echo pwned; }", "PROMPT_COMMAND": "touch /x",
    "LC_ALL": "C", "DISPLAY": ":0", "XDG_RUNTIME_DIR": "/x",
}
# The environment that execve gave, before a shell adds PWD to it.
SHOW = "tr '\\0' '\\n' < /proc/$$/environ"
def peak_of(process: subprocess.Popen, seconds: float = 120) -> float:
    """Wait for a process; the most memory it ever held (VmHWM), in MB."""
    peak, deadline = 0, time.monotonic() + seconds
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = int(found[1]) if found else peak
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.05)
    process.wait()
    return peak / 1024


# What a task gets ------------------------------------------------------------


def test_a_task_gets_exactly_the_environment_of_the_manual(scratch):
    sync = scratch.storage("sync")
    cold = scratch.storage("cold-store")
    scratch.config["passBin"] = "/bin/echo"
    scratch.task("hello", SHOW, env={"KEY": "a=b c"})
    scratch.env.update(HOSTILE, TZ="Europe/Berlin")
    result = scratch.mission("run")
    assert result.code == 0, result
    lines = [text for text in log_texts(result.out) if re.match(r"\w+=", text)]
    got = dict(line.split("=", 1) for line in lines)
    me = pwd.getpwuid(os.geteuid())
    run_id = scratch.history()[-1]["id"]
    assert got.pop("HOME") in (me.pw_dir, str(scratch.home))
    assert got == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:"
                "/bin",
        "USER": me.pw_name, "LOGNAME": me.pw_name, "SHELL": got["SHELL"],
        "LANG": "C.UTF-8", "TZ": "Europe/Berlin",
        "TARGET_USER": scratch.config["user"]["name"],
        "PASS_BIN": "/bin/echo", "TASKS_DIR": str(scratch.tasks),
        "LOGS_DIR": str(scratch.logs), "SYNC_DIR": str(sync),
        "COLD_STORE_DIR": str(cold), "MISSION_RUN_ID": run_id,
        "MISSION_TASK": "hello", "KEY": "a=b c"}


def test_pass_bin_is_an_empty_variable_without_passbin(scratch):
    scratch.task("hello", SHOW)
    assert "PASS_BIN=" in log_texts(scratch.mission("run").out)


def test_task_starts_in_its_directory_in_a_new_session(scratch):
    scratch.task("hello", """
        pwd -P
        echo "stdin $(readlink /proc/$$/fd/0)"
        read -r pid comm state parent group session rest < /proc/$$/stat
        echo "leads $((session == $$)) $((group == $$))"
        """)
    said = log_texts(scratch.mission("run").out)
    assert str(scratch.tasks / "hello") in said
    assert "stdin /dev/null" in said and "leads 1 1" in said


def test_task_gets_only_its_three_standard_descriptors(scratch):
    # ls itself opens the fourth, the directory it lists.
    scratch.task("open", "#!/usr/bin/env -S ls /proc/self/fd\n")
    scratch.write()
    with open(scratch.path) as secret:
        done = subprocess.run(scratch.command("run"), env=scratch.env,
                              stdout=subprocess.PIPE, timeout=60,
                              pass_fds=(secret.fileno(),))
    said = log_texts(done.stdout.decode())
    assert [text for text in said if text.isdigit()] == list("0123"), said


def test_entrypoint_runs_in_its_own_directory(scratch):
    elsewhere = scratch.make("elsewhere") / "program"
    elsewhere.write_text("#!/bin/sh\npwd -P\n")
    elsewhere.chmod(0o755)
    scratch.entry("hello", "exec", entrypoint=str(elsewhere))
    assert str(elsewhere.parent) in log_texts(scratch.mission("run").out)


def test_task_does_not_inherit_blocked_signals_or_umask(scratch):
    # A caller that blocks SIGTERM and ignores SIGPIPE, like some daemons.
    # (A shell would clear its mask itself, so the task is grep.)
    scratch.task("mask", "#!/usr/bin/env -S grep -h ^Sig /proc/self/status\n")
    scratch.task("umask", "umask")
    scratch.write()
    caller = ("import os, signal, sys\n"
              "signal.pthread_sigmask(signal.SIG_BLOCK, {1, 10, 15})\n"
              "signal.signal(signal.SIGPIPE, signal.SIG_IGN)\n"
              "os.umask(0o022)\n"
              "os.execv(sys.argv[1], sys.argv[1:])\n")
    done = subprocess.run([sys.executable, "-c", caller,
                           *scratch.command("run")], env=scratch.env,
                          stdout=subprocess.PIPE, timeout=60)
    said = log_texts(done.stdout.decode())
    masks = dict(line.split(":\t") for line in said if ":\t" in line)
    assert int(masks["SigBlk"], 16) == 0, said
    for number in (signal.SIGPIPE, signal.SIGTERM, signal.SIGXFSZ):
        assert not int(masks["SigIgn"], 16) >> (number - 1) & 1, number
    assert "0022" in said           # our 077 is for the log alone


# Planted modules -------------------------------------------------------------


PLANTED = ("import os\nopen(os.environ.get('CANARY', {canary!r}), 'w')"
           ".close()\nraise SystemExit(66)\n")


@pytest.fixture
def planted(tmp_path):
    """A copy of mission in a directory with planted Python modules."""
    support.need("bash")
    folder, canary = tmp_path / "bin", tmp_path / "canary"
    folder.mkdir()
    program = folder / "mission"
    program.write_bytes((support.ROOT / "mission.py").read_bytes())
    program.chmod(0o755)
    for name in ("json", "re", "os", "subprocess", "getopt", "signal",
                 "select", "fcntl", "hashlib", "sitecustomize",
                 "usercustomize"):
        (folder / f"{name}.py").write_text(
            PLANTED.format(canary=str(canary)))
    return program, canary


@pytest.mark.parametrize("where", ["beside it", "PYTHONPATH", "the cwd",
                                   "the user site"])
def test_modules_in_the_working_directory_are_not_imported(
        scratch, planted, where):
    program, canary = planted
    folder, cwd = program.parent, scratch.home
    env = dict(scratch.env)
    if where != "beside it":
        program = scratch.make("clean") / "mission"
        program.write_bytes((support.ROOT / "mission.py").read_bytes())
        program.chmod(0o755)
    if where == "PYTHONPATH":
        env["PYTHONPATH"] = str(folder)
    elif where == "the cwd":
        cwd = folder
    elif where == "the user site":
        name = subprocess.run(
            [support.SHARED_PYTHON, "-c", "import site; "
             "print(site.getusersitepackages())"], env=env, check=True,
            stdout=subprocess.PIPE).stdout.decode().strip()
        Path(name).parent.mkdir(parents=True)
        folder.rename(name)
    scratch.builtin("inside", "def run(args, log):\n    import json, re\n"
                    "    log('said ' + json.dumps([1]))\n")
    scratch.write()
    done = subprocess.run([str(program), "-c", str(scratch.path), "run"],
                          cwd=str(cwd), env=env, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done
    assert b"said [1]" in done.stdout
    assert not canary.exists()


def test_naive_program_imports_modules_of_the_working_directory(
        scratch, planted):
    # Without this the test above could not fail.
    program, canary = planted
    naive = program.parent / "naive.py"
    naive.write_text("import json\n")
    subprocess.run([support.SHARED_PYTHON, str(naive)], check=False,
                   env=scratch.env, cwd="/")
    assert canary.exists()


# Terminal injection ----------------------------------------------------------


# Puts one character into the terminal's input through each way there is.
INJECT = """#!{python}
import fcntl, os, termios
print("trying")
for path in ("/dev/tty", "/proc/self/fd/0", "/proc/self/fd/1",
             "/proc/self/fd/2"):
    try:
        fcntl.ioctl(os.open(path, os.O_RDWR), termios.TIOCSTI, b"X")
    except OSError as error:
        print(path, error)
for fd in range(3):
    try:
        fcntl.ioctl(fd, termios.TIOCSTI, b"X")
    except OSError as error:
        print(fd, error)
"""
# The leader of a session on a new terminal: runs a command, then says what
# is in the terminal's input.
LEADER = """
import os, select, subprocess, sys, termios, tty
tty.setraw(0)
subprocess.run(sys.argv[2:], stderr=subprocess.STDOUT,
               stdin=0 if sys.argv[1] == "naive" else None)
ready = select.select([0], [], [], 0.3)[0]
os.write(1, b"\\r\\nINPUT=" + (os.read(0, 99) if ready else b"") + b"=\\r\\n")
"""


def on_own_terminal(how: str, command: list[str], env: dict) -> str:
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", LEADER, how,
                                   *command], env)
    seen = b""
    try:
        while b"INPUT=" not in seen or not seen.rstrip().endswith(b"="):
            seen += os.read(master, 65536)
    except OSError:
        pass
    os.waitpid(pid, 0)
    os.close(master)
    return seen.decode("utf-8", "replace")


def test_a_task_cannot_type_into_the_terminal_of_its_caller(scratch):
    script = INJECT.format(python=support.SHARED_PYTHON)
    run = scratch.task("typist", script)
    scratch.write()
    legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if legacy.exists() and legacy.read_text().strip() == "0":
        support.absent("this kernel forbids TIOCSTI to everyone")
    naive = on_own_terminal("naive", [str(run)], scratch.env)
    assert "INPUT=X" in naive           # the attack is live
    seen = on_own_terminal("mission", scratch.command("run"), scratch.env)
    assert "trying" in seen and "INPUT==" in seen, seen


# Leftovers -------------------------------------------------------------------


def test_child_that_holds_the_pipe_does_not_keep_the_run_active(scratch):
    pidfile = scratch.folder / "pid"
    scratch.task("daemon", """
        echo before
        sleep 300 & echo $! > "$PIDFILE"
        echo after
        """, env={"PIDFILE": str(pidfile)})
    scratch.task("next", "echo next")
    scratch.patch(GRACE=0.2)
    began = time.monotonic()
    result = scratch.mission("run")
    assert time.monotonic() - began < 30
    pid = pidfile.read_text().strip()
    said = log_texts(result.out)
    assert {"before", "after", "next"} <= set(said)
    # It is a warning that names the process, and it is gone.
    assert result.code == 1 and scratch.history()[-1]["errors"] == 0
    assert any(text.startswith("WARN: ") and pid in text for text in said)
    assert not is_alive(int(pid))


def test_output_of_a_leftover_process_is_not_lost(scratch):
    scratch.task("daemon", "(sleep 0.5; echo late) & echo early")
    result = scratch.mission("run")
    assert {"early", "late"} <= set(log_texts(result.out))
    assert (result.code, result.err) == (0, "")


def test_child_in_another_session_is_named_and_not_killed(scratch):
    support.need("setsid")
    pidfile = scratch.folder / "pid"
    scratch.task("daemon", """
        setsid sh -c 'echo $$ > "$PIDFILE"; exec sleep 300' &
        while ! [ -s "$PIDFILE" ]; do sleep 0.05; done
        """, env={"PIDFILE": str(pidfile)})
    scratch.patch(GRACE=0.2)
    result = scratch.mission("run")
    pid = int(pidfile.read_text())
    try:
        assert is_alive(pid)
        assert result.code == 1 and scratch.history()[-1]["errors"] == 0
        assert re.search(rf"WARN: .*\b{pid}\b", result.out)
    finally:
        os.kill(pid, signal.SIGKILL)


# Hostile words ---------------------------------------------------------------


@pytest.mark.parametrize("written, shown", [
    (b"plain",                       "plain"),
    (b"tab\there",                   "tab\there"),
    ("\u00fc\u20ac\U0001f40b".encode(), "\u00fc\u20ac\U0001f40b"),
    (b"nul\0nul",                    r"nul\x00nul"),
    (b"\x1b[31mred\x1b[0m",          r"\x1b[31mred\x1b[0m"),
    (b"\x1b]52;c;aGk=\x07",          r"\x1b]52;c;aGk=\x07"),
    (b"\x1b]8;;http://x\x1b\\",      r"\x1b]8;;http://x\x1b" + "\\"),
    (b"\xff\xfe",                    r"\xff\xfe"),
    (b"raw C1 \x9b31m",              r"raw C1 \x9b31m"),
    ("C1 \u009b31m".encode(),        r"C1 \x9b31m"),
    ("rtl \u202egnp.exe".encode(),   r"rtl \u202egnp.exe"),
    ("\u2066\u2069".encode(),        r"\u2066\u2069"),
    (b"\xed\xa0\x80 surrogate",      r"\xed\xa0\x80 surrogate"),
    (b"cut \xe2\x82",                r"cut \xe2\x82"),
    (b"dos line\r",                  "dos line"),
    (b"bell\x07\x08\x7f",            r"bell\x07\x08\x7f"),
])
def test_control_characters_are_escaped(scratch, written, shown):
    (scratch.folder / "words").write_bytes(b"<" + written + b">\n")
    scratch.task("hello", f"cat {scratch.folder}/words")
    if written.endswith(b"\r"):
        (scratch.folder / "words").write_bytes(b"<" + written + b"\n")
        shown = "<" + shown
    else:
        shown = f"<{shown}>"
    result = scratch.headless()
    assert (result.code, result.err) == (0, "")
    assert shown in log_texts(scratch.log())
    # `mission log` shows a file that anything may have been put into.
    scratch.log_files()[-1].write_bytes(b"[1ms       ] <" + written + b">\n")
    out = scratch.mission("log").out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066\u2069]",
                         out), repr(out)


def test_carriage_return_ends_a_line(scratch):
    scratch.task("hello", r"printf '10%%\r50%%\r100%%\nnext\r\n'")
    said = log_texts(scratch.mission("run").out)
    start = said.index("10%")
    assert said[start:start + 4] == ["10%", "50%", "100%", "next"]


def test_a_task_cannot_forge_the_runners_lines(scratch):
    rule = "# " + "\u2014" * 47
    forged = (f"\n{rule}\n# Errors\n{rule}\n\n- other: exit status 1\n"
              "[0s        ] ERROR: forged\nERROR: forged\nWARN: forged\n"
              "TaskFinish hello exit 1 in 0s\nFinishTime 2020-01-01\n"
              "[FAILURE]\n\r\n\x0b# Task: Other\n\u2028# Errors\n")
    (scratch.folder / "words").write_text(forged)
    scratch.task("hello", f"cat {scratch.folder}/words")
    result = scratch.mission("run")
    assert (result.code, result.err) == (0, "")
    last = scratch.history()[-1]
    assert (last["result"], last["errors"], last["warnings"]) == ("ok", 0, 0)
    # Nothing of it is at the start of a line, where only the runner writes.
    headers = re.findall(f"^{rule}\n# (.*)", result.out, re.M)
    assert headers == ["Start", "Task: Hello", "Finish"]
    for line in re.split("[\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", result.out):
        assert not line or line.startswith(("[", rule)) \
            or line[2:] in headers, line


@support.root_only
def test_pass_runs_as_the_user_and_its_value_is_never_shown(alice, host):
    program = alice.folder / "pass"
    home = host.home["alice"]
    program.write_text("#!/bin/sh\n"
                       f"{{ id -u; id -G; tr '\\0' '\\n' < /proc/$$/environ;"
                       f" }} > {home}/seen\n"
                       'echo "swordfish-$1"\n')
    program.chmod(0o755)
    alice.config["passBin"] = str(program)
    alice.builtin("fetch", """
        def run(args, log):
            value = args.pass_value("key")
            log("got " + value)
            print("printed", value, len(value))
        """)
    alice.task("after", "echo swordfish-key; " + SHOW)
    alice.env.update(HOSTILE)
    result = alice.mission("run")
    assert result.code == 0, result
    assert "swordfish" not in result.out + result.err
    assert "got ***" in log_texts(result.out)
    assert "printed *** 13" in log_texts(result.out)
    seen = (home / "seen").read_text().splitlines()
    assert seen[:2] == ["1500", "1500"]
    assert f"HOME={home}" in seen and "LOGNAME=alice" in seen
    for name in HOSTILE:
        if name not in ("LC_ALL", "DISPLAY", "XDG_RUNTIME_DIR"):
            assert not [line for line in seen if line.startswith(name + "=")]


@pytest.mark.parametrize("script, why", [
    ("echo half; exit 3",                     "fake-pass key: exit status 3"),
    ("sleep 300",                             "timed out"),
    ("head -c 100000 /dev/zero | tr '\\0' x", "fake-pass key: "),
    ("true",                                  "fake-pass key: empty first"),
])
def test_an_unusable_answer_of_passbin_fails_the_task(
        scratch, script, why):
    scratch.fake_pass(script)
    scratch.builtin("fetch", "def run(args, log):\n"
                    "    log('got ' + args.pass_value('key'))\n",
                    timeout="1s" if script == "sleep 300" else "60s")
    result = scratch.mission("run")
    assert result.code == 1
    assert "got" not in " ".join(log_texts(result.out))
    assert re.search(f"(?i){why}", result.out), result


# Much output -----------------------------------------------------------------


def measured_run(scratch) -> tuple[float, int, str]:
    """A headless run: its peak in MB, its exit status, its stderr."""
    with open(scratch.folder / "stderr", "w+b") as errors:
        process = scratch.start("run", "--headless", stderr=errors,
                                stdout=subprocess.DEVNULL)
        with support.stopping(process):
            peak = peak_of(process)
        errors.seek(0)
        return peak, process.returncode, errors.read().decode()


def test_many_lines_arrive_complete_and_in_order(scratch):
    count = 1_000_000 if support.FULL else 200_000
    scratch.task("count", f"seq {count}")
    peak, code, err = measured_run(scratch)
    assert (code, err) == (0, "") and peak < 40
    wanted = 1
    with open(scratch.log_files()[-1]) as log:
        for line in log:
            if line.endswith(f"] {wanted}\n"):
                wanted += 1
    assert wanted == count + 1


def test_huge_line_arrives_completely_in_little_memory(scratch):
    size = 100_000_000 if support.FULL else 45_000_000
    scratch.task("long", f"echo start\nhead -c {size} /dev/zero | "
                 "tr '\\0' x\necho; echo end")
    peak, code, err = measured_run(scratch)
    assert (code, err) == (0, "") and peak < 40
    with open(scratch.log_files()[-1], "rb") as log:
        count = longest = 0
        for line in log:
            if b"xxxx" in line:
                count += line.count(b"x")
                longest = max(longest, len(line))
    assert count == size and longest < 2_000_000
    said = scratch.log_files()[-1].read_bytes()[-600:].decode()
    assert "end" in log_texts(said)


def test_binary_output_becomes_a_readable_log(scratch):
    junk = bytes(random.Random(1).choices(range(256), k=300_000))
    (scratch.folder / "junk").write_bytes(junk)
    scratch.task("junk", f"cat {scratch.folder}/junk; echo; echo end")
    assert scratch.headless().code == 0
    log = scratch.log_files()[-1].read_bytes().decode()     # valid UTF-8
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", log)
    assert "end" in log_texts(log)
    # As many NULs shown as were written: nothing is lost.
    assert log.count("\\x00") >= junk.count(b"\0") > 0


def test_endless_output_ends_at_the_timeout_within_the_size_limit(scratch):
    scratch.config["logs"] = {"max": "1M"}
    scratch.task("endless", "echo first; exec yes", timeout="1s")
    scratch.task("next", "echo next")
    peak, code, err = measured_run(scratch)
    assert code == 1 and "1 error" in err and peak < 40
    log = scratch.log_files()[-1]
    # (its column makes a short line eight times as long)
    assert log.stat().st_size < 16 * 2**20
    said = log_texts(log.read_text())
    assert said.index("first") < said.index("next")
    assert re.search(r"^<<[\d,]+ lines left out here: [\d,]+ ",
                     log.read_text(), re.M)


def test_endless_output_without_a_newline_does_not_fill_the_memory(scratch):
    scratch.config["logs"] = {"max": "1M"}
    scratch.task("endless", "exec cat /dev/zero", timeout="1s")
    peak, code, err = measured_run(scratch)
    assert code == 1 and "1 error" in err and peak < 40


def test_a_task_that_closes_its_output_is_still_waited_for(scratch):
    scratch.task("quiet", "exec >&- 2>&-\nsleep 0.3\ntouch ../done\nexit 5")
    result = scratch.mission("run")
    assert result.code == 1 and (scratch.tasks / "done").exists()
    assert "ERROR: exit status 5" in log_texts(result.out)


def test_prompt_without_a_newline_is_shown_while_the_task_waits(scratch):
    fifo = scratch.folder / "fifo"
    os.mkfifo(fifo)
    scratch.patch(SILENCE=0.1)
    scratch.task("prompt", 'printf "Password: "; read answer < "$FIFO"\n'
                 'echo "thanks"', env={"FIFO": str(fifo)})
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        support.wait_until(lambda: scratch.log_files()
                           and "Password: " in scratch.log(), 20,
                           "the prompt in the log")
        assert process.poll() is None
        fifo.write_text("x\n")
        assert support.ended(process).code == 0
    assert scratch.log().count("Password: ") == 1
    assert "thanks" in " ".join(log_texts(scratch.log()))


# Redaction -------------------------------------------------------------------


def test_redactions_apply_to_the_log_and_everything_made_from_it(scratch):
    scratch.config["redact"] = [r"token=\w+", r"(?i)password: *\S+"]
    scratch.task("leak", """
        echo "url?token=abc123&x=1 and PassWord: hunter2 and more"
        printf 'token=sec'; sleep 0.2; printf 'ret99 split\\n'
        printf 'token=%s' last77
        exit 1
        """)
    assert scratch.headless().code == 1
    log = scratch.log()
    assert "url?***&x=1 and *** and more" in log_texts(log)
    assert "*** split" in log_texts(log)
    made = [path.read_bytes() for path in scratch.folder.rglob("*")
            if path.is_file() and scratch.tasks not in path.parents]
    made.append(scratch.mission("log").out.encode())
    for secret in (b"abc123", b"hunter2", b"ret99", b"last77"):
        assert not [text for text in made if secret in text], secret


def test_a_secret_fetched_with_pass_is_redacted_by_value(scratch):
    scratch.fake_pass("printf '%s\\n' 's(w+o.rd[fish'")
    scratch.builtin("fetch", """
        import sys
        def run(args, log):
            secret = args.pass_value("key")
            print("printed", secret, flush=True)
            print("to stderr", secret, file=sys.stderr, flush=True)
            log("logged " + secret)
            raise RuntimeError("raised " + secret)
        """)
    assert scratch.headless().code == 1
    log = scratch.log()
    for word in ("printed", "to stderr", "logged", "raised"):
        assert f"{word} ***" in log
    assert "s(w+o.rd[fish" not in log
    assert "s(w+o.rd[fish" not in str(scratch.history())


@pytest.mark.parametrize("junk", [
    "a" * 60 + "!",             # hours for (a+)+$ in a backtracking matcher
    "a" * 3000 + "!",
])
def test_a_line_too_slow_for_a_redaction_is_withheld(
        scratch, junk):
    scratch.patch(LINE_SECONDS=0.3)
    scratch.config["redact"] = ["(a+)+$", "secret"]
    scratch.task("hello", f"echo before\necho 'hidden {junk}'\necho after\n"
                 "echo my secret\n")
    result = scratch.mission("run")
    said = log_texts(result.out)
    assert {"before", "after", "my ***"} <= set(said), said
    assert "hidden" not in result.out
    assert said.index("before") + 1 < said.index("after")   # a mark instead
    assert result.code in (0, 1, 74) and "Traceback" not in result.err


def test_secret_at_the_split_of_a_long_line_is_not_shown(scratch):
    scratch.config["redact"] = ["token=[a-z]+"]
    scratch.task("long", "head -c 1048570 /dev/zero | tr '\\0' x\n"
                 "printf token=; head -c 3000 /dev/zero | tr '\\0' q\n"
                 "printf zzz; head -c 2000000 /dev/zero | tr '\\0' x\n")
    assert scratch.headless().code in (0, 1)
    assert "qqqq" not in scratch.log()

"""A run as its user sees it: order, log, exit status, and every command."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

import support
from support import (LOG_LINE, LOG_RULE, commit_subjects, init_repository,
                     is_alive, log_section, log_texts, log_titles)

MISSION = support.program("mission")
SPARKS = set("▁▂▃▄▅▆▇█")


def listing(folder: Path) -> dict:
    """Everything about every file below: kind, mode, time, content."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_ino, status.st_size,
                            status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def one_line(result) -> str:
    """The one line a non-zero status puts on stderr."""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mission: error: "), result
    return lines[0]


def bare(folder: Path, *args: str):
    """mission without -c, in a directory."""
    done = subprocess.run([*MISSION, *args], cwd=str(folder), timeout=60,
                          env={"PATH": os.environ["PATH"],
                               "HOME": str(folder),
                               "MISSION_STATE": str(folder / "state")},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    return support.Result(done.returncode, done.stdout.decode(),
                          done.stderr.decode())


def on_terminal(scratch, *args: str, **env: str) -> str:
    """What mission writes to a terminal (its stdin, stdout and stderr)."""
    scratch.write()
    master, slave = pty.openpty()
    process = subprocess.Popen(
        scratch.command(*args), stdin=slave, stdout=slave, stderr=slave,
        env={**scratch.env, "TERM": "xterm", **env}, start_new_session=True)
    os.close(slave)
    seen = b""
    with support.stopping(process):
        try:
            while True:
                chunk = os.read(master, 65536)
                if not chunk:
                    break
                seen += chunk
        except OSError:         # EIO: the last holder of the slave is gone
            pass
    os.close(master)
    return seen.decode("utf-8", "replace")


# Order and look --------------------------------------------------------------


def test_tasks_run_in_order_then_chown_then_commit_then_post_tasks(scratch):
    sync = init_repository(scratch.storage("sync", commit=True))
    scratch.storage("local", chown=True)
    scratch.task("late", 'git -C "$SYNC_DIR" log --format=%s', post=True)
    scratch.task("first", 'echo one > "$SYNC_DIR/file"')
    scratch.task("manual", "echo never", scheduled=False)
    scratch.task("second", "echo two")
    result = scratch.mission("run")
    assert (result.code, result.err) == (0, "")
    assert log_titles(result.out) == [
        "Start", "Task: First", "Task: Second", "Chown", "Commit",
        "Task: Late", "Finish"]
    assert "two" in log_texts(log_section(result.out, "Task: Second"))
    # A post task sees the commit of this run already made.
    assert commit_subjects(sync)[0] in log_texts(
        log_section(result.out, "Task: Late"))
    assert re.fullmatch(r"manual run complete on .*\d{4}.*",
                        commit_subjects(sync)[0])


def test_run_of_only_post_tasks_commits_nothing(scratch):
    sync = init_repository(scratch.storage("sync", commit=True))
    scratch.task("late", 'echo x > "$SYNC_DIR/file"', post=True)
    result = scratch.mission("run")
    assert result.code == 0 and commit_subjects(sync) == []
    assert log_titles(result.out) == ["Start", "Task: Late", "Finish"]


def test_option_t_runs_the_named_tasks_in_the_given_order(scratch):
    for slug in ("a", "b", "c"):
        scratch.task(slug, f"echo {slug}", scheduled=slug != "c")
    result = scratch.mission("run", "-t", "c", "--task", "a")
    assert result.code == 0
    assert log_titles(result.out) == ["Start", "Task: C", "Task: A", "Finish"]


def test_log_has_the_format_of_the_original(scratch):
    scratch.task("hello", "echo one\necho two >&2\nprintf three",
                 name="Say hello")
    log = scratch.mission("run").out
    assert log.startswith(f"{LOG_RULE}\n# Start\n{LOG_RULE}\n\n[")
    assert f"\n\n{LOG_RULE}\n# Task: Say hello\n{LOG_RULE}\n\n[" in log
    for line in log.splitlines():
        assert not line or line.startswith("# ") or LOG_LINE.match(line), line
    # Ten columns at least, and stdout and stderr in the order written.
    assert re.search(r"^\[\d+m?s {5,}\] one$", log, re.M)
    said = log_texts(log_section(log, "Task: Say hello"))
    assert said[:3] == ["one", "two", "three"]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"StartTime {stamp}", log_texts(log)[0])
    assert re.fullmatch(f"FinishTime {stamp}",
                        log_texts(log_section(log, "Finish"))[0])


@pytest.mark.parametrize("script, closing", [
    ("exit 0",     r"exit 0\b"),
    ("exit 3",     r"exit 3\b"),
    ("kill -9 $$", r"(?i)kill"),
])
def test_every_task_has_a_closing_line_with_exit_and_duration(
        scratch, script, closing):
    scratch.task("hello", script)
    log = scratch.mission("run").out
    line = [text for text in log_texts(log_section(log, "Task: Hello"))
            if text.startswith("TaskFinish hello")]
    assert len(line) == 1 and re.search(closing, line[0]), log
    assert re.search(r" in \d+(\.\d+)?m?s$", line[0])


def test_problems_are_shown_at_once_and_again_in_the_summaries(scratch):
    scratch.task("bad", "echo before\nexit 3")
    scratch.task("needy", "echo never", needs=["bad"])
    scratch.task("good", "echo still")
    result = scratch.mission("run")
    assert result.code == 1
    assert re.search("1 error and 1 warning", one_line(result))
    said = log_texts(result.out)
    assert "still" in said and "never" not in said
    at_once = log_section(result.out, "Task: Bad")
    assert "ERROR: exit status 3" in log_texts(at_once)
    assert re.search(r"^(\[.*\] )?- bad: exit status 3$",
                     log_section(result.out, "Errors"), re.M)
    assert re.search(r"^(\[.*\] )?- needy: .*bad.*",
                     log_section(result.out, "Warnings"), re.M)
    # The summaries are at the end, warnings first.
    assert log_titles(result.out)[-3:] == ["Finish", "Warnings", "Errors"]


def test_headless_run_writes_a_private_log_and_prints_nothing(scratch):
    scratch.task("hello", "echo hello")
    first = scratch.headless()
    second = scratch.headless()
    for result in (first, second):
        assert (result.code, result.out, result.err) == (0, "", "")
    names = sorted((path.name for path in scratch.log_files()), key=len)
    stamp = r"\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d"
    assert re.fullmatch(stamp + r"\.txt", names[0])
    assert all(re.fullmatch(stamp + r"(-2)?\.txt", name) for name in names)
    assert len(names) == 2
    assert {support.mode(path) for path in scratch.log_files()} == {0o600}
    assert "hello" in log_texts(scratch.log())


def test_a_run_by_hand_saves_no_log(scratch):
    scratch.task("hello", "echo hello")
    assert scratch.mission("run").code == 0
    assert scratch.log_files() == []


def test_two_hundred_tasks_run_in_order(scratch):
    for number in range(200):
        scratch.task(f"t{number}", f"echo says {number}")
    result = scratch.mission("run")
    assert result.code == 0
    said = log_texts(result.out)
    assert [text for text in said if text.startswith("says")] \
        == [f"says {number}" for number in range(200)]


# Exit status -----------------------------------------------------------------


def failing(scratch):
    scratch.task("hello", "exit 1")


def refused_ping(scratch):
    scratch.task("hello")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scratch.config["ping"] = {"enabled": True, "retries": 1, "timeout": "2s",
                              "endpoint": f"http://127.0.0.1:{port}/x"}


def without_tasks(scratch):
    pass


def broken_script(scratch):
    scratch.task("good", "echo good")
    scratch.task("hello").chmod(0o644)


@pytest.mark.parametrize("args, setup, code, told", [
    ("run",               failing,       1,  r"1 error\b"),
    ("run",               broken_script, 1,  r"1 error\b"),
    ("run --headless",    refused_ping,  74, r"(?i)ping"),
    ("run -t helo",       failing,       2,  r"hello"),
    ("run -t",            failing,       2,  r"-t"),
    ("run --wait soon",   failing,       2,  r"soon"),
    ("run -x",            failing,       2,  r"-x"),
    ("run hello",         failing,       2,  r"hello"),
    ("lst",               failing,       2,  r"list"),
    ("history -n x",      failing,       2,  r"x"),
    ("completion csh",    failing,       2,  r"csh"),
    ("",                  failing,       2,  r"(?i)command|usage|help"),
    ("run",               without_tasks, 78, r"tasks"),
    ("check",             without_tasks, 78, r"tasks"),
    ("check",             broken_script, 78, r"hello"),
    ("-c none.json run",  failing,       78, r"none\.json"),
])
def test_each_result_has_its_exit_status_and_message(
        scratch, args, setup, code, told):
    setup(scratch)
    result = scratch.mission(*args.split())
    assert result.code == code, result
    assert re.search(told, result.err), result
    assert "mission: error: " in result.err
    assert "Traceback" not in result.err + result.out
    if code in (1, 74):
        one_line(result)


def test_successful_run_prints_nothing_to_stderr(scratch):
    scratch.task("hello")
    for args in ("run", "run --headless", "list", "list -v", "list --json",
                 "check", "dump", "history", "history --json", "log",
                 "run --dry-run", "completion bash", "--help", "--version"):
        result = scratch.mission(*args.split())
        assert (result.code, result.err) == (0, ""), args


def test_an_unknown_slug_names_the_nearest_and_nothing_runs(scratch):
    scratch.task("photos", "touch ../ran")
    scratch.task("mail", "touch ../ran")
    result = scratch.mission("run", "-t", "mail", "-t", "potos")
    assert result.code == 2 and "photos" in result.err
    assert not (scratch.tasks / "ran").exists()
    assert scratch.history() == []


@pytest.mark.parametrize("args", [
    "list -v", "-v list", "list --verbose", "--verbose list",
    "-C list -v", "list -v -C", "list -v --no-color",
])
def test_options_are_accepted_before_and_after_the_command(scratch, args):
    scratch.task("hello", scheduled=False)
    result = scratch.mission(*args.split())
    assert (result.code, result.err) == (0, "")
    assert "Hello" in result.out and "manual" in result.out


def test_option_c_is_accepted_after_the_command(scratch):
    scratch.task("hello")
    scratch.write()
    for options in (["-c", str(scratch.path)],
                    ["--config", str(scratch.path)],
                    [f"--config={scratch.path}"]):
        result = bare(scratch.home, "list", *options)
        assert (result.code, result.out) == (0, "hello\n"), result
    assert bare(scratch.folder, "list").out == "hello\n"


# Dry run ---------------------------------------------------------------------


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_dry_run_prints_the_plan_and_touches_nothing(scratch, ran_before):
    init_repository(scratch.storage("sync", commit=True))
    scratch.storage("local", chown=True)
    scratch.task("first", 'date +%s%N >> "$SYNC_DIR/file"')
    scratch.task("late", "echo x", post=True)
    scratch.write()
    if ran_before:
        assert scratch.headless().code == 0
    before = listing(scratch.folder)
    for args in (["run", "--dry-run"], ["run", "--dry-run", "--headless"],
                 ["--headless", "run", "-t", "late", "--dry-run"]):
        result = scratch.mission(*args, write=False)
        assert (result.code, result.err) == (0, "")
        assert listing(scratch.folder) == before, args
    plan = scratch.mission("run", "--dry-run", write=False).out
    places = [plan.lower().index(word)
              for word in ("first", "chown", "commit", "late")]
    assert places == sorted(places), plan


# needs, parallel, retries, timeout, user, nice, env, minFree -----------------


def test_failed_task_skips_only_the_tasks_that_need_it(scratch):
    scratch.task("mount", "exit 1")
    scratch.task("copy", "exit 0", needs=["mount"])
    scratch.task("check", "exit 0", needs=["copy"])
    scratch.task("other", "exit 0")
    assert scratch.mission("run").code == 1
    assert scratch.outcomes() == {"mount": "failed", "copy": "skipped",
                                 "check": "skipped", "other": "ok"}
    assert scratch.mission("run", "-t", "copy").code == 1
    assert scratch.outcomes() == {"mount": "failed", "copy": "skipped"}


def test_tasks_of_a_group_run_in_parallel_with_complete_marked_lines(scratch):
    meet = scratch.make("meet")
    # Each waits for the other's line: one after the other they would hang.
    for slug, mine in (("left", "l"), ("right", "r")):
        os.mkfifo(meet / mine)
        scratch.task(slug, f"""
            cd "$MEET"
            if [ {slug} = left ]; then echo x > l; read x < r
            else read x < l; echo x > r; fi
            i=0
            while [ $i -lt 300 ]; do
                printf '{slug}-'; printf '%s-' $i; echo end; i=$((i+1))
            done
            """, parallel="pair", env={"MEET": str(meet)}, timeout="60s")
    scratch.task("after", "echo after")
    result = scratch.mission("run")
    assert result.code == 0, result
    said = log_texts(result.out)
    for slug in ("left", "right"):
        lines = [text for text in said if f"{slug}-" in text]
        ends = [re.fullmatch(rf"\W*{slug}\W+{slug}-(\d+)-end", line)
                for line in lines]
        assert all(ends), lines[:3]
        assert [int(end[1]) for end in ends] == list(range(300))
    assert said.index("after") \
        > max(i for i, text in enumerate(said) if "-end" in text)


def test_failed_task_is_retried_and_each_attempt_is_logged(scratch):
    scratch.task("flaky", """
        echo attempt >> ../tries
        [ $(wc -l < ../tries) -ge 3 ] || exit 9
        """, retries=3, retryDelay="1s")
    scratch.task("hopeless", "echo trying\nexit 4", retries=1,
                 retryDelay="0s")
    result = scratch.mission("run")
    flaky, hopeless = scratch.history()[-1]["tasks"]
    assert (flaky["outcome"], flaky["attempts"]) == ("ok", 3)
    assert (hopeless["outcome"], hopeless["attempts"]) == ("failed", 2)
    assert log_texts(result.out).count("trying") == 2
    assert "exit 9" in log_section(result.out, "Task: Flaky")
    assert result.code == 1 and "1 error" in one_line(result)


def test_run_succeeds_if_the_last_attempt_of_a_task_succeeds(scratch):
    scratch.task("flaky", "[ -e ../again ] || { touch ../again; exit 1; }",
                 retries=1, retryDelay="0s")
    result = scratch.mission("run")
    assert (result.code, result.err) == (0, "")


def test_task_over_its_time_limit_gets_sigterm_and_fails(scratch):
    scratch.task("slow", """
        trap 'echo cleaned up; exit 0' TERM
        sleep 100 & wait
        """, timeout="1s")
    scratch.task("next", "echo next")
    result = scratch.mission("run")
    assert result.code == 1 and scratch.outcomes()["slow"] == "failed"
    assert "cleaned up" in log_texts(result.out)
    assert re.search(r"- slow: .*1s", log_section(result.out, "Errors"))
    assert "next" in log_texts(result.out)


def test_task_that_ignores_sigterm_is_killed_with_its_children(scratch):
    scratch.patch(TERM_TO_KILL=1)
    pids = scratch.folder / "pids"
    scratch.task("deaf", """
        trap '' TERM
        sh -c 'trap "" TERM; echo $$ >> "$PIDS"; while :; do sleep 1; done' &
        echo $$ >> "$PIDS"
        while :; do sleep 1; done
        """, timeout="1s", env={"PIDS": str(pids)})
    result = scratch.mission("run")
    assert result.code == 1
    # The time limit of the task, and TERM_TO_KILL.
    assert 2 <= scratch.history()[-1]["seconds"] < 30
    for pid in pids.read_text().split():
        assert not is_alive(int(pid))


@support.root_only
def test_a_task_runs_as_the_user_it_names(alice, host):
    alice.task("who", """
        echo "$(id -u) $(id -g) $(id -G)"
        echo "$HOME $LOGNAME $USER"
        touch "$HOME/made"
        """, user=support.ALICE)
    alice.task("me", "id -u")
    result = alice.mission("run")
    assert result.code == 0, result
    said = log_texts(result.out)
    assert "1500 1500 1500" in said
    assert f"{host.home['alice']} alice alice" in said
    assert log_texts(log_section(result.out, "Task: Me"))[0] == "0"
    assert support.owner(host.home["alice"] / "made") == support.ALICE_UID


def test_nice_and_env_reach_the_task(scratch):
    base = os.getpriority(os.PRIO_PROCESS, 0)
    scratch.task("hello", 'nice; echo "$GREETING"', nice=7,
                 env={"GREETING": "good $HOME morning"})
    said = log_texts(scratch.mission("run").out)
    assert str(min(base + 7, 19)) in said or "7" in said
    assert "good $HOME morning" in said


def test_task_without_its_required_free_space_is_not_started(scratch):
    scratch.storage("sync")
    scratch.task("big", "touch ../ran", minFree={"sync": "900000T"})
    scratch.task("small", "echo small", minFree={"sync": "1K"})
    result = scratch.mission("run")
    assert result.code == 1 and not (scratch.tasks / "ran").exists()
    assert scratch.outcomes() == {"big": "failed", "small": "ok"}
    assert re.search("- big: .*free.*sync|- big: .*sync.*free",
                     log_section(result.out, "Errors"))


def test_invalid_script_fails_only_its_task(scratch):
    scratch.task("crlf", "#!/bin/sh\r\necho x\r\n")
    scratch.task("lost", "#!/no/such/interpreter\n")
    scratch.task("plain").chmod(0o644)
    scratch.task("loose", "#!/bin/bash\necho x\n")
    scratch.task("good", "echo good")
    result = scratch.mission("run")
    assert result.code == 1 and "4 errors" in one_line(result)
    assert "good" in log_texts(result.out)
    for slug in ("crlf", "lost", "plain", "loose"):
        assert re.search(f"- {slug}: ", log_section(result.out, "Errors"))


# Results ---------------------------------------------------------------------


def broken_repository(scratch):
    """A commit that fails: the repository's HEAD is damaged."""
    sync = init_repository(scratch.storage("sync", commit=True))
    scratch.task("hello", 'echo x > "$SYNC_DIR/file"')
    (sync / ".git" / "HEAD").write_text("nonsense\n")


@pytest.mark.parametrize("setup, code, outcome, tasks", [
    (refused_ping,      74, "undelivered", "ok"),   # not delivered, yet good
    (broken_repository, 1,  "failed",  "ok"),
    (failing,           1,  "failed",  "failed"),
])
def test_tasks_housekeeping_and_delivery_decide_the_result_separately(
        scratch, setup, code, outcome, tasks):
    setup(scratch)
    result = scratch.headless()
    last = scratch.history()[-1]
    assert (result.code, last["result"]) == (code, outcome), result
    assert {task["outcome"] for task in last["tasks"]} == {tasks}


# history, log, metrics, logs.keep --------------------------------------------


def test_history_shows_start_duration_and_result(scratch):
    scratch.task("hello", "[ ! -e ../bad ]")
    for number in range(3):
        if number == 2:
            (scratch.tasks / "bad").touch()
        scratch.mission("run")
    told = json.loads(scratch.mission("history", "--json").out)
    assert [run["result"] for run in told] in (
        ["ok", "ok", "failed"], ["failed", "ok", "ok"])
    for run in told:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.*", run["start"])
        assert run["seconds"] >= 0 and run["headless"] is False
        assert [task["slug"] for task in run["tasks"]] == ["hello"]
    text = scratch.mission("history").out
    assert text.count("ok") >= 2 and "failed" in text
    assert told[0]["start"][:10] in text
    spark = [line for line in text.splitlines() if SPARKS & set(line)]
    assert len(spark) == 1 and "hello" in spark[0]
    last = json.loads(scratch.mission("history", "-n", "1", "--json").out)
    assert [run["result"] for run in last] == ["failed"]
    assert len(scratch.mission("history", "-n", "1").out) < len(text)


def test_log_prints_the_newest_run_or_the_named_one(scratch):
    scratch.task("hello", 'echo "run $MISSION_RUN_ID"')
    scratch.headless()
    scratch.headless()
    old, new = [run["id"] for run in scratch.history()]
    assert f"run {new}" in log_texts(scratch.mission("log").out)
    assert f"run {old}" in log_texts(scratch.mission("log", old).out)
    assert f"run {old}" in log_texts(scratch.mission("log", old[:8]).out)
    missing = scratch.mission("log", "ffffffff-0")
    assert missing.code != 0 and "ffffffff-0" in missing.err
    assert missing.out == "" and "Traceback" not in missing.err


def test_logs_keep_removes_the_oldest_run_logs_and_no_other_file(scratch):
    scratch.task("hello", "echo hello")
    scratch.config["logs"] = {"keep": 2}
    strangers = ["notes.txt", "2020-01-01.txt", "2020-01-01-00-00-00.txt.gz"]
    for name in strangers:
        (scratch.logs / name).write_text("mine")
    victim = scratch.folder / "victim"
    victim.write_text("mine")
    (scratch.logs / "2020-01-01-00-00-00.txt").symlink_to(victim)
    for _ in range(4):
        assert scratch.headless().code == 0
    ours = [path for path in scratch.log_files()
            if not path.is_symlink() and path.name not in strangers]
    assert len(ours) == 2 and "hello" in ours[-1].read_text()
    assert victim.read_text() == "mine"
    assert all((scratch.logs / name).exists() for name in strangers)


def test_metrics_file_is_valid_prometheus_text_and_replaced_atomically(
        scratch):
    folder = scratch.make("metrics")
    file = folder / "mission.prom"
    scratch.config["metrics"] = {"textfile": str(file)}
    scratch.task("good")
    scratch.task("bad", "exit 1")
    scratch.headless()
    first = file.stat().st_ino
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"\\\n]*"(,[a-z]+="[^"\\\n]*")*'
                        r'\})? -?[0-9.e+]+')
    lines = file.read_text().splitlines()
    assert all(line.startswith(("# HELP mission_", "# TYPE mission_"))
               or sample.fullmatch(line) for line in lines), lines
    assert any('"good"' in line for line in lines)
    assert any('"bad"' in line for line in lines)
    assert support.mode(file) == 0o644      # another user collects it
    scratch.headless()
    assert file.stat().st_ino != first      # renamed, not rewritten
    assert os.listdir(folder) == ["mission.prom"]


# init, list, check, dump, new, completion ------------------------------------


def test_init_writes_the_sample_and_never_overwrites_a_file(tmp_path):
    sample = (support.ROOT / "mission.sample.json").read_bytes()
    result = bare(tmp_path, "init")
    written = tmp_path / "mission.config.json"
    assert (result.code, result.err) == (0, "")
    assert re.sub(rb'"name": "[^"]+", "email"', b'"name": "root", "email"',
                  written.read_bytes()) == sample
    assert support.mode(written) == 0o600
    written.write_text("mine")
    result = bare(tmp_path, "init")
    assert result.code not in (0, 75) and result.err == (
        "mission: error: mission.config.json already exists\n"
        "mission: hint: mission -c PATH init\n")
    assert written.read_text() == "mine"


def test_init_does_not_follow_a_planted_link(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "mission.config.json").symlink_to(victim)
    assert bare(tmp_path, "init").code != 0
    assert not victim.exists()


def test_list_names_every_task_in_order(scratch):
    scratch.task("zebra", name="Stripes")
    scratch.task("apple", scheduled=False, post=True)
    assert scratch.mission("list").out == "zebra\napple\n"
    told = scratch.mission("list", "-v").out.splitlines()
    assert "Stripes" in told[0] and "scheduled" in told[0]
    assert "Apple" in told[1] and "manual" in told[1]
    tasks = json.loads(scratch.mission("list", "--json").out)
    assert [(task["slug"], task["name"], task["scheduled"], task["post"])
            for task in tasks] == [("zebra", "Stripes", True, False),
                                   ("apple", "Apple", False, True)]


def test_check_of_a_valid_configuration_prints_nothing(scratch):
    scratch.task("hello")
    result = scratch.mission("check")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_dump_fed_back_dumps_the_same(scratch):
    init_repository(scratch.storage("sync", commit=True))
    scratch.config["storage"]["logs"]["path"] = "logs"      # relative
    scratch.task("hello", timeout="90s", retries=2, retryDelay="1m",
                 env={"KEY": "a\u00e4\n"}, nice=3, minFree={"sync": "5G"},
                 parallel="group")
    scratch.task("last", needs=["hello"], post=False)
    scratch.config["filters"] = ["^secret", "\\d+"]
    scratch.config["redact"] = ["token=\\S+"]
    scratch.config["logs"] = {"keep": 9}
    scratch.config["metrics"] = {"textfile": str(scratch.folder / "m.prom")}
    first = scratch.mission("dump")
    assert (first.code, first.err) == (0, "")
    dumped = json.loads(first.out)
    assert dumped["storage"]["logs"]["path"] == str(scratch.logs)
    assert dumped["tasks"][0]["env"] == {"KEY": "a\u00e4\n"}
    elsewhere = scratch.make("elsewhere") / "mission.config.json"
    elsewhere.write_text(first.out)
    elsewhere.chmod(0o600)
    scratch.path = elsewhere
    assert scratch.mission("dump", write=False).out == first.out


def test_new_makes_a_task_that_check_accepts(scratch):
    scratch.task("hello")
    result = scratch.mission("new", "photos")
    run = scratch.tasks / "photos" / "run"
    assert (result.code, result.err) == (0, "")
    assert os.access(run, os.X_OK)
    line = re.search(r"\{.*\"photos\".*\}", result.out)
    scratch.config["tasks"].append(json.loads(line[0]))
    assert scratch.mission("check").code == 0
    # It fails until the user edits it, so no empty backup looks successful.
    fresh = scratch.mission("run", "-t", "photos")
    assert fresh.code == 1 and str(run) in fresh.out
    before = run.read_bytes()
    again = scratch.mission("new", "photos")
    assert again.code != 0 and run.read_bytes() == before


@pytest.mark.parametrize("slug", ["../x", "Photos", "-x", "a/b", "", "a\n"])
def test_new_refuses_an_invalid_slug(scratch, slug):
    scratch.task("hello")
    before = listing(scratch.tasks)
    assert scratch.mission("new", "--", slug).code == 2
    assert listing(scratch.tasks) == before


COMMANDS = "init run list check dump history log new completion".split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_valid_script_of_its_shell(tmp_path, shell):
    result = bare(tmp_path, "completion", shell)
    assert (result.code, result.err) == (0, "")
    for word in (*COMMANDS, "headless", "dry-run", "task", "config"):
        assert re.search(rf"\b{word}\b", result.out), word
    if shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(result.out)
        subprocess.run([shell, "-n", str(script)], check=True)


def test_bash_completes_commands_and_options(scratch):
    support.need("bash")
    scratch.task("photos")
    scratch.task("mail")
    scratch.write()
    script = scratch.mission("completion", "bash").out
    program = scratch.make("bin") / "mission"
    program.write_text("#!/bin/sh\nexec " + shlex.join(MISSION) + ' "$@"\n')
    program.chmod(0o755)

    def completed(*words: str) -> set[str]:
        ask = (script + "\nspec=$(complete -p mission)\n"
               "name=${spec##*-F }; name=${name%% *}\n"
               'COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMP_LINE="$*"\n'
               "COMP_POINT=${#COMP_LINE}\n"
               '"$name" mission "${!#}" "${@:$#-1:1}"\n'
               'printf "%s\\n" "${COMPREPLY[@]}"\n')
        done = subprocess.run(
            ["bash", "-c", ask, "bash", *words], cwd=str(scratch.folder),
            env={**scratch.env, "PATH": f"{program.parent}:"
                 + scratch.env["PATH"]}, stdout=subprocess.PIPE, check=True,
            stderr=subprocess.PIPE, universal_newlines=True, timeout=30)
        return set(done.stdout.split())

    assert completed("mission", "r") == {"run"}
    assert completed("mission", "run", "-t", "ph") == {"photos"}
    assert "--headless" in completed("mission", "run", "--")


# The terminal ----------------------------------------------------------------


def test_colour_is_used_only_on_a_terminal_without_no_color(scratch):
    scratch.task("hello")
    assert "\x1b[" in on_terminal(scratch, "list", "-v")
    assert "\x1b[" not in on_terminal(scratch, "list", "-v", "-C")
    assert "\x1b[" not in on_terminal(scratch, "list", "-v", NO_COLOR="1")
    assert "\x1b[" not in scratch.mission("list", "-v").out


def test_status_line_is_shown_only_on_a_terminal(scratch):
    scratch.task("one", "sleep 1.5")
    scratch.task("two", "echo two")
    shown = on_terminal(scratch, "run")
    assert re.search(r"\b1( of |/)2\b", shown), shown
    piped = scratch.mission("run").out
    scratch.headless()
    for log in (piped, scratch.log()):
        assert not re.search(r"[\x00-\x08\x0b-\x1f]|\b1( of |/)2\b", log)

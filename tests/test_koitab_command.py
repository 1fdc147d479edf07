"""Command: what can be typed, next to a koid that answers from a table."""

from __future__ import annotations

import io
import json
import os
import plistlib
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import servers
import support

koitab = support.load("koitab")
CASES = Path(__file__).parent / "cases"
ME = koitab.Machine().user_name(os.getuid())


class Koid:
    """A daemon that answers from its fields, and records its requests.
    It replaces DaemonClient."""

    def __init__(self):
        self.text, self.daemon, self.output = None, True, b""
        self.runs, self.problems, self.asked = [], [], []
        self.refused, self.last, self.confirm = None, {}, "no"
        self.state = {
            "version": "1.0", "pid": 7, "started": 1e9, "home": "/h",
            "system": False, "jobs": 1, "running": [], "late": [],
            "problems": [], "next": None,
            "tab": {"user": ME, "jobs": 1, "problems": []}}
        self.connection = None

    def ask(self, op: str, **fields) -> dict:
        fields = {name: value for name, value in fields.items()
                  if value or name == "text"}
        self.asked.append((op, fields))
        if self.refused:
            raise self.refused
        return {**getattr(self, f"do_{op}")(fields), "daemon": self.daemon}

    def do_list(self, _fields):
        return {"text": self.text}

    def do_install(self, fields):
        tab = koitab.parse_tab(fields["text"])
        if not tab.errors():
            self.text = fields["text"]
        return {"installed": not tab.errors(),
                "problems": [vars(problem) for problem in tab.diagnostics]}

    def do_remove(self, _fields):
        before, self.text = self.text, None
        return {"removed": before is not None}

    def do_jobs(self, _fields):
        return {"jobs": [
            {"tag": job.tag, "section": job.section, "name": job.name,
             "label": job.label, "user": ME, "when": job.when,
             "words": job.describe(), "line": job.line, "file": "/h/tabs/me",
             "command": job.command, "confirm": self.confirm,
             "params": [vars(param) for param in job.params], "next": None,
             "running": 0, "last": self.last.get(job.label)}
            for job in koitab.parse_tab(self.text or "").jobs]}

    def do_history(self, fields):
        newest = [run for run in self.runs[::-1]
                  if run["run"] < fields.get("before", 10**9)]
        return {"runs": newest[:fields["limit"]]}

    def do_log(self, _fields):
        return {"run": self.runs[-1], "size": len(self.output),
                "output": self.output}

    def do_kill(self, _fields):
        return {"run": self.runs[-1]}

    def do_status(self, _fields):
        return self.state

    def no_daemon(self):
        return koitab.Error("koid is not running", "koid &")

    def attach(self, job, args, user):
        self.asked.append(("run", {"job": job, "args": args, "user": user}))
        return 12, *self.connection


def a_run(number: int = 1, **changes) -> dict:
    return {"run": number, "user": ME, "tag": "t1", "section": "", "name": "",
            "label": "backup", "trigger": "schedule", "state": "done",
            "due": 1e9, "requested_at": None, "started": 1e9,
            "ended": 1e9 + number,
            "exit": 0, "signal": None, "reason": "", "args": {}, "attempt": 1,
            "count": 1, "bytes": 0, "cut": False, **changes}


class Still:
    """A clock that is stopped at Saturday 2026-03-28, 12:00:30 UTC."""

    def now(self) -> float:
        return 1774699230.0

    def ticks(self) -> float:
        return 0.0


@pytest.fixture
def koid(monkeypatch):
    fake = Koid()
    monkeypatch.setattr(koitab, "DaemonClient", lambda machine: fake)
    return fake


@pytest.fixture
def type_in(koid, capfd, monkeypatch, tmp_path):
    """Type a command, with what is typed after it (or what is piped in);
    its status, output and errors."""
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.chdir(tmp_path)
    for name in ("VISUAL", "EDITOR", "KOI_HOME"):
        monkeypatch.delenv(name, raising=False)

    def typed(*argv: str, stdin: str = "", terminal: bool = False,
              called: str = "koitab"):
        raw = io.BytesIO(stdin.encode("utf-8", "surrogateescape"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(
            raw, "utf-8", errors="surrogateescape"))
        monkeypatch.setattr(os, "isatty", lambda fd: terminal)
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: terminal)
        machine = koitab.Machine(Still())
        monkeypatch.setattr(machine, "tab_text", lambda path: stdin
                            if path == "-" else koitab.Machine.tab_text(
                                machine, path))
        status = koitab.main(list(argv), machine, called)
        return support.Result(status, *capfd.readouterr())
    return typed


# --- as crontab(1): install -----------------------------------------------


@pytest.mark.parametrize("argv, stdin", [
    (["tab"], ""), (["-"], "@daily x\n"), ([], "@daily x\n"),
    (["--", "tab"], ""), (["./tab"], "")])
def test_a_tab_is_installed_from_a_file_or_from_standard_input(
        type_in, koid, argv, stdin):
    Path("tab").write_text("@daily x\n")
    done = type_in(*argv, stdin=stdin)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert koid.text == "@daily x\n"


def test_an_empty_file_is_an_empty_tab(type_in, koid):
    assert type_in("-", stdin="").code == 0
    assert koid.text == ""


def test_invalid_tab_is_not_installed_and_every_error_is_reported(
        type_in, koid):
    koid.text = "before\n"
    done = type_in("-", stdin="61 * * * * a\n@dayly b\n5-1 * * * * c\n")
    assert (done.code, done.out, koid.text) == (1, "", "before\n")
    assert done.err == '''\
-:1:1: bad minute: expected 0 to 59, found "61"
-:2:1: bad time specifier: unknown "@dayly" (did you mean @daily?)
-:3:1: warning: odd minute: "5-1" ends before it begins, so it never matches \
(5-59,0-1)
-:3:1: warning: odd schedule: the job never runs
errors in crontab file, can't install.
'''


@pytest.mark.parametrize("text, said", [
    ("@daily x", ["new crontab file is missing newline before EOF, can't "
                  "install."]),
    ("61 * * * * a\n@daily x", [
        "errors in crontab file, can't install.", "new crontab file is "
        "missing newline before EOF, can't install."])])
def test_missing_final_newline_is_reported_with_debians_message(
        type_in, text, said):
    done = type_in("-", stdin=text)
    assert done.code == 1
    assert done.err.splitlines()[-len(said):] == said
    assert done.err.count("can't install") == len(said)


def test_suspicious_tab_is_installed_with_warnings(type_in, koid):
    done = type_in("-", stdin="5-1 * * * * c\n")
    assert (done.code, koid.text) == (0, "5-1 * * * * c\n")
    assert "-:1:1: warning: odd minute" in done.err


def test_tab_is_installed_with_a_warning_while_koid_is_not_running(
        type_in, koid):
    koid.daemon = False
    done = type_in("-", stdin="@daily x\n")
    assert (done.code, koid.text) == (0, "@daily x\n")
    assert done.err.startswith("koitab: warning: koid is not running")


@pytest.mark.parametrize("value, safe", [
    ("a@example.com", True), ("root,b", True), ("", True), ('""', True),
    ("a.b-c_d+e%f!g:h", True), ("x=/y", True), ("$LOGNAME@x", True),
    ("9x", True), ("a b", False), ("-x", False), ("<a@b>", False),
    ("-oQ/tmp", False), ("a;b", False), ("\u00e9@x", False),
    ("|cat", False), (",a", False)])
@pytest.mark.parametrize("way", ["-", "-T"])
def test_unsafe_mail_address_gets_a_warning(type_in, way, value, safe):
    for name in ("MAILTO", "MAILFROM"):
        Path("tab").write_text(f"# hello\n  {name} = {value}\n@daily x\n")
        done = type_in("tab") if way == "-" else type_in("-T", "tab")
        assert done.code == 0
        assert ("tab:2:" in done.err and "unsafe mail" in done.err
                and ": warning: " in done.err) is not safe, done.err


@pytest.mark.parametrize("name, said", [
    ("nothing", "nothing: No such file or directory\n"),
    ("histroy", "histroy: No such file or directory\nkoitab: hint: koitab "
     "history\n"),
    ("", ": No such file or directory\n"),
    (".", ".: Is a directory\n")])
def test_unreadable_file_is_reported_with_crontabs_message(
        type_in, koid, name, said):
    done = type_in(name)
    assert (done.code, done.out, done.err) == (1, "", said)
    assert koid.asked == []


@pytest.mark.parametrize("argv, said", [
    (["-e", "-l"], "only one operation permitted"),
    (["-l", "-T", "x"], "only one operation permitted"),
    (["-l", "x"], "no arguments permitted after this option"),
    (["-T", "a", "b"], "no arguments permitted after this option"),
    (["-r", "run"], "no arguments permitted after this option"),
    (["a", "b"], 'unexpected argument "b"'),
    (["-i"], "-i is not an option of koitab FILE"),
    (["-i", "-l"], "-i is not an option of koitab -l"),
    (["-u", ME, "-T", "x"], "-u is not an option of koitab -T"),
    (["-u", ME], "file name must be specified for replace"),
    (["--json", "x"], "--json is not an option of koitab FILE"),
    (["-n", "x"], "-n x: not a number"), (["-x"], "-x"), (["--nope"], "nope"),
    (["-T"], "-T"), (["-u"], "-u")])
def test_wrong_usage_of_crontabs_options_exits_with_crontabs_status(
        type_in, koid, argv, said):
    done = type_in(*argv)
    assert (done.out, koid.asked) == ("", [])
    assert done.code == 1
    assert said in done.err
    assert all(line.startswith(("koitab: error: ", "koitab: hint: "))
               for line in done.err.splitlines())


def test_call_without_arguments_on_a_terminal_is_wrong_usage(type_in, koid):
    done = type_in(terminal=True)
    assert (done.code, done.out, koid.asked) == (1, "", [])
    assert "file name or - (for stdin) must be specified" in done.err


def test_program_called_crontab_begins_its_messages_with_crontab(
        type_in, koid):
    assert type_in("-l", "-e", called="crontab").err.startswith("crontab: ")
    koid.daemon = False
    assert type_in("-", stdin="", called="crontab").err.startswith(
        "crontab: warning: ")


def test_crontab_suggests_a_path_for_a_file_named_like_a_command(
        type_in, koid):
    Path("status").write_text("@daily x\n")
    done = type_in("status", called="crontab")
    assert (done.code, koid.asked) == (1, [])
    assert "crontab ./status" in done.err
    assert type_in("./status", called="crontab").code == 0
    assert koid.text == "@daily x\n"


# --- as crontab(1): -u, -l, -r --------------------------------------------


@pytest.fixture
def as_alice(monkeypatch):
    """The kernel says alice; root and koid remain what they are."""
    monkeypatch.setattr(os, "getuid", lambda: 1500)
    monkeypatch.setattr(koitab.Machine, "login_name", lambda self: "alice")


@pytest.mark.parametrize("argv", [["-l"], ["-e"], ["-r"], ["tab"],
                                  ["run", "x"], ["next"], ["history"],
                                  ["log", "1"], ["kill", "1"], ["import"]])
def test_option_u_is_refused_to_other_users_in_any_environment(
        type_in, koid, as_alice, monkeypatch, argv):
    for name in ("USER", "LOGNAME", "SUDO_USER"):
        monkeypatch.setenv(name, "root")
    Path("tab").write_text("@daily x\n")
    done = type_in("-u", "root", *argv)
    assert (done.code, done.out, koid.asked) == (1, "", [])
    assert done.err == "must be privileged to use -u\n"


def test_option_u_with_the_callers_own_name_is_allowed(
        type_in, koid, as_alice, monkeypatch):
    import pwd
    monkeypatch.setattr(pwd, "getpwnam", lambda name: name)
    koid.text = "@daily x\n"
    assert type_in("-u", "alice", "-l").out == "@daily x\n"
    assert koid.asked == [("list", {"user": "alice"})]


def test_unknown_user_is_refused(type_in, koid, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    done = type_in("-u", "no\x1bbody", "-l", called="crontab")
    assert (done.code, koid.asked) == (1, [])
    assert done.err == "crontab:  user `no\\x1bbody' unknown\n"


@pytest.mark.parametrize("argv", [["-l"], ["-r"], ["next"]])
def test_missing_tab_is_reported_with_crontabs_message(type_in, argv):
    done = type_in(*argv)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"no crontab for {ME}\n"


HOSTILE = "@daily a\r@daily b\t\x08\x1b[2J\u202e\udcff\n# c\n"


def test_option_l_prints_every_byte_of_the_tab(koid, capfdbinary):
    koid.text = HOSTILE
    koitab.main(["-l"])
    assert capfdbinary.readouterr().out == HOSTILE.encode(
        "utf-8", "surrogateescape")


def test_option_l_escapes_control_characters_on_a_terminal(type_in, koid):
    koid.text = HOSTILE
    assert type_in("-l", terminal=True).out == (
        "@daily a\\x0d@daily b\t\\x08\\x1b[2J\\u202e\\udcff\n# c\n")
    koid.text = ""
    assert type_in("-l", terminal=True).out == ""


def test_option_r_removes_the_tab_without_confirmation(type_in, koid):
    koid.text = "x"
    assert type_in("-r", stdin="n\n").code == 0
    assert koid.text is None


@pytest.mark.parametrize("typed, removed, asked", [
    ("y\n", True, 1), ("Yes\n", True, 1), ("n\n", False, 1),
    ("NO\n", False, 1), ("", False, 1), ("maybe\n\ny\n", True, 3),
    ("what\n", False, 2), ("y", True, 1)])
@pytest.mark.parametrize("argv", [["-r", "-i"], ["-ir"]])
def test_option_i_repeats_its_question_until_yes_or_no(
        type_in, koid, argv, typed, removed, asked):
    koid.text = "x"
    done = type_in(*argv, stdin=typed, called="crontab")
    assert (done.code, done.out) == (0, "")
    assert (koid.text is None) is removed
    question = f"crontab: really delete {ME}'s crontab? (y/n) "
    assert done.err.count(question) == asked
    assert done.err.count("Enter Y or N") == asked - 1


def test_error_of_koid_is_printed_unchanged(type_in, koid):
    koid.refused = koitab.Error(
        "You (alice) are not allowed to use this program (koitab)",
        "see /etc/koi.allow")
    for argv in (["-l"], ["-r"], ["-e"], ["-"], ["history"]):
        done = type_in(*argv)
        assert done.code == 1
        assert done.err == ("koitab: error: You (alice) are not allowed to "
                            "use this program (koitab)\n"
                            "koitab: hint: see /etc/koi.allow\n")


# --- as crontab(1): -e ----------------------------------------------------


@pytest.mark.parametrize("visual, editor, words", [
    ("vi -u x", "no", ["vi", "-u", "x"]), ("", "vi; id", ["vi;", "id"]),
    (None, "'my editor' -c \"a b\"", ["my editor", "-c", "a b"]),
    ("  ", "nano", ["nano"]), (None, "$(id)", ["$(id)"])])
def test_the_editor_is_split_as_sh_does_and_no_shell_reads_it(
        monkeypatch, visual, editor, words):
    for name, value in (("VISUAL", visual), ("EDITOR", editor)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert koitab.editor() == words


def test_usual_editors_are_tried_if_none_is_set(monkeypatch, tmp_path):
    for name in ("VISUAL", "EDITOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(koitab.Error, match="no editor found"):
        koitab.editor()
    for program in ("nano", "vi", "sensible-editor"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
        assert koitab.editor() == [program]


def test_an_editor_with_an_open_quote_is_an_error(type_in, koid, monkeypatch):
    koid.text = "x\n"
    monkeypatch.setenv("EDITOR", "vi 'x")
    done = type_in("-e")
    assert done.code == 1
    assert "EDITOR cannot be read" in done.err


def test_draft_is_accessible_to_the_caller_only():
    draft = koitab.EditSession(koitab.Invocation(koitab.Machine()),
                               "a\udcff\n")
    try:
        assert support.mode(draft.directory) == 0o700
        assert support.mode(draft.path) == 0o600
        assert draft.text() == "a\udcff\n"
    finally:
        draft.remove()
    assert not os.path.exists(draft.directory)


def swap_link(path: str) -> None:
    os.symlink("/etc/passwd", path)


def swap_large(path: str) -> None:
    Path(path).write_bytes(b"#" * (koitab.LONGEST_TAB + 1))


@pytest.mark.parametrize("swap, why", [
    (swap_link, "a symbolic link"), (os.mkfifo, "not a regular file"),
    (os.mkdir, "not a regular file"), (swap_large, "larger than"),
    (lambda path: None, "it was removed")])
def test_replaced_draft_is_refused_before_it_is_read(swap, why):
    draft = koitab.EditSession(koitab.Invocation(koitab.Machine()), "")
    try:
        os.unlink(draft.path)
        swap(draft.path)
        with pytest.raises(koitab.Error, match=why):
            draft.text()
    finally:
        draft.remove()


@support.root_only
def test_draft_owned_by_another_user_is_not_read():
    draft = koitab.EditSession(koitab.Invocation(koitab.Machine()), "")
    try:
        os.chown(draft.path, support.ALICE_UID, -1)
        with pytest.raises(koitab.Error, match="owned by uid 1500"):
            draft.text()
    finally:
        draft.remove()


def test_template_without_its_comment_marks_is_a_valid_tab():
    assert koitab.parse_tab(koitab.TEMPLATE).jobs == []
    lines = [line[2:] for line in koitab.TEMPLATE.splitlines()
             if line[2:3] in tuple('[@"0123456789') or "=" in line[:14]]
    tab = koitab.parse_tab("\n".join(lines) + "\n")
    assert tab.diagnostics == []
    assert [(job.section, job.name, job.when) for job in tab.jobs] == [
        ("", "", "30 2 * * *"), ("Backups", "Work", "30 3 * * mon-fri"),
        ("Backups", "Say Hi", "@manual")]
    assert tab.jobs[1].environment == {"MAILTO": "root", "KOI_TIMEOUT": "1h"}
    assert max(map(len, koitab.TEMPLATE.splitlines())) < 80


# --- run ------------------------------------------------------------------

FORM = ('[Bots]\n"Say Hi" @manual say {{To Handle}} {{N, int, 1}} '
        '{{How, choice(a|b), a}} {{Loud, bool, false}} {{a, string, x}} '
        '{{a=b, string, y}}\n"Plain" @daily true\n[Other]\n"Plain" @daily x\n'
        '"Pw" @manual log-in {{Pin, secret}}\n')
USUAL = {"N": "1", "How": "a", "Loud": "false", "a": "x", "a=b": "y"}


@pytest.fixture
def run(type_in, koid):
    """`koitab run` next to a job that wrote some frames and ended."""
    koid.text = FORM
    ours, theirs = socket.socketpair()

    def ran(*argv, frames=(), exit=0, signal=None, reason="", cut=10**9,
            **how):
        end = json.dumps({"exit": exit, "signal": signal, "reason": reason})
        data = b"".join(koitab.frame(stream, 0, text) for stream, text in (
            *frames, (koitab.END, end.encode())))
        koid.connection = ours, data[:cut]
        theirs.sendall(data[cut:])
        theirs.shutdown(socket.SHUT_WR)
        return type_in("run", *argv, **how)
    yield ran
    theirs.close()
    ours.close()


def test_job_gets_the_given_values_and_the_defaults_of_the_others(run, koid):
    done = run("Say Hi", "To Handle=@bob=x y", "N=-5", "a=b=1", "Loud=true")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert koid.asked[-1] == ("run", {
        "job": koitab.parse_tab(FORM).jobs[0].tag, "user": ME,
        "args": {**USUAL, "To Handle": "@bob=x y", "N": "-5", "a=b": "1",
                 "Loud": "true"}})


@pytest.mark.parametrize("words, said", [
    (["x"], 'unexpected argument "x"'),
    (["To Handl=x"], 'no argument "To Handl"\nkoitab: hint: did you mean '
     '"To Handle"?'),
    (["N=1", "N=2", "To Handle=x"], 'duplicate argument "N"'),
    (["To Handle=x", "N=five"],
     '"N": expected a whole number of at most 18 digits'),
    (["To Handle=x", "N=\uff15"], '"N": expected a whole number'),
    (["To Handle=x", "How=c"], '"How": expected one of a|b'),
    (["To Handle=x", "Loud=yes"], '"Loud": expected true or false'),
    (["To Handle=a\x1bb"], "control character"),
    (["To Handle=\udcff"], "not valid UTF-8"),
    ([], 'missing argument "To Handle"\nkoitab: hint: koitab run '
     "'Say Hi' 'To Handle=VALUE'")])
def test_invalid_argument_is_refused(run, koid, words, said):
    done = run("Say Hi", *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert [op for op, _ in koid.asked] == ["jobs"]


def test_hint_for_a_missing_secret_does_not_put_it_on_the_command_line(run):
    assert run("Pw").err == ('koitab: error: missing argument "Pin"\n'
                             'koitab: hint: koitab run Pw Pin=-\n')


def test_secret_on_the_command_line_is_refused(run, koid):
    done = run("Pw", "Pin=hunter2")
    assert (done.code, done.out, done.err) == (
        2, "", 'koitab: error: "Pin" is secret, but other users can read '
        "command lines\nkoitab: hint: koitab run Pw Pin=-\n")
    assert [op for op, _ in koid.asked] == ["jobs"]


@pytest.mark.parametrize("name, tag_of", [
    ("Bots/Plain", 1), ("Other/Plain", 2)])
def test_job_is_found_by_each_of_its_names(run, koid, name, tag_of):
    tag = koitab.parse_tab(FORM).jobs[tag_of].tag
    assert run(name).code == 0
    assert koid.asked[-1][1]["job"] == tag


@pytest.mark.parametrize("name, said", [
    ("3", 'error: 3 is not the name of a job; the job on line 3 is "Plain"\n'
     "koitab: hint: koitab run " + koitab.parse_tab(FORM).jobs[1].tag),
    ("Plain", 'error: 2 jobs are named "Plain": Bots/Plain, Other/Plain'),
    ("Say Hj", 'no job named "Say Hj"\nkoitab: hint: did you mean "Say '
     'Hi"?')])
def test_unknown_or_ambiguous_job_is_refused(run, name, said):
    done = run(name)
    assert (done.code, done.out) == (1, "")
    assert said in done.err


@pytest.mark.parametrize("name, owner, meant", [
    ("Deploy", "root", 1), ("Deploy", "alice", 0), ("Hers", "alice", 2),
    ("Hers", "root", "root has no job named \"Hers\""),
    ("Hers", "", 2), ("Deploy", "", '2 jobs are named "Deploy"'),
    ("None", "root", 'no job named "None"')])
def test_job_of_the_named_user_is_run(name, owner, meant):
    jobs = [{"name": name, "user": user, "line": 1, "section": "",
             "command": "", "tag": "t"} for name, user in (
                 ("Deploy", "alice"), ("Deploy", "root"), ("Hers", "alice"))]
    if isinstance(meant, int):
        assert koitab.find_job(jobs, name, owner) == jobs[meant]
        return
    with pytest.raises(koitab.Error, match=re.escape(meant)):
        koitab.find_job(jobs, name, owner)


def test_values_are_read_from_standard_input(run, koid):
    assert run("Pw", "Pin=-", stdin="se cret\n").code == 0
    assert koid.asked[-1][1]["args"] == {"Pin": "se cret"}


def test_standard_input_that_is_not_text_is_refused(run, koid):
    assert run("Pw", "Pin=-", stdin="\udcff\n").code == 2
    assert [op for op, _ in koid.asked] == ["jobs"]


def test_missing_values_are_prompted_for_on_a_terminal(run, koid):
    done = run("Say Hi", "N=2", stdin="a\x1bb\n@bob\n", terminal=True)
    assert done.code == 0
    assert done.err == ("To Handle:   contains a control character\n"
                        "To Handle: ")
    assert koid.asked[-1][1]["args"] == {**USUAL, "N": "2",
                                         "To Handle": "@bob"}


def test_prompt_without_an_answer_starts_no_run(run, koid):
    done = run("Say Hi", stdin="", terminal=True)
    assert done.code == 1
    assert "so the job was not started" in done.err
    assert [op for op, _ in koid.asked] == ["jobs"]


def test_prompt_for_a_secret_does_not_echo(run, koid, monkeypatch):
    import getpass
    monkeypatch.setattr(getpass, "getpass", lambda question: "1234"
                        if question == "Pin (secret): " else "")
    assert run("Pw", terminal=True).code == 0
    assert koid.asked[-1][1]["args"] == {"Pin": "1234"}


@pytest.mark.parametrize("confirm, terminal, typed, ran", [
    ("yes", True, "y\n", True), ("yes", True, "n\n", False),
    ("yes", True, "", False), ("yes", False, "", True),
    ("no", True, "", True), ("cli", True, "", True)])
def test_job_with_koi_confirm_prompts_on_a_terminal(
        run, koid, confirm, terminal, typed, ran):
    koid.confirm = confirm
    done = run("Bots/Plain", stdin=typed, terminal=terminal)
    assert ("Run Plain? (y/n) " in done.err) is (
        confirm == "yes" and terminal)
    assert ("run" in [op for op, _ in koid.asked]) is ran
    assert done.code == (0 if ran else 1)


def test_run_does_not_prompt_while_koid_is_not_running(run, koid):
    koid.daemon = False
    done = run("Say Hi", terminal=True)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("koitab: error: koid is not running")


@pytest.mark.parametrize("cut", [0, 1, 8, 9, 12, 30, 1000])
def test_output_is_printed_to_the_stream_the_job_wrote_to(run, cut):
    """However the frames are cut on their way."""
    done = run("Bots/Plain", frames=[
        (1, b"out\n"), (2, b"err\xc3"), (2, b"\xa9\n"), (0, b"a note"),
        (1, b"\x1b[31mred\x1b[2J\n")], cut=cut)
    assert done.code == 0
    assert done.out == "out\n\x1b[31mred\x1b[2J\n"
    assert done.err == "err\u00e9\nkoitab: a note\n"


@pytest.mark.parametrize("end, status, said", [
    ({"exit": 0}, 0, ""), ({"exit": 3}, 3, ""), ({"exit": 255}, 255, ""),
    ({"exit": None, "signal": 9}, 137, "killed by signal 9 (SIGKILL)"),
    ({"exit": None, "signal": 33}, 161, "killed by signal 33"),
    ({"exit": None, "signal": 15, "reason": "timeout after 10m0s"}, 143,
     "timeout after 10m0s"),
    ({"exit": None, "reason": "the previous run was still running"}, 1,
     "the previous run was still running")])
def test_run_exits_with_the_status_of_the_job(run, end, status, said):
    done = run("Bots/Plain", **end)
    assert (done.code, done.out) == (status, "")
    assert done.err == (f"koitab: {said}\n" if said else "")


def test_run_continues_when_the_connection_to_koid_is_lost(type_in, koid):
    koid.text = FORM
    ours, theirs = socket.socketpair()
    koid.connection = ours, b""
    theirs.close()
    done = type_in("run", "Bots/Plain")
    assert done.code == 1
    assert done.err == (
        "koitab: run 12 continues (koitab log 12; koitab kill 12)\n"
        "koitab: error: lost the connection to koid\n"
        "koitab: hint: koitab status\n")


def test_first_two_interrupts_reach_the_job_and_the_third_detaches(capsys):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        follower = koitab.RunAttachment(koitab.Invocation(None), 12, ours,
                                        b"")
        follower.on_signal(2, None)
        assert capsys.readouterr().err == ""
        follower.on_signal(2, None)
        assert "press Ctrl-C again" in capsys.readouterr().err
        with pytest.raises(koitab.Detached):
            follower.on_signal(2, None)
        assert theirs.recv(9) == bytes([2, 15])


# --- what others printed, on a terminal -----------------------------------


@pytest.fixture
def printed(monkeypatch):
    """What OutputPrinter prints of frames on a terminal: stdout, stderr."""
    def show(*frames, raw: bool = False) -> list[bytes]:
        found = [b"", b"", b""]

        def keep(stream: int, data: bytes) -> None:
            found[stream] += data
        monkeypatch.setattr(koitab, "write_all", keep)
        monkeypatch.setattr(os, "isatty", lambda _fd: True)
        output = koitab.OutputPrinter(koitab.Invocation(None), raw)
        for stream, data in frames:
            output.write(stream, data)
        output.flush()
        return found[1:]
    return show


HARMFUL = [     # bytes of a job, and what a terminal gets
    (b"\x1b]0;title\x07x\n", b"\\x1b]0;title\\x07x\n"),
    (b"\x1b[2Jx\n", b"\\x1b[2Jx\n"),
    ("\x9b2J\u061c\u202e\u2066\u206a\ufeff\n".encode(),
     b"\\x9b2J\\u061c\\u202e\\u2066\\u206a\\ufeff\n"),
    (b"\x9b2J\xff\n", b"\\x9b2J\\xff\n"),
    (b"a\rb\r\nc\n", b"a\\x0db\nc\n"),
    (b"\x1b[31mred\n", b"\x1b[31mred\n\x1b[0m"),
    (b"a\x1b[", b"a\\x1b[\n"), (b"half \xc3", b"half \\xc3\n"),
    ("caf\u00e9 \U0001f603\t\n".encode(), None), (b"", None)]


@pytest.mark.parametrize("data, shown", HARMFUL)
def test_output_is_printed_to_a_terminal_without_control_characters(
        printed, data, shown):
    shown = data if shown is None else shown
    for stream in (koitab.STDOUT, koitab.STDERR):
        whole = printed((stream, data))
        pieces = printed(*((stream, data[at:at + 1])
                           for at in range(len(data))))
        assert whole[stream - 1] == shown
        assert pieces == whole


def test_colours_of_a_job_end_before_a_message_of_koi(printed, capsys):
    out, err = printed((koitab.STDOUT, b"\x1b[8mhidden"),
                       (koitab.NOTE, b"a \x1b note"))
    assert (out, err) == (b"\x1b[8mhidden\x1b[0m\n", b"")
    assert capsys.readouterr().err == "koitab: a \\x1b note\n"


def test_output_of_the_callers_own_job_is_printed_unchanged(printed):
    data = b"\x1b[2J\x9b\rx"
    assert printed((koitab.STDOUT, data), raw=True)[0] == data


def test_json_on_a_terminal_has_escaped_controls_and_equal_values(capsys):
    value = {"a": "\x1b\x7f\x9b\u061c\u202e\ufeff\udcff\u00e9\n"}
    koitab.print_json(value)
    text = capsys.readouterr().out
    assert json.loads(text) == value
    assert all(character.isprintable() or character == "\n"
               for character in text) and "\u00e9" in text


# --- history, log, status, kill -------------------------------------------


@pytest.mark.parametrize("changes, words", [
    ({}, "ok"), ({"exit": 3}, "exit 3"),
    ({"exit": None, "signal": 9}, "killed by signal 9 (SIGKILL)"),
    ({"exit": None, "signal": 9, "reason": "killed by alice"},
     "killed by signal 9 (SIGKILL): killed by alice"),
    ({"exit": None, "signal": 15, "reason": "timeout after 10m0s"},
     "stopped: time limit of 10m0s reached (KOI_TIMEOUT)"),
    ({"exit": 1, "attempt": 2}, "exit 1, attempt 2"),
    ({"state": "missed", "count": 12}, "missed x12"),
    ({"state": "missed"}, "missed"),
    ({"state": "interrupted"}, "interrupted"),
    ({"state": "skipped", "reason": "the previous run was still running"},
     "skipped: the previous run was still running"),
    ({"state": "unstartable", "reason": "no such user"},
     "failed to start: no such user"),
    ({"state": "running"}, "running"), ({"state": "queued"}, "queued")])
def test_result_of_a_run_is_described_in_words(changes, words):
    assert koitab.result_words(a_run(**changes)) == words


@pytest.mark.parametrize("durations, line", [
    ([], ""), ([0.0], "▁"), ([1, 2, 3, 4, 5, 6, 7, 8], "▂▃▄▅▆▇██"),
    ([0, 100], "▁█")])
def test_durations_are_drawn_as_a_sparkline(durations, line):
    assert koitab.sparkline(durations) == line


def test_history_is_a_table_with_the_newest_at_the_end(type_in, koid):
    koid.runs = [a_run(1), a_run(2, trigger="manual", exit=3), a_run(
        3, label="x" * 50, tag="t2", state="missed", started=None,
        ended=None, count=2), a_run(4, user="b+b", label="a\x1bb", tag="t3")]
    done = type_in("history")
    assert (done.code, done.err) == (0, "")
    assert done.out == '''\
  RUN  STARTED                    JOB                       BY          TOOK  \
RESULT
    1  2001-09-09T01:46:40+00:00  backup                    schedule      1s  \
ok
    2  2001-09-09T01:46:40+00:00  backup                    manual        2s  \
exit 3
    3  2001-09-09T01:46:40+00:00  xxxxxxxxxxxxxxxxxxxxxxxx  schedule       -  \
missed x2
    4  2001-09-09T01:46:40+00:00  b+b: a\\x1bb               schedule      4s\
  ok

How long the jobs took, the newest on the right:
backup                    ▅█  2s
b+b: a\\x1bb               █  4s
'''


def test_history_can_be_limited_to_one_job_and_printed_as_json(type_in, koid):
    koid.runs = [a_run(number) for number in range(1, 31)]
    done = type_in("history", "backup", "-n", "3", "--json")
    assert [run["run"] for run in json.loads(done.out)] == [28, 29, 30]
    assert koid.asked == [("history", {"job": "backup", "limit": 3})]


def test_history_requests_pages_until_it_has_enough_runs(
        type_in, koid, monkeypatch):
    monkeypatch.setattr(koitab, "PAGE_OF_RUNS", 10)
    koid.runs = [a_run(number) for number in range(1, 31)]
    for number, shown in ((25, 25), (99, 30)):
        done = type_in("history", "-n", str(number), "--json")
        assert [run["run"] for run in json.loads(done.out)] == list(
            range(31 - shown, 31))


def test_history_without_runs_says_so(type_in):
    done = type_in("history")
    assert (done.code, done.out) == (0, "")
    assert done.err == "koitab: no runs recorded\n"
    assert type_in("history", "--json").out == "[]\n"


def frames(*parts) -> bytes:
    return b"".join(koitab.frame(stream, at, data)
                    for at, (stream, data) in enumerate(parts))


@pytest.mark.parametrize("which, fields", [
    ("7", {"run": 7}), ("backup", {"job": "backup"}), ("0", {"job": "0"})])
def test_log_accepts_a_run_number_or_a_job_name(type_in, koid, which, fields):
    koid.runs = [a_run()]
    koid.output = frames((1, b"a\n"), (2, b"b"), (0, b"9 bytes left out "
                         b"here"), (1, b"\x1b[2J\xc3\xa9"))
    done = type_in("log", which)
    assert koid.asked == [("log", fields)]
    assert (done.code, done.out) == (0, "a\n\x1b[2J\u00e9")
    assert done.err == "bkoitab: 9 bytes left out here\n"


def test_log_as_json_has_the_run_and_its_output(type_in, koid):
    koid.runs, koid.output = [a_run()], frames(
        (1, b"a\n"), (2, b"\xff"), (0, b"note"), (3, b"{}"))
    found = json.loads(type_in("log", "1", "--json").out)
    assert found.pop("frames") == [
        {"stream": "stdout", "ms": 0, "text": "a\n"},
        {"stream": "stderr", "ms": 1, "text": "\\xff"},
        {"stream": "note", "ms": 2, "text": "note"}]
    assert found == {**a_run(), "due": WRITTEN, "started": WRITTEN,
                     "ended": WRITTEN.replace("40+", "41+")}


WRITTEN = "2001-09-09T01:46:40+00:00"       # of 1e9, in RFC 3339


@pytest.mark.parametrize("seconds, written", [
    (1e9, WRITTEN), (1e9 + 0.25, "2001-09-09T01:46:40.250000+00:00"),
    (None, None)])
def test_times_in_json_are_rfc_3339(type_in, koid, seconds, written):
    koid.text, run = "@daily backup\n", a_run(started=seconds, exit=1)
    koid.runs, koid.last = [run], {"backup": run}
    koid.state.update(started=seconds, running=[run], next=seconds)
    history, = json.loads(type_in("history", "--json").out)
    status = json.loads(type_in("status", "--json").out)
    log = json.loads(type_in("log", "1", "--json").out)
    for found in (history, log, status, status["running"][0],
                  status["failed"][0]["last"]):
        assert found["started"] == written
    assert status["next"] == written
    assert history["run"] == 1 and history["exit"] == 1


@pytest.mark.parametrize("parts, shown", [
    ([b"a\n"], "a\n"), ([b"a"], "a\n"), ([b"\x1b]0;x\x07\n"],
                                         "\\x1b]0;x\\x07\n"),
    ([b"\x1b[1;31mred\x1b[0m\n"], "\x1b[1;31mred\x1b[0m\n\x1b[0m"),
    ([b"\x1b[3", b"1mred\n"], "\x1b[31mred\n\x1b[0m"),
    ([b"\xc3", b"\xa9\n"], "\u00e9\n"), ([b"\xc2\x9b2J\n"], "\\x9b2J\n"),
    ([b"1%\r2%\r\n"], "1%\\x0d2%\n"), ([b"\xe2\x80\xae\n"], "\\u202e\n"),
    ([b"a\tb\n"], "a\tb\n")])
def test_log_on_a_terminal_keeps_colours_and_escapes_other_controls(
        type_in, koid, parts, shown):
    koid.runs, koid.output = [a_run()], frames(*((1, p) for p in parts))
    assert type_in("log", "1", terminal=True).out == shown


def test_log_of_an_active_run_says_that_it_is_running(type_in, koid):
    koid.runs = [a_run(5, state="running", ended=None)]
    assert type_in("log", "5").err == "koitab: run 5: running\n"


def test_kill_asks_koid_to_stop_the_named_run(type_in, koid):
    koid.runs = [a_run(5)]
    assert type_in("kill", "5").out == (
        "stopping run 5 (backup): SIGTERM sent, SIGKILL in 10s\n")
    assert koid.asked == [("kill", {"run": 5})]
    for which in ("0", "x", "-1", "\u0665"):    # not numbers of runs
        assert type_in("kill", "--", which).code == 0
        assert koid.asked[-1] == ("kill", {"job": which})


def test_status_without_problems_is_exit_status_0(type_in, koid):
    koid.text = "@daily backup\n"
    koid.last = {"backup": a_run()}
    koid.state.update(next=1e9, running=[a_run(8, state="running")])
    done = type_in("status")
    assert (done.code, done.err) == (0, "")
    assert done.out == f'''\
koid      1.0, pid 7, since 2001-09-09T01:46:40+00:00, /h
tab       {ME}: 1 job
running   8 backup, since 2001-09-09T01:46:40+00:00 (schedule)
next      2001-09-09T01:46:40+00:00
'''


@pytest.mark.parametrize("what, said", [
    ({"late": ["backup"]}, "late      backup"),
    ({"problems": ["the disk is full"]}, "problem   the disk is full"),
    ({"tab": {"user": "a", "jobs": 0, "problems": ["tab:1:1: bad minute"]}},
     "          tab:1:1: bad minute"),
    (a_run(9, exit=3), "failed    backup: exit 3 at 2001-09-09T01:46:40+00:00"
     " (koitab log 9)"),
    (a_run(9, state="missed"), "failed    backup: missed at"),
    (a_run(9, state="interrupted"), "failed    backup: interrupted at"),
    (a_run(9, exit=None, signal=9), "failed    backup: killed by signal 9")])
def test_status_with_a_problem_is_exit_status_1(type_in, koid, what, said):
    koid.text = "@daily backup\n"
    if "run" in what:
        koid.last = {"backup": what}
    else:
        koid.state.update(what)
    done = type_in("status")
    assert done.code == 1
    assert said in done.out
    assert type_in("status", "--json").code == 1


def test_status_describes_the_tab_while_koid_is_not_running(type_in, koid):
    koid.text = "@daily backup\n"

    def do_status(_fields):
        raise koitab.Error("koid is not running", "systemctl start koid")
    koid.do_status = do_status
    done = type_in("status")
    assert done.code == 1
    assert done.out == ("koid      koid is not running (systemctl start koid)"
                        "\ntab       1 job\n")


def test_problem_of_the_tab_is_shown_once(type_in, koid):
    koid.state["tab"]["problems"] = ["tab:1:1: bad minute"]
    koid.state["problems"] = ["/h/tabs/me:1:1: bad minute", "another"]
    done = type_in("status")
    assert done.out.count("bad minute") == 1
    assert "problem   another\n" in done.out


# --- next, of what is installed -------------------------------------------


def test_next_shows_the_starts_of_the_installed_tab(type_in, koid):
    koid.text = '[S]\n"N" 30 2 * * * x\n61 * * * * y\n'
    done = type_in("next", "-n", "1")
    assert done.code == 1
    assert done.out == "[S]\nN: At 02:30\n    2026-03-29T02:30:00+00:00 " \
        "(in 14 h)\n"
    assert done.err.startswith(f"crontab of {ME}:3:1: bad minute")
    found = json.loads(type_in("next", "N", "--json").out)
    assert [(row["name"], row["file"], len(row["next"])) for row in found] \
        == [("N", f"crontab of {ME}", 5)]


@support.root_only
def test_next_shows_the_system_tabs_to_root(
        type_in, koid, monkeypatch, tmp_path):
    monkeypatch.setattr(koitab, "SYSTEM_TABS", (f"{tmp_path}/cron.d/",))
    path = tmp_path / "cron.d" / "pkg"
    monkeypatch.setattr(koid, "do_list", lambda fields: {
        "text": "@daily x\n", "served": {
            str(path): "5 4 * * * www-data tidy\n"}})
    done = type_in("next", "-n1")
    assert done.out == (
        "x: At 00:00\n    2026-03-29T00:00:00+00:00 (in 11 h)\n"
        f"# {path}\ntidy: At 04:05\n    2026-03-29T04:05:00+00:00 (in 16 h)\n"
    )


# --- import ---------------------------------------------------------------


@pytest.fixture
def imported(type_in, monkeypatch):
    """Import these crontabs, as root or for a user; the result passes the
    test of tabs, always."""
    def done(*tabs, argv=("import",), user="root"):
        monkeypatch.setattr(koitab, "find_crontabs", lambda options: [
            koitab.Crontab(path, path.rpartition("/")[2], text, system)
            for path, text, system in tabs])
        monkeypatch.setattr(koitab.Machine, "login_name", lambda self: user)
        monkeypatch.setattr(koitab.Machine, "crons", lambda self: [])
        result = type_in(*argv)
        assert result.code == 0, result.err
        test = type_in("-T", "-", stdin=result.out)
        assert test.code == 0, test.err + result.out
        return result
    return done


def live(text: str) -> list[str]:
    """Return the lines that are not comments."""
    return [line for line in text.splitlines()
            if line and not line.startswith("#")]


def test_a_crontab_is_imported_with_its_comments(imported):
    done = imported(("crontab of root", "# mine\nMAILTO=me\n\n"
                     "*/5\t* * * * a  b \n@reboot c\n", False))
    assert done.out == '''\
# What cron runs, as a koitab: koitab import

[crontab of root]
# crontab of root
# mine
MAILTO=me

*/5\t* * * * a  b \n@reboot c
'''
    assert "2 jobs of root; install them: koitab import > tab; koitab tab" \
        in done.err


@support.root_only     # a "-" before the time is root's
def test_import_removes_the_user_column_of_a_system_tab(imported):
    done = imported(("/etc/crontab", "17 *\t* * *\troot\tcd / && x\n"
                     "-5 4 * * * root root root\n@daily root -n y\n"
                     "@hourly  root   z\n", True))
    assert live(done.out) == [
        "[crontab]", "17 *\t* * *\tcd / && x", "-5 4 * * * root root",
        "@daily -n y", "@hourly  z"]


def test_import_comments_jobs_of_other_users_with_install_commands(imported):
    done = imported(("/etc/cron.d/pkg", "1 2 * * * root a\n"
                     "3 4 * * * www-data b\n5 6 * * * www-data c\n"
                     "7 8 * * * root d\n", True))
    assert live(done.out) == ["[pkg]", "1 2 * * * a", "7 8 * * * d"]
    assert "".join(f"{line}\n" for line in (
        "1 2 * * * a", "# koitab import: this is for www-data: koitab -u "
        "www-data import | koitab -u www-data -", "# 3 4 * * * b",
        "# 5 6 * * * c", "7 8 * * * d")) in done.out


@support.root_only
def test_import_for_another_user_has_only_the_jobs_of_that_user(imported):
    done = imported(
        ("crontab of daemon", "@daily own\n", False),
        ("/etc/cron.d/a", "1 2 * * * root a\n-3 4 * * * daemon b\n", True),
        ("/etc/cron.d/b", "# b's\n1 2 * * * root c\n", True),
        argv=("-u", "daemon", "import"))
    assert live(done.out) == ["[crontab of daemon]", "@daily own", "[a]",
                              "3 4 * * * b"]
    assert "b's" not in done.out
    assert "koitab -u daemon import > tab; koitab -u daemon tab" in done.err


def test_imported_assignments_do_not_apply_to_the_next_file(imported):
    done = imported(
        ("/etc/crontab", "SHELL=/bin/bash\nPATH=/opt\nMAILTO=\nHOME=/x\n"
         "TZ=Asia/Tokyo\nCRON_TZ=Asia/Tokyo\nRANDOM_DELAY=5\nFOO=bar\n"
         "@daily root a\n", True),
        ("/etc/cron.d/b", "@daily root b\nPATH=/b\n@daily root c\n", True),
        ("/etc/cron.d/c", "@daily root d\n", True))
    jobs = {job.command: job for job in koitab.parse_tab(done.out).jobs}
    root = {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "MAILTO": "root",
            "HOME": "/root", "TZ": ":/etc/localtime", "CRON_TZ": "",
            "RANDOM_DELAY": "0", "FOO": ""}
    assert jobs["a"].environment["PATH"] == "/opt"
    assert jobs["b"].environment == root
    assert (jobs["b"].settings.zone, jobs["b"].settings.random_delay) == (
        "", 0)
    assert jobs["c"].environment["PATH"] == "/b"
    assert jobs["d"].environment == root
    assert '"FOO" cannot be unset' in done.err
    assert "Debian's cron ignores" in done.err


@pytest.mark.parametrize("line, reason", [
    ("61 * * * * x", "bad minute"), ("5.5 * * * * x", "bad minute"),
    ("@dayly x", "bad time specifier"), ('A="x" # c', "bad minute"),
    ("* * * * * cat%{{x, int}}", "bad argument"),
    ("CRON_TZ=Mars/City", "unknown time zone"), ("\r", "bad minute"),
    ("[Section]", "not a valid line for cron")])
def test_import_keeps_an_invalid_line_as_a_comment(imported, line, reason):
    done = imported(("crontab of root", f"{line}\n@daily y\n", False))
    assert live(done.out) == ["[crontab of root]", "@daily y"]
    marked = done.out.split("# koitab import: ")[1]
    assert reason in marked.split("\n")[0]
    assert marked.split("\n")[1] == f"# {line}"
    assert "1 note in it" in done.err


@pytest.mark.parametrize("command", [
    "echo '{{x}}'", "echo {{x}}", "echo '{{x, int}}'", 'echo "{{x, int, 5}}"',
    "echo {{x, int, 5}} '{{y, string}}'", "echo '{{.Names}} {{end}}'"])
def test_imported_line_prints_the_braces_that_cron_prints(imported, command):
    done = imported(("crontab of root", f"@daily {command}\n", False))
    job, = koitab.parse_tab(done.out).jobs
    assert job.params == ()
    assert subprocess.check_output(["sh", "-c", job.script]) == \
        subprocess.check_output(["sh", "-c", command])


def test_import_keeps_a_last_line_without_newline_as_a_comment(imported):
    done = imported(("/etc/cron.d/a", "@daily root a\n@daily root b", True))
    assert live(done.out) == ["[a]", "@daily a"]
    assert "# koitab import: premature EOF" in done.out


@support.root_only     # a "-" before the time is root's
def test_equal_imported_jobs_get_different_names(imported):
    done = imported(
        ("crontab of root", '@daily say "hi"\n@daily say "hi"\n@daily x\n',
         False),
        ("/etc/cron.d/a", '@daily root say "hi"\n-@daily root z\n'
         "-@daily root z\n@hourly root x\n", True))
    tab = koitab.parse_tab(done.out, root=True)
    assert tab.diagnostics == []
    assert [job.name for job in tab.jobs] == [
        "crontab of root: say hi (1)", "crontab of root: say hi (2)", "",
        "a: say hi (1)", "a: z (1)", "a: z (2)", ""]
    assert [job.unlogged for job in tab.jobs] == [
        False, False, False, False, True, True, False]
    assert tab.jobs[0].command == 'say "hi"'


def test_every_line_that_cron_knows_or_refuses_can_be_imported(imported):
    fires = (CASES / "fires.tsv").read_text().splitlines()
    specs = sorted({line.split("\t")[0] for line in fires
                    if not line.startswith("#")})
    bad = [line.split("\t")[0] for line in (
        CASES / "rejected.tsv").read_text().splitlines()
        if not line.startswith("#")]
    text = "".join(f"{spec} true\n" for spec in specs + bad)
    done = imported(("crontab of root", text, False))
    assert len(koitab.parse_tab(done.out).jobs) >= len(specs)


def test_import_preserves_all_bytes(monkeypatch, capfdbinary):
    monkeypatch.setattr(koitab, "find_crontabs", lambda options: [
        koitab.Crontab("c", "c", "@daily \udcff\u00e9\n# \x1b\udcfe\n",
                      False)])
    assert koitab.main(["import"]) == 0
    out = capfdbinary.readouterr().out
    assert b"@daily \xff\xc3\xa9\n# \x1b\xfe\n" in out


def test_import_warns_when_cron_is_running(imported, type_in, monkeypatch):
    imported(("crontab of root", "@daily x\n", False))
    monkeypatch.setattr(koitab.Machine, "crons", lambda self: [99])
    assert "cron is running (pid 99): jobs would run twice" in type_in(
        "import").err


@support.root_only
@pytest.mark.parametrize("words", [["cron", "-f"], ["crond", "-f"],
                                   ["busybox", "crond"]])
def test_running_cron_is_found_by_its_name(tmp_path, words):
    """Not by a PID file: koid holds that, and busybox has none."""
    (tmp_path / "crond").touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / words[0]
    program.symlink_to("/usr/bin/tail")
    machine = koitab.Machine()
    with support.stopping(subprocess.Popen(
            [str(program), *words[1:], "-f", "crond"], cwd=tmp_path)) as cron:
        support.wait_until(lambda: cron.pid in machine.crons(), 10, "cron")
    assert cron.pid not in machine.crons()


def test_import_without_a_crontab_is_an_error(type_in, monkeypatch):
    monkeypatch.setattr(koitab, "find_crontabs", lambda options: [])
    done = type_in("import")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"no crontab for {ME}\n"


@pytest.fixture
def spool(monkeypatch, tmp_path):
    """A PATH with a crontab of the test's, and a spool."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.defpath}")
    monkeypatch.setattr(koitab, "SPOOLS", (str(tmp_path / "spool"),))
    monkeypatch.setattr(koitab, "SYSTEM_TAB", str(tmp_path / "crontab"))
    monkeypatch.setattr(koitab, "SYSTEM_TAB_DIRECTORY",
                        str(tmp_path / "cron.d"))
    for name in ("bin", "spool", "cron.d"):
        (tmp_path / name).mkdir()

    def program(text: str) -> None:
        path = tmp_path / "bin" / "crontab"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    program("echo no crontab for you >&2; exit 1")
    return types.SimpleNamespace(program=program, folder=tmp_path)


def found(called: str = "koitab") -> list:
    return koitab.find_crontabs(koitab.Invocation(koitab.Machine(), called))


def test_import_reads_the_output_of_the_real_crontab(spool):
    spool.program('[ "$1 $2 $3" = "-u %s -l" ] || [ "$*" = -l ] || exit 9\n'
                  "echo '@daily x'" % ME)
    assert [(source.path, source.text) for source in found()] == [
        (f"crontab of {ME}", "@daily x\n")]


@support.root_only
def test_import_reads_the_spool_for_root_if_crontab_is_koitab(spool):
    own = spool.folder / "spool" / ME
    own.write_text("# DO NOT EDIT THIS FILE - edit the master.\n# (x "
                   "installed on y)\n# (Cron version)\n# mine\n@daily x\n")
    for text in ("#\n\"\"\"koitab: a\"\necho '@daily we'", "exit 1"):
        spool.program(text)
        assert [source.text for source in found()] == ["# mine\n@daily x\n"]


@support.root_only
def test_import_by_root_reads_the_system_tabs_that_cron_reads(spool, capsys):
    (spool.folder / "crontab").write_text("@daily root a\n")
    for name in ("b_1", "a-2", ".placeholder", "old.bak"):
        (spool.folder / "cron.d" / name).write_text(f"# {name}\n")
    assert [(source.section, source.system) for source in found()] == [
        ("crontab", True), ("a-2", True), ("b_1", True)]
    err = capsys.readouterr().err
    assert "old.bak is left out" in err
    assert ".placeholder" not in err


# --- unit, completion, and the rest ---------------------------------------


def test_unit_of_koid_does_not_stop_jobs(type_in, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(koitab, "__file__", "/usr/local/bin/koi $tab%")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setenv("KOI_HOME", "/srv/koi")
    done = type_in("unit", "daemon", "--system")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    for line in ("KillMode=process", "Restart=always", "OOMPolicy=continue",
                 'ExecStart="/usr/local/bin/koi $$tab%%" daemon --system',
                 "# systemctl enable koid && systemctl restart koid"
                 if ME == "root" else "# loginctl enable-linger"):
        assert line in lines
    # Or a start of cron, by an upgrade of its package say, would stop koid.
    assert "Conflicts" not in done.out
    assert all(line[0] in "#[ABCDEKORSTW" for line in lines if line)
    plain = type_in("unit", "daemon").out
    assert "--system" not in plain


def test_unit_on_macos_is_a_launchd_property_list(type_in, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    found = plistlib.loads(type_in("unit", "daemon").out.encode())
    assert found["ProgramArguments"][-1] == "daemon"
    assert found["KeepAlive"] is found["AbandonProcessGroup"] is True


@pytest.mark.parametrize("uid, directory, domain", [
    (0, "/Library/LaunchDaemons", "system"),
    (501, "~/Library/LaunchAgents", "gui/$(id -u)")])
def test_unit_for_launchd_names_its_path(
        type_in, monkeypatch, uid, directory, domain):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for words, label in ((["daemon", "--system"], "koid"),
                         (["dashboard"], "koi-dashboard")):
        done = type_in("unit", *words)
        assert plistlib.loads(done.out.encode())["Label"] == label
        assert f"\n<!-- {directory}/{label}.plist\n" in done.out
        assert f" launchctl bootstrap {domain} {directory}/{label}.plist" \
            in done.out


def test_unit_of_the_dashboard_is_sandboxed(type_in, monkeypatch, tmp_path):
    made = servers.certificate(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(koitab, "__file__", "/usr/local/bin/koitab")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.delenv("KOI_HOME", raising=False)
    done = type_in("unit", "dashboard", "--listen", "0.0.0.0:443", "--cert",
                   made.cert, "--key", made.key, "--name", "a$b.x")
    assert (done.code, done.out) == (2, "")     # no name of a host
    done = type_in("unit", "dashboard", "--listen", "0.0.0.0:443", "--cert",
                   made.cert, "--key", made.key, "--name", "koi.x")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert "ExecStart=/usr/local/bin/koitab dashboard --listen 0.0.0.0:443 " \
        "--name koi.x --db /var/lib/koi-dashboard/dashboard.db --cert " \
        "${CREDENTIALS_DIRECTORY}/cert --key ${CREDENTIALS_DIRECTORY}/key" \
        in lines
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "PrivateTmp=yes",
                 "NoNewPrivileges=yes", "MemoryDenyWriteExecute=yes",
                 "SystemCallFilter=@system-service", "LimitNOFILE=65536",
                 f"LoadCredential=key:{made.key}", "Type=notify",
                 "ExecReload=/bin/kill -HUP $MAINPID",
                 "AmbientCapabilities=CAP_NET_BIND_SERVICE"):
        assert line in lines


def test_a_unit_with_an_unusable_certificate_is_not_printed(type_in,
                                                            tmp_path):
    made = servers.certificate(tmp_path)
    for cert, key in ((made.cert, "/none"), (made.key, made.key),
                      (made.cert, servers.certificate(tmp_path).key)):
        done = type_in("unit", "dashboard", "--cert", cert, "--key", key)
        assert (done.code, done.out) == (1, "")
        assert f"{cert} and {key} cannot be used: " in done.err


@pytest.mark.parametrize("words", [["daemon"], ["dashboard"]])
@pytest.mark.parametrize("uid", [0, 1000])
def test_commands_above_a_unit_can_be_copied_as_lines(
        type_in, monkeypatch, words, uid):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    head = type_in("unit", *words).out.partition("\n[Unit]")[0]
    commands = [command.strip() for line in head.splitlines()
                for command in line.lstrip("# ").split(";") if command]
    for command in commands:
        assert command.startswith(("koitab unit ", "systemctl ",
                                   "loginctl enable-linger")), command


def test_unit_of_the_dashboard_uses_the_given_database(type_in, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = type_in("unit", "dashboard", "--db", "/srv/a b/koi.db")
    assert '--db "/srv/a b/koi.db"' in done.out
    assert 'ReadWritePaths="/srv/a b"' in done.out
    assert "DynamicUser" not in done.out
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = type_in("unit", "dashboard", "--db", "/srv/koi.db")
    assert "WantedBy=default.target" in done.out
    assert "ProtectSystem" not in done.out      # not a user's to ask for


def test_property_list_of_the_dashboard_has_its_arguments(
        type_in, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    found = plistlib.loads(type_in("unit", "dashboard", "--listen",
                                   "[::1]:8077").out.encode())
    assert found["Label"] == "koi-dashboard"
    assert found["ProgramArguments"][-5:-1] == [
        "dashboard", "--listen", "[::1]:8077", "--db"]


@pytest.mark.parametrize("argv, said", [
    (["run"], "missing argument NAME\nkoitab: hint: koitab run NAME "
     "[ARG=VALUE]...\n"),
    (["log"], "missing argument RUN|NAME"),
    (["history", "a", "b"], 'unexpected argument "b"\nkoitab: hint: koitab '
     "history [NAME]\n"),
    (["next", "--system"], "--system is not an option of koitab next"),
    (["status", "-n", "5"], "--number is not an option of koitab status"),
    (["history", "-i"], "-i is not an option of koitab history"),
    (["run", "x", "--url", "http://h"],
     "--url is not an option of koitab run without --on"),
    (["dashboard", "--backup", "f", "--name", "h"],
     "--name is not an option of koitab dashboard --backup"),
    (["unit", "x"], 'unexpected argument "x" (expected daemon or dashboard)'),
    (["unit", "daemon", "--db", "x"],
     "--db is not an option of koitab unit daemon"),
    (["unit", "dashboard", "--system"],
     "--system is not an option of koitab unit dashboard"),
    (["completion", "csh"], '"csh" (expected bash, zsh, fish or names)'),
    (["-d"], "missing argument new|join|show|rotate|leave"),
    (["source", "Page", "x"], 'unexpected argument "x"'),
    (["history", "--nope=x"], "unknown option --nope\n"),
    (["history", "--num", "3"], "unknown option --num\n"),
    (["history", "--json=x"], "--json: ignored explicit argument"),
    (["history", "-n"], "-n/--number: expected one argument"),
    (["next", "-n", "0"], "not a number")])
def test_wrong_usage_of_koitabs_commands_is_exit_status_2(
        type_in, koid, argv, said):
    done = type_in(*argv)
    assert (done.code, done.out, koid.asked) == (2, "", [])
    assert said in done.err
    assert done.err.startswith("koitab: error: ")


@pytest.mark.parametrize("argv, called, system", [
    (["daemon"], "koitab", False), (["daemon", "--system"], "koitab", True),
    ([], "koid", False), (["--system"], "koid", True),
    (["daemon"], "koid", False)])
def test_daemon_is_started_by_its_name_or_its_command(
        type_in, monkeypatch, argv, called, system):
    started = []
    monkeypatch.setattr(koitab, "run_daemon", lambda machine, system, etcd:
                        started.append(system) or 0)
    assert type_in(*argv, called=called).code == 0
    assert started == [system]


def test_completion_lists_the_names_of_jobs(type_in, koid):
    koid.text = FORM + "@daily without a name\n"
    assert type_in("completion", "names").out == (
        "Say Hi\nPlain\nPlain\nPw\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_is_a_script_of_its_shell(type_in, shell, tmp_path):
    done = type_in("completion", shell)
    for name in koitab.command_words():
        assert f" {name} " in done.out.replace('"', " ")
    for option in koitab.OPTIONS.values():
        for name in option.names:
            assert f" {name} " in re.sub(r'["\n]', " ", done.out)
    assert not set(re.findall("[A-Z]{4,}", done.out)) & {
        "NAMED", "FILES", "USERS", "CHOICES", "COMMANDS", "OPTIONS"}
    support.need(shell)
    script = tmp_path / "script"
    script.write_text(done.out)
    check = subprocess.run([shell, "-n", str(script)], stderr=subprocess.PIPE)
    assert (check.returncode, check.stderr) == (0, b"")


@pytest.mark.parametrize("typed, found", [
    (["koitab", "his"], ["history"]), (["koitab", "run", "Say"],
                                       ["Say\\ Hi"]),
    (["koitab", "log", ""], ["Plain", "Say\\ Hi", "\\$\\(id\\)"]),
    (["koitab", "unit", ""], ["daemon", "dashboard"]),
    (["koitab", "-d", "r"], ["rotate"]),
    (["koitab", "--fr"], ["--from"])])
def test_bash_completes_commands_options_and_jobs(
        type_in, tmp_path, typed, found):
    support.need("bash")
    program = tmp_path / "koitab"
    program.write_text("#!/bin/sh\nprintf '%s\\n' 'Say Hi' Plain '$(id)'\n")
    program.chmod(0o755)
    (tmp_path / "script").write_text(type_in("completion", "bash").out)
    words = " ".join(f"'{word}'" for word in typed)
    done = subprocess.run(
        ["bash", "-c", f". ./script; COMP_WORDS=({words}); COMP_CWORD="
         f"{len(typed) - 1}; _koitab; printf '%s\\n' \"${{COMPREPLY[@]}}\""],
        cwd=tmp_path, stdout=subprocess.PIPE, env={
            "PATH": f"{tmp_path}:{os.environ.get('PATH', os.defpath)}"})
    assert sorted(done.stdout.decode().split("\n")[:-1]) == found


@pytest.mark.parametrize("url, words", [
    ("https://koi.example", ""), ("http://127.0.0.1:877", ""),
    ("http://127.0.0.1:8077", "any user of this machine"),
    ("http://koi.example:877", "anyone on the network")])
def test_page_command_warns_of_a_plain_http_url(type_in, url, words):
    done = type_in("page", url)
    assert done.code == 0 and f'"{url}"' in done.out
    assert words in done.err and bool(done.err) == bool(words)


def parties() -> str:
    """What the topic `security` says of the parties, without line breaks."""
    words = " ".join(koitab.topic_text("security").split())
    return words[words.index("What each party"):].partition(" LIMITS ")[0]


def test_every_test_named_by_the_topic_security_exists():
    there = {name for path in (support.ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def (test_\w+)\(", path.read_text(),
                                    re.M)}
    lists = re.findall(r"(?<= tests )test_\w+(?: test_\w+)*", parties())
    assert len(lists) == 10
    assert {name for each in lists for name in each.split()} <= there


def test_help_is_at_most_24_lines_and_names_every_command(type_in):
    """But version, which would be one line too many."""
    text = type_in("--help").out
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) < 80
    for name, command in koitab.COMMANDS.items():
        if name == "version":
            continue
        assert re.search(rf" {name.replace('-', '[-]')}[ ,|]".replace(
            " [-][ ,|]", "-"), text)
        assert f"{command.help}\n" in text or name in "-e -l -r -T"
    assert ", ".join(koitab.TOPICS) in " ".join(text.split())


@pytest.mark.parametrize("name", sorted(set(koitab.COMMANDS) - {"-"}))
def test_help_of_a_command_has_its_usage_a_paragraph_and_its_options(
        type_in, name):
    command = koitab.COMMANDS[name]
    typed = [name, "x"] if name == "-T" else [name]
    done = type_in(*typed, "--help")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) < 80
    title, usage, text, options, examples, more = done.out.split("\n\n")
    assert title == f"koitab {name}: {command.help}"
    assert [line.strip() for line in usage.removeprefix("Usage:").split("\n")
            ] == [f"{' '.join(['koitab', name, *line.split()])} [OPTION]..."
                  for line in command.usage]
    assert text.split() == command.text.split() != []
    assert set(re.findall(r"^ +(-\S+?)[, ]", options, re.M)) == {
        koitab.OPTIONS[key].names[0] for key in command.options} - {name} | {
            "-h"}
    assert 2 <= examples.removeprefix("Examples:\n").count("\n") + 1 <= 3
    assert more == f"See also: koitab help {command.topic}\n"


def test_every_option_is_in_the_help_of_a_command():
    told = {key for command in koitab.COMMANDS.values()
            for key in command.options}
    assert set(koitab.OPTIONS) - told == {"help", "version"}


def test_help_of_koid_is_the_help_of_daemon(type_in):
    assert type_in("--help", called="koid").out == type_in(
        "daemon", "--help").out


@pytest.mark.parametrize("argv", [["-n", "3", "history"], ["history", "-n3"],
                                  ["history", "--number=3"]])
def test_options_are_accepted_before_and_after_the_command(
        type_in, koid, argv):
    assert type_in(*argv).code == 0
    assert koid.asked == [("history", {"limit": 3})]


@pytest.mark.parametrize("argv", [["--", "-e"], ["./-e"]])
def test_file_that_looks_like_an_option_is_installed(type_in, koid, argv):
    Path("-e").write_text("@daily x\n")
    assert type_in(*argv).code == 0
    assert koid.text == "@daily x\n"


# --- source ---------------------------------------------------------------


def test_source_without_an_argument_lists_every_section(type_in):
    done = type_in("source")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) < 80
    rows = re.findall(r"^  (\w+) +(\S.*\?) +(\d+) lines  ([A-Z ]+)$", done.out,
                      re.M)
    text = (support.ROOT / "koitab.py").read_text(encoding="utf-8")
    assert [(name, question, letters) for name, question, _, letters in rows
            ] == re.findall(r"^# (\w+): (.+\?) +\(.*; ([A-Z ]+)\)$", text,
                            re.M)
    head = text[:text.index(f"# {'=' * 74}\n")]
    assert sum(int(row[2]) for row in rows) == (text.count("\n")
                                               - head.count("\n"))


def test_source_of_a_section_is_its_text(type_in):
    text = (support.ROOT / "koitab.py").read_text(encoding="utf-8")
    found = type_in("source", "plan").out
    assert f"\n{found}# {'=' * 74}\n" in text
    assert found.splitlines()[1].startswith("# Plan: what is due now?")


def test_source_of_the_daemon_is_the_parts_values_and_koid(type_in):
    names = re.findall(r"^# (\w+): .*\?", type_in("source", "daemon").out,
                       re.M)
    listed = type_in("source").out.split("\n3 network")[0]
    assert names == re.findall(r"^  (\w+) ", listed, re.M)


def test_source_of_the_dashboard_is_the_code_that_runs_unprivileged(type_in):
    names = re.findall(r"^# (\w+): .*\?", type_in("source", "dashboard").out,
                       re.M)
    assert {"Common", "HttpServer", "Page"} <= set(names)
    assert not {"Daemon", "Supervisor", "Agent", "Command"} & set(names)


def test_source_of_an_unknown_section_names_the_nearest(type_in):
    done = type_in("source", "Pager")
    assert (done.code, done.out) == (2, "")
    assert done.err == ('koitab: error: unknown section "Pager"\n'
                        "koitab: hint: koitab source Page\n")

"""Command: what can I type?

In process: `mission.main(argv)` is the whole program. What needs a run is
tested with real processes elsewhere; here the words and their order count.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest

import support

mission = support.load("mission")


@pytest.fixture
def typed(scratch, capsys, monkeypatch):
    """typed("list", "-v") -> (exit status, stdout, stderr), in the directory
    of a configuration with three tasks, named as by default."""
    monkeypatch.chdir(scratch.folder)
    for name, value in scratch.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    scratch.task("mail", "echo mail")
    scratch.task("photos", "echo photos", scheduled=False)
    scratch.task("offsite", "echo offsite", post=True)
    scratch.write()

    def run(*words: str):
        status = mission.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


# --- wrong usage ----------------------------------------------------------


@pytest.mark.parametrize("words, message", [
    ([], "no command given (expected init, new, check,"),
    (["-v"], "no command given"),
    (["rnu"], 'unknown command "rnu"\nmission: hint: mission run'),
    (["lst"], 'unknown command "lst"\nmission: hint: mission list'),
    (["chekc"], "hint: mission check"),
    (["frobnicate"], 'unknown command "frobnicate" (expected init, new,'),
    ([""], "no command given"), (["_builtins"], "unknown command"),
    (["list", "--jsno"], "--jsno"), (["list", "--task"], "--task"),
    (["-x", "list"], "-x"), (["list", "-t"], "-t"),
    (["list", "--json=yes"], "--json"), (["--he", "list"], "--he"),
    (["list", "more"], 'unexpected argument "more"\nmission: hint: mission'),
    (["log", "a", "b"], 'unexpected argument "b"'),
    (["new"], "missing argument SLUG\nmission: hint: mission new SLUG"),
    (["new", "a", "b"], 'unexpected argument "b"'),
    (["completion"], "missing argument bash|zsh|fish"),
    (["completion", "csh"],
     'unexpected argument "csh" (expected bash, zsh, fish)'),
    (["unit"], "missing argument service|timer\nmission: hint: mission unit"),
    (["unit", "socket"],
     'unexpected argument "socket" (expected service, timer)'),
    (["unit", "timer", "x"], 'unexpected argument "x"'),
    (["unit", "timer", "--dry-run"], "--dry-run"),
    (["check", "-n", "3"], "--number is not an option of mission check"),
    (["-n", "3", "check"], "--number is not an option of mission check"),
    (["list", "--headless"], "--headless is not an option of mission list"),
    (["--dry-run", "dump"], "--dry-run is not an option of mission dump"),
    (["history", "-n", "x"], "-n x: not a number of runs"),
    (["history", "-n", "0"], "-n 0: not a number"),
    (["history", "-n", "-5"], "not a number"),
    (["history", "-n", "\u0665"], "not a number"),
    (["history", "-n", ""], "not a number"),
    (["run", "--wait", "soon"], "--wait soon: not a duration"),
    (["run", "--wait=-1s"], "not a duration"),
    (["run", "--wait", "-1s"], "--wait: expected one argument"),
    (["run", "-t", "phots"], "hint: mission run -t photos"),
    (["run", "-t", "mail", "-t", "xyz"], 'unknown task "xyz"'),
    (["-t", "../mail", "run", "--dry-run"], "unknown task"),
    (["new", "../x"], 'invalid slug "../x"'), (["new", "A"], "invalid slug"),
    (["new", "a\nb"], "invalid slug"), (["new", "-x"], "-x"),
    (["new", "x" * 65], "invalid slug"),
    (["\x1b[2Jrun"], "unknown command"),
], ids=lambda value: " ".join(map(repr, value)) if isinstance(
    value, list) else None)
def test_wrong_usage_is_an_error_with_a_hint_and_nothing_runs(
        words, message, typed, scratch):
    status, out, err = typed(*words)
    assert (status, out) == (mission.EXIT_USAGE, "")
    assert message in err and err.startswith("mission: error: ")
    assert err.count("\n") == 1 + err.count("\nmission: hint: ") <= 2
    assert err.replace("\n", "").isprintable()
    assert not scratch.state.exists()


# --- options on both sides ------------------------------------------------


@pytest.mark.parametrize("commands, options", [
    ("list run dump check", options) for options in (
        ["-c", "m.json"], ["--config", "m.json"], ["--config=m.json"],
        ["-cm.json"], ["-v"], ["--verbose"], ["-q"], ["--quiet"], ["-C"],
        ["--no-color"], ["-vqC"])
] + [("list", ["--json"])] + [
    ("run", options) for options in (
        ["--headless"], ["--wait", "1s"], ["-t", "mail"], ["--task=mail"],
        ["-t", "photos", "--task", "mail", "-q"])
])
def test_options_are_accepted_before_and_after_the_command(
        commands, options, typed):
    os.replace("mission.config.json", "m.json")
    if not any("m.json" in word for word in options):
        options = ["-c", "m.json", *options]
    for name in commands.split():
        command = [name, "--dry-run"] if name == "run" else [name]
        before, after = typed(*options, *command), typed(*command, *options)
        middle = typed(*options[:2], *command, *options[2:]) \
            if not options[0].startswith("-c") or options[0] == "-c" \
            else before
        assert before == after == middle and before[0] == 0


def test_the_last_of_two_equal_options_wins(typed):
    assert typed("-c", "nothing.json", "list", "-c",
                 "mission.config.json")[0] == 0
    assert typed("list", "-c", "nothing.json")[0] == mission.EXIT_CONFIG


def test_file_named_like_an_option_is_read_as_a_file(typed):
    os.replace("mission.config.json", "-t")
    assert typed("list", "--config=-t")[0] == 0


def test_tasks_named_before_and_after_the_command_all_run(typed):
    out = typed("-t", "photos", "run", "--dry-run", "-t", "mail")[1]
    assert out.index("photos") < out.index("mail") and "offsite" not in out


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["-h", "nonsense"]])
def test_help_lists_the_commands(words, typed):
    assert typed(*words) == (0, mission.usage(), "")


@pytest.mark.parametrize("words", [
    ["log", "--help"], ["log", "-h"], ["log", "a", "b", "--help"]])
def test_help_of_a_command_has_its_usage_and_only_its_options(words, typed):
    status, out, err = typed(*words)
    assert (status, err) == (0, "")
    assert out.splitlines()[2] == "Usage: mission log [RUN] [OPTION]..."
    assert "--config FILE" in out and "--headless" not in out


def test_help_is_short_and_names_every_topic(typed):
    out = typed("--help")[1]
    assert out.count("\n") <= 24 and max(map(len, out.splitlines())) <= 79
    assert all(topic in out.splitlines()[-1] for topic in mission.TOPICS)


def test_help_without_a_topic_lists_the_topics(typed):
    status, out, err = typed("help")
    assert (status, err) == (0, "")
    assert all(f"mission help {topic} " in out for topic in mission.TOPICS)


@pytest.mark.parametrize("topic", mission.TOPICS)
def test_topic_fits_80_columns_without_unresolved_markup(topic, typed):
    out = typed("help", topic)[1]
    assert out == mission.topic_text(topic)
    assert max(map(len, out.splitlines())) <= 79
    assert not re.search(r"\{[A-Z]+\}", out)


@pytest.mark.parametrize("words, message", [
    (["help", "cofnig"], 'unknown topic "cofnig"\n'
     "mission: hint: mission help config"),
    (["help", "xyz"], 'unknown topic "xyz" (expected config, tasks,'),
    (["man", "run"], 'unknown topic "run" (expected config, tasks,')])
def test_error_of_an_unknown_topic_names_the_known_topics(
        words, message, typed):
    status, out, err = typed(*words)
    assert (status, out) == (mission.EXIT_USAGE, "") and message in err


def test_help_command_prints_the_same_as_the_help_option(typed):
    assert typed("help", "run") == typed("run", "--help")


def test_pager_is_cat_where_less_is_missing(typed, monkeypatch):
    monkeypatch.delenv("PAGER", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with mission.start_pager() as pager:
        assert pager.args == ["cat"]


UNUSABLE_PAGERS = [("/missing/less -R", "No such file or directory"),
                   ("less '", "No closing quotation")]


@pytest.mark.parametrize("pager, reason", UNUSABLE_PAGERS)
def test_text_is_printed_before_the_error_of_an_unusable_pager(
        pager, reason, typed, past, monkeypatch):
    monkeypatch.setenv("PAGER", pager)
    for words in (["help", "tasks"], ["log"]):
        expected = typed(*words)[1]
        with monkeypatch.context() as terminal:
            terminal.setattr(mission.sys.stdout, "isatty", lambda: True)
            assert typed(*words) == (1, expected, (
                f"mission: error: cannot start $PAGER ({pager}): {reason}\n"
                "mission: hint: export PAGER=cat\n"))


def test_blank_pager_is_cat_where_less_is_missing(typed, monkeypatch):
    monkeypatch.setenv("PAGER", "  ")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with mission.start_pager() as pager:
        assert pager.args == ["cat"]


def test_command_version_prints_the_same_as_the_option(typed):
    assert typed("version") == typed("--version")


@pytest.mark.parametrize("topic", ["", *mission.TOPICS])
def test_manual_page_has_no_warnings_and_all_words_of_its_topic(
        topic, typed, tmp_path):
    """groff and mandoc find nothing wrong with the roff."""
    page = tmp_path / "page.roff"
    page.write_text(typed("man", *filter(None, [topic]))[1])
    shown = ""
    support.need("mandoc", "groff")
    for command in ("mandoc -T lint", "groff -ww -man -Tascii -P-cbou"):
        done = subprocess.run(
            [*command.split(), str(page)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.stderr == "" and done.returncode == 0
        shown = done.stdout
    text = mission.topic_text(topic) if topic else mission.manual_text()
    missing = set(text.replace("`", "").split()) - set(shown.split())
    assert sorted(missing) == []


def test_every_command_has_help_that_fits_80_columns(typed):
    for name, command in mission.COMMANDS.items():
        out = typed(name, "--help")[1]
        assert out == mission.command_help_text(name)
        assert command.help in out
        assert max(map(len, out.splitlines())) <= 79


@pytest.mark.parametrize("change", [
    # An unknown feature is refused as Python 3.6 refuses `annotations`.
    lambda text: text.replace("import annotations ", "import unknown "),
    lambda text: "import sys; sys.version_info = (3, 8)\n" + text.replace(
        "from __future__", "# from __future__")], ids=["3.6", "3.8"])
def test_error_of_an_old_python_names_the_required_version(change, tmp_path):
    path = tmp_path / "mission.py"
    path.write_text(change((support.ROOT / "mission.py").read_text()))
    done = subprocess.run([support.PYTHON, "-IS", str(path), "--version"],
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "mission needs Python 3.9 or newer" in done.stderr


def test_dry_run_is_wrong_usage_for_new_and_init(typed, scratch):
    before = sorted(scratch.folder.rglob("*"))
    for words in (["new", "bar"], ["init", "-c", "z.json"]):
        for line in ([*words, "--dry-run"], ["--dry-run", *words]):
            status, out, err = typed(*line)
            assert (status, out) == (mission.EXIT_USAGE, "")
            assert "--dry-run" in err
    assert sorted(scratch.folder.rglob("*")) == before


@pytest.mark.parametrize("words", [["--version"], ["list", "--version"]])
def test_version_is_printed_as_one_line(words, typed):
    assert typed(*words) == (0, f"mission {mission.VERSION}\n", "")


def test_usage_fits_80_columns():
    assert max(map(len, mission.usage().splitlines())) <= 79


# --- list, check, dump, --dry-run -----------------------------------------


def test_list_prints_one_slug_per_line_in_the_order_of_the_file(typed):
    assert typed("list") == (0, "mail\nphotos\noffsite\n", "")


def test_verbose_list_describes_each_task(typed):
    assert typed("list", "-v", "-C")[1] == (
        "mail [Mail, scheduled]\nphotos [Photos, manual]\n"
        "offsite [Offsite, scheduled, post]\n")


def test_list_as_json_has_the_fields_of_each_task(typed):
    found = json.loads(typed("list", "--json")[1])
    assert [task["slug"] for task in found] == ["mail", "photos", "offsite"]
    assert found[2] == {"slug": "offsite", "name": "Offsite", "type": "exec",
                        "scheduled": True, "post": True}


def test_check_of_a_valid_configuration_prints_nothing(typed):
    assert typed("check") == (0, "", "")


def test_dump_of_a_dump_is_the_same(typed, scratch, capsys):
    status, first, err = typed("dump")
    assert (status, err) == (0, "")
    (scratch.folder / "again.json").write_text(first)
    assert typed("dump", "-c", "again.json") == (0, first, "")


def test_dry_run_prints_the_plan_and_touches_nothing(typed, scratch):
    def everything():
        return sorted((str(path), path.lstat().st_mtime_ns)
                      for path in scratch.folder.rglob("*"))
    before = everything()
    status, out, err = typed("run", "--dry-run", "--headless")
    assert (status, err) == (0, "") and everything() == before
    assert [line[:5] for line in out.splitlines()] == [
        f"{number:3}. " for number in range(1, out.count("\n") + 1)]
    assert out.index("run the task mail") < out.index("run the post task off")
    assert "photos" not in out


def test_dry_run_marks_storages_that_cannot_be_used_now(typed, scratch):
    gone, full = scratch.folder / "gone", scratch.make("full")
    scratch.config["storage"].update(
        gone={"path": str(gone), "chown": True},
        disk={"path": str(full), "mounted": True, "commit": True},
        full={"path": str(full)})
    scratch.config["tasks"] = [
        {"slug": slug, "type": "exec", "entrypoint": "/bin/true",
         "scheduled": True, **more} for slug, more in (
            ("mount", {"storages": []}), ("default", {}),
            ("wants", {"storages": ["gone"]}),
            ("large", {"storages": [], "minFree": {"full": "9000T"}}),
            ("both", {"storages": [], "minFree": {"gone": "1K"}}),
            ("small", {"storages": [], "minFree": {"full": "1K"}}))]
    scratch.write()
    status, out, err = typed("run", "--dry-run")
    assert (status, err) == (0, "")
    found, step = {}, ""
    for line in out.splitlines():
        if line.startswith("     "):
            found.setdefault(step, []).append(line.strip())
        step = step if line.startswith("     ") else line[5:]
    assert {step.split(" (")[0]: lines for step, lines in found.items()} == {
        "run the task default": [
            f"default cannot start now: storage disk: {full} is not mounted"],
        "run the task wants": [
            f"wants cannot start now: storage gone: {gone} does not exist"],
        "run the task large": [f"large cannot start now: {line}" for line in [
            re.search(r"storage full has only \S+ free, less than minFree "
                      r"\(9000T\)",
                      out)[0]]],
        "run the task both": [
            f"both cannot start now: storage gone: {gone} does not exist"],
        f"chown {gone} to {scratch.config['user']['name']}": [
            f"{gone} does not exist"],
        f"commit {full}": [f"{full} is not mounted"]}


def test_tasks_of_option_t_run_in_the_order_of_the_command_line(typed):
    out = typed("run", "--dry-run", "-t", "photos", "-t", "mail")[1]
    assert out.index("photos") < out.index("mail") and "offsite" not in out


def test_invalid_script_fails_check_but_not_the_dry_run(typed, scratch):
    (scratch.tasks / "mail" / "run").unlink()
    status, out, err = typed("check")
    assert status == mission.EXIT_CONFIG and out == ""
    assert "does not exist (mission new mail)" in err
    assert "mission: error: 1 error in mission.config.json\n" in err
    assert typed("run", "--dry-run")[0] == 0
    assert typed("dump")[0] == 0 and typed("list")[0] == 0


@pytest.mark.parametrize("words", [
    ["check"], ["dump"], ["list"], ["run"], ["run", "--dry-run"],
])
def test_an_invalid_configuration_stops_every_command(words, typed, scratch):
    scratch.config["tasks"][0]["timout"] = "5m"
    scratch.write()
    status, out, err = typed(*words)
    assert (status, out) == (mission.EXIT_CONFIG, "")
    assert re.match(r"mission\.config\.json:\d+:\d+: tasks\[0\]\.timout: "
                    r"unknown key \(did you mean timeout\?\)\n"
                    "mission: error: 1 error",
                    err)


# Typical mistakes in a configuration: what is replaced, by what, the message
# and its fix.
MISTAKES = [
    ('"type": "exec"', '"type": "exce"', 'tasks[0].type: unknown type "exce" '
     '(expected "exec" or "builtin")'),
    ('"slug": "photos"', '"slug": "mail"', 'tasks[1].slug: duplicate slug '
     '"mail" (rename one of the tasks)'),
    ('"slug": "mail",', '"slug": "mail"', 'expected "," or "}", found a str'),
    ('"slug": "mail",', '"slug": ,', 'expected a value, found ","'),
    ('"slug": "mail"', "'slug': 'mail'", "expected a key in double quotes, "
     "found \"'slug'\""),
    ('"slug": "mail",', '"slug" "mail",', 'expected ":", found a string'),
    ('"slug": "mail"', '"slug": mail', 'expected a value, found "mail"'),
    ('"slug": "mail"', '"slug": "mail', "unterminated string (expected a "
     'closing " on the same line)'),
    ('"slug": "mail",', '"slug": "mail", "timeout": 2h,',
     'expected a value, found "2h"'),
    ('"slug": "mail",', '"slug": "mail", "timeout": 90,',
     'tasks[0].timeout: invalid value 90 (expected a duration such as "90s"'),
    ('"slug": "mail",', '"slug": "mail", "commit": true,',
     "tasks[0].commit: unknown key (expected in storage.NAME.commit)"),
    ('"tasks": [', '"timeout": "1h", "tasks": [', "timeout: unknown key "
     "(expected in tasks[].timeout or defaults.timeout or ping.timeout)"),
    ('"slug": "mail",', '"slug": "mail", "Scheduled": true,',
     "tasks[0].Scheduled: unknown key (did you mean scheduled?)"),
    ('"slug": "mail",', '"slug": "mail", "entrypoint": "~webadm/run",',
     'cannot expand ~: user "webadm" does not exist (expected an absolute'),
    ('"slug": "mail",', '"slug": "mail", "needs": ["photo"],',
     'tasks[0].needs: unknown task "photo" (did you mean photos?)'),
]


@pytest.mark.parametrize("old, new, message", MISTAKES)
def test_a_typical_mistake_has_a_message_that_names_the_fix(
        old, new, message, typed, scratch):
    text = scratch.path.read_text()
    assert old in text
    scratch.path.write_text(text.replace(old, new, 1))
    status, out, err = typed("check")
    assert (status, out) == (mission.EXIT_CONFIG, "")
    assert message in err


@pytest.mark.parametrize("words, hint", [
    (["run", "-t", "phots"], "mission -c 'my config.json' run -t photos"),
    (["lst"], "mission -c 'my config.json' list"),
    (["new"], "mission -c 'my config.json' new SLUG"),
    (["log", "ff"], "mission -c 'my config.json' history"),
    (["list", "--jsno"], "mission list --help"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_hint_keeps_the_configuration_of_option_c(words, hint, typed, past,
                                                  scratch):
    os.symlink(scratch.path, "my config.json")
    for line in (["-c", "my config.json", *words],
                 [*words, "--config=my config.json"],
                 ["-cmy config.json", *words]):
        assert typed(*line)[2].endswith(f"mission: hint: {hint}\n"), line


def test_command_in_a_diagnostic_keeps_the_configuration(typed, scratch):
    (scratch.tasks / "mail/run").unlink()
    assert "(mission new mail)\n" in typed("check")[2]
    os.rename(scratch.path, "my config.json")
    assert "(mission -c 'my config.json' new mail)\n" in typed(
        "-c", "my config.json", "check")[2]


def test_next_command_of_init_keeps_the_configuration(typed):
    assert typed("-c", "my config.json", "init")[1].endswith(
        "next: mission -c 'my config.json' new etc\n")


def test_words_of_a_hint_are_quoted_for_the_shell(monkeypatch, tmp_path):
    """Pasted as it is shown, a hint runs nothing that a path contains."""
    folder = tmp_path / "$(touch ran)"
    scratch = support.Scratch(folder)
    scratch.storage("sync", commit=True)
    scratch.storage("gone").rmdir()
    scratch.task("plain", "true").chmod(0o644)
    scratch.task("windows", "#!/bin/sh\r\ntrue\n")
    scratch.task("missing").unlink()
    hints = re.findall(r"\(([^()]*\$\(touch ran\).*)\)$",
                       scratch.mission("check").err, re.M)
    for words in (["check", "x y"], ["-c", "no such.json", "check"]):
        (scratch.folder / "x y").touch()
        hints += scratch.mission(*words).err.splitlines()[-1:]
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.chdir(room)
    for hint in hints:
        subprocess.run(["sh", "-c", hint.removeprefix("mission: hint: ")],
                       stderr=subprocess.DEVNULL)
        assert list(room.iterdir()) == [], hint
    assert len(hints) == 7, hints


@pytest.mark.parametrize("writer, command", [
    ("is writable by everyone (mode 0777)", "chmod o-w"),
    ("is writable by its group (mode 0775)", "chmod g-w"),
    ("is writable by bob (access control list)", "setfacl -b")])
def test_command_against_a_writer_names_the_whole_path(writer, command):
    for path in ("/a/$(id) b", "/a is writable by everyone (mode 0777)/b"):
        assert mission.protection(f"{path} {writer}") == \
            f"{command} {shlex.quote(path)}"


def test_truncated_file_is_reported_as_an_unexpected_end(typed, scratch):
    scratch.path.write_text(scratch.path.read_text().rstrip()[:-1])
    assert "unexpected end of file" in typed("check")[2]


@pytest.mark.parametrize("words, hint", [
    (["run", "mail"], "mission run [-t SLUG]... [--headless]"),
    (["check", "mission.config.json"],
     "mission -c mission.config.json check"),
    (["-c", "missing.json", "check"], "missing.json init"),
    (["history"], "mission -c FILE history"),
    (["new", "mail"], "tasks/mail/run")])
def test_typical_mistake_on_the_command_line_gets_a_hint(words, hint, typed):
    status, out, err = typed(*words)
    assert status and out == ""
    assert err.startswith("mission: error: ")
    assert "\nmission: hint: " in err and hint in err.splitlines()[1]


# --- init and new ---------------------------------------------------------


def test_init_writes_a_sample_that_only_its_owner_can_read(
        typed, scratch, monkeypatch):
    os.unlink("mission.config.json")
    monkeypatch.setattr(mission, "sample_user",
                        lambda: mission.account_of("nobody"))
    status, out, err = typed("init", "-C")
    assert (status, err) == (0, "") and "mission.config.json" in out
    assert scratch.path.read_text() == mission.SAMPLE.replace(
        '"root"', '"nobody"')
    assert support.mode(scratch.path) == 0o600


def test_init_does_not_replace_a_file(typed, scratch):
    before = scratch.path.read_text()
    status, out, err = typed("init")
    assert status == 1 and out == "" and "already exists" in err
    assert scratch.path.read_text() == before
    os.symlink("elsewhere", "link.json")
    assert typed("init", "-c", "link.json")[0] == 1
    assert not os.path.exists("elsewhere")
    assert typed("init", "-c", "no/such/folder.json")[0] == 1


def test_new_creates_a_task_that_fails_until_it_is_edited(typed, scratch):
    status, out, err = typed("new", "music")
    run = scratch.tasks / "music" / "run"
    assert (status, err) == (0, "") and str(run) in out
    assert os.access(run, os.X_OK)
    line = json.loads(out.splitlines()[-1].rstrip(","))
    assert line == {"slug": "music", "name": "Music", "type": "exec",
                    "scheduled": True}
    scratch.config["tasks"].append(line)
    scratch.write()
    assert typed("check") == (0, "", "")
    support.need("bash")
    assert subprocess.run([str(run)], cwd=run.parent,
                          stdout=subprocess.DEVNULL).returncode == 1


def test_new_does_not_replace_a_file(typed, scratch):
    run = scratch.tasks / "mail" / "run"
    before = run.read_text()
    status, _, err = typed("new", "mail")
    assert status == 1 and "already exists" in err
    assert run.read_text() == before


# --- unit -----------------------------------------------------------------


AWKWARD = "a b%c$d'e\"f\\g"


@pytest.fixture
def units(scratch, tmp_path):
    """units(folder, uid) -> the units that a copy of mission in a directory
    prints for the configuration there, as a user."""
    def write(folder, uid: int = os.geteuid(), file: str = "home.json",
              **env: str) -> dict:
        folder.mkdir()
        (folder / "mission").write_text(
            (support.ROOT / "mission.py").read_text())
        (folder / "mission").chmod(0o755)
        (folder / file).write_text("{}")        # invalid, and readable
        return {kind: subprocess.run(
            [support.SHARED_PYTHON, "-IS", str(folder / "mission"), "-c",
             file, "unit", kind], cwd=folder, user=uid, check=True,
            env={**scratch.env, "MISSION_STATE": "", **env},
            stdout=subprocess.PIPE, text=True).stdout
            for kind in ("service", "timer")}

    tmp_path.chmod(0o755)
    scratch.open_to_others()
    return write


def uids() -> list[int]:
    return [0, 65534] if os.geteuid() == 0 else [os.geteuid()]


@pytest.mark.parametrize("uid", uids())
@pytest.mark.parametrize("name", ["plain", "a b%c$d", "caf\u00e9"])
def test_systemd_accepts_the_units(name, uid, units, tmp_path):
    """It finds the program by the path in ExecStart=, and the calendar's
    words are right."""
    support.need("systemd-analyze")
    paths = []
    found = units(tmp_path / name, uid, f"{AWKWARD}.json")
    for kind, text in found.items():
        paths.append(tmp_path / f"mission-home.{kind}")
        paths[-1].write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no",
         *map(str, paths)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
    assert "mission" not in done.stdout, done.stdout


def test_unit_has_absolute_paths_in_which_systemd_expands_nothing(
        units, tmp_path):
    found = units(tmp_path / "a b", file=AWKWARD, MISSION_STATE=AWKWARD)
    lines = found["service"].splitlines()
    assert (f'ExecStart="{tmp_path}/a b/mission" -c "{tmp_path}/a b/'
            """a b%%c$$d'e\\"f\\\\g" run --headless""" in lines)
    assert ("Environment=\"MISSION_STATE=a b%%c$d'e\\\"f\\\\g\"" in lines)
    assert "Type=oneshot" in lines
    timer = found["timer"].splitlines()
    assert {"OnCalendar=*-*-* 02:30:00", "Persistent=true",
            "WantedBy=timers.target"} <= set(timer)


@pytest.mark.parametrize("uid", uids())
def test_first_lines_of_a_unit_are_the_commands_that_install_it(
        uid, units, tmp_path):
    user = "" if uid == 0 else " --user"
    folder = "~/.config/systemd/user" if uid else "/etc/systemd/system"
    config = f"{tmp_path}/plain/home.json"
    for text in units(tmp_path / "plain", uid).values():
        lines = [f"# mission -c {config} unit {kind} > {folder}/"
                 f"mission-home.{kind}" for kind in ("service", "timer")]
        lines += [f"# systemctl{user} daemon-reload",
                  f"# systemctl{user} enable --now mission-home.timer"]
        if uid:
            lines.append("# loginctl enable-linger     "
                         "(to run while you are not logged in)")
        assert text.splitlines()[:len(lines) + 1] == [*lines, "[Unit]"]


def test_unit_of_a_missing_configuration_is_an_error(typed):
    status, out, err = typed("unit", "service", "-c", "nothing.json")
    assert (status, out) == (mission.EXIT_CONFIG, "")
    assert "nothing.json: no such file" in err


# --- history and log ------------------------------------------------------


@pytest.fixture
def past(typed, scratch):
    """Three recorded runs: ok, failed, lost."""
    journal = mission.StateDirectory(
        str(scratch.state / mission.state_name(str(scratch.path))),
        mission.Clock())
    journal.make_directory()
    for number, result in enumerate(("ok", "failed", "lost")):
        log = scratch.logs / f"2026-03-0{number + 1}-02-00-00.txt"
        log.write_text(f"log {number}\n\x1b[2Jevil\n")
        journal.add_to_history({
            "id": f"{number}{number}aabbcc-1", "result": result,
            "start": f"2026-03-0{number + 1}T02:00:00+01:00",
            "started": 1772326800.0 + 86400 * number, "headless": True,
            "seconds": None if result == "lost" else 62.5 + number,
            "log": str(log), "errors": 0, "warnings": 0, "last": "mail",
            "tasks": [] if result == "lost" else [
                {"slug": "mail", "outcome": "ok", "seconds": 1.5,
                 "attempts": 1},
                {"slug": "offsite", "outcome": result, "seconds": 60.0,
                 "attempts": 1}]})
    return journal


def test_history_shows_start_duration_and_result_of_each_run(typed, past):
    status, out, err = typed("history")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert re.match(r"00aabbcc  2026-03-01T02:00:00\+01:00 +1m2\.5s +ok$",
                    lines[1])
    assert re.match(r"11aabbcc .* 1m3\.5s +failed: offsite$", lines[2])
    assert re.match(r"22aabbcc .* - +lost: in mail$", lines[3])
    assert re.search("^mail +[\u2581-\u2588]{2}  1.5s$", out, re.M)
    assert re.search("^offsite +[\u2581-\u2588]  1m0s$", out, re.M)


def test_topic_status_describes_each_result(typed):
    out = typed("help", "status")[1]
    results = {"running", "lost"} | {mission.result_of(problems, stopped)
                                     for problems, stopped in (
        ([], 0), ([], 15), *(([mission.RunProblem(result, "error", "x", "y")],
                              0) for result in ("tasks", "delivery")))}
    assert len(results) == 6
    for word in results:
        assert re.search(f"^  {word}\n      [A-Z]", out, re.M), word


def test_history_shows_the_number_of_runs_of_the_option(typed, past):
    found = json.loads(typed("history", "--json", "-n", "2")[1])
    assert [run["result"] for run in found] == ["failed", "lost"]


def test_history_before_the_first_run_says_so(typed):
    status, out, err = typed("history")
    assert status == 1 and out == "" and "no runs recorded for mission" in err


@pytest.mark.parametrize("word, number", [
    ([], 2), (["00"], 0), (["11aabbcc"], 1), (["2026-03-02"], 1),
    (["2026-03"], 2),
])
def test_log_prints_a_saved_log_without_its_escapes(
        word, number, typed, past):
    assert typed("log", *word) == (0, f"log {number}\n\\x1b[2Jevil\n", "")


def test_log_of_a_run_without_a_saved_log_is_an_error(typed, past, scratch):
    status, out, err = typed("log", "ff")
    assert status == 1 and out == "" and 'no saved log of run "ff"' in err
    os.unlink(scratch.logs / "2026-03-03-02-00-00.txt")
    status, out, err = typed("log")
    assert status == 1 and out == "" and "2026-03-03-02-00-00.txt: " in err


def test_log_prints_the_part_that_could_be_read_before_a_hang(
        typed, past, scratch, monkeypatch):
    def hang(send, path: str) -> None:
        send("first\n")
        signal.pause()

    monkeypatch.setattr(mission, "send_log", hang)
    monkeypatch.setattr(mission, "ANSWER_SECONDS", 0.5)
    path = scratch.logs / "2026-03-03-02-00-00.txt"
    assert typed("log") == (1, "first\n", f"mission: error: {path}: does not "
                            "answer\n")


@pytest.mark.parametrize("plant", ["link", "fifo", "folder"])
def test_log_refuses_a_path_that_is_not_a_regular_file(
        plant, typed, past, scratch):
    path = scratch.logs / "2026-03-03-02-00-00.txt"
    path.unlink()
    if plant == "link":
        path.symlink_to("/etc/passwd")
    elif plant == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    status, out, err = typed("log")
    assert status == 1 and out == "" and str(path) in err


# --- the parts agree ------------------------------------------------------


def test_every_command_has_a_function_that_accepts_its_arguments():
    for name, command in mission.COMMANDS.items():
        words = list(inspect.signature(command.handler).parameters.values())
        arguments = command.arguments.split()
        assert [word.default is word.empty for word in words[1:]] == [
            not argument.startswith("[") for argument in arguments], name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_knows_every_command_and_option(shell, typed):
    status, out, err = typed("completion", shell)
    assert (status, err) == (0, "")
    for word in mission.COMMANDS:
        assert word in out
    for option in mission.OPTIONS.values():
        assert option.names[-1] in out
    assert "COMMANDS" not in out and "OPTIONS" not in out


@pytest.mark.parametrize("shell, syntax", [
    ("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute"),
])
def test_a_completion_is_a_script_of_its_shell(shell, syntax, typed,
                                               tmp_path):
    support.need(shell)
    script = tmp_path / "completion"
    script.write_text(typed("completion", shell)[1])
    done = subprocess.run([shell, syntax, str(script)],
                          stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_bash_completes_commands_options_and_tasks(typed, tmp_path):
    support.need("bash")
    script = tmp_path / "completion"
    script.write_text(typed("completion", "bash")[1])
    done = subprocess.run(
        ["bash", "-c", 'source "$1"; COMP_WORDS=(mission his); COMP_CWORD=1; '
         '_mission; echo "${COMPREPLY[@]}"; COMP_WORDS=(mission --dr); '
         '_mission; echo "${COMPREPLY[@]}"', "bash", str(script)],
        stdout=subprocess.PIPE)
    assert done.stdout == b"history\n--dry-run\n"


@pytest.mark.parametrize("environ, terminal, words, coloured", [
    ({}, True, [], True), ({}, False, [], False), ({}, True, ["-C"], False),
    ({"NO_COLOR": "1"}, True, [], False), ({"NO_COLOR": ""}, True, [], True),
    ({}, True, ["--no-color"], False),
])
def test_colour_is_used_only_on_a_terminal(
        environ, terminal, words, coloured, typed, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mission.sys.stdout, "isatty", lambda: terminal)
    assert ("\x1b[" in typed("list", "-v", *words)[1]) is coloured


def test_closed_pipe_is_not_an_error(scratch):
    """mission list | head"""
    for number in range(3000):
        scratch.entry(f"t{number}", "exec", name="x" * 50)
    scratch.write()
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        scratch.command("list", "-v"), stdout=writing,
        stderr=subprocess.PIPE, cwd=scratch.folder, env=scratch.env)
    os.close(writing)
    ended = support.ended(process)
    assert (ended.code, ended.err) == (141, "")

"""Typical mistakes, made as people make them: each message names the thing
that is wrong, and the hint is one command or one edit that fixes it."""

from __future__ import annotations

import pytest

import support
from dashboard_rig import DashboardHost

TAB = """\
"Nightly" 30 2 * * * true
"Say Hi" @manual echo {{To}} {{Times, int, 1}}
"Vault" @manual echo {{Key, secret}}
[Web]
"Deploy" @manual true
[Mail]
"Deploy" @manual true
"""
END = "errors in crontab file, can't install."

# The mistake, the lines of a tab, what is printed.
TAB_MISTAKES = {
    "four time fields": ("* * * * date", "1:9: bad day-of-week: expected 5 "
                         "columns before the command, found 4 "
                         "(30 2 * * * COMMAND)"),
    "minute out of range": (
        "61 * * * * date", '1:1: bad minute: expected 0 to 59, found "61"'),
    "hour 24": ("0 24 * * * date", '1:3: bad hour: expected 0 to 23, found '
                '"24" (midnight is hour 0)'),
    "missing closing quote": (
        '"Nightly 30 2 * * * date', "1:1: bad name: missing closing quote, or "
        'missing blank after it ("Say Hi" @manual ~/tweet.sh)'),
    "misspelt @word": (
        "@dayly date", '1:1: bad time specifier: unknown "@dayly" (did you '
        "mean @daily?)"),
    "invalid value of a setting": (
        "KOI_TIMEOUT=soon", '1:13: bad setting: invalid KOI_TIMEOUT "soon" '
        "(expected a duration such as 90s or 1h30m)"),
    "unknown time zone": (
        "CRON_TZ=Europe/Berlim", "1:9: bad setting: unknown time zone "
        '"Europe/Berlim" (Europe/Berlin; ls /usr/share/zoneinfo)'),
    "argument in quotes": (
        '@manual echo "{{To}}"', "1:15: bad argument: the argument is in "
        "double quotes (remove the quotes: koi quotes the value itself)"),
    "unknown type of an argument": (
        "@manual echo {{N, integer}}", '1:14: bad argument: unknown type '
        '"integer" (expected string, int, bool, text, date, secret or '
        "choice(a|b|c))"),
    "scheduled job without a default": (
        "@daily echo {{To, string}}", "1:13: bad argument: missing default, "
        "because a scheduled start has no form to fill in "
        "({{To, string, default}})"),
    "follower of an unknown job": (
        '"B" @after "Nightli" date', '1:12: bad job: no job named "Nightli" '
        "in this tab"),
    "one name twice": (
        '"A" @daily a\n"A" @daily b', "2:1: bad job: duplicate of the job on "
        'line 1 (put a unique "Name" in front)'),
}
TAB_WARNINGS = {
    "misspelt setting": (
        "KOI_TIMEOT=5m\n@daily date", "1:1: warning: unknown setting: "
        "KOI_TIMEOT has no effect (did you mean KOI_TIMEOUT?)"),
    "setting below its job": (
        "@daily date\nKOI_TIMEOUT=5m", "2:1: warning: odd variable: "
        "KOI_TIMEOUT has no effect, because no job follows (put the setting "
        "above its jobs)"),
    "setting in the command": (
        "@daily KOI_TIMEOUT=5m date", "1:8: warning: odd command: "
        "KOI_TIMEOUT has no effect in a command (put the setting on a line "
        "above the job)"),
    "percent sign": (
        "@daily date '+%F'", "1:15: warning: odd command: the command ends at "
        "this %, and the rest is its input (write \\%)"),
    "user in a tab of a user": (
        "@daily root date", "1:8: warning: odd command: the command is `root` "
        "(only /etc/crontab and cron.d have a column for users)"),
    "hours over midnight": (
        "0 22-6 * * * date", '1:3: warning: odd hour: "22-6" ends before it '
        "begins, so it never matches (22-23,0-6)"),
    "day that does not exist": (
        "0 0 30 2 * date", "1:1: warning: odd schedule: the job never runs"),
}

# The mistake: what is typed, the status, error and hint.
COMMAND_MISTAKES = {
    "unknown command": (["list"], 1, "list: No such file or directory",
                        "koitab -l"),
    "unknown option": (["--frob"], 1, "unknown option --frob",
                       "koitab --help"),
    "option of another command": (
        ["next", "--follow"], 2, "--follow is not an option of koitab next",
        ""),
    "missing name": (["run"], 2, "missing argument NAME",
                     "koitab run NAME [ARG=VALUE]..."),
    "surplus argument": (["status", "foo"], 2, 'unexpected argument "foo"',
                         "koitab status"),
    "misspelt job": (["run", "Nigthly"], 1, 'no job named "Nigthly"',
                     'did you mean "Nightly"?'),
    "ambiguous job": (
        ["run", "Deploy"], 1, '2 jobs are named "Deploy": Web/Deploy, '
        "Mail/Deploy", "koitab run Web/Deploy"),
    "missing argument of a job": (
        ["run", "Say Hi"], 2, 'missing argument "To"',
        "koitab run 'Say Hi' To=VALUE"),
    "value without its name": (
        ["run", "Say Hi", "To"], 2, 'unexpected argument "To"',
        "koitab run NAME [ARG=VALUE]..."),
    "misspelt argument": (
        ["run", "Say Hi", "Too=me"], 2, 'the job has no argument "Too"',
        'did you mean "To"?'),
    "invalid value": (
        ["run", "Say Hi", "To=me", "Times=two"], 2,
        'invalid argument "Times": expected a whole number of at most 18 '
        "digits", ""),
    "secret on the command line": (
        ["run", "Vault", "Key=abc"], 2, '"Key" is secret, but other users can '
        "read command lines", "koitab run Vault Key=-"),
    "job that is not running": (
        ["kill", "Nightly"], 1, '"Nightly" is not running', "koitab status"),
    "unknown run": (["kill", "99"], 1, "no run 99", "koitab history"),
    "job that has not run": (["log", "Nightly"], 1,
                             '"Nightly" has not run yet', "koitab next"),
    "job that is not paused": (["resume", "Nightly"], 1,
                               '"Nightly" is not paused', ""),
    "time in words": (
        ["pause", "Nightly", "--until", "tomorrow"], 2,
        "--until tomorrow: not a time (expected 2026-03-29T01:30, "
        "2026-03-29T01:30:00+01:00 or 2026-03-29)", ""),
    "time in the past": (
        ["pause", "Nightly", "--until", "2020-01-01T00:00Z"], 1,
        "2020-01-01T00:00:00+00:00 is in the past", ""),
    "number in words": (["next", "-n", "two"], 2,
                        "-n two: not a number from 1 to 100,000",
                        "koitab next --help"),
    "unknown dashboard action": (
        ["-d", "frob"], 2, 'unknown action "frob" (expected new, join, show, '
        "rotate, leave or token)", ""),
    "second dashboard": (
        ["-d", "join", "https://koi.example"], 1,
        "this machine is already a member of URL", "koitab -d leave"),
    "wrong passphrase": (
        ["run", "--on", "web1", "Say Hi", "To=me"], 1,
        "wrong passphrase for URL", "type the one that koitab -d new printed, "
        "or the last koitab -d rotate"),
    "unknown unit": (["unit", "cron"], 2, 'unexpected argument "cron" '
                     "(expected daemon or dashboard)", ""),
    "second koid": (["daemon"], 1, "koid is already running (HOME)",
                    "koitab status"),
    "address without a port": (
        ["dashboard", "--listen", "8077"], 2, '"8077" is not ADDRESS:PORT',
        "127.0.0.1:8077, 0.0.0.0:8077, [::1]:8077"),
    "certificate without its key": (
        ["dashboard", "--cert", "c.pem"], 2, "--cert and --key go together",
        "--cert FILE --key FILE"),
}


@pytest.fixture(scope="module")
def web1(web1_host, operator):
    """A koid with the TAB, which is a member of a dashboard."""
    operator.specs(operator.host("web1"))
    return web1_host


def lines_of(error: str, hint: str) -> list[str]:
    crontab_like = error.endswith("No such file or directory")
    return [error if crontab_like else f"koitab: error: {error}",
            *[f"koitab: hint: {hint}"] * bool(hint)]


@pytest.mark.parametrize("mistake", COMMAND_MISTAKES)
def test_mistake_in_a_command_gets_an_error_and_the_fix(web1, server, mistake):
    typed, status, error, hint = COMMAND_MISTAKES[mistake]
    done = web1.koitab(*typed, stdin="not the passphrase\n")
    said = done.err.replace(str(web1.home), "HOME").replace(server.url, "URL")
    assert said.splitlines() == lines_of(error, hint)
    assert (done.code, done.out) == (status, "")


@pytest.mark.parametrize("mistake", TAB_MISTAKES)
def test_mistake_in_a_tab_gets_one_line_with_place_and_fix(web1, mistake):
    text, line = TAB_MISTAKES[mistake]
    before = web1.koitab("-l").out
    done = web1.koitab("-", stdin=text + "\n")
    assert done.err.splitlines() == [f"-:{line}", END]
    assert done.code == 1 and web1.koitab("-l").out == before


@pytest.mark.parametrize("mistake", TAB_WARNINGS)
def test_suspicious_line_of_a_tab_gets_a_warning_with_the_fix(web1, mistake):
    text, line = TAB_WARNINGS[mistake]
    path = web1.folder / "tab"
    path.write_text(text + "\n")
    done = web1.koitab("-T", str(path))
    assert f"{path}:{line}" in done.err.splitlines() and done.code == 0


def test_tab_without_a_last_newline_is_refused_with_the_fix(web1):
    done = web1.koitab("-", stdin="@daily date")
    assert done.err.splitlines() == [
        "-:1:12: premature EOF: missing newline at the end of the last line "
        "(press Enter after it)",
        "new crontab file is missing newline before EOF, can't install."]


@pytest.fixture
def loose(tmp_path):
    """A machine without a koid, which is not a member of a dashboard."""
    return DashboardHost(tmp_path, "loose")


@pytest.mark.parametrize("typed", [
    ["run", "Nightly"], ["kill", "Nightly"], ["pause", "Nightly"]],
    ids=lambda typed: typed[0])
def test_command_without_koid_says_how_to_start_koid(loose, typed):
    loose.tab('"Nightly" 30 2 * * * true\n')
    done = loose.koitab(*typed)
    assert (done.code, done.out, done.err.splitlines()) == (
        1, "", ["koitab: error: koid is not running", "koitab: hint: koid &"])


@pytest.mark.parametrize("typed", [
    ["-d", "show"], ["-d", "leave"], ["-d", "rotate"],
    ["run", "--on", "web1", "Nightly"]], ids=" ".join)
def test_command_without_a_dashboard_says_how_to_join_one(loose, typed):
    done = loose.koitab(*typed)
    assert (done.code, done.out, done.err.splitlines()) == (
        1, "", ["koitab: error: this machine is not a member of a dashboard",
                "koitab: hint: koitab -d new; or koitab -d join URL"])


def test_state_directory_open_to_others_is_refused_with_the_fix(loose):
    loose.home.chmod(0o755)
    done = loose.koitab("daemon")
    assert (done.code, done.err.splitlines()) == (1, [
        f"koitab: error: {loose.home} is accessible to other users (mode "
        "0755)", f"koitab: hint: chmod 700 {loose.home}"])


def test_unknown_user_is_refused_in_the_words_of_crontab(loose):
    done = loose.koitab("-u", "nobody-of-here", "-l")
    assert (done.code, done.err) == (
        1, "koitab:  user `nobody-of-here' unknown\n" if support.AS_ROOT
        else "must be privileged to use -u\n")


def test_tab_that_cannot_be_read_is_named(loose, tmp_path):
    done = loose.koitab("-T", str(tmp_path))
    assert (done.code, done.err) == (
        1, f"koitab: error: {tmp_path}: Is a directory\n")


def test_plain_http_beyond_this_machine_is_refused_with_the_choices(tmp_path):
    strict = DashboardHost(tmp_path, "strict", plain_http=False)
    done = strict.koitab("dashboard", "--listen", "0.0.0.0:8077")
    assert (done.code, done.err.splitlines()) == (2, [
        "koitab: error: refusing to serve plain http at 0.0.0.0: anyone on "
        "the network could read and change everything, and replace the page "
        "that asks for the passphrase", "koitab: hint: --cert FILE --key "
        "FILE; or a proxy with https in front of 127.0.0.1; or --plain-http"])


def test_removed_name_of_leave_still_leaves(loose):
    done = loose.koitab("-d", "off")
    assert done.err.startswith(
        "koitab: error: this machine is not a member of a dashboard\n")


# --- mission

CONFIGURATION = """\
{
    "tasks": [
        { "slug": "etc", "type": "exec", "scheduled": true }
    ],
    "user": { "name": "USER", "email": "ops@example.com" },
    "storage": {
        "tasks": { "path": "tasks" },
        "logs": { "path": "logs" }
    },
    "mail": { "enabled": false }
}
"""
# The mistake: what replaces what in CONFIGURATION, what `check` prints.
CONFIGURATION_MISTAKES = {
    "misspelt key": (
        '"scheduled"', '"schedulde"', "3:42: tasks[0].schedulde: unknown key "
        "(did you mean scheduled?)"),
    "key in the wrong place": (
        '"mail": {', '"retries": 2, "mail": {', "10:5: retries: unknown key "
        "(expected in tasks[].retries or defaults.retries or ping.retries)"),
    "doubled comma": (
        '"exec",', '"exec",,', '3:41: expected a key in double quotes, found '
        '","'),
    "missing comma": (
        '"etc", "type"', '"etc" "type"', '3:25: expected "," or "}", found a '
        "string"),
    "single quotes": (
        '"exec"', "'exec'", '3:34: expected a value, found "\'exec\'"'),
    "key without quotes": (
        '"slug":', "slug:", '3:11: expected a key in double quotes, found '
        '"slug"'),
    "missing closing quote": (
        '"etc"', '"etc', '3:26: expected "," or "}", found "type"'),
    "missing last brace": ("}\n}\n", "}\n", "11:1: unexpected end of file"),
    "Python's True": ("true", "True", '3:55: expected a value, found "True"'),
    "value of the wrong type": (
        "true", '"yes"', '3:55: tasks[0].scheduled: invalid value "yes" '
        "(expected true or false)"),
    "duration in words": (
        '"scheduled": true', '"timeout": "1 hour"', "3:53: tasks[0].timeout: "
        'invalid value "1 hour" (expected a duration such as "90s", "10m" or '
        '"2h", above zero)'),
    "unknown user": (
        "USER", "webadm", '5:23: user.name: user "webadm" does not exist '
        "(expected the name of a user of this host)"),
    "home of an unknown user": (
        '"logs" }', '"~webadm/logs" }', '8:27: storage.logs.path: '
        '"~webadm/logs": cannot expand ~: user "webadm" does not exist '
        "(expected an absolute path, or ~ of a user of this host)"),
    "unknown task in needs": (
        '"scheduled": true', '"needs": ["ect"]', "3:51: tasks[0].needs: "
        'unknown task "ect" (did you mean etc?)'),
    "one slug twice": (
        '{ "slug"', '{ "slug": "etc", "type": "exec" }, { "slug"',
        '3:54: tasks[1].slug: duplicate slug "etc" (rename one of the tasks)'),
    "required storage missing": (
        '"logs": {', '"log": {', '6:16: storage: missing storage "logs" '
        '("logs": {"path": "..."})'),
    "unknown type of mail": (
        '"enabled": false', '"enabled": true, "type": "smpt"', "10:40: "
        'mail.type: unknown type "smpt" (expected "sendmail" or "smtp")'),
    "URL without a scheme": (
        '"mail": {',
        '"ping": {"enabled": true, "endpoint": "hc/1"}, "mail": {',
        "10:43: ping.endpoint: invalid URL (expected http:// or https://)"),
}
# The mistake: what is typed, the status, error and hint.
MISSION_MISTAKES = {
    "no command": ([], 2, "no command given (expected init, new, check, dump, "
                   "list, unit, run, history, log, status, completion, help, "
                   "man, version)", ""),
    "misspelt command": (["chekc"], 2, 'unknown command "chekc"',
                         "mission -c FILE check"),
    "unknown option": (["run", "--frob"], 2, "unknown option --frob",
                       "mission run --help"),
    "option without its value": (
        ["run", "-t"], 2, "-t/--task: expected one argument",
        "mission run --help"),
    "misspelt task": (["run", "-t", "etcc"], 2, 'unknown task "etcc"',
                      "mission -c FILE run -t etc"),
    "unknown task": (["run", "-t", "photos"], 2, 'unknown task "photos"',
                     "mission -c FILE list"),
    "missing argument": (["new"], 2, "missing argument SLUG",
                         "mission -c FILE new SLUG"),
    "surplus argument": (["check", "it"], 2, 'unexpected argument "it"',
                         "mission -c FILE check"),
    "invalid slug": (["new", "My Task"], 2, 'invalid slug "My Task" (expected '
                     "letters a-z, digits, - and _, at most 64)", ""),
    "time in words": (["run", "--wait", "long"], 2, "--wait long: not a "
                      "duration such as 90s, 30m or 26h", ""),
    "no run yet": (["history"], 1, "no runs recorded for FILE",
                   "mission -c FILE history"),
}


@pytest.fixture
def configured(scratch):
    """A configuration that `mission check` accepts."""
    scratch.task("etc", "true")
    scratch.path.write_text(CONFIGURATION.replace("USER", support.some_user()))
    scratch.path.chmod(0o600)
    return scratch


@pytest.mark.parametrize("mistake", CONFIGURATION_MISTAKES)
def test_mistake_in_a_configuration_gets_one_line_with_place_and_fix(
        configured, mistake):
    old, new, line = CONFIGURATION_MISTAKES[mistake]
    text = CONFIGURATION.replace(old, new, 1)
    assert text != CONFIGURATION
    configured.path.write_text(text.replace("USER", support.some_user()))
    done = configured.mission("check", write=False)
    assert (done.code, done.err.splitlines()) == (78, [
        f"{configured.path}:{line}",
        f"mission: error: 1 error in {configured.path}"])


@pytest.mark.parametrize("mistake", MISSION_MISTAKES)
def test_mistake_in_a_mission_command_gets_an_error_and_the_fix(
        configured, mistake):
    typed, status, error, hint = MISSION_MISTAKES[mistake]
    done = configured.mission(*typed, write=False)
    assert (done.code, done.out) == (status, "")
    said = done.err.replace(str(configured.path), "FILE").replace(
        "FILE by this user", "FILE")        # root sees all runs
    assert said.splitlines() == [
        f"mission: error: {error}", *[f"mission: hint: {hint}"] * bool(hint)]


def test_missing_task_directory_names_the_command_that_makes_the_task(
        configured):
    configured.path.write_text(configured.path.read_text().replace(
        '"tasks" }', '"taks" }'))
    done = configured.mission("check", write=False)
    folder = configured.folder
    assert done.err.splitlines() == [
        f"{configured.path}:3:19: tasks[0].slug: {folder}/taks/etc/run does "
        f"not exist (mission -c {configured.path} new etc)",
        f"{configured.path}:7:28: storage.tasks.path: {folder}/taks does not "
        f"exist (mkdir -p {folder}/taks)",
        f"mission: error: 2 errors in {configured.path}"]


@pytest.mark.root_only
def test_configuration_writable_by_everyone_is_refused_with_the_fix(
        configured):
    configured.path.chmod(0o646)
    done = configured.mission("run", write=False)
    path = configured.path
    assert (done.code, done.err.splitlines()) == (78, [
        f"mission: error: {path} is not trusted: {path} is writable by "
        "everyone (mode 0646)", f"mission: hint: chmod o-w {path}"])


def test_missing_configuration_is_refused_with_the_command_that_makes_one(
        scratch):
    done = scratch.mission("run", write=False)
    assert (done.code, done.err.splitlines()) == (78, [
        f"mission: error: {scratch.path}: no such file",
        f"mission: hint: mission -c {scratch.path} init"])


def test_second_run_is_refused_with_the_command_that_waits(scratch):
    scratch.task("long", "touch begun; exec sleep 60")
    first = scratch.start("run")
    try:
        support.wait_until((scratch.tasks / "long" / "begun").exists, 30,
                           "the task to begin")
        done = scratch.mission("run")
        error, hint = done.err.splitlines()
        assert done.code == 75
        assert error.startswith("mission: error: another run is active: ")
        assert hint == f"mission: hint: mission -c {scratch.path} run " \
            "--wait 30m"
    finally:
        first.terminate()
        support.ended(first)

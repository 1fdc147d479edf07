"""Section Tab: parsing tabs, the lexer, warnings and limits."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

import support

koitab = support.load("koitab")
CASES = Path(__file__).parent / "cases"


def tab(text: str, **options):
    return koitab.parse_tab(text, **options)


def jobs(text: str, **options):
    """Return the jobs of a tab, which must have no errors."""
    found = tab(text, **options)
    assert [each.text("tab") for each in found.errors()] == []
    return found.jobs


def only(line: str, **options):
    """Return the job of a tab with one entry."""
    found = jobs(line + "\n", **options)
    assert len(found) == 1
    return found[0]


def errors_in(text: str, **options) -> list[tuple]:
    return [(p.line, p.column, p.what) for p in tab(text, **options).errors()]


def warnings(text: str, **options) -> list[tuple]:
    found = tab(text, **options)
    assert [each.text("tab") for each in found.errors()] == []
    return [(p.column, p.what) for p in found.diagnostics]


def rejected() -> list[tuple[str, str]]:
    lines = (CASES / "rejected.tsv").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")[:2]) for line in lines
            if not line.startswith("# ")]


# --- invalid lines --------------------------------------------------------


@pytest.mark.parametrize("columns, field", rejected())
def test_line_that_every_cron_rejects_is_rejected(columns, field):
    line = columns.replace("  (no command)", "") if "(no command)" in columns \
        else f"{columns} true"
    found = tab(f"# a comment\n{line}\n")
    first = found.errors()[0]
    assert (first.line, first.what) == (2, f"bad {field}")
    assert 1 <= first.column <= len(line) + 1
    assert found.jobs == []
    assert first.text("tab").startswith(f"tab:2:{first.column}: bad {field}: ")


def test_case_file_has_all_rejected_lines():
    assert len(rejected()) == 83


@pytest.mark.parametrize("text, where", [
    ("60 * * * * x\n", [(1, 1, "bad minute")]),
    ("  60 * * * * x\n", [(1, 3, "bad minute")]),
    ("5 1,24 * * * x\n", [(1, 5, "bad hour")]),
    ("60 24 * * * x\n", [(1, 1, "bad minute"), (1, 4, "bad hour")]),
    ("60 24 32 * * x\n", [(1, 1, "bad minute")]),   # this is not an entry
    ("\t5 \t* * * 1-8 x\n", [(1, 13, "bad day-of-week")]),
    ("* * * *\n", [(1, 8, "bad day-of-week")]),
    ("* * * JAN c\n", [(1, 11, "bad day-of-week")]),
    ("@daily\n", [(1, 7, "bad command")]), ("@daily \n", [(1, 8,
                                                          "bad command")]),
    ("* * * * * x\n\n61 * * * * y\n* 25 * * * z\n",
     [(3, 1, "bad minute"), (4, 3, "bad hour")]),
    ("A=\"x\n", [(1, 1, "bad minute")]),
    ('A="x" # c\n', [(1, 1, "bad minute")]),
    ('A="x"y\n', [(1, 1, "bad minute")]),
    ('A="a\\"b"\n', [(1, 1, "bad minute")]),
    ("export A=b\n", [(1, 1, "bad minute")]),
    ("A B=c\n", [(1, 1, "bad minute")]),
    ("A : b\n", [(1, 1, "bad minute")]),
    ("garbage\n", [(1, 1, "bad minute")]),
    ("\r\n", [(1, 1, "bad minute")]),
    ("\ufeff* * * * * x\n", [(1, 1, "bad minute")]),
    ("\v* * * * * x\n", [(1, 1, "bad minute")]),
    ("\u00a0* * * * * x\n", [(1, 1, "bad minute")]),
    ("* * * * * x", [(1, 12, "premature EOF")]),
    ("A=b\n* * * * * x\nC=d", [(3, 4, "premature EOF")]),
    ("* * * * * a\0b\n", [(1, 12, "bad line")]),
    ("@daily\r\n", [(1, 1, "bad time specifier")]),
    ("-5 * * * * x\n", [(1, 1, "bad minute")]),
    ("[]\n", [(1, 2, "bad section")]),
    ("[a\x1bb]\n", [(1, 2, "bad section")]),
    (f"[{'x' * 101}]\n", [(1, 2, "bad section")]),
    ('"" @daily x\n', [(1, 2, "bad name")]),
    ('"a @daily x\n', [(1, 1, "bad name")]),
    ('"a"@daily x\n', [(1, 1, "bad name")]),
    ('"a\u202eb" @daily x\n', [(1, 2, "bad name")]),
    ("KOI_TIMEOUT=soon\n", [(1, 13, "bad setting")]),
    ("KOI_OVERLAP = never\n", [(1, 15, "bad setting")]),
    ("KOI_RETRY=-1\n", [(1, 11, "bad setting")]),
    ("KOI_CATCHUP=1\n", [(1, 13, "bad setting")]),
    ("KOI_KEEP=0\n", [(1, 10, "bad setting")]),
    ("KOI_CONFIRM=maybe\n", [(1, 13, "bad setting")]),
    ("KOI_START_WITHIN=\n", [(1, 18, "bad setting")]),
    ("KOI_NICE=20\n", [(1, 10, "bad setting")]),
    ("KOI_NICE=-1\n", [(1, 10, "bad setting")]),
    ("KOI_SKIP=2026-02-30\n", [(1, 10, "bad setting")]),
    ("KOI_SKIP=2026-02-01,x,2026-02-03\n", [(1, 21, "bad setting")]),
    ("KOI_SKIP=2026-02-01,2026-02-02..\n", [(1, 21, "bad setting")]),
    ("KOI_SKIP=2027-01-01..2026-12-24\n", [(1, 10, "bad setting")]),
    ("KOI_SKIP=" + "2027-01-01," * 240 + "2027-01-01\n",
     [(1, 10, "bad setting")]),
    ("@manual x\nA=1\n@manual x\n", [(3, 1, "bad job")]),
    ('"A" @daily x\n"A" @hourly y\n', [(2, 1, "bad job")]),
    ("* * * * * " + "x" * 131_072 + "\n", [(1, 11, "bad command")]),
])
def test_each_error_has_its_line_and_column(text, where):
    assert errors_in(text) == where


def test_invalid_line_drops_only_itself():
    found = tab("A=1\n* * * * * one\n61 * * * * two\n@daily three\nx")
    assert [job.command for job in found.jobs] == ["one", "three"]
    assert len(found.errors()) == 2


@pytest.mark.parametrize("value, why", [
    ("2026-02-30", '"2026-02-30" is not a date'),
    ("2026-12-24..", '"" is not a date'),
    ("2027-01-01..2026-12-24",
     '"2027-01-01..2026-12-24" ends before it begins')])
def test_invalid_dates_are_named(value, why):
    error, = tab(f"KOI_SKIP={value}\n").errors()
    assert (error.why, error.hint) == (
        f"KOI_SKIP: {why}",
        "expected dates such as 2026-12-24..2027-01-01,2027-05-01")


def test_every_error_is_reported_in_one_pass():
    text = "".join(f"{n} * * * * x{n}\n" for n in range(50, 80))
    assert [line for line, _, _ in errors_in(text)] == list(range(11, 31))


def test_hint_names_the_fix():
    def hint(text):
        return tab(text + "\n").errors()[0].hint

    assert hint("5/10 * * * * x") == "5-59/10"
    assert hint("* 24 * * * x") == "midnight is hour 0"
    assert hint("@Daily x") == "did you mean @daily?"
    assert hint("* * * january * x") == "did you mean jan?"
    assert "five columns" in hint("* * * * * * x")
    assert "5 minutes: */5 * * * *" in hint("@every 5m x")
    assert "days 28-31" in hint("0 0 L * * x")
    assert "second Friday" in hint("0 0 * * 5#2 x")
    assert "1-5 in the last column" in hint("0 0 15W * * x")
    assert hint("5 * * * echo hi") == "30 2 * * * COMMAND"


@pytest.mark.parametrize("text, where, why", [
    ("5 * * * echo hi", (9, "bad day-of-week"),
     "expected 5 columns before the command, found 4"),
    ("5 * /usr/bin/x a b", (5, "bad day-of-month"),
     "expected 5 columns before the command, found 2"),
    ("[Unclosed", (10, "bad section"), "missing ]"),
    ("\ufeff* * * * * x", (1, "bad minute"),
     "the line begins with a byte order mark (BOM)"),
    ("@sometimes x", (1, "bad time specifier"), 'unknown "@sometimes"'),
])
def test_error_names_what_is_missing(text, where, why):
    error, = tab(text + "\n").errors()
    assert ((error.column, error.what), error.why) == (where, why)


# --- @after ---------------------------------------------------------------


def test_follower_knows_the_job_that_it_follows():
    found = jobs('"C" @after "S/B" c\n[S]\n"B" @after "A" b\n[T]\n'
                 '"A" @daily a\n"B" @daily d\nKOI_SKIP=2027-01-01\n'
                 '@after "A" e {{N, int, 1}}\n')
    assert [(job.when, job.after, job.command) for job in found] == [
        ('@after "S/B"', ("name", "S", "B"), "c"),
        ('@after "A"', ("name", "T", "A"), "b"),
        ("@daily", (), "a"), ("@daily", (), "d"),
        ('@after "A"', ("name", "T", "A"), "e {{N, int, 1}}")]
    assert [job.describe() for job in found][::4] == [
        "After S/B", "After A, not on 2027-01-01"]


@pytest.mark.parametrize("text, line, column, why, hint", [
    ('"B" @after "A" b\n', 1, 12, 'no job named "A"', ""),
    ('"Nightly" @daily a\n "B"  @after  "Nigtly" b\n', 2, 15,
     'no job named "Nigtly"', 'did you mean "Nightly"?'),
    ('"A" @daily a\n[S]\n"A" @daily a\n"B" @after "A" b\n', 4, 12,
     '2 jobs are named "A"', '@after "/A"'),
    ('"A" @after "A" a\n', 1, 12, "form a cycle", ""),
    ('61 * * * * a\n"A" 61 * * * * a\n"B" @after "A" b\n', 3, 12,
     'no job named "A"', ""),
    ('"B" @after A b\n', 1, 12, "in quotes", '"Report" @after'),
    ('"B" @after "" b\n', 1, 13, "empty name", ""),
    ('"A" @daily a\n"B" @after "A" b {{N, int}}\n', 2, 18,
     "missing default", ""),
])
def test_follower_without_one_valid_job_is_rejected(text, line, column, why,
                                                    hint):
    error = tab(text).errors()[-1]
    assert (error.line, error.column) == (line, column)
    assert why in error.why and hint in error.hint


def test_cycle_drops_its_lines_and_those_that_follow_them():
    found = tab('"A" @after "C" a\n"B" @after "A" b\n"C" @after "B" c\n'
                '"D" @after "C" d\n"E" @daily e\n"F" @after "E" f\n')
    assert [job.name for job in found.jobs] == ["E", "F"]
    assert [(error.line, error.column) for error in found.errors()] == [
        (line, 12) for line in (1, 2, 3, 4)]


def test_follower_of_a_manual_job_gets_a_warning():
    assert warnings('"A" @manual a\n"B" @after "A" b\n') == [
        (12, "odd job")]


def test_after_is_not_recognized_in_crontabs_of_cron():
    text = '"A" @daily root a\n"B" @after "A" root b\n'
    assert errors_in(text, system=True)[0][:2] == (2, 5)
    assert errors_in(text, literal=True)[0][:2] == (2, 5)


# --- assignments ----------------------------------------------------------


@pytest.mark.parametrize("line, name, value", [
    ("A=b", "A", "b"), ("A = b", "A", "b"), ("  A\t=\tb  ", "A", "b"),
    ("A=", "A", ""), ("A=   ", "A", ""), ('A=""', "A", ""), ("A=''", "A", ""),
    ('A=" b "', "A", " b "), ("A=\"'x'\"", "A", "'x'"),
    ("A='a\"b'", "A", 'a"b'), ("A=b c # d", "A", "b c # d"),
    ("A=a=b%c", "A", "a=b%c"), ('A=x "y"', "A", 'x "y"'),
    ('"A"=b', "A", "b"), ("'FOO BAR'=x", "FOO BAR", "x"), ("=foo", "", "foo"),
    ("*=5", "*", "5"), ("1=5", "1", "5"), ("@daily=5", "@daily", "5"),
    ("FOO+=x", "FOO+", "x"), ("A=b\r", "A", "b"), ('A="b"\r', "A", "b"),
    ("TZ=UTC 0 0 * * * cmd", "TZ", "UTC 0 0 * * * cmd"),
    ("A=$HOME", "A", "$HOME"), ("A=\udcff", "A", "\udcff"),
])
def test_assignment_is_parsed_as_cron_parses_it(line, name, value):
    found = jobs(f"{line}\n* * * * * x\n")
    assert found[0].environment == {name: value}


def test_assignment_applies_to_the_lines_below_it():
    found = jobs("@daily a\nA=1\n@daily b\nA=2\nB=3\n@daily c\n")
    assert [job.environment for job in found] == [
        {}, {"A": "1"}, {"A": "2", "B": "3"}]


def test_settings_apply_to_the_lines_below_them():
    found = jobs(
        "@daily a\nKOI_TIMEOUT=10m\nKOI_OVERLAP=skip\nKOI_RETRY=3\n"
        "KOI_CATCHUP=yes\nKOI_KEEP=7\nKOI_START_WITHIN=90s\nKOI_CONFIRM=cli\n"
        "KOI_NICE=19\nKOI_SKIP=1969-12-31 .. 1970-01-02, 1970-01-05\n"
        "CRON_TZ=Europe/Berlin\nRANDOM_DELAY=45\n@daily b\nCRON_TZ=\n"
        "KOI_SKIP=\n@daily c\n")
    assert found[0].settings == koitab.Settings()
    assert found[1].settings == koitab.Settings(
        timeout=600.0, overlap="skip", retry=3, catchup="yes", keep=7,
        start_within=90.0, confirm="cli", nice=19, skip=((-1, 1), (4, 4)),
        zone="Europe/Berlin", random_delay=45)
    assert (found[2].settings.zone, found[2].settings.skip) == ("", ())
    assert tab("\nCRON_TZ=X/Y\n@daily a\n").zones == {"X/Y": (2, 9)}


# --- entries --------------------------------------------------------------


@pytest.mark.parametrize("line, when, command", [
    ("* * * * * x", "* * * * *", "x"), ("\t*\t* *  * * x  ", "* * * * *",
                                        "x  "),
    ("@hourly\tpython s.py", "@hourly", "python s.py"),
    ("@reboot x", "@reboot", "x"), ("@manual ~/t.sh", "@manual", "~/t.sh"),
    ("0 0 * * MON x # no comment", "0 0 * * MON", "x # no comment"),
    ("5 4 * * 1 x\r", "5 4 * * 1", "x\r"),
    ("* * * * * FOO=bar x", "* * * * *", "FOO=bar x"),
    ("* * * * * \udcff", "* * * * *", "\udcff"),
])
def test_entry_has_its_schedule_and_command(line, when, command):
    job = only(line)
    assert (job.when, job.command) == (when, command)


def test_jobs_get_the_section_above_and_their_name():
    found = jobs(
        '0 0 * * * before\n[Bots]\n"Crawler" */5 * * * * crawl\n@hourly s.py\n'
        ' [ Ad = min ] \n"Say Hi" @manual ~/tweet.sh\n"A"=b\n"A" @daily x\n')
    assert [(job.line, job.section, job.name) for job in found] == [
        (1, "", ""), (3, "Bots", "Crawler"), (4, "Bots", ""),
        (6, "Ad = min", "Say Hi"), (8, "Ad = min", "A")]
    assert found[4].environment == {"A": "b"}
    assert found[1].label == "Crawler"
    assert found[2].label == "s.py"


@pytest.mark.parametrize("above, about", [
    ("# Sends a greeting.\n", "Sends a greeting."),
    ("  ## Sends\n#\n# a greeting.\n", "Sends a greeting."),
    ("# Of the section\n[Bots]\n", ""),
    ("# Of the assignment\nA=b\n", ""),
    ("# Of nothing\n\n", ""),
    ("# Of the job above\n@daily x\n", ""),
    ("# \x1b[31m\u202e\n", "\\x1b[31m\\u202e"),
    ("# " + "long " * 30_000 + "\n", ("long " * 60).strip())])
def test_comment_directly_above_a_job_describes_it(above, about):
    found = jobs(above + '"Hi" @manual hi\n')[-1]
    assert found.about.strip() == about
    assert json.loads(koitab.job_manifest(found, "ann", "", b""))[
        "about"].strip() == about


def test_comments_of_crons_files_describe_nothing():
    assert only("# m h dom\n@daily x", literal=True).about == ""


def test_tag_depends_on_section_and_name_or_on_schedule_and_command():
    named = jobs('[S]\n"N" @daily a\n')[0].tag
    assert jobs('\nX=1\n[S]\n"N" @hourly b\n')[0].tag == named
    assert jobs('[T]\n"N" @daily a\n')[0].tag != named
    plain = only("@daily a").tag
    assert jobs("[S]\n\n@daily a\n")[0].tag == plain
    assert only("@hourly a").tag != plain
    # A name cannot pretend to be a section, nor a Cyrillic letter a Latin.
    assert len({jobs(text)[0].tag for text in (
        '[a]\n"b" @daily x\n', '"ab" @daily x\n', '"\u0430b" @daily x\n')}) \
        == 3


def tags(text: str, **options) -> list[str]:
    """Return the tags of a tab's jobs, which are all different."""
    found = [job.tag for job in jobs(text, **options)]
    assert len(set(found)) == len(found)
    return found


LINE = "0 9 * * * x\n"


def test_equal_lines_are_jobs_that_differ_by_their_order():
    once, twice = tags(LINE), tags(2 * LINE)
    assert twice[:1] == once
    assert tags(3 * LINE)[:2] == twice
    assert tags(f"@daily y\n{LINE}# again\n{LINE}")[1:] == twice


def test_equal_lines_are_jobs_that_differ_by_the_assignments_in_force():
    berlin, york = tags(f"CRON_TZ=Europe/Berlin\n{LINE}"
                        f"CRON_TZ=America/New_York\n{LINE}")
    assert tags(f"CRON_TZ=America/New_York\n{LINE}"
                f"CRON_TZ=Europe/Berlin\n{LINE}") == [york, berlin]
    assert len(tags(f"MODE=a\n{LINE}MODE=b\n{LINE}{LINE}MODE=a\n{LINE}")) == 4


def test_assignments_do_not_count_where_no_other_line_is_equal():
    assert tags(f"MODE=a\n{LINE}") == tags(LINE)


def test_equal_lines_of_two_system_tabs_are_two_jobs():
    line = "* * * * * root x\n"
    found = {file: tags(f"WHO={file}\n{line}{line}", system=True, file=file)
             for file in ("/etc/cron.d/siteA", "/etc/cron.d/siteB")}
    assert len({tag for tags_of in found.values() for tag in tags_of}) == 4


@pytest.mark.parametrize("text, options, found", [
    ("-5 * * * * x", {"root": True}, ("x", True, False)),
    ("* * * * * -n x", {}, ("x", False, True)),
    ("* * * * * -nx", {}, ("-nx", False, False)),
    ("@manual -n  x", {}, ("x", False, True)),
])
def test_flags_of_cronie_are_recognized(text, options, found):
    job = only(text, **options)
    assert (job.command, job.unlogged, job.mail_failures) == found


def test_entry_of_a_system_tab_names_its_user():
    job = only("17 *\t* * *\troot\tcd / && x", system=True)
    assert (job.user, job.command) == ("root", "cd / && x")
    assert only("-@daily www x", system=True).user == "www"
    assert errors_in("0 0 1 1 * root\n", system=True) == [
        (1, 15, "bad command")]
    assert errors_in("0 0 1 1 * * c\n", system=True) == [
        (1, 13, "bad username")]
    assert errors_in("0 0 1 1 *\n", system=True) == [(1, 10, "bad username")]


DEBIAN = '''# /etc/crontab: system-wide crontab
SHELL=/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/sbin:/bin:/usr/sbin:/usr/bin

# *  *  *  *  * user-name command to be executed
17 *	* * *	root	cd / && run-parts --report /etc/cron.hourly
25 6	* * *	root	test -x /usr/sbin/anacron || { cd / && run-parts x; }
52 6	1 * *	root	test -x /usr/sbin/anacron || { cd / && run-parts y; }
#
5-55/10 * * * * root command -v debian-sa1 > /dev/null && debian-sa1 1 1
59 23 * * * root command -v debian-sa1 > /dev/null && debian-sa1 60 2
57 0 * * 0 root if [ -x /usr/share/mdadm/checkarray ] && [ $(date +\\%d) \
-le 7 ]; then /usr/share/mdadm/checkarray --cron --all --idle --quiet; fi
09,39 *     * * *     root   [ -x /usr/lib/php/sessionclean ] && if [ ! -d \
/run/systemd/system ]; then /usr/lib/php/sessionclean; fi
@reboot root /bin/true
'''


def test_crontabs_of_debian_packages_produce_no_diagnostics():
    found = tab(DEBIAN, system=True)
    assert [each.text("tab") for each in found.diagnostics] == []
    assert len(found.jobs) == 8
    assert "date +%d" in found.jobs[5].script
    for path in ["/etc/crontab", *Path("/etc/cron.d").glob("[!.]*")]:
        if os.access(path, os.R_OK):
            text = Path(path).read_text(errors="surrogateescape")
            assert tab(text, system=True).errors() == []


@pytest.mark.parametrize("command, script, stdin", [
    ("x", "x", ""), ("x%", "x", ""), ("x%a", "x", "a\n"),
    ("x%a%b", "x", "a\nb\n"), ("x%a%", "x", "a\n"), ("x%%", "x", "\n"),
    (r"date +\%F", "date +%F", ""), (r"x\\y", r"x\\y", ""),
    (r"x\\%y", r"x\\", "y\n"), (r"x%a\%b", "x", "a%b\n"),
    (r"x%a\nb\\%c", "x", "a\\nb\\%c\n"), ('x "a%b"', 'x "a', 'b"\n'),
    ("x\\", "x\\", ""),
])
def test_percent_separates_command_and_standard_input(command, script, stdin):
    job = only(f"@daily {command}")
    assert (job.script, job.stdin) == (script, stdin)


# --- warnings -------------------------------------------------------------


@pytest.mark.parametrize("line, where", [
    ("5-1 * * * * x", [(1, "odd minute"), (1, "odd schedule")]),
    ("*/100 * * * * x", [(1, "odd minute")]),
    ("0-59/60 * * * * x", [(1, "odd minute")]),
    ("0 0 * feb-jan * x", [(7, "odd month"), (1, "odd schedule")]),
    ("0 0 * * fri-mon x", [(9, "odd day-of-week"), (1, "odd schedule")]),
    ("30 2 30 2 * x", [(1, "odd schedule")]),
    ("30 2 31 4,6 * x", [(1, "odd schedule")]),
    ('"N" 30 2 30 2 * x', [(5, "odd schedule")]),
    ("0 9 1 * mon x", [(1, "odd schedule")]),
    ("* 3 * * * x", [(1, "odd schedule")]),
    ("0 0 * * * root x", [(11, "odd command")]),
    ("0 0 * * * x\r", [(12, "odd command")]),
    ("0 0 * * * x > $(date +%F)", [(23, "odd command")]),
    ('@daily wget "http://x/?a=b%20c"', [(27, "odd command")]),
    (r'@daily find /x -printf "%p\n"', [(25, "odd command")]),
    (r"@daily printf '%s\n' hi", [(16, "odd command")]),
    ("@daily wget http://x/a%2Fb", [(23, "odd command")]),
    ("@daily echo 100%", [(16, "odd command")]),
    ("@daily x `date -d yesterday +%F`", [(30, "odd command")]),
    ("PATH=$PATH:/x", [(6, "odd variable")]),
    ("MAILTO=$LOGNAME@example.org", [(8, "odd variable")]),
    ("TZ=Europe/Berlin", [(1, "odd variable")]),
    ("A=x # y", [(5, "odd variable")]), ("TZ=UTC 0 0 * * * x",
                                         [(1, "odd variable")]),
    ("1=2", [(1, "odd variable")]), ("KOI_TIMOUT=3", [(1, "unknown setting")]),
    ("RANDOM_DELAY=1441", [(14, "bad setting")]),
    ("@daily x '{{ID}} {{Name}}'", [(11, "odd argument")]),
    ("@daily x {{S, secret, abc}}", [(10, "odd argument")]),
])
def test_suspicious_line_gets_a_warning(line, where):
    assert sorted(warnings(line + "\n")) == sorted(where)


@pytest.mark.parametrize("line", [
    "*/5 * * * * x", "0 0 * * fri-sun x", "0 0 1 * * x", "0 9 */2 * mon x",
    "10~20 * * * * x", "MAILTO=ops", r"0 0 * * * date +\%F", "007 * * * * x",
    "0 0 29 2 * x", "0 0 31 1-2 * x", "A='x # y'", "@daily rooted x",
    "@daily mail root%Hello%World", r"@daily sh -c 'a\%b'%in", "~ ~ ~ * * x",
    "CRON_TZ=UTC", "@daily x \"it's\"%a", r"@daily x \'a%b",
    "@manual docker ps --format '{{.Names}}'", "@daily x '{{.A}} {{end}}'",
])
def test_valid_line_gets_no_warning(line):
    expected = [] if "A=" not in line else warnings(line + "\n")
    assert warnings(line + "\n") == expected


# --- where a placeholder may be -------------------------------------------


@pytest.mark.parametrize("command, place", [
    ('x "Hi {{a}}"', "in double quotes"), ("x 'Hi {{a}}'",
                                           "in single quotes"),
    ("x $'Hi {{a}}'", "in $'..'"), ("x `y {{a}}`", "in backquotes"),
    ("x $(y {{a}})", "in $(..)"), ('x "$(y {{a}})"', "in $(..)"),
    ("x $(y $(z) {{a}})", "in $(..)"), ("x ${V:-{{a}}}", "in ${..}"),
    ('x "${V:-{{a}}}"', "in ${..}"), ("x $(( 1 + {{a}} ))", "in arithmetic"),
    ("(( x = {{a}} ))", "in arithmetic"), ("x <(y {{a}})",
                                           "in <(..) or >(..)"),
    ("cat <<EOF {{a}} EOF", "in a here-document"),
    ("cat <<{{a}}", "in a here-document"), ("cat <<-'E' {{a}}",
                                            "in a here-document"),
    ("x # {{a}}", "in a comment"), ("x;# {{a}}", "in a comment"),
    ("x \\{{a}}", "after a backslash"), ("x ${{a}}", "after a $"),
    ("x[{{a}}]=1", "in an array's index"), ("y x[1+{{a}}]=1",
                                            "in an array's index"),
    ("x[y[0]+{{a}}]=1", "in an array's index"), ("x=([{{a}}]=1)",
                                                 "in an array's index"),
    ("x[\"]\"{{a}}]=1", "in an array's index"), ("y $[1+{{a}}]",
                                                 "in arithmetic"),
    ("x%{{a}}", "after %"), ("x {{b}}%y%{{a}}", "after %"),
    ("x $'it\\'s' {{a}}", r"after $'..\'..'"),
    ("sh -c '.. {{a}}'", "in single quotes"),
    ("python -c \"print('{{a}}')\"", "in double quotes"),
    ("awk '{print \"{{a}}\"}'", "in single quotes"),
    ("x \"`y`{{a}}\"", "in double quotes"), ("x 'a'\"b{{a}}\"",
                                             "in double quotes"),
    ("x 'it\\' \"{{a}}\"", "in double quotes"), ("x \"a\\\"{{a}}\"",
                                                 "in double quotes"),
    ("x $(case y in z) echo;; esac; echo {{a}})", "in $(..)"),
    ("x $(echo ')' {{a}})", "in $(..)"),
    ("x `echo \\`y\\` {{a}}`", "in backquotes"),
    ("x " + "$(" * 60 + "{{a}}", "nested too deeply"),
    ("x " + "(" * 60 + "{{a}}", "nested too deeply"),
])
def test_placeholder_is_rejected_where_the_shell_reads_no_word(command, place):
    line = f"@manual {command}\n"
    found = tab(line).errors()
    assert found[-1].why == f"the argument is {place}"
    assert found[-1].column == line.rindex("{{") + 1
    assert found[-1].hint
    # The same in a scheduled job, and in a tab that was edited by hand.
    assert tab(f"@daily {command}\n".replace(
        "{{a}}", "{{a, string, b}}")).jobs == []


@pytest.mark.parametrize("command, script", [
    ("x {{a}}", 'x "${KOI_ARG_1}"'), ("x --to={{a}}", 'x --to="${KOI_ARG_1}"'),
    ("x {{a}} {{b}} {{a}}",
     'x "${KOI_ARG_1}" "${KOI_ARG_2}" "${KOI_ARG_1}"'),
    ("{{a}}", '"${KOI_ARG_1}"'), ("V={{a}} x", 'V="${KOI_ARG_1}" x'),
    ("x 'q'{{a}}\"r\"", "x 'q'\"${KOI_ARG_1}\"\"r\""),
    ("x > {{a}}", 'x > "${KOI_ARG_1}"'), ("x <<< {{a}}",
                                          'x <<< "${KOI_ARG_1}"'),
    ("(x {{a}}; y)", '(x "${KOI_ARG_1}"; y)'),
    ("x $(y) {{a}}", 'x $(y) "${KOI_ARG_1}"'),
    ("x $((1+(2))) {{a}}", 'x $((1+(2))) "${KOI_ARG_1}"'),
    ("x ${V:-$(y)} {{a}}", 'x ${V:-$(y)} "${KOI_ARG_1}"'),
    ("x `y` {{a}}", 'x `y` "${KOI_ARG_1}"'),
    ("case {{a}} in a) x;; *) y {{a}};; esac",
     'case "${KOI_ARG_1}" in a) x;; *) y "${KOI_ARG_1}";; esac'),
    (r"x \\{{a}}", r'x \\"${KOI_ARG_1}"'), ("x a#{{a}}",
                                            'x a#"${KOI_ARG_1}"'),
    (r"x +\%F {{a}}", 'x +%F "${KOI_ARG_1}"'), ("x $# $$ {{a}}",
                                                'x $# $$ "${KOI_ARG_1}"'),
    ("x $'a\\n' {{a}}", "x $'a\\n' \"${KOI_ARG_1}\""),
    ("x \"a'b\" {{a}}", "x \"a'b\" \"${KOI_ARG_1}\""),
    ("x {{it's \"a\" test}} {{a}}", 'x "${KOI_ARG_1}" "${KOI_ARG_2}"'),
    ("x[0]={{a}}", 'x[0]="${KOI_ARG_1}"'), ("x {{a}}%in",
                                          'x "${KOI_ARG_1}"'),
])
def test_placeholder_becomes_a_quoted_variable(command, script):
    job = only(f"@manual {command}")
    assert job.script == script
    assert "KOI_ARG_" not in job.command


PAYLOADS = [
    "$(id > CANARY)", "`id > CANARY`", "'; id > CANARY; '", "a[$(id>CANARY)]",
    '"; id > CANARY; "', "x\nid > CANARY", "\\", "!!", "*", "~", "", "-rf",
    "{{x}}", "o'brien", "${KOI_ARG_1}", "\u00e9\U0001f600", "a  b\tc", "#x",
]


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_each_value_reaches_the_command_unchanged(shell, tmp_path):
    support.need(shell)
    show = tmp_path / "show"
    show.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    show.chmod(0o755)
    lines = ["{0} {{{{a}}}}", "{0} x{{{{a}}}}y", "V={{{{a}}}} {0} k {{{{a}}}}",
             "({0} {{{{a}}}})", "case {{{{a}}}} in zz) ;; *) {0} {{{{a}}}};;"
             " esac", "{0} 'q'{{{{a}}}}\"r\" $(true) `true` {{{{b}}}}"]
    for line in lines:
        job = only(f"@manual {line.format(show)}")
        for payload in PAYLOADS:
            values = {f"KOI_ARG_{n}": payload for n in (1, 2)}
            command = [support.find(shell)] + ["sh"] * (shell == "busybox")
            done = subprocess.run(
                [*command, "-c", job.script], cwd=tmp_path, env=values,
                stdout=subprocess.PIPE, check=True)
            got = done.stdout.decode().split("\0")[:-1]
            assert got in ([payload], [f"x{payload}y"], ["k", payload],
                           [f"q{payload}r", payload])
    assert not list(tmp_path.glob("*CANARY*"))


@pytest.mark.parametrize("text, param", [
    ("{{To Handle}}", ("To Handle", "string", None, ())),
    ("{{Delay, int, 0}}", ("Delay", "int", "0", ())),
    ("{{Emoji \U0001f603, bool}}", ("Emoji \U0001f603", "bool", None, ())),
    ("{{ a ,string, b, c }}", ("a", "string", "b, c", ())),
    ("{{a,,b}}", ("a", "string", "b", ())), ("{{a,,}}", ("a", "string", "",
                                                         ())),
    ("{{a, choice(x|y z)}}", ("a", "choice", None, ("x", "y z"))),
    ("{{a, choice(x|y), y}}", ("a", "choice", "y", ("x", "y"))),
    ("{{a, text}}", ("a", "text", None, ())),
    ("{{a, date, 2024-02-29}}", ("a", "date", "2024-02-29", ())),
    ("{{a, secret}}", ("a", "secret", None, ())),
])
def test_argument_has_its_name_type_and_default(text, param):
    found = only(f"@manual x {text}").params[0]
    assert (found.name, found.type, found.default, found.choices) == param


@pytest.mark.parametrize("text", [
    "{{}}", "{{ }}", "{{,int}}", "{{a, number}}", "{{a, int, x}}",
    "{{a, int, 1_000}}", "{{a, int, \uff11}}", "{{a, int, +5}}",
    "{{a, int, 0x10}}", f"{{{{a, int, {'9' * 19}}}}}", "{{a, bool, yes}}",
    "{{a, bool, True}}", "{{a, choice(), x}}", "{{a, choice(x||y)}}",
    "{{a, choice(x|x)}}", "{{a, choice(x|y), z}}", "{{a, date, 2023-02-29}}",
    "{{a, date, 23-1-1}}", "{{a, int}} {{a, bool}}", "{{a", "{{a {b} }}",
    f"{{{{{'n' * 101}}}}}", "{{a\x07}}", f"{{{{a, string, {'v' * 4097}}}}}",
    " ".join(f"{{{{p{n}}}}}" for n in range(65)), "{{\udcff, int, 1\udcff}}",
])
def test_invalid_argument_is_rejected(text):
    assert [what for _, _, what in errors_in(f"@manual x {text}\n")] == [
        "bad argument"]


def test_scheduled_job_needs_defaults():
    assert errors_in("@daily x {{a, string}}\n") == [(1, 10, "bad argument")]
    assert only("@daily x {{a, int, 5}}").params[0].default == "5"
    assert errors_in("@reboot x {{a, bool}}\n") == [(1, 11, "bad argument")]


@pytest.mark.parametrize("kind, good, bad", [
    ("int", ["0", "-5", "9" * 18], ["", "-", "--1", "+1", "1.0", " 1", "1\n",
                                    "\u0663", "1e3", "9" * 19]),
    ("bool", ["true", "false"], ["", "True", "1", "yes", "null"]),
    ("string", [" ", "$(id)", "-rf", "a\tb"], ["a\0b", "a\nb", "\ud800",
                                             "\x1b[2J", "\u202e"]),
    ("text", ["a\nb"], ["a\rb", "a\0b", "\x07"]),
    ("date", ["2026-03-29"], ["2026-3-29", "2026-02-30", "0000-01-01",
                              "2026-03-29 ", "", "\uff12026-01-01"]),
])
def test_type_accepts_valid_and_rejects_invalid_values(kind, good, bad):
    param = koitab.Parameter("a", kind)
    assert [value for value in good if param.value_error(value)] == []
    assert [value for value in bad if not param.value_error(value)] == []


@pytest.mark.parametrize("kind", ["string", "text", "secret"])
@pytest.mark.parametrize("default", [None, "x"])
def test_value_may_be_empty_only_where_the_default_is(kind, default):
    assert koitab.Parameter("A", kind, default).value_error("") \
        == "empty value"
    assert koitab.Parameter("A", kind, "").value_error("") == ""


@pytest.mark.parametrize("command, program", [
    ("eval {{a}}", "eval"), ("sh -c 'x \"$1\"' sh {{a}}", "sh -c"),
    ("bash -lc 'x' {{a}}", "bash -c"), ("su -c x {{a}}", "su -c"),
    ("ssh host x {{a}}", "ssh"), ("echo {{a}} | xargs -n1 x", "xargs"),
    ("find . -exec sh -c 'y' {{a}} ;", "sh -c"), ("env -S {{a}}", "env -S"),
    ("watch {{a}}", "watch"), ("python3 -c 'x' {{a}}", "python3 -c"),
    ("perl -ne 'x' {{a}}", "perl -e"), ("/usr/bin/awk {{a}} f", "awk"),
    ("echo {{a}} | sh", "sh"), ("[[ {{a}} -eq 1 ]] && x", "[["),
    ("let x={{a}}", "let"), ("read {{a}}", "read"),
    ("sudo {{a}}", "runs the value"), ("mysql -e {{a}}", "mysql -e"),
    ("sudo sh -c {{a}}", "sh -c"), ("'eval' {{a}}", "eval"),
    ("{{a}} x", "the value is the program"),
    ("true; {{a}}", "the value is the program"),
    ("V=1 {{a}}", "the value is the program"),
])
def test_program_that_evaluates_a_value_gets_a_warning(command, program):
    found = [p for p in tab(f"@manual {command}\n").diagnostics
             if p.what == "unsafe argument"]
    assert found
    assert program in found[0].why
    assert not found[0].fatal


@pytest.mark.parametrize("command", [
    "echo {{a}}", "sh script.sh {{a}}", "python3 x.py {{a}}", "V={{a}} x",
    "test {{a}} = b", "timeout 5 x {{a}}", "env A=b x {{a}}", "x evaluate",
    "echo {{a}} > sh.log",
])
def test_command_that_evaluates_no_value_gets_no_warning(command):
    assert warnings(f"@manual {command}\n") == []


@pytest.mark.parametrize("command", [
    "docker ps --format '{{.Names}}: {{ .Status }}'", "x {{json .Mounts}}",
    "x '{{range .A}}{{.B}}{{end}}'", "echo {{a,b},{c,d}}",
    "awk '{{print $1}}'", "x {{", "x }}", "x {{ y", "x '{{$v}}'",
])
def test_braces_of_other_programs_are_left_unchanged(command):
    job = only(f"0 0 * * * {command}")
    assert (job.script, job.params) == (command, ())


# The lines that cron runs with their braces; all are valid for Debian's
# `crontab -n`.
BRACES = [
    "sed -i 's/{{VERSION}}/1/' /srv/x", 'podman ps --format "{{ID}}"',
    """curl -d '{"text":"{{hello}} world"}' http://127.0.0.1/""",
    "find /srv -exec sh -c 'echo {{}}' \\;",
    "kubectl get pods -o go-template='{{range .items}}{{.metadata.name}}"
    '{{"\\n"}}{{end}}\'', "echo {{a}} $(x {{b}}) # {{c}}",
    "echo '{{To, string}}' {{n, int, 5}} {{x, y, z}} {{s, secret}}",
    "cat%Dear {{Name}},%bye {{Name, text}}"]


@pytest.mark.parametrize("command", BRACES)
def test_braces_are_plain_text_in_crontabs_of_cron(command):
    script, stdin, _ = koitab.split_percent(command)
    for line, options in (
            (f"0 1 * * * root {command}", {"system": True}),
            (f"0 1 * * * {command}", {"literal": True})):
        job = only(line, **options)
        assert (job.script, job.stdin, job.params) == (script, stdin, ())
        assert warnings(line + "\n", **options) == []


@pytest.mark.parametrize("command", BRACES[:6])
@pytest.mark.parametrize("when", ["0 1 * * *", "@reboot", "@daily"])
def test_words_in_braces_are_plain_text_in_a_line_that_starts_itself(
        when, command):
    job = only(f"{when} {command}")
    assert (job.script, job.params) == (command, ())


def test_plain_text_in_braces_gets_one_warning_that_names_the_word():
    found, = tab("@daily x {{Id}} '{{Name}}'%{{Id}}\n").diagnostics
    assert (found.fatal, found.column) == (False, 10)
    assert "{{Id}} is plain text" in found.why
    assert found.hint == "{{Id, string, default}} is an argument"


def test_line_that_starts_itself_may_have_arguments_and_plain_text():
    job = only("@daily x '{{Id}}' {{To, string, you}} {{To}} {{Name}}")
    assert job.script == (
        'x \'{{Id}}\' "${KOI_ARG_1}" "${KOI_ARG_1}" {{Name}}')
    assert [param.name for param in job.params] == ["To"]


@pytest.mark.parametrize("command", [
    "x {{To, string}}", "x {{To,}}", "x '{{To, string, you}}'",
    "x {{To}} {{To, int}}", "x%{{To, string, you}}", "x {{Ok, bool}}"])
def test_declaration_that_cannot_be_filled_in_is_rejected(command):
    assert {what for _, _, what in errors_in(f"@daily {command}\n")} == {
        "bad argument"}


# --- hostile tabs ---------------------------------------------------------


def bounded(text: str, seconds: float = 5, **options):
    began = time.process_time()
    found = tab(text, **options)
    assert time.process_time() - began < seconds
    return found


@pytest.mark.parametrize("text", [
    "{{" * 60_000 + "\n", "@manual x " + "{{" * 60_000 + "\n",
    "@manual x " + "{{a}}" * 20_000 + "\n", "@manual x '" + "{{a}}" * 20_000,
    "@manual x " + "$(" * 50_000 + "{{a}}\n", "@manual " + "(" * 50_000 +
    "{{a}}\n", "@manual " + "${" * 50_000 + "{{a}}\n", "@manual x " +
    '"$(' * 40_000 + "{{a}}\n", "@manual x " + "`" * 100_001 + "{{a}}\n",
    "@manual x " + "<(" * 50_000 + "{{a}}\n", "@manual x " + "'{{" * 40_000
    + "\n", "@manual x " + "$'\\''" * 25_000 + "{{a}}\n",
    "@manual " + "a[" * 60_000 + "{{a}}\n", "@manual x " + "{{a}" * 30_000,
    "0," * 400_000 + "0 * * * * x\n", "0-59/1," * 100_000 + "5 * * * * x\n",
    "5" * 1_000_000 + " * * * * x\n", "\n" * 100_000, "x\n" * 100_000,
    "* * * * * x\n" * 9_000, "".join(f"A{n}=b\n@daily {n}\n" for n in
                                     range(6_000)),
    "KOI_XYZ=1\n" * 5_000, "@" + "a" * 1_000_000 + "\n", "[" * 1_000_000,
    '"' * 1_000_000, "=" * 1_000_000 + "\n", "\0" * 1_000_000,
    "* * * * * " + "%" * 130_000 + "\n", "* * * * * " + "\\" * 130_000 + "\n",
    "@manual x " + "$(a)" * 32_000 + "{{a}}\n",
    "@manual x" + " $(a) eval sudo" * 8_000 + " {{a}}\n",
    "@manual x " + "case $(" * 15_000 + ")" * 15_000 + "{{a}}\n",
    "".join(f'"{n}" @after "{n + 1}" x\n' for n in range(9_000)),
    "".join(f'"{n}" @after "a{n}" x\n' for n in range(9_000)),
    '"9000" @daily x\n' + "".join(f'"{n}" @after "{n + 1}" x\n'
                                  for n in range(9_000)),
    "".join(f'[{n}]\n"a" @after "a" x\n' for n in range(5_000)),
], ids=itertools.count())
def test_hostile_tab_is_parsed_in_short_time(text):
    bounded(text[:2**20])


def test_exceeded_limit_is_reported():
    assert "10,000 lines" in tab("@daily x\n" + "\n" * 10_000).errors()[-1].why
    many = "".join(f"A{n}=b\n" for n in range(1_001))
    assert errors_in(many) == [(1_001, 1, "bad variable")]


PIECES = [
    "* * * * *", "*/5 2 * * 1-5", "5-1 * * * *", "@daily", "@manual",
    "@reboot", "@x", "[S]", '"N"', '"', "'", "=", "A=b", "KOI_RETRY=2",
    "CRON_TZ=X", "CRON_TZ=", " ", " ", "\t", "\n", "\n", "\r", "\0", "%",
    "\\", "{{", "}}", "{{a}}", "{{a, int, 5}}", "{{b,choice(x|y)}}", "$(",
    ")", "((", "))", "`", "${", "}", "$'", "<<", "<<<", "#", ";", "|", "&",
    "-n ", "-", "root", "eval", "sh -c", "case", "esac", "\udcff", "\u202e",
    "\ufeff", "é", "61", "7", ",", "~", "/", "-", "x", "$", "[", "]",
]


def test_random_text_never_raises():
    dice = random.Random(20260329)
    began, read, refused = time.process_time(), 0, 0
    for _ in range(6_000):
        text = "".join(dice.choices(PIECES, k=dice.randrange(1, 30)))
        if dice.random() < 0.5:
            text = "@manual x " + text.replace("\n", " ")
        text += "\n" * (dice.random() < 0.9)
        found = tab(text, system=dice.random() < 0.2,
                    root=dice.random() < 0.2)
        lines = text.split("\n")
        for each in found.diagnostics:
            assert 1 <= each.line <= len(lines)
            assert 1 <= each.column <= len(lines[each.line - 1]) + 1
            assert each.what and each.why
            assert not koitab.has_control(each.text("tab"), "\t")
        read, refused = read + len(found.jobs), refused + len(found.errors())
        for job in found.jobs:
            assert job.tag and isinstance(job.describe(), str)
            for n in range(1, len(job.params) + 1):
                assert f'"${{KOI_ARG_{n}}}"' in job.script
    assert read > 500
    assert refused > 2_000
    assert time.process_time() - began < 60


def test_lexer_finds_the_same_words_as_the_shells(tmp_path):
    """Where the lexer accepts a placeholder, a shell reads one word, so the
    value is never run."""
    support.need("bash", "dash")
    dice, tried = random.Random(11), 0
    parts = ["a", "'b c'", '"d e"', "$(true)", "`true`", "${V:-x}", "$((1+2))",
             "\\'", '\\"', "$'f'", ";true", "|cat", "&&true", "(true)",
             "{{p}}", "{{p}}", '"', "'", "`", "$(", ")", "#", "$", "\\", " "]
    for _ in range(400):
        command = "true " + " ".join(dice.choices(parts, k=dice.randrange(
            2, 8)))
        if "{{p}}" not in command:
            continue
        found = tab(f"@manual {command}\n").jobs
        if not found:
            continue
        tried += 1
        for shell in ("bash", "dash"):
            subprocess.run(
                [support.find(shell), "-c", found[0].script], cwd=tmp_path,
                env={"KOI_ARG_1": "a;id>CANARY;$(id>CANARY)`id>CANARY`'\"",
                     "PATH": os.environ.get("PATH", os.defpath)},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=20)
        assert list(tmp_path.iterdir()) == [], command
    assert tried > 60

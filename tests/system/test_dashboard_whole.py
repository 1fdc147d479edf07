"""All of it together: a dashboard, koids that belong to it, and its page in
a real browser; then requests, without a browser, that are not as they should
be. One house and one browser serve most tests, in the order they stand in."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import time

import pytest

import dashboard_kit
import support
from dashboard_kit import House, Page

koitab = support.load("koitab")

ARGS = """\
import json, os, sys
print("begun", flush=True)
with open(os.environ["GO"]) as go:
    go.read()
print(json.dumps(sys.argv[1:], ensure_ascii=False))
print("\\033[1;31mred\\033[0m and done", file=sys.stderr)
"""
TAB = """\
GO={folder}/go
"Boot" @reboot echo up
"Tick" * * * * * echo tick
[Office]
"Args" @manual {python} {folder}/args.py {{{{Who}}}} {{{{Code}}}} \
{{{{Mood, string, calm}}}} {{{{Nothing}}}} {{{{Lines, text}}}} \
{{{{Word, secret}}}}
"Long" @manual echo long; echo $$ > {folder}/long; exec sleep 300
"Fail" @manual echo to {{{{Who}}}}; echo bad >&2; exit 3
"Quick" @manual echo quick {{{{Who, string, koi}}}}
"""
SECRET = "correct-horse-4711"
VALUES = {"Who": "o'brien", "Code": "$(id)", "Mood": "\U0001f600\U0001f41f",
          "Nothing": "", "Lines": "one\n  two\n`three`"}
# What a browser says of a passphrase that is wrong, and rightly.
WRONG = ("status of 401", "status of 429")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with House(tmp_path_factory.mktemp("house"), "--name", "koi.test",
               "--allow-new") as house:
        yield house
        house.dashboard.no_fault()


@pytest.fixture(scope="module")
def web1(house):
    folder = house.folder / "web1"
    folder.mkdir()
    (folder / "args.py").write_text(ARGS)
    os.mkfifo(folder / "go")
    return house.home("web1", TAB.format(
        folder=folder, python=shlex.join([support.SYSTEM_PYTHON, "-IS"])))


@pytest.fixture(scope="module")
def operator(house, web1):
    return house.new(web1)


@pytest.fixture(scope="module")
def page(operator):
    """A browser, logged in as soon as a test needs it."""
    with Page(flags=["--host-resolver-rules=MAP koi.test 127.0.0.1 , "
                     "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]) as page:
        yield page


@pytest.fixture(autouse=True)
def well_behaved(request):
    """Whatever a test does with the page: nothing that comes from outside
    is carried out, no rule of the policy is broken, nothing is thrown."""
    yield
    if "page" in request.fixturenames:
        assert request.getfixturevalue("page").faults() == []


def job_row(label: str) -> str:
    """The row of a job in the list, as a JavaScript expression."""
    return ("[...document.querySelectorAll('.row')].find((row) => "
            f"row.querySelector('.c-name a')?.innerText === "
            f"{json.dumps(label)})")


# --- in the browser


def test_what_d_new_says_opens_the_page_and_another_passphrase_does_not(
        house, operator, page):
    assert f"{house.url}/#{operator.dash}" in house.said
    page.go(f"{house.url}/#{operator.dash}")
    page.insert("#secret", "wrong horse battery staple")
    page.keys("Enter")
    page.shows("That is not the passphrase.")
    assert page.faults(*WRONG) == []
    page.insert("#secret", operator.password)
    page.keys("Enter")
    page.wait(job_row("Tick"))
    assert page.js("return isSecureContext && document.querySelector("
                   "'#plain').hidden")
    assert operator.password not in page.js("return location.href + document"
                                            ".documentElement.outerHTML")


def test_a_job_shows_as_soon_as_it_is_in_the_tab_with_its_next_start(
        web1, page):
    words = page.wait(f"{job_row('Tick')}?.querySelector('.c-next "
                      "time')?.innerText")
    assert words.startswith("in ") or words == "now"
    tab = web1.type("-l").out
    web1.install(tab + '"Later" 17 3 * * * echo later\n')
    page.wait(job_row("Later"))
    assert page.js(f"return {job_row('Later')}.querySelector('.c-words')"
                   ".innerText") == "At 03:17"
    web1.install(tab)
    page.wait(f"{job_row('Later')}?.innerText.includes('in no tab')")


def test_the_run_at_boot_was_told(page):
    page.wait(f"{job_row('Boot')}?.querySelector('.c-is')?.innerText"
              " === 'ok'")


def test_a_form_runs_a_job_and_its_output_comes_in_live(
        house, web1, operator, page):
    page.press("Jobs")
    page.click("a[aria-label='Run Args']")
    page.wait("document.activeElement.id === 'arg0'")
    for at, value in enumerate([*VALUES.values(), SECRET]):
        page.insert(f"#arg{at}", value)
    page.shows("'o'\\''brien' '$(id)'")         # what will run
    assert SECRET not in page.text(".previewed")
    page.press("Run on web1")
    page.wait("location.hash.startsWith('#/run/')", 20)
    page.wait("document.querySelector('.pane')?.innerText.includes('begun')")
    page.shows("Running for")
    with open(web1.folder / "go", "w") as go:
        go.write("on")
    page.shows("Finished in")
    page.wait("document.querySelector('.pane')?.innerText.includes("
              "'red and done')")
    run = int(page.js("return location.hash.split('/')[2]"))
    lines = operator.text(run).splitlines()
    assert json.loads(lines[1]) == [*VALUES.values(), "******"]
    assert "red and done" in lines[2]
    # As text, and the colour as a colour.
    assert page.js("return [...document.querySelectorAll('.pane .text')].map("
                   "(one) => one.textContent)")[:2] == ["begun", lines[1]]


def test_the_secret_is_nowhere(house, web1, operator, page):
    runs = operator.runs("Args")
    assert runs[0]["args"] == {**VALUES, "Word": "******"}
    page.to(f"job/{runs[0]['job']}")
    page.shows("Word=")
    page.to("audit")
    page.shows("Args")
    assert SECRET not in page.js(
        "return document.documentElement.outerHTML + JSON.stringify([..."
        "known.jobs.values()]) + JSON.stringify({...localStorage})")
    files = [path for folder in (house.folder, web1.home)
             for path in folder.rglob("*") if path.is_file()]
    assert {house.db, web1.home / "history.db"} <= set(files)
    veiled = [SECRET.encode(), SECRET.encode().hex().encode()]
    assert [path for path in files
            if any(text in path.read_bytes() for text in veiled)] == []


def test_a_long_run_is_killed_from_the_page(web1, operator, page):
    page.to("jobs")
    page.click("a[aria-label='Run Long']")
    page.wait("document.querySelector('.runform')")
    page.press("Run on web1")
    page.wait("location.hash.startsWith('#/run/')", 20)
    page.wait("document.querySelector('.pane')?.innerText.includes('long')")
    pid = int(support.wait_until((web1.folder / "long").read_text))
    page.press("Kill\u2026")
    page.press("Kill it on web1")
    page.shows("Killed by signal 15 (TERM)")
    support.wait_until(lambda: not koitab.born(pid))
    assert operator.runs("Long")[0]["signal"] == 15


def test_the_search_finds_a_line_and_leads_to_it(page):
    page.insert("#find input", "`three`")
    page.keys("Enter")
    page.wait("document.querySelector('.hits a')")
    assert "`three`" in page.text(".hits pre")
    page.click(".hits a")
    page.wait("document.querySelector('.line.here .text')?.innerText"
              ".includes('`three`')")
    assert "/B" in page.js("return location.hash")


def test_a_viewer_sees_all_and_can_run_nothing(house, operator, page):
    page.open(house.url, f"view-{operator.viewer}")
    page.wait(job_row("Args"))
    runs = operator.runs("Long")
    for place in ("jobs", f"job/{runs[0]['job']}", f"run/{runs[0]['id']}",
                  "audit", "hosts", "alerts", "settings", "day"):
        page.to(place)
        page.wait("!document.querySelector('.waits')")
        assert page.js("return [...document.querySelectorAll('a, button')]"
                       ".map((one) => one.innerText.trim()).filter((text) =>"
                       " /^(Run|Kill|Forget|Snooze|New check|Add)\\b/"
                       ".test(text))") == [], place
    assert operator.password not in page.text("body")
    page.to(f"job/{runs[0]['job']}/run")
    page.shows("A viewer's key can read, and nothing else.")
    host = operator.host("web1")
    body = operator.sealed(host, operator.request(
        host, operator.specs(host)["Quick"], {"Who": "x"}))
    before = len(operator.runs("Quick"))
    assert operator.reply("POST", "requests", body,
                          token=operator.viewer).status == 403
    # The same from within the page, with all that it knows.
    assert page.js("""return tell('requests', arguments[0]).then(
        () => 'taken', (error) => error.status)""", body) == 403
    assert page.faults("status of 403") == []
    assert len(operator.runs("Quick")) == before


def test_from_the_login_to_a_finished_run_by_keyboard_alone(
        house, operator, page):
    page.go(house.url)
    page.wait("document.activeElement.id === 'secret'")
    page.command("Input.insertText", text=operator.password)
    page.keys("Enter")
    page.wait(job_row("Quick"))
    for _ in range(12):
        page.keys("j")
        if page.js("return document.activeElement.innerText") == "Quick":
            break
    page.keys("r")
    page.wait("document.activeElement.id === 'arg0'")
    page.keys("Backspace", "Backspace", "Backspace", *"carp", "Enter")
    page.wait("location.hash.startsWith('#/run/')", 20)
    page.wait("document.querySelector('.pane')?.innerText.includes("
              "'quick carp')")
    page.shows("Finished in")
    page.keys("g", "h")
    page.wait("shell.path === 'hosts'")
    page.keys("?")
    page.wait("document.querySelector('#keys').open")
    page.keys("Escape")
    page.wait("!document.querySelector('#keys').open")


def test_two_hosts_stand_side_by_side_and_a_run_is_asked_for_by_name(
        house, web1, operator, page):
    web2 = house.home("web2", '"Fail" @manual echo I am two; exit 4\n'
                              '"Two" @manual echo two\n')
    house.join(web2, operator)
    page.to("jobs")
    page.wait(job_row("Two"))
    assert page.js("return [...document.querySelectorAll('.head h2')].map("
                   "(one) => one.innerText)")[:2] == ["web1", "web2"]
    # Typed on one machine, run on the other: its output, and its status.
    done = web1.type("run", "--on", "web2", "Fail",
                     said=operator.password + "\n")
    assert (done.code, done.out) == (4, "I am two\n"), done
    done = web2.type("run", "--on", "web1", "Fail", "Who=o'brien",
                     said=operator.password + "\n")
    assert (done.code, done.out) == (3, "to o'brien\n"), done
    assert "bad\n" in done.err
    page.wait("document.querySelector('.group.attention')?.innerText"
              ".includes('I am two')")
    done = web1.type("run", "--on", "web2", "Fail", said="not it\n")
    assert done.code == 1 and "key is not known" in done.err, done


def test_missions_ping_shows_beside_the_jobs(house, operator, page, tmp_path):
    key = operator.ask("state")["dash"]["ping_key"]
    scratch = support.Scratch(tmp_path)
    scratch.task("say", "echo hello from mission")
    scratch.config["ping"] = {"enabled": True, "endpoint":
                              f"{house.url}/ping/{key}/nightly?create=1"}
    assert scratch.mission("--headless").code == 0
    page.to("jobs")
    page.wait(job_row("nightly"))
    assert page.js(f"return {job_row('nightly')}.querySelector('.c-is')"
                   ".innerText") == "ok"
    page.js(f"{job_row('nightly')}.querySelector('.c-name a').click()")
    page.shows("success")
    check, = operator.ask("state")["checks"]
    pings = operator.ask(f"checks/{check['id']}/pings")["pings"]
    assert [ping["kind"] for ping in pings] == ["success", "start"]

"""All of it together: a dashboard, koids that belong to it, and its page in
a real browser; then requests, without a browser, that are not as they should
be. One server and one browser serve most tests, in the order of this file."""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import time

import pytest

import servers
import support
from dashboard_rig import (HOST_TOKEN, ROUNDS, VIEWER_TOKEN, DashboardProcess,
                           Operator, derive, sync_payload)

koitab = support.load("koitab")
SERVER_OPTIONS = ["--name", "koi.test"]

ARGS = """\
import json, os, sys
print("begun", flush=True)
with open(os.environ["GO"]) as go:
    go.read()
print(json.dumps(sys.argv[1:], ensure_ascii=False), flush=True)
print("\\033[1;31mred\\033[0m and done", file=sys.stderr)
"""
TAB = """\
GO={folder}/go
"Boot" @reboot echo up
"Daily" 17 3 * * * echo daily
[Office]
"Args" @manual {python} {folder}/args.py {{{{Who}}}} {{{{Code}}}} \
{{{{Mood, string, calm}}}} {{{{Nothing, string, }}}} {{{{Lines, text}}}} \
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
def web1_tab(server):
    folder = server.folder / "web1"
    folder.mkdir()
    (folder / "args.py").write_text(ARGS)
    os.mkfifo(folder / "go")
    return TAB.format(folder=folder, python=shlex.join(
        [support.SHARED_PYTHON, "-IS"]))


@pytest.fixture(autouse=True)
def well_behaved(request):
    """Whatever a test does with the page: nothing that comes from outside
    is carried out, no rule of the policy is broken, nothing is thrown."""
    yield
    if "browser" in request.fixturenames:
        assert request.getfixturevalue("browser").faults() == []


def job_row(label: str) -> str:
    """The row of a job in the list, as a JavaScript expression."""
    return ("[...document.querySelectorAll('.row')].find((row) => "
            f"row.querySelector('.c-name a')?.innerText === "
            f"{json.dumps(label)})")


# --- in the browser


def test_printed_passphrase_opens_the_page_and_another_does_not(
        server, web1_host, operator, browser):
    assert f"{server.url}/#{operator.dash}" in web1_host.printed
    browser.go(f"{server.url}/#{operator.dash}")
    browser.insert("#secret", "wrong horse battery staple")
    browser.keys("Enter")
    browser.shows("Wrong passphrase for ")
    assert browser.faults(*WRONG) == []
    browser.insert("#secret", operator.password)
    browser.keys("Enter")
    browser.wait(job_row("Daily"))
    assert browser.js("return isSecureContext && document.querySelector("
                      "'#plain-http').hidden")
    assert operator.password not in browser.js(
        "return location.href + document"
                                               ".documentElement.outerHTML")


def test_job_added_to_the_tab_is_shown_with_its_next_start(web1_host, browser):
    words = browser.wait(f"{job_row('Daily')}?.querySelector('.c-next "
                         "time')?.innerText")
    assert words.startswith("in ") or words == "now"
    tab = web1_host.koitab("-l").out
    web1_host.install(tab + '"Later" 5 4 * * * echo later\n')
    browser.wait(job_row("Later"))
    assert browser.js(f"return {job_row('Later')}.querySelector('.c-words')"
                      ".innerText") == "At 04:05"
    web1_host.install(tab)
    browser.wait(f"{job_row('Later')}?.innerText.includes('removed')")


def test_run_of_a_boot_job_is_shown(browser):
    browser.wait(f"{job_row('Boot')}?.querySelector('.c-is')?.innerText"
                 " === 'ok'")


def test_form_starts_a_job_and_its_output_is_shown_live(
        server, web1_host, operator, browser):
    browser.press("Jobs")
    browser.click("a[aria-label='Run Args']")
    browser.wait("document.activeElement.id === 'arg0'")
    for at, value in enumerate([*VALUES.values(), SECRET]):
        browser.insert(f"#arg{at}", value)
    browser.press("Command", "summary")
    browser.shows("'o'\\''brien' '$(id)'")         # what will run
    assert SECRET not in browser.text(".previewed")
    browser.press("Run on web1")
    browser.wait("location.hash.startsWith('#/run/')")
    browser.wait(
        "document.querySelector('.pane')?.innerText.includes('begun')")
    browser.shows("Running for")
    with open(web1_host.folder / "go", "w") as go:
        go.write("on")
    browser.shows("Finished in")
    browser.wait("document.querySelector('.pane')?.innerText.includes("
                 "'red and done')")
    run = int(browser.js("return location.hash.split('/')[2]"))
    lines = operator.text(run).splitlines()
    assert json.loads(lines[1]) == [*VALUES.values(), "******"]
    assert lines[2] == "\x1b[1;31mred\x1b[0m and done"
    # As text, and the colour as a colour.
    assert browser.js(
        "return [...document.querySelectorAll('.pane .text')].map("
                      "(one) => one.textContent)") == [
           "begun", lines[1], "red and done"]
    assert browser.text(".pane .bold") == "red"


def test_secret_argument_is_not_shown_and_in_no_file(
        server, web1_host, operator, browser):
    runs = operator.runs("Args")
    assert runs[0]["args"] == {**VALUES, "Word": "******"}
    browser.visit(f"job/{runs[0]['job']}")
    browser.shows("Word=")
    browser.visit("audit")
    browser.shows("Args")
    assert SECRET not in browser.js(
        "return document.documentElement.outerHTML + JSON.stringify([..."
        "state.jobs.values()]) + JSON.stringify({...localStorage})")
    files = [path for folder in (server.folder, web1_host.home)
             for path in folder.rglob("*") if path.is_file()]
    assert {server.db, web1_host.home / "history.db"} <= set(files)
    forms = [SECRET.encode(), SECRET.encode().hex().encode()]
    assert [path for path in files
            if any(text in path.read_bytes() for text in forms)] == []


def test_a_long_run_is_killed_from_the_page(web1_host, operator, browser):
    browser.visit("jobs")
    browser.click("a[aria-label='Run Long']")
    browser.wait("document.querySelector('.runform')")
    browser.press("Run on web1")
    browser.wait("location.hash.startsWith('#/run/')")
    browser.wait("document.querySelector('.pane')?.innerText.includes('long')")
    pid = int(support.wait_until((web1_host.folder / "long").read_text))
    browser.press("Kill\u2026")
    browser.press("Kill it on web1")
    browser.shows("Killed by signal 15 (TERM)")
    support.wait_until(lambda: not koitab.process_start_time(pid))
    assert operator.runs("Long")[0]["signal"] == 15


def test_search_finds_a_line_and_opens_it(browser):
    browser.insert("#find input", "`three`")
    browser.keys("Enter")
    browser.wait("document.querySelector('.matches a')")
    assert "`three`" in browser.text(".matches pre")
    browser.click(".matches a")
    browser.wait("document.querySelector('.line.here .text')?.innerText"
                 ".includes('`three`')")
    assert "?q=" in browser.js("return location.hash")


def test_viewer_sees_all_jobs_and_cannot_run_any(
        server, web1_host, operator, browser):
    viewer = operator.viewer_token()
    browser.open(server.url, f"view-{viewer}")
    browser.wait(job_row("Args"))
    runs = operator.runs("Long")
    if not runs:                # this test was chosen alone
        web1_host.koitab("run", "Fail", "Who=ann")
        runs = support.wait_until(lambda: operator.runs("Fail"))
    for place in ("jobs", f"job/{runs[0]['job']}", f"run/{runs[0]['id']}",
                  "audit", "hosts", "alerts", "settings", "day"):
        browser.visit(place)
        browser.wait("!document.querySelector('.waits')")
        assert browser.js(
            "return [...document.querySelectorAll('a, button')].map((one) => "
            "one.innerText.trim()).filter((text) => /^(Run|Kill|Forget|"
            "Snooze|New check|Add)\\b/.test(text))") == [], place
    assert operator.password not in browser.text("body")
    browser.visit(f"job/{runs[0]['job']}/run")
    browser.shows("This token is read-only: it cannot run or change anything.")
    host = operator.host("web1")
    body = operator.sealed(host, operator.request(
        host, operator.specs(host)["Quick"], {"Who": "x"}))
    before = len(operator.runs("Quick"))
    assert operator.reply("POST", "requests", body,
                          token=viewer).status == 403
    # The same from within the page, with all that it knows.
    assert browser.js("""return post('requests', arguments[0]).then(
        () => 'taken', (error) => error.status)""", body) == 403
    assert browser.faults("status of 403") == []
    assert len(operator.runs("Quick")) == before


def test_keyboard_alone_suffices_from_login_to_finished_run(
        server, web1_host, operator, browser):
    browser.go(server.url)
    browser.wait("document.activeElement.id === 'secret'")
    browser.command("Input.insertText", text=operator.password)
    browser.keys("Enter")
    browser.wait(job_row("Quick"))
    for _ in range(12):
        browser.keys("j")
        if browser.js("return document.activeElement.innerText") == "Quick":
            break
    browser.keys("r")
    browser.wait("document.activeElement.id === 'arg0'")
    browser.keys("Backspace", "Backspace", "Backspace", *"carp", "Enter")
    browser.wait("location.hash.startsWith('#/run/')")
    browser.wait("document.querySelector('.pane')?.innerText.includes("
                 "'quick carp')")
    browser.shows("Finished in")
    browser.keys("g", "h")
    browser.wait("app.path === 'hosts'")
    browser.keys("?")
    browser.wait("document.querySelector('#shortcuts').open")
    browser.keys("Escape")
    browser.wait("!document.querySelector('#shortcuts').open")


def test_two_hosts_are_shown_and_a_job_is_run_on_the_chosen_one(
        server, web1_host, operator, browser):
    web2 = server.add_host("web2", '"Fail" @manual echo I am two; exit 4\n'
                              '"Two" @manual echo two\n'
                              '"Tick" * * * * * echo tick; sleep 1\n',
                           shift=(55 - time.time() + 30) % 60 - 30)
    web2.join(operator)
    browser.visit("jobs")
    browser.wait(job_row("Two"))
    browser.js("window.same = true")
    heads = browser.js("return [...document.querySelectorAll('.head h2')]"
                       ".filter((one) => one.checkVisibility()).map((one) => "
                       "one.innerText)")
    assert [head for head in heads if head.startswith("web")] == [
        "web1", "web2"]
    # Typed on one machine, run on the other: its output, and its status.
    done = web1_host.koitab("run", "--on", "web2", "Fail",
                            stdin=operator.password + "\n")
    assert (done.code, done.out) == (4, "I am two\n"), done
    done = web2.koitab("run", "--on", "web1", "Fail", "Who=o'brien",
                       stdin=operator.password + "\n")
    assert (done.code, done.out) == (3, "to o'brien\n"), done
    assert "bad\n" in done.err
    browser.wait("document.querySelector('.group.attention')?.innerText"
                 ".includes('I am two')")
    done = web1_host.koitab("run", "--on", "web2", "Fail", stdin="not it\n")
    assert done.code == 1 and "wrong passphrase for " in done.err, done


def test_scheduled_run_appears_on_the_open_page(operator, browser):
    """Its clock was set so that a minute is over about now."""
    browser.visit("jobs")
    browser.wait(f"{job_row('Tick')}?.querySelector('.c-history svg')", 60)
    browser.wait(f"{job_row('Tick')}.querySelector('.c-is').innerText == 'ok'")
    assert browser.js("return window.same"), "the page was loaded anew"
    assert operator.runs("Tick")[0]["trigger"] == "schedule"


def test_notification_of_the_page_reaches_a_mail_server_or_says_why_not(
        operator, browser):
    """The form against the real dashboard: a field that is refused, a server
    that refuses, one that accepts, an edit that keeps the password."""
    def fill_in(**values):
        for name, value in values.items():
            browser.js("const field = document.querySelector(arguments[0]); "
                       "field.value = arguments[1]; field.dispatchEvent(new "
                       "Event('change'))", f"#channel-{name}", value)

    with servers.Sink(account=("koi", "o'brien")) as sink:
        browser.visit("alerts", ".channels > div > .btn")
        browser.press("New notification\u2026")
        fill_in(kind="smtp")
        fill_in(target="ops@example.org", host="no host", port=str(sink.port),
                security="none", user="koi", password="wrong")
        browser.press("Save and send a test")
        browser.wait("document.activeElement.id === 'channel-host'")
        assert browser.faults("status of 400") == []
        assert "host" in browser.text("#channel-host-error")
        fill_in(host="127.0.0.1")
        browser.press("Save and send a test")
        browser.wait("document.querySelector('.channels .error')?.innerText"
                     ".startsWith('Not delivered: ')")
        browser.press("Edit")
        fill_in(password="o'brien")
        browser.press("Save and send a test")
        browser.wait("/Delivered \\d\\d:\\d\\d/.test(document.querySelector("
                     "'.channels li').innerText)")
        assert "test notification" in sink.wait(1)[0].subject
        browser.press("Edit")
        assert browser.js("return document.querySelector('#channel-password')"
                          ".value") == "***"
        fill_in(target="night@example.org")
        browser.press("Save and send a test")
        browser.shows("night@example.org", css=".channels ul")
        assert len(sink.wait(2)) == 2
        browser.wait("!document.querySelector('.channels').innerText.includes("
                     "'Sending')")
        browser.press("Delete\u2026")
        browser.press("Delete night@example.org", "#menu button")
        browser.shows("Problems only show on this page", css=".channels")


def test_ping_of_mission_is_shown_with_the_jobs(
        server, operator, browser, tmp_path):
    key = operator.ask("state")["dash"]["ping_key"]
    scratch = support.Scratch(tmp_path)
    scratch.task("say", "echo hello from mission")
    scratch.config["ping"] = {"enabled": True, "start": True, "endpoint":
                              f"{server.url}/ping/{key}/nightly?create=1"}
    assert scratch.mission("run", "--headless").code == 0
    browser.visit("jobs")
    browser.wait(job_row("nightly"))
    assert browser.js(f"return {job_row('nightly')}.querySelector('.c-is')"
                      ".innerText") == "ok"
    browser.js(f"{job_row('nightly')}.querySelector('.c-name a').click()")
    browser.wait(
        "[...document.querySelectorAll('.list tbody tr')].map((row) => "
                 "row.querySelector('.word').innerText).join() === 'ok,start'")
    check, = operator.ask("state")["checks"]
    pings = operator.ask(f"checks/{check['id']}/pings")["pings"]
    assert [ping["kind"] for ping in pings] == ["success", "start"]


# Forty hostile texts, in five places each.
TRIED = """\
<script>pwned()</script>
<img src=x onerror=pwned()>
<svg onload=pwned()>
<svg/onload=pwned()//
<body onload=pwned()>
<iframe srcdoc="<script>parent.pwned()</script>"></iframe>
<iframe src=javascript:parent.pwned()></iframe>
<details open ontoggle=pwned()>x</details>
<video><source onerror=pwned()></video>
<audio src=x onerror=pwned()></audio>
<input autofocus onfocus=pwned()>
<select autofocus onfocus=pwned()></select>
<textarea autofocus onfocus=pwned()></textarea>
<marquee onstart=pwned()>x</marquee>
<object data=javascript:pwned()></object>
<embed src=javascript:pwned()>
<a href=javascript:pwned()>x</a>
<form action=javascript:pwned()><button>x</button></form>
<math href=javascript:pwned()>x</math>
<base href=http://evil.test/>
<link rel=stylesheet href=http://evil.test/x.css>
<meta http-equiv=refresh content="0;url=javascript:pwned()">
<style>@import'http://evil.test/x.css';</style>
<template><script>pwned()</script></template>
<noscript><p title="</noscript><img src=x onerror=pwned()>">
<svg><animate onbegin=pwned() attributeName=x dur=1s>
<svg><script>pwned()</script></svg>
<svg><a xlink:href=javascript:pwned()><text y=9>x</text></a></svg>
<x onpointerenter=pwned() style=position:fixed;inset:0>x</x>
javascript:pwned()
{{constructor.constructor('pwned()')()}}
${pwned()}
__proto__
&lt;img src=x onerror=pwned()&gt;
&#60;script&#62;pwned()&#60;/script&#62;
\\x3cscript\\x3epwned()\\x3c/script\\x3e
<!--><script>pwned()</script>
<![CDATA[<script>pwned()</script>]]>
\x1b]8;;javascript:pwned()\x1b\\\\link\x1b]8;;\x1b\\\\
\x1b[31m"onmouseover=pwned() x="\x1b[0m
""".splitlines()
CORPUS = [place % text for place in (
    "%s", "\">%s", "'>%s", "</script></title></style>%s", "--!>]]>%s")
    for text in TRIED]
# What the page is made of; no text may add to it.
MARKUP = """
  const own = new Set(("A ASIDE B BUTTON CODE DD DETAILS DIV DL DT FORM H1 H2 "
    + "H3 INPUT LABEL LI OL OPTION P PRE SECTION SELECT SPAN SUMMARY TABLE "
    + "TBODY TD TEXTAREA TH THEAD TIME TR UL I B MARK NAV PROGRESS svg path "
    + "rect circle g text line title").split(" "));
  const bad = [];
  for (const one of document.querySelectorAll("#main *, #top *, #tip *")) {
    if (!own.has(one.nodeName)) bad.push(one.outerHTML.slice(0, 200));
    for (const { name, value } of one.attributes) {
      if (/^on|^srcdoc$|^action$|^formaction$/.test(name)
          || /^(xlink:)?href$/.test(name) && !/^(#|https?:)/.test(value)) {
        bad.push(`${name}=${value.slice(0, 200)}`);
      }
    }
  }
  return bad;
"""


class FakeHost:
    """A host whose every text is hostile."""

    def __init__(self, operator, at: int):
        self.operator, self.host, self.token = operator, f"{at:032x}", \
            f"{at:064x}"
        operator.tell("hosts", {
            "host": self.host, "name": CORPUS[at],
            "token_sha256": koitab.sha256_hex(self.token)})

    def sync(self, **fields) -> dict:
        reply = self.operator.reply("POST", "sync", {
            "v": 3, "host": self.host, "epoch": 1, "wait": 0, "instance":
            "1700000000000-00000001", "now": time.time(), "offset": 0,
            "zone": CORPUS[1], "version": CORPUS[2][:50], "boot": "b",
            "problems": [], "list_sha": "", **fields}, token=self.token)
        assert reply.status == 200, reply
        return reply.json

    def listed(self, name: str, specs: list[dict]) -> dict:
        key = self.operator.key(self.host)
        body = json.dumps({"v": 1, "dash": self.operator.dash,
                           "host": self.host, "key": koitab.key_id(key),
                           "name": name, "at": 0,
                           "jobs": [json.dumps(spec) for spec in specs]})
        return {"body": body, "mac": koitab.list_mac(key, body)}


def lie(at: int) -> dict:
    text, other = CORPUS[at], CORPUS[at - 1]
    return {"user": other, "tag": f"t{at}", "section": other, "name": text,
            "label": text, "when": "@manual" if at % 2 else other,
            "words": other, "command": text, "params": [], "confirm": "yes"}


def lies(operator) -> tuple:
    """A dashboard full of it: the run with the output, the job with the
    form, and the check with the pings."""
    fake = [FakeHost(operator, at) for at in range(200)][0]
    form = {**lie(1), "tag": "form", "when": "@manual", "params": [
        {"name": f"{at} {text}", "type": "choice" if at % 2 else "string",
         "default": text, "choices": [CORPUS[at - 1], text]}
        for at, text in enumerate(CORPUS)]}
    now, frames = time.time(), b"".join(koitab.frame(
        1 + at % 2, at, text.encode() + b"\n")
        for at, text in enumerate(CORPUS))
    fake.sync(list=fake.listed(CORPUS[0], [form, *map(lie, range(200))]),
              problems=CORPUS[:20], records=[
        {"run": at + 1, "change": at + 1, "user": lie(at)["user"],
         "tag": f"t{at}", "section": lie(at)["section"], "name": text,
         "label": text, "trigger": text[:50],
         "state": "unstartable" if at % 2 else "done", "due": now - 300 + at,
         "requested_at": None, "started": None if at % 2 else now - 300 + at,
         "ended": None if at % 2 else now - 290 + at, "exit": None if at % 2
         else 1, "signal": None, "reason": text if at % 2 else "",
         "args": {text: text}, "attempt": 1, "count": 1, "bytes": 9,
         "cut": False, "size": len(frames) if at == 0 else 0, "next": None,
         "nonce": ""} for at, text in enumerate(CORPUS)])
    import base64
    fake.sync(outputs=[{"run": 1, "at": 0, "data": base64.b64encode(
        frames).decode()}])
    outcomes = []
    for text in CORPUS[:40]:
        body = operator.request(fake.host, json.dumps(form), {text: text})
        operator.tell("requests", operator.sealed(fake.host, body))
        outcomes.append({"nonce": body["nonce"], "state": "refused",
                         "run": None, "reason": text})
    fake.sync(results=outcomes)
    check = operator.tell("checks", {
        "name": CORPUS[0], "slug": "", "tags": CORPUS[1], "desc": CORPUS[2],
        "kind": "simple", "period": 3600, "grace": 60})["id"]
    with operator.dashboard.client() as client:
        for text in CORPUS[-100:]:
            agent = "".join(filter(str.isprintable, text))
            assert client.ask("POST", f"/ping/{check}", text.encode(),
                              User_Agent=agent).status == 200
    first, = [job["id"] for job in operator.ask("state")["jobs"]
              if job["tag"] == "t0"]
    return operator.ask(f"jobs/{first}/runs")["runs"][0], check


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The operator of another dashboard, which has no host yet."""
    password, salt = "a passphrase for the second", os.urandom(16)
    keys = derive(password, salt, ROUNDS)
    with DashboardProcess(tmp_path_factory.mktemp("second"),
                          *SERVER_OPTIONS) as server:
        made = server.found({
            "salt": salt.hex(), "rounds": ROUNDS,
            "api_sha256": koitab.sha256_hex(keys.api.hex())})
        yield Operator(server, made.json["dash"], password)
        server.assert_no_bugs()


def unshown(browser, wanted: list[str]) -> list[str]:
    """Return which of these texts are not on the page, as text or in a
    field."""
    text = browser.js(
        "return document.querySelector('#main').textContent + [...document"
        ".querySelectorAll('input, textarea')].map((one) => one.value).join("
        "'\\n')")
    return [one for one in wanted if one not in text]


def test_hostile_text_in_any_field_of_a_run_is_shown_as_text(second, browser):
    assert len(set(CORPUS)) == 200
    run, check = lies(second)
    form = next(job["id"] for job in second.ask("state")["jobs"]
                if job["tag"] == "form")
    browser.open(f"{second.dashboard.url}/#{second.dash}", second.password)
    clear = [text for text in CORPUS if "\x1b" not in text]
    counts = {}
    for place, wanted in (
            ("jobs", clear), ("hosts", clear), ("alerts", clear),
            (f"job/{form}/run", clear), (f"run/{run['id']}", clear),
            (f"job/{run['job']}", clear[:1]), ("audit", clear[:38]),
            (f"check/{check}", [text for text in clear
                                if text in CORPUS[-100:]]),
            ("day", clear[:1]), ("search?q=%3Cscript%3E", clear[:1]),
            (f"run/{run['id']}?diff", []), ("settings", []),
            (f"check/{check}/edit", clear[:1])):
        browser.visit(place)
        browser.wait("!document.querySelector('.waits')")
        support.wait_until(lambda all=wanted: not unshown(browser, all), 30, (
            f"{unshown(browser, wanted)[:3]} at {place}"))
        assert browser.js(MARKUP) == [], place
        if place.startswith("check/") and not place.endswith("edit"):
            browser.press("Show")          # the body of the newest ping
            browser.wait("!document.querySelector('.list pre')?.hidden")
            assert browser.js(MARKUP) == [], place
        assert browser.faults() == [], place
        counts[place] = len(wanted)
    print("XSS strings shown as text:", counts)


def test_page_over_plain_http_derives_keys_without_crypto_subtle(
        server, web1_host, operator, browser):
    """The browser has no crypto.subtle without a secure context."""
    url = f"http://koi.test:{server.port}"
    assert f"koitab -d new {url}; then open {url}\n" in server.log()
    browser.open(f"{url}/#{operator.dash}", operator.password)
    browser.wait(job_row("Quick"))
    assert not browser.js("return isSecureContext || crypto.subtle")
    browser.shows("This page came over plain http", css="#plain-http")
    browser.click("a[aria-label='Run Quick']")
    browser.insert("#arg0", "by name")
    browser.keys("Enter")
    browser.wait("document.querySelector('.pane')?.innerText.includes("
                 "'quick by name')")
    # A browser says of a guard that it works for https and at home alone.
    assert browser.faults("Cross-Origin-Opener-Policy header has been ignored"
                          ) == []


def test_page_from_disk_runs_a_job_without_code_of_the_server(
        server, web1_host, operator, browser, tmp_path):
    done = web1_host.koitab("page", server.url)
    assert done.code == 0, done
    file = tmp_path / "koi.html"
    file.write_text(done.out)
    browser.open(f"{file.as_uri()}#{operator.dash}", operator.password)
    browser.wait(job_row("Quick"))
    assert browser.js("return location.protocol") == "file:"
    browser.click("a[aria-label='Run Quick']")
    browser.insert("#arg0", "from disk")
    browser.keys("Enter")
    browser.wait("document.querySelector('.pane')?.innerText.includes("
                 "'quick from disk')")
    browser.insert("#find input", "from disk")
    browser.keys("Enter")
    browser.wait("document.querySelector('.matches a')")


def test_wrong_passphrases_have_to_wait_and_the_right_one_opens(
        browser, tmp_path):
    with DashboardProcess(tmp_path) as other:
        other.set_up()
        browser.go(f"http://127.0.0.1:{other.port}")
        browser.insert("#secret", "view-" + "0" * 64)
        browser.keys("Enter")
        browser.shows("Wrong passphrase for ")
        for _ in range(20):
            if other.ask("GET", "/api/v1/state", token="0" * 64
                         ).status == 429:
                break
        browser.insert("#secret", "view-" + "0" * 64)
        browser.keys("Enter")
        browser.wait("/Too many tries. Try again in \\d+ s\\./.test("
                     "document.querySelector('#why').innerText)")
        browser.insert("#secret", f"view-{VIEWER_TOKEN}")
        browser.keys("Enter")
        browser.wait("document.body.classList.contains('open')")
        assert browser.faults(*WRONG) == []
        browser.go("about:blank")       # or the page misses its server
        assert other.ask("POST", "/api/v1/sync", sync_payload(),
                         HOST_TOKEN).status == 200


def test_rotate_invalidates_the_old_passphrase_and_other_hosts_rejoin(
        server, web1_host, operator, browser):
    browser.open(f"{server.url}/#{operator.dash}", operator.password)
    browser.wait(job_row("Quick"))
    done = web1_host.koitab("-d", "rotate", stdin=operator.password + "\n")
    assert done.code == 0, done
    assert re.search(r"1 other host must join again.*: web2 \(on each: "
                     "koitab -d leave; koitab -d join", done.err), done
    browser.shows("The passphrase was changed.")
    browser.insert("#secret", operator.password)
    browser.keys("Enter")
    browser.shows("Wrong passphrase for ")
    assert browser.faults(*WRONG) == []
    fresh = re.search(r"^passphrase +(\S+)$", done.out, re.M)[1]
    browser.insert("#secret", fresh)
    browser.keys("Enter")
    browser.wait(job_row("Quick"))
    browser.visit("hosts")
    other = ("This host\u2019s list of jobs is not signed with your keys: "
             "type koitab -d join there.")
    browser.shows(other)
    assert browser.js(
        "return [...document.querySelectorAll('.list tbody tr')].filter("
        "(row) => row.innerText.includes(arguments[0])).map((row) => "
        "row.querySelector('b').innerText)", other) == ["web2"]
    browser.visit("jobs")
    browser.click("a[aria-label='Run Two']")
    browser.shows(other)
    browser.visit("jobs")
    browser.click("a[aria-label='Run Quick']")
    browser.insert("#arg0", "anew")
    browser.keys("Enter")
    browser.wait("document.querySelector('.pane')?.innerText.includes("
                 "'quick anew')")
    # As told: off, and join again.
    web2, operator = server.hosts["web2"], Operator(
        server, operator.dash, fresh)
    assert web2.koitab("-d", "off").code == 0
    web2.join(operator)
    browser.visit("hosts")
    browser.wait(f"!document.body.innerText.includes({json.dumps(other)})")


def test_host_that_left_is_no_longer_a_member_and_its_runs_are_kept(
        server, browser):
    web2 = server.hosts["web2"]
    done = web2.koitab("-d", "off")
    assert done.code == 0 and "has left" in done.out, done
    browser.visit("hosts")
    browser.wait(
        "[...document.querySelectorAll('.list tbody tr')].filter((row)"
                 " => row.innerText.includes('web2')).every((row) => "
                 "row.innerText.includes('left'))")
    browser.visit("jobs")
    browser.shows("I am two")
    assert web2.ask("status")["dashboard"] is None
    assert web2.run("Two")[1] == b"two\n"
    assert web2.koitab("-d", "show").code == 1


def test_running_runs_of_a_lost_history_become_interrupted(second):
    fake = FakeHost(second, 7)
    record = {"run": 1, "change": 1, "user": "root", "tag": "lost",
              "label": "Lost", "trigger": "manual", "state": "running",
              "started": time.time(), "args": {}, "size": 0, "cut": False}
    ended = {**record, "run": 2, "change": 2, "state": "done", "exit": 0,
             "ended": time.time(), "size": 100}
    fake.sync(epoch=7, records=[record, ended])
    assert [run["state"] for run in second.runs("Lost")] == [
        "done", "running"]
    assert fake.sync(epoch=8)["missing_output"] == []
    done, lost = second.runs("Lost")
    assert (lost["state"], lost["reason"]) == (
        "interrupted", "the host lost its history")
    assert done["size"] == done["have"] == 0
    assert second.job("Lost")["running"] == []


def test_request_held_by_a_killed_agent_is_sent_to_the_next_agent(second):
    fake = FakeHost(second, 9)
    body = second.request(fake.host, json.dumps(lie(1)))
    second.tell("requests", second.sealed(fake.host, body))
    assert len(fake.sync()["requests"]) == 1
    assert fake.sync()["requests"] == []        # the agent has it already
    assert len(fake.sync(instance="1800000000000-00000002")["requests"]) == 1


# --- requests, without a browser: what is not as it was signed never runs

NOTE = """\
"Note" @manual echo {{{{Nonce}}}} >> {done} && sync {done}
"Typed" @manual : {{{{Times, int, 1}}}} {{{{Mood, choice(calm|gay), calm}}}}; \
echo {{{{Nonce}}}} >> {done} && sync {done}
"Daily" 0 3 * * * echo daily >> {done}
KOI_CONFIRM=cli
"Typed here" @manual echo {{{{Nonce}}}} >> {done}
"""


class Firm:
    """Two hosts whose jobs note the nonce that they were asked with: what
    stands there ran, whatever anybody says."""

    def __init__(self, server: DashboardProcess):
        self.server, self.done = server, server.folder / "done"
        self.done.touch()
        self.tab = NOTE.format(done=self.done)
        self.koids = [server.add_host(name, self.tab) for name in ("web1",
                                                                   "web2")]
        self.operator = self.koids[0].create_dashboard(server)
        self.koids[1].join(self.operator)
        self.hosts = [self.operator.host(name) for name in ("web1", "web2")]
        self.specs = [self.operator.specs(host) for host in self.hosts]

    def ran(self, nonce: str) -> int:
        return self.done.read_text().split().count(nonce)

    def body(self, name: str = "Note", at: int = 0, **changes) -> dict:
        nonce = changes.pop("nonce", os.urandom(16).hex())
        args = {"Nonce": nonce, **({"Times": "2", "Mood": "gay"}
                                   if name == "Typed" else {})}
        return {**self.operator.request(
            self.hosts[at], self.specs[at][name], args, nonce=nonce),
            **changes}

    def post(self, sealed: dict):
        return self.operator.reply("POST", "requests", sealed)

    def answer(self, body: dict, sealed: dict | None = None) -> dict:
        """Post it; the result, as GET /requests/NONCE gives it."""
        reply = self.post(sealed or self.operator.sealed(body["host"], body))
        assert reply.status == 202, reply
        return self.operator.result(body["nonce"])

    def settled(self) -> None:
        """All that was begun has ended, on both hosts."""
        for koid in self.koids:
            support.wait_until(lambda koid=koid: not [
                run for run in koid.history() if run["state"] in (
                    "queued", "running")], 20, "all runs to end")

    def rows(self, statement: str, *values) -> list:
        """Change the dashboard's database, as an attacker would."""
        self.server.stop()
        db = sqlite3.connect(self.server.db)
        with db:
            found = db.execute(statement, values).fetchall()
        db.close()
        self.server.start()
        return found


@pytest.fixture(scope="module")
def firm(tmp_path_factory):
    with DashboardProcess(tmp_path_factory.mktemp("firm")) as server:
        yield Firm(server)
        server.assert_no_bugs()


def test_signed_request_runs_once_and_its_run_is_reported(firm):
    body = firm.body("Typed")
    result = firm.answer(body)
    assert result["state"] == "accepted" and result["reason"] == ""
    run = support.wait_until(lambda: (found := firm.operator.ask(
        f"runs/{result['run']}")["run"])["state"] == "done" and found)
    assert (run["exit"], run["trigger"], run["args"]) == (
        0, "manual", body["args"])
    assert firm.ran(body["nonce"]) == 1


def forged(firm, body):     # without the key
    return firm.operator.sealed(body["host"], body, key=b"k" * 32)


def altered(firm, body):    # one character of the signed text
    sealed = firm.operator.sealed(body["host"], body)
    return {**sealed, "body": sealed["body"].replace('"do": "run"',
                                                     '"do" : "run"')}


def swapped(firm, body):    # to the other host, which has the same job
    text = json.dumps({**body, "host": firm.hosts[1]})
    return {"host": firm.hosts[1], "body": text, "mac": koitab.run_mac(
        firm.operator.key(firm.hosts[0]), text)}


def honest(firm, body):
    return firm.operator.sealed(body["host"], body)


@pytest.mark.parametrize("name, changes, seal, why", [
    ("Note", {}, forged, "invalid signature"),
    ("Note", {}, altered, "invalid signature"),
    ("Note", {}, swapped, "invalid signature"),
    ("Note", {"key": "0" * 16}, honest, "the request is for other keys"),
    ("Note", {"user": "somebody"}, honest, "job does not exist"),
    ("Note", {"tag": "0" * 12}, honest, "job does not exist"),
    ("Note", {"job": "0" * 64}, honest, "the job has changed since"),
    ("Note", {"iat": 1_000}, honest, "is valid for too long"),
    ("Note", {"args": {}}, honest, "the arguments do not match"),
    ("Note", {"args": {"Nonce": "x", "More": "y"}}, honest, "the arguments"),
    ("Note", {"args": {"Nonce": "a\u0007b"}}, honest, "control character"),
    ("Note", {"args": {"Nonce": "x" * 4097}}, honest, "longer than"),
    ("Typed", {"args": {"Nonce": "x", "Times": "0x2", "Mood": "gay"}},
     honest, "expected a whole number"),
    ("Typed", {"args": {"Nonce": "x", "Times": "2", "Mood": "wild"}},
     honest, "expected one of"),
    ("Daily", {"args": {}}, honest, "only @manual jobs"),
    ("Typed here", {}, honest, "only be run with koitab run")])
def test_mismatched_request_is_refused_by_koid_with_the_reason(
        firm, name, changes, seal, why):
    firm.settled()
    before = firm.done.read_text()
    runs = [len(koid.history()) for koid in firm.koids]
    body = firm.body(name, **changes)
    result = firm.answer(body, seal(firm, body))
    assert result["state"] == "refused" and why in result["reason"], result
    assert result["run"] is None
    assert [len(koid.history()) for koid in firm.koids] == runs
    assert firm.done.read_text() == before


@pytest.mark.parametrize("changes", [
    {"exp": 1_700_000_300_000, "iat": 1_700_000_000_000},
    {"exp": 4_000_000_300_000, "iat": 4_000_000_000_000},
    {"host": "0" * 32}, {"dash": "0" * 16}])
def test_malformed_request_is_refused_by_the_dashboard(firm, changes):
    body = firm.body(**changes)
    reply = firm.post(firm.operator.sealed(firm.hosts[0], body))
    assert reply.status == 400 and reply.json["error"], reply
    assert firm.operator.reply("GET", f"requests/{body['nonce']}"
                               ).status == 404
    assert firm.ran(body["nonce"]) == 0


def test_job_changed_after_the_list_is_not_run_by_the_request(firm):
    body = firm.body()
    firm.koids[0].install(firm.tab.replace("echo {{Nonce}}",
                                           "echo not {{Nonce}}"))
    result = firm.answer(body)
    firm.koids[0].install(firm.tab)
    assert result["state"] == "refused"
    assert "the job has changed since it was shown" in result["reason"]
    assert firm.ran(body["nonce"]) == 0


def test_repeated_request_runs_once(firm):
    body = firm.body()
    sealed = honest(firm, body)
    first = firm.answer(body)
    again = [firm.post(sealed) for _ in range(5)]
    assert [reply.status for reply in again] == [202] * 5
    assert firm.operator.result(body["nonce"]) == first
    other = {**body, "args": {"Nonce": "another"}}
    assert firm.post(honest(firm, other)).status == 409
    firm.settled()
    assert firm.ran(body["nonce"]) == 1
    assert "another" not in firm.done.read_text()


def test_compromised_dashboard_starts_no_run_by_replaying_requests(firm):
    """All that was ever asked waits again, under the dates of today; koid
    has been started anew, too."""
    fresh = [firm.body() for _ in range(3)]
    for body in fresh:
        assert firm.answer(body)["state"] == "accepted"
    firm.settled()
    before = sorted(firm.done.read_text().split())
    firm.koids[0].stop()
    firm.koids[0].start()
    nonces = [nonce for nonce, in firm.rows(
        "update requests set state = 'waiting', reason = '', n = null, "
        "expires = expires + 600 returning nonce")]
    assert len(nonces) > 15
    outcomes = {nonce: firm.operator.result(nonce) for nonce in nonces}
    for body in fresh:
        assert outcomes[body["nonce"]]["reason"] == \
            "the request was used before, and ran once"
    firm.settled()
    assert sorted(firm.done.read_text().split()) == before
    print(f"replayed {len(nonces)}, executed 0")


def test_dashboard_cannot_extend_the_expiry_of_a_request(firm):
    """The dashboard's own idea of when it expires counts for nothing."""
    body = firm.body(iat=int(time.time() * 1000) - 400_000,
                     exp=int(time.time() * 1000) - 100_000)
    sealed = honest(firm, body)
    firm.rows("insert into requests (host, nonce, body, mac, at, expires) "
              "select id, ?, ?, ?, ?, ? from hosts where host = ?",
              body["nonce"], sealed["body"], sealed["mac"], time.time(),
              time.time() + 600, body["host"])
    result = firm.operator.result(body["nonce"])
    assert result["state"] == "refused"
    assert "the request expired" in result["reason"]
    assert firm.ran(body["nonce"]) == 0


def test_request_that_no_host_fetches_expires(firm):
    firm.koids[1].stop()
    now = int(time.time() * 1000)
    body = firm.body(at=1, iat=now, exp=now + 1_500)
    assert firm.post(honest(firm, body)).status == 202
    result = firm.operator.result(body["nonce"])
    firm.koids[1].start()
    assert result["state"] == "expired", result
    assert firm.answer(firm.body(at=1))["state"] == "accepted"
    assert firm.ran(body["nonce"]) == 0


def test_host_restored_from_a_backup_repeats_no_request_and_continues(firm):
    """What it ran since the backup it has forgotten; so it takes nothing
    that is older than the day of its return."""
    koid = firm.koids[0]
    koid.stop()
    backup = {path: path.read_bytes()
              for path in koid.home.glob("history.db*")}
    koid.start()
    body = firm.body()
    assert firm.answer(body)["state"] == "accepted"
    firm.settled()
    koid.stop()
    for path in koid.home.glob("history.db*"):
        path.unlink()
    for path, data in backup.items():
        path.with_suffix(".back").write_bytes(data)     # another file
        path.with_suffix(".back").chmod(0o600)
        path.with_suffix(".back").rename(path)
    koid.start()
    firm.rows("update requests set state = 'waiting', n = null where nonce "
              "= ?", body["nonce"])
    result = firm.operator.result(body["nonce"])
    assert result["reason"] == "the request is too old: this host cannot " \
        "check whether it was used before"
    assert firm.ran(body["nonce"]) == 1
    count = len(firm.server.rows("select 1 from runs"))
    fresh = firm.body()
    result = firm.answer(fresh)
    firm.settled()
    assert result["state"] == "accepted" and firm.ran(fresh["nonce"]) == 1
    # Its number was used before; what is shown is this one, and once.
    assert firm.operator.ask(f"runs/{result['run']}")["run"]["args"] == \
        fresh["args"]
    assert len(firm.server.rows("select 1 from runs")) == count + 1

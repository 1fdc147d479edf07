"""The page in a real browser, against a stand-in of the dashboard."""

from __future__ import annotations

import hashlib
import json
import re
import time

import pytest

import page_server
from page_server import koitab

PASSWORD = page_server.PASSWORD


@pytest.fixture(scope="module", autouse=True)
def well_behaved(browser):
    """Fails when a test caused an error or a violation of the policy that it
    did not expect."""
    yield
    assert browser.faults() == []


@pytest.fixture(scope="module")
def stand_in():
    # Bars are most of what the browser draws, again for each test.
    with page_server.Server(recent_runs=20) as stand_in:
        yield stand_in


def focus_of(page) -> str:
    return page.js("return document.activeElement.getAttribute('aria-label')"
                   " || document.activeElement.textContent")


@pytest.fixture
def page(browser, stand_in):
    """Logged in, at the list of jobs."""
    stand_in.world.tries = 0
    browser.size(1280, 900)
    if browser.js("return location.href.split('#')[0] !== arguments[0] || "
                  "!document.body.classList.contains('open') || "
                  "!isOperator()", stand_in.url):
        browser.open(stand_in.url, PASSWORD)
    browser.visit("jobs", ".row")
    return browser


# --- login


def test_wrong_passphrase_is_refused_and_many_tries_are_throttled(
        browser, stand_in):
    stand_in.world.tries = 3
    browser.go("about:blank")
    browser.go(stand_in.url)
    wrong = f"Wrong passphrase for {stand_in.url.rstrip('/')}."
    for words in (wrong, wrong,
                  "Too many tries. Try again in 40 s."):
        browser.js("document.querySelector('#secret').value = 'wrong'")
        browser.click("form .primary")
        browser.wait("document.querySelector('#why').textContent "
                     f"=== {json.dumps(words)}")
        browser.js("document.querySelector('#why').textContent = ''")
    stand_in.world.tries = 0
    refused = [line for line in browser.faults() if "status of 4" in line]
    assert len(refused) == 3                # the browser's own words


def test_login_refuses_too_few_key_derivation_rounds(browser, stand_in):
    stand_in.rounds = 1000
    try:
        browser.go("about:blank")
        browser.go(stand_in.url)
        browser.type("#secret", PASSWORD)
        browser.keys("Enter")
        browser.wait("document.querySelector('#why').textContent"
                     ".includes('requested weak keys')")
    finally:
        stand_in.rounds = 600_000


def test_viewer_sees_jobs_and_no_run_buttons(browser, stand_in):
    stand_in.world.tries = 0
    browser.open(stand_in.url, f"view-{page_server.VECTOR['view']}")
    browser.find(".row")
    assert browser.js("return document.querySelectorAll('.run, .row-actions "
                      "button').length") == 0
    browser.visit(f"job/{stand_in.world.every_type}/run", ".note")
    assert "This token is read-only" in browser.text(".note")


@pytest.mark.parametrize("typed, read", [
    (" abcd-efgh-1234-5678-wxyz", "abcd-efgh-1234-5678-wxyz"),
    ("ABCD-EFGH-1234-5678-WXYZ", "abcd-efgh-1234-5678-wxyz"),
    ("abcdefgh12345678wxyz", "abcd-efgh-1234-5678-wxyz"),
    ("abcd efgh 1234\t5678 wxyz\n", "abcd-efgh-1234-5678-wxyz"),
    (" Chosen by Ann ", " Chosen by Ann "),
    ("abcd-efgh-1234-5678-wxy", "abcd-efgh-1234-5678-wxy"),
    ("abcd--efgh-1234-5678-wxyz", "abcd--efgh-1234-5678-wxyz")])
def test_passphrase_is_accepted_as_people_type_it(page, typed, read):
    assert page.js("return asGenerated(arguments[0])", typed) == read


def test_button_shows_and_hides_the_typed_passphrase(browser, stand_in):
    browser.go("about:blank")
    browser.go(stand_in.url)
    browser.type("#secret", "abc")
    for kind in ("text", "password"):
        browser.click(".login .toggle")
        assert browser.js("return document.querySelector('#secret').type"
                          ) == kind
    browser.js("document.querySelector('#secret').dispatchEvent(new "
               "KeyboardEvent('keyup', {modifierCapsLock: true}))")
    assert browser.text("#caps") == "Caps Lock is on."


def test_first_page_shows_the_command_that_creates_a_dashboard(
        browser, stand_in):
    stand_in.world.is_founded = False
    try:
        browser.go("about:blank")
        browser.go(stand_in.url)
        browser.find(".login .snippet")
        assert browser.text(".login .snippet code") == \
            f"koitab -d new {stand_in.url.rstrip('/')}"
    finally:
        stand_in.world.is_founded = True
    browser.find("#secret")
    browser.faults()        # the browser's own words of the 404


def test_read_only_link_opens_the_page_and_leaves_the_address(browser,
                                                              stand_in):
    token = f"view-{page_server.VECTOR['view']}"
    browser.go("about:blank")
    browser.go(f"{stand_in.url}#{token}")
    browser.find(".row")
    assert browser.js("return location.hash") == "#/jobs"
    browser.visit("settings", "#stay")
    browser.click("#stay")
    browser.go("about:blank")
    browser.go(stand_in.url)
    browser.find(".row")
    browser.click(".lock")
    browser.go("about:blank")
    browser.go(stand_in.url)
    browser.find("#secret")
    assert browser.js("return localStorage.getItem('koi.viewer')") == ""


def test_operator_makes_a_read_only_link(page, stand_in):
    page.visit("settings", "#link-name")
    page.type("#link-name", "Kitchen")
    page.keys("Enter")
    page.find("[role=status] .snippet")
    link = page.text("[role=status] .snippet code")
    made = stand_in.world.tokens.pop()
    assert link.startswith(f"{stand_in.url}#view-")
    assert (made["name"], made["role"]) == ("Kitchen", "viewer")
    assert made["sha256"] == hashlib.sha256(bytes.fromhex(
        link.rpartition("-")[2])).hexdigest()


def test_locking_deletes_the_keys_and_the_state(page):
    page.find(".row")
    page.click(".lock")
    page.wait("document.querySelector('#secret')")
    assert page.js("return [session.keys, session.token, state.jobs.size, "
                   "document.querySelectorAll('.row').length, "
                   "document.title]") == [None, "", 0, 0, "koi"]


def test_page_locks_after_15_minutes_of_inactivity(page):
    page.js("session.used -= 16 * 60 * 1000; "
            "document.dispatchEvent(new Event('visibilitychange'))")
    page.wait("document.querySelector('#secret')")
    assert "15 minutes" in page.text("#why")


def test_page_over_plain_http_shows_a_warning_and_derives_keys_itself(
        browser, stand_in):
    """Only a name such as localhost is a secure context without TLS."""
    browser.go(stand_in.url.replace("127.0.0.1", "koi.test"))
    assert browser.js("return [isSecureContext, Boolean(crypto.subtle)]"
                      ) == [False, False]
    assert "plain http" in browser.text("#plain-http")
    browser.type("#secret", PASSWORD)
    browser.keys("Enter")
    browser.wait("document.body.classList.contains('open')", 30)
    browser.find(".row")
    assert browser.faults() == []


def test_page_from_a_file_asks_for_its_server(browser, stand_in, tmp_path):
    stand_in.world.tries = 0
    file = tmp_path / "koi.html"
    file.write_text(koitab.page_text(""))
    browser.go(f"file://{file}")
    browser.type("#server", stand_in.url)
    browser.type("#secret", PASSWORD)
    browser.keys("Enter")
    browser.wait("document.body.classList.contains('open')")
    browser.find(".row")
    browser.wait("document.querySelector('#connection').textContent "
                 "=== 'Live'")


# --- jobs


def test_failing_jobs_come_first_with_their_last_line(page, stand_in):
    page.find(".attention .row")
    failing = [job for job in stand_in.world.jobs.values()
               if job["state"] in ("failed", "missed")]
    assert page.js("return document.querySelector('.jobs .group')"
                   ".classList.contains('attention')")
    shown = page.js("return [...document.querySelectorAll('.attention .row "
                    ".c-name a')].map((a) => a.textContent)")
    assert {job["label"] for job in failing} <= set(shown)
    assert "failing for" in page.text(".attention .why:has(pre)")
    assert page.js("return document.title").startswith("(")
    assert page.js("return decodeURIComponent(document.querySelector("
                   "'link[rel=icon]').href)").count("#d6342c") == 1


def test_changed_row_keeps_the_focus_and_is_announced(page, stand_in):
    page.find(".row")
    job = next(job for job in stand_in.world.jobs.values()
               if job["state"] == "ok" and job["section"] == "System")
    page.js("""
        window.node = document.querySelector(
            `[href="#/job/${arguments[0]}"]`);
        node.focus(); window.y = scrollY;""", job["id"])
    job.update(state="failed", failing={
        "since": time.time(), "count": 1, "last_ok": None, "line": "bad"})
    stand_in.world.push(jobs=[job])
    page.wait("node.closest('.attention')")
    assert page.js("return document.activeElement === node")
    assert "failed on" in page.js(
        "return document.querySelector('#announcer').textContent")
    job.update(state="ok", failing=None)
    stand_in.world.push(jobs=[job])
    page.wait("!node.closest('.attention')")


def test_focused_button_of_a_row_stays_focused_when_its_job_changes(
        page, stand_in):
    page.find(".attention .why")
    number = page.js("""
        const row = document.querySelector(".attention .why:has(pre)")
            .parentNode;
        window.old = [...row.querySelectorAll("button")].find((one) =>
            one.textContent === "Snooze\u2026");
        old.focus();
        return row.row.job.id;""")
    stand_in.world.push(jobs=[stand_in.world.jobs[number]])
    page.wait("!window.old.isConnected")
    assert page.js("return [document.activeElement.textContent, document"
                   ".activeElement.closest('.row').row.job.id]") == [
        "Snooze\u2026", number]


@pytest.fixture(scope="module")
def well():
    """A dashboard on which nothing is wrong."""
    with page_server.Server(recent_runs=20, well=True) as stand_in:
        yield stand_in


def test_headline_says_that_all_jobs_are_well_and_names_the_last_failure(
        browser, well):
    browser.open(well.url, PASSWORD)
    count = len(well.world.jobs)
    assert browser.text("h1") == (
        f"All {count} jobs and {len(well.world.checks)} checks are well.")
    news = browser.text(".headline p")
    assert re.search(r"Last failure: .+ on \w+, .+ ago\.", news)
    assert re.search(r"Next: .+ on \w+ in .+\.", news)
    assert browser.js("return [document.title, document.querySelector("
                      "'#problem-count').textContent]") == ["koi", ""]


def test_headline_chip_title_and_badge_count_the_same(page, stand_in):
    """Jobs, checks and hosts that are down, but not the jobs of such hosts,
    because nobody knows how they are."""
    world = stand_in.world
    jobs = sum(job["state"] in ("failed", "missed")
               for job in world.jobs.values())
    checks = sum(check["state"] in ("down", "late")
                 for check in world.checks.values())
    page.wait("document.querySelector('h1').textContent.endsWith("
              f"'{jobs} jobs, {checks} checks and 1 host need attention.')")
    count = str(jobs + checks + 1)
    assert page.js("""return [
        document.querySelector("[data-state=bad] b").textContent,
        document.title.match(/\\d+/)[0],
        document.querySelector("#problem-count").textContent,
        String(document.querySelectorAll(".attention .row").length)]"""
                   ) == [count] * 4


def test_host_that_is_down_comes_first_and_explains_its_jobs(page, stand_in):
    host = next(host for host in stand_in.world.hosts.values()
                if host["state"] == "down")
    row = page.text(".attention .row")
    assert host["name"] in row and "down" in row
    assert re.search(r"Last seen \d+ min ago\. The state of its jobs is "
                     r"unknown\.", row)
    page.js("document.querySelector('[data-state=unknown]').click()")
    assert page.js("return document.querySelectorAll('.attention .row:not("
                   "[hidden])').length") == 0
    page.click('[data-state=""]')


def test_past_next_start_of_an_unknown_job_is_shown_as_due_then(
        page, stand_in):
    job = next(job for job in stand_in.world.jobs.values()
               if job["state"] == "unknown" and job["next"])
    shown = f"[href='#/job/{job['id']}']"
    show(page, {**job, "next": time.time() - 120})
    page.wait(f"document.querySelector(\".row:has({shown}) .c-next\")"
              ".textContent === 'was due 2 min ago'")
    show(page, job)


def test_columns_have_headers_in_the_table_of_jobs(page):
    assert page.js("return [...document.querySelectorAll('.jobs "
                   "[role=columnheader]')].map((one) => one.textContent)"
                   ) == ["State", "Job", "Schedule", "Last run", "Runs",
                         "Duration", "Next", "Actions"]
    assert page.js("return document.querySelectorAll('section[role]').length"
                   ) == 0


def test_bar_of_a_missed_run_is_hollow_and_colours_have_enough_contrast(page):
    """At 1180 pixels a bar has 3, so that an outline has an inside."""
    page.size(1180, 900)
    page.wait("document.querySelector('.bars').bars.items.at(-1).w === 3")
    assert page.js("return document.querySelector('.b-hollow')"
                   ".getAttribute('d').split('M')[1]").count("h") == 2
    assert page.js("return document.querySelector('.legend').textContent"
                   ) == ("Each bar is a run:okfailedmissedskippedinterrupted"
                         "running")
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        assert page.js(LIGHT + """
            const style = getComputedStyle(document.documentElement);
            const colour = (name) => light([1, 3, 5].map((at) => parseInt(
                style.getPropertyValue(name).trim().slice(at, at + 2), 16)));
            const card = scheme === "light" ? 1 : colour("--card");
            return ["--b-ok", "--b-bad", "--b-odd", "--b-skip", "--b-run"]
              .filter((name) => (Math.max(card, colour(name)) + 0.05)
                / (Math.min(card, colour(name)) + 0.05) < 3)""".replace(
                    "scheme ===", f"'{scheme}' ===")) == []
    page.media(prefers_color_scheme="light")


def test_more_than_200_rows_are_in_closed_groups_that_open_and_are_filtered(
        browser):
    count = "return document.querySelectorAll('.row').length"
    with page_server.Server(many=True, recent_runs=3) as stand_in:
        browser.open(stand_in.url, PASSWORD)
        browser.find(".attention .row")
        urgent = browser.js("return document.querySelectorAll("
                            "'.attention .row').length")
        assert browser.js(count) == urgent
        assert browser.text("[data-state=''] b") == str(
            len(stand_in.world.jobs) + len(stand_in.world.checks))
        toggle = browser.js(
            "const node = document.querySelector('.closed .toggle'); "
            "node.focus(); return node.innerText.trim()")
        browser.keys("Enter")
        assert browser.js(count) == urgent + int(toggle.split()[0])
        assert browser.js("return document.activeElement.getAttribute("
                          "'aria-expanded')") == "true"
        job = next(one for one in stand_in.world.jobs.values()
                   if one["state"] == "ok" and one["section"])
        browser.js("jobList.text.value = arguments[0]; jobList.text."
                   "dispatchEvent(new Event('input'))", job["label"])
        browser.wait("[...document.querySelectorAll('.row')].every((row) => "
                     f"row.innerText.includes({json.dumps(job['label'])}))")
        assert browser.js("return document.querySelector('.closed')") is None
        browser.js("jobList.clear()")
        assert browser.js(count) == urgent + int(toggle.split()[0])


def test_push_redraws_the_row_of_the_changed_job_and_no_other(page, stand_in):
    job = next(job for job in stand_in.world.jobs.values()
               if job["state"] == "ok")
    page.js("""
        window.redrawn = [];
        window.observer = new MutationObserver((changes) => redrawn.push(
            ...changes.filter(({target}) => target.row).map(({target}) =>
                target.row.job.id)));
        observer.observe(jobList.body, {childList: true, subtree: true});""")
    show(page, {**job, "next": job["next"] and job["next"] + 60})
    assert page.js("observer.disconnect(); return [...new Set(redrawn)]"
                   ) == [job["id"]]
    show(page, job)


def test_column_headers_stay_in_sight_when_the_list_is_scrolled(page):
    page.js("scrollTo(0, 1500)")
    top = page.js("return document.querySelector('.heads')"
                  ".getBoundingClientRect().top")
    page.js("scrollTo(0, 0)")
    assert 0 < top < 100


@pytest.mark.parametrize("words, changed", [
    ("missed", {"state": "missed"}), ("failed", {"state": "failed"}),
    ("never ran", {"state": "new"}), ("snoozed", {"snoozed": 4e9})])
def test_filter_finds_jobs_by_the_word_of_their_state(page, stand_in, words,
                                                      changed):
    job = next(job for job in stand_in.world.jobs.values()
               if job["label"] == "Clean carts" and job["state"] == "ok")
    show(page, {**job, **changed})
    page.js("jobList.text.value = arguments[0]; jobList.text.dispatchEvent("
            "new Event('input'))", words)
    assert job["id"] in page.js(
        "return [...document.querySelectorAll('.row:not([hidden])')].map("
        "(row) => row.row.job.id)")
    page.js("jobList.clear()")
    show(page, job)


def show(page, job: dict) -> None:
    """Show a version of a job, as if it had come by the stream."""
    page.js("const change = { jobs: [arguments[0]] }; applyChange(change); "
            "app.changed(change); app.update()", job)


def test_lost_stream_is_shown_and_reconnects(page, stand_in):
    """Changes of the time between are shown then."""
    page.wait("stream.live")
    job = next(job for job in stand_in.world.jobs.values()
               if job["state"] == "ok" and job["section"] == "Backup")
    stand_in.deaf = True
    page.js("stream.reader.cancel()")
    page.wait("document.querySelector('#connection').textContent"
              ".startsWith('Not connected: next try in ')")
    job["state"] = "late"
    stand_in.world.push(jobs=[job])
    stand_in.deaf = False
    page.wait("stream.live && state.jobs.get(%d).state === 'late'"
              % job["id"], 15)
    job["state"] = "ok"
    stand_in.world.changes.append({"seq": stand_in.world.seq + 1,
                                   "reset": True})
    stand_in.world.push()
    page.wait("state.jobs.get(%d).state === 'ok'" % job["id"])
    page.faults()      # of the tries that failed


def test_older_runs_are_loaded_page_by_page(page, stand_in):
    world = stand_in.world
    job = next(job for job in world.jobs.values()
               if job["label"] == "Price feed")
    recent_runs, last = job["recent_runs"], job["last"]
    for back in range(160, 0, -1):
        world.add_run(job, time.time() - back * 60, 1)
    count = sum(run["job"] == job["id"] for run in world.runs.values())
    page.visit(f"job/{job['id']}", ".list")
    for shown in (50, 150, count):
        page.wait("document.querySelectorAll('.list tbody tr').length "
                  f"=== {shown}")
        assert page.js("return document.querySelector('.list + .btn').hidden"
                       ) is (shown == count)
        page.js("document.querySelector('.list + .btn').click()")
    job.update(recent_runs=recent_runs, last=last)


@pytest.mark.parametrize("kind, words", [
    ("utc", "(UTC)"), ("host", "(America/New_York, UTC\u22125)")])
def test_times_are_shown_in_the_chosen_zone(page, kind, words):
    title = page.js("""
        const host = [...state.hosts.values()].find((h) =>
            h.name === "build");
        zoneKind = arguments[0];
        try { return exactTime(1772359200, host); }
        finally { zoneKind = "mine"; }""", kind)
    assert title.endswith(words)
    assert ("10:00:00" if kind == "utc" else "05:00:00") in title


def test_filter_matches_text_and_state(page):
    page.keys("/")
    page.keys(*"restart web")
    page.wait("document.querySelectorAll('.row:not([hidden])').length === 4")
    page.js("document.activeElement.value = 'no such job'; document"
            ".activeElement.dispatchEvent(new Event('input'))")
    page.wait("document.querySelector('.empty')")
    page.click(".empty button")
    page.wait("document.querySelectorAll('.row:not([hidden])').length > 50")
    page.click("[data-state=bad]")
    assert page.js("return [...document.querySelectorAll('.group:not("
                   "[hidden])')].length") == 1
    page.click('[data-state=""]')


def test_arrow_keys_walk_the_history_bar_and_enter_opens_a_run(page):
    page.js("document.querySelector('.group:not(.attention) .row .bars')"
            ".focus()")
    page.keys("Left", "Left", "Left")
    page.wait("!document.querySelector('#tip').hidden")
    assert page.js("return document.activeElement.getAttribute("
                   "'aria-label')").startswith("last 12 runs: ")
    page.keys("Enter")
    page.wait("location.hash.startsWith('#/run/')")


def test_tip_of_the_bar_with_the_focus_stays_when_the_page_scrolls(page):
    page.js("document.querySelector('.group:not(.attention) .row .bars')"
            ".focus()")
    page.keys("Left")
    page.wait("!document.querySelector('#tip').hidden")
    page.js("addEventListener('scroll', () => requestAnimationFrame(() => "
            "{ document.scrolled = true; }), {once: true});"
            "scrollBy(0, scrollY ? -1 : 1)")
    page.wait("document.scrolled")
    assert page.js("return !document.querySelector('#tip').hidden")


def test_many_jobs_are_drawn_within_the_time_limit(browser):
    with page_server.Server(many=True) as stand_in:
        browser.open(stand_in.url, PASSWORD)
        browser.find(".row")
        # Each row has a blank, so all groups are open.
        browser.js("jobFilter.text = ' '; jobList.filter()")
        browser.wait("document.querySelectorAll('.row').length >= 300")
        first = min(cpu_seconds_of(browser, """
            jobList.root.remove(); jobList = null;
            const root = document.createElement("div");
            document.querySelector("#main").replaceChildren(root);
            jobsView({query: new URLSearchParams()}, root);
            document.body.offsetHeight;""") for _ in range(3))
        again = min(cpu_seconds_of(browser, """
            jobList.update({jobs: [[...state.jobs.values()][150]]});
            document.body.offsetHeight;""") for _ in range(3))
        print(f"\n300 jobs: {first:.3f} s, one change: {again:.3f} s")
        assert first < 0.4 and again < 0.1      # on a slow machine


def cpu_seconds_of(browser, script: str) -> float:
    """Processor time that a script takes in the page."""
    before = browser.cpu_seconds()
    browser.js(script)
    return browser.cpu_seconds() - before


def test_day_begins_with_counts_that_filter_and_shows_problems_first(
        page, stand_in):
    """What did not run is two clicks away: Day, and missed."""
    world = stand_in.world
    midnight = time.mktime((*time.localtime()[:3], 0, 0, 0, 0, 0, -1))
    job = next(job for job in world.jobs.values()
               if job["label"] == "Security updates" and job["state"] == "ok")
    recent, last = job["recent_runs"], job["last"]
    run = world.add_run(job, max(midnight, time.time() - 600), 1, "missed")
    page.press("Day", "#top a")
    page.wait("document.querySelector('[data-state=missed] b')?.textContent"
              " > 0")
    assert page.js("return [...document.querySelectorAll('.chips button')]"
                   ".find((chip) => !chip.hidden).textContent"
                   ).endswith("ran")
    assert page.text(".day h2") == "Failed, missed or late"
    assert page.js("return document.querySelector('.legend') !== null")
    page.click("[data-state=missed]")
    assert page.js("return document.querySelector('[data-state=missed]')"
                   ".ariaPressed") == "true"
    shown = page.js("return [...document.querySelectorAll('.dayrow > a')]"
                    ".map((one) => one.textContent)")
    assert len(shown) == int(page.text("[data-state=missed] b"))
    assert any(name.startswith("Security updates") for name in shown)
    page.click("[data-state=missed]")
    page.click("[data-state=unknown]")
    down = [one for one in world.jobs.values() if one["state"] == "unknown"]
    assert page.text("[data-state=unknown] b") == str(len(down))
    assert page.js("return document.querySelectorAll('.dayrow > a').length"
                   ) == len(down)
    page.js("dayFilter.state = ''")
    del world.runs[run["id"]]
    job.update(recent_runs=recent, last=last)


def test_start_that_ran_on_another_host_is_shown_with_its_name(
        page, stand_in):
    world = stand_in.world
    job = next(job for job in world.jobs.values()
               if job["label"] == "Security updates" and job["state"] == "ok")
    recent, last = job["recent_runs"], job["last"]
    midnight = time.mktime((*time.localtime()[:3], 0, 0, 0, 0, 0, -1))
    run = world.add_run(job, max(midnight, time.time() - 3000), 1,
                        "elsewhere", reason="web2", have=0, size=0)
    page.visit(f"run/{run['id']}", ".runhead .lead")
    assert page.text("h1") == "Security updates ran on another host"
    assert page.text(".lead").startswith(
        "Ran on another host of its group: web2")
    assert "Its output is on that host." in page.text("#main")
    page.visit("day", "[data-state=elsewhere]")
    page.wait("document.querySelector('[data-state=elsewhere] b')"
              ".textContent === '1'")
    page.click("[data-state=elsewhere]")
    widths = page.js("return [...document.querySelectorAll('.lane path, "
                     ".dayrow svg .b-ok')].map((path) => path.getAttribute('d'"
                     ")).join('').match(/h[0-9.]+/g).map((h) => +h.slice(1))")
    assert max(widths) <= 3     # it took no time here
    page.js("dayFilter.state = ''")
    del world.runs[run["id"]]
    job.update(recent_runs=recent, last=last)


# --- keyboard


def test_every_view_is_reached_by_keyboard(page, stand_in):
    page.find(".row")
    page.keys("j", "j", "j", "k")       # the first is a host
    name = page.js("return document.activeElement.textContent")
    assert name and page.js("return Boolean(document.activeElement.closest("
                            "'.row'))")
    page.keys("Enter")
    page.wait("location.hash.startsWith('#/job/')")
    for key, path in (("t", "#/day"), ("s", "#/search"), ("j", "#/jobs")):
        page.keys("Escape")
        page.keys("g", key)
        page.wait(f"location.hash === '{path}'")
    page.keys("?")
    page.wait("document.querySelector('#shortcuts').open")
    page.keys("Escape")
    page.wait("!document.querySelector('#shortcuts').open")
    page.visit(f"run/{stand_in.world.colours}", ".line")
    page.keys("w")
    page.wait("document.querySelector('.pane').classList.contains('wrap')")
    page.keys("w")
    page.wait("!document.querySelector('.pane').classList.contains('wrap')")
    page.keys("/")
    page.keys("r", "g")         # in a field these are letters
    assert page.js("return document.activeElement.value") == "rg"
    page.keys("Escape")


def test_keys_snooze_and_compare_and_a_failing_row_has_4_tab_stops(page):
    page.find(".attention .why pre")
    name = page.js("const row = document.querySelector('.attention .row:has("
                   "pre):not(:has(.run))'); const link = row.querySelector("
                   "'.c-name a'); link.focus(); return link.innerText")
    stops = []
    while page.js("return document.activeElement.closest('.row')"
                  "?.row.job.label") == name:
        stops.append(focus_of(page))
        page.keys("Tab")
    assert stops == [name, "Output", "Diff with last good", f"Snooze {name}"]
    page.keys("k", "s")
    page.wait("document.activeElement.closest('#menu')")
    page.keys("Escape")
    page.keys("d")
    page.wait("location.hash.endsWith('?diff')")
    page.find(".difflines .new")
    # The last change is above the space below it, so n goes back to the first.
    page.js("const list = document.querySelector('.difflines'), space = "
            "document.createElement('div'); space.style.height = '3000px'; "
            "list.append(space); list.scrollTop = 3000")
    page.keys("n")
    page.wait("document.querySelector('.difflines').scrollTop < 2000")
    page.keys("d")
    page.wait("!document.querySelector('.difflines')")


def test_difference_has_the_colours_of_the_output(page, stand_in):
    page.visit(f"run/{stand_in.world.colours}?diff", ".difflines .new .f3")
    assert "warning" in page.js("return [...document.querySelectorAll("
                                "'.difflines .new .f3')].map((one) => "
                                "one.textContent)")


def test_every_control_has_a_name_and_every_view_one_h1(page, stand_in):
    for path in ("jobs", f"run/{stand_in.world.colours}", "day", "search",
                 f"job/{stand_in.world.every_type}/run", "audit", "check/new",
                 "alerts", "hosts", "settings"):
        page.visit(path, "#main h1")
        page.wait("!document.querySelector('.waits')")
        nameless = page.js("""
            return [...document.querySelectorAll(
                "button, a, input, select, textarea, summary")].filter((n) =>
                !n.closest("[hidden]") && !n.hidden && !(n.textContent.trim()
                || n.ariaLabel || n.labels?.length || n.classList.contains(
                    "number"))).map((n) => n.outerHTML.slice(0, 90))""")
        assert nameless == [], path
        assert page.js("return document.querySelectorAll('h1').length") == 1
        assert page.js("""
            const ids = [...document.querySelectorAll("[id]")].map((n) =>
                n.id);
            return ids.length - new Set(ids).size""") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_requires(page, stand_in, scheme):
    page.media(prefers_color_scheme=scheme)
    try:
        job = stand_in.world.runs[stand_in.world.colours]["job"]
        for path, css in (("jobs", ".row"), ("alerts", ".alerts li"), (
                f"run/{stand_in.world.colours}", ".line"), (
                    f"job/{job}", ".failure .lines"), ("day", ".dayrow")):
            page.visit(path, css)
            assert page.js(CONTRAST) == [], path
    finally:
        page.media(prefers_color_scheme="light")


LIGHT = """
function light(c) {
  const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
"""
CONTRAST = LIGHT + """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
function ground(node) {
  for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor);
    if (c.length === 3 || c[3] > 0.9) return c.slice(0, 3);
  }
  return [255, 255, 255];
}
const bad = new Set();
for (const node of document.querySelectorAll("body *")) {
  if (![...node.childNodes].some((n) => n.nodeType === 3
      && n.textContent.trim()) || !node.checkVisibility()
      || node.closest("svg, .away, :disabled, #toast, [style]")) continue;
  const a = light(rgb(getComputedStyle(node).color).slice(0, 3));
  const b = light(ground(node));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) bad.add(`${node.className} ${ratio.toFixed(2)}`);
}
return [...bad];
"""


# What is wider than its place: a page, a table, the text of a button.
WIDE = """return [document.documentElement, ...document.querySelectorAll(
    ".scroll, .btn, #top nav")].filter((node) => node.checkVisibility()
    && node.scrollWidth > node.clientWidth + 1).map((node) =>
    node.outerHTML.slice(0, 90))"""


@pytest.mark.parametrize("width", [320, 390, 820, 900, 1024, 1440, 1920])
def test_no_part_of_a_view_is_wider_than_its_place(page, stand_in, width):
    world, found = stand_in.world, {}
    page.size(width, 800)
    for path in ("jobs", f"run/{world.colours}", "day", "search?q=a",
                 f"job/{world.every_type}/run", "audit", "check/new",
                 "alerts", "hosts", "settings", "job/1",
                 f"check/{next(iter(world.checks))}"):
        page.visit(path, "#main h1")
        page.wait("!document.querySelector('.waits')")
        wide = page.js(WIDE)
        if wide:
            found[path] = wide
    page.size(1280, 900)
    assert found == {}


def test_every_view_and_the_zone_are_reached_on_a_phone(page):
    page.size(390, 800)
    page.press("More", "nav button")
    page.press("Settings", "#menu button")
    page.wait("location.hash === '#/settings'")
    page.press("More", "nav button")
    page.wait("document.querySelector('#menu select').checkVisibility()")
    page.keys("Escape")
    page.size(1280, 900)


# --- output


@pytest.mark.parametrize("written, seen", [
    (r"plain", "plain"),
    (r"a\nb", "a|b"),
    (r"10%\r50%\r100%\n", "100%"),
    (r"100%\r5\n", "500%"),
    (r"100%\r\x1b[K5\n", "5"),
    (r"abc\x1b[1Kd", "   d"),
    (r"abc\x1b[2Kd", "   d"),
    (r"a\r\nb\r\n", "a|b"),
    (r"abc\b\bX", "aXc"),
    (r"\b\b\ba", "a"),
    (r"\x1b[31mred\x1b[0m", "<f1>red</>"),
    (r"\x1b[1;4;9mx", "<bold under strike>x</>"),
    (r"\x1b[1mx\x1b[22my", "<bold>x</>y"),
    (r"\x1b[91;102mx", "<f9 g10>x</>"),
    (r"\x1b[31mx\x1b[39my", "<f1>x</>y"),
    (r"\x1b[7mx", "<fpaper gtext>x</>"),
    (r"\x1b[7;32mx\x1b[27my", "<fpaper g2>x</><f2>y</>"),
    (r"\x1b[38;5;1mx", "<f1>x</>"),
    (r"\x1b[38;5;196mx", "<rgb(255, 0, 0)>x</>"),
    (r"\x1b[38;5;244mx", "<rgb(128, 128, 128)>x</>"),
    (r"\x1b[38;2;1;2;3mx", "<rgb(1, 2, 3)>x</>"),
    (r"\x1b[38:2::1:2:3mx", "<rgb(1, 2, 3)>x</>"),
    (r"\x1b[38:5:9mx", "<f9>x</>"),
    (r"\x1b[38;2;1;2;300mx", "x"),
    (r"\x1b[38;5;999mx", "x"),
    (r"\x1b[38;5mx", "x"),
    (r"\x1b[38;2;9;9;9;1mx", "<bold rgb(9, 9, 9)>x</>"),
    (r"\x1b[mx\x1b[;mx", "xx"),
    (r"\x1b[999;-1;foomx", "oomx"),
    (r"\x1b[?25lx\x1b[2Jy\x1b[10;20Hz", "xyz"),
    (r"\x1b(Bx\x1b)0y\x1b=z", "xyz"),
    (r"\x1b]0;title\x07x", "x"),
    (r"\x1b]0;title\x1b\\x", "x"),
    (r"\x1bPq#0;2\x1b\\x", "x"),
    (r"\x1b]8;;https://a.test/\x1b\\x\x1b]8;;\x1b\\y",
     "<link https://a.test/>x</>y"),
    (r"\x1b]8;id=1;http://a.test/\x07x\x1b]8;;\x07", "<link http://a.test/>"
     "x</>"),
    (r"\x1b]8;;javascript:alert(1)\x1b\\x", "x"),
    (r"\x1b]8;;data:text/html,x\x1b\\x", "x"),
    (r"\x1b]8;;/relative\x1b\\x", "x"),
    (r"a\x07b\x00c\x7fd", "a<control>^G</>b<control>^@</>c<control>^?</>d"),
    (r"a\u202eb\u2066c", "a<control><U+202E></>b<control><U+2066></>c"),
    (r"a\x9bb", "a<control><9b></>b"),
    (r"\x1b", ""),
    (r"x\x1b[31", "x"),
    (r"x\x1b]never ends\ny", "x|y"),
    (r"\ttab", "\ttab"),
    (r"\u{1f603}\rX", "X"),
    (r"<b>&amp;</b>", "<b>&amp;</b>"),
])
def test_output_looks_as_in_a_terminal(page, written, seen):
    assert page.js(AS_SEEN + "return seen(`" + written + "`)") == seen


AS_SEEN = """
function described(node) {
  if (node.nodeType === 3) return node.textContent;
  const words = [...node.classList];
  if (node.href) words.push("link " + node.getAttribute("href"));
  for (const name of ["color", "backgroundColor"]) {
    if (node.style[name]) words.push(node.style[name]);
  }
  return `<${words.join(" ")}>${node.textContent}</>`;
}
function seen(text, cut = 0) {
  const terminal = new Terminal(), bytes = utf8(text);
  for (let at = 0; at < bytes.length; at += cut || bytes.length) {
    terminal.feed(1, 0, bytes.subarray(at, at + (cut || bytes.length)));
  }
  const lines = [...terminal.lines];
  if (terminal.line.cells.length) lines.push(terminal.line);
  return lines.map((line) => {
    const node = document.createElement("span");
    paint(node, line);
    return [...node.childNodes].map(described).join("");
  }).join("|");
}
"""


def test_output_looks_the_same_wherever_it_is_split(page):
    """A character of UTF-8, an escape sequence and a line are cut."""
    assert page.js(AS_SEEN + r"""
        const text = "\x1b[1;31mé\u{1f603}日\x1b[0m\r\nab\b\x1b[Kc\x1b]8;;" +
            "https://a.test/\x1b\\x\x1b]8;;\x07 é\rZ\n\u202ddone";
        const whole = seen(text);
        return [1, 2, 3, 5, 7].map((cut) => seen(text, cut) === whole);
        """) == [True] * 5


def test_hostile_output_takes_linear_time(page):
    before = page.cpu_seconds()
    spans = page.js(AS_SEEN + r"""
        const million = 1e6;
        let spans = 0;
        for (const text of ["\x1b[" + "1;".repeat(million / 2),
            "\x1b]8;;" + "x".repeat(million), "x".repeat(5 * million),
            "\r" + "ab\r".repeat(million / 3), "\b".repeat(million),
            "\x1b[31ma\x1b[32mb".repeat(100000),
            Array.from({length: 30000}, (_, i) => "\x1b[38;2;" + (i >> 8)
                + ";" + (i & 255) + ";1mx").join(""),
            "\x1b[K".repeat(300000), "\x1bP".repeat(500000)]) {
          const terminal = new Terminal();
          terminal.feed(1, 0, utf8(text));
          for (const line of [...terminal.lines, terminal.line]) {
            const node = document.createElement("span");
            paint(node, line);
            spans = Math.max(spans, node.childNodes.length);
          }
        }
        return spans;""")
    took = page.cpu_seconds() - before
    print(f"\nhostile output: {took:.1f} s, at most {spans} spans a line")
    assert took < 8 and spans <= 402


def test_output_shows_stderr_notes_times_and_the_linked_line(page, stand_in):
    page.visit(f"run/{stand_in.world.colours}/L52", ".line.here")
    assert page.text(".line.here .text").startswith("error: ENOSPC")
    assert "has-err" in page.js("return document.querySelector('.line.here')"
                                ".className")
    assert page.js("return document.querySelector('.koi-note').textContent"
                   ) == "koi: 2,048 bytes left out here"
    assert page.js("return document.querySelector('.text a').rel"
                   ) == "noopener noreferrer"
    page.js("[...document.querySelectorAll('.bar button')].find((b) => "
            "b.textContent === 'Times').click()")
    assert page.js("return document.querySelector('.time').dataset.since"
                   ) == "+0.03"
    page.js("for (let i = 0; i < 2; i += 1) [...document.querySelectorAll("
            "'.bar button')].find((b) => b.textContent === 'Times').click()")
    page.type(".bar input", "page-3")
    page.wait("document.querySelector('.found').textContent === '1 of 10'")
    page.js("[...document.querySelectorAll('.bar button')].find((b) => "
            "b.textContent === 'Errors only').click()")
    assert page.js("return [...document.querySelectorAll('.bar button')]"
                   ".find((b) => b.textContent === 'Errors only')"
                   ".ariaPressed") == "true"
    assert page.js("return [...document.querySelectorAll('.line')].filter("
                   "(n) => n.checkVisibility()).length") == 4


def test_run_page_leads_with_the_name_of_the_job_and_its_last_errors(
        page, stand_in):
    page.visit(f"run/{stand_in.world.colours}", ".runhead .lines")
    assert page.text("h1") == "Build the site failed"
    lead = page.text(".lead")
    assert lead.startswith("Failed with exit 3 after 12 s, ")
    assert re.search(r"; usually .+ to .+\. Failing since .+, 1 run; last ok "
                     r".+\.", lead)
    assert page.text(".runhead .lines").split("\n")[-2:] == [
        "error: ENOSPC: no space left on device, write 'dist/index.html'",
        "at writeFile (node:fs:2317:11)"]
    assert page.js("return document.querySelector('.difflines')") is None
    page.press("Diff with last good")
    page.wait("document.querySelector('.difflines .new')")
    page.press("Next change")
    assert page.js("const box = document.querySelector('.difflines')"
                   ".getBoundingClientRect(); return [...document"
                   ".querySelectorAll('.difflines :is(.new, .removed)')]"
                   ".some((line) => { const y = line.getBoundingClientRect()"
                   ".top; return y >= box.top && y < box.bottom; })")
    page.press("Close", ".diff button")


def test_output_is_as_tall_as_its_lines_and_run_by_hand_has_no_due_time(
        page, stand_in):
    world = stand_in.world
    job = next(job for job in world.jobs.values() if job["label"] == "Say Hi"
               and job["last"]["exit"] == 0)
    run = job["last"]
    world.outputs[run["id"]] = page_server.frame(1, 5, "one\ntwo\n")
    args, run["args"] = run["args"], {"Emoji": ""}
    run["due"] = run["requested_at"]
    page.visit(f"run/{run['id']}", ".line")
    assert page.text("h1") == "Say Hi worked"
    assert "Due" not in page.text(".facts")
    assert page.text(".args") == "Emoji\n(empty)"
    assert page.js("return document.querySelector('.pane').clientHeight"
                   ) < 70
    run.update(args=args, due=None)
    del world.outputs[run["id"]]


def test_job_page_leads_with_what_failed(page, stand_in):
    world = stand_in.world
    job = world.jobs[world.runs[world.colours]["job"]]
    page.visit(f"job/{job['id']}", ".failure .lines")
    page.wait("document.querySelector('.failure .lines').textContent"
              ".includes('error: ENOSPC')")
    words = page.text(".failure")
    assert words.startswith("Failed with exit 3 after 12 s, ")
    assert re.search(r"Failing since .+, 1 run; last ok .+\.", words)
    assert page.js("return [...document.querySelectorAll('.failure a, "
                   ".failure button')].map((one) => one.textContent)") == [
        "Output", "Diff with last good", "Snooze\u2026"]
    assert page.js("""
        const [bars, dates, line] = document.querySelectorAll(
            ".charts svg.bars, .charts .dates, .charts .spark");
        return [bars.clientWidth > 300, dates.children.length > 0,
            Boolean(line.querySelector("rect"))]""") == [True, True, True]
    page.wait("document.querySelector('.leads')")
    page.js("document.querySelector('.leads .message').click()")
    page.wait(f"location.hash === '#/run/{world.colours}'")


def test_running_job_shows_the_estimated_time_left(page, stand_in):
    world = stand_in.world
    job = world.jobs[world.runs[world.live]["job"]]
    hour = 3600     # so long that a slow machine makes no difference
    started = time.time() - 20.2 * hour
    runs = [[*run[:1], started, *run[2:]] if run[3] == "r" else run
            for run in job["recent_runs"]]
    for usual, words in (([40 * hour, 41 * hour], "about 20 h left"),
                         ([10 * hour, 30 * hour], "almost"),
                         ([hour, 2 * hour], "longer than usual ("),
                         (None, "")):
        show(page, {**job, "usual": usual, "recent_runs": runs})
        page.visit(f"job/{job['id']}", ".note.s-running")
        assert words in page.text(".note.s-running")
        page.visit("jobs", ".row")
        assert words in page.js(
            "return document.querySelector(\".row:has([href='#/job/"
            f"{job['id']}']) .c-last\").textContent")
    show(page, job)


def test_empty_output_says_that_nothing_was_printed(page, stand_in):
    page.visit(f"run/{stand_in.world.quiet}", ".nothing")
    assert "printed nothing" in page.text(".nothing")


def test_largest_output_is_shown_completely_with_few_elements(page, stand_in):
    lines = 4 * 2**20 // 100
    before = page.cpu_seconds()
    page.visit(f"run/{stand_in.world.big}", ".line")
    page.wait("[...document.querySelectorAll('.line')].pop().textContent"
              f".startsWith('line {lines}: ')")
    took = page.cpu_seconds() - before
    most = page.js("return document.querySelectorAll('*').length")
    print(f"\n4 MiB: {took:.2f} s of the page's thread, {most} elements")
    assert took < 4 and most < 16_000
    page.visit(f"run/{stand_in.world.big}/L32109", ".line.here")
    page.wait("document.querySelector('.line.here .text').textContent"
              ".startsWith('line 32109: ')")
    page.type(".bar input", "part_12345.c")
    page.wait("document.querySelector('.found').textContent === '1 of 1'")
    assert page.text(".line.here .text").startswith("line 12345: ")


def test_a_million_empty_lines_end_with_a_note(page, stand_in):
    world, run = stand_in.world, stand_in.world.quiet
    world.outputs[run] = page_server.frame(1, 0, "\n" * 65_000) * 16
    page.visit(f"run/{run}", ".line")
    page.wait("[...document.querySelectorAll('.line')].length > 400")
    assert page.js("return document.querySelector('.pane').lastChild"
                   ".lastChild.previousSibling.block.lines.pop().cells") == [
        "koi: more lines: download the output"]
    world.outputs[run] = b""


def test_leaving_a_live_output_ends_its_request(page, stand_in):
    page.js("""
        const real = window.fetch;
        window.fetch = (url, options) => {
            if (url.includes("wait=10")) {
                window.signal = options.signal;
                window.fetch = real;
            }
            return real(url, options);
        };""")
    page.visit(f"run/{stand_in.world.live}", ".line")
    page.wait("window.signal")
    page.js("location.hash = '#/hosts'")
    page.wait("window.signal.aborted")


def test_empty_search_says_what_it_searches(page):
    page.visit("search", ".empty")
    assert "what jobs have printed" in page.text(".empty")


def test_search_result_leads_to_its_line(page, stand_in):
    page.visit("search?q=step 3 took", ".matches a")
    assert page.js("return document.querySelectorAll('.matches mark').length"
                   ) >= 5
    page.click(".matches a")
    page.wait("document.querySelector('.line.match.here')")
    assert "step 3 took" in page.text(".line.match.here")


def test_live_run_is_followed_until_it_ends(page, stand_in):
    world, run = stand_in.world, stand_in.world.live
    page.visit(f"run/{run}", ".line")
    page.wait("document.querySelectorAll('.line').length === 40")
    world.outputs[run] += b"".join(page_server.frame(
        1, 5000 + i, f"more {i}\n") for i in range(200))
    page.wait("document.querySelectorAll('.line').length === 240")
    page.wait("(() => { const p = document.querySelector('.pane'); return "
              "p.scrollHeight - p.scrollTop - p.clientHeight < 30; })()")
    page.js("document.querySelector('.pane').scrollTop = 0")
    page.wait("document.querySelector('.bar [title*=end]').ariaPressed "
              "=== 'false'")
    world.outputs[run] += page_server.frame(2, 9000, "half a line")
    world.outputs[run] += page_server.frame(2, 9001, " and its end\n")
    page.wait("!document.querySelector('.newer').hidden")
    assert page.text(".newer") == "\u2193 1 new line"
    page.click(".newer")
    page.wait("[...document.querySelectorAll('.line .text')].pop()"
              ".textContent === 'half a line and its end'")
    job = world.jobs[world.runs[run]["job"]]
    world.runs[run].update(state="done", exit=0, ended=time.time())
    world.push(runs=[world.runs[run]], jobs=[job])
    page.wait("document.querySelector('h1')?.textContent === "
              "'Follow orders worked'")
    page.wait("document.querySelector('.bar [title*=end]').hidden")


# --- forms and signed requests


def test_form_of_every_type_starts_a_run_and_shows_it(page, stand_in):
    world = stand_in.world
    job = world.jobs[world.every_type]
    page.visit(f"job/{world.every_type}/run", ".runform")
    page.click(".runform .primary")
    page.wait("document.activeElement.getAttribute('aria-invalid')")
    assert page.js("return document.activeElement.labels[0].textContent"
                   ) == "To Handle"
    assert page.text("#arg0-error") == "Please fill this in."
    page.type("#arg0", "o'brien <b>")
    page.js("const d = document.querySelector('#arg5'); d.value = "
            "'2026-03-29'; d.dispatchEvent(new Event('input'))")
    page.type("#arg6", "hunter2")
    page.click(".previewed summary")
    assert "--to='o'\\''brien <b>'" in page.text(".previewed pre")
    assert "hunter2" not in page.text(".previewed pre")
    page.click(".previewed summary")
    page.click(".runform .primary")
    page.wait("location.hash.startsWith('#/run/')")
    request = world.last_request
    assert request["args"] == {
        "To Handle": "o'brien <b>", "Message": "Hello,\nhow are you?",
        "Delay": "0", "Emoji \U0001f603": "true", "Tone": "warm",
        "Not before": "2026-03-29"}
    key = bytes.fromhex(page_server.VECTOR["host_key"])
    assert koitab.encrypt_secret(key, request["nonce"], "Token", bytes.fromhex(
        request["secrets"]["Token"])) == b"hunter2"
    assert request["exp"] - request["iat"] == 300_000
    page.wait("document.querySelector('h1')?.textContent === "
              "'Write a message worked'")
    assert "\u2022\u2022" in page.text(".args")
    world.jobs[job["id"]]["state"] = "ok"


def every_type(page, stand_in):
    """Open the form with a field of each type."""
    path = f"job/{stand_in.world.every_type}/run"
    page.visit("jobs", ".row")
    page.visit(path, ".runform")


def test_form_names_missing_fields_and_marks_optional_ones(page, stand_in):
    world = stand_in.world
    world.jobs[world.every_type]["params"][1]["default"] = ""
    every_type(page, stand_in)
    labels = page.js("return [...document.querySelectorAll('.field label')]"
                     ".map((one) => one.textContent)")
    assert labels[1] == "Message (optional)"
    assert [label for label in labels if "optional" in label] == labels[1:2]
    for value, text in (("x", "Please type a whole number, such as 5."),
                        ("", "Please fill this in.")):
        page.js("const d = document.querySelector('#arg2'); d.value = "
                "arguments[0]", value)
        page.click(".runform .primary")
        page.wait("document.querySelector('#arg2-error').textContent "
                  f"=== {json.dumps(text)}")
    assert page.text("#arg5-error") == "Please choose a date."
    assert page.text("#arg6-error") == "Please fill this in."
    assert page.text("#arg1-error") == ""
    world.jobs[world.every_type]["params"][1]["default"] = \
        "Hello,\nhow are you?"


def test_form_keeps_its_values_but_no_secret_while_locked(page, stand_in):
    every_type(page, stand_in)
    page.type("#arg0", "ann")
    page.type("#arg6", "hunter2")
    page.click(".lock")
    page.insert("#secret", PASSWORD)
    page.keys("Enter")
    page.find(".runform")
    assert page.js("return ['#arg0', '#arg6'].map((css) => document"
                   ".querySelector(css).value)") == ["ann", ""]
    every_type(page, stand_in)
    assert page.js("return document.querySelector('#arg0').value") == ""


def test_back_button_on_the_run_skips_the_form(page, stand_in):
    job = next(job for job in stand_in.world.jobs.values() if job["label"] ==
               "Say Hi" and stand_in.world.hosts[job["host"]]["name"] ==
               "web1")
    page.visit("by-hand", ".by-hand")
    page.click(f".by-hand [href='#/job/{job['id']}/run']")
    page.find(".runform")
    assert page.text(".about") == "Sends a greeting to somebody."
    page.type("#arg0", "ann")
    page.keys("Enter")
    page.wait("location.hash.startsWith('#/run/')")
    page.js("history.back()")
    page.wait("location.hash === '#/by-hand'")


def test_request_to_a_host_that_is_down_waits_and_can_be_withdrawn(
        page, stand_in):
    world = stand_in.world
    world.hosts[page_server.VECTOR["host"]]["state"] = "down"
    try:
        page.js("state.hosts.get(arguments[0]).state = 'down'",
                page_server.VECTOR["host"])
        every_type(page, stand_in)
        assert "If it is not back within 5 minutes, the request expires." \
            in page.text(".note.late")
        page.type("#arg0", "ann")
        page.js("document.querySelector('#arg5').value = '2026-03-29'")
        page.type("#arg6", "hunter2")
        page.click(".runform .primary")
        page.find(".waiting button")
        page.visit("jobs", ".row")
        row = page.js("return jobList.rows.get(arguments[0]).root.textContent",
                      f"job:{world.every_type}")
        assert "1 waiting" in row
        page.visit(f"job/{world.every_type}", ".waiting")
        assert page.text(".waiting").startswith("1 run is waiting for web1.")
        page.visit("by-hand", ".by-hand .waiting")
        assert page.text(".waiting").startswith(
            "1 run is waiting for web1. The request expires in ")
        page.click(".waiting button")
        page.wait("!document.querySelector('.waiting')")
        nonce = world.last_request["nonce"]
        assert world.requests[nonce]["state"] == "withdrawn"
    finally:
        world.hosts[page_server.VECTOR["host"]]["state"] = "up"
        page.js("state.hosts.get(arguments[0]).state = 'up'",
                page_server.VECTOR["host"])


def test_view_run_by_hand_lists_the_manual_jobs(page, stand_in):
    page.visit("jobs?state=manual", ".by-hand")
    page.visit("by-hand", ".by-hand")
    shown = page.js("return [...document.querySelectorAll('.by-hand h2 a')]"
                    ".map((a) => a.getAttribute('href'))")
    assert sorted(shown) == sorted(
        f"#/job/{job['id']}" for job in stand_in.world.jobs.values()
        if job["manual"])
    assert "Sends a greeting to somebody." in page.text(".by-hand")
    assert page.text("nav [aria-current]") == "Run by hand"


def test_job_with_confirmation_asks_before_it_runs(page, stand_in):
    job = next(job for job in stand_in.world.jobs.values() if job["label"] ==
               "Restart web" and stand_in.world.hosts[job["host"]]["name"] ==
               "web1")
    page.visit(f"job/{job['id']}/run", ".runform")
    stand_in.world.last_request = None
    page.click(".runform .primary")
    assert page.text(".question span") == \
        "Restart web starts immediately on web1. Run it?"
    assert stand_in.world.last_request is None
    page.click(".question .primary")
    page.wait("location.hash.startsWith('#/run/')")
    assert stand_in.world.last_request["args"] == {"Unit": "nginx"}


def test_host_with_other_keys_gets_no_form(page, stand_in):
    job = next(job for job in stand_in.world.jobs.values() if job["manual"]
               and stand_in.world.hosts[job["host"]]["name"] == "mail")
    page.visit(f"job/{job['id']}/run", ".note.bad")
    assert "not signed with your keys" in page.text(".note.bad")
    assert page.js("return document.querySelector('.runform')") is None


def test_altered_job_list_is_refused(page, stand_in, monkeypatch):
    """The name of one job over the tag of another."""
    honest = stand_in.world.list_of

    def forged(host):
        signed = honest(host)
        return {**signed, "body": signed["body"].replace("Say Hi", "Delete")}
    monkeypatch.setattr(stand_in.world, "list_of", forged)
    page.visit(f"job/{stand_in.world.every_type}/run", ".note.bad")
    assert "not signed with your keys" in page.text(".note.bad")


def test_form_shows_the_label_that_the_host_signed(page, stand_in):
    """The label that the dashboard sends for a job is not trusted."""
    job = stand_in.world.jobs[stand_in.world.every_type]
    page.js("state.jobs.get(arguments[0]).label = 'Harmless'", job["id"])
    page.js("state.jobs.get(arguments[0]).command = 'true'", job["id"])
    page.visit(f"job/{job['id']}/run", ".runform")
    assert page.text("h1") == "Run Write a message"
    assert page.js("return document.querySelector('.previewed pre')"
                   ".textContent").startswith("~/tweet.sh --to=")


def test_refused_request_shows_the_reason(page, stand_in, monkeypatch):
    job = stand_in.world.jobs[stand_in.world.every_type]
    verify = stand_in.world.verify
    monkeypatch.setattr(stand_in.world, "verify", lambda sent: {
        **verify(sent), "refused": "it has expired, 4 s ago"})
    page.visit(f"job/{job['id']}/run", ".runform")
    page.js("const d = document.querySelector('#arg5'); d.value = "
            "'2026-03-29'; d.dispatchEvent(new Event('input'))")
    page.type("#arg0", "ann")
    page.type("#arg6", "hunter2")
    page.click(".runform .primary")
    page.wait("document.querySelector('.status.bad')")
    assert page.text(".status") == "The host refused: it has expired, 4 s ago"


def test_running_job_is_killed_by_a_signed_request(page, stand_in):
    world = stand_in.world
    job = next(iter(world.jobs.values()))
    run = world.add_run(job, time.time() - 5, 0, "running")
    world.outputs[run["id"]] = page_server.frame(1, 5, "begun\n")
    page.visit(f"run/{run['id']}", ".actions .danger")
    page.click(".actions .danger")
    page.wait("document.activeElement.textContent.startsWith('Kill it on ')")
    # The question stays when the run changes.
    page.js("document.querySelector('h1').id = 'before'; app.changed({ runs: "
            "[{ id: arguments[0], bytes: 77 }] })", run["id"])
    page.wait("!document.querySelector('#before')")
    page.click("#menu .danger")
    page.wait("document.querySelector('#toast').textContent === "
              "'The host is stopping it'")
    assert world.last_request["do"] == "kill"
    assert world.last_request["run"] == run["n"]
    run.update(state="done", exit=0, ended=time.time())


# --- checks, alerts, channels


def test_check_is_created_edited_paused_and_deleted(page, stand_in):
    checks = stand_in.world.checks
    page.visit("check/new", "#c-name")
    page.type("#c-name", "Nightly <b>")
    page.click(".runform .primary")
    page.wait("/^#.check.[0-9a-f-]{36}$/.test(location.hash)")
    made = [one for one in checks.values() if one["name"] == "Nightly <b>"]
    assert len(made) == 1 and made[0]["period"] == 86400
    assert page.text(".snippet").startswith(f"{stand_in.url}ping/")
    page.js("location.hash += '/edit'")
    page.js("const k = document.querySelector('#c-kind'); k.value = 'cron'; "
            "k.dispatchEvent(new Event('change'))")
    page.click(".runform .primary")
    page.wait("document.querySelector('.snippet')")
    assert made[0]["kind"] == "cron"
    page.js("[...document.querySelectorAll('.actions button')].find((b) => "
            "b.textContent === 'Pause').click()")
    page.wait("document.querySelector('.facts').textContent"
              ".includes('paused')")
    page.click(".actions .danger")
    page.press("Delete Nightly <b>", "#menu button")
    page.wait("location.hash === '#/jobs'")
    assert made[0]["id"] not in checks


def test_deletion_asks_by_name_and_a_push_does_not_take_the_question_away(
        page, stand_in):
    world = stand_in.world
    host = next(one for one in world.hosts.values() if one["name"] == "db1")
    page.visit("hosts", "table")
    page.js("[...document.querySelectorAll('tr')].find((row) => row.innerText"
            ".includes('db1')).querySelector('.danger').click()")
    question = "Forget db1 and its runs"
    page.wait(f"document.activeElement.textContent === '{question}'")
    page.js("document.querySelector('table').id = 'before'")
    world.push(hosts=[{**host, "seen": world.now}])
    page.wait("!document.querySelector('#before')")
    assert focus_of(page) == question
    page.keys("Escape")
    page.wait("!document.querySelector('#menu:popover-open')")
    assert host["id"] in world.hosts


@pytest.mark.parametrize("path, css", [
    ("by-hand", ".by-hand li:nth-child(4) .btn"),
    ("hosts", "tr:nth-child(3) .btn"),
    ("alerts", ".alerts li:nth-child(3) [aria-haspopup]")])
def test_push_leaves_the_focus_on_the_same_control(page, path, css):
    page.visit(path, css)
    page.js("const node = document.querySelector(arguments[0]); node.focus();"
            " node.id = 'before'", css)
    focus = focus_of(page)
    page.js("app.changed({ all: true })")
    page.wait("!document.querySelector('#before')")
    assert focus_of(page) == focus


def test_push_redraws_one_row_of_the_day_and_keeps_its_focus(page, stand_in):
    world = stand_in.world
    job = next(job for job in world.jobs.values()
               if job["state"] == "ok" and job["next"])
    recent, last = job["recent_runs"], job["last"]
    page.visit("day", f".dayrow [href='#/job/{job['id']}'] + .bars")
    # At the next minute, all rows are drawn for the line that shows the time.
    page.js("""
        const at = Date.now(), place = arguments[0];
        window.realNow = Date.now;
        Date.now = () => at;
        document.querySelector(`[href="${place}"] + .bars`).focus();
        window.redrawn = [];
        window.observer = new MutationObserver((changes) => redrawn.push(
            ...changes.filter(({target}) => target.matches(".dayrow")).map(
                ({target}) => target.firstChild.hash)));
        observer.observe(document.querySelector(".day"),
                         {childList: true, subtree: true});""",
            f"#/job/{job['id']}")
    run = world.add_run(job, time.time() - 30, 5)
    world.push(runs=[run])
    try:
        page.wait("redrawn.length")
        assert page.js("observer.disconnect(); return [...new Set(redrawn)]"
                       ) == [f"#/job/{job['id']}"]
        assert page.js("return document.activeElement.previousSibling.hash"
                       ) == f"#/job/{job['id']}"
    finally:
        page.js("Date.now = realNow")
        del world.runs[run["id"]]
        job.update(recent_runs=recent, last=last)


def test_table_of_the_day_is_made_when_it_is_opened(page):
    page.visit("day", ".dayrow .bars")
    assert page.js("return document.querySelector('.astable table')") is None
    page.click(".astable summary")
    page.wait("document.querySelectorAll('.astable tbody tr').length > 9")


def test_open_menu_closes_when_the_address_changes(page, stand_in):
    page.js("document.querySelector('.why [aria-haspopup]').click()")
    page.wait("document.querySelector('#menu:popover-open')")
    page.visit("hosts", "table")
    page.wait("!document.querySelector('#menu:popover-open')")


def snooze_first(page, line: str) -> str:
    """Snooze the first failing job by a line of the menu; its subject."""
    page.find(".attention .why pre")
    subject = page.js("const box = document.querySelector('.attention .why"
                      ":has(pre) [data-subject]'); box.lastChild.focus(); "
                      "return box.dataset.subject")
    page.keys("Enter")
    page.wait("document.activeElement.closest('#menu')")
    page.press(line, "#menu .btn span")
    page.wait("document.activeElement.textContent === 'Undo'")
    return subject


@pytest.mark.parametrize("line, hour", [
    ("Snooze for an hour", None), ("Snooze until tomorrow", 8)])
def test_snoozed_job_stays_until_the_next_visit_and_can_be_undone(
        page, stand_in, line, hour):
    count = int(page.text("[data-state=bad] b"))
    subject = snooze_first(page, line)
    job = stand_in.world.jobs[int(subject[4:])]
    until = job["snoozed"]
    assert time.localtime(until)[3:5] == (hour, 0) if hour else \
        3500 < until - time.time() < 3700
    assert page.js("return document.activeElement.closest('[data-subject]')"
                   ".dataset.subject") == subject
    row = "document.activeElement.closest('.attention .row').textContent"
    assert "snoozed until " in page.js(f"return {row}")
    page.wait(f"document.querySelector('[data-state=bad] b').textContent === "
              f"'{count - 1}'")
    assert page.text("[data-state=snoozed] b") == "1"
    assert page.js("return document.title").startswith(f"({count - 1}) ")
    page.keys("Enter")
    page.wait("document.activeElement.textContent === 'Snooze\u2026'")
    assert job["snoozed"] == 0
    page.wait(f"document.querySelector('[data-state=bad] b').textContent === "
              f"'{count}'")


def test_alert_names_its_job_once_with_last_line_and_output(page, stand_in):
    world = stand_in.world
    job = world.jobs[world.runs[world.colours]["job"]]
    page.js("""
        const alert = { ...state.alerts.get(arguments[0]),
            text: "Shop/Build the site on web1: exit status 3" };
        const change = { alerts: [alert] };
        applyChange(change);""", f"job:{job['id']}\nfailed")
    page.visit("alerts", ".alerts li")
    item = page.js("return [...document.querySelectorAll('.alerts li')].find("
                   "(one) => one.textContent.includes('Build the site'))"
                   ".innerText")
    assert item.count("Build the site") == 1 and "exit status 3" in item
    assert "no space left on device" in item and "Output" in item


@pytest.mark.parametrize("today, words, until", [
    ("2026-11-25T23:30", "Snooze until Monday", "2026-11-30T08:00"),
    ("2026-11-25T23:30", "Snooze until tomorrow", "2026-11-26T08:00"),
    ("2026-11-29T10:00", "Snooze until tomorrow", "2026-11-30T08:00"),
    ("2026-11-30T00:10", "Snooze until Monday", "2026-12-07T08:00")])
def test_snooze_until_morning_ends_at_8_h_in_the_shown_zone(
        page, today, words, until):
    """On a Sunday, tomorrow is Monday, so that the menu has one of them."""
    chosen = page.js("""
        const [today, words] = arguments, kept = clockOffset, sent = [];
        const realFetch = window.fetch;
        window.fetch = (url, options) => { sent.push(options.body);
            return Promise.reject(new TypeError("stopped here")); };
        clockOffset += localTime(today) - now();
        const job = [...state.jobs.values()][0];
        const items = snoozeItems(job).map((one) => one.textContent);
        $("#menu").showPopover();
        snoozeItems(job).find((one) => one.textContent.startsWith(words))
            .click();
        clockOffset = kept;
        window.fetch = realFetch;
        return [JSON.parse(sent[0]).until, items.length];""", today, words)
    assert chosen[0] == page.js("return localTime(arguments[0])", until)
    page.js("document.querySelector('#toast').className = ''")


def test_tomorrow_is_the_next_date_after_a_day_of_25_hours(page):
    """In the early hours of such a day, 24 hours later is the same date."""
    assert page.js("""
        const kept = clockOffset, host = { zone: "Europe/Berlin" };
        const realShift = Date.prototype.getTimezoneOffset;
        Date.prototype.getTimezoneOffset = function offset() {
            return -hostShift(this / 1000, host) / 60; };
        clockOffset += localTime("2026-10-25T00:10") - now();
        try { return new Date(morning(1) * 1000).toISOString(); }
        finally {
            clockOffset = kept;
            Date.prototype.getTimezoneOffset = realShift;
        }""") == "2026-10-26T07:00:00.000Z"


def test_phone_has_the_actions_of_a_row_in_one_menu(page, stand_in):
    page.size(390, 800)
    page.wait("document.querySelector('.attention .why:has(pre) "
              "[aria-haspopup]')?.textContent === '\u2026'")
    page.js("document.querySelector('.attention .why:has(pre) "
            "[aria-haspopup]').click()")
    lines = page.js("return [...document.querySelectorAll('#menu > .btn "
                    "span:first-child')].map((one) => one.textContent)")
    assert lines[:3] == ["Output", "Diff with last good",
                         "Snooze for an hour"]
    page.press("Output", "#menu .btn span")
    page.wait("location.hash.startsWith('#/run/')")
    page.size(1280, 900)


def test_outdated_state_is_grey_and_shows_its_time(page):
    page.js("stream.lost = Date.now() - 11000; app.showAge()")
    page.wait("/^As of \\d\\d:\\d\\d: /.test(document.querySelector('h1')"
              ".textContent)")
    assert page.js("return document.body.classList.contains('stale')")
    page.js("stream.lost = 0; app.showAge()")
    page.wait("!document.querySelector('h1').textContent.includes('As of')")


def test_job_is_snoozed_until_it_is_well(page, stand_in):
    subject = snooze_first(page, "Snooze until it is well")
    assert stand_in.world.jobs[int(subject[4:])]["snoozed"] \
        == koitab.UNTIL_WELL == page.js("return UNTIL_WELL")
    row = "document.activeElement.closest('.attention .row').textContent"
    assert "snoozed until it is well" in page.js(f"return {row}")
    page.keys("Enter")
    page.wait("document.activeElement.textContent === 'Snooze\u2026'")


def test_snoozed_job_leaves_needs_attention_at_the_next_visit(page, stand_in):
    subject = snooze_first(page, "Snooze for an hour")
    page.visit("hosts", "h1")
    page.visit("jobs", ".row")
    assert page.js("return document.querySelector(`[data-subject='${"
                   "arguments[0]}']`).closest('.attention')", subject) is None
    job = stand_in.world.jobs[int(subject[4:])]
    job["snoozed"] = 0
    stand_in.world.push(jobs=[job])


def test_paused_job_says_so_until_its_pause_ends(page, stand_in):
    job = next(job for job in stand_in.world.jobs.values()
               if job["when"][0] != "@" and not job["removed"])
    row = f"[...document.querySelectorAll('.row')].find((row) => " \
        f"row.querySelector('[href=\"#/job/{job['id']}\"]')).textContent"
    change = "const change = { jobs: [arguments[0]] }; " \
        "applyChange(change); app.changed(change)"
    for paused, said in ((0, True), (time.time() + 60, True),
                         (time.time() - 60, False), (None, False)):
        page.js(change, {**job, "next": None, "paused": paused})
        page.wait(f"{row}.includes(' paused') === {json.dumps(said)}")
    page.js(change, job)


@pytest.mark.parametrize("facts, columns", [
    ({"kind": "cron", "schedule": "5 6 * * 1"}, "5 6 * * 1"),
    ({"period": 900}, "*/15 * * * *"), ({"period": 7200}, "0 */2 * * *"),
    ({"period": 86400}, "30 2 * * *"), ({"period": 604800}, "30 2 * * 0")])
def test_new_check_shows_its_own_schedule_and_waits_for_the_first_ping(
        page, stand_in, facts, columns):
    check = next(one for one in stand_in.world.checks.values()
                 if one["state"] == "new")
    stand_in.world.push(checks=[{**check, "kind": "simple", **facts}])
    page.visit(f"check/{check['id']}", ".snippet")
    page.shows(f"{columns} backup.sh && curl")
    page.shows("waiting for the first ping", css=".facts")


NEW = "New notification\u2026"
SMTP = {"host": "mail.example.org", "port": "2525", "security": "tls",
        "user": "ann", "password": "o'brien \u00e9", "from": "koi@example.org"}


@pytest.fixture
def channels(page, stand_in):
    """The view of alerts, with the channels that the stand-in has at first."""
    world = stand_in.world
    before = [dict(one) for one in world.channels]
    page.visit("jobs", ".row")
    page.visit("alerts", ".channels li")
    yield world.channels
    world.channels[:] = before
    world.delivery_error = ""
    world.may_deliver.set()


def fill_in(page, **values: str) -> None:
    for name, value in values.items():
        page.js("const field = document.querySelector(arguments[0]); "
                "field.value = arguments[1]; field.dispatchEvent(new Event("
                "'change')); field.dispatchEvent(new Event('input'))",
                f"#channel-{name}", value)


@pytest.mark.parametrize("kind, target, options, sent", [
    ("mail", "night@example.org", {"from": "koi@example.org"},
     {"from": "koi@example.org"}),
    ("mail", "plain@example.org", {}, {}),
    ("smtp", "server@example.org", SMTP, {**SMTP, "port": 2525}),
    ("webhook", "https://chat.example.org/x", {
        "headers": "X-Token: a:b\nOther: c", "body": '{"t": "{{text}}"}'},
     {"headers": {"X-Token": "a:b", "Other": "c"},
      "body": '{"t": "{{text}}"}'}),
    ("ntfy", "https://ntfy.sh/topic", {}, {})])
def test_form_adds_a_notification_of_each_kind_and_tests_it(
        page, channels, kind, target, options, sent):
    page.press(NEW)
    fill_in(page, kind=kind)
    fill_in(page, target=target, **options)
    page.press("Save and send a test")
    page.wait("[...document.querySelectorAll('.channels li')].some((line) => "
              f"line.innerText.includes({json.dumps(target)}) && "
              "/Delivered \\d\\d:\\d\\d/.test(line.innerText))")
    made = channels[-1]
    assert (made["kind"], made["target"], made["options"]) == (kind, target,
                                                               sent)
    assert page.js("return document.querySelector('.channels form')") is None


def test_edit_of_a_notification_shows_what_it_has_and_keeps_the_rest(
        page, channels):
    page.js("document.querySelector('[aria-label=\"Edit ops@example.org\"]')"
            ".click()")
    assert page.js("return document.querySelector('#channel-target').value"
                   ) == "ops@example.org"
    fill_in(page, target="new@example.org")
    page.press("Save and send a test")
    page.shows("new@example.org", css=".channels ul")
    assert [(one["id"], one["target"]) for one in channels] == [
        (1, "new@example.org"), (2, "https://ntfy.sh/koi")]


def test_test_says_sending_until_the_result_and_then_shows_it(page, channels,
                                                              stand_in):
    world = stand_in.world
    world.may_deliver.clear()
    world.delivery_error = "sendmail failed: no configuration file"
    page.press(NEW)
    fill_in(page, target="half@typed")
    page.js("document.querySelector('[aria-label=\"Test ops@example.org\"]')"
            ".click()")
    page.wait("document.querySelector('.channels li').innerText.includes("
              "'Sending\u2026')")
    world.may_deliver.set()
    page.wait("document.querySelector('.channels li .error').innerText === "
              "'Not delivered: sendmail failed: no configuration file'")
    # The form that someone fills in meanwhile is not drawn again.
    assert page.js("return document.querySelector('#channel-target').value"
                   ) == "half@typed"


@pytest.mark.parametrize("values, field, error", [
    ({"kind": "smtp", "target": "a@b.c", "host": "no host"}, "host",
     "options: host is not a host name"),
    ({"kind": "mail", "target": "a@b.invalid"}, "target",
     "invalid email address name@example.org")])
def test_error_of_a_notification_is_shown_at_its_field(
        page, channels, values, field, error):
    before = len(channels)
    page.press(NEW)
    for name, value in values.items():
        fill_in(page, **{name: value})
    page.press("Save and send a test")
    page.wait(f"document.activeElement.id === 'channel-{field}'")
    assert page.text(f"#channel-{field}-error") == error
    assert page.js("return document.activeElement.getAttribute("
                   "'aria-invalid')") == "true"
    assert len(channels) == before
    fill_in(page, target="good@example.org", **(
        {"host": "good"} if field == "host" else {}))
    page.press("Save and send a test")
    page.shows("good@example.org", css=".channels ul")
    assert page.faults("status of 400") == []


def test_notification_is_deleted_after_a_question_by_name(page, channels):
    page.js("document.querySelector('.channels .danger').click()")
    page.wait("document.activeElement.innerText === 'Delete ops@example.org'")
    assert len(channels) == 2
    page.keys("Enter")
    page.wait("document.querySelectorAll('.channels li').length === 1")
    assert [one["id"] for one in channels] == [2]


@pytest.mark.parametrize("path, field", [
    ("alerts", "#set-failures"), ("alerts", "#channel-target"),
    ("check/new", "#c-name"), ("settings", "#link-name")])
def test_push_leaves_a_form_and_its_focus_alone(page, stand_in, path, field):
    page.visit("jobs", ".row")
    page.visit(path, ".runform, .oneline")
    if field == "#channel-target":
        page.press(NEW)
    page.find(field)
    page.js("const field = document.querySelector(arguments[0]); "
            "field.focus(); field.value = '7'", field)
    page.js("app.changed({ all: true }); app.update()")
    assert page.js("return [document.activeElement.id, "
                   "document.activeElement.value]") == [field[1:], "7"]


def test_alert_rules_are_saved_or_show_the_error_at_the_field(page, stand_in):
    page.visit("jobs", ".row")
    page.visit("alerts", "#set-down")
    page.js("document.querySelector('#set-failures').value = '3'; "
            "document.querySelector('#set-down').value = '61'")
    page.press("Save")
    page.wait("document.querySelector('#set-down-error').innerText.includes("
              "'is not from 62')")
    page.js("document.querySelector('#set-down').value = '120'")
    page.press("Save")
    page.shows("Saved", css="#toast")
    assert stand_in.world.settings == {"failures": 3, "host_down": 120}
    assert page.text("#set-down-error") == ""
    assert page.faults("status of 400") == []


def test_error_of_a_check_is_shown_at_its_field(page):
    page.visit("check/new", "#c-name")
    page.type("#c-name", "Broken")
    page.js("const k = document.querySelector('#c-kind'); k.value = 'cron'; "
            "k.dispatchEvent(new Event('change')); "
            "document.querySelector('#c-cron').value = '1 2 3'")
    page.click(".runform .primary")
    page.wait("document.activeElement.id === 'c-cron'")
    assert page.text("#c-cron-error") == \
        "a schedule has five columns 30 2 * * *"
    assert page.faults("status of 400") == []


# --- what is empty, and what is hostile


def test_empty_dashboard_shows_the_join_command(browser):
    with page_server.Server(empty=True) as stand_in:
        browser.open(stand_in.url, PASSWORD)
        assert f"koitab -d join {stand_in.url.rstrip('/')}" in browser.text(
            ".empty")


SCRIPTS = [
    "<script>alert(%d)</script>", "<img src=x onerror=alert(%d)>",
    "\"><svg onload=alert(%d)>", "'><iframe srcdoc='<script>alert(%d)'>",
    "</script><script>alert(%d)</script>", "javascript:alert(%d)",
    "</textarea><script>alert(%d)</script>", "</title><b onclick=alert(%d)>",
    "</style><script>alert(%d)</script>", "<!--<script>alert(%d)-->",
    "<a href=javascript:alert(%d)>x</a>", "<math><mi xlink:href=x>%d",
    "<details open ontoggle=alert(%d)>", "<object data=data:text/html,%d>",
    "<base href=//evil.test/%d>", "<link rel=stylesheet href=//evil/%d>",
    "<meta http-equiv=refresh content=0;url=//evil/%d>", "{{7*%d}}",
    "${alert(%d)}", "`;alert(%d);//", "\\';alert(%d);//", "&lt;b&gt;%d",
    "\x1b]8;;javascript:alert(%d)\x07x\x1b]8;;\x07",
    "\x1b[31m<img src=x onerror=alert(%d)>", "\u202e<b>%d</b>",
    "<form action=//evil/%d><button>", "<input autofocus onfocus=alert(%d)>",
    "<video><source onerror=alert(%d)>", "<body onload=alert(%d)>",
    "<svg><script>alert(%d)</script></svg>", "<style>*{display:none}/*%d",
    "<template><script>alert(%d)</script></template>", "%%00<script>%d",
    "<svg><a xlink:href='javascript:alert(%d)'><text>x", "\ufeff<b>%d</b>",
    "<img srcset='x' onerror=alert(%d)>", "x\" onmouseover=alert(%d) y=\"",
    "<isindex action=javascript:alert(%d)>", "<portal src=//evil/%d>",
    "<noscript><p title='</noscript><img src=x onerror=alert(%d)>'>"]
CORPUS = [text % number for number, text in enumerate(SCRIPTS * 5)]


def poisoned(world: page_server.World) -> None:
    """Replaces every text that is shown by one of the corpus, in turn."""
    turn = iter(range(10**6))

    def evil():
        return CORPUS[next(turn) % len(CORPUS)]
    for host in world.hosts.values():
        host.update(name=evil(), zone=evil(), version=evil(),
                    problems=[evil()])
    for job in world.jobs.values():
        job.update(user=evil(), section=evil(), name=evil(), label=evil(),
                   words=evil(), command=evil(), when=job["when"])
        if job["failing"]:
            job["failing"]["line"] = evil()
        for param in job["params"]:
            param.update(name=evil(), default=evil() if param["type"] ==
                         "string" else param["default"])
            param["choices"] = [evil(), evil()] if param["choices"] else []
    for run in world.runs.values():
        run.update(line=evil(), reason=evil(), trigger=evil(),
                   args={evil(): evil()})
    for check in world.checks.values():
        check.update(name=evil(), slug=evil(), tags=evil(), desc=evil(),
                     words=evil(), tz=evil())
    for alert in world.alerts.values():
        alert["text"] = evil()
    for row in world.audit:
        row.update(who=evil(), label=evil(), reason=evil(),
                   args={evil(): evil()})
    for channel in world.channels:
        channel.update(target=evil(), error=evil())
    for run in (world.colours, world.live):
        world.outputs[run] = b"".join(page_server.frame(
            1 + n % 2, n, text + "\n") for n, text in enumerate(CORPUS))


def test_hostile_text_in_any_field_is_shown_as_text(browser):
    assert len(set(CORPUS)) == 200
    with page_server.Server() as stand_in:
        world = stand_in.world
        poisoned(world)
        browser.open(stand_in.url, PASSWORD)
        browser.js("window.alert = (n) => { window.harmed = n || true; }")
        manual = [job["id"] for job in world.jobs.values() if job["manual"]]
        check = next(iter(world.checks))
        for path in ("jobs", "day", "search?q=alert", "audit", "alerts",
                     "hosts", "settings", f"check/{check}",
                     f"check/{check}/edit", f"job/{manual[0]}",
                     f"job/{world.every_type}/run",
                     f"run/{world.colours}", f"run/{world.live}",
                     f"run/{world.colours}?diff"):
            browser.visit(path, "#main h1")
            browser.wait("!document.querySelector('.waits')")
            browser.wait("document.querySelector('#main').textContent"
                         ".length > 20")
            assert browser.js(FOREIGN) == [], path
        stand_in.world.push(jobs=list(world.jobs.values()))
        browser.wait("state.seq > 1")
        assert browser.js("return window.harmed") is None
        assert browser.faults() == []


FOREIGN = """
const odd = "script img iframe object embed base link meta math video "
  + "source style template noscript portal form[action] [srcdoc] [style*=':'"
  + "]:not(#tip):not(.block):not(.pane)";
const found = [...document.querySelectorAll("#top *, #main *")].filter((n) =>
  n.matches(odd.split(" ").join(",")) || [...n.attributes].some((a) =>
    a.name.startsWith("on") || /^\\s*javascript:/i.test(a.value)
      && a.name !== "title" && a.name !== "value"
      && a.name !== "placeholder" && a.name !== "aria-label"));
return found.map((n) => n.outerHTML.slice(0, 120));
"""


def test_policy_blocks_markup_scripts_and_foreign_requests(page):
    assert page.js("""
        try { document.body.innerHTML = "<b>x</b>"; return "made"; }
        catch (error) { return error.name; }""") == "TypeError"
    assert page.js("""
        const s = document.createElement("script");
        s.append("window.harmed = 1");
        try { document.body.append(s); } catch { }
        return window.harmed || 0;""") == 0
    assert page.js("return fetch('http://127.0.0.1:9/').then(() => 'sent', "
                   "() => 'kept')") == "kept"
    assert len(page.faults()) >= 2     # each was reported

"""The page for everyone: axe-core finds nothing in any view, and a phone's
fingers find each button."""

from __future__ import annotations

import pytest

import fetch_axe
import page_server
import support

PASSWORD = page_server.PASSWORD
RUN = """
    const {violations} = await axe.run(document,
        {resultTypes: ["violations"], rules: {
            "label-content-name-mismatch": {enabled: true},
            "target-size": {enabled: !document.querySelector(
                "#menu:popover-open")}}});
    return violations.map(({id, impact, nodes}) => `${id} (${impact}) ${
        nodes.length}: ${nodes[0].html.slice(0, 200)}`);"""


@pytest.fixture(scope="module")
def stand_in():
    with page_server.Server(recent_runs=20) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def page(browser, stand_in):
    """Logged in, with axe loaded; once for all tests here."""
    if not fetch_axe.SCRIPT.exists():
        support.absent("axe-core is missing: make parts")
    browser.open(stand_in.url, PASSWORD)
    browser.find(".row")
    browser.js(fetch_axe.SCRIPT.read_text() + "\nwindow.axe = axe;")
    return browser


def views(world) -> list[tuple]:
    """Return each view's path, and what shows that it is there."""
    failed = next(job for job in world.jobs.values() if job["failing"])
    check = next(iter(world.checks))
    return [
        ("jobs", ".row"), ("jobs?state=bad", ".row"), ("by-hand", ".by-hand"),
        (f"job/{failed['id']}", ".list"),
        (f"job/{world.every_type}/run", ".runform"),
        (f"run/{world.colours}", ".line"),
        (f"run/{failed['last']['id']}?diff", ".difflines"),
        ("day", ".dayrow"), ("search", "#main h1"),
        ("search?q=done", ".matches"), ("audit", "table"),
        (f"check/{check}", ".snippet"), ("check/new", ".runform"),
        ("alerts", ".alerts"), ("hosts", "table"), ("settings", ".snippet"),
        ("nowhere", "#main h1")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_reports_no_violation_in_any_view(page, stand_in, scheme, width):
    page.size(width, 900)
    page.media(prefers_color_scheme=scheme)
    found = {}
    try:
        for path, css in views(stand_in.world):
            page.visit(path, css)
            page.wait("!document.querySelector('.waits')")
            violations = page.js(RUN)
            if violations:
                found[path] = violations
    finally:
        page.media(prefers_color_scheme="light")
        page.size(1280, 900)
    assert found == {}


SMALL = """
    return [...document.querySelectorAll("button, select, .btn, summary, "
        + "nav a, input, textarea")].filter((node) => {
      if (!node.checkVisibility()) return false;
      const box = (node.type === "checkbox" ? node.closest(".check") : node)
        .getBoundingClientRect();
      return box.height < 39.5 || box.width < 24
        || node.matches("input, select, textarea")
        && node.type !== "checkbox"
        && parseFloat(getComputedStyle(node).fontSize) < 16;
    }).map((node) => node.outerHTML.slice(0, 120));"""


def test_phone_has_large_targets_and_large_text_in_fields(page, stand_in):
    page.size(390, 844)
    found = {}
    try:
        for path, css in views(stand_in.world):
            page.visit(path, css)
            small = page.js(SMALL)
            if small:
                found[path] = small
    finally:
        page.size(1280, 900)
    assert found == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path, script, css", [
    ("jobs", "document.querySelector('.why [aria-haspopup]').click()",
     "#menu:popover-open"),
    ("jobs", "showShortcuts()", "dialog[open]"),
    ("alerts", "document.querySelector('.channels > div > .btn').click()",
     ".channels form"),
    ("alerts", "document.querySelector('.channels .danger').click()",
     "#menu:popover-open"),
    ("check/new", "document.querySelector('details').open = true",
     "#c-slug"), ("day", "document.querySelector('details').open = true",
                  ".astable table")])
def test_axe_reports_no_violation_in_what_opens(page, stand_in, scheme, path,
                                                script, css):
    page.media(prefers_color_scheme=scheme)
    page.visit("nowhere", "#main h1")
    page.visit(path, dict(views(stand_in.world))[path])
    try:
        page.wait(f"(() => {{ try {{ {script}; return true; }}"
                  " catch { return false; } })()")
        page.find(css)
        assert page.js(RUN) == []
    finally:
        page.js("document.querySelector('dialog').close(); "
                "document.querySelector('#menu').hidePopover()")
        page.media(prefers_color_scheme="light")


# Borders of fields and buttons against what is around them (WCAG 1.4.11).
EDGES = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045
  ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, at) =>
  sum + v * [0.2126, 0.7152, 0.0722][at], 0);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor);
    if (c.length === 3 || c[3] > 0.9) return light(c);
  }
};
return [...document.querySelectorAll(".btn, select, textarea, input:not("
  + "[type=checkbox])")].filter((node) => node.checkVisibility()
  && !node.matches(".quiet, .primary, .zone select")).filter((node) => {
  const a = light(rgb(getComputedStyle(node).borderTopColor));
  const b = ground(node.parentElement);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 3;
}).map((node) => node.outerHTML.slice(0, 120));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_borders_of_fields_and_buttons_have_a_contrast_of_3(page, stand_in,
                                                            scheme):
    page.media(prefers_color_scheme=scheme)
    found = {}
    for path, css in views(stand_in.world):
        page.visit(path, css)
        if faint := page.js(EDGES):
            found[path] = faint
    page.media(prefers_color_scheme="light")
    assert found == {}


def test_axe_reports_no_violation_on_the_login_page(page, stand_in):
    page.click(".lock")
    page.find("#secret")
    assert page.js(RUN) == []
    stand_in.world.is_founded = False
    try:
        page.js("logInView()")
        page.find(".login .snippet")
        assert page.js(RUN) == []
    finally:
        stand_in.world.is_founded = True
        page.find("#secret")
        page.faults()       # the browser's own words of the 404

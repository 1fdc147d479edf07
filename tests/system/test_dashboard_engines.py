"""The page in the engines of all browsers, against a real dashboard and koid:
Chromium, Firefox and WebKit each log in, fill in a form, and show the output
of the run while it runs."""

from __future__ import annotations

import json
import os
import shlex

import pytest

import support
from dashboard_rig import WATCH, PageDriver
from engines import Firefox, WebKit

GREETING = "o'brien says \U0001f41f \u65e5\u672c"
SCRIPT = """\
import os, sys
print("begun", flush=True)
with open(os.environ["GO"]) as go:
    go.read()
print("Hello " + sys.argv[1], flush=True)
"""


@pytest.fixture(scope="module")
def web1_tab(server):
    folder = server.folder / "web1"
    folder.mkdir()
    (folder / "greet.py").write_text(SCRIPT)
    os.mkfifo(folder / "go")
    python = shlex.join([support.SHARED_PYTHON, "-IS"])
    return (f"GO={folder}/go\n"
            f'"Greet" @manual {python} {folder}/greet.py {{{{Who}}}}\n')


@pytest.fixture(params=[PageDriver, Firefox, WebKit],
                ids=["chromium", "firefox", "webkit"])
def engine(request):
    with request.param() as engine:
        yield engine


def shows(engine, css: str, text: str) -> None:
    """Wait until an element shows a text."""
    engine.wait(f"document.querySelector({json.dumps(css)})?.textContent"
                f".includes({json.dumps(text)})")


def test_engine_logs_in_runs_a_form_and_shows_live_output(
        server, web1_host, operator, engine):
    engine.go(f"{server.url}/#{operator.dash}")
    engine.wait("document.activeElement.id === 'secret'")
    engine.js(WATCH)
    engine.insert("#secret", operator.password)
    engine.keys("Enter")
    engine.click("a[aria-label='Run Greet']")
    engine.wait("document.activeElement.id === 'arg0'")
    engine.insert("#arg0", GREETING)
    engine.click(".runform .primary")
    engine.wait("location.hash.startsWith('#/run/')")
    shows(engine, ".pane", "begun")
    shows(engine, "#main", "Running for")
    assert "Hello" not in engine.text(".pane")
    with open(web1_host.folder / "go", "w") as go:
        go.write("on")
    shows(engine, ".pane", f"Hello {GREETING}")
    shows(engine, "h1", "worked")
    assert operator.runs("Greet")[0]["args"] == {"Who": GREETING}
    assert engine.js("return watch.faults") == []

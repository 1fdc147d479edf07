"""Browsers for tests: Chromium, Firefox and WebKit by the W3C WebDriver
protocol, with the standard library alone.

Everything stays on loopback: the page, the driver (on a free port of its
own) and what the browser would ask for by itself (switched off by flags).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import support

support.PARTS.update(chromium="chromium", chromedriver="chromium-driver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # W3C's name for one
FLAGS = [
    "--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--no-default-browser-check", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--disable-extensions", "--disable-domain-reliability", "--no-pings",
    "--disable-default-apps", "--metrics-recording-only",
    "--host-resolver-rules=MAP koi.test 127.0.0.1 , MAP * ~NOTFOUND"
    " , EXCLUDE 127.0.0.1 , EXCLUDE localhost"]
# https://www.w3.org/TR/webdriver2/#keyboard-actions
KEYS = {"Enter": "\ue007", "Tab": "\ue004", "Escape": "\ue00c",
        "Left": "\ue012", "Up": "\ue013", "Right": "\ue014",
        "Down": "\ue015", "Home": "\ue011", "End": "\ue010",
        "PageUp": "\ue00e", "PageDown": "\ue00f", "Shift": "\ue008",
        "Backspace": "\ue003", "Space": " "}


class BrowserError(Exception):
    """What the driver says went wrong."""


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


class WebDriver:
    """One window of a browser, driven by the W3C WebDriver protocol. Each
    engine has a subclass; `with Browser() as browser: browser.go(url)`."""

    def __init__(self):
        self.home = tempfile.mkdtemp(prefix="browser-")
        self.session, self.processes = None, []
        self.log = open(os.path.join(self.home, "driver.log"), "wb")

    def start(self, command: list, env=(), **options) -> subprocess.Popen:
        """Start a process in a home and a process group of its own, which
        end with this browser."""
        environment = {**os.environ, "HOME": self.home, "TMPDIR": self.home,
                       "XDG_RUNTIME_DIR": self.home,
                       "DBUS_SESSION_BUS_ADDRESS": "disabled:", **dict(env)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log,
            stderr=self.log, env=environment, start_new_session=True,
            **options)
        self.processes.append(process)
        return process

    def start_driver(self, program: str, env=()) -> None:
        """Start a driver that speaks HTTP, and wait until it answers."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}))
        self.start([support.find(program), f"--port={port}"], env)
        support.wait_until(self.ready, 30, program)

    def new_session(self, capabilities: dict) -> None:
        self.session = self.call("POST", "/session", {
            "capabilities": {"alwaysMatch": capabilities}},
            root=True)["sessionId"]

    def ready(self) -> bool:
        try:
            return self.call("GET", "/status", root=True)["ready"]
        except OSError:
            return False

    def call(self, method, path, body=None, root=False):
        url = self.base + ("" if root else f"/session/{self.session}") + path
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            url, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self.opener.open(request, timeout=120) as reply:
                return json.loads(reply.read())["value"]
        except urllib.error.HTTPError as error:
            value = json.loads(error.read())["value"]
            raise BrowserError(f"{value['error']}: "
                               f"{value['message'][:400]}") from None

    def go(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def find(self, css: str, seconds: float = 30) -> str:
        """The first element that fits, as soon as it is there."""
        end = time.monotonic() + seconds
        while True:
            try:
                return self.call("POST", "/element", {
                    "using": "css selector", "value": css})[ELEMENT]
            except BrowserError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.03)

    def with_element(self, css: str, method: str, what: str, body=None):
        """Do something with the first element that fits. The page may
        replace an element between the two calls: then find the new one. And
        WebKit cannot click on what it has not drawn yet."""
        end = time.monotonic() + 30
        while True:
            try:
                return self.call(method, f"/element/{self.find(css)}/{what}",
                                 body)
            except BrowserError as error:
                if not str(error).startswith((
                        "stale element reference", "element not interactable")
                        ) or time.monotonic() > end:
                    raise
            time.sleep(0.03)

    def click(self, css: str) -> None:
        """A real click: the element must be seen and not covered."""
        self.with_element(css, "POST", "click")

    def type(self, css: str, text: str) -> None:
        self.with_element(css, "POST", "value", {"text": text})

    def insert(self, css: str, text: str) -> None:
        """Put text in the place of what is in a field: all of Unicode, of
        which WebKit's driver types only the Basic Multilingual Plane."""
        self.click(css)
        self.js("document.activeElement.select(); document.execCommand("
                "'insertText', false, arguments[0])", text)

    def text(self, css: str) -> str:
        return self.with_element(css, "GET", "text")

    def keys(self, *names: str) -> None:
        """Press keys where the focus is: "j", "Enter", "Shift+Tab"."""
        actions = []
        for name in names:
            parts = name.split("+") if len(name) > 1 else [name]
            codes = [KEYS.get(part, part) for part in parts]
            actions += [{"type": "keyDown", "value": code} for code in codes]
            actions += [{"type": "keyUp", "value": code}
                        for code in reversed(codes)]
        self.call("POST", "/actions", {"actions": [
            {"type": "key", "id": "keys", "actions": actions}]})

    def js(self, script: str, *values):
        """The value of a script; one that is a promise is waited for."""
        return self.call("POST", "/execute/sync",
                         {"script": script, "args": list(values)})

    def wait(self, question: str, seconds: float = 30):
        """Until a JavaScript expression is true; its value."""
        end = time.monotonic() + seconds
        while True:
            value = self.js(f"return {question}")
            if value:
                return value
            if time.monotonic() > end:
                raise BrowserError(f"never true: {question}")
            time.sleep(0.03)

    def shot(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("GET", "/screenshot")))

    def close(self) -> None:
        try:
            if self.session:
                self.call("DELETE", "")
        except (OSError, BrowserError):
            pass
        self.session = None
        for process in reversed(self.processes):
            end_group(process)
        self.log.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_why):
        self.close()


class Browser(WebDriver):
    """Chromium, with what its own protocol can do besides."""

    def __init__(self, size=(1280, 900), flags=(), dark=False, scale=1):
        support.need("chromium", "chromedriver")
        super().__init__()
        try:
            self.start_driver("chromedriver")
            self.begin(size, [*flags, f"--force-device-scale-factor={scale}",
                              *(["--force-dark-mode"] if dark else [])])
        except BaseException:
            self.close()
            raise

    def begin(self, size, flags):
        flags = [*FLAGS, *flags, f"--user-data-dir={self.home}/profile"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")    # it will not start as root else
        self.new_session({
            "browserName": "chrome", "goog:chromeOptions": {
                "binary": support.find("chromium"), "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"}})
        self.size(*size)

    def console(self) -> list[str]:
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry
                in self.call("POST", "/se/log", {"type": "browser"})]

    def size(self, width: int, height: int) -> None:
        """The size of the page's viewport."""
        self.command("Emulation.setDeviceMetricsOverride", width=width,
                     height=height, deviceScaleFactor=1, mobile=width < 600)

    def media(self, **features: str) -> None:
        """Such as prefers_color_scheme="dark"."""
        self.command("Emulation.setEmulatedMedia", features=[
            {"name": name.replace("_", "-"), "value": value}
            for name, value in features.items()])

    def command(self, name: str, **values):
        return self.call("POST", "/goog/cdp/execute",
                         {"cmd": name, "params": values})

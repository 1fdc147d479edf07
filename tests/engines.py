"""Firefox and WebKit for tests, as browser.py has Chromium.

Each has its own home and profile, and no session bus, so that it can
run as any user and shares nothing with a desktop.
"""

from __future__ import annotations

import glob
import json
import os
import socket
from pathlib import Path

import servers
import support
from browser import BrowserError, WebDriver

support.PARTS.update({"firefox-esr": "firefox-esr",
                      "WebKitWebDriver": "webkit2gtk-driver"})
# WebKitGTK's own browser. It is in no directory of PATH.
MINI_BROWSER = "/usr/lib/*/webkit2gtk-4.*/MiniBrowser"
# Firefox asks Mozilla for many things. A proxy that is not there answers for
# all but loopback.
PREFERENCES = {
    "marionette.port": 0, "network.proxy.type": 1,
    "network.proxy.http": "127.0.0.1", "network.proxy.http_port": 9,
    "network.proxy.ssl": "127.0.0.1", "network.proxy.ssl_port": 9,
    "datareporting.policy.dataSubmissionEnabled": False,
    "toolkit.telemetry.enabled": False, "app.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False}
# What a path of WebDriver is in Marionette, Firefox's protocol:
# https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html
COMMANDS = {
    "session": "NewSession", "": "DeleteSession", "url": "Navigate",
    "element": "FindElement", "click": "ElementClick",
    "value": "ElementSendKeys", "text": "GetElementText",
    "sync": "ExecuteScript", "actions": "PerformActions",
    "screenshot": "TakeScreenshot"}


class Firefox(WebDriver):
    """Firefox, spoken to by Marionette: Debian has no geckodriver."""

    sock = None

    def __init__(self):
        support.need("firefox-esr")
        super().__init__()
        profile = Path(self.home, "profile")
        profile.mkdir()
        (profile / "user.js").write_text("".join(
            f"user_pref({json.dumps(name)}, {json.dumps(value)});\n"
            for name, value in PREFERENCES.items()))
        try:
            process = self.start(
                [support.find("firefox-esr"), "--marionette", "--headless",
                 "--no-remote", "--profile", str(profile)],
                {"MOZ_CRASHREPORTER_DISABLE": "1"})
            self.connect(process, profile / "MarionetteActivePort")
            self.new_session({})
        except BaseException:
            self.close()
            raise

    def connect(self, process, port: Path) -> None:
        """Connect to the port that Firefox writes into its profile."""
        def written() -> str:
            assert process.poll() is None, Path(self.log.name).read_text()
            return port.read_text() if port.exists() else ""
        self.sock = socket.create_connection(
            ("127.0.0.1", int(support.wait_until(written, 60, "Firefox"))),
            120)
        self.replies = self.sock.makefile("rb")
        self.read_message()         # it says which protocol it speaks

    def read_message(self):
        """Read a JSON text after its length and a colon."""
        size = b""
        while not size.endswith(b":"):
            one = self.replies.read(1)
            if not one:
                raise BrowserError("Firefox has ended")
            size += one
        return json.loads(self.replies.read(int(size[:-1])))

    def call(self, method, path, body=None, root=False):
        _, *element, name = path.split("/") if path else ("", "")
        values = dict(body or {})
        if element[:1] == ["element"]:
            values["id"] = element[1]
        message = json.dumps([0, 1, f"WebDriver:{COMMANDS[name]}", values])
        self.sock.sendall(f"{len(message)}:{message}".encode("ascii"))
        _, _, error, result = self.read_message()
        if error:
            raise BrowserError(f"{error['error']}: {error['message'][:400]}")
        return result.get("value", result)

    def close(self) -> None:
        super().close()
        if self.sock:
            self.replies.close()
            self.sock.close()
            self.sock = None


class WebKit(WebDriver):
    """WebKitGTK's small browser, on its own X server."""

    def __init__(self):
        support.need("WebKitWebDriver", "Xvfb")
        found = glob.glob(MINI_BROWSER)
        if not found:
            support.absent("MiniBrowser is missing: apt-get install "
                           "webkit2gtk-driver (make parts)")
        super().__init__()
        try:
            self.start_driver("WebKitWebDriver", {
                **{f"XDG_{name}_HOME": os.path.join(self.home, name)
                   for name in ("CONFIG", "DATA", "CACHE", "STATE")},
                "DISPLAY": servers.start_display(self.start),
                "NO_AT_BRIDGE": "1"})
            self.new_session({"webkitgtk:browserOptions": {
                "binary": found[0], "args": ["--automation"]}})
        except BaseException:
            self.close()
            raise

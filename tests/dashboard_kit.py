"""A dashboard and the koids that belong to it, all of them real processes;
an operator who signs as the page does; and the page in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import support
from browser import Browser
from dashboard import Client, Dashboard, Reply

koitab = support.load("koitab")
# All of them are this one machine: a name for each is put in.
NAMED = "k.Machine.host = lambda self: {name!r}"
# A clock that goes right, but for being set wrong.
SHIFTED = """
now = k.Clock.now
k.Clock.now = lambda self: now(self) + {shift}
"""


class Home(support.Koi):
    """A koid, and what is typed on its machine."""

    def __init__(self, folder: Path, name: str, shift: float = 0):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        self.name, self.shift = name, shift

    def command(self, *args: str) -> list[str]:
        patch = SHIFTED.format(shift=self.shift) if self.shift else ""
        return [*support.program("koitab", self.python, patch), *args]

    def type(self, *args: str, said: str = "", seconds: float = 60
             ) -> support.Result:
        """Type a koitab command; `said` is its standard input."""
        patch = NAMED.format(name=self.name) + SHIFTED.format(
            shift=self.shift)
        done = subprocess.run(
            [*support.program("koitab", self.python, patch), *args],
            env=self.env, input=said.encode(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, timeout=seconds, cwd=str(self.folder))
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def install(self, text: str) -> None:
        done = self.type("-", said=text)
        assert done.code == 0, done

    def child(self) -> int:
        """The process that holds the link; 0 while there is none."""
        pid = self.daemon.pid
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                children = file.read().split()
            for child in children:
                # A supervisor of a job is no session of its own at once; the
                # link has the only socket to the dashboard.
                with open(f"/proc/{child}/cmdline") as file:
                    if "daemon" in file.read():
                        return int(child)
        return 0

    def seconds(self) -> float:
        """Processor time of koid and its link, so far."""
        ticks = 0
        for pid in filter(None, (self.daemon.pid, self.child())):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/stat") as file:
                    parts = file.read().rpartition(")")[2].split()
                ticks += int(parts[11]) + int(parts[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class Operator:
    """Who has the passphrase: asks, and signs as the page does."""

    def __init__(self, house: "House", dash: str, password: str):
        self.house, self.dash, self.password = house, dash, password
        salted = house.dashboard.ask(
            "GET", f"/api/v1/salt?dash={dash}").json
        self.keys = koitab.derive(password, bytes.fromhex(salted["salt"]),
                                  salted["rounds"])
        self.token, self.viewer = self.keys.api.hex(), self.keys.view.hex()

    def reply(self, method: str, path: str, body=None, token: str = ""
              ) -> Reply:
        return self.house.dashboard.ask(method, "/api/v1/" + path, body,
                                        token or self.token)

    def ask(self, path: str):
        reply = self.reply("GET", path)
        assert reply.status == 200, (path, reply)
        return reply.json

    def tell(self, path: str, body: dict):
        reply = self.reply("POST", path, body)
        assert reply.status < 300, (path, reply)
        return reply.json

    def host(self, name: str) -> str:
        return next(host["id"] for host in self.ask("state")["hosts"]
                    if host["name"] == name)

    def job(self, name: str, host: str = "") -> dict | None:
        return next((job for job in self.ask("state")["jobs"]
                     if name in (job["name"], job["label"])
                     and host in ("", job["host"])), None)

    def runs(self, name: str) -> list[dict]:
        job = self.job(name)
        return self.ask(f"jobs/{job['id']}/runs?limit=100")["runs"] \
            if job else []

    def key(self, host: str) -> bytes:
        return koitab.host_key(self.keys.run, host)

    def specs(self, host: str) -> dict[str, str]:
        """Name -> spec text, of the list that the host signed."""
        def listed():
            reply = self.reply("GET", f"hosts/{host}/list")
            return reply.json if reply.status == 200 else None
        found = koitab.verified_specs(support.wait_until(
            listed, 20, "a signed list"), self.key(host), self.dash, host)
        return {json.loads(text)["name"]: text for text in found}

    def request(self, host: str, spec: str, args: dict | None = None,
                secrets: dict | None = None, **changes) -> dict:
        """The fields of a request, as the page fills them in."""
        job, now, key = json.loads(spec), int(time.time() * 1000), \
            self.key(host)
        nonce = changes.get("nonce") or os.urandom(16).hex()
        return {"v": 1, "do": "run", "key": koitab.key_id(key),
                "dash": self.dash, "host": host, "user": job["user"],
                "tag": job["tag"], "job": koitab.digest_of(spec),
                "args": args or {}, "secrets": {
                    name: koitab.veiled(key, nonce, name, value.encode()
                                        ).hex()
                    for name, value in (secrets or {}).items()},
                "nonce": nonce, "iat": now, "exp": now + 300_000, **changes}

    def sealed(self, host: str, body: dict, key: bytes = b"") -> dict:
        text = json.dumps(body, ensure_ascii=False)
        return {"host": host, "body": text,
                "mac": koitab.run_mac(key or self.key(host), text)}

    def verdict(self, nonce: str, seconds: float = 20) -> dict:
        """What became of a request: with the run, if there is one."""
        def settled():
            state = self.ask(f"requests/{nonce}")
            return state if state["state"] != "waiting" and (
                state["state"] != "accepted" or state["run"]) else None
        return support.wait_until(settled, seconds, f"a verdict on {nonce}")

    def text(self, run: int) -> str:
        return self.reply("GET", f"runs/{run}/raw").body.decode()


class House:
    """A dashboard that can be killed and started again at its port."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.options = Path(folder), options
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dashboards: list[Dashboard] = []
        self.homes: dict[str, Home] = {}
        self.port = 0
        self.open()

    @property
    def dashboard(self) -> Dashboard:
        return self.dashboards[-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def db(self) -> Path:
        return self.folder / "dashboard.db"

    def open(self) -> None:
        where = ("--listen", f"127.0.0.1:{self.port}") if self.port else ()
        self.dashboards.append(Dashboard(self.folder, *where, *self.options))
        self.port = self.dashboard.__enter__().port

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.dashboard.stop(number)

    def home(self, name: str, tab: str = "", shift: float = 0) -> Home:
        """A koid that runs."""
        home = self.homes[name] = Home(self.folder / name, name, shift)
        if tab:
            home.install(tab)
        home.start()
        return home

    def new(self, home: Home) -> Operator:
        """`koitab -d new`: what it says, and who can read it."""
        done = home.type("-d", "new", self.url)
        assert done.code == 0, done
        self.said = done.out
        dash = re.search(r"^dashboard +\S+/#([0-9a-f]{16})$", done.out, re.M)
        password = re.search(r"^passphrase +(\S+)$", done.out, re.M)
        return Operator(self, dash[1], password[1])

    def join(self, home: Home, operator: Operator) -> None:
        done = home.type("-d", "join", f"{self.url}/#{operator.dash}",
                         said=operator.password + "\n")
        assert done.code == 0, done

    def client(self) -> Client:
        return self.dashboard.client()

    def rows(self, question: str, *values) -> list[tuple]:
        """What stands in the database, without the dashboard's help."""
        db = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=30)
        try:
            return db.execute(question, values).fetchall()
        finally:
            db.close()

    def log(self) -> str:
        return "".join(one.log() for one in self.dashboards)

    def close(self) -> None:
        for home in self.homes.values():
            home.stop(signal.SIGKILL)
            home.end_jobs()
        for one in self.dashboards:
            one.stop(signal.SIGKILL)

    def __enter__(self) -> "House":
        return self

    def __exit__(self, *_why) -> None:
        self.close()


ADVICE = "[DOM] Password forms should"   # that there be a name, too

# What the page must not do is noted in each document before its own script.
WATCH = """
window.watch = {faults: [], pwned: 0};
window.pwned = () => { watch.pwned += 1; };
window.alert = window.confirm = window.prompt = window.pwned;
document.addEventListener("securitypolicyviolation", (event) =>
  watch.faults.push(`CSP ${event.violatedDirective}: ${event.blockedURI} ${
    event.sample}`));
addEventListener("error", (event) => watch.faults.push(event.message));
addEventListener("unhandledrejection", (event) =>
  watch.faults.push(`not caught: ${event.reason}`));
"""


class Page(Browser):
    """koi's page, and whether it behaves."""

    def begin(self, size, flags):
        super().begin(size, flags)
        self.command("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    kept: list[str] = []

    def go(self, url: str) -> None:
        """A fresh document; what the one before did wrong is not lost."""
        self.kept = self.faults()
        super().go("about:blank")
        super().go(url)

    def open(self, url: str, secret: str, path: str = "jobs") -> None:
        """A fresh document; log in."""
        self.go(url)
        self.insert("#secret", secret)
        self.keys("Enter")
        self.wait("document.body.classList.contains('open')", 30)
        if path != "jobs":
            self.to(path)

    def to(self, path: str) -> None:
        """Go to a place of the page."""
        self.js("location.hash = arguments[0]", f"#/{path}")
        self.wait(f"shell.path === {json.dumps(path.split('?')[0])}")

    def insert(self, css: str, text: str) -> None:
        """Put text in the place of what is in a field, as an input method
        does: all of Unicode."""
        self.click(css)
        self.js("document.activeElement.select()")
        self.command("Input.insertText", text=text)

    def shows(self, text: str, seconds: float = 10, css: str = "body") -> None:
        """Wait until a text is to be seen."""
        self.wait(f"document.querySelector({json.dumps(css)})?.innerText"
                  f".includes({json.dumps(text)})", seconds)

    def press(self, words: str, css: str = "button, a") -> None:
        """Click on what bears these words."""
        self.wait(f"[...document.querySelectorAll({json.dumps(css)})].some("
                  f"(one) => one.checkVisibility() && one.innerText.trim() "
                  f"=== {json.dumps(words)})")
        element = self.js(
            f"return [...document.querySelectorAll({json.dumps(css)})].find("
            "(one) => one.checkVisibility() && one.innerText.trim() === "
            "arguments[0])", words)
        self.call("POST", f"/element/{next(iter(element.values()))}/click")

    def faults(self, *expected: str) -> list[str]:
        """What went wrong since the last time; what is expected left out."""
        found = self.js("return window.watch ? watch.faults.splice(0).concat("
                        "watch.pwned ? ['PWNED ' + watch.pwned] : []) : []")
        found, self.kept = [*self.kept, *found, *self.console()], []
        return [text for text in found
                if not any(part in text for part in (ADVICE, *expected))]

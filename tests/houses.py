"""A dashboard without a network, under a clock that the test sets."""

from __future__ import annotations

import base64
import json

import support

koitab = support.load("koitab")

NOW = 1_800_000_000.0       # a Friday in 2027
OPERATOR, VIEWER = "a" * 64, "b" * 64
HOST = "c" * 32


class FakeClock(koitab.Clock):
    def __init__(self, now: float = NOW):
        self.time = now

    def now(self) -> float:
        return self.time

    def ticks(self) -> float:
        return self.time


def frames(text: str, stream: int = 1) -> bytes:
    """The text as a job would write it, a frame a line."""
    return b"".join(koitab.frame(stream, number, line.encode())
                    for number, line in enumerate(text.splitlines(True)))


def spec(tag: str = "backup", **fields) -> str:
    return json.dumps({
        "user": "root", "tag": tag, "section": "Night", "name": tag.title(),
        "label": tag.title(), "when": "0 3 * * *", "words": "At 03:00",
        "command": f"do {tag}", "params": [], "confirm": "no", **fields})


class House:
    """A hub that is driven by hand, with a dashboard in it."""

    def __init__(self, path, clock=None, fresh: bool = True,
                 durable: bool = False):
        self.path = str(path)
        self.clock = clock or FakeClock()
        self.hub = koitab.Hub(self.path, self.clock)
        self.hub.open()
        if not durable:         # a test has no power cut
            self.hub.db.execute("pragma synchronous=off")
        self.lines: list[dict] = []
        self.hub.heard = lambda dash, changes: self.lines.append(changes)
        self.change = self.number = 0
        self.dash = ""
        if fresh:
            self.dash = self.do(self.hub.create_dashboard, {
                "salt": "0" * 32, "rounds": 600_000,
                "api_sha256": koitab.digest_of(OPERATOR),
                "view_sha256": koitab.digest_of(VIEWER)}, NOW)["dash"]
        else:
            self.dash = next(iter(self.hub.numbers), "")

    # --- deeds and questions

    def do(self, deed, *values):
        """Carry out a deed: its result, or what it raises."""
        found = []
        self.hub.write(deed, *values, then=lambda *told: found.extend(told))
        self.hub.turn()
        result, error = found
        if error:
            raise error
        return result

    def ask(self, question, *values):
        return self.hub.read(question, *values)

    def rest(self) -> None:
        """Do all that waits, and all chores that are due."""
        for _ in range(10_000):
            busy = self.hub.turn()
            if self.hub.broken or not busy and all(
                    when > self.now for when, _, _ in self.hub.chores):
                return
        raise AssertionError("the hub never rests")

    def after(self, seconds: float) -> None:
        """Let time pass, and look."""
        self.clock.time += seconds
        for chore in self.hub.chores:       # they are tested by themselves
            chore[0] = max(chore[0], self.clock.time + 1)
        self.hub.turn()

    def again(self):
        """The same database, opened by the next dashboard."""
        self.hub.close()
        house = House(self.path, self.clock, fresh=False)
        house.change, house.number = self.change, self.number
        return house

    @property
    def state(self) -> dict:
        return self.ask(self.hub.state, self.hub.key_of(OPERATOR),
                        self.clock.now())

    @property
    def now(self) -> float:
        return self.clock.now()

    def rows(self, statement: str, *values) -> list:
        return self.hub.db.execute(statement, values).fetchall()

    # --- hosts

    def join(self, host: str = HOST, name: str = "web1"):
        """Add a host; what its token is good for."""
        token = koitab.digest_of("token of " + host)
        self.do(self.hub.add_host, self.dash, {
            "host": host, "name": name,
            "token_sha256": koitab.digest_of(token)}, self.now)
        return self.hub.key_of(token)

    def sync(self, access, **fields) -> dict:
        return self.do(self.hub.sync, access, {
            "v": 1, "host": access.host, "epoch": 1,
            "instance": "1000-abcdef01", "wait": 0, "now": self.now,
            "offset": 3600, "zone": "Europe/Berlin", "version": "1.0",
            "boot": "x", "troubles": [], **fields}, self.now)

    def list_of(self, access, *specs: str) -> dict:
        return {"mac": "e" * 64, "body": json.dumps({
            "v": 1, "dash": self.dash, "host": access.host,
            "key": "0" * 16, "name": "web1", "at": 1,
            "jobs": list(specs)})}

    def record(self, state: str = "done", **fields) -> dict:
        """The record of a run; a new one, unless `run` is given."""
        self.change += 1
        if "run" not in fields:
            self.number += 1
        done = state == "done"
        return {
            "run": self.number, "change": self.change, "user": "root",
            "tag": "backup", "section": "Night", "name": "Backup",
            "label": "Backup", "trigger": "schedule", "state": state,
            "due": self.now - 10, "asked": None,
            "started": self.now - 10 if state not in (
                "missed", "skipped", "queued") else None,
            "ended": self.now if done else None,
            "exit": 0 if done else None, "signal": None, "reason": "",
            "args": {}, "attempt": 1, "count": 1, "bytes": 0, "cut": False,
            "size": 0, "next": None, "nonce": "", **fields}

    def runs(self, access, *records: dict, **fields) -> dict:
        return self.sync(access, records=list(records), **fields)

    def job(self, tag: str = "backup") -> dict:
        return next(job for job in self.state["jobs"] if job["tag"] == tag)

    # --- pings and what is told

    def ping(self, key: str, slug=None, action: str = "success",
             **call) -> tuple:
        return self.do(self.hub.ping, key, slug, action, {
            "scheme": "https", "method": "GET", "ua": "curl", "ip": "::1",
            "rid": None, "create": False, "body": b"", **call}, self.now)

    def channel(self, kind: str = "mail", target: str = "ops@example.org"):
        return self.do(self.hub.change_channel, self.dash,
                       {"kind": kind, "target": target}, self.now)["id"]

    def told(self) -> list[str]:
        """The titles of what was decided to be told; taken away."""
        found = [title for title, in self.rows(
            "select title from letters order by id")]
        self.hub.db.execute("delete from letters")
        return found


def piece(run: int, at: int, data: bytes, **fields) -> dict:
    return {"run": run, "at": at, "data": base64.b64encode(data).decode(),
            **fields}

"""A simulated dashboard that can send false replies. It keeps what a koid
sends, and a test chooses the replies. (test_dashboard_whole.py tests the real
dashboard with a real koid.)"""

from __future__ import annotations

import base64
import http.server
import json
import os
import select
import threading
import time

import support

koitab = support.load("koitab")

DASH, HOST, TOKEN = "d0" * 8, "a1" * 16, "7e" * 32
RUN_KEY = bytes(range(32))
KEY = koitab.host_key(RUN_KEY, HOST)


class Dashboard(http.server.ThreadingHTTPServer):
    """Speaks the sync protocol. `twist(request, answer)` may return
    (status, headers, bytes) instead of the honest answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, twist=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.turn = threading.Condition()
        self.acked, self.records, self.outputs = 0, {}, {}
        self.payloads: list[dict] = []       # all that came
        self.order: list[int] = []          # changes, as they came
        self.lists: list[dict] = []
        self.requests: list[dict] = []      # to be handed out
        self.results: list[dict] = []
        self.followed: dict[str, int] = {}
        self.live: dict[str, bytearray] = {}
        self.twist = twist
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,),
                                       daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, _request, _address) -> None:
        """A child that was killed: of no interest."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def take(self, payload: dict) -> None:
        self.payloads.append(payload)
        for record in payload.get("records", ()):
            self.order.append(record["change"])
            self.records[record["run"]] = record
            self.acked = max(self.acked, record["change"])
        for piece in payload.get("outputs", ()):
            have = self.outputs.setdefault(piece["run"], bytearray())
            if piece.get("deleted"):
                self.records[piece["run"]]["size"] = len(have)
            elif piece["at"] == len(have):
                have += base64.b64decode(piece["data"])
        for piece in payload.get("live", ()):
            name = str(piece["run"])
            if piece.get("reset"):
                self.live[name] = bytearray()
            self.live[name] += base64.b64decode(piece["data"])
            self.followed[name] = len(self.live[name])
        if "list" in payload:
            self.lists.append(payload["list"])
        self.results += payload.get("results", ())

    def answer(self, payload: dict, connection, told: set) -> dict:
        """The honest one; held while there is nothing to say that was not
        `told` on this connection, and nothing is handed to who has gone."""
        def gone() -> bool:
            return bool(select.select([connection], [], [], 0)[0])

        until = time.monotonic() + payload["wait"]
        with self.turn:
            self.take(payload)
            self.turn.notify_all()
            while not self.requests and set(self.followed) == told \
                    and time.monotonic() < until and not gone():
                self.turn.wait(min(0.1, max(0, until - time.monotonic())))
            requests = []
            if not gone():
                requests, self.requests = self.requests, []
            told.clear()
            told.update(self.followed)
        return {"v": 3, "acked": self.acked, "want_list": not self.lists,
                "missing_output": [
                    [run, len(self.outputs.get(run, b""))]
                    for run, record in self.records.items()
                    if record["state"] == "done"
                    and len(self.outputs.get(run, b"")) < record["size"]],
                "live": dict(self.followed), "requests": requests}

    # --- for tests

    def wait_for(self, question, seconds: float = 20, what: str = "it"):
        """The answer, once it is true."""
        with self.turn:
            deadline = time.monotonic() + seconds
            while not question():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"waited {seconds} s for {what}; "
                                         f"results {self.results}")
                self.turn.wait(min(left, 0.5))
            return question()

    def ask(self, body: str, mac: str | None = None) -> None:
        """Hand a request to the host."""
        with self.turn:
            self.requests.append({"body": body, "mac": koitab.run_mac(
                KEY, body) if mac is None else mac})
            self.turn.notify_all()

    def result(self, nonce: str) -> dict:
        return self.wait_for(lambda: next((
            result for result in self.results
            if result["nonce"] == nonce), None), what=f"result {nonce}")

    def specs(self) -> dict[str, str]:
        """Name -> spec text, of the newest list."""
        listed = self.wait_for(lambda: self.lists and self.lists[-1])
        return {json.loads(text)["name"]: text
                for text in json.loads(listed["body"])["jobs"]}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.told: set[str] = set()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        payload, said = json.loads(data), None
        if self.server.twist:
            said = self.server.twist(payload, self)
        if said is None:
            said = 200, {}, json.dumps(self.server.answer(
                payload, self.connection, self.told)).encode()
        if said == "hang up":
            self.close_connection = True
            return
        status, headers, body = said
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args) -> None:
        pass


def enrollment(url: str, **changes):
    fields = {"url": url, "dash": DASH, "host": HOST, "token": TOKEN,
              "key": KEY.hex(), "name": "web1", "since": time.time(),
              "plain_http": True}
    return koitab.Enrollment(**{**fields, **changes})


def join_dashboard(koi: support.Koi, url: str, **changes) -> None:
    """Give a koid's home the keys of a dashboard."""
    path = koi.home / "keys"
    path.write_text(enrollment(url, **changes).to_json())
    path.chmod(0o600)


def request_for(spec: str, args: dict | None = None,
                secrets: dict | None = None, **changes) -> dict:
    """A request as the page makes it: the fields."""
    job, now = json.loads(spec), int(time.time() * 1000)
    nonce = changes.get("nonce") or os.urandom(16).hex()
    body = {"v": 1, "do": "run", "key": koitab.key_id(KEY), "dash": DASH,
            "host": HOST, "user": job["user"], "tag": job["tag"],
            "job": koitab.sha256_hex(spec), "args": args or {},
            "secrets": {name: koitab.encrypt_secret(KEY, nonce, name,
                                                    value.encode()
                                                    ).hex()
                        for name, value in (secrets or {}).items()},
            "nonce": nonce, "iat": now, "exp": now + 300_000}
    return {**body, **changes}


def text_of(body: dict) -> str:
    return json.dumps(body, ensure_ascii=False)

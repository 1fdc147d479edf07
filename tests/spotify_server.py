"""Spotify's Web API, as far as mission uses it, on a loopback port.

    with Spotify() as spotify:
        spotify.add("37i9dQ", "Road trip", tracks=3)
        spotify.script("/v1/me/playlists", status(429, retry_after=1), None)
        ... env=spotify.env() ...
        spotify.asked("/v1/me/playlists")       # the requests that came

A script is a list of answers for the requests whose path begins so, one
answer each, in order; None is the right answer, and after the last one all
answers are right (or `then=` is given for ever).
"""

from __future__ import annotations

import base64
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

CLIENT = ("a-client-id", "a-client-secret")
LARGEST = {"playlists": 50, "tracks": 100}      # items a page, as Spotify's


@dataclass
class Asked:
    """One request, and when it came (monotonic)."""

    method: str
    path: str
    query: dict
    headers: dict
    at: float = field(default_factory=time.monotonic)

    @property
    def bearer(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass
class Answer:
    """What goes over the wire: `body` may promise more than it holds."""

    code: int
    body: bytes
    headers: dict = field(default_factory=dict)
    promise: int = 0            # bytes announced and never sent


def as_json(code: int, value, **headers) -> Answer:
    return Answer(code, json.dumps(value).encode(),
                  {"Content-Type": "application/json", **headers})


# ---- scripted answers: each takes the right answer and returns another ----

AT_ONCE = {"Retry-After": "0"}      # so that no test waits for a server


def status(code: int, retry_after=None, location: str | None = None):
    headers = dict(AT_ONCE)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if location is not None:
        headers["Location"] = location
    error = {"error": {"status": code, "message": f"scripted {code}"}}
    return lambda server, right: as_json(code, error, **headers)


def edit(**keys):
    """The right page with some of its keys replaced."""
    def edited(server, right):
        answer = right()
        if answer.code == 200:
            answer.body = json.dumps(
                {**json.loads(answer.body), **keys}).encode()
        return answer
    return edited


def text(body: str, code: int = 200):
    return lambda server, right: Answer(code, body.encode(), dict(AT_ONCE))


def half(server, right):
    """Half of the JSON, with a length that fits: nothing looks broken."""
    answer = right()
    return Answer(200, answer.body[:len(answer.body) // 2],
                  {**answer.headers, **AT_ONCE})


def cut(server, right):
    """The connection ends half-way."""
    answer = half(server, right)
    answer.promise = len(answer.body)
    return answer


def revoked(server, right):
    """Make the access token invalid before it expires."""
    server.tokens.clear()
    return right()


def held(server, right):
    """No answer until the server closes."""
    server.closing.wait(60)
    return right()


class Spotify:
    """One account. Change its attributes between runs."""

    def __init__(self, largest: int | None = None):
        self.playlists, self.tracks = [], {}
        self.largest = largest          # a page's largest size, if not real
        self.refresh_token, self.tokens = "refresh-0", set()
        self.rotate = False             # a new refresh token each time
        self.expires_in = 3600
        self.requests, self.scripts = [], []
        self.on_request = lambda asked: None
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.given = 0

    def __enter__(self) -> "Spotify":
        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.spotify = self
        self.thread = threading.Thread(target=self.http.serve_forever,
                                       kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    # ---- the account --------------------------------------------------

    def add(self, ident: str, name, tracks: int = 1) -> dict:
        playlist = {"id": ident, "name": name, "type": "playlist",
                    "owner": {"id": "alice"}, "public": False,
                    "tracks": {"total": tracks}}
        self.playlists.append(playlist)
        self.tracks[ident] = [
            {"added_at": "2026-01-01T00:00:00Z",
             "track": {"id": f"{ident}-{n}", "name": f"Åria № {n}"}}
            for n in range(tracks)]
        return playlist

    def remove(self, ident: str) -> None:
        self.playlists = [playlist for playlist in self.playlists
                          if playlist["id"] != ident]

    def token(self) -> str:
        """An access token that is good from now on."""
        self.given += 1
        self.tokens.add(f"access-{self.given}")
        return f"access-{self.given}"

    def env(self) -> dict[str, str]:
        return {"SPOTIFY_API_URL": f"{self.url}/v1",
                "SPOTIFY_ACCOUNTS_URL": self.url}

    # ---- what the test scripts, and what came ----------------------------

    def script(self, path: str, *answers, then=None) -> None:
        self.scripts.append((path, list(answers), then))

    def asked(self, path: str = "/") -> list[Asked]:
        return [asked for asked in self.requests
                if asked.path.startswith(path)]

    def scripted(self, path: str):
        for start, answers, then in self.scripts:
            if path.startswith(start):
                return answers.pop(0) if answers else then
        return None

    # ---- the right answers -----------------------------------------------

    def answer(self, asked: Asked, body: bytes) -> Answer:
        with self.lock:
            self.requests.append(asked)
            wrong = self.scripted(asked.path)
        self.on_request(asked)

        def right():
            return self.right(asked, body)
        return wrong(self, right) if wrong else right()

    def right(self, asked: Asked, body: bytes) -> Answer:
        if (asked.method, asked.path) == ("POST", "/api/token"):
            return self.right_token(asked, body)
        if asked.bearer not in self.tokens:
            return status(401)(self, None)
        part = [unquote(part) for part in asked.path.split("/")[1:]]
        if asked.method == "GET" and part == ["v1", "me", "playlists"]:
            return self.page("playlists", asked, self.playlists)
        if (asked.method == "GET" and len(part) == 4
                and part[:2] == ["v1", "playlists"] and part[3] == "tracks"
                and part[2] in self.tracks):
            return self.page("tracks", asked, self.tracks[part[2]])
        return status(404)(self, None)

    def right_token(self, asked: Asked, body: bytes) -> Answer:
        form = {key: values[0] for key, values in
                parse_qs(body.decode()).items()}
        basic = base64.b64encode(":".join(CLIENT).encode()).decode()
        if asked.headers.get("authorization") != f"Basic {basic}":
            return as_json(400, {"error": "invalid_client",
                                 "error_description": "Invalid client"})
        if form != {"grant_type": "refresh_token",
                    "refresh_token": self.refresh_token}:
            return as_json(400, {"error": "invalid_grant",
                                 "error_description": "Invalid token"})
        with self.lock:
            token = {"access_token": self.token(), "token_type": "Bearer",
                     "expires_in": self.expires_in, "scope": ""}
            if self.rotate:
                self.refresh_token = f"refresh-{self.given}"
                token["refresh_token"] = self.refresh_token
        return as_json(200, token)

    def page(self, kind: str, asked: Asked, items: list) -> Answer:
        limit = int(asked.query.get("limit", 20))
        if not 1 <= limit <= LARGEST[kind]:
            return status(400)(self, None)      # "Invalid limit"
        limit = min(limit, self.largest or limit)
        offset = int(asked.query.get("offset", 0))

        def url(at):
            return f"{self.url}{asked.path}?offset={at}&limit={limit}"
        more, before = offset + limit < len(items), max(0, offset - limit)
        return as_json(200, {
            "href": url(offset), "items": items[offset:offset + limit],
            "limit": limit, "next": url(offset + limit) if more else None,
            "offset": offset, "previous": url(before) if offset else None,
            "total": len(items)})


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A client that was stopped half-way is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        answer = self.server.spotify.answer(
            Asked(self.command, url.path, query, headers), body)
        self.send_response(answer.code)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length",
                         str(len(answer.body) + answer.promise))
        self.end_headers()
        self.wfile.write(answer.body)
        self.close_connection = bool(answer.promise)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass

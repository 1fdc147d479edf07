"""Real parts that tests start: a mail server, a ping endpoint, a desk with
notifications, a `pass` store. Loopback only; everything ends with its test."""

from __future__ import annotations

import base64
import email
import email.policy
import http.server
import json
import os
import select
import shutil
import socket
import socketserver
import ssl
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import support

# A gpg key takes about a second, so stores share one for the whole session.
KEY_NAME = "mission test <test@example.com>"
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL,
         "stderr": subprocess.DEVNULL}


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate: its own CA."""

    cert: str
    key: str

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


def certificate(folder, names: str = "IP:127.0.0.1,DNS:localhost",
                expired: bool = False) -> Certificate:
    support.need("openssl")
    folder = Path(tempfile.mkdtemp(prefix="cert-", dir=folder))
    folder.chmod(0o755)
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=mission test", "-addext", f"subjectAltName={names}",
         "-keyout", key, "-out", cert], check=True, **QUIET)
    if expired:
        # From 3.4 on openssl has -not_after, and later no negative -days.
        again = ["openssl", "x509", "-in", cert, "-signkey", key,
                 "-out", cert]
        done = subprocess.run(
            [*again, "-not_before", "20200101000000Z",
             "-not_after", "20200201000000Z"], **QUIET)
        if done.returncode:
            subprocess.run([*again, "-days", "-1"], check=True, **QUIET)
    os.chmod(cert, 0o644)
    return Certificate(cert, key)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that goes away is what many tests are about."""


class Service:
    """A server in threads, from `with` to its end."""

    handler: type
    server = None

    def __init__(self, port: int = 0):
        self.wanted_port, self.port = port, port
        self.changed = threading.Condition()
        self.stopped = threading.Event()

    def __enter__(self):
        self.server = Server(("127.0.0.1", self.wanted_port), self.handler)
        self.server.service = self
        self.port = self.server.server_address[1]
        self.stopped.clear()
        threading.Thread(target=self.server.serve_forever, args=(0.01,),
                         daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def free_port() -> int:
    """A port where nothing listens."""
    with Server(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        return server.server_address[1]


# ==========================================================================
# Mail: a server that keeps what it is sent
# ==========================================================================

@dataclass
class ReceivedMail:
    """One message as it came over the wire, dots unstuffed."""

    sender: str
    recipients: list
    data: bytes
    login: tuple | None
    secure: bool
    message: email.message.EmailMessage = field(init=False)

    def __post_init__(self):
        self.message = email.message_from_bytes(
            self.data, policy=email.policy.default)

    def __getitem__(self, name: str) -> str:
        return str(self.message[name])

    @property
    def subject(self) -> str:
        return self["Subject"]

    @property
    def text(self) -> str:
        """The body, with the line ends of Unix."""
        return self.message.get_content().replace("\r\n", "\n")


class MailHandler(socketserver.StreamRequestHandler):
    """One SMTP session."""

    def say(self, text: str) -> None:
        self.wfile.write((text + "\r\n").encode())

    def hear(self) -> str:
        return self.rfile.readline().decode("utf-8", "replace").strip()

    def secure_now(self) -> None:
        self.connection = self.sink.certificate.context().wrap_socket(
            self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)
        self.secure = True

    def handle(self) -> None:
        self.sink, self.login, self.secure = self.server.service, None, False
        self.sink.sessions += 1
        if self.sink.silent:
            self.sink.stopped.wait()
            return
        if self.sink.security == "tls":
            self.secure_now()
        self.say("220 sink ESMTP")
        self.sender, self.recipients = None, []
        while self.command(self.rfile.readline().decode("utf-8", "replace")):
            pass

    def command(self, line: str) -> bool:
        """Answer one command; whether the session continues."""
        verb, _, rest = line.strip().partition(" ")
        verb = verb.upper()
        self.sink.commands.append(line.strip())
        if verb in self.sink.answers:
            answer = self.sink.answers[verb]
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            self.say(answer)
        elif verb == "EHLO":
            offers = ["sink", "8BITMIME", "SIZE 104857600", "SMTPUTF8"]
            if self.sink.security == "starttls" and not self.secure:
                offers.append("STARTTLS")
            if self.sink.account:
                offers.append("AUTH PLAIN LOGIN")
            for offer in offers[:-1]:
                self.say("250-" + offer)
            self.say("250 " + offers[-1])
        elif verb == "STARTTLS" and self.sink.security == "starttls":
            self.say("220 go on")
            self.secure_now()
        elif verb == "AUTH":
            self.authenticate(rest)
        elif verb == "MAIL" and self.sink.account and not self.login:
            self.say("530 log in first")
        elif verb == "MAIL":
            self.sender, self.recipients = rest[5:].split()[0], []
            self.say("250 ok")
        elif rest in self.sink.refused:
            self.say(self.sink.refused[rest])
        elif verb == "RCPT":
            self.recipients.append(rest[3:].strip().strip("<>"))
            self.say("250 ok")
        elif verb == "DATA":
            self.keep()
        elif verb in ("HELO", "RSET", "NOOP"):
            self.say("250 ok")
        elif verb == "QUIT":
            self.say("221 bye")
            return False
        else:
            self.say("502 not here")
        return bool(line)

    def authenticate(self, rest: str) -> None:
        def asked(prompt: str) -> str:
            self.say("334 " + prompt)
            return base64.b64decode(self.hear()).decode()

        kind, _, first = rest.partition(" ")
        if kind.upper() == "LOGIN":
            name = base64.b64decode(first).decode() if first \
                else asked("VXNlcm5hbWU6")
            login = (name, asked("UGFzc3dvcmQ6"))
        else:
            plain = base64.b64decode(first).decode() if first else asked("")
            login = tuple(plain.split("\0")[1:])
        self.sink.logins.append((login, self.secure))
        if login == self.sink.account:
            self.login = login
            self.say("235 welcome")
        else:
            self.say("535 5.7.8 no such user and password")

    def keep(self) -> None:
        self.say("354 go on")
        lines, line = [], self.rfile.readline()
        while line and line != b".\r\n":
            lines.append(line)
            line = self.rfile.readline()
        if not line:
            return          # cut off before the dot: not a message
        with self.sink.changed:
            self.sink.wires.append(b"".join(lines))
            self.sink.mails.append(ReceivedMail(
                self.sender, self.recipients,
                b"".join(x[1:] if x.startswith(b".") else x for x in lines),
                self.login, self.secure))
            self.sink.changed.notify_all()
        self.say("250 kept")


class Sink(Service):
    """An SMTP server: plain, with STARTTLS, or with TLS from the start.

    `answers` are given instead of the usual ones ({"RCPT": "451 later"}), a
    list of them one after another and the last for ever; `refuse` one
    recipient; `account` must log in; `silent` accepts and never says a word.
    """

    handler = MailHandler

    def __init__(self, security: str = "none", certificate=None,
                 account: tuple | None = None, port: int = 0):
        super().__init__(port)
        self.security, self.certificate = security, certificate
        self.account, self.silent, self.answers = account, False, {}
        self.refused: dict[str, str] = {}       # "TO:<a@b>" -> reply
        self.mails, self.wires = [], []
        self.commands, self.logins, self.sessions = [], [], 0

    def refuse(self, address: str, reply: str) -> None:
        """Answer RCPT for this address with `reply`."""
        self.refused[f"TO:<{address}>"] = reply

    def wait(self, count: int, seconds: float = 10) -> list[ReceivedMail]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.mails) >= count, seconds)
        return self.mails

    def subjects(self) -> list[str]:
        return [mail.subject for mail in self.mails]


# ==========================================================================
# Pings: an endpoint with given answers, which records its requests
# ==========================================================================

@dataclass(frozen=True)
class Request:
    method: str
    path: str               # without the query, as it came
    query: dict             # name -> last value
    body: bytes
    headers: dict           # lower case
    at: float
    target: str             # as the request line has it

    @property
    def text(self) -> str:
        return self.body.decode()


@dataclass(frozen=True)
class Redirect:
    target: str
    status: int = 302


class PingHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def request_of(self, body: bytes) -> Request:
        parts = urlsplit(self.path)
        return Request(
            self.command, parts.path,
            {k: v[-1] for k, v in
             parse_qs(parts.query, keep_blank_values=True).items()}, body,
            {k.lower(): v for k, v in self.headers.items()},
            time.monotonic(), self.path)

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        answer = self.server.service.note(self.request_of(
            self.rfile.read(size)))
        if isinstance(answer, Redirect):
            self.reply(answer.status, b"", Location=answer.target)
        elif isinstance(answer, int):
            self.reply(answer, b"OK" if answer == 200 else b"no")
        elif isinstance(answer, bytes):
            self.reply(200, answer)
        else:
            getattr(self, answer.replace(" ", "_"))()

    do_POST = do_HEAD = do_PUT = do_GET

    def reply(self, status: int, body: bytes, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # Answers with a name, for requests that must not be trusted.

    def trickle(self, data: bytes) -> None:
        for place in range(len(data)):
            self.wfile.write(data[place:place + 1])
            if self.server.service.stopped.wait(0.3):
                return

    def drip_body(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "200")
        self.end_headers()
        self.trickle(b"x" * 200)

    def drip_head(self) -> None:
        self.trickle(b"HTTP/1.0 200 OK\r\n" + b"X-Slow: x\r\n" * 20)

    def hang(self) -> None:
        self.server.service.stopped.wait()

    def close(self) -> None:
        self.close_connection = True

    def huge_body(self) -> None:
        """Send a gigabyte, to a client that reads all of it."""
        self.send_response(200)
        self.end_headers()
        for _ in range(1024):
            self.wfile.write(b"x" * 1024 * 1024)
            self.server.service.megabytes += 1

    def huge_head(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Big: " + b"x" * 10_000_000)

    def garbage(self) -> None:
        self.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")


class Web(Service):
    """An HTTP(S) endpoint. `answers` are used up one a request, the last
    for ever: a status, bytes (200 with this body), a Redirect, or the name
    of a fault ("drip body", "hang", ...)."""

    handler = PingHandler

    def __init__(self, *answers, certificate=None, port: int = 0):
        super().__init__(port)
        self.answers, self.certificate = list(answers or [200]), certificate
        self.requests, self.megabytes = [], 0

    def __enter__(self):
        super().__enter__()
        if self.certificate:
            # The handshake is made in the thread that serves the request.
            self.server.socket = self.certificate.context().wrap_socket(
                self.server.socket, server_side=True,
                do_handshake_on_connect=False)
        return self

    @property
    def url(self) -> str:
        kind = "https" if self.certificate else "http"
        return f"{kind}://127.0.0.1:{self.port}/check"

    def note(self, request: Request):
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
            return self.answers.pop(0) if len(self.answers) > 1 \
                else self.answers[0]

    def asked(self) -> list[str]:
        """What was asked, in short: ["GET /check/start", "GET /check"]."""
        return [f"{r.method} {r.path}" for r in self.requests]


class ProxyHandler(PingHandler):
    def do_CONNECT(self) -> None:
        """Pass bytes on to the host of the request, until one side ends."""
        self.server.service.note(self.request_of(b""))
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            ends = {self.connection: there, there: self.connection}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    ends[end].sendall(data)


class Proxy(Web):
    """An HTTP proxy. It answers plain requests itself, and passes TLS on."""

    handler = ProxyHandler

    def targets(self) -> list[str]:
        """The request lines, in short: ["GET http://host/path"]."""
        return [f"{r.method} {r.target}" for r in self.requests]


# ==========================================================================
# A desk: an X server, a session bus and dunst, all private
# ==========================================================================

def start_display(start) -> str:
    """The value of DISPLAY for a new X server, as soon as it takes clients.
    start(command, pass_fds=...) starts a process, and ends it later."""
    ours, its = os.pipe()
    with open(ours) as numbers:
        start(["Xvfb", "-displayfd", str(its), "-ac", "-nolisten", "tcp",
               "-screen", "0", "1280x900x24"], pass_fds=[its])
        os.close(its)
        if not select.select([numbers], [], [], 20)[0]:
            raise RuntimeError("Xvfb did not come up")
        return ":" + numbers.readline().strip()


class Desk:
    """Notifications shown to one user, read back with `shown()`.

    `before` is put before each command (a Host, setpriv); `runtime` is the
    user's XDG_RUNTIME_DIR and holds the bus.
    """

    def __init__(self, runtime, before=lambda command: command):
        support.need("Xvfb", "dbus-daemon", "dunst", "dunstctl",
                     "notify-send")
        self.runtime, self.before = Path(runtime), before
        self.bus = f"unix:path={self.runtime}/bus"
        self.env = {"PATH": os.defpath, "HOME": str(self.runtime),
                    "XDG_RUNTIME_DIR": str(self.runtime),
                    "DBUS_SESSION_BUS_ADDRESS": self.bus}
        self.processes: list[subprocess.Popen] = []
        self.seen = 0           # the id of the last note that was read

    def start(self, command: list[str], **options) -> subprocess.Popen:
        process = subprocess.Popen(command, env=self.env, **{
            **QUIET, **options})
        self.processes.append(process)
        return process

    def __enter__(self):
        try:
            self.env["DISPLAY"] = start_display(self.start)
            self.start(self.before(["dbus-daemon", "--session", "--nofork",
                                    "--nopidfile", "--address", self.bus]))
            support.wait_until((self.runtime / "bus").exists, what="a bus")
            self.start(self.before(["dunst", "-conf", "/dev/null"]))
            support.wait_until(lambda: self.control("count").code == 0,
                               what="dunst")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def control(self, *words: str) -> support.Result:
        done = subprocess.run(
            self.before(["dunstctl", *words]), env=self.env, timeout=20,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def shown(self) -> list[dict]:
        """What was shown since the last call, oldest first: summary, body,
        urgency, ..."""
        self.control("close-all")
        support.wait_until(lambda: self.control("count", "displayed")
                           .out.strip() == "0", what="notes to close")
        history = json.loads(self.control("history").out)["data"][0]
        notes = [note for note in
                 ({name: value["data"] for name, value in note.items()}
                  for note in reversed(history)) if note["id"] > self.seen]
        self.seen = max([self.seen, *(note["id"] for note in notes)])
        return notes


# ==========================================================================
# A password store: real pass, real gpg, a key for nothing else
# ==========================================================================

class PassStore:
    """`pass` with a throwaway key in its own home.

    `before` is put before each command, as for a Desk. The home has a short
    path, because gpg-agent's socket must fit in 108 bytes.
    """

    def __init__(self, home=None, before=lambda command: command):
        support.need("pass", "gpg")
        self.own = home is None
        self.home = Path(home or tempfile.mkdtemp(prefix="m-"))
        self.before = before
        self.env = {"PATH": os.defpath, "HOME": str(self.home),
                    "LANG": "C.UTF-8"}

    def run(self, *command: str, text: str = "") -> None:
        done = subprocess.run(
            self.before(list(command)), env=self.env, timeout=60,
            input=text.encode(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd="/")
        assert done.returncode == 0, done.stdout.decode()

    def __enter__(self):
        self.run("gpg", "--batch", "--quiet", "--passphrase", "",
                 "--pinentry-mode", "loopback", "--quick-gen-key", KEY_NAME,
                 "default", "default", "never")
        self.run("pass", "init", "test@example.com")
        return self

    def insert(self, name: str, value: str) -> None:
        self.run("pass", "insert", "-m", "-f", name, text=value + "\n")

    def wrapper(self, folder) -> Path:
        """A passBin for a user whose real home holds another store."""
        path = Path(folder) / "pass-of-the-test"
        path.write_text(f"#!/bin/sh\nHOME='{self.home}' exec pass \"$@\"\n")
        path.chmod(0o755)
        return path

    def __exit__(self, *error):
        self.run("gpgconf", "--kill", "all")
        if self.own:
            shutil.rmtree(self.home, ignore_errors=True)

"""Where secrets travel: all bytes that reach a process which took the port of
a dashboard, or which is on the way to it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import ssl
import tempfile
import threading

import pytest

import servers
import support
from dashboard_rig import DashboardHost, DashboardProcess, Operator
from support import MALLORY_UID, wait_until

koitab = support.load("koitab")

TAB = '"Say" @manual echo said\n"Secret" @manual cat {{Key, secret}}\n'


class Recorder:
    """A TCP server that keeps what it is sent. It answers each request with
    all that a client of a dashboard might want to hear; or, with `target`,
    passes everything on to that port."""

    ANSWER = (b'{"v":3,"acked":0,"want_list":true,"requests":[],"live":{},'
              b'"missing_output":[],"hosts":[],"rounds":1000,'
              b'"dash":"%s","salt":"00000000000000000000000000000000"}'
              % (b"d0" * 8))

    def __init__(self, port: int = 0, context=None, target: int = 0):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port, self.context = self.listener.getsockname()[1], context
        self.target, self.data = target, bytearray()
        self.handshakes = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_error) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self.take, args=(sock,),
                                 daemon=True).start()

    def take(self, sock) -> None:
        with contextlib.suppress(OSError):
            if self.context:
                self.handshakes += 1
                sock = self.context.wrap_socket(sock, server_side=True)
            if self.target:
                far = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self.copy, args=(far, sock),
                                 daemon=True).start()
                self.copy(sock, far)
                return
            while True:
                data = sock.recv(65_536)
                if not data:
                    break
                self.data += data
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/"
                             b"json\r\nContent-Length: %d\r\n\r\n%s" % (
                                 len(self.ANSWER), self.ANSWER))
        sock.close()

    def copy(self, near, far) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = near.recv(65_536)
                self.data += data
                if not data:
                    break
                far.sendall(data)
        for sock in (near, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Place:
    """A directory for Unix sockets, which the agent can enter though it has
    another uid, and the hosts and dashboards that use it."""

    def __init__(self, folder):
        self.folder = folder
        self.path = tempfile.mkdtemp(dir=support.SCRATCH)
        os.chmod(self.path, 0o755)
        self.patch = f"k.DASHBOARD_SOCKETS = {self.path!r}\n" \
            "k.Machine.dashboard_directory = lambda self, db: " \
            "k.DASHBOARD_SOCKETS\n"

    def dashboard(self) -> DashboardProcess:
        return DashboardProcess(self.folder / "dashboard", patch=self.patch)

    def host(self, server: DashboardProcess, name: str) -> DashboardHost:
        """A koid that permits no plain http; it ends with the server."""
        host = server.hosts[name] = DashboardHost(
            self.folder / name, name, plain_http=False)
        host.patch += self.patch
        host.install(TAB)
        return host.start()


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    shutil.rmtree(place.path)


def accepted(server: DashboardProcess, data: bytes) -> list[str]:
    """The strings in `data` that the dashboard accepts as a token."""
    words = set(re.findall(r"[A-Za-z0-9_-]{16,}", data.decode("latin-1")))
    with server.client(seconds=60) as client:
        return [word for word in words if client.ask(
            "GET", "/api/v1/state", None, word).status not in (401, 429)]


def type_all_commands(host: DashboardHost, operator: Operator,
                      url: str, *options: str) -> list[support.Result]:
    """Type each command that sends a secret."""
    secret = operator.password + "\n"
    return [host.koitab(*words, stdin=secret) for words in (
        ["-d", "show"], ["-d", "rotate", *options], ["-d", "token", "list"],
        ["run", "--on", "web1", "Say"],
        ["run", "--on", "web1", "--url", url, *options, "Say"],
        ["-d", "off"], ["-d", "join", url, *options],
        ["-d", "new", url, *options])]


def test_process_that_takes_the_port_gets_no_byte_of_hosts_and_commands(
        place):
    with place.dashboard() as server:
        web1 = place.host(server, "web1")
        operator = web1.create_dashboard(server)
        operator.specs(operator.host("web1"))
        assert web1.koitab("run", "--on", "web1", "Say", stdin=
                           operator.password).out == "said\n"
        server.kill()
        with Recorder(server.port) as squatter:
            wait_until(lambda: "Unix socket" in web1.koitab(
                "-d", "show").out, 30, "the agent to have tried")
            done = type_all_commands(web1, operator, server.url)
            assert [each.code for each in done] == [1, 1, 1, 1, 1, 0, 1, 1]
            assert squatter.data == b""


def test_recorded_bytes_of_plain_http_contain_a_valid_token(place):
    """So the tests above and below can fail."""
    with place.dashboard() as server:
        web1 = place.host(server, "web1")
        operator = web1.create_dashboard(server)
        with Recorder(target=server.port) as relay:
            url = f"http://127.0.0.1:{relay.port}"
            web1.koitab("run", "--on", "web1", "--url", url, "--plain-http",
                        "Say", stdin=operator.password)
        assert accepted(server, relay.data) == [operator.token]


def test_relay_of_tls_sees_no_string_that_a_later_request_accepts(
        place, tmp_path):
    made = servers.certificate(tmp_path)
    trust = ssl.create_default_context(cafile=made.cert)
    with DashboardProcess(tmp_path / "tls", "--cert", made.cert, "--key",
                          made.key, tls=trust) as server, \
            Recorder(target=server.port) as relay:
        url = f"https://127.0.0.1:{relay.port}"
        web1 = place.host(server, "web1")
        done = web1.koitab("-d", "new", url, "--ca", made.cert,
                           stdin=server.founding_token())
        assert done.code == 0, done
        password = re.search(r"^passphrase +(\S+)$", done.out, re.M)[1]
        dash = re.search("#([0-9a-f]{16})$", done.out, re.M)[1]
        operator = Operator(server, dash, password)
        operator.specs(operator.host("web1"))
        done = web1.koitab("run", "--on", "web1", "Say", stdin=password)
        assert done.out == "said\n", done
        assert accepted(server, bytes(relay.data)) == []
        for secret in (password, operator.token):
            assert secret.encode() not in relay.data
        before = server.rows("select count(*) from audit")
        with socket.create_connection(("127.0.0.1", server.port)) as again:
            with contextlib.suppress(OSError):      # refused at once, or later
                again.sendall(relay.data)
                again.shutdown(socket.SHUT_WR)
                while again.recv(65_536):
                    pass        # TLS refuses what was recorded
        assert server.rows("select count(*) from audit") == before


def test_server_with_another_certificate_gets_no_byte(place, tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    good, bad = (servers.certificate(tmp_path / name)
                 for name in ("good", "bad"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(bad.cert, bad.key)
    trust = ssl.create_default_context(cafile=good.cert)
    with DashboardProcess(tmp_path / "tls", "--cert", good.cert, "--key",
                          good.key, tls=trust) as server:
        web1 = place.host(server, "web1")
        done = web1.koitab("-d", "new", server.url, "--ca", good.cert,
                           stdin=server.founding_token())
        assert done.code == 0, done
        password = re.search(r"^passphrase +(\S+)$", done.out, re.M)[1]
        dash = re.search("#([0-9a-f]{16})$", done.out, re.M)[1]
        operator = Operator(server, dash, password)
        server.kill()
        with Recorder(server.port, context) as squatter:
            wait_until(lambda: "certificate not trusted" in web1.koitab(
                "-d", "show").out, 30, "the agent to have tried")
            type_all_commands(web1, operator, server.url, "--ca", good.cert)
            assert squatter.handshakes > 5 and squatter.data == b""


# --- the Unix socket


@pytest.fixture
def listening(place):
    """A Unix socket of this user's in a directory of this user's."""
    directory = os.path.join(place.path, "run")
    sock = koitab.listen_at_path(
        f"{directory}/{koitab.dashboard_socket_name(8077)}", True)
    yield directory
    sock.close()


def is_found(directory: str, port: int = 8077) -> bool:
    found = koitab.connect_dashboard_socket(port, [directory], 10)
    if found:
        found.close()
    return bool(found)


def test_socket_is_found_by_its_port_in_a_directory_of_its_owner(listening):
    assert is_found(listening)
    assert not is_found(listening, 8078)
    assert not is_found(listening + "x")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_socket_in_a_directory_that_others_can_write_is_not_used(
        listening, mode):
    os.chmod(listening, mode)
    assert not is_found(listening)


@pytest.mark.parametrize("mode, found", [
    (0o775, False), (0o757, False), (0o1777, True)])
def test_directory_that_others_can_replace_is_not_trusted(
        place, listening, mode, found):
    os.chmod(place.path, mode)
    assert is_found(listening) == found


@support.root_only
def test_directory_below_one_of_another_user_is_not_trusted(place, listening):
    os.chown(place.path, MALLORY_UID, MALLORY_UID)
    assert not is_found(listening)


@support.root_only
@pytest.mark.parametrize("listens_as, owner, found", [
    (0, 0, True), (0, MALLORY_UID, True), (MALLORY_UID, MALLORY_UID, True),
    (MALLORY_UID, 0, False), (MALLORY_UID, MALLORY_UID + 1, False)])
def test_socket_not_owned_by_root_or_the_owner_of_its_directory_is_refused(
        place, listens_as, owner, found):
    directory = os.path.join(place.path, "run")
    os.mkdir(directory)
    path = f"{directory}/{koitab.dashboard_socket_name(8077)}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        os.chown(directory, owner, owner)
        os.seteuid(listens_as)
        try:
            sock.listen()
        finally:
            os.seteuid(0)
        assert is_found(directory) == found


def test_dashboard_without_a_socket_says_so_and_serves(tmp_path):
    patch = "k.Machine.dashboard_directory = lambda self, db: '/dev/null'\n"
    with DashboardProcess(tmp_path, patch=patch) as server:
        assert "needs --plain-http" in server.log()
        assert server.ask("GET", "/healthz").status == 200

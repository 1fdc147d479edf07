"""The dashboard behind real proxies, as `koitab help dashboard` has them.

A block is used as it is printed: only ports and paths are replaced. What the
distribution's main configuration would add around it is in FRAMES.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

import servers
import support
from dashboard_rig import (
    DashboardHost, HttpClient, PageDriver, encode_request, koitab,
    sync_payload)

support.PARTS.update(nginx="nginx-light", apache2="apache2-bin")

NAME = "koi.example.com"
TOPIC = koitab.topic_text("dashboard")
# As the topic starts it.
SERVER_OPTIONS = re.search(
    r"^    koitab dashboard (--name .+--behind-proxy .+)$", TOPIC,
    re.M)[1].split()
TAB = '"Say" @manual echo hello\n'
CLIENT = "127.0.0.5"        # unlike the proxy's address


def topic_block(first: str) -> str:
    """The block of the topic that begins with this line, without indent."""
    block = re.search(rf"^    {re.escape(first)}\n(?:    .*\n)+", TOPIC, re.M)
    return re.sub(r"^    ", "", block[0], flags=re.M)


def nginx_block() -> str:
    return topic_block("server {")


def nginx_block_below_a_path() -> str:
    """The block with the line that the topic has for a path."""
    location = re.search(r"^    (location /koi/ \{.+\})$", TOPIC, re.M)[1]
    found, count = re.subn(r"location / \{.+\}", location, nginx_block())
    assert count == 1
    return found


# {block} is the topic's, {folder} the proxy's own directory.
FRAMES = {"nginx": """
pid {folder}/pid;
error_log {folder}/log;
daemon off;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{block}
}}
""", "caddy": """{{
    admin off
    http_port {other_port}
    https_port {port}
    local_certs
    skip_install_trust
}}
{block}""", "haproxy": "{block}", "apache2": """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/log
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule ssl_module {modules}/mod_ssl.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
Listen 127.0.0.1:{port}
{block}"""}
COMMANDS = {
    "nginx": "nginx -p {folder} -e {folder}/log -c {folder}/configuration",
    "caddy": "caddy run --adapter caddyfile --config {folder}/configuration",
    "haproxy": "haproxy -db -f {folder}/configuration",
    "apache2": "apache2 -X -f {folder}/configuration"}
MODULES = "/usr/lib/apache2/modules"
# What is tested -> proxy, block, path.
PROXIES = {
    "nginx": ("nginx", nginx_block, ""),
    "nginx_below_a_path": ("nginx", nginx_block_below_a_path, "/koi"),
    "caddy": ("caddy", lambda: topic_block(f"{NAME} {{"), ""),
    "haproxy": ("haproxy", lambda: topic_block("listen koi"), ""),
    "apache": ("apache2", lambda: topic_block("<VirtualHost *:443>"), "")}


class ClientOfProxy(HttpClient):
    """A connection with TLS from the address CLIENT to a proxy."""

    def __init__(self, port: int, context: ssl.SSLContext):
        plain = socket.create_connection(("127.0.0.1", port), 60,
                                         source_address=(CLIENT, 0))
        self.sock = context.wrap_socket(plain, server_hostname=NAME)
        self.port, self.data, self.reset = port, bytearray(), False


class ProxyProcess:
    """A proxy with a block of the topic, at a free port, as an ordinary
    user."""

    def __init__(self, folder: Path, program: str, block: str, path: str,
                 certificate: servers.Certificate, dashboard):
        support.need(program)
        self.folder, self.program, self.path = folder, program, path
        self.certificate, self.dashboard = certificate, dashboard
        self.port = servers.free_port()
        for before, after in (
                ("443", str(self.port)), ("8077", str(dashboard.port)),
                ("/etc/koi/cert.pem", certificate.cert),
                ("/etc/koi/key.pem", certificate.key),
                ("/etc/koi/both.pem", str(folder / "both.pem"))):
            block = re.sub(rf"\b{re.escape(before)}\b" if before.isdigit()
                           else re.escape(before), after, block)
        (folder / "both.pem").write_bytes(b"".join(
            Path(file).read_bytes()
            for file in (certificate.cert, certificate.key)))
        (folder / "configuration").write_text(FRAMES[program].format(
            block=block, folder=folder, port=self.port, modules=MODULES,
            other_port=servers.free_port()))

    def __enter__(self) -> ProxyProcess:
        command = COMMANDS[self.program].format(folder=self.folder).split()
        user = {}
        if support.AS_ROOT:
            account = pwd.getpwnam(support.some_user())
            user = {"user": account.pw_uid, "group": account.pw_gid,
                    "extra_groups": []}
            for place in (self.folder, Path(self.certificate.key).parent):
                support.own(place, account.pw_uid)
        with open(self.folder / "output", "wb") as output:
            self.process = subprocess.Popen(
                [support.find(command[0]), *command[1:]], **user,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=self.folder, env={"PATH": os.defpath,
                                      "HOME": str(self.folder)})
        support.wait_until(self.listens, 30, f"{self.program} to listen")
        return self

    def __exit__(self, *_error) -> None:
        self.process.terminate()
        self.process.wait(30)

    def listens(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail((self.folder / "output").read_text())
        try:
            with self.client():
                return True
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}{self.path}"

    def client(self) -> ClientOfProxy:
        """A client, which does not verify the certificate: that is the
        proxy's task."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return ClientOfProxy(self.port, context)

    def ask(self, method: str, path: str, body=None, token: str = "",
            **headers):
        with self.client() as client:
            return client.ask(method, self.path + path, body, token,
                              **{"Host": NAME, **headers})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    return servers.certificate(folder, f"IP:127.0.0.1,DNS:{NAME}")


@pytest.fixture(scope="module")
def start_proxy(server, certificate, tmp_path_factory):
    """A function that starts one of PROXIES for the fixture that calls it."""
    def start(name: str):
        program, block, path = PROXIES[name]
        folder = tmp_path_factory.mktemp(name)
        for each in (folder, folder.parent, Path(certificate.key).parent):
            each.parent.chmod(0o755)
        with ProxyProcess(folder, program, block(), path, certificate, server
                          ) as proxy:
            yield proxy
    return start


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request, start_proxy):
    yield from start_proxy(request.param)


@pytest.fixture(scope="module")
def operator(server, tmp_path_factory):
    """The passphrase's owner. No koid is a member, so no poll waits."""
    folder = tmp_path_factory.mktemp("founder")
    return DashboardHost(folder, "founder").create_dashboard(server)


@pytest.fixture(scope="module")
def member(operator):
    """The ID and the token of a host that the test itself is."""
    host, token = os.urandom(16).hex(), os.urandom(32).hex()
    operator.tell("hosts", {"host": host, "name": "a test",
                            "token_sha256": koitab.sha256_hex(token)})
    return host, token


def new_check(operator, name: str) -> str:
    return operator.tell("checks", {
        "name": name, "slug": name, "kind": "simple", "period": 3600,
        "grace": 60})["id"]


def test_page_and_state_are_served_through_a_proxy(proxy, operator):
    page = proxy.ask("GET", "/")
    assert page.status == 200 and b"<title>koi</title>" in page.body
    assert "script-src" in page.headers["content-security-policy"]
    assert proxy.ask("GET", "/api/v1/salt").json["dash"] == operator.dash
    state = proxy.ask("GET", "/api/v1/state", token=operator.token)
    assert state.json["dash"]["id"] == operator.dash


def test_origin_of_the_page_is_accepted_through_a_proxy(proxy, operator):
    """A host name that the proxy changes would make it another origin."""
    host = f"{NAME}:{proxy.port}"
    statuses = [proxy.ask("GET", "/api/v1/state", token=operator.token,
                          Host=host, Origin=f"https://{origin}").status
                for origin in (host, "evil.example")]
    assert statuses == [200, 403]


def test_change_arrives_in_an_open_stream_through_a_proxy(proxy, operator):
    with proxy.client() as client:
        client.send(encode_request(
            proxy.port, "GET", f"{proxy.path}/api/v1/stream", None,
            operator.token, Host=NAME))
        assert client.head()[0] == 200
        uuid = new_check(operator, f"stream-{proxy.port}")
        while uuid.encode() not in client.data:
            assert client.more(), "the stream ended"


def long_polls(operator) -> int:
    """How many polls wait in the dashboard."""
    text = operator.dashboard.ask("GET", "/metrics", token=operator.token
                                  ).body.decode()
    return int(text.split("\nkoi_http_long_polls ")[1].split()[0])


def test_long_poll_waits_for_a_request_through_a_proxy(proxy, operator,
                                                       member):
    host, token = member
    payload = sync_payload(host)
    assert proxy.ask("POST", "/api/v1/sync", payload, token).status == 200
    nonce = os.urandom(16).hex()
    spec = json.dumps({"user": "root", "tag": "t" * 12})
    with proxy.client() as client:
        client.send(encode_request(
            proxy.port, "POST", f"{proxy.path}/api/v1/sync",
            {**payload, "wait": 25}, token, Host=NAME))
        support.wait_until(lambda: long_polls(operator) == 1, 20)
        operator.tell("requests", operator.sealed(
            host, operator.request(host, spec, nonce=nonce)))
        requests = client.reply().json["requests"]
    assert nonce in requests[-1]["body"]


def test_largest_sync_is_read_through_a_proxy(proxy, member):
    """The dashboard reads all of it: then it finds no JSON."""
    reply = proxy.ask("POST", "/api/v1/sync", b" " * koitab.SYNC_BODY,
                      member[1], Content_Type="application/json")
    assert (reply.status, reply.json["error"]) == (
        400, "the body is not the JSON of a request")


def test_address_of_a_client_is_the_one_that_the_proxy_saw(proxy, operator):
    uuid = new_check(operator, f"ping-{proxy.port}")
    for header in ({}, {"X_Forwarded_For": "192.0.2.1"}):
        assert proxy.ask("POST", f"/ping/{uuid}", b"", **header).status == 200
    pings = operator.ask(f"checks/{uuid}/pings")["pings"]
    assert [ping["ip"] for ping in pings] == [CLIENT, CLIENT]


# --- below a path, and without one


@pytest.fixture(scope="module", params=["nginx", "nginx_below_a_path"])
def nginx(request, start_proxy):
    yield from start_proxy(request.param)


def test_host_joins_and_runs_a_job_through_a_proxy(nginx, operator, tmp_path):
    host = DashboardHost(tmp_path, f"web{nginx.port}")
    host.install(TAB)
    host.start()
    try:
        done = host.koitab("-d", "join", f"{nginx.url}/#{operator.dash}",
                           "--ca", nginx.certificate.cert,
                           stdin=f"{operator.password}\n")
        assert done.code == 0, done
        operator.specs(operator.host(host.name))    # the list has arrived
        done = host.koitab("run", "--on", host.name, "Say",
                           stdin=f"{operator.password}\n")
        assert (done.code, done.out) == (0, "hello\n"), done
        assert f"{nginx.url}/#" in host.koitab("-d", "show").out
    finally:
        host.stop(9)
        host.end_jobs()


def test_page_works_and_shows_its_own_urls_through_a_proxy(nginx, operator):
    uuid = new_check(operator, f"page-{nginx.port}")
    with PageDriver(flags=["--ignore-certificate-errors"]) as page:
        page.open(f"{nginx.url}/", operator.password, f"check/{uuid}")
        page.wait(f"document.querySelector('.snippet')?.textContent.includes("
                  f"'{nginx.url}/ping/{uuid}')")
        page.visit("settings", ".snippet")
        text = page.js("return document.querySelector('#main').innerText")
        assert f"{nginx.url}/badge/" in text
        assert f"{nginx.url}/#{operator.dash}" in text
        page.wait("document.querySelector('#connection').textContent "
                  "=== 'Live'")
        assert page.faults() == []

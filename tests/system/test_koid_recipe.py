"""Three machines share a job, set up by the commands of `koitab help
behaviour`: systemd boots each of them, in a network of their own."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import support
from koi_group import Namespace
from support import wait_until
from test_koid_booted import Computer

koitab = support.load("koitab")
pytestmark = support.root_only
NAMES = ("h1", "h2", "h3")
HOSTS = "127.0.0.1 localhost\n" + "".join(
    f"10.77.0.{number} {name}\n" for number, name in enumerate(NAMES, 1))


def recipe() -> list[str]:
    """The blocks of commands of the part about etcd, as a shell has them."""
    text = koitab.TOPICS["behaviour"][1].partition("SETTING UP ETCD\n")[2]
    text = text.partition("What to monitor")[0]
    blocks = re.findall(r"^    \S.*\n(?:    .*\n)*", text,
                        re.M)
    return [re.sub("^    ", "", block, flags=re.M) for block in blocks]


@pytest.fixture
def machines(tmp_path):
    """Three booted machines, where Debian's packages are installed: that has
    started an etcd on each."""
    support.need("etcd", "etcdctl", "openssl", "ip")
    hub, found = Namespace(100), []
    try:
        for name in NAMES:
            (tmp_path / name).mkdir()
            found.append(Computer(tmp_path / name))
            (found[-1].root / "etc/hosts").write_text(HOSTS)
        each(found, lambda computer, name: boot(computer, name, hub))
        yield dict(zip(NAMES, found))
    finally:
        for computer in found:
            computer.remove()
        hub.close()


def each(machines, do) -> list:
    """Do the same on all machines at once, as three administrators do."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(do, machines, NAMES))


def boot(computer: Computer, name: str, hub: Namespace) -> None:
    computer.boot()
    number = name[1:]
    hub.ip("link", "add", f"p{number}", "type", "veth", "peer", "name",
           "eth0", "netns", str(computer.init))
    hub.ip("link", "set", f"p{number}", "master", "br0", "up")
    computer.do(f"hostname {name}; ip addr add 10.77.0.{number}/24 dev eth0; "
                "ip link set lo up; ip link set eth0 up; ln -s "
                "/root/koitab.py /usr/local/bin/koitab; chmod +x koitab.py; "
                "rm -rf /var/lib/etcd/*; systemctl start etcd")


def test_three_machines_set_up_by_the_manual_share_a_job(machines):
    certificates, member, user, unit = recipe()
    first = machines["h1"]
    first.do(f"mkdir keys && cd keys && {certificates}")
    files = {path.name: path.read_bytes()
             for path in (first.root / "root/keys").iterdir()}

    def set_up(computer: Computer, name: str) -> None:
        folder = computer.root / "etc/koi-etcd"
        folder.mkdir()
        for file in ("ca.pem", "koi.pem", "koi.key", "password",
                     f"{name}.pem", f"{name}.key"):
            (folder / file).write_bytes(files[file])
        computer.do("cd /etc/koi-etcd && chmod 600 *.key password && "
                    f"chown etcd {name}.key")
        assert "apt-get install etcd-server etcd-client\n" in member
        computer.do(f"h={name}\n" + re.sub("apt-get .*\n", "", member))

    each(machines.values(), set_up)
    members = first.do(f"cd keys && {user}")
    assert all(f"https://{name}:2380" in members for name in NAMES), members
    each(machines.values(), lambda computer, _: computer.do(unit))
    tab = 'KOI_ONE_OF=web\nCRON_TZ=UTC\n"Shared" * * * * * hostname\n'
    for computer in machines.values():
        (computer.root / "root/tab").write_text(tab)
        computer.do("koitab tab && koitab status")
    first.do("systemctl stop etcd")     # the group must not notice
    def starts() -> dict[str, list[tuple]]:
        """When each start was due -> how it went on the three machines."""
        found: dict[str, list[tuple]] = {}
        for computer in machines.values():
            for run in json.loads(computer.do("koitab history --json")):
                found.setdefault(run["due"], []).append(
                    (run["state"], run["reason"]))
        return found

    results = wait_until(lambda: next((
        sorted(each) for each in starts().values() if len(each) == 3
        and not {"queued", "running"} & {state for state, _ in each}), None),
        150, "a start that all machines know")
    host = results[-1][1]
    assert results == [("done", ""), ("elsewhere", host), ("elsewhere", host)]
    assert machines[host].do("koitab log Shared") == f"{host}\n"

"""The README's way from cron to koid on a machine that systemd boots.

systemd is process 1 of PID, mount, cgroup, network and other namespaces of
the test's own, over an overlay of this machine's root: nothing is changed
outside. A reboot ends all its processes, and boots the same root again, with
another boot ID. The commands are those of the README.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import pytest

import support
from readme import commands
from support import wait_until

pytestmark = support.root_only

# The machine's root: an overlay in a tmpfs, which outlives a boot.
ROOT_SCRIPT = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" \\
    "$1/root"
echo ready
exec sleep 3600
"""
# In new namespaces: what a container manager mounts, then systemd. It can
# write to no file of the kernel's that is not of these namespaces.
BOOT_SCRIPT = """
set -e
cd "$1"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind boot_id proc/sys/kernel/random/boot_id
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
for it in null zero full random urandom tty; do
    touch "run/$it"; mount --bind "/dev/$it" "run/$it"
done
mount --move run dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs run
mount --make-rshared .      # or no unit gets its credentials
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    chroot . /lib/systemd/systemd --system --log-target=journal --show-status=0
"""
ENTER = ["-m", "-u", "-i", "-n", "-p", "-r", "-w"]


def make_cgroup() -> Path:
    """The test's own group in the unified hierarchy. Skip where there
    is none, or where none can be made: a container without delegation."""
    for line in Path("/proc/mounts").read_text().splitlines():
        device, place, kind = line.split()[:3]
        if kind == "cgroup2":
            own = Path("/proc/self/cgroup").read_text().rpartition(
                "0::")[2].splitlines()[0]
            group = Path(place + own) / f"koi-test-{uuid.uuid4().hex[:8]}"
            try:
                group.mkdir()
                (group / "inner").mkdir()
                (group / "inner").rmdir()
            except OSError as error:
                support.absent(f"no cgroup for systemd: {error}")
            return group
    return support.absent("cgroup2 is not mounted")


class Computer:
    """A machine that can be booted again. It has its own network, with
    loopback alone, or that of another computer, which runs."""

    def __init__(self, folder: Path, network: Computer | None = None):
        support.need("unshare", "nsenter", "cron", "systemctl", "pgrep")
        if not os.path.exists("/lib/systemd/systemd"):
            support.absent("systemd is missing: apt-get install systemd")
        self.group, self.network = make_cgroup(), network
        place = folder / "machine"
        place.mkdir()
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", ROOT_SCRIPT, "sh", str(place)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.systemd: subprocess.Popen | None = None
        if self.holder.stdout.readline() != b"ready\n":
            support.absent("no overlay of the root: "
                           f"{self.holder.stderr.read().decode().strip()}")
        self.top = f"{place}/root"
        self.root = Path(f"/proc/{self.holder.pid}/root{self.top}")
        self.set_up()

    def set_up(self) -> None:
        """Install cron and nothing else that starts at boot."""
        units = self.root / "etc/systemd/system"
        subprocess.run(["rm", "-rf", str(units)], check=True)
        (units / "multi-user.target.wants").mkdir(parents=True)
        (units / "multi-user.target.wants/cron.service").symlink_to(
            "/lib/systemd/system/cron.service")
        for name in ("koi", "cron/crontabs"):
            parent = self.root / "var" / ("lib" if name == "koi" else "spool")
            subprocess.run(["rm", "-rf", str(parent / name)], check=True)
        (self.root / "var/spool/cron/crontabs").mkdir(parents=True)
        for path in (self.root / "etc/cron.d").iterdir():
            path.unlink()
        (self.root / "etc/crontab").write_text("")
        for name in ("koitab.py", "mission.py"):
            (self.root / "root" / name).write_bytes(
                (support.ROOT / name).read_bytes())
        for name in ("koitab", "koid", "mission"):
            (self.root / "usr/local/bin" / name).unlink(missing_ok=True)

    def boot(self) -> None:
        """Boot, and wait until all units are started."""
        (self.root / "boot_id").write_text(f"{uuid.uuid4()}\n")
        network = f"nsenter -n -t {self.network.init} unshare" \
            if self.network else "unshare -n"
        self.systemd = subprocess.Popen(
            ["nsenter", "-t", str(self.holder.pid), "-m", "sh", "-c",
             f'echo 0 > "{self.group}/cgroup.procs"; exec {network} -fpmiuC '
             '--kill-child --propagation private sh -c "$@"', "sh",
             BOOT_SCRIPT, "sh", self.top], stdin=subprocess.DEVNULL)
        wait_until(lambda: self.run("systemctl is-system-running").out.strip()
                   in ("running", "degraded"), 180, "systemd to boot")

    def reboot(self) -> None:
        """End all processes at once, as a power failure does; boot again."""
        self.end()
        self.boot()

    def end(self) -> None:
        if self.systemd:
            self.systemd.kill()
            self.systemd.wait(30)
        wait_until(lambda: not list(self.processes()), 30,
                   "all processes to end")

    def processes(self):
        for file in self.group.rglob("cgroup.procs"):
            yield from file.read_text().split()

    def remove(self) -> None:
        self.end()
        self.holder.kill()
        self.holder.communicate()
        wait_until(self.remove_group, 30, "the control groups to be empty")

    def remove_group(self) -> bool:
        """A process that has ended may count for a moment longer."""
        try:
            for folder, _, _ in os.walk(self.group, topdown=False):
                os.rmdir(folder)
        except OSError:
            return False
        return True

    @property
    def init(self) -> int:
        """The process ID of systemd; 0 before it is there."""
        return (support.children_of(self.systemd.pid) or [0])[0]

    def run(self, command: str) -> support.Result:
        """Run a shell's command on the machine, as root at a terminal."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.init), *ENTER, "env", "-i",
             "HOME=/root",
             "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c",
             f"cd /root; {command}"], stdin=subprocess.DEVNULL, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def do(self, command: str) -> str:
        """The output of a command that must succeed."""
        done = self.run(command)
        assert done.code == 0, (command, done)
        return done.out


def install(computer: Computer) -> None:
    """Install koi and start koid, as the README says."""
    for command in commands("Install 2", "Quick start: koi 1"):
        computer.do(command)


@pytest.fixture
def computer(tmp_path):
    computer = Computer(tmp_path)
    try:
        computer.boot()
        yield computer
    finally:
        computer.remove()


def test_machine_changes_from_cron_to_koid_and_survives_a_reboot(computer):
    # koid next to cron: it answers when systemctl returns, and is a unit
    # that is ready.
    (computer.root / "etc/cron.d/site").write_text(
        "@reboot root echo up >> /root/boots\n"
        "0 0 1 1 * root echo yearly\n")
    assert computer.do("systemctl is-active cron") == "active\n"
    install(computer)
    computer.do("koitab status")
    assert computer.do("systemctl is-enabled koid") == "enabled\n"
    assert computer.do("systemctl show -P Type koid") == "notify\n"

    # The switch.
    for command in commands("Moving from cron 1"):
        computer.do(command)
    assert computer.run("systemctl is-active cron").out == "inactive\n"
    computer.do("koitab status")
    assert "echo yearly" in computer.do("koitab next")
    assert computer.do("koitab run 'echo yearly'") == "yearly\n"
    assert not (computer.root / "root/boots").exists()  # cron's at its boot

    # A restart: the job continues, its output and its end are kept.
    os.mkfifo(computer.root / "root/fifo")
    computer.do("printf '\"Long\" @manual echo before; read word < fifo; "
                "echo $word\\n\"Lost\" @manual sleep 600\\n' | koitab -")
    computer.do("(koitab run Long &) >/dev/null 2>&1")
    wait_until(lambda: "before" in computer.run("koitab log Long").out, 30,
               "the job to begin")
    first = computer.do("systemctl show -P MainPID koid")
    computer.do("systemctl restart koid")
    computer.do("koitab status")
    assert computer.do("systemctl show -P MainPID koid") != first
    assert computer.do("pgrep koid") == computer.do("pidof koid") \
        == computer.do("systemctl show -P MainPID koid")
    computer.do("echo after > fifo")
    wait_until(lambda: "after" in computer.run("koitab log Long").out, 30,
               "the job to end")

    # The journal has each line once.
    computer.do("journalctl --sync")
    lines = computer.do("journalctl -t koid -t python3 -t koitab -o cat "
                        "_SYSTEMD_UNIT=koid.service").splitlines()
    assert sum(line.startswith("koid 1.0: ") for line in lines) == 3
    assert not [line for line in lines if " koid: " in line]

    # The dashboard's unit: ready when systemctl returns, a user that
    # systemd lends, a database that root's backup finds.
    computer.do("koitab unit dashboard > "
                "/etc/systemd/system/koi-dashboard.service")
    computer.do("systemctl enable --now koi-dashboard && koitab -d new")
    assert computer.do("ps -C koi-dashboard -o user= --no-headers").strip() \
        not in ("", "root")
    computer.do("systemctl reload koi-dashboard")
    computer.do("koitab dashboard --backup copy.db && test -s copy.db")
    wait_until(lambda: computer.run("koitab status").code == 0, 30, "the link")

    # A reboot: koid is back, cron is not, jobs of the boot run once.
    computer.do("(koitab run Lost &) >/dev/null 2>&1")
    wait_until(lambda: "Lost" in computer.do("koitab status --json"), 30,
               "the run")
    wait_until(lambda: computer.run("pgrep -x sleep").code == 0, 30, "sleep")
    computer.reboot()
    computer.do("systemctl is-active koid koi-dashboard")
    assert computer.run("systemctl is-active cron").out == "inactive\n"
    wait_until((computer.root / "root/boots").exists, 30, "@reboot")
    computer.do("systemctl restart koid")
    assert (computer.root / "root/boots").read_text() == "up\n"
    assert "the machine went down" in computer.do("koitab history Lost")

    # And back.
    for command in commands("Moving from cron 2"):
        computer.do(command)
    assert computer.do("systemctl is-active cron") == "active\n"
    assert (computer.root / "root/boots").read_text() == "up\n"


def test_embedded_dashboard_survives_a_reboot_and_moves_into_a_unit(computer):
    install(computer)
    for command in commands("Quick start: the dashboard 1"):
        assert "http://127.0.0.1:877/#" in computer.do(command)
    wait_until(lambda: computer.run("koitab -d show").code == 0, 30, "koid")
    assert computer.do("ps -C koi-dashboard -o uid= --no-headers").strip() \
        == str(61170)
    computer.reboot()
    wait_until(lambda: computer.run("koitab -d show").code == 0, 30, "koid")

    # A unit takes over the database and the port.
    computer.do("rm /var/lib/koi/dashboard && systemctl restart koid")
    wait_until(lambda: computer.run("pgrep -x koi-dashboard").code == 1, 30,
               "the dashboard to end")
    computer.do("koitab unit dashboard --listen 127.0.0.1:877 > "
                "/etc/systemd/system/koi-dashboard.service")
    computer.do("systemctl enable --now koi-dashboard")
    wait_until(lambda: computer.run("koitab -d show").code == 0, 30, "koid")
    assert computer.run("koitab -d leave").code == 0
    done = computer.run("koitab -d new")
    assert (done.code, done.err) == (
        1, "koitab: error: 127.0.0.1:877: Address already in use\n"
        "koitab: hint: koitab dashboard --listen ADDRESS:PORT; or koitab -d "
        "join URL\n")

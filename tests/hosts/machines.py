"""Hosts of network, process and mount namespaces, which the kernel removes with the process that made them.

That process is the first one of a process namespace (`enclose`), so that whatever runs in the hosts is killed with it,
and their links, bridges and memory file systems go with their namespaces. Nothing of it is seen from outside.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.support.buckets import KEYS
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.processes import descendants, title
from tests.support.ray_nodes import RAY, node_environment

NETWORK = "10.77.0"
BRIDGE = "between"
_SPACES = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
_INIT = """
mount -t tmpfs -o size=3g hosts "$1" && mount -t tmpfs -o size=500m hosts /dev/shm || exit 1
mkdir "$1"/{"work-$2",home,tmp,cache} || exit 1
mount --bind "$3" /etc/hosts && hostname "$2" && ip link set lo up && echo ready || exit 1
while :; do sleep 1; done
"""
"""First process of a host. It has folders in memory, and as many Linux systems a name of its own at 127.0.1.1."""
_PROBE = """
ip link add name probe0 type bridge && ip link add name probe1 type veth && mount -t tmpfs probe /mnt && echo ready
"""


def enclosed() -> list[str]:
    """Return the words of a command that runs the words after them in namespaces of its own, as their root."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, *_SPACES]


def reason_against() -> str:
    """Return why this machine cannot have such hosts, or "" if it can."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"there is no program {program}"
    if " " in RAY:
        return f"`ray start` runs a shell that ends at the space in {RAY}"
    probe = subprocess.run(
        [*enclosed(), "sh", "-c", _PROBE], capture_output=True, text=True, check=False
    )
    return "" if "ready" in probe.stdout else f"no namespaces ({probe.stderr.strip()})"


def _space_of(pid: int) -> str:
    """Return the name of the process namespace of a process, "" if it has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


def _do(*words: str) -> None:
    subprocess.run(words, check=True)


class Host:
    """Host at an address, with an own network, processes, name and folders in memory."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        """Start the host, whose folders are below `folder`, which is another one in the memory of each host."""
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.folder = folder
        self.work = folder / f"work-{name}"
        self._link = f"to-{name}"
        self._between: subprocess.Popen[bytes] | None = None
        folder.mkdir(exist_ok=True)
        names = folder.with_name(f"hosts-{name}")
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        self._space = subprocess.Popen(
            ["unshare", *_SPACES, "bash", "-c", _INIT, "init", str(folder), name, str(names)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._space.stdout is not None
        assert self._space.stdout.readline() == "ready\n", f"the host {name} has no namespaces"
        self.init = descendants(self._space.pid)[0]
        self._id = _space_of(self.init)
        self._connect()

    def _connect(self) -> None:
        _do(
            "ip",
            "link",
            "add",
            self._link,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(self.init),
        )
        _do("ip", "link", "set", self._link, "master", BRIDGE, "up")
        inside = ["nsenter", "--target", str(self.init), "--net", "ip"]
        _do(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        _do(*inside, "link", "set", "eth0", "up")
        _do(*inside, "route", "add", "default", "via", f"{NETWORK}.254")

    def start(self, words: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
        """Start a process in the host's work folder, whose output goes to a file outside."""
        enter = [
            "nsenter",
            "--target",
            str(self.init),
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
        ]
        with log.open("a") as output:
            return subprocess.Popen(
                [*enter, "env", "-C", str(self.work), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment() | environment,
                text=True,
            )

    def _environment(self) -> dict[str, str]:
        inherited = node_environment(PYTHONPATH=PYTHONPATH, **KEYS)
        kept = {n: v for n, v in inherited.items() if not n.lower().endswith("_proxy")}
        kept["RAY_memory_monitor_refresh_ms"] = "0"  # the memory is that of the whole machine
        own = {"HOME": "home", "TMPDIR": "tmp", "PERMAFROST_CACHE": "cache"}
        return kept | {name: str(self.folder / path) for name, path in own.items()}

    def pids(self, word: str) -> list[int]:
        """Return the ids of the host's processes whose command line has the word."""
        every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in every if _space_of(pid) == self._id and word in title(pid)]

    def find(self, pattern: str) -> str:
        """Return the lines of Ray's logs on the host that have a pattern, in the form of grep."""
        log = self.folder.with_name(f"find-{self.name}")
        self.start(["grep", "-rhEi", pattern, str(self.folder / "ray")], log).wait()
        return log.read_text()

    def kill(self) -> None:
        """Kill the host with all of its processes, as a power cut does."""
        self._space.kill()  # the first process of the host dies with it, and with that all others
        self._space.wait()

    def cut(self) -> None:
        """Cut the link to the host."""
        _do("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        """Mend a link that was cut or loses frames."""
        if self._between is not None:
            self._between.kill()
        _do("ip", "link", "set", self._link, "master", BRIDGE, "up")

    def lose_frames(self, share: float, seconds: float) -> None:
        """Lose a fraction of the frames of the link, in either direction, and delay the others."""
        outer, inner = f"a-{self.name}", f"b-{self.name}"
        _do("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        _do("ip", "link", "set", outer, "up")
        words = ["-m", "tests.hosts.frames"]
        # The sending ends complete the checksums of what the program reads.
        _do("nsenter", "--target", str(self.init), "--net", sys.executable, *words, "plain", "eth0")
        _do(sys.executable, *words, "plain", inner)
        _do("ip", "link", "set", self._link, "nomaster")
        _do("ip", "link", "set", inner, "master", BRIDGE, "up")
        self._between = subprocess.Popen(
            [sys.executable, *words, self._link, outer, str(share), str(seconds)]
        )


def connect_hosts() -> None:
    """Make the bridge between the hosts, to which this process is connected as well."""
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", BRIDGE, "type", "bridge")
    _do("ip", "address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
    _do("ip", "link", "set", BRIDGE, "up")


def wait_for(log: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Wait for a text in the output of a process."""
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


def start_ray(host: Host, head: Host, cpus: int, logs: Path, gpus: int = 0) -> None:
    """Start Ray on a host, which joins the head unless it is the head. Its GPUs are only names."""
    words = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
    if host is head:
        words += ["--head", "--port=6379", f"--temp-dir={host.folder / 'ray'}"]
        words += ["--include-dashboard=false"]
    else:
        words += [f"--address={head.address}:6379"]
    log = logs / f"ray-{host.name}.log"
    process = host.start([RAY, "start", *words, "--object-store-memory=100000000", "--block"], log)
    wait_for(log, "will now block forever", process)


def drain(host: Host, head: Host, seconds: int, logs: Path) -> None:
    """Announce to the cluster that a host will be taken away, as a cloud does with one that it preempts."""
    log = logs / "nodes.log"
    program = (
        "import ray; ray.init('auto'); print(*(n['NodeID'] + n['NodeName'] for n in ray.nodes()))"
    )
    head.start([sys.executable, "-c", program], log).wait()
    (node,) = re.findall(rf"\b([0-9a-f]{{56}}){host.address}\b", log.read_text())
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preempted"]
    deadline = f"--deadline-remaining-seconds={seconds}"
    words = [RAY, "drain-node", f"--address={head.address}:6379", f"--node-id={node}", *reason]
    head.start([*words, deadline], log).wait()


def start_server(host: Host, logs: Path) -> str:
    """Start an S3 server with a bucket named `bucket`, and return the address of a relay to it, which clients use."""
    log = logs / "server.log"
    process = host.start(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "9001"], log
    )
    wait_for(log, "Running on", process)
    start_relay(host, logs)
    connection = http.client.HTTPConnection(host.address, 9000)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    connection.close()
    return f"http://{host.address}:9000"


def start_relay(host: Host, logs: Path) -> subprocess.Popen[str]:
    """Start the relay to the server of a host."""
    log = logs / "relay.log"
    log.write_text("")
    process = host.start(
        [sys.executable, "-u", str(ROOT / "tests/hosts/relay.py"), "9000", "9001"], log
    )
    wait_for(log, "relays", process)
    return process

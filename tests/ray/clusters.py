"""A Ray cluster of one test session alone, on loopback: as if it had three CPUs, and gone with the one that started it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

os.environ |= {  # read when Ray is imported: loopback alone, a key of this process, and no report of its use
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex,
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}

HEAD = """
import json, sys, time, ray
at = ray.init("local", num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False,
              logging_level="ERROR", _temp_dir=sys.argv[1])
print(at.address_info["address"], flush=True)
hold, held = ray.remote(lambda: time.sleep(600)), []
for line in sys.stdin:
    if line.strip() == "hold":
        held = [hold.options(num_cpus=1).remote() for _ in range(3)]
        while ray.available_resources().get("CPU", 0) >= 1:
            time.sleep(0.1)
    elif line.strip() == "free":
        [ray.cancel(each, force=True) for each in held]
    print(json.dumps({"CPU": ray.available_resources().get("CPU", 0)}), flush=True)
ray.shutdown()
"""


class Cluster:
    """A Ray cluster in a process of its own. It ends with the one that started it, whatever happens to that."""

    def __init__(self):
        self.place = tempfile.mkdtemp(prefix="keel-ray-")  # short: sockets are made in it
        command = [sys.executable, "-c", HEAD, self.place]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.head = subprocess.Popen(command, **pipes)
        self.address = self._line()

    def ask(self, what: str) -> float:
        """CPUs that are free afterwards."""
        self.head.stdin.write(f"{what}\n")
        self.head.stdin.flush()
        return json.loads(self._line())["CPU"]

    def _line(self) -> str:
        assert select.select([self.head.stdout], [], [], 90)[0], "Ray did not start"
        return self.head.stdout.readline().strip()

    def close(self) -> None:
        with self.head:
            self.head.stdin.close()
            try:
                self.head.wait(30)
            finally:
                self.head.kill()
        until(lambda: not processes_with(self.place))
        shutil.rmtree(self.place, ignore_errors=True)


def processes_with(text: str) -> list[str]:
    """Command lines on this machine that hold a text."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(place.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if text in line and "pytest" not in line]


def until(done, seconds=60.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


WORKER, TRAINER = "ray::RolloutWorker", "ray::train_rank"  # what Ray calls these processes, whatever they do


def at_work(cluster: Cluster, *titles: str) -> list[int]:
    """Process ids of the rollout workers (or of what is asked for) on a cluster."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            title = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            if title.startswith(titles or WORKER) and cluster.place in Path(f"/proc/{parent}/cmdline").read_text():
                found.append(int(place.name))
    return found

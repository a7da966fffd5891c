"""Real processes on the loopback interface, each with a time limit, ended by their own ids."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(words, tmp_path, name, **variables):
    with open(tmp_path / f"{name}.log", "w") as log:
        return subprocess.Popen(words, env={**ENVIRONMENT, **variables}, stdout=log, stderr=subprocess.STDOUT)


def ended(processes, limit_s):
    """Exit codes, once all have ended; whatever still runs after the limit is killed, and has None."""
    deadline = time.monotonic() + limit_s
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(timeout=max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                process.kill()
                process.wait(timeout=10)
    return codes


def ranks_of(program, tmp_path, *arguments, size=2, limit_s=150):
    """Run one program of this folder on several ranks; their exit codes and what they said."""
    port = str(free_port())
    common = dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    words = [sys.executable, "-W", "error", str(HERE / program), str(tmp_path), *map(str, arguments)]
    processes = [start(words, tmp_path, f"rank{n}", RANK=str(n), LOCAL_RANK=str(n), **common) for n in range(size)]
    codes = ended(processes, limit_s)
    return codes, [(tmp_path / f"rank{n}.log").read_text() for n in range(size)]


def torchrun(tmp_path, *words, size=2, limit_s=90):
    """`keel` under torchrun: its exit code and what was said."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-addr", "127.0.0.1"]
    process = start([*run, "--master-port", str(free_port()), "-m", "keel", *map(str, words)], tmp_path, "torchrun")
    try:
        return process.wait(timeout=limit_s), (tmp_path / "torchrun.log").read_text()
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its own workers
            process.wait(timeout=40)

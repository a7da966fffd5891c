"""Pairs of ranks that exchange something and end at once, many times. Exit code: how many of them did not end well.

What keeps a process group alive past its end (a sharded policy does) is held on purpose, and the interpreter is told to hand itself
over late, so that a thread which needs it to let go of a tensor would have to ask when it is ending.
"""

import os
import sys

import torch
import torch.distributed as dist

from keel.training import ranks

TIMES = 12


def one(rank, folder, number):
    sys.setswitchinterval(100.0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{number}", rank=rank, world_size=2)
    held.append(dist.group.WORLD)
    together = ranks.Ranks(rank, 2, sharded=True)
    assert together.gather(lambda: rank) == [0, 1]
    dist.destroy_process_group()


held = []
bad = 0
for number in range(TIMES):
    pair = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            one(rank, sys.argv[1], number)
            sys.exit(0)
        pair.append(child)
    bad += any(os.waitpid(child, 0)[1] for child in pair)
sys.exit(bad)

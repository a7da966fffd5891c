"""What each of two ranks has of a sharded policy after a run: in processes that were together before it, and that it brought together."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import keel
from keel.parts import trained_policy

SMALL = {
    "steps": 1, "quiet": True, "task": "arithmetic:easy", "train.prompts_per_step": 3, "train.group_size": 4,
    "evaluation.prompts": 3, "evaluation.samples": 1, "evaluation.every": 0, "evaluation.standard_panel": False,
    "train.parallel": "fsdp",
}  # fmt: skip


def norms(policy):
    return {name: float(weight.detach().double().norm()) for name, weight in policy.weights().items()}


folder, rank = Path(sys.argv[1]), os.environ["RANK"]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
together = keel.train("solid", out=str(folder / "together"), **SMALL)
told = {"kept": norms(together.policy), "read": norms(trained_policy(together.folder))}
dist.destroy_process_group()
parted = keel.train("solid", out=str(folder / "parted"), **SMALL)
told |= {"parted": parted.policy, "read again": norms(trained_policy(parted.folder))}
torch.save(told, folder / f"after-{rank}.pt")

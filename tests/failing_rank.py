"""A process of a group that fails: ``failing_rank.py RuntimeError|SystemExit``."""

import atexit
import builtins
import sys
import time

import torch

from finetuning.training.trainer import process_group_left

if __name__ == "__main__":
    kind = getattr(builtins, sys.argv[1])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    atexit.register(time.sleep, 600)  # as NCCL's end of the group waits for ranks that wait for this one
    try:
        with process_group_left():
            raise kind
    except kind:
        print("recorded", end="")

"""How many processor cores are this process's to use."""

import os


def share_of_cores() -> int:
    """This rank's share of the cores: with torchrun every rank of a machine starts workers."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    linux = hasattr(os, "sched_getaffinity")  # which knows the cores that a process may use
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, cores // ranks)

"""How many processor cores are this process's to use."""

import os


def share_of_cores() -> int:
    """This rank's share of the cores: with torchrun every rank of a machine starts workers."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks)

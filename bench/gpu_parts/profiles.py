"""Which kernels a call launches, by torch's profiler; on a CPU: which operations."""

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.lines import gpu, sync


def kernels_of(call) -> tuple[Counter, Counter]:
    """How often each kernel ran in call(), and for how many us."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu()
    with profile(activities=kinds) as profiled:
        call()
        sync()
    number, us = Counter(), Counter()
    for event in profiled.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == gpu():
            number[event.key] += event.count
            own = event.self_device_time_total if gpu() else event.self_cpu_time_total
            us[event.key] += own
    return number, us


def ranking(number: Counter, us: Counter, calls: int = 1) -> dict:
    """For a line: of one of `calls` all kernels, and those that took longest."""
    top = [[name[:90], number[name] / calls, us[name] / calls] for name, _ in us.most_common(25)]
    return {"launches": sum(number.values()) / calls, "us": sum(us.values()) / calls, "top": top}

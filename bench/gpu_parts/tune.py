"""How to cut the kernels' work: attention of one token, by keys at a time, parts, warps, stages.

28 layers in a CUDA graph, so that caches are read from memory as in a step. A first round of
processes compiles, since a compiler takes longer than all measurements.
"""

import os
from itertools import product

import torch

from gpu_parts.lines import device, gpu, sync, timed
from sampling.attention import KVCache

SHAPES = {"1.5B": (12, 2, 128), "0.5B": (14, 2, 64)}  # heads, key-value heads, size of a head
WORKLOADS = ((64, 448), (256, 448), (1, 448), (16, 448), (64, 2048), (8, 4096))  # rows, tokens
CUTS = [  # keys, warps, stages
    cut for cut in product((32, 64, 128), (2, 4, 8), (2, 3, 4)) if cut not in ((128, 8, 4),)
]
PARTS = (1, 2, 4, 8, 16, 32)
LAYERS = 28


def tune(part):
    from fast import cuda_kernels

    jobs = [(shape, parts) for shape in SHAPES for parts in PARTS]
    compile_all(jobs if gpu() else [], cuda_kernels)
    for shape in SHAPES:
        for rows, tokens in WORKLOADS if gpu() else ((2, 70),):
            part.measure(f"{shape} {rows} rows of {tokens}", best, cuda_kernels, shape, rows, tokens,
                         needs=3)  # fmt: skip


def compile_all(jobs: list, kernels) -> None:
    """Each in one of some processes, which leave what they compile in Triton's cache."""
    children = []
    for number in range(14):
        child = os.fork()
        if child == 0:
            try:
                for shape, parts in jobs[number::14]:
                    for cut in CUTS:
                        try:
                            attempt(kernels, shape, 1, 64, parts, cut)
                        except Exception:
                            pass
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def attempt(kernels, shape: str, rows: int, tokens: int, parts: int, cut, layers: int = 1):
    """A call of all layers with this cut; what it reads is made once, outside."""
    heads, kv_heads, size = SHAPES[shape]
    dtype = torch.bfloat16 if gpu() else torch.float32
    like = torch.empty(1, kv_heads, 1, size, device=device(), dtype=dtype)
    cache = KVCache(rows, tokens + 8, torch.device(device()))
    for layer in range(layers):
        for store in cache.stores(layer, like, like):
            store.normal_()
    table = torch.zeros(2 * layers + 1, dtype=torch.int64, device=device())
    kernels.fill(table, cache)
    joined = torch.randn(rows, heads + 2 * kv_heads, size, device=device(), dtype=dtype)
    q, k, v = joined.split([heads, kv_heads, kv_heads], 1)
    cos = torch.ones(rows, size, device=device(), dtype=dtype)
    position = torch.full((rows,), tokens - 1, device=device())
    idle = torch.zeros(rows, dtype=torch.bool, device=device())

    def call():
        for layer in range(layers):
            kernels.attend(table, layer, q, k, v, cos, cos, position, idle, 0.1)

    keys, kernels.WARPS, kernels.STAGES = cut
    kernels.BLOCK = keys * like.itemsize
    kernels.PROGRAMS = parts * rows * kv_heads
    call()
    sync()
    return call, cache


def best(kernels, shape: str, rows: int, tokens: int) -> dict:
    """us a layer of each cut, the ten best first, and of what is the default."""
    before = kernels.BLOCK, kernels.WARPS, kernels.STAGES, kernels.PROGRAMS
    kv_heads, found = SHAPES[shape][1], []
    layers = LAYERS if gpu() else 1
    default = min(kernels.MOST_PARTS, max(1, kernels.PROGRAMS // (rows * kv_heads)))
    usual = (before[0] // (2 if gpu() else 4), before[1], before[2])
    cuts = [(usual, 1 << (default.bit_length() - 1))]
    cuts += [(cut, p) for cut in CUTS for p in PARTS if rows * kv_heads * p <= 4096 or p == 1]
    try:
        for cut, parts in cuts if gpu() else cuts[:2]:
            try:
                call, cache = attempt(kernels, shape, rows, tokens, parts, cut, layers)
                found.append((micros(call, layers), cut, parts))
            except Exception as error:
                found.append((1e9, cut, parts, repr(error)[:80]))
    finally:
        kernels.BLOCK, kernels.WARPS, kernels.STAGES, kernels.PROGRAMS = before
    heads, kv_heads, size = SHAPES[shape]
    floor = rows * tokens * kv_heads * size * 2 * 2
    ranked = sorted(found, key=lambda row: row[0])
    by_parts = {p: min((f for f in found if f[2] == p), default=None) for p in PARTS}
    return {"default": found[0], "best": ranked[:10], "by_parts": by_parts, "bytes": floor,
            "TB_s": floor / ranked[0][0] / 1e6, "all": found}  # fmt: skip


def micros(call, layers: int) -> float:
    if not gpu():
        return 1e6 * timed(call, 1, 0) / layers
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return 1e6 * timed(graph.replay, 5, 1) / layers

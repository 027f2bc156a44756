"""Into how many parts attention of one token is best cut, and how many keys are read at a time.

28 layers in a CUDA graph, so that caches come from memory, as in a step. No part of the default
run: for cards that cuda_kernels.py's constants were not chosen on.
"""

from importlib import import_module
from itertools import product

import torch

from gpu_parts.lines import device, gpu, once, timed
from sampling.attention import KVCache

SHAPES = {"1.5B": (12, 2, 128), "0.5B": (14, 2, 64)}  # heads, key-value heads, size of a head
WORKLOADS = ((64, 448), (256, 448), (16, 448), (1, 448), (64, 2048), (8, 8192))  # rows, tokens
CUTS = tuple(product((64, 128, 256), (64, 128, 256, 1024)))  # BLOCK, PROGRAMS


def tune(part):
    if not gpu():
        return part.skip("tune", "it takes a GPU")
    for shape, (rows, tokens) in product(SHAPES, WORKLOADS):
        part.section(f"{shape} {rows} rows of {tokens}", compared, part, shape, rows, tokens)


def compared(part, shape: str, rows: int, tokens: int) -> None:
    """us a layer of each cut, a line each: compiling takes longer than all the rest."""
    kernels, call = import_module("fast.cuda_kernels"), layers_of(shape, rows, tokens)
    usual, done = (kernels.BLOCK, kernels.PROGRAMS), set()
    try:
        for kernels.BLOCK, kernels.PROGRAMS in CUTS:
            cut = kernels.BLOCK // 2, kernels.parts_of(rows * SHAPES[shape][1])
            if cut not in done:
                label = f"{shape} {rows} rows of {tokens}, {cut[0]} keys, {cut[1]} parts"
                part.measure(label, micros, call, rows * tokens * SHAPES[shape][2] * 8, needs=4)
            done.add(cut)
    finally:
        kernels.BLOCK, kernels.PROGRAMS = usual


def layers_of(shape: str, rows: int, tokens: int, layers: int = 28):
    """Attention of all layers, as a function."""
    heads, kv_heads, size = SHAPES[shape]
    kind = {"device": device(), "dtype": torch.bfloat16}
    attend, cache = import_module("fast.cuda_kernels"), KVCache(rows, tokens + 8, device())
    for layer in range(layers):
        for store in cache.stores(layer, *[torch.empty(1, kv_heads, 1, size, **kind)] * 2):
            store.normal_()
    table = torch.zeros(2 * layers + 1, dtype=torch.int64, device=device())
    attend.fill(table, cache)
    joined = torch.randn(rows, heads + 2 * kv_heads, size, **kind)
    q, k, v = joined.split([heads, kv_heads, kv_heads], 1)
    cos, position = torch.ones(rows, size, **kind), torch.full((rows,), tokens - 1, device=device())
    where = (q, k, v, cos, cos, position, torch.zeros_like(position, dtype=torch.bool), 0.1)

    def call(cache=cache):  # which lives as long as this does
        for layer in range(layers):
            attend.attend(table, layer, *where)

    return call


def micros(call, needed: int, layers: int = 28) -> dict:
    once(call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    us = 1e6 * timed(graph.replay) / layers
    return {"us": us, "TB_s": needed / us / 1e6}

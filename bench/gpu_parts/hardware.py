"""What the machine has, which kernels torch chooses, and the best that they reach."""

import subprocess
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as tf
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.lines import device, gpu, once, timed, wrong
from sampling.attention import ragged_mask

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
SHAPES = {  # rows, key-value heads, queries of each, keys, head size, dtype, whether masked
    "decode bf16": (64, 2, 6, 512, 128, torch.bfloat16, True),
    "decode fp32": (64, 2, 6, 512, 128, torch.float32, True),
    "prefill bf16": (8, 2, 6 * 200, 256, 128, torch.bfloat16, True),
    "scorer bf16": (8, 12, 500, 500, 128, torch.bfloat16, False),
    "tiny fp32": (64, 4, 1, 64, 24, torch.float32, True),
}
TOOLS = (
    "gcc --version",
    "cc --version",
    "nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw --format=csv",
)


def header() -> dict:
    """Triton compiles what starts its kernels, which takes it and a C compiler."""
    return wrong(Python_h=Path(sysconfig.get_path("include"), "Python.h").exists())


def env(part):
    """Versions and flags; which attention torch chooses for our shapes."""
    part.measure("versions", versions)
    part.measure("attention", chosen)
    for command in TOOLS:
        part.measure(command.split()[0], said, command)
    part.measure("Python.h", header)


def versions() -> dict:
    found = {"torch": torch.__version__, "transformers": tf.__version__}
    found |= {"matmul": torch.get_float32_matmul_precision(), "cuda": torch.version.cuda}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if gpu():
        found |= {"card": torch.cuda.get_device_name(), "nccl": str(torch.cuda.nccl.version())}
        found |= {"cudnn": torch.backends.cudnn.version()}
        found |= {"capability": torch.cuda.get_device_capability()}
        found |= {"free_total_GiB": [size / 2**30 for size in torch.cuda.mem_get_info()]}
    return found


def chosen() -> dict:
    """By torch alone: in ours cuDNN is switched off."""
    found = {}
    for name, (n, heads, Q, K, size, dtype, masked) in SHAPES.items():
        query = torch.zeros(n, heads, Q, size, device=device(), dtype=dtype)
        key = torch.zeros(n, heads, K, size, device=device(), dtype=dtype)
        mask = torch.zeros(n, 1, Q, K, device=device(), dtype=dtype) if masked else None
        number = torch._fused_sdp_choice(query, key, key, mask, 0.0, not masked)
        found[name] = BACKENDS.get(number, number)
    return found


def said(command: str) -> dict:
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        return {"skipped": "it is not there"}
    return {"says": done.stdout[:200]}


def ceilings(part):
    """Bandwidth and arithmetic, of which all shares are."""
    size = 2**31 if gpu() else 2**22
    x = torch.randn(size // 4, device=device())
    y = torch.empty_like(x)
    part.measure("copy", lambda: {"TB_s": 2 * size / timed(lambda: y.copy_(x)) / 1e12})
    part.measure("read", lambda: {"TB_s": size / timed(x.sum) / 1e12})
    for dtype, n in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        part.measure(f"product {dtype}", product, n if gpu() else 256, dtype)


def product(n: int, dtype) -> dict:
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    return {"n": n, "TFLOP_s": 2 * n**3 / timed(lambda: a @ b, 10) / 1e12}


KINDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(part):
    """Decoding's attention without our kernels: a call's time, and a new shape's first call."""
    for rows in (64, 1, 256) if gpu() else (2,):
        for name, kind in KINDS.items():
            if name in ("cudnn", "efficient") and not gpu():
                part.skip(f"{rows} rows {name}", "it takes a GPU")
                continue
            part.measure(f"{rows} rows {name}", attention, rows, kind, needs=3)


def attention(rows: int, kind, heads=2, group=6, width=512, size=128) -> dict:
    """Of the shape of Qwen2.5-1.5B, over a cache with room for 640 tokens; 28 calls in a graph."""
    half = {"device": device(), "dtype": torch.bfloat16}
    query = torch.randn(rows, heads, group, size, **half)
    key, value = (torch.randn(rows, heads, 640, size, **half)[:, :, :width] for _ in range(2))
    positions = torch.full((rows, 1), 500, device=device())
    mask = ragged_mask(positions, width, group, None, query.dtype)

    def call():
        with sdpa_kernel(kind) if kind is not None else nullcontext():
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    found = {"first_ms": 1e3 * once(call)}
    if gpu():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(28):
                call()
        each = timed(graph.replay, 10) / 28
    else:
        each = timed(call)
    needed = 2 * rows * heads * width * size * 2  # bytes of keys and values
    return found | {"us": 1e6 * each, "TB_s": needed / each / 1e12}

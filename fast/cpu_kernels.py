"""cpu_kernels.c from Python: two operations of a decoding step on CPU, compiled on first use.

For a few rows torch's products with weights, oneDNN's packed ones too, don't overlap reading and
computing, and its batched products of one query reach half the bandwidth and read every row as far
as the longest. Both are float32; for another type, and without a compiler, fused.py takes torch's,
which are the tests' twins.
"""

import ctypes
import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.attention import require

SOURCE = Path(__file__).with_suffix(".c")
MANY = 128  # rows from which on torch's products are as good as those without panels
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {
    "linear": [POINTER] * 4 + [INTEGER] * 3,
    "linear_in_place": [POINTER] * 4 + [INTEGER] * 3,
    "attend": [POINTER] * 3 + [INTEGER] * 3 + [POINTER] * 7 + [INTEGER] * 3 + [ctypes.c_float],
}


def _build(*sizes: str):
    with TemporaryDirectory() as folder:
        made, linked = f"{folder}/cpu_kernels.o", f"{folder}/cpu_kernels.so"
        # Linked without OpenMP, so that it runs on torch's own threads: two pools would fight for
        # the cores. Without -ffast-math too, with which loading it would make the whole process
        # flush denormals.
        steps = (
            ["cc", *FLAGS, *sizes, "-c", SOURCE, "-o", made],
            ["cc", "-shared", made, "-o", linked, "-lm"],
        )
        for step in steps:
            subprocess.run(step, check=True, capture_output=True)
        return ctypes.CDLL(linked)


@cache
def compiled(group: int, head: int):
    """cpu_kernels.c for heads of size `head`, `group` of which share keys and values.

    None, and a warning, where there is no C compiler.
    """
    try:
        library = _build(f"-DGROUP={group}", f"-DHEAD={head}")
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")[-500:]
        fault = f"cpu_kernels.c can't be compiled: {error} {said}"
        warnings.warn(f"sampling on CPU will be slower, since {fault}", stacklevel=2)
        return None
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def linear(library, weight: Tensor, bias: Tensor | None) -> Callable:
    """x (..., K) -> x times weight (N, K) as it is now, plus bias (N,): (..., N). All float32."""
    (N, K), width = weight.shape, INTEGER.in_dll(library, "panel_width").value
    pad = -N % width
    panels = F.pad(weight, (0, 0, 0, pad)).view(-1, width, K).transpose(1, 2).contiguous()
    bias = weight.new_zeros(N + pad) if bias is None else F.pad(bias, (0, pad))

    def forward(x):
        x = x.float().contiguous()  # autocast may have made it bfloat16
        y = x.new_empty(*x.shape[:-1], N)
        pointers = (t.data_ptr() for t in (x, panels, bias, y))
        library.linear(*pointers, x.numel() // K, K, N)
        return y

    return forward


def linear_in_place(library, weight: Tensor, bias: Tensor | None) -> Callable:
    """The same with the weight where it is, contiguous, for one of which there is no room for two.

    A step of 16 rows takes a third longer than with panels, one of 48 a sixth; but to make panels
    takes as long as seven such steps, at every turn.
    """
    N, K = weight.shape
    added = weight.new_zeros(N) if bias is None else bias

    def forward(x):
        x = x.float().contiguous()
        count = x.numel() // K
        if count > MANY:
            return F.linear(x, weight, bias)
        y = x.new_empty(*x.shape[:-1], N)
        pointers = (t.data_ptr() for t in (x, weight, added, y))
        library.linear_in_place(*pointers, count, K, N)
        return y

    return forward


def one_query(library, cache, cos, sin, positions, scale, layer: int, query, key, value) -> Tensor:
    """Rotate, write to the cache, attend: (n, 1, heads * D).

    query (n, 1, heads, D), key and value (n, 1, kv_heads, D), heads of a row side by side; cos and
    sin (n, 1, D), positions (n, 1); all float32. `cache` is a KVCache that aims at these rows.
    ValueError for another dtype or device: C would write where it must not.
    """
    n, _, heads, size = query.shape
    stores = cache.stores(layer, key.transpose(1, 2), value.transpose(1, 2))
    keys, values = (store[cache.rows] for store in stores)
    floats = (query, key, value, cos, sin, keys, values)
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in floats)
    changed = "was the model changed between two turns?"
    require(plain, f"the cache or the model is not float32 on CPU: {changed}")
    out, scratch = query.new_empty(n, 1, heads * size), query.new_empty(n, heads, cache.capacity)
    new, rest = (query, key, value), (cos, sin, positions, keys, values, scratch, out)
    pointers = [t.data_ptr() for t in new], [t.stride(0) for t in new], [t.data_ptr() for t in rest]
    library.attend(*sum(pointers, []), n, key.shape[2], cache.capacity, scale)
    return out

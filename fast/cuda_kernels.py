"""A decoding step's small operations on CUDA, as Triton kernels.

What torch launches for a layer is 24 kernels for each token, most of which take longer to start
than to run; here it is nine. Attention reads of each row what is there and no more: rows have
lengths, no mask, and one that is done reads nothing. Where the cache lies is read from a table in
memory, so that a CUDA graph of a step holds for any cache.

On CPU they run in Triton's interpreter (TRITON_INTERPRET=1), for the tests; their twins are
`_attention` and what `fuse` does without kernels.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # by the bytes of a number: keys read at a time, 64 of bfloat16 or 32 of float32
PROGRAMS = 128  # up to which attention is cut, about one a multiprocessor of an H100
MOST_PARTS = 32  # of one row's keys
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which has no products of bfloat16


@triton.jit
def _rotated(x, at, real, cos, sin, HALF: tl.constexpr):
    """Both halves of heads at x + at, turned against each other; in the type that they have."""
    left = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    right = tl.load(x + at + HALF, mask=real, other=0.0).to(tl.float32)
    kind = x.dtype.element_ty
    return (left * cos - right * sin).to(kind), (right * cos + left * sin).to(kind)


@triton.jit
def _own_token(
    left, right, key, value, cos, sin, keys, values, place, own, scale,
    HALF: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keeps a token's key and value, if `own` is true: (most, total, acc) of them, or of none.

    left, right: halves of its queries (HEADS, TILE); key, value: where its own are; keys, values:
    where the row's are kept. From there nobody reads them in this launch, which has no order.
    """
    half, wide = tl.arange(0, TILE), tl.arange(0, WIDE)
    k_left, k_right = _rotated(key, half, half < HALF, cos, sin, HALF)
    v = tl.load(value + wide, mask=wide < 2 * HALF, other=0.0)
    kept = tl.where(own, HALF, 0)
    tl.store(keys + place * 2 * HALF + half, k_left, mask=half < kept)
    tl.store(keys + place * 2 * HALF + HALF + half, k_right, mask=half < kept)
    tl.store(values + place * 2 * HALF + wide, v, mask=wide < 2 * kept)
    score = tl.sum(left.to(tl.float32) * k_left.to(tl.float32), 1)
    score += tl.sum(right.to(tl.float32) * k_right.to(tl.float32), 1)
    most = tl.where(own, score * scale, -float("inf"))
    total = tl.where(own, 1.0, 0.0) + tl.zeros([HEADS], tl.float32)
    acc = tl.where(own, v.to(tl.float32), 0.0)[None, :]
    acc += tl.zeros([HEADS, WIDE], tl.float32)
    return most, total, acc


@triton.jit
def _earlier_tokens(
    left, right, keys, values, begin, end, most, total, acc, scale, KIND: tl.constexpr,
    HALF: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(most, total, acc) with keys and values begin, ..., end - 1 beside what there is.

    In one pass (Milakov and Gimelshein 2018): most is the largest score so far, total the sum of
    exp(score - most), acc (HEADS, WIDE) that of exp(score - most) * value. Both are multiplied by
    exp(most - higher) when most grows to higher.
    """
    half, wide = tl.arange(0, TILE), tl.arange(0, WIDE)
    kind = left.dtype
    left, right = left.to(KIND), right.to(KIND)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < end
        at = keys + j[None, :] * 2 * HALF + half[:, None]
        seen = there[None, :] & (half[:, None] < HALF)
        k_left = tl.load(at, mask=seen, other=0.0).to(KIND)  # (TILE, BLOCK) each
        k_right = tl.load(at + HALF, mask=seen, other=0.0).to(KIND)
        scores = tl.dot(left, k_left, input_precision="ieee")  # (HEADS, BLOCK)
        scores = tl.dot(right, k_right, scores, input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        keep, p = tl.exp(most - higher), tl.exp(scores - higher[:, None])
        seen = there[:, None] & (wide[None, :] < 2 * HALF)
        v = tl.load(values + j[:, None] * 2 * HALF + wide[None, :], mask=seen, other=0.0)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(kind).to(KIND), v.to(KIND), acc * keep[:, None], input_precision="ieee")
        most = higher
    return most, total, acc


@triton.jit(do_not_specialize=("layer",))  # or some numbers would be compiled by themselves
def _attend(
    query, key, value, query_row, key_row, value_row,  # *_row: from one row to the next
    cos, sin, position, idle, table, layer, layers, out, weight, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """softmax(scale * q K^T) V of one row, the GROUP heads of one key-value head, one part of keys.

    acc / total is this part's answer. It weighs as total * exp(most), whose logarithm is kept, so
    that `_join` can make one of them all (which is known as flash-decoding).
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place, done = tl.load(position + row), tl.load(idle + row).to(tl.int32)
    half, wide = tl.arange(0, TILE), tl.arange(0, WIDE)  # powers of two, as tiles have to be
    heads = tl.arange(0, HEADS)  # and 16 at least, as products want them
    angles = row * 2 * HALF + half
    c = tl.load(cos + angles, mask=half < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + angles, mask=half < HALF, other=0.0).to(tl.float32)
    mine = row * query_row + (head * GROUP + heads[:, None]) * 2 * HALF + half
    real = (heads[:, None] < GROUP) & (half < HALF)
    left, right = _rotated(query, mine, real, c[None, :], s[None, :], HALF)  # (HEADS, TILE)

    kind = query.dtype.element_ty
    capacity = tl.load(table + 2 * layers)
    first = (row * KV_HEADS + head) * capacity * 2 * HALF
    keys = tl.load(table + 2 * layer).to(tl.pointer_type(kind)) + first
    values = tl.load(table + 2 * layer + 1).to(tl.pointer_type(kind)) + first
    keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)  # or reads are narrow
    key += row * key_row + head * 2 * HALF
    value += row * value_row + head * 2 * HALF
    own = (part == 0) & (done == 0)
    most, total, acc = _own_token(
        left, right, key, value, c, s, keys, values, place, own, scale, HALF, HEADS, TILE, WIDE
    )

    count = tl.where(done == 0, place, 0)  # keys before the token's own
    each = tl.cdiv(tl.cdiv(count, PARTS), BLOCK) * BLOCK  # of a part: whole blocks
    begin = part * each
    end = tl.minimum(begin + each, count)
    most, total, acc = _earlier_tokens(
        left, right, keys, values, begin, end, most, total, acc, scale, KIND,
        HALF, TILE, WIDE, BLOCK,
    )  # fmt: skip

    answer = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)  # 0 of no keys at all
    at = (row * KV_HEADS + head) * GROUP + heads  # of all rows' heads
    to = out + (at[:, None] * PARTS + part) * 2 * HALF + wide[None, :]
    fine = heads < GROUP
    tl.store(to, answer, mask=fine[:, None] & (wide[None, :] < 2 * HALF))
    if PARTS > 1:
        tl.store(weight + at * PARTS + part, most + tl.log(total), mask=fine)


@triton.jit
def _join(answers, weights, out, SIZE: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """One head's answer from those of its parts: their mean, each weighing exp(weight)."""
    at, part, wide = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, WIDE)
    weight = tl.load(weights + at * PARTS + part)
    weight = tl.exp(weight - tl.maximum(tl.max(weight, 0), -1e30))  # no key at all: all are 0
    rows = (at * PARTS + part)[:, None] * SIZE + wide[None, :]
    answer = tl.load(answers + rows, mask=(wide < SIZE)[None, :], other=0.0)
    total = tl.sum(answer * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1e-30)
    tl.store(out + at * SIZE + wide, total, mask=wide < SIZE)


@triton.jit
def _add_norm(x, y, weight, out, eps, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """x += y, and out = x / sqrt(mean(x^2) + eps) * weight, of one row."""
    i = tl.arange(0, WIDE)
    at, real = tl.program_id(0).to(tl.int64) * SIZE + i, i < SIZE
    total = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    total += tl.load(y + at, mask=real, other=0.0).to(tl.float32)
    total = total.to(x.dtype.element_ty)  # rounded, as it is kept
    tl.store(x + at, total, mask=real)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps)
    scale *= tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, total * scale, mask=real)


@triton.jit
def _gated(gate_up, out, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """out = gate / (1 + exp(-gate)) * up, of a stretch of one row."""
    i = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row, real = tl.program_id(0).to(tl.int64), i < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + i, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, gate * tl.sigmoid(gate) * up, mask=real)


def power_of_two(number: int, least: int = 16) -> int:
    """The smallest one from `number` and `least` on."""
    return max(least, 1 << (number - 1).bit_length())


def parts_of(programs: int) -> int:
    """Into how many parts the keys of a row are cut, if there are so many rows and heads."""
    parts = max(1, min(MOST_PARTS, PROGRAMS // programs))
    return 1 << (parts.bit_length() - 1)  # a power of two, as a tile of them has to be


def attend(table, layer, query, key, value, cos, sin, position, idle, scale) -> Tensor:
    """Rotate, write to the cache, attend over it: (n, heads * D).

    query (n, heads, D), key and value (n, kv_heads, D), heads of a row side by side; cos and sin
    (n, D); position and idle (n,): where the token stands, and whether its row is done, which then
    is left as it is, and has zeros. table: of `fill`, (2 * layers + 1,).
    """
    n, kv_heads, size = key.shape
    group, parts = query.shape[1] // kv_heads, parts_of(n * kv_heads)
    kind = torch.float32 if INTERPRETED else query.dtype
    out = query.new_empty(n, query.shape[1] * size)
    answers, weights = out, out
    if parts > 1:
        answers = out.new_empty(n * query.shape[1], parts, size, dtype=torch.float32)
        weights = answers.new_empty(answers.shape[:2])
    strides = (x.stride(0) for x in (query, key, value))
    where = (cos, sin, position, idle, table, layer, len(table) // 2)
    wide = power_of_two(size)
    shapes = {"KV_HEADS": kv_heads, "GROUP": group, "HALF": size // 2, "PARTS": parts}
    shapes |= {"HEADS": power_of_two(group), "TILE": power_of_two(size // 2), "WIDE": wide}
    shapes |= {"BLOCK": BLOCK // query.itemsize}
    shapes |= {"KIND": getattr(tl, str(kind).removeprefix("torch."))}
    grid = (n, kv_heads, parts)
    _attend[grid](query, key, value, *strides, *where, answers, weights, scale, **shapes)
    if parts > 1:
        _join[(len(answers),)](answers, weights, out, SIZE=size, WIDE=wide, PARTS=parts)
    return out


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (n, H) += y, in place, and its RMS norm (n, H)."""
    out, size = torch.empty_like(x), x.shape[1]
    _add_norm[(len(x),)](x, y, weight, out, eps, SIZE=size, WIDE=power_of_two(size))
    return out


def gated(gate_up: Tensor) -> Tensor:
    """Both halves of gate_up (n, 2 F), side by side -> silu(gate) * up (n, F)."""
    n, size = len(gate_up), gate_up.shape[1] // 2
    out, wide = gate_up.new_empty(n, size), min(1024, power_of_two(size))
    _gated[(n, triton.cdiv(size, wide))](gate_up, out, SIZE=size, WIDE=wide)
    return out


def fill(table: Tensor, cache) -> None:
    """Where a KVCache is: keys and values of each layer, and how many slots a row has."""
    stores = [store.data_ptr() for _, stores in sorted(cache.layers.items()) for store in stores]
    table.copy_(torch.tensor([*stores, cache.capacity]))

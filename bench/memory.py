"""Memory of a rank, and what a run takes on disk, by arithmetic: tables of some models.

    python bench/memory.py

The formula is the one at the head of training/models.py, written again in the same letters.
measure_memory.py holds it against steps that ran.
"""

from typing import NamedTuple

# Logits at a time, of `loss.token_scores`: of a CPU, and of a GPU of 80 GB.
CHUNK, LARGE_CHUNK = 2**24, 2**27
COPIED = 2**32  # bytes of weights up to which fast/fused.py copies them on a CPU


class Shape(NamedTuple):
    """Of a model."""

    N: int  # parameters
    V: int  # words
    H: int  # width
    L: int  # layers
    A: int  # heads
    K: int  # key-value heads
    D: int  # their size
    F: int  # width inside of a feed-forward layer
    tied: bool  # embedding and head are the same

    @property
    def blocks(self) -> int:
        """What of N is in the blocks."""
        return self.N - self.V * self.H * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """n, parameters of adapters of all linear layers."""
        H, heads, shared = self.H, self.A * self.D, self.K * self.D
        return self.L * rank * (2 * (H + heads) + 2 * (H + shared) + 3 * (H + self.F))


class Load(NamedTuple):
    """What a rank works on: what its cache holds, and a micro-batch, of which a step has several.

    SCoRe and RRR, and their numbers of rows and tokens, differ in nothing else.
    """

    cached: int  # t, slots of the cache in the last turn
    before: int  # and in the turn before
    rows: int  # b, decoded together
    fed: int  # p, tokens that are fed at once
    nodes: int  # m, distinct prefixes of a micro-batch
    slots: int  # s, places of its rows, padding included
    scored: int  # u, distinct tokens among them that the loss is about


class How(NamedTuple):
    """By the flags."""

    ranks: int | None = 1  # S, that share one copy; None: one process that is in no group
    lora_rank: int = 0
    c: int = 2  # bytes of a number that it computes with; in no group 4
    checkpointing: bool = True
    cpu: bool = False


SHAPES = {
    "Qwen2.5-0.5B": Shape(494_032_768, 151936, 896, 24, 14, 2, 64, 4864, True),
    "Qwen2.5-1.5B": Shape(1_543_714_304, 151936, 1536, 28, 12, 2, 128, 8960, True),
    "Qwen2.5-7B": Shape(7_615_616_512, 152064, 3584, 28, 28, 4, 128, 18944, False),
    "Llama-3.1-8B": Shape(8_030_261_248, 128256, 4096, 32, 32, 8, 128, 14336, False),
    "Qwen2.5-32B": Shape(32_763_876_352, 152064, 5120, 64, 40, 8, 128, 27648, False),
    "Llama-3.1-70B": Shape(70_553_706_496, 128256, 8192, 80, 64, 8, 128, 28672, False),
}
RANKS = (1, 2, 4, 8, 16, 32)
LORA_RANK = 16
TOKENS = 2**14  # of a micro-batch; prefixes that rows share make fewer nodes
USUAL = Load(2**17, before=2**17, rows=256, fed=2**13, nodes=TOKENS, slots=TOKENS, scored=TOKENS)


def parts(shape: Shape, load: Load, how: How) -> dict[str, float]:
    """Bytes, by phase: the peak is "always" and the larger of the other two."""
    N, n, S = shape.N, shape.adapters(how.lora_rank), how.ranks or 1
    whole = how.c * N if how.ranks and not how.lora_rank else 0  # a copy to sample from
    stays = 0 if how.cpu else whole + 12 * shape.V * load.rows  # where CUDA graphs find it
    return {
        "always": how.c * N + 12 * n / S if how.lora_rank else 16 * N / S,
        "sampling": whole + sampling(shape, load, how),
        "updating": stays + updating(shape, load, how),
    }


def sampling(shape: Shape, load: Load, how: How) -> float:
    """Without the weights that are sampled from: the larger of two moments, late and early."""
    N, V, H, L, _, K, D, F, _ = shape
    token, head = 2 * how.c * L * K * D, V * H
    adapters = 2 * how.c * shape.adapters(how.lora_rank)  # as the sampler joins them
    piece = 4 * min(CHUNK, head) if how.cpu and how.c == 2 else 0  # of it in float32: no GPU's
    decoding = max(12 * V * load.rows, 4 * V * load.rows + piece)
    late = token * load.cached + max(decoding, 4 * how.c * F * load.fed)
    if not how.cpu or how.c == 2 or 4 * N > COPIED:
        return adapters + late
    # fast/cpu_kernels.c has the weights once more, made a layer at a time, the head last
    return adapters + 4 * (shape.blocks + head) + max(late, token * load.before + 8 * head)


def kept_by_block(shape: Shape, load: Load, how: How) -> float:
    """What one block keeps of a micro-batch for its backward pass."""
    _, _, H, _, A, K, D, F, _ = shape
    norm = 4 + (1 if how.lora_rank else 2) * how.c  # of H: input, scaled, and times a weight
    node = 2 * norm * H + how.c * (A * D + 4 * F + 7 * how.lora_rank)
    return node * load.nodes + 2 * how.c * (A + K) * D * load.slots


def updating(shape: Shape, load: Load, how: How) -> float:
    """The largest of three moments: at the logits, in a block's backward pass, and at its end."""
    N, V, H, L, _, _, _, F, tied = shape
    c, m, n = how.c, load.nodes, shape.adapters(how.lora_rank)
    spread = how.ranks is not None and not how.lora_rank
    root = c * (N - shape.blocks) * spread  # embedding and head, gathered
    block = shape.blocks / L * spread
    head = 0 if how.lora_rank else c * V * H  # its gradient
    own = kept_by_block(shape, load, how)
    kept = (c * H * m if how.checkpointing else own) * L + (4 + 2 * c) * H * m + 2 * root
    # autograd adds up the head's gradient of several chunks, old and new, into a third
    most = CHUNK if how.cpu else LARGE_CHUNK
    logits, several = 4 * min(most, load.scored * V), load.scored * V > most
    chunk = max(5 * logits + several * head, 3 * several * head)
    moments = (
        kept + 4 * c * H * load.scored + chunk + c * block,
        kept + own * how.checkpointing + 2 * c * F * m + tied * head + (3 * c + 4) * block,
        2 * root + (3 if tied else 1 + spread) * head + 4 / c * root,
    )
    gradients = 4 * (n if how.lora_rank else N) / (how.ranks or 1)
    gathered = 2 * c * n if how.ranks else 0
    return gradients + max(moments) + gathered


def gib(shape: Shape, load: Load, how: How) -> float:
    """At the peak."""
    of = parts(shape, load, how)
    return (of["always"] + max(of["sampling"], of["updating"])) / 2**30


def rows_of(header: tuple, rows: list[tuple]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def table() -> str:
    """All weights trained."""
    rows = []
    for name, shape in SHAPES.items():
        rows.append((name, *(f"{gib(shape, USUAL, How(ranks)):.0f}" for ranks in RANKS)))
    return rows_of(("GiB a GPU", *(f"{n} GPU{'s' * (n > 1)}" for n in RANKS)), rows)


def lora_table() -> str:
    """Adapters trained, on one GPU, by phase; and with an eighth of the cache."""
    rows, how, less = [], How(lora_rank=LORA_RANK), USUAL._replace(cached=USUAL.cached // 8)
    for name, shape in SHAPES.items():
        figures = [part / 2**30 for part in parts(shape, USUAL, how).values()]
        figures += [gib(shape, USUAL, how), gib(shape, less, how)]
        rows.append((name, *(f"{figure:.1f}" for figure in figures)))
    first = f"GiB, LoRA of rank {LORA_RANK}"
    peaks = ("at most", f"at most, {less.cached:,} tokens in the cache")
    return rows_of((first, "always", "sampling", "updating", *peaks), rows)


def size(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def disk_table() -> str:
    """Of states and runs, of models published in bfloat16; adapters are saved in float32."""
    rows = []
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B"):
        shape = SHAPES[name]
        kinds = {"": 14 * shape.N}  # weights, two moments, and the best model
        kinds |= {f", LoRA of rank {r}": 16 * shape.adapters(r) for r in (4, LORA_RANK)}
        for kind, state in kinds.items():
            runs = (f"{size(keep * state)} / {size((keep + 1) * state)}" for keep in (2, 1))
            rows.append((name + kind, size(state), *runs))
    runs = ("a run, `--keep 2` (default): lasting / at most", "`--keep 1`: lasting / at most")
    return rows_of(("on disk", "a state", *runs), rows)


if __name__ == "__main__":
    print(table(), lora_table(), disk_table(), sep="\n\n")

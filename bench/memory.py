"""Memory of a rank by the arithmetic of training/models.py, as a table of some models and ranks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Of a model, in the letters of the docstring."""

    N: float  # parameters
    V: int
    H: int
    L: int
    K: int
    D: int
    tied: bool


SHAPES = {
    "Qwen2.5-1.5B": Shape(1.54e9, 151936, 1536, 28, 2, 128, True),
    "Qwen2.5-7B": Shape(7.62e9, 152064, 3584, 28, 4, 128, False),
    "Qwen2.5-32B": Shape(32.8e9, 152064, 5120, 64, 8, 128, False),
    "Llama-3.1-70B": Shape(70.6e9, 128256, 8192, 80, 8, 128, False),
}
RANKS = (1, 2, 4, 8, 16, 32)
CACHED, SCORED = 2**17, 2**14  # tokens: of a rank's conversations, of a micro-batch


def parts(shape: Shape, ranks: int, cached: int, scored: int, c: int = 2) -> dict[str, float]:
    """Bytes, by phase."""
    N, V, H, L, K, D, tied = shape
    embedding = V * H * (1 if tied else 2)
    gathered = 3 * c * embedding + 5 * c * N / L
    logits, activations = 24 * 2**24, c * (L + 34) * H * scored
    return {
        "always": 16 * N / ranks,
        "sampling": c * N + 2 * c * L * K * D * cached,
        "updating": 4 * N / ranks + gathered + logits + activations,
    }


def gib(shape: Shape, ranks: int, cached: int = CACHED, scored: int = SCORED, c: int = 2) -> float:
    bytes_ = parts(shape, ranks, cached, scored, c)
    return (bytes_["always"] + max(bytes_["sampling"], bytes_["updating"])) / 2**30


def table() -> str:
    lines = ["| GiB a GPU | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in RANKS) + " |"]
    lines += ["|---" * (len(RANKS) + 1) + "|"]
    for name, shape in SHAPES.items():
        lines.append(f"| {name} | " + " | ".join(f"{gib(shape, n):.0f}" for n in RANKS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""MBPP-R's rows from a model's own wrong programs.

    python bench/make_mbpp_r.py EVALUATION.json MBPP.jsonl OUT.jsonl

EVALUATION.json is what `evaluate.py --task mbpp --output` wrote, of any model; every wrong first
attempt with a program in it becomes the given first attempt of an offline repair problem.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from verifiers import extract_code  # noqa: E402


def main(evaluation: str, mbpp: str, out: str) -> None:
    if Path(out).exists():
        sys.exit(f"{out} exists: name a new file")
    rows = {row["text"]: row for row in map(json.loads, Path(mbpp).read_text().splitlines())}
    made = []
    for talk in json.loads(Path(evaluation).read_text())["conversations"]:
        first = talk["attempts"][0]
        if not first["right"] and (program := extract_code(first["text"])):
            made.append(rows[talk["problem"]["text"]] | {"first_attempt": program})
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in made))
    print(f"{len(made)} problems: {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} EVALUATION.json MBPP.jsonl OUT.jsonl")
    main(*sys.argv[1:])

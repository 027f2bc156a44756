"""What is said of conversations and runs: figures, tables, pictures. No model here.

| file        | what                                                                              |
|-------------|-----------------------------------------------------------------------------------|
| figures.py  | what is counted and averaged: `values_of` one conversation, `summarize`, `votes`  |
| tables.py   | the same as Markdown, and conversations as text                                   |
| curves.py   | `curves.png` of a run, from its metrics.jsonl                                     |
| growth.py   | how time grows with size, for `bench/bench_growth.py`                             |
| style.py    | how every picture looks: a colour for each method, names at the lines' ends       |

The pictures of the papers' argument are drawn in this style by `bench/papers/pictures.py`.
"""

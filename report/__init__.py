"""What is said of conversations and runs: figures, tables, pictures. No model here.

figures.py   what is counted and averaged: `values_of` one conversation, `summarize`, `votes`
tables.py    the same as Markdown, and conversations as text
curves.py    curves.png of a run, from its metrics.jsonl
style.py     how every picture looks: one colour and one name for each method and attempt
"""

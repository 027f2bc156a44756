"""What sampler.py and the scorer stand on; the way of a batch through it is in sampler.py.

rollout.py    Rollout, what is sampled and trained on; `rollout_of` makes one of given ids
draws.py      random numbers that depend on a row's own seed and position, tokens from logits
attention.py  attention functions put under a transformers model; the key-value cache
adapters.py   LoRA: low-rank adapters beside a model's linear layers, on for a while
turns.py      messages to ids: a first prompt, and the seam between two turns
checks.py     what the sampler refuses, and why
steps.py      what a block of decoding steps works on; CUDA graphs of them
"""

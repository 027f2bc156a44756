"""What bench/gpu.py measures; each part is a function of a `lines.Part`.

lines.py     where results go: one measurement, one line; clocks
models.py    random models of real sizes, prompts, samplers
hardware.py  env, ceilings, sdpa: what torch has and chooses, and the best that it reaches
correct.py   correct, kernels: what must be right before a number means anything
decode.py    decode, hf: a step of our sampler, and of model.generate
update.py    update: gradients and optimizer, of all weights and of adapters
runs.py      resume, train: whole runs of score.py
"""

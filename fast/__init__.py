"""Speed, and nothing else: delete this folder, and all but its own tests pass, slower.

fused.py        the forward pass of Llama-like models, without transformers' modules, and what
                stands against it for a model
cpu_kernels.py  compiles cpu_kernels.c on first use: products with weights, attention of one query

Only sampler.py looks in here.
"""

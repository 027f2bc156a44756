"""Speed, and nothing else: delete this folder, and all but its own tests pass, slower.

paths.py        which of these a model can take on this machine
fused.py        the forward pass of Llama-like models, without transformers' modules, and what
                stands against it for a model
cpu_kernels.py  compiles cpu_kernels.c on first use: products with weights, attention of one query
cuda_step.py    a decoding step on CUDA, on memory that stays, so that it can be a CUDA graph
cuda_kernels.py what that takes of Triton: attention of one query, what stands between products
cuda_draw.py    and what draws its tokens
cuda_update.py  norms and gates of an update on CUDA, and whether its loss's kernels are right
cuda_loss.py    these: what the loss needs of all logits

Only sampler.py looks in here, training/scorer.py through it, and the benches of what is in it.
"""

"""Loading a causal language model, and making of it the policy that is trained.

Bytes of memory that a rank needs, of a model with N parameters, V words, width H, F inside of a
feed-forward layer, L layers of A heads and K key-value heads of size D, for S ranks that share one
copy (all, or with --hsdp those of a copy), computing in c bytes (bfloat16: 2). E = V H are
embedding and head (untied 2 V H), B = (N - E) / L is a block:

    always      (4 + 8 + 4) N / S        weights, Adam's moments, the reference: float32
    sampling    c N  +  2 c L K D t      a whole copy; the cache of t slots
                12 V b  or  4 c F p      logits of b rows, or what p tokens fed at once make; the
                                         larger one
    updating    4 N / S                  gradients
                2 c E  +  (4 + 2 c) H m  embedding and head of both models; the last norm of the m
                                         nodes of a micro-batch
                L a  or  c L H m         what blocks keep; with --checkpointing their inputs only
      and then  5 * 4 * C  +  c V H   or  3 c V H
                4 c H u  +  c B          C logits: a chunk, in float32, and what is made of it,
                                         beside the head's gradient of those before; or that, added
                                         up. Hidden states of the u tokens of the loss
      or        2 c F m  +  c V H  +  (3 c + 4) B  +  with --checkpointing  a
                                         a block's backward pass (untied without c V H)
    or, at its end, after 4 N / S only   2 c E  +  3 c V H  +  4 E  (untied 2 c V H)

    a = 2 (4 + 2 c) H m  +  c (A D + 4 F) m  +  2 c (A + K) D s
                                         norms, the rest; and attention, where rows are whole: s
                                         places, padding included

With --lora_rank r, n = L r (2 (H + A D) + 2 (H + K D) + 3 (H + F)) parameters of adapters are all
that is trained, and one whole copy of the weights is sampled from, policy and reference: always
c N + 12 n / S, gradients 4 n / S; no other copy, no E, B or V H; norms keep 4 + c in place of
4 + 2 c, adapters 7 c r m, and each phase makes 2 c n of them. One process that is in no group
computes in float32 with the very weights that it trains: no copy of them, no 2 c E, 4 E or B. On a
CPU the sampler copies float32 weights of up to 2^32 bytes (fast/fused.py).

C is 2^24 on a CPU, on a GPU of 80 GB 2^27 (`loss.logits_at_once`). There, while CUDA graphs know
their place, the whole copy and the logits of b rows stay when it comes to updating, too; and with
fast/'s kernels norms, gates and logits keep less than this says (of 1.5B 8 GiB, measured).

The peak is the first line and the larger phase. bench/memory.py prints it for some models, and
bench/measure_memory.py measures it: SCoRe and RRR differ in t, b, p, m, s and u alone.
"""

import copy
import hashlib
from pathlib import Path

import torch
from torch import nn

from training import checkpoint, distributed, lora
from training.scorer import Scorer

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ("*.safetensors", "*.bin")


def check_flags(config) -> None:
    """ValueError for flags that make no sense together, or with this number of processes."""
    hsdp = getattr(config, "hsdp", 1)  # evaluate.py trains nothing, and lacks most of these
    adapters, others = getattr(config, "lora_rank", None), ("reflector", "beside")
    names = [config.model, *filter(None, (getattr(config, name, None) for name in others))]
    if hsdp > 1 and not distributed.launched():
        raise ValueError(f"--hsdp {hsdp}: needs torchrun, and so many ranks or a multiple of them")
    if distributed.world() % hsdp:
        raise ValueError(f"--hsdp {hsdp} does not divide the {distributed.world()} ranks")
    if adapters and config.cpu_offload:
        raise ValueError("--cpu_offload: leave it out, with --lora_rank weights stay whole")
    if getattr(config, "compile", False):
        check_compiler()
    if getattr(config, "lora_merged", False) and not adapters:
        raise ValueError("--lora_merged: there are no adapters to be merged: give --lora_rank")
    if config.base and not any(lora.is_adapter(path_of(name)) for name in names):
        raise ValueError(
            f"--base {config.base}: --model {config.model} is no directory of adapters"
        )


def check_compiler() -> None:
    """ValueError where torch.compile does not work: it takes a C compiler, and Python's headers."""
    step = torch.compile(lambda x: 2 * x + 1)
    try:
        step(torch.ones(2, device=distributed.device()))
    except Exception as error:  # of Inductor, Triton, or the compiler itself
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            "--compile: torch.compile does not work here; leave the flag out, or install a C++ "
            f"compiler (g++) and Python's headers (python3-dev): {reason}"
        ) from None


def compute_dtype(config) -> torch.dtype:
    """What the models compute in; ValueError if that takes a group, and there is none."""
    dtype = distributed.compute_dtype(config)
    if dtype != torch.float32 and not distributed.together():
        raise ValueError(f"--dtype {config.dtype}: distributed.start(config) has to come first")
    return dtype


def load_model(name: str, device=None, dtype: torch.dtype = torch.float32, base=None):
    """(model, tokenizer) of a local directory or a hub name, in eval mode (no dropout, ever).

    A directory of adapters gives its base model with the adapters merged in; base: where that is,
    if not where the adapters say. In a group the first rank reads it, and every rank gets a whole
    copy in `dtype`.
    """
    source, tokenizer = read_model(name, base)
    if distributed.together():
        model = cast(skeleton(source), dtype)
        materialise(model, distributed.device())
        distributed.send(source, model)
    else:
        model = source.to(device or distributed.device())
    check_head(model, name)
    return model, tokenizer


def read_model(name: str, base: str | None = None):
    """(model on the CPU in float32, tokenizer); on all ranks but the first it has no values."""
    models = []

    def read():
        model, tokenizer = _read_files(name, base)
        models.append(model)
        return model.config, model.generation_config, model.saved_dtype, tokenizer

    *build, tokenizer = distributed.on_first(read)
    return models[0] if models else _without_values(*build), tokenizer


def path_of(name: str) -> Path:
    """Of a model: the embedded one, say, is found wherever a script is started from."""
    return Path(name) if Path(name).exists() or not (ROOT / name).exists() else ROOT / name


def whereabouts(name: str) -> str:
    """A model's name that holds from anywhere: in the project, on this machine, or on the hub."""
    path = path_of(name).resolve()
    if not path.exists():
        return name
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _read_adapted(path: Path, base: str | None):
    origin = base or lora.base_of(path)
    try:
        model, tokenizer = _read_files(origin)
    except ValueError as error:
        raise ValueError(
            f"--model {path} has adapters of {origin}; give --base DIR if that is elsewhere: "
            f"{error}"
        ) from None
    lora.merge(model, path, fingerprint(model))
    return model, tokenizer


def _read_files(name: str, base: str | None = None):
    path = path_of(name)
    if lora.is_adapter(path):
        return _read_adapted(path, base)
    looks_local = path.exists() or name.startswith((".", "/", "models/", "runs/"))
    if looks_local and not (path / "config.json").is_file():
        remedy = "give a Hugging Face model directory"
        if (path.parent / "states").is_dir():
            remedy = "its run has none yet: go on with it, --resume and --max_minutes leave one"
        raise ValueError(f"--model {name}: no config.json there; {remedy}")
    if looks_local and not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        raise ValueError(
            f"--model {name}: no weights there (*.safetensors); was the directory copied whole?"
        )
    source = str(path) if path.exists() else name
    # only here, since it takes seconds, which --help and a misspelt flag should not
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" on every load
    try:
        if not path.exists():
            ask_hub(name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        published = AutoConfig.from_pretrained(source).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return ready(model, published), tokenizer
    except Exception as error:  # whatever a damaged file or an unknown name makes of itself
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = "" if path.exists() else "no such directory here, and the hub: "
        raise ValueError(f"--model {name} can't be loaded: {where}{reason[:300]}") from None


def ask_hub(name: str) -> None:
    """Raises at once what the hub has against a name; loading would try again for a minute."""
    from huggingface_hub import model_info, try_to_load_from_cache

    if try_to_load_from_cache(name, "config.json") is None:
        model_info(name, timeout=10)


def skeleton(model):
    """Another model of the same build, all shapes and no values."""
    saved_dtype = getattr(model, "saved_dtype", model.dtype)
    return _without_values(model.config, model.generation_config, saved_dtype)


def _without_values(config, generation_config, saved_dtype):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.generation_config = generation_config
    return ready(model, saved_dtype)


def ready(model, saved_dtype: torch.dtype):
    """In eval mode, and every word learns; checkpoints are saved as the model was published.

    An embedding drops the gradient of its `padding_idx`, which is often the very token that ends a
    turn; no padding is ever fed that it could spare.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    model.saved_dtype = saved_dtype
    return model.eval()


def cast(model, dtype: torch.dtype):
    """The model, its parameters in `dtype`; not its buffers, which are float32 in every model.

    `model.to(dtype)` would round those too, and with them the angles of rotary positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def materialise(module: nn.Module, device, buffer_device=None) -> None:
    """Memory for a module that has no values, which it does not set. Tied weights stay tied."""
    names = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name.rpartition("."))
    module.to_empty(device=device)
    for (first, _, weight), *others in names.values():
        for owner, _, name in others:
            setattr(module.get_submodule(owner), name, getattr(module.get_submodule(first), weight))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(buffer_device or device))


def make_scorer(model, config, reference: bool = True) -> Scorer:
    """The policy to be trained, which starts as the whole `model`, and its frozen reference.

    In a group both are spread over the ranks, in float32, and `model` keeps being a copy of the
    whole policy to sample from: gathered again after each update, for which it is given up unless
    CUDA graphs know its place.
    With --lora_rank adapters are trained, and spread, alone: every rank needs whole weights to
    sample from, and they do for the update too.
    """
    how = {"checkpointing": config.checkpointing, "compiled": config.compile}
    if config.lora_rank:
        adapters = lora.make(model, config.lora_rank, config.seed)
        own = getattr(config, "reference", "base") == "stage1"
        ref_adapters = copy.deepcopy(adapters) if own else None
        frozen = model if reference else None
        scorer = Scorer(model, frozen, adapters, ref_adapters, **how)
        if distributed.together():
            distributed.shard(scorer, [], compute_dtype(config), config.hsdp, whole=model)
        return scorer
    if not distributed.together():
        frozen = copy.deepcopy(model) if reference else None
        return Scorer(model, frozen, **how)
    distributed.drop_weights(model)
    source, _ = read_model(config.model, config.base)  # again, since `model` may be rounded
    models, device = [skeleton(source) for _ in range(1 + reference)], distributed.device()
    scorer = Scorer(*models, **how)
    distributed.shard(scorer, models, compute_dtype(config), config.hsdp, config.cpu_offload)
    materialise(scorer, "cpu" if config.cpu_offload else device, device)
    distributed.send(source, *models)
    del source  # of the first rank, before the next whole copy
    distributed.gather_weights(scorer.model, model)
    return scorer


def hand_over(scorer: Scorer, sampler) -> None:
    """What is sampled from is what is trained: `sampler` gets the weights of now."""
    if not distributed.together():
        sampler.adapters = scorer.adapters  # a full model is the same one anyway
    elif scorer.adapters is None:
        distributed.gather_weights(scorer.model, sampler.model)
    else:
        sampler.adapters = lora.whole(scorer.adapters, sampler.model.dtype)


def save_policy(scorer: Scorer, sampler, config, path: Path) -> None:
    """What is trained, collected by the first rank: a model directory, or one of adapters.

    With --lora_merged adapters make a model directory too, and always on top of other adapters:
    what they belong to is no model of its own.
    """
    model, tensors = sampler.model, None
    dtype = model.saved_dtype if scorer.adapters is None else torch.float32
    if distributed.together() or scorer.adapters is not None:
        whole = distributed.whole_tensors(scorer.trained)
        pairs = ((name, x.to("cpu", dtype)) for name, x in whole)
        tensors = {name: x if distributed.rank() == 0 else None for name, x in pairs}
    if scorer.adapters is None:
        save = checkpoint.save_model, model, sampler.tokenizer, path, tensors
    elif config.lora_merged or lora.is_adapter(path_of(config.model)):
        save = _save_merged, sampler, config, path, tensors
    else:
        save = lora.save, tensors, path, whereabouts(config.model), fingerprint(model)
    distributed.on_first(*save)


def _save_merged(sampler, config, path: Path, tensors: dict) -> None:
    model = sampler.model
    if model.dtype != torch.float32:  # rounded, and its base need not be
        model, _ = _read_files(config.model, config.base)
    weights = {k: w.detach() for k, w in model.named_parameters()}
    for name, weight in lora.merged(model, tensors):
        weights[name] = weight.to(model.saved_dtype)
    checkpoint.save_model(model, sampler.tokenizer, path, weights)


@torch.no_grad()
def check_head(model, name: str) -> None:
    """Refuses models that scale or cap their logits after the head: `token_scores` does not."""
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if not torch.allclose(logits, model(input_ids=ids).logits, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"--model {name}: its logits are not hidden @ head.T (a cap, scale or bias); "
            "not supported"
        )


def fingerprint(model) -> str:
    """Of the weights: the beginning of every parameter, byte by byte.

    As bfloat16, so that copies to compute in different dtypes have the same.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        beginning = parameter.detach().flatten()[:256].cpu().to(torch.bfloat16).float()
        digest.update(name.encode() + beginning.numpy().tobytes())
    return digest.hexdigest()

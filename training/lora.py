"""Adapters (sampling/adapters.py) made, saved in PEFT's format, read, and merged into weights."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from sampling.adapters import ALPHA, Adapters
from training import checkpoint, distributed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
BASE = "base_fingerprint"  # in the metadata of WEIGHTS: of the model that they belong to
# What an adapter_config.json may not ask for: it would be another sum than W + scale * B A.
REFUSED = (
    *("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern"),
    *("alpha_pattern", "layer_replication", "megatron_config", "trainable_token_indices"),
)
HARMLESS = (True, False, None, "gaussian", "orthogonal")  # ways to begin that leave the base alone


def linear_layers(model) -> dict[str, nn.Linear]:
    """{name: layer}, those in the model's blocks; ValueError if their weights are elsewhere too."""
    blocks, found, others = getattr(model.get_decoder(), "layers", nn.ModuleList()), {}, []
    inside = {id(module) for module in blocks.modules()}
    for name, module in model.named_modules():
        if id(module) in inside and type(module) is nn.Linear:
            found[name] = module
        elif id(module) in inside:
            own = module.named_parameters(recurse=False)
            others += [f"{name}.{key}" for key, weight in own if weight.ndim > 1]
    if others or not found:
        where = f"{others[0]} is no linear layer" if others else "its blocks have no linear layers"
        raise ValueError(f"--lora_rank: {type(model).__name__} can't have adapters: {where}")
    return found


def count(model, rank: int) -> int:
    """Parameters of adapters of this rank."""
    layers = linear_layers(model).values()
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def make(model, rank: int, seed: int) -> Adapters:
    """New ones, float32, that add nothing yet: B is zero. The same on all ranks."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in linear_layers(model).items():
        bound = layer.in_features**-0.5
        A = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        key = name.replace(".", "/")
        tensors |= {f"{key}.A": A, f"{key}.B": torch.zeros(layer.out_features, rank)}
    return Adapters.of(tensors).to(model.device)


def whole(adapters: Adapters, dtype: torch.dtype) -> Adapters:
    """Those that may be spread over ranks, frozen, to sample with."""
    copies = {name: tensor.to(dtype) for name, tensor in distributed.whole_tensors(adapters)}
    return Adapters.of(copies).requires_grad_(False)


def save(tensors: dict[str, Tensor], path: Path, base: str, fingerprint: str) -> None:
    """A directory in PEFT's format, complete or not at all.

    tensors: of Adapters, by name; base, fingerprint: directory or hub name of the model that they
    belong to, and what it is known by.
    """
    from safetensors.torch import save_file

    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    named = {_peft_name(name): tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, fresh / WEIGHTS, {BASE: fingerprint})
    layers = {name.rpartition(".")[0].rpartition("/")[2] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(len(t) for name, t in tensors.items() if name.endswith(".A")),
        "lora_alpha": ALPHA,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    checkpoint.write_text(fresh / CONFIG, json.dumps(config, indent=2) + "\n")
    shutil.copymode(fresh / CONFIG, fresh / WEIGHTS)
    checkpoint.publish(fresh, path)


def _peft_name(name: str) -> str:
    layer, _, matrix = name.rpartition(".")
    return f"base_model.model.{layer.replace('/', '.')}.lora_{matrix}.weight"


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def base_of(path: Path) -> str:
    """The base model's directory or hub name, as the adapter's config has it."""
    return _config(path)["base_model_name_or_path"]


def _config(path: Path) -> dict:
    try:
        config = json.loads((path / CONFIG).read_text())
        known = config["r"] > 0 and config["lora_alpha"] > 0 and config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} is not one of adapters: {error!r}") from None
    asked = [name for name in REFUSED if config.get(name)]
    asked += ["init_lora_weights"] if config.get("init_lora_weights", True) not in HARMLESS else []
    if not known or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        asked += ["another method than LoRA, or a bias"]
    if asked:
        what = ", ".join(asked)
        raise ValueError(f"{path / CONFIG} asks for {what}: not supported, merge it with peft")
    return config


def read(path: Path, model, fingerprint: str) -> tuple[Adapters, float]:
    """(adapters of a directory in PEFT's format, what they are scaled with) for `model`.

    ValueError if they don't fit it, or were trained on a model with another fingerprint, as far as
    they say.
    """
    from safetensors import safe_open

    config, file = _config(path), path / WEIGHTS
    try:
        with safe_open(file, "pt", device=str(model.device)) as opened:
            base = (opened.metadata() or {}).get(BASE, fingerprint)
            found = {name: opened.get_tensor(name) for name in opened.keys()}
    except Exception as error:  # whatever a missing or damaged file makes of itself
        raise ValueError(f"{file} can't be read: {type(error).__name__}: {error}") from None
    if base != fingerprint:
        raise ValueError(
            f"{path} belongs to another base model than this one: name its own with --base DIR"
        )
    tensors = {}
    for name, layer in linear_layers(model).items():
        sizes = {"A": (config["r"], layer.in_features), "B": (layer.out_features, config["r"])}
        keys = {matrix: f"{name.replace('.', '/')}.{matrix}" for matrix in sizes}
        pair = {keys[m]: found.pop(_peft_name(keys[m]), None) for m in sizes}
        if all(pair[keys[m]] is not None and pair[keys[m]].shape == sizes[m] for m in sizes):
            tensors |= pair
        elif any(tensor is not None for tensor in pair.values()):
            raise ValueError(f"{file} does not fit this model: the adapters of {name}")
    if found or not tensors:
        other = next(iter(found), "it is empty")
        raise ValueError(f"{file} has adapters for no layer of this model: {other}")
    return Adapters.of(tensors), config["lora_alpha"] / config["r"]


def merge(model, path: Path, fingerprint: str) -> None:
    """Adds the adapters of a directory to the weights of `model`."""
    adapters, scale = read(path, model, fingerprint)
    for name, weight in merged(model, dict(adapters.named_parameters()), scale):
        model.get_parameter(name).data.copy_(weight)


@torch.no_grad()
def merged(model, tensors: dict[str, Tensor], scale: float | None = None):
    """(name, W + scale * B A) of each adapted layer of `model`, computed in float32, one at a time.

    tensors: of Adapters, by name; scale: ALPHA / r by default, as they are trained.
    """
    for key in [name.removesuffix(".A") for name in tensors if name.endswith(".A")]:
        name = f"{key.replace('/', '.')}.weight"
        weight = model.get_parameter(name)
        A, B = (tensors[f"{key}.{m}"].to(weight.device, torch.float32) for m in "AB")
        by = ALPHA / len(A) if scale is None else scale
        yield name, torch.addmm(weight.float(), B, A, alpha=by)

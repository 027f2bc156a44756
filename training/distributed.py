"""Many processes: which one this is, what they tell each other, weights spread over them (FSDP2).

`torchrun` starts them. Without it there is one, which forms a group by itself where it is to
compute in another dtype than its weights have (on a GPU, say); else everything here does nothing.
All that ranks must agree on goes through `exchange`, so that control flow never depends on one
rank's data: a rank that went its own way would leave the others waiting. It is also where a run
that was told to stop (SIGTERM, Ctrl-C) stops, on all ranks at the same place.
"""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

HEARD = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others


class Stopped(BaseException):
    """The run was told to stop; while it trains every rank has come to the same place.

    No Exception, so that nothing swallows it. Its argument is the signal.
    """

    def __str__(self) -> str:
        return f"stopped by {HEARD[self.args[0]]}"

    @property
    def code(self) -> int:
        """The exit code, as a shell would report it."""
        return 128 + self.args[0]


class _Interrupted(BaseException):
    """This rank was told to stop, in the midst of work that may be left undone."""


_told = 0  # the signal that came
_may_stop = False  # it may end this very line
_inside = False  # we are within `interruptible`


def start(config=None) -> None:
    """Joins the other processes that torchrun has started, or forms a group of one if it is needed.

    That is for computing in bfloat16, and for --cpu_offload; weights spread over one rank are
    float32 then as over many. Only the first one says anything on stdout; at once in a log file
    too, and whatever its encoding lacks.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no need of it
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    if dist.is_initialized() or not (launched() or groups_alone(config)):
        return
    backend, alone = "gloo", {}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if not launched():  # nobody to meet: no address, no port
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        atexit.register(leave)  # however it ends: NCCL complains of groups that are left behind
    dist.init_process_group(backend, timeout=PATIENCE, **alone)
    if rank():
        sys.stdout = open(os.devnull, "w")


def launched() -> bool:
    """Whether torchrun has started this process, be it the only one."""
    return "WORLD_SIZE" in os.environ


def groups_alone(config) -> bool:
    """Whether one process needs a group, by the flags of a script that has --dtype."""
    if config is None:
        return False
    return getattr(config, "cpu_offload", False) or compute_dtype(config) != torch.float32


def compute_dtype(config) -> torch.dtype:
    """What the models compute in: what --dtype says, else bfloat16 on GPUs and float32 on a CPU."""
    usual = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, config.dtype or usual)


def finish() -> None:
    if dist.is_initialized():
        dist.barrier()
        leave()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def together() -> bool:
    """Whether this process belongs to a group, be it of one: its weights are spread over ranks."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def share(count: int) -> range:
    """Which of `count` things are this rank's: neighbours, as many as any other's or one off."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def exchange(x=None) -> list:
    """Every rank's x, in order, on every rank.

    A run that was told to stop raises Stopped here, on all of them.
    """
    global _may_stop
    before, _may_stop = _may_stop, False
    parts = [(x, _told)] * world()
    if world() > 1:
        dist.all_gather_object(parts, (x, _told))
    told = max(told for _, told in parts)
    if _inside and told:
        raise Stopped(told)
    _may_stop = before
    return [x for x, _ in parts]


def gather(rows: Tensor) -> Tensor:
    """All ranks' rows (dim 0), in order."""
    return torch.cat(exchange(rows)) if world() > 1 else rows


def own(rows: Tensor, count: int) -> Tensor:
    """This rank's rows of what `gather` would give: `count` of them."""
    counts = exchange(count)
    first = sum(counts[: rank()])
    return rows[first : first + count]


def on_first(function, *arguments):
    """function(...) on the first rank alone: all get its result, or raise what it raises."""
    result = error = None
    if rank() == 0:
        try:
            result = function(*arguments)
        except Exception as e:
            error = e
    result, error = exchange((result, error))[0]
    if error is not None:
        raise error
    return result


@contextmanager
def listening():
    """Within it SIGTERM and Ctrl-C don't kill: they ask for an end where `interruptible` says.

    A second one exits at once.
    """

    def hear(number, _):
        global _told
        if _told:
            os._exit(128 + number)
        _told = number
        if _may_stop:
            raise _Interrupted

    global _told
    before = {number: signal.signal(number, hear) for number in HEARD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        told, _told = _told, 0
    if told:  # after the last place to stop at
        os.kill(os.getpid(), told)


@contextmanager
def interruptible():
    """Around work that may be left undone: a signal to any rank ends it, with Stopped on all.

    It ends at once on the rank that was told, on the others where ranks next meet.
    """
    global _may_stop, _inside
    _inside = True
    try:
        try:
            _may_stop = True
            if _told:
                raise _Interrupted
            yield
            _may_stop = False
        except _Interrupted:
            pass
        exchange()  # the others are still at work, or here too: all go on, or none does
    finally:
        _may_stop = _inside = False


def shard(
    module: nn.Module,
    models: list,
    dtype: torch.dtype,
    replicas: int = 1,
    cpu_offload=False,
    whole: nn.Module | None = None,
) -> None:
    """Spreads the weights of `module` over the ranks: each block of its `models`, then the rest.

    Forward and backward gather a block at a time, in `dtype`; weights, gradients and their sum stay
    in float32. Gradients are added up, not averaged: each rank's loss is its part of one sum.
    `replicas` > 1 keeps so many copies, each spread over its own group of neighbours (HSDP: one for
    each node, say). What is in `whole` stays so, on every rank.
    """
    # Here and below only where it is used: to import it takes a second.
    from torch.distributed import fsdp

    shape, names = (world(),), ("shard",)
    if replicas > 1:
        shape, names = (replicas, world() // replicas), ("copy", "shard")
    kind = device().type
    mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=names)
    offload = (
        fsdp.CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else fsdp.OffloadPolicy()
    )
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    how = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    how["ignored_params"] = {*whole.parameters()} if whole is not None else None
    for part in [*(block for model in models for block in model.get_decoder().layers), module]:
        fsdp.fully_shard(part, **how)
    for part in module.modules():
        if isinstance(part, fsdp.FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # else gloo lacks what a factor takes


def is_sharded(tensor) -> bool:
    """Whether it is spread over ranks (a DTensor)."""
    if not together():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def all_tensors(model) -> list[Tensor]:
    """All that a model computes with: parameters, and the buffers that are in no file."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def send(model, *copies) -> None:
    """From the first rank's `model` to all ranks' copies of it, whole or sharded.

    The other ranks have `model` without values. One tensor at a time goes round, so that no rank
    but the first ever holds a whole model for this.
    """
    for source, *targets in zip(all_tensors(model), *map(all_tensors, copies), strict=True):
        if world() == 1:  # nobody to tell, and a shard is the whole
            for target in targets:
                (target.to_local() if is_sharded(target) else target).copy_(source)
            continue
        tensor = torch.empty(source.shape, dtype=source.dtype, device=device())
        if rank() == 0:
            tensor.copy_(source)
        dist.broadcast(tensor, 0)
        for target in targets:
            if is_sharded(target):
                from torch.distributed.tensor import distribute_tensor

                where = target.device_mesh, target.placements
                placed = distribute_tensor(tensor, *where, src_data_rank=None)
                target.to_local().copy_(placed.to_local())
            else:
                target.copy_(tensor)


def whole_tensors(model) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) with all ranks' values, one at a time, on this rank's device; float32."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if is_sharded(tensor):
            local = tensor.to_local().to(device())  # offloaded ones are on the CPU
            where = tensor.device_mesh, tensor.placements
            size = {"shape": tensor.shape, "stride": tensor.stride()}
            tensor = type(tensor).from_local(local, *where, run_check=False, **size).full_tensor()
        yield name, tensor


def gather_weights(sharded, plain) -> None:
    """`plain`, a model of the same build, gets the whole weights, in its own dtype.

    They come where the ones before are, since CUDA graphs know their place; `drop_weights` frees
    them.
    """
    for (_, tensor), parameter in zip(whole_tensors(sharded), plain.parameters(), strict=True):
        if parameter.shape == tensor.shape:
            parameter.data.copy_(tensor)
        else:  # they were dropped
            parameter.data = tensor.to(parameter.dtype)


def drop_weights(plain) -> None:
    for parameter in plain.parameters():
        parameter.data = parameter.data.new_empty(0)

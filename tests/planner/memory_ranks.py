"""What a rank of a small training step really holds, counted tensor by tensor."""

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_ep.config import Config, has_experts, pool_samples
from diffmoe_ep.data.condition import CaptionFeatures, Condition
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import apply_compute, shard_experts, widen_pools
from diffmoe_ep.parallel.mesh import Mesh, init_mesh, launched_world, pool_ranks
from diffmoe_ep.train.ema import Ema
from diffmoe_ep.train.engine import Engine


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of each different storage."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


class Casts(TorchDispatchMode):
    """Remembers the storages that are cast copies of given ones."""

    def __init__(self, sources: set[int]) -> None:
        super().__init__()
        self.sources = sources
        self.copies: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.sources:
            self.copies.append(out)
        return out


def built(config: Config) -> tuple[DiT, Mesh]:
    """This rank's part of the model, with weights that are not zero."""
    local = config.train.micro_step_samples // launched_world()
    ranks = pool_ranks(pool_samples(config), local) if has_experts(config.model) else 1
    mesh = init_mesh(config.parallel.expert_parallel, ranks, 5)
    model = DiT(config.model, config.pool)
    model.compute_type = torch.bfloat16 if config.train.precision == "bf16" else None
    apply_compute(model, config.compute)
    initialize(widen_pools(shard_experts(model, mesh), mesh), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.startswith("head."):
                parameter.normal_(0.0, 0.02)
    return model, mesh


def condition_for(config: Config, num: int) -> Condition:
    """Labels, or captions of several lengths, the null caption among them."""
    if config.model.condition == "class":
        return torch.zeros(num, dtype=torch.int64)
    places = config.model.text_length
    return CaptionFeatures(torch.randn(num, places, config.model.text_width), torch.arange(num) % (places + 1))


def forward_allocates(rank: int, config: Config) -> int:
    """Bytes that a forward and its loss leave allocated, by the allocator's own account."""
    model, _ = built(config)
    shape = (config.train.global_batch, config.model.in_channels, config.model.input_size, config.model.input_size)
    x, t, condition = torch.randn(shape), torch.rand(shape[0]), condition_for(config, shape[0])

    def loss() -> torch.Tensor:
        output = model(x, t, condition)
        return (output.prediction[:, : shape[1]] - x).square().mean() + output.auxiliary

    loss()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = loss()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert kept.requires_grad
    return sum(event.nbytes() for event in events)


def held(rank: int, config: Config) -> dict[str, int]:
    """Bytes of each part on this rank in a training step."""
    model, mesh = built(config)
    local = config.train.micro_step_samples // mesh.size
    engine, zero = Engine(model, config, mesh), config.parallel.zero_stage
    ema = Ema(model, config.train.ema)
    optimizer = engine.optimizer
    found = dict.fromkeys(("gradients", "gradient buckets", "dispatch buffers"), 0)

    exchanged: list[int] = []

    def most(part: str, number: int) -> None:
        found[part] = max(found[part], number)

    def step(watch: bool) -> None:
        torch.manual_seed(rank)
        shape = (local, config.model.in_channels, config.model.input_size, config.model.input_size)
        x, t, condition = torch.randn(shape), torch.rand(local), condition_for(config, local)
        saved: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        casts = Casts(set(storages(model.parameters())))
        if not watch:
            output = engine.forward(x, t, condition)
            loss = output.prediction[:, : config.model.in_channels].square().mean() + output.auxiliary
            engine.backward(loss)
        else:
            with casts, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = engine.forward(x, t, condition)
                loss = (output.prediction[:, : config.model.in_channels] - x).square().mean() + output.auxiliary
            own = set(storages(model.parameters())) | set(storages(model.buffers()))
            copies = set(storages(casts.copies))
            kept = {place: size for place, size in storages(saved.values()).items() if place not in own and size}
            found["activations"] = sum(size for place, size in kept.items() if place not in copies)
            found["bf16 copies"] = sum(size for place, size in kept.items() if place in copies)
            engine.backward(loss)
            if zero:
                reduced = [tensor for part in optimizer.averaged_gradients.values() for tensor in part]
                found["reduced gradients"] = sum(storages(reduced).values())
        engine.step(1e-3)
        ema.update(1)

    step(False)
    reduce, exchange = engine.engine.allreduce_gradients, torch.distributed.all_to_all_single
    reducer = optimizer if zero else engine.engine
    bucket = reducer.allreduce_bucket

    def watched_reduce(*args: Any, **options: Any) -> Any:
        most(
            "gradients",
            sum(storages(p.grad for p in model.parameters() if p.grad is not None).values()) if zero < 2 else 0,
        )
        return reduce(*args, **options)

    def watched_bucket(tensors: Any, *args: Any, **options: Any) -> Any:
        buffers = (
            sum(storages(tensor for found in optimizer.ipg_buckets.values() for tensor in found.buffer).values())
            if zero
            else 0
        )
        most("gradient buckets", buffers + sum(tensor.nbytes for tensor in tensors))
        return bucket(tensors, *args, **options)

    def watched_exchange(out: torch.Tensor, given: torch.Tensor, *args: Any, **options: Any) -> Any:
        if out.is_floating_point():
            exchanged.append(out.nbytes + given.nbytes)
        return exchange(out, given, *args, **options)

    engine.engine.allreduce_gradients, reducer.allreduce_bucket = watched_reduce, watched_bucket
    with mock.patch.object(torch.distributed, "all_to_all_single", watched_exchange):
        step(True)
    found["dispatch buffers"] = sum(exchanged) // max(1, len(exchanged))
    states = [
        value
        for state in engine.inner_optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    masters = optimizer.single_partition_of_fp32_groups if zero else []
    found |= {
        "weights": sum(storages(model.parameters()).values()),
        "master copy": sum(storages(masters).values()),
        "moments": sum(storages(states).values()),
        "EMA": sum(storages(ema.tensors.values()).values()),
    }
    return found

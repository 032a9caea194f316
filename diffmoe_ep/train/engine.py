"""DeepSpeed's engine behind four verbs: forward, backward, step, and the state as fragments of logical tensors.

Weights are float32 at every ZeRO stage (bf16 is a compute type, by autocast inside the model), so they are the master
weights, gradients are reduced in float32, and the stages differ only in who holds the optimizer's state: everyone (0)
or each replica its shard (1, 2).
"""

import logging
import math
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from diffmoe_ep.checkpoint.fragments import Fragment, shard_of
from diffmoe_ep.config import Config, ConfigError, OptimizerConfig
from diffmoe_ep.config.foreign import parse_json, read_bytes
from diffmoe_ep.data.condition import Condition
from diffmoe_ep.model.dit import DiT, Output
from diffmoe_ep.model.parallelize import is_expert, mark_for_deepspeed
from diffmoe_ep.parallel.buckets import REDUCE_BUCKET
from diffmoe_ep.parallel.collectives import all_sum
from diffmoe_ep.parallel.mesh import Mesh

# What a user's own DeepSpeed file may set: how a step is communicated and watched, never what it computes.
USER_KEYS = (
    "zero_optimization", "tensorboard", "wandb", "comet", "csv_monitor", "memory_breakdown", "comms_logger",
    "dump_state",
)  # fmt: skip
# Its timers start in hooks on a model's output that it does not find in ours, and stop all the same: an AssertionError.
BROKEN_KEYS = ("wall_clock_breakdown", "flops_profiler")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # the package that each needs
USER_ZERO_KEYS = ("stage", "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "overlap_comm")


@dataclass(frozen=True)
class OptimizerShard:
    """An interval of a parameter whose optimizer state this rank holds, and where that state lies."""

    name: str  # the parameter's name
    start: int  # first element within this rank's own parameter
    owner: Tensor  # the tensor that the optimizer knows: the parameter itself, or a flat partition
    at: int  # first element within the owner
    numel: int


class Engine:
    """One training engine; all ranks build it together."""

    def __init__(self, model: DiT, config: Config, mesh: Mesh) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls it
        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
        # On CPU, DeepSpeed would compile a shared-memory operator at first use (minutes, and a stale lock hangs every
        # later start).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.mesh = config, mesh
        self.module = mark_for_deepspeed(model.to(mesh.device), mesh)
        # what is trained; frozen parameters are unknown to the optimizer
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not any(is_expert(name) for name in self.named):
            _unmark_frozen_layers(self.module)
        self._clip = config.train.max_grad_norm or math.inf
        self._norm: Tensor | float = 0.0
        self.passed_over = False  # whether the last step moved nothing, its gradients not being finite; on all ranks
        optimizer = _optimizer(self.named, config.train.optimizer)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(config, mesh), dist_init_required=False
        )
        self.inner_optimizer = self.optimizer.optimizer if config.parallel.zero_stage else self.optimizer
        if config.parallel.zero_stage == 0:
            # DeepSpeed's own clipping at stage 0 leaves the other ranks' experts out of the norm.
            self.engine.clip_fp32_gradients = self._clip_gradients
        self._shards = self._find_shards()
        self._check_every_parameter_is_optimized()

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """Run the model in training mode."""
        output: Output = self.engine(x, t, condition)
        return output

    def backward(self, loss: Tensor) -> None:
        """Add a micro-step's gradients; `loss` is the mean over this rank's samples, accumulation is divided here."""
        self.engine.backward(loss)

    def step(self, lr: float) -> None:
        """Close a micro-step; the last one of a step reduces and clips the gradients and moves the weights at `lr`."""
        for group in self.inner_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        last = self.engine.is_gradient_accumulation_boundary()
        self.passed_over = False
        self.engine.step()
        if self.config.parallel.zero_stage:
            self._norm = self.optimizer._global_grad_norm
            self.passed_over = last and bool(self.optimizer.overflow)

    def log_to_monitor(self, metrics: dict[str, Any]) -> None:
        """Write metrics to the monitors that the user's own DeepSpeed file switches on, over samples seen."""
        if self.mesh.is_first and self.engine.monitor.enabled:
            samples = metrics["samples"]
            scalars = {name: value for name, value in metrics.items() if isinstance(value, float)}
            self.engine.monitor.write_events([(f"train/{name}", value, samples) for name, value in scalars.items()])

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients over all parameters and ranks, before clipping; waits for the
        device.
        """
        return float(self._norm)

    @property
    def norm_on_device(self) -> Tensor:
        """The same as a number on the device, waiting for nothing."""
        return torch.as_tensor(self._norm, device=self.mesh.device)

    def _clip_gradients(self) -> None:
        """Clip by the exact global norm at stage 0: dense gradients are equal on all ranks, experts' differ over the
        expert group, so theirs alone are summed over it (collective).
        """
        dense = [p.grad for name, p in self.named.items() if p.grad is not None and not is_expert(name)]
        experts = [p.grad for name, p in self.named.items() if p.grad is not None and is_expert(name)]
        square = all_sum(_square(experts, self.mesh.device), self.mesh.expert) + _square(dense, self.mesh.device)
        self._norm = square.sqrt()
        # ZeRO 1 and 2 do this whether it is set or not, and sum squares in float32
        if self.config.train.skip_nonfinite and not square.float().isfinite():
            self.passed_over = True
            for parameter in self.named.values():
                parameter.grad = None  # what has no gradient is left as it is, with its moments
            return
        # the same formula as DeepSpeed's at stages 1 and 2
        scale = 1 / ((self._norm + 1e-6) / self._clip).clamp(min=1.0)
        torch._foreach_mul_(dense + experts, scale.float())

    # -- state ---------------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a parameter, over all experts."""
        shape = tuple(self.named[name].shape)
        return (shape[0] * self.mesh.expert.size, *shape[1:]) if is_expert(name) else shape

    def moments(self) -> list[Fragment]:
        """This rank's shard of the optimizer's moments, in the parameters' logical shapes; views, so that loading
        writes into them.
        """
        fragments = []
        for shard in self._shards:
            first = self.named[shard.name].numel() * self.mesh.expert.rank if is_expert(shard.name) else 0
            for key in _moments(self.config.train.optimizer):
                state = self.inner_optimizer.state[shard.owner]
                if key not in state:
                    self._init_state(shard.owner)
                data = self.inner_optimizer.state[shard.owner][key].view(-1)[shard.at : shard.at + shard.numel]
                fragment = Fragment(f"optimizer.{key}.{shard.name}", self.shape(shard.name), first + shard.start, data)
                fragments.append(fragment)
        return fragments

    def moments_to_save(self) -> list[Fragment]:
        """The same without repetition: at stage 0 every replica holds all, so each writes one shard."""
        if self.config.parallel.zero_stage:
            return self.moments()
        return [self.shard_to_write(fragment, is_expert(fragment.name)) for fragment in self.moments()]

    def shard_to_write(self, fragment: Fragment, expert: bool) -> Fragment:
        """The part of a replicated fragment that this rank writes."""
        group = self.mesh.replicas if expert else self.mesh.world
        return shard_of(fragment, group.rank, group.size)

    def continue_from(self, step: int, passed_over: int = 0) -> None:
        """After weights and moments were loaded: bring flat copies, step counts and DeepSpeed's counters to `step`, of
        which so many were passed over.
        """
        if self.config.parallel.zero_stage:
            for shard in self._shards:  # the flat float32 copies follow the loaded weights
                shard.owner.data[shard.at : shard.at + shard.numel].copy_(
                    self.named[shard.name].data.view(-1)[shard.start : shard.start + shard.numel]
                )
        if self.config.train.optimizer.kind == "adamw":
            for owner in {id(shard.owner): shard.owner for shard in self._shards}.values():
                self.inner_optimizer.state[owner]["step"].fill_(step - passed_over)
        accumulation = self.config.train.grad_accumulation
        self.engine.global_steps, self.engine.micro_steps = step, step * accumulation
        self.engine.global_samples = step * self.config.train.global_batch

    def _init_state(self, owner: Tensor) -> None:
        """Make an optimizer's state as its own first step would, so that loading has something to write into."""
        state = self.inner_optimizer.state[owner]
        if self.config.train.optimizer.kind == "adamw":
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)
        for key in _moments(self.config.train.optimizer):
            state[key] = torch.zeros_like(owner, memory_format=torch.preserve_format)

    def _find_shards(self) -> list[OptimizerShard]:
        if not self.config.parallel.zero_stage:
            return [OptimizerShard(name, 0, parameter, 0, parameter.numel()) for name, parameter in self.named.items()]
        shards = []
        for name, parameter in self.named.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:  # None: other replicas hold all of it
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                owner = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                shards.append(OptimizerShard(name, here.start, owner, there.start, there.numel))
        return shards

    def _check_every_parameter_is_optimized(self) -> None:
        """Every trainable element must be held by exactly one replica (all of them at stage 0); checked once, at the
        start.
        """
        numel = torch.zeros(len(self.named), dtype=torch.int64, device=self.mesh.device)
        order = {name: index for index, name in enumerate(self.named)}
        for shard in self._shards:
            numel[order[shard.name]] += shard.numel
        if self.config.parallel.zero_stage:
            over_world, over_replicas = all_sum(numel, self.mesh.world), all_sum(numel, self.mesh.replicas)
            numel = torch.stack(
                [(over_replicas if is_expert(name) else over_world)[index] for name, index in order.items()]
            )
        for (name, parameter), found in zip(self.named.items(), numel.tolist(), strict=True):
            if found != parameter.numel():
                raise RuntimeError(
                    f"the optimizer holds {found} of the {parameter.numel()} elements of {name}; "
                    "this is a fault of the engine"
                )


def settings(config: Config, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's settings for a config, with the user's own JSON file merged in; raises ConfigError where that
    contradicts the config.
    """
    micro = config.train.micro_step_samples // mesh.size
    ours: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.grad_accumulation,
        # at stage 0 DeepSpeed must always clip, since it calls our norm there
        "gradient_clipping": config.train.max_grad_norm or (0.0 if config.parallel.zero_stage else 1e30),
        "zero_optimization": {"stage": config.parallel.zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # it would wait for the device before and after every micro-step; `Clock` measures without waiting
        "timers": {"throughput": {"enabled": False}},
    }
    return _merge_settings(ours, _user_settings(config.parallel.deepspeed), config, mesh)


def _user_settings(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        user = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"parallel.deepspeed {path} cannot be read as JSON ({error}); give a DeepSpeed settings file or null"
        ) from error
    if not isinstance(user, dict):
        raise ConfigError(f"parallel.deepspeed {path} holds a {type(user).__name__}, not an object of settings")
    return user


def _merge_settings(ours: dict[str, Any], user: dict[str, Any], config: Config, mesh: Mesh) -> dict[str, Any]:
    where = f"parallel.deepspeed {config.parallel.deepspeed}"
    for key in BROKEN_KEYS:
        if _is_on(user.get(key)):
            raise ConfigError(
                f"{where} switches {key} on, whose timers DeepSpeed never starts for a model that returns more than "
                "tensors; remove it there. log.profile=[10,13] writes a trace of steps 10 to 13, and every line of "
                "metrics.jsonl has samples_per_second and mfu"
            )
    for key, package in MONITORS.items():
        if _is_on(user.get(key)) and mesh.is_first and find_spec(package) is None:
            raise ConfigError(f"{where} switches {key} on, which needs {package}: pip install {package}")
    if _is_on(user.get("wandb")) and config.log.wandb:
        raise ConfigError(f"{where} switches wandb on, and so does log.wandb=true; remove one of them")
    zero = user.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", config.parallel.zero_stage) != config.parallel.zero_stage:
        raise ConfigError(
            f"{where} sets zero_optimization to {zero!r}, but parallel.zero_stage is {config.parallel.zero_stage}; "
            "set the stage with parallel.zero_stage"
        )
    closed = [key for key in user if key not in (*USER_KEYS, *BROKEN_KEYS)] + [
        f"zero_optimization.{key}" for key in zero if key not in USER_ZERO_KEYS
    ]
    if closed:
        raise ConfigError(
            f"{where} sets {closed[0]}, which this config decides or checkpoints cannot follow; remove it there. "
            f"It may set {', '.join(USER_KEYS)}, and in zero_optimization {', '.join(USER_ZERO_KEYS)}"
        )
    return {**ours, **user, "zero_optimization": {**ours["zero_optimization"], **zero}}


def _is_on(section: Any) -> bool:
    """Whether a part of DeepSpeed's settings is switched on: itself, or by its `enabled`."""
    return bool(section.get("enabled") if isinstance(section, dict) else section)


def _unmark_frozen_layers(model: DiT) -> None:
    """Take the marks from the MoE layers where all experts are frozen: ZeRO asks of layers that it sees for experts to
    train.

    Parameters keep theirs, and DeepSpeed is told the groups here instead, so that frozen experts are still those of
    their own ranks.
    """
    for layer in model.moe_layers():
        mark = layer._modules.pop("deepspeed_mark", None)
        if mark is not None:
            mark.set_deepspeed_parallelism()  # type: ignore[operator]


def lr_scale(name: str, config: OptimizerConfig) -> float:
    """The multiple of the learning rate at which a parameter is trained, by its name."""
    if is_expert(name):
        return config.expert_lr_scale
    return config.router_lr_scale if ".router." in name else 1.0


def learning_rates(config: OptimizerConfig, lr: float) -> dict[str, float]:
    """The metrics `lr_experts` and `lr_routers`, each where it is not the common learning rate."""
    scales = {"lr_experts": config.expert_lr_scale, "lr_routers": config.router_lr_scale}
    return {name: lr * scale for name, scale in scales.items() if scale != 1}


def _optimizer(named: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        by_scale.setdefault(lr_scale(name, config), []).append(parameter)
    groups = split_params_into_different_moe_groups_for_optimizer(
        [
            {"params": parameters, "name": f"learning rate times {scale}", "lr_scale": scale}
            for scale, parameters in by_scale.items()
        ]
    )
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _moments(config: OptimizerConfig) -> tuple[str, ...]:
    if config.kind == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum else ()


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(gradients)
    return torch.stack(norms).double().square().sum()

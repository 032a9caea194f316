"""What a cluster is able to do, and what was measured on it: the figures behind every prediction of time and fit.

Rates are what a program achieves, not what a brochure says, except `peak_tflops`, which only utilization (MFU) is
measured by. GB and TB are decimal (1e9, 1e12); links count one direction for one rank.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from diffmoe_ep.config import ConfigError, read_section
from diffmoe_ep.config.knob import NON_NEGATIVE, POSITIVE, knob

MAYBE = (lambda value: value is None or value > 0, "greater than 0, or null")


@dataclass(frozen=True)
class Measurement:
    """Rates measured on a machine; each one that is given takes the place of the cluster file's."""

    device: str = knob("", "what was measured, in words")
    bf16_tflops: float | None = knob(None, "bf16 matmul, large", MAYBE)
    float32_tflops: float | None = knob(None, "float32 matmul, large", MAYBE)
    bandwidth_gbs: float | None = knob(None, "memory: bytes read and written by a copy", MAYBE)
    gelu_gelements: float | None = knob(None, "GELU, tanh form: 1e9 elements a second", MAYBE)
    fresh_gbs: float | None = knob(None, "memory: first writing of what was just got from the system", MAYBE)
    node_gbs: float | None = knob(None, "a rank to the others of its node", MAYBE)
    network_gbs: float | None = knob(None, "a rank to other nodes", MAYBE)
    node_us: float | None = knob(None, "latency of a round inside a node", MAYBE)
    network_us: float | None = knob(None, "latency of a round across nodes", MAYBE)
    launch_us: float | None = knob(None, "what starting one operation costs", MAYBE)

    def save(self, path: str | Path) -> None:
        """Write the measurement where `load_measurement` reads it."""
        Path(path).write_text(
            json.dumps({key: value for key, value in asdict(self).items() if value is not None}, indent=2) + "\n"
        )


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal ranks, one device each."""

    device: str = knob(MISSING, "the device in words")
    kind: Literal["cuda", "cpu"] = knob(MISSING, "what torch calls it; decides the types in which some values are kept")
    nodes: int = knob(MISSING, "machines", POSITIVE)
    ranks_per_node: int = knob(MISSING, "ranks on one machine, one device each", POSITIVE)
    memory_gb: float = knob(MISSING, "memory of one device (on a CPU: a rank's share of the machine's)", POSITIVE)
    peak_tflops: float = knob(MISSING, "bf16 peak, by which MFU is measured", POSITIVE)
    bf16_tflops: float = knob(MISSING, "bf16 matmul, achieved when large", POSITIVE)
    float32_tflops: float = knob(MISSING, "float32 matmul, achieved when large", POSITIVE)
    bandwidth_gbs: float = knob(MISSING, "memory: bytes read and written by a copy", POSITIVE)
    node_gbs: float = knob(MISSING, "a rank to the others of its node, effective", POSITIVE)
    network_gbs: float = knob(MISSING, "a rank to other nodes, effective", POSITIVE)
    reserve_gb: float = knob(
        0.0, "memory not ours: driver's context, communication buffers, fragmentation", NON_NEGATIVE
    )
    gelu_gelements: float = knob(
        1e6, "GELU, tanh form: 1e9 elements a second; a CPU computes it slower than it reads", POSITIVE
    )
    fresh_gbs: float = knob(
        1e6, "memory: first writing of what was just got from the system; slow on a CPU, none on a GPU", POSITIVE
    )
    node_us: float = knob(10.0, "latency of a round inside a node", NON_NEGATIVE)
    network_us: float = knob(25.0, "latency of a round across nodes", NON_NEGATIVE)
    launch_us: float = knob(4.0, "what starting one operation costs", NON_NEGATIVE)

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    def flops(self, precision: str) -> float:
        """Achieved FLOP/s of a large matmul in a compute type."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.float32_tflops)

    def measured(self, found: Measurement) -> "Cluster":
        """The same cluster with measured rates in place of the file's."""
        names = [
            entry.name for entry in fields(found) if entry.name != "device" and getattr(found, entry.name) is not None
        ]
        return replace(self, **{name: getattr(found, name) for name in names})

    def title(self) -> str:
        """The cluster in words."""
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        memory = f"{self.memory_gb:g} GB each ({self.reserve_gb:g} GB not ours)"
        return f"{nodes}{self.ranks_per_node} x {self.device}, {memory}"


def load_cluster(path: str | Path, measurement: str | Path | None = None) -> Cluster:
    """Read a cluster file, with a measurement file's rates over it; raises ConfigError for unknown keys, types and
    limits.
    """
    cluster = read_section(path, Cluster)
    if cluster.reserve_gb >= cluster.memory_gb:
        raise ConfigError(
            f"{path}: reserve_gb {cluster.reserve_gb:g} leaves nothing of memory_gb {cluster.memory_gb:g}; lower it"
        )
    return cluster if measurement is None else cluster.measured(load_measurement(measurement))


def load_measurement(path: str | Path) -> Measurement:
    """Read what `Measurement.save` wrote."""
    return read_section(path, Measurement)

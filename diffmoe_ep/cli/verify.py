"""The verb by which trust is a command: verify."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffmoe_ep.cli.options import Verb, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check on these ranks and this back end that many ranks compute what one computes. Exit code 1 if they do not."""

    device: Literal["cpu", "cuda"] | None = option(None, "where to compute (default: GPUs where there are some)")
    timeout_minutes: float = option(10.0, "longest wait for a peer")
    folder: Path | None = option(None, "for checkpoints: one that all hosts see (default: temporary, on one host)")


def _verify(options: Options) -> None:
    from diffmoe_ep.parallel.mesh import use_device

    use_device(options.device)
    from diffmoe_ep.verify.verify import run

    run(options.device, options.timeout_minutes, options.folder)


VERBS = (Verb(("verify",), Options, _verify),)

"""What a run shows while it trains: the banner at its start, and the progress bar or lines."""

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from diffmoe_ep.checkpoint.same_run import RecipeChange
from diffmoe_ep.config import Config, has_experts, num_tokens, pool_samples
from diffmoe_ep.model.count import count
from diffmoe_ep.parallel.mesh import Mesh


class Progress:
    """A bar on a terminal, a line now and then in a file: step, speed, loss, capacity, MFU, memory, time left."""

    def __init__(self, banner: str, step: int, steps: int) -> None:
        print(banner, file=sys.stderr, flush=True)
        width = shutil.get_terminal_size((110, 24)).columns  # some terminals say 0, which would draw nothing
        # tqdm's own estimate of the time left knows nothing of saves and sample grids; ours stands among the figures
        bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = tqdm(total=steps, initial=step, ncols=width, disable=not sys.stderr.isatty(), bar_format=bar_format)
        self.steps = steps
        self.loss: float | None = None
        self.last_line = time.monotonic()

    def show(self, metrics: dict[str, Any]) -> None:
        """Show where the run stands, from a step's metrics; the loss shown is a moving average."""
        step, loss = metrics["step"], metrics["loss"]
        self.loss = loss if self.loss is None else 0.8 * self.loss + 0.2 * loss
        figures = shown_figures(metrics | {"loss": self.loss})
        if not self.bar.disable:
            self.bar.set_postfix_str("  ".join(figures), refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line >= 10 or step == self.steps:
            self.last_line = now
            with suppress(OSError):  # who read it may have left, as `| tee` at a Ctrl-C; the run has still to save
                print(f"step {step}/{self.steps}  {'  '.join(figures)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def shown_figures(metrics: dict[str, Any]) -> list[str]:
    """What a progress line shows of a step's metrics, in words; those that are not measured are left out."""
    figures = [f"loss {metrics['loss']:.4f}", f"{metrics['samples_per_second']:.0f} samples/s"]
    if "capacity" in metrics:
        figures.append(f"C {metrics['capacity']:.2f}")
    if "mfu" in metrics:
        figures.append(f"MFU {metrics['mfu']:.1%}")
    figures.append(f"{metrics['peak_memory_gb']:.1f} GB")
    figures.append(f"ETA {duration(metrics['eta_seconds'])}")
    return figures


def duration(seconds: float) -> str:
    """A time in at most two units: 42s, 3m20s, 5h07m, 2d03h."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def banner(config: Config, mesh: Mesh, step: int, source_line: str = "", recipe: Sequence[RecipeChange] = ()) -> str:
    """Two lines on what starts: what is trained, and how it is laid out; between them, if any, where its weights come
    from and what of its recipe changes at this step.
    """
    sizes, span = count(config.model), pool_samples(config)
    what = (
        f"{config.folder} {f'continues at step {step}' if step else 'starts'}: "
        f"{config.train.steps} steps of {config.train.global_batch} samples, "
        f"{config.model.family}, {sizes.total / 1e6:.2f}M parameters, {sizes.activated() / 1e6:.2f}M activated"
    )
    layout = f"{_ranks(mesh.size)} on {mesh.device.type}, {config.train.precision}, ZeRO-{config.parallel.zero_stage}"
    if has_experts(config.model):
        tokens = span * num_tokens(config.model)
        layout += f", {config.model.num_experts} experts over {_ranks(mesh.expert.size)}"
        layout += f", pools of {span} samples ({tokens} tokens) over {_ranks(mesh.pool.size)}"
    now = ", ".join(str(change) for change in recipe if change.step == step)
    changed = f"its recipe changes after step {step}: {now} (kept in recipe.jsonl)" if now else ""
    return "\n".join(filter(None, (what, source_line, changed, layout)))


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"

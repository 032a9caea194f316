"""What a run shows while it trains: the banner at its start, and the progress bar or lines."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import torch
from tqdm import tqdm

from diffmoe_ep.checkpoint.same_run import RecipeChange
from diffmoe_ep.config import Config, has_experts, num_tokens, pool_samples
from diffmoe_ep.model.count import count
from diffmoe_ep.moe.kernels.plain import do_not_group
from diffmoe_ep.parallel.mesh import Mesh

LINE = 120  # characters that a line in a file has at most
BAR = 10  # that the bar on a terminal has at least

# key, how soon it is left out where there is no room (the highest first), words
FIGURES: tuple[tuple[str, int, Callable[[Any], str]], ...] = (
    ("loss", 0, lambda value: f"loss {value:.4f}"),
    ("grad_norm", 3, lambda value: f"norm {value:#.3g}"),
    ("lr", 7, lambda value: f"lr {value:.1e}"),
    ("capacity", 6, lambda value: f"C {value:.2f}"),
    ("samples_per_second", 2, lambda value: f"{value:.0f} samples/s"),
    ("mfu", 4, lambda value: f"MFU {value:.1%}"),
    ("save_stall_ms", 8, lambda value: f"save stall {value:.0f} ms"),
    ("peak_memory_gb", 5, lambda value: f"{value:.1f} GB"),
    ("eta_seconds", 1, lambda value: f"ETA {duration(value)}"),
)


class Progress:
    """A bar on a terminal, in a file a line for each step that is logged; what does not fit the width is left out."""

    def __init__(self, banner: str, step: int, steps: int) -> None:
        print(banner, file=sys.stderr, flush=True)
        width = shutil.get_terminal_size((110, 24)).columns  # some terminals say 0, which would draw nothing
        # tqdm's own estimate of the time left knows nothing of saves and sample grids; ours stands among the figures
        bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bar = tqdm(total=steps, initial=step, ncols=width, disable=not sys.stderr.isatty(), bar_format=bar_format)
        self.room = width - BAR - len(f"100%|| {steps}/{steps}, ")
        self.steps = steps
        self.loss: float | None = None

    def show(self, metrics: dict[str, Any]) -> None:
        """Show where the run stands, from a step's metrics; the loss shown is a moving average."""
        step, loss = metrics["step"], metrics["loss"]
        self.loss = loss if self.loss is None else 0.8 * self.loss + 0.2 * loss
        shown = metrics | {"loss": self.loss}
        if not self.bar.disable:
            self.bar.set_postfix_str(figures(shown, self.room), refresh=False)
            self.bar.update(step - self.bar.n)
            return
        where = f"{time_of_day(metrics['time'])}  step {step:>{len(str(self.steps))}}/{self.steps}  "
        with suppress(OSError):  # who read it may have left, as `| tee` at a Ctrl-C; the run has still to save
            print(where + figures(shown, LINE - len(where)), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def figures(metrics: Mapping[str, Any], room: int) -> str:
    """A step's metrics in words, in a line of at most `room` characters: what is not measured is left out, and what
    finds no room, the least important first.
    """
    shown = []  # in their order: (what goes first when there is no room, words)
    for key, importance, words in FIGURES:
        if key in metrics:
            shown.append((importance, words(metrics[key])))
    while len(shown) > 1 and len("  ".join(words for _, words in shown)) > room:
        shown.remove(max(shown))
    return "  ".join(words for _, words in shown)


def time_of_day(iso: str) -> str:
    """The time of a metric `time`, on this machine's clock: 14:03:27."""
    return datetime.fromisoformat(iso).astimezone().strftime("%H:%M:%S")


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
    from and what of its recipe changes at this step; then, if any, what its GPUs cannot do.
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
    return "\n".join(filter(None, (what, source_line, changed, layout, _kernel(config, mesh))))


def _kernel(config: Config, mesh: Mesh) -> str:
    """Why `auto` leaves a kernel out on this GPU."""
    ragged = has_experts(config.model) and config.train.precision == "bf16"
    if mesh.device.type != "cuda" or config.compute.kernel != "auto" or not ragged:
        return ""
    reason = do_not_group(torch.cuda.get_device_capability(mesh.device))
    return f"compute.kernel=auto is fused, not grouped, where rows are ragged: {reason}" if reason else ""


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"

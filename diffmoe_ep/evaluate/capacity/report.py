"""How much compute a trained model spends, and on what: by sampling step, layer, expert, and class or prompt.

Capacity 1 is the compute of a dense model: C of an expert is N * processed / tokens (Eq. 8, 9), measured while samples
are drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError, ModelConfig, SampleConfig, has_experts, to_tree
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.evaluate.capacity.against_topk import AgainstTopK, against_topk, topk_of_a_sample
from diffmoe_ep.evaluate.capacity.sample_fn import Requested, SampleFn
from diffmoe_ep.evaluate.capacity.strokes import evenly_spaced
from diffmoe_ep.model.count import count, equation_40
from diffmoe_ep.model.dit import DiT, is_moe
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.capacity_record import CapacityRecord
from diffmoe_ep.sampling.generate import Progress
from diffmoe_ep.sampling.prompts import Prompts
from diffmoe_ep.sampling.sample import Samples, check_labels
from diffmoe_ep.tables import table

EXTREMES = 10  # classes or prompts at either end of the ranking whose samples are kept


@dataclass(frozen=True)
class ClassCapacity:
    """What the samples of one class, or of one prompt, cost."""

    label: int  # or the prompt's number
    name: str  # or the prompt
    per_step: Tensor  # (steps,) float64 C
    samples: Samples | None  # kept for those at either end of the ranking

    @property
    def capacity(self) -> float:
        """C_infer^avg of the class."""
        return float(self.per_step.mean())


@dataclass(frozen=True)
class Report:
    """Where a model spends its compute, measured on `per_class` samples of each class (or prompt), sampled class by
    class.
    """

    model: ModelConfig
    sample: SampleConfig
    data_info: DataInfo  # of the data that the model was trained on
    seed: int  # of the samples' first noise, the same for each class
    per_class: int
    record: CapacityRecord  # over all classes
    classes: tuple[ClassCapacity, ...]  # hardest first
    # None: the model has no predictor, or a sample has too few tokens for every expert to take one
    topk: AgainstTopK | None
    activated: float  # parameters that work on an average token at the measured capacity, counted exactly
    estimate: float  # the same by the paper's Eq. 40

    @property
    def kind(self) -> str:
        """What is ranked: class or prompt."""
        return "prompt" if self.model.condition == "text" else "class"

    @property
    def kinds(self) -> str:
        """The same for many."""
        return "prompts" if self.kind == "prompt" else "classes"

    @property
    def blocks(self) -> list[int]:
        """Which blocks (from 0) the MoE layers are."""
        return [block for block in range(self.model.num_blocks) if is_moe(self.model, block)]

    def per_layer_expert_step(self) -> Tensor:
        """C of every step, layer and expert (steps, layers, N) float64."""
        return self.model.num_experts * self.record.processed / self.record.tokens[:, :, None]

    def lines(self) -> list[str]:
        """A summary for the terminal."""
        steps, experts, number = self.record.per_step(), self.record.per_layer_expert(), len(self.classes)
        lowest, largest = int(steps.argmin()), int(steps.argmax())
        idle, busiest = (divmod(int(place), experts.shape[1]) for place in (experts.argmin(), experts.argmax()))
        shown = min(5, number // 2)
        rows = [
            (
                f"capacity of {number * self.per_class} samples",
                f"{self.per_class} of each of {number} {self.kinds}, seed {self.seed}",
            ),
            ("C_infer^avg", f"{self.record.average():.4f}  (1 = compute of a dense model)"),
            ("by step", f"{steps[lowest]:.3f} (step {lowest}) to {steps[largest]:.3f} (step {largest})"),
            (
                "by layer",
                ", ".join(
                    f"block {block} {value:.3f}" for block, value in zip(self.blocks, experts.mean(1), strict=True)
                ),
            ),
            (
                "by expert",
                f"{experts[idle]:.3f} ({self._expert(idle)}) to {experts[busiest]:.3f} ({self._expert(busiest)})",
            ),
        ]
        if shown:
            for which, part in (("hardest", self.classes[:shown]), ("easiest", self.classes[: -shown - 1 : -1])):
                gap = "; " if self.kind == "prompt" else ", "
                rows.append((f"{which} {self.kinds}", gap.join(f"{one.name} {one.capacity:.3f}" for one in part)))
        rows.append(
            (
                "activated parameters",
                f"{self.estimate / 1e6:,.3f}M by Eq. 40, {self.activated / 1e6:,.3f}M counted exactly",
            )
        )
        if self.topk is not None:
            ours, theirs, _ = self.topk.counts.sum((0, 1)).tolist()
            rows.append(
                (
                    "top-k at batch 1",
                    f"agrees on {self.topk.overall():.1%} of what either takes; "
                    f"predictor takes {ours / theirs:.3f} times as much",
                )
            )
        return table(rows, "<", rule=False)

    def as_dict(self) -> dict[str, object]:
        """The summary, ready for JSON; the tables hold the rest."""
        return {
            "capacity": self.record.average(),
            "capacity_per_step": self.record.per_step().tolist(),
            "capacity_per_layer": self.record.per_layer_expert().mean(1).tolist(),
            f"capacity_per_{self.kind}": {one.name: one.capacity for one in self.classes},
            "activated": self.activated,
            "activated_by_equation_40": self.estimate,
            "agreement_with_topk": None if self.topk is None else self.topk.overall(),
            f"per_{self.kind}": self.per_class,
            "seed": self.seed,
            "sample": to_tree(self.sample),
        }

    def _expert(self, place: tuple[int, int]) -> str:
        return f"block {self.blocks[place[0]]}, expert {place[1]}"


def check_report(
    model: ModelConfig, per_class: int, classes: Sequence[int] | None = None, prompts: int | None = None
) -> None:
    """Raise ConfigError, before anything is sampled, unless a capacity report can be made of this model."""
    if not has_experts(model):
        raise ConfigError(
            "model.family is dense: it has no experts, and its capacity is 1 at every step; name a run that has experts"
        )
    if not any(is_moe(model, block) for block in range(model.num_blocks)):
        raise ConfigError(
            "the model has no MoE layer: model.interleave leaves block 0 dense and model.num_blocks is "
            f"{model.num_blocks}"
        )
    if per_class < 1:
        raise ConfigError(
            f"{'--per-prompt' if model.condition == 'text' else '--per-class'} is {per_class}; it must be at least 1"
        )
    if model.condition == "text" and not prompts:
        raise ConfigError('the model is conditioned on captions; say what to draw: --prompt "...", or --prompts FILE')
    if model.condition == "class" and prompts:
        raise ConfigError(
            "prompts are given, but the model is conditioned on classes; give --classes, or nothing for all of them"
        )
    if classes is not None and not classes:
        raise ConfigError("no classes are named; leave --classes out for all of them")
    if classes is not None or model.condition == "class":
        check_labels(list(classes or ()), model)
    if find_spec("matplotlib") is None:
        raise ConfigError("capacity plots need matplotlib, which is not installed: pip install 'diffmoe_ep[log]'")


def report(
    module: DiT,
    sample_fn: SampleFn,
    config: SampleConfig,
    data_info: DataInfo,
    mesh: Mesh,
    *,
    per_class: int,
    seed: int,
    classes: Sequence[int] | None = None,
    prompts: Prompts | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Sample `per_class` times from each class, or each of the prompts, and report where the compute went; collective,
    None on all ranks but the first.

    sample_fn samples from `module`, which is watched meanwhile, over the ranks of `mesh`, always from the same noise
    (that of `seed`), so that classes differ by their condition alone. A class is sampled by itself: under selection
    `count` and `topk` its chunks are its pools.
    """
    model = module.config
    check_report(model, per_class, classes, None if prompts is None else len(prompts))
    if prompts is not None:
        labels, names = list(range(len(prompts))), list(prompts.words)
    else:
        labels = sorted(set(classes)) if classes is not None else list(range(model.num_classes))
        names = list(data_info.class_names) or [str(label) for label in range(model.num_classes)]
    k = topk_of_a_sample(model, config)
    total = len(labels) + (2 if k else 0)
    record, measured = CapacityRecord.empty(), []

    def conditions(numbers: list[int]) -> Requested:
        return torch.tensor(numbers) if prompts is None else prompts.select(numbers)

    for done, label in enumerate(labels):
        if progress is not None:
            progress(done, total)
        samples = sample_fn(conditions([label] * per_class), config, None)
        if done == 0:
            mesh.agree(None if samples is None else _unsteady(samples, config))
        if samples is not None:
            record = record.merge(samples.capacity)
            measured.append(ClassCapacity(label, names[label], samples.capacity.per_step(), samples))
            measured.sort(key=lambda one: -one.capacity)  # stable: equal ones stay in order
            middle = measured[EXTREMES:-EXTREMES]
            measured[EXTREMES:-EXTREMES] = [replace(one, samples=None) for one in middle]
    some = [labels[place] for place in evenly_spaced(len(labels), EXTREMES)]
    some_names = [names[label] for label in some]
    against = against_topk(module, sample_fn, conditions(some), some_names, config, mesh, k) if k else None
    if progress is not None:
        progress(total, total)
    if not mesh.is_first:
        return None
    spent = record.average()
    return Report(
        model=model,
        sample=config,
        data_info=data_info,
        seed=seed,
        per_class=per_class,
        record=record,
        classes=tuple(measured),
        topk=against,
        activated=count(model).activated(spent),
        estimate=equation_40(model, spent),
    )


def _unsteady(samples: Samples, config: SampleConfig) -> str | None:
    """What is wrong with steps that the solver chooses itself: those of one chunk are not those of another."""
    steps = len(samples.capacity.tokens)
    if steps == config.steps:
        return None
    return (
        f"the solver took {steps} steps of its own where sample.steps is {config.steps}; "
        "set sample.sampler=heun or euler for a report"
    )

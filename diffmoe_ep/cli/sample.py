"""The verb that draws from a trained model, sample; and what other verbs that draw have in common with it."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.config import Config, ConfigError, SampleConfig, override, to_tree

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from diffmoe_ep.data.info import DataInfo
    from diffmoe_ep.evaluate.capacity.report import Drawer
    from diffmoe_ep.model.dit import DiT
    from diffmoe_ep.parallel.mesh import Mesh
    from diffmoe_ep.sampling.prompts import Prompts
    from diffmoe_ep.sampling.sample import Drawn


def add(verbs: Any) -> None:
    """Declare sample."""
    sample = verbs.add_parser("sample", help="draw images from a run or checkpoint")
    sample.add_argument(
        "--out", required=True, type=Path, help="folder for samples.npz, grid.png and, with prompts, prompts.json"
    )
    sample.add_argument(
        "--threshold", type=float, default=None, help="one constant threshold for all experts (sample.threshold)"
    )
    sample.add_argument("--classes", type=numbers, default=None, metavar="0,1,2", help="classes in turn (default: all)")
    sample.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="WORDS",
        help="what to draw (a model of captions); again for more",
    )
    sample.add_argument(
        "--prompts",
        type=Path,
        default=None,
        metavar="FILE",
        help="file of prompts, one on each line; # starts a comment",
    )
    sample.add_argument(
        "--negative", default=None, metavar="WORDS", help="what guidance leads away from, in place of no words at all"
    )
    sample.add_argument(
        "--per-prompt", type=int, default=1, help="images of each prompt (default 1); image n has seed --seed + n"
    )
    sample.set_defaults(run=_sample)

    add_source(sample, "100; with prompts, see --per-prompt")


def add_source(verb: argparse.ArgumentParser, num: str) -> None:
    """Declare what verbs that draw samples have in common; num: how many there are if --samples does not say."""
    verb.add_argument("path", type=Path, help="run folder, one checkpoint in it, or an imported or exported folder")
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for example sample.steps=50 sample.selection=count parallel.expert_parallel=2",
    )
    verb.add_argument("--samples", type=int, default=None, help=f"number of samples (default {num})")
    verb.add_argument("--seed", type=int, default=None, help="seed of the samples' first noise (default: the run's)")


@dataclass(frozen=True)
class Source:
    """What samples are drawn from."""

    checkpoint: Path
    config: Config  # the run's, with the command's overrides
    data_info: "DataInfo"  # of the data that it was trained on
    seed: int  # of the samples' first noise


def source_of(options: argparse.Namespace) -> Source:
    """Find the checkpoint and check everything that follows from it; parallel.expert_parallel is 1 unless an override
    says otherwise.
    """
    from diffmoe_ep.checkpoint.load import config_of, data_info_of, resolve_model_path
    from diffmoe_ep.parallel.mesh import launched_world
    from diffmoe_ep.sampling.sample import check_sampling

    checkpoint = resolve_model_path(options.path)
    config = override(config_of(checkpoint), ["parallel.expert_parallel=1", *options.overrides])
    world, expert = launched_world(), config.parallel.expert_parallel
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; it must be at least 1")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed is {options.seed}; it must be at least 0 and less than 2^63")
    if world % expert:
        started = f"{world} process{'es were' if world > 1 else ' was'} started"
        raise ConfigError(
            f"parallel.expert_parallel is {expert} and {started}; start a multiple of parallel.expert_parallel, or leave it at 1"
        )
    check_sampling(config, options.samples)
    return Source(checkpoint, config, data_info_of(checkpoint), config.seed if options.seed is None else options.seed)


def load_source(source: Source) -> "tuple[DiT, Mesh]":
    """Load the checkpoint over all launched ranks."""
    mesh = _mesh(source)
    return _load(source, mesh), mesh


def _mesh(source: Source) -> "Mesh":
    from diffmoe_ep.parallel.mesh import init_mesh

    parallel = source.config.parallel
    return init_mesh(parallel.expert_parallel, 1, parallel.timeout_minutes)


def _load(source: Source, mesh: "Mesh") -> "DiT":
    from diffmoe_ep.checkpoint.load import load_sharded

    return load_sharded(source.checkpoint, source.config.sample.weights, source.config, mesh)


def encoded(source: Source, mesh: "Mesh", words: Sequence[str]) -> "Prompts":
    """Prompts with their features, the same bits on every rank: the first one encodes, and says on standard error what
    is empty or cut.
    """
    from diffmoe_ep.sampling.prompts import Prompts, encode, load_encoder

    found, problem = None, None
    if mesh.is_first:
        try:
            found, said = encode(
                load_encoder(source.config, source.data_info, mesh.device), words, source.config.model.text_length
            )
            for line in said:
                print(f"diffmoe: {line}", file=sys.stderr)
        except ValueError as error:  # ConfigError: told on all ranks
            problem = str(error)
    mesh.agree(problem)
    shared = mesh.same(found)
    assert isinstance(shared, Prompts)
    return shared


def bar_for(mesh: "Mesh", title: str) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(unit="step", desc=title, disable=not (mesh.is_first and sys.stderr.isatty()))


def draw_all(source: Source, asked: "Tensor | Sequence[str]", negative: str | None = None) -> "Drawn | None":
    """Load the checkpoint and draw a sample for each label or prompt; the first rank gets them. Sample n of prompts has
    seed + n.
    """
    from diffmoe_ep.sampling.decode import load_decoder
    from diffmoe_ep.sampling.prompts import Prompts
    from diffmoe_ep.sampling.sample import draw

    mesh = _mesh(source)
    conditions: Tensor | Prompts
    away = None
    if isinstance(asked, Sequence):
        prompts = encoded(source, mesh, [*asked, *([negative] if negative is not None else [])])
        conditions, away = (
            prompts.part(0, len(asked)),
            prompts.part(len(asked), len(prompts)) if negative is not None else None,
        )
    else:
        conditions = asked
    seed = range(source.seed, source.seed + len(asked)) if isinstance(asked, Sequence) else source.seed
    decode = load_decoder(source.config.sample, source.data_info, mesh)
    model = _load(source, mesh)
    with bar_for(mesh, f"{len(asked)} samples") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        objective = source.config.train.objective
        return draw(
            model,
            conditions,
            source.config.sample,
            mesh,
            seed=seed,
            negative=away,
            objective=objective,
            decode=decode,
            progress=show,
        )


def drawer(source: Source, model: "DiT", mesh: "Mesh") -> "Drawer":
    """Draw with the loaded model and any sampling settings."""
    from diffmoe_ep.sampling.decode import load_decoder
    from diffmoe_ep.sampling.sample import draw

    decode = load_decoder(source.config.sample, source.data_info, mesh)

    def drawer(
        asked: "Tensor | Prompts", sample: SampleConfig, progress: Callable[[int, int], None] | None
    ) -> "Drawn | None":
        objective = source.config.train.objective
        return draw(model, asked, sample, mesh, seed=source.seed, objective=objective, decode=decode, progress=progress)

    return drawer


def out_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be made ({error.strerror}); give a folder that can be written"
        ) from error
    return path


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of class numbers such as 0,1,2") from None


def _words(options: argparse.Namespace) -> list[str]:
    """The prompts that the command names, each as often as it is to be drawn; sets --samples to their number."""
    from diffmoe_ep.sampling.prompts import read_prompts

    words = [*options.prompt, *(read_prompts(options.prompts) if options.prompts is not None else [])]
    if options.per_prompt < 1:
        raise ConfigError(f"--per-prompt is {options.per_prompt}; it must be at least 1")
    if words and options.samples is not None:
        raise ConfigError(
            f"--samples is {options.samples}, but prompts say how many are drawn; give --per-prompt, or no prompts"
        )
    if words:
        options.samples = len(words) * options.per_prompt
    elif options.samples is None:
        options.samples = 100
    return [text for text in words for _ in range(options.per_prompt)]


def _asked(options: argparse.Namespace, words: list[str], config: Config) -> "Tensor | list[str]":
    """Labels or prompts, as the model takes them; ConfigError where the command gives the other kind, or none."""
    from diffmoe_ep.sampling.sample import check_labels, classes_in_turn

    if config.model.condition == "text":
        if options.classes is not None:
            raise ConfigError(
                "--classes is given, but the model is conditioned on captions and has no classes; give --prompt or "
                "--prompts"
            )
        if not words:
            raise ConfigError(
                'the model is conditioned on captions; say what to draw: --prompt "...", or --prompts FILE'
            )
        if options.negative is not None and config.sample.guidance == 1:
            raise ConfigError(
                "--negative needs guidance, but sample.guidance is 1; set it higher, or leave --negative away"
            )
        return words
    if words or options.negative is not None:
        raise ConfigError("prompts are given, but the model is conditioned on classes; give --classes")
    classes = options.classes if options.classes is not None else list(range(config.model.num_classes))
    check_labels(classes, config.model)
    return classes_in_turn(options.samples, classes)


def _sample(options: argparse.Namespace) -> None:
    import numpy as np

    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.sample import check_pictures, pixels_of, write_grid

    if options.threshold is not None:
        options.overrides = [*options.overrides, f"sample.threshold={options.threshold}"]
    words = _words(options)
    source = source_of(options)
    config = source.config
    pictures = source.data_info.kind == "pixels" or config.sample.vae is not None
    asked = _asked(options, words, config)
    out = out_folder(options.out)
    if pictures:
        check_pictures(source.data_info, config.sample.vae)
    drawn = draw_all(source, asked, options.negative)
    if drawn is not None:
        written = ["samples.npz"]
        arrays: dict[str, Any] = {"latents": drawn.latents.numpy(), "labels": drawn.labels.numpy()}
        if pictures:
            arrays["pixels"] = pixels_of(drawn, source.data_info).numpy()
        np.savez(out / "samples.npz", **arrays)
        if drawn.prompts:
            written.append("prompts.json")
            write_json(out / "prompts.json", images(source, drawn, options.negative))
        if pictures:
            written.append("grid.png")
            columns = options.per_prompt if 1 < options.per_prompt <= 10 else 10
            write_grid(drawn, source.data_info, out / "grid.png", columns=columns)
        print(
            f"{len(drawn.latents)} samples of {source.checkpoint}: seed {source.seed}, {config.sample.sampler} {config.sample.steps} "
            f"steps, guidance {config.sample.guidance:g}, selection {config.sample.selection}, C_infer^avg {drawn.capacity.average():.3f}"
        )
        print(f"written to {out}: {', '.join(written)}")
        if not pictures:
            print("these are latents of a VAE; to see pictures, set sample.vae to its local folder")
    destroy_mesh()


def images(source: Source, drawn: "Drawn", negative: str | None) -> dict[str, Any]:
    """What each image was asked for: with its prompt and seed alone it can be drawn again."""
    images = [{"prompt": text, "seed": source.seed + number} for number, text in enumerate(drawn.prompts)]
    return {**protocol(source), "negative": negative, "images": images}


def protocol(source: Source) -> dict[str, Any]:
    return {"checkpoint": str(source.checkpoint), "seed": source.seed, "sample": to_tree(source.config.sample)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The verb that draws from a trained model: sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.cli.options import Verb, option, required
from diffmoe_ep.cli.source import SourceOptions, images, numbers, out_folder, sample_all, source_of, write_json
from diffmoe_ep.config import Config, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Draw images from a run or checkpoint. Image n of a prompt has the seed `seed` + n, so that it can be drawn again
    alone.
    """

    out: Path = required("folder for samples.npz, grid.png and, with prompts, prompts.json")
    samples: int | None = option(None, "number of samples (default 100; with prompts, see --per-prompt)")
    classes: tuple[int, ...] | None = option(None, "classes in turn (default: all)", "0,1,2", numbers)
    prompt: tuple[str, ...] = option((), "what to draw (a model of captions); again for more", "WORDS")
    prompts: Path | None = option(None, "file of prompts, one on each line; # starts a comment", "FILE")
    negative: str | None = option(None, "what guidance leads away from, in place of no words at all", "WORDS")
    per_prompt: int = option(1, "images of each prompt")


def _words(options: Options) -> list[str]:
    """The prompts that the command names, each as often as it is to be drawn."""
    from diffmoe_ep.sampling.prompts import read_prompts

    words = [*options.prompt, *(read_prompts(options.prompts) if options.prompts is not None else [])]
    if options.per_prompt < 1:
        raise ConfigError(f"--per-prompt is {options.per_prompt}; it must be at least 1")
    if words and options.samples is not None:
        raise ConfigError(
            f"--samples is {options.samples}, but prompts say how many are drawn; give --per-prompt, or no prompts"
        )
    return [text for text in words for _ in range(options.per_prompt)]


def _asked(options: Options, samples: int, words: list[str], config: Config) -> "Tensor | list[str]":
    """Labels or prompts, as the model takes them; ConfigError where the command names the other kind, or none."""
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
    classes = list(options.classes) if options.classes is not None else list(range(config.model.num_classes))
    check_labels(classes, config.model)
    return classes_in_turn(samples, classes)


def _sample(options: Options) -> None:
    import numpy as np

    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.picture import check_pictures, pixels_of, write_grid

    words = _words(options)
    samples = len(words) or (100 if options.samples is None else options.samples)
    source = source_of(options, samples)
    config = source.config
    pictures = source.data_info.kind == "pixels" or config.sample.vae is not None
    asked = _asked(options, samples, words, config)
    out = out_folder(options.out)
    if pictures:
        check_pictures(source.data_info, config.sample.vae)
    drawn = sample_all(source, asked, options.negative)
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
            f"{len(drawn.latents)} samples of {source.checkpoint}: seed {source.seed}, {config.sample.sampler} "
            f"{config.sample.steps} "
            f"steps, guidance {config.sample.guidance:g}, selection {config.sample.selection}, C_infer^avg "
            f"{drawn.capacity.average():.3f}"
        )
        print(f"written to {out}: {', '.join(written)}")
        if not pictures:
            print("these are latents of a VAE; to see pictures, set sample.vae to its local folder")
    destroy_mesh()


VERBS = (Verb(("sample",), Options, _sample),)

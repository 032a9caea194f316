"""The verb that scores samples of a trained model: evaluate."""

from dataclasses import dataclass, replace
from pathlib import Path

from diffmoe_ep.cli.options import Verb, option, required
from diffmoe_ep.cli.source import Source, SourceOptions, images, out_folder, protocol, sample_all, source_of, write_json
from diffmoe_ep.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Score samples of a run or checkpoint against real images."""

    reference: Path = required("dataset folder of the training images", "FOLDER")
    heldout: Path = required("dataset folder of held-out images", "FOLDER")
    out: Path | None = option(None, "folder for scores.json (or composition.json) and grid.png")
    samples: int | None = option(None, "number of samples (default 500; 400 for --composition)")
    composition: bool = option(False, "of a model of digits_captions: single object, two objects, counting, position")


def _evaluate(options: Options) -> None:
    from diffmoe_ep.evaluate.pipeline import check_real, load_images, score
    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.picture import check_pixels, pixels_of, write_grid
    from diffmoe_ep.sampling.sample import classes_in_turn

    samples = options.samples if options.samples is not None else 400 if options.composition else 500
    source = source_of(options, samples)
    takes_text = source.config.model.condition == "text"
    if takes_text != options.composition:
        raise ConfigError(
            "the model is conditioned on captions; its samples are scored with --composition"
            if takes_text
            else "--composition scores samples of prompts, but the model is conditioned on classes; leave it away"
        )
    check_pixels(source.data_info)
    if options.composition:
        return _compose(options, source, samples)
    train, heldout = load_images(options.reference), load_images(options.heldout)
    check_real(samples, source.data_info.shape, {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else out_folder(options.out)
    drawn = sample_all(source, classes_in_turn(samples, list(range(source.config.model.num_classes))))
    if drawn is not None:
        scores = score(pixels_of(drawn, source.data_info), drawn.labels, train, heldout, drawn.capacity)
        print("\n".join(scores.lines()))
        if out is not None:
            write_json(out / "scores.json", {**scores.as_dict(), "protocol": protocol(source)})
            write_grid(drawn, source.data_info, out / "grid.png")
            print(f"written to {out}: scores.json, grid.png")
    destroy_mesh()
    return None


def _compose(options: Options, source: Source, samples: int) -> None:
    """Score how well prompts are followed."""
    from diffmoe_ep.evaluate.digits.composition import TASKS, check_canvases, composition, prompts
    from diffmoe_ep.evaluate.digits.detect import load_canvases
    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.picture import pixels_of, write_grid

    each, rest = divmod(samples, len(TASKS))
    if rest or each < 2:
        raise ConfigError(
            f"--samples is {samples}; composition needs a multiple of {len(TASKS)}, at least {2 * len(TASKS)}"
        )
    train, heldout = load_canvases(options.reference), load_canvases(options.heldout)
    check_canvases(source.data_info.shape, {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else out_folder(options.out)
    asked = prompts(each)
    drawn = sample_all(source, [prompt.text for prompt in asked])
    if drawn is not None:
        found = composition(pixels_of(drawn, source.data_info).numpy(), asked, train, heldout, drawn.capacity.average())
        print("\n".join(found.lines()))
        if out is not None:
            judged = [
                {**image, "task": prompt.task, "right": right}
                for image, prompt, right in zip(
                    images(source, drawn, None)["images"], asked, found.verdicts, strict=True
                )
            ]
            write_json(out / "composition.json", {**found.as_dict(), "protocol": protocol(source), "images": judged})
            shown = [number for number in range(len(asked)) if number % each < 30]  # the first rows of each task
            part = replace(
                drawn, latents=drawn.latents[shown], prompts=tuple(drawn.prompts[number] for number in shown)
            )
            write_grid(part, source.data_info, out / "grid.png", right=[found.verdicts[number] for number in shown])
            print(f"written to {out}: composition.json, grid.png")
    destroy_mesh()


VERBS = (Verb(("evaluate",), Options, _evaluate),)

"""Whether a run may continue a checkpoint, or start from its weights; and how its recipe changed on the way.

A run is what its identity keys say (see `config.knob`). Its recipe may change whenever it is resumed: each change is
kept with the step after which it held, in every later checkpoint and in the run folder.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffmoe_ep.checkpoint.exported import is_exported
from diffmoe_ep.checkpoint.load import config_of, data_info_of, fingerprint_of, meta_of, resolve_model_path
from diffmoe_ep.checkpoint.store import CheckpointError, read_meta
from diffmoe_ep.config import Change, Config, changes, effective, setting
from diffmoe_ep.data.info import DataInfo


def check_continues(folder: Path, config: Config) -> None:
    """Raise CheckpointError, naming the first differing key, unless a run with this config continues a checkpoint; the
    data are compared apart (`check_same_data`).
    """
    there, meta = config_of(folder), meta_of(folder)
    for change in changes(there, config, "identity"):
        key = change.key.name
        if change.key.by_fingerprint and (key != "init_from" or _same_ancestor(change, meta)):
            continue
        before, now, remedy = shown(change.there), shown(change.here), setting(key, change.there)
        if key.startswith(("model.", "pool.")):
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: {key} is {before} there and {now} here; give this run "
                f"another folder, or set {remedy}"
            )
        raise CheckpointError(
            f"{folder} was trained with {key} {before}, this run has {now}, so it would not be the same run; set "
            f"{remedy}, or give this run another folder"
        )


def check_same_data(folder: Path, config: Config, fingerprint: str) -> None:
    """Raise CheckpointError unless a checkpoint was trained on the data that the config names.

    fingerprint: of these data; it decides, where they lie does not.
    """
    there, meta = config_of(folder), meta_of(folder)
    if fingerprint != meta["fingerprint"]:
        raise CheckpointError(
            f"{folder} was trained on other data than {_data(config)} holds now: it had {_data(there)}, of fingerprint "
            f"{meta['fingerprint'][:12]}, this is of {fingerprint[:12]}; restore the data, or give this run another "
            "folder"
        )


def check_same_encoder(folder: Path, config: Config, fingerprint: str) -> None:
    """Raise CheckpointError unless a checkpoint was trained on the features of the same text encoder, stored or made
    while training.

    fingerprint: of this run's. A checkpoint that does not know its own passes.
    """
    there = meta_of(folder).get("text_encoder")
    if there is None and not config_of(folder).text.online:
        stored = data_info_of(folder).text_encoder(config.text.encoder)
        there = stored and stored.fingerprint
    if there is not None and there != fingerprint:
        now, also = f"the one in text.folder {config.text.folder}", ""
        if not config.text.online:
            now, also = f"that of the features in {_data(config)}", " and text.online=true"
        raise CheckpointError(
            f"{folder} was trained with a text encoder of fingerprint {there[:12]}, {now} is of {fingerprint[:12]}; "
            f"set text.folder to the encoder that the run was trained with{also}, or give this run another folder"
        )


def _same_ancestor(change: Change, meta: Mapping[str, Any]) -> bool:
    """Whether init_from, written otherwise, names what the run started from: the same place, or the same weights, which
    may have moved and, in a run folder, have newer ones beside them.
    """
    if change.there is None or change.here is None:
        return False
    if Path(change.there).resolve() == Path(change.here).resolve():
        return True
    known = [each for each in meta.get("ancestry") or () if isinstance(each, dict)]
    ancestor: dict[str, Any] = known[0] if known else {}
    try:
        found = resolve_model_path(Path(change.here))
    except CheckpointError:
        return False
    places = (found, found.with_name(Path(str(ancestor.get("path", ""))).name or found.name))
    return ancestor.get("fingerprint") in {fingerprint_of(place) for place in places if place.is_dir()}


def _data(config: Config) -> str:
    parts = [part.folder for part in config.data.mixture]
    return f"data.mixture ({', '.join(parts)})" if parts else f"data.folder {config.data.folder}"


def shown(value: Any) -> str:
    """A value as it is read in a message; `setting` writes what can be pasted."""
    return value if isinstance(value, str) else json.dumps(value)


# -- the recipe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeChange:
    """A recipe key that was changed at a resume."""

    key: str
    step: int
    """The last step that had the old value."""
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {shown(self.was)} -> {shown(self.now)}"


def recipe_changes(folder: Path | None, config: Config) -> tuple[RecipeChange, ...]:
    """All changes of the recipe of a run that continues the checkpoint with this config, the last ones being made now.

    folder: None where the run has no checkpoint yet, and so no changes.
    """
    if folder is None:
        return ()
    step, newer = read_meta(folder)["step"], changes(config_of(folder), config, "recipe")
    return *recipe_of(folder), *(RecipeChange(each.key.name, step, each.there, each.here) for each in newer)


def recipe_of(folder: Path) -> tuple[RecipeChange, ...]:
    """The changes of the recipe up to a checkpoint, which its config, of the last steps, does not tell."""
    found = meta_of(folder).get("recipe") or ()
    names = {field.name for field in fields(RecipeChange)}
    for change in found:
        if not isinstance(change, dict) or change.keys() != names or type(change["step"]) is not int:
            raise CheckpointError(f"{folder}: its meta.json has a recipe change {str(change)[:60]}, which is none")
    return tuple(RecipeChange(**change) for change in found)


# -- the weights of another run ----------------------------------------------------------------------------------------


def check_starts(folder: Path, config: Config, data_info: DataInfo) -> None:
    """Raise CheckpointError, naming the first differing key, unless a run may start from the weights of a checkpoint or
    an exported folder.

    data_info: of this run's data; where both are known, latents and text features have to be of the same encoders.
    """
    source = config_of(folder)
    if is_exported(folder) and config.init_weights != source.sample.weights:
        there = source.sample.weights
        raise CheckpointError(
            f"{folder} holds one set of weights, {there}, not {config.init_weights}; set init_weights={there}"
        )
    for key, here, there in _differences(_architecture(config), _architecture(source)):
        raise CheckpointError(
            f"{folder} holds weights of another model: {key} is {shown(there)} there and {shown(here)} here; set "
            f"{setting(key, there)}, or start from another run"
        )
    for key, here, there in _differences(_latents(config, data_info), _latents(config, data_info_of(folder))):
        if here is not None and there is not None:
            raise CheckpointError(
                f"{folder} was trained on data whose {key} is {there}, but that of this run's data is {here}; prepare "
                "the data with the encoder and scale of that run, or start from another run"
            )


def _architecture(config: Config) -> dict[str, Any]:
    """By key, what says which weights a model has and what they mean; how much of a caption is seen is not of it."""
    identity = effective(config, "identity")
    named = {key: value for key, value in identity.items() if key.startswith("model.") and key != "model.text_length"}
    if "text.encoder" in identity:
        named["text.encoder"] = config.text.encoder
    return named | {"train.objective": config.train.objective}


def _latents(config: Config, data_info: DataInfo) -> dict[str, Any]:
    """What data have to share with those that weights were trained on; None: not known."""
    known: dict[str, Any] = {"kind": data_info.kind or None}
    if data_info.kind == "moments":  # pixels are scaled from whatever they are stored as
        known |= {"scale": data_info.scale, "shift": data_info.shift, "encoder": data_info.encoder or None}
    text = data_info.text_encoder(config.text.encoder)
    return known | {f"fingerprint of text features ({config.text.encoder})": text and text.fingerprint}


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key and both values where they differ; None where one lacks the key."""
    for key in [*here, *(key for key in there if key not in here)]:
        if here.get(key) != there.get(key):
            yield key, here.get(key), there.get(key)

"""Streams with settings by name: arguments of `Stream` and keys of the config's section `data`, mixed."""

from dataclasses import fields
from typing import Any, cast

from diffmoe_ep.config import DataConfig
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.sources import BatchSource, SampleStore

SECTION = {field.name for field in fields(DataConfig)}


def open_stream(source: BatchSource | SampleStore, **settings: Any) -> Stream:
    """A stream, of a source or of one dataset; nothing is replaced and nothing is asked for again unless settings say
    so.
    """
    strict: dict[str, Any] = {"workers": 0, "prefetch": 2, "max_bad_fraction": 0.0, "retries": 0}
    data = DataConfig(**strict | {key: value for key, value in settings.items() if key in SECTION})
    given = {key: value for key, value in settings.items() if key not in SECTION}
    whole = source if isinstance(source, Mixture | PlainTars) else Mixture([cast(SampleStore, source)])
    return Stream(whole, data, **given)

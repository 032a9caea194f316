"""What a model has to know of the data that it was trained on; checkpoints and exported folders keep it as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from diffmoe_ep.config import to_tree
from diffmoe_ep.config.foreign import is_number
from diffmoe_ep.data.manifest import KEYS, DataError, Manifest, TextEncoderInfo, entries


@dataclass(frozen=True)
class DataInfo:
    """A manifest without its shards; each field is that of `Manifest`. What nobody knows, as of an imported model's
    data, is empty or None.
    """

    name: str = ""
    kind: Literal["pixels", "moments", ""] = ""
    shape: tuple[int, ...] = ()  # (C, H, W) of a final latent
    dtype: str = ""
    scale: float | None = None  # final latent = stored (pixels) or posterior sample (moments) * scale + shift
    shift: float | None = None
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    licence: str = ""
    flips: int = 1
    num_samples: int = 0
    condition: Literal["class", "text"] = "class"
    text: tuple[TextEncoderInfo, ...] = ()
    image_size: int = 0
    encoder: str = ""
    source: str = ""
    format: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> "DataInfo":
        """What a manifest says, its shards left out."""
        return cls(**{field.name: getattr(manifest, field.name) for field in fields(cls)})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DataInfo":
        """From an object of a JSON file, which may lack keys or have more; ValueError names a key whose value cannot
        be.
        """
        found = {field.name: content[field.name] for field in fields(cls) if content.get(field.name) is not None}
        for key, value in found.items():
            sound = is_number(value) if KEYS[key] is float else type(value) is KEYS[key]
            if not sound:
                raise ValueError(f"{key} of the data is {repr(value)[:60]}, expected {KEYS[key].__name__}")
        for key, kinds in {"kind": ("pixels", "moments", ""), "condition": ("class", "text")}.items():
            if found.get(key, kinds[-1]) not in kinds:
                raise ValueError(f"{key} of the data is {found[key]!r}, expected {kinds[0]} or {kinds[1]}")
        shape = found.get("shape", [])
        if shape and not (len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)):
            raise ValueError(f"shape of the data is {str(shape)[:60]}, expected [C, H, W]")
        if not all(isinstance(name, str) for name in found.get("class_names", ())):
            raise ValueError("class_names of the data are not all text")
        if found.get("kind") == "pixels" and not (shape and {"scale", "shift"} <= found.keys()):
            raise ValueError("data of kind pixels lack shape, scale or shift")
        for key in {"shape", "class_names"} & found.keys():
            found[key] = tuple(found[key])
        try:
            text = entries(TextEncoderInfo, found.get("text", []), "text")
        except DataError as error:
            shown = repr(found["text"])[:60]
            raise ValueError(f"text of the data is {shown}, expected text encoders ({error})") from error
        found["text"] = tuple(TextEncoderInfo(**entry) for entry in text)
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """As an object of a JSON file, lists for tuples; `from_json` reads it."""
        return to_tree(self)

    def text_encoder(self, name: str) -> TextEncoderInfo | None:
        """The encoder of this name whose features of the captions are stored, if there are such."""
        return next((encoder for encoder in self.text if encoder.name == name), None)

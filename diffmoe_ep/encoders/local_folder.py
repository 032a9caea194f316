"""A pretrained model's folder: which files make it what it is, and the fingerprint that identifies it."""

import hashlib
import re
from pathlib import Path
from typing import Any

from diffmoe_ep.config import ConfigError
from diffmoe_ep.config.foreign import open_binary, parse_json, read_bytes


def read_config(folder: Path, what: str, source: str) -> dict[str, Any]:
    """The config.json of a model's folder; ConfigError names the folder and says where such models come from."""
    path = folder / "config.json"
    try:
        content = parse_json(read_bytes(path))
    except OSError as error:
        found = "holds no config.json" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{what} {folder} {found} ({error.strerror}); give {source}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON file ({error}); give {source}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is a {type(content).__name__}, expected an object; give {source}")
    return content


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a model, STEM.safetensors or those that STEM.safetensors.index.json lists; ConfigError
    if some lack.
    """
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.exists():
        try:
            names = sorted(set(parse_json(read_bytes(index))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{index}: is not a list of weight files ({error!r}); fetch the model's folder again"
            ) from error
    outside = [
        str(name)
        for name in names
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name)
    ]
    if outside:
        raise ConfigError(f"{index}: {outside[0][:80]!r} is not a plain file name; fetch the model's folder again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {missing[0]}; save the model once with save_pretrained (pickled weights, .bin or .pt, are "
            "never read), or fetch its safetensors"
        )
    return [folder / name for name in names]


def fingerprint(paths: list[Path]) -> str:
    """The sha256 over names, sizes and contents of files; the folder they lie in does not count."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with open_binary(path) as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {path.stat().st_size} {content}\n".encode())
    return digest.hexdigest()

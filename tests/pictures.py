"""Small picture files and tars of them, for tests."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np


def picture(seed: int, width: int = 20, height: int = 16, kind: str = "PNG") -> bytes:
    """An image file of smooth random colours."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(file, kind)
    return file.getvalue()


def tar(path: Path, files: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    """A tar of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }

"""Versions of what is installed, and who does the work where there is a choice."""

import contextlib
import importlib
import io
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch.nn.functional import grouped_mm

from diffmoe_ep.doctor.finding import Finding

_found = partial(Finding, "software")
PROJECT = "diffmoe_ep"


def versions(requirements: Sequence[str] | None = None) -> Iterator[Finding]:
    """Python, torch and what the project requires. requirements: other ones than the project's own."""
    yield _found("python", "ok", f"{platform.python_version()}, {sys.executable}")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    yield _found("torch", "ok", f"{torch.__version__}, built for {built}", values={"cuda": torch.version.cuda})
    try:
        named = metadata.requires(PROJECT) if requirements is None else requirements
    except metadata.PackageNotFoundError:
        yield _found(PROJECT, "note", "not installed as a package", "pip install -e . -c constraints.txt")
        return
    installed = {"python": platform.python_version(), PROJECT: _version(PROJECT)}
    for text in named or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            said = "not installed" if version is None else f"{version}, and {wanted.specifier} is wanted"
            remedy = f"pip install '{wanted.name}{wanted.specifier}' (./launch/setup.sh makes an environment with all)"
            yield _found(wanted.name, "problem", said, remedy, {"version": version})
        else:
            installed[wanted.name] = version
    rest = ", ".join(f"{name} {version}" for name, version in installed.items() if name not in ("python", "torch"))
    yield _found("packages", "ok", rest, values=installed)


def imports(module: str = "diffmoe_ep.train.trainer") -> Iterator[Finding]:
    """Whether training and all that it builds on can be imported: packages that are there may not fit each other."""
    started, said = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # DeepSpeed's messages
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        remedy = "install what constraints.txt pins: ./launch/setup.sh, or pip install -e . -c constraints.txt"
        yield _found("training", "problem", f"cannot be imported ({reason})", remedy)
        return
    yield _found("training", "ok", f"imported in {time.monotonic() - started:.1f} s")


def providers(device: torch.device) -> Iterator[Finding]:
    """Who does the work where others may: the optimizer, attention, grouped matmuls, compilation."""
    yield from apex()
    yield attention(device)
    yield grouped(device)
    yield compiler(device)


def apex() -> Iterator[Finding]:
    """NVIDIA's FusedAdam. The package index has another project under the name apex."""
    found = find_spec("apex")
    places = [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    if found is None:
        yield _found("FusedAdam", "ok", "none (NVIDIA apex is not installed); torch's AdamW does the work")
    elif not any((place / "optimizers/fused_adam.py").is_file() for place in places):
        remedy = "pip uninstall apex; NVIDIA's comes with its PyTorch images, or is built from its source"
        where = places[0] if places else found.origin
        yield _found("FusedAdam", "note", f"none; the package apex at {where} is not NVIDIA's", remedy)
    elif find_spec("amp_C") is None:
        remedy = "build apex again with its CUDA extensions, or pip uninstall apex"
        yield _found("FusedAdam", "note", f"none; NVIDIA apex {_version('apex')} has no CUDA extensions", remedy)
    else:
        yield _found("FusedAdam", "ok", f"NVIDIA apex {_version('apex')}")


def attention(device: torch.device) -> Finding:
    """The back ends of torch's attention that are there and on."""
    if device.type != "cuda":
        return _found("flash attention", "ok", "torch's for the CPU")
    cuda = torch.backends.cuda
    on = [
        name
        for name, there in (
            ("flash", cuda.flash_sdp_enabled() and cuda.is_flash_attention_available()),
            ("cuDNN", cuda.cudnn_sdp_enabled()),
            ("memory-efficient", cuda.mem_efficient_sdp_enabled()),
        )
        if there
    ]
    if "flash" in on or "cuDNN" in on:
        return _found("flash attention", "ok", f"torch's: {', '.join(on)}", values={"back_ends": on})
    remedy = "install a torch that was built with flash attention (the wheels of pytorch.org are)"
    return _found("flash attention", "note", "none: attention keeps the whole matrix of scores", remedy)


def grouped(device: torch.device) -> Finding:
    """Torch's grouped matmul, tried out beside a loop, with an expert that gets no rows."""
    rows = torch.linspace(-1, 1, 48 * 32, device=device).view(48, 32).bfloat16()
    weight = torch.linspace(-1, 1, 3 * 32 * 16, device=device).view(3, 32, 16).bfloat16()
    ends = torch.tensor([16, 16, 48], device=device, dtype=torch.int32)
    try:
        out = grouped_mm(rows, weight, offs=ends)
    except RuntimeError as error:
        remedy = "leave compute.kernel=auto, which takes another here"
        return _found("grouped matmul", "note", f"none ({str(error).splitlines()[0]})", remedy)
    expected = torch.cat([rows[:16] @ weight[0], rows[16:] @ weight[2]])
    if not torch.allclose(out.float(), expected.float(), atol=0.1, rtol=0.05):
        remedy = "set compute.kernel=batched, and install another torch"
        return _found("grouped matmul", "problem", "torch's gives wrong results on this device", remedy)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        remedy = "leave compute.kernel=auto, or set compute.kernel=batched or fused"
        return _found("grouped matmul", "note", "torch's, which is a slow loop on GPUs before Hopper", remedy)
    return _found("grouped matmul", "ok", "torch's")


def compiler(device: torch.device) -> Finding:
    """What torch.compile needs: a C++ compiler, on GPUs also Triton."""
    program = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    triton = _version("triton") if device.type == "cuda" else ""
    missing = [*([] if program else ["C++ compiler"]), *(["Triton"] if triton is None else [])]
    if missing:
        remedy = "install g++ (Debian, Ubuntu: apt install g++)" if program is None else "pip install triton"
        return _found(
            "torch.compile", "note", f"no {' and no '.join(missing)}", f"{remedy}, or leave compute.compile off"
        )
    return _found("torch.compile", "ok", f"{program}" + (f", Triton {triton}" if triton else ""))


def extras(wanted: Mapping[str, str]) -> Iterator[Finding]:
    """Optional packages that a config needs, each with the setting that does."""
    for package, reason in wanted.items():
        version = _version(package)
        if version is None:
            remedy = f"pip install '{package}', or change {reason}"
            yield Finding("this config", package, "problem", f"not installed, but {reason} needs it", remedy)
        else:
            yield Finding("this config", package, "ok", f"{version}, for {reason}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""DiffMoE diffusion transformers, trained with expert parallelism: a run on N GPUs is the same run as on 1 GPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmoe_ep.checkpoint.load import load_model

__all__ = ["__version__", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the face for programs only when it is asked for, so that `diffmoe --help` does not wait for torch."""
    if name == "load_model":
        from diffmoe_ep.checkpoint.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

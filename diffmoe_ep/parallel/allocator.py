"""This process's memory on the host."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones; False where it cannot (other C libraries).

    By itself it gives tensors over 32 MiB back to the system at once and gets new ones page by page, each page cleared:
    for the gradients of stacked experts, made anew in every step on a CPU, that costs up to a third of the layer's
    time. The price is that the process keeps the most that it ever held.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, -1))

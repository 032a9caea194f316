"""What each expert kernel saves for the backward: the planner asks here."""


def saved_elements(kernel: str, rows: int, width: int, experts: int) -> int:
    """Elements of the compute type that a kernel saves between its two matmuls, for `rows` rows of `experts` experts.

    All save (R, F) before and after GELU, but for `fused`, which computes the second again; `grouped` also saves which
    expert each row is of, (R, E).
    """
    if kernel == "fused":
        return rows * width
    return 2 * rows * width + (rows * experts if kernel == "grouped" else 0)


def keeps_cast_weights(kernel: str) -> bool:
    """Whether the backward finds the weights' copies in the compute type; `fused` casts them again."""
    return kernel != "fused"

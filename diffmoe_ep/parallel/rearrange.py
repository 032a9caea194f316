"""Another grid of the ranks that have joined, for checks and measurements that try several layouts in one process."""

from diffmoe_ep.parallel.mesh import Mesh, init_mesh, is_initialized


def rearrange(expert: int, pool_ranks: int, timeout_minutes: float, device: str | None = None) -> Mesh:
    """As `init_mesh`, also where a grid was made before; that one's groups are not used any more, but live on until
    the process ends.
    """
    if is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    return init_mesh(expert, pool_ranks, timeout_minutes, device)

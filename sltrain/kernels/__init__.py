"""Products with a sparse matrix on a CPU, compiled from C++ on first use. The interface of the package."""

from sltrain.kernels.cpu_kernel import backward, forward, scratch_bytes, status

__all__ = ["backward", "forward", "scratch_bytes", "status"]

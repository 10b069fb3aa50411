"""Products with a sparse matrix on a CPU, compiled from C++ on first use.

    status()           None if they can be used, else why not
    forward(...)       x S^T for each of several S
    backward(...)      gradients of x and of the values of each S
    scratch_bytes(...) what a call takes besides its arguments and results

Nobody else imports the files of this package.
"""

from sltrain.kernels.cpu_kernel import backward, forward, scratch_bytes, status

__all__ = ["backward", "forward", "scratch_bytes", "status"]

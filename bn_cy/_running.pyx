"""What a batch makes of running statistics where the kernels do not see to it: of a batch in parts
or in groups, and of those of PyTorch's layers, which are float32."""

import numpy as np

from cython cimport floating


def take_in(
    running_mean, running_var, const double[:] mean, const double[:] var, double weight,
    double correction
):
    """Take a batch into running statistics of float32 or float64.

    ``running += weight*(batch - running)``, in float64 and rounded once; the variance of the batch
    is multiplied by the correction. A weight of 1 forgets a NaN, and a weight of 0 lets none in.
    """
    shape = (mean.shape[0],)
    if not running_mean.shape == running_var.shape == shape:
        raise ValueError(
            f"running_mean and running_var must have shape {shape}, one value per feature of the "
            f"batch, got {running_mean.shape} and {running_var.shape}"
        )
    average_any(running_mean, mean, weight, 1)
    average_any(running_var, var, weight, correction)


cdef int average_any(running, const double[:] batch, double weight, double factor) except -1:
    if running.dtype == np.float32:
        average[float](running, batch, weight, factor)
    else:
        average[double](running, batch, weight, factor)
    return 0


cdef int average(
    floating[:] running, const double[:] batch, double weight, double factor
) except -1:
    """The twin of that in kernels/moments.pxi."""
    cdef Py_ssize_t f
    if weight == 1:
        for f in range(running.shape[0]):
            running[f] = <floating>(factor * batch[f])
    elif weight != 0:
        for f in range(running.shape[0]):
            running[f] = <floating>(running[f] + weight * (factor * batch[f] - running[f]))
    return 0

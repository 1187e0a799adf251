include "_kernels.pxi"

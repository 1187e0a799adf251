# For Cython code: from bn_cy cimport capi

# Cython code calls the loops without Python through the table that `kernels/__init__.pxd` declares:
#
#     from bn_cy.kernels cimport Kernels, Resources, Shape
#     from cpython.pycapsule cimport PyCapsule_GetPointer
#     from bn_cy._dispatch import KERNELS
#     cdef Kernels *kernels = <Kernels *>PyCapsule_GetPointer(KERNELS, "bn_cy.Kernels")
#     cdef Resources use
#     use.threads, use.cache, use.far = 1, 1 << 20, False
#
# kernels[0] is for float, kernels[1] for double.

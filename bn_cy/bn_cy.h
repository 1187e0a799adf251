/* Batch normalization for C, without the GIL. capi.pxd beside this file says what each function
   does, and docs/capi.md has the whole contract, and an example.

       const bn_cy_functions *bn = bn_cy_import();  // with the GIL; NULL: an exception is set
       status = bn->f32.moments(mean, var, x, outer, features, inner, threads);

   A change of anything below raises BN_CY_ABI: who was compiled against the other is refused. */
#ifndef BN_CY_H
#define BN_CY_H

#include <Python.h>

#define BN_CY_ABI 1
#define BN_CY_CAPSULE "bn_cy.capi.ABI_1"

enum { BN_CY_OK = 0, BN_CY_NO_MEMORY = -1, BN_CY_INVALID = -2 };
enum { BN_CY_MEAN = 0, BN_CY_VAR = 2, BN_CY_STATISTICS = 6 };

#define BN_CY_FUNCTIONS_OF(T) struct { \
    int (*moments)( \
        double *mean, double *var, const T *x, \
        Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads); \
    int (*normalize)( \
        T *y, const T *x, const double *mean, const double *var, \
        const T *gamma, const T *beta, double eps, \
        Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads); \
    int (*gradient_sums)( \
        double *sum_dout, double *sum_dout_xhat, const T *dout, const T *x, \
        const double *mean, const double *var, double eps, \
        Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads); \
    int (*input_gradient)( \
        T *dx, const T *dout, const T *x, \
        const double *mean, const double *var, const T *gamma, double eps, \
        const double *sum_dout, const double *sum_dout_xhat, double count, \
        Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads); \
    int (*forward)( \
        T *y, double *statistics, const T *x, \
        const T *gamma, const T *beta, double eps, \
        Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads); \
    int (*backward)( \
        T *dx, T *dgamma, T *dbeta, const T *dout, const T *x, \
        const double *statistics, \
        Py_ssize_t outer, Py_ssize_t features, Py_ssize_t inner, int threads); \
}

typedef struct {
    BN_CY_FUNCTIONS_OF(float) f32;
    BN_CY_FUNCTIONS_OF(double) f64;
} bn_cy_functions;

static inline const bn_cy_functions *bn_cy_import(void) {
    return (const bn_cy_functions *)PyCapsule_Import(BN_CY_CAPSULE, 0);
}

#endif

"""oneDNN's batch normalization through its C API (version 3), by ctypes.

The enumerations are those of oneapi/dnnl/dnnl_types.h and dnnl_common_types.h.
"""

import contextlib
import ctypes
import importlib.metadata
import os
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p

import numpy as np
from problem import aligned_empty

# Both put a libdnnl.so into the same folder, so an environment has one of them: Intel's, which runs
# on SYCL and TBB, or the older one on OpenMP.
DISTRIBUTIONS = ("onednn", "onednn-cpu-gomp")
REQUIRED = (
    "libintlc.so.5",
    "libirng.so",
    "libimf.so",
    "libsvml.so",
    "libtbb.so.12",
    "libsycl.so.9",
)  # by Intel's: beside it, where the system does not look
CPU, F32, IN_ORDER = 1, 3, 1
FORWARD_TRAINING, BACKWARD = 64, 128
USE_SCALE_AND_SHIFT, FUSE_RELU = 0x2 | 0x4, 0x8
WORKSPACE_DESCRIPTION, WORKSPACE = 135, 64  # what the backward through a ReLU reads
ALLOCATE = c_void_p(-1)
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT = 1, 17, 49, 50, 51, 52
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256


class ExecArg(Structure):
    _fields_ = (("arg", c_int), ("memory", c_void_p))


def installed():
    """Return the distribution of oneDNN that this environment has, or None."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return name
    return None


def load_library():
    """Load libdnnl from the wheel; ImportError where it is not installed."""
    name = installed()
    files = importlib.metadata.files(name) if name else []
    for file in files or []:
        if file.name == "libdnnl.so":
            path = file.locate().resolve()
            try:
                _load_required(path.parent)
                return ctypes.CDLL(str(path))
            except OSError as error:
                raise ImportError(str(error)) from None
    raise ImportError(f"no package {' or '.join(DISTRIBUTIONS)}")


def _load_required(folder):
    opencl = folder / "libintelocl.so"
    if opencl.exists():  # SYCL finds the CPU through it
        os.environ["OCL_ICD_FILENAMES"] = str(opencl)
    for name in REQUIRED:
        if (folder / name).exists():
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)


class OneDNN:
    """Primitives created once per case, memory handed over, as oneDNN's users do."""

    tolerance = 1e-3

    def __init__(self, threads):
        self._dnnl = load_library()
        self._engine, self._stream = c_void_p(), c_void_p()
        self._call("engine_create", byref(self._engine), c_int(CPU), c_size_t(0))
        self._call("stream_create", byref(self._stream), self._engine, c_uint(IN_ORDER))
        self._handles = []

    def bind(self, problem):
        if problem.x.dtype != np.float32:
            raise NotImplementedError("oneDNN normalizes float32 only")
        if problem.case.adds:
            raise NotImplementedError("oneDNN has no addition on a CPU")
        self._release()
        features = problem.case.features
        desc = self._description(*dims_and_strides(problem.case))
        vector = self._description((features,), (1,))
        self._arrays = {
            SRC: problem.x,
            DIFF_DST: problem.dout,
            SCALE: problem.gamma,
            SHIFT: problem.beta,
        }
        for key in (DST, DIFF_SRC):
            self._arrays[key] = aligned_empty(problem.x.shape, np.float32)
        for key in (MEAN, VARIANCE, DIFF_SCALE, DIFF_SHIFT):
            self._arrays[key] = np.empty(features, np.float32)

        relu = bool(problem.case.after)
        eps, flags = c_float(problem.eps), c_uint(USE_SCALE_AND_SHIFT | relu * FUSE_RELU)
        bnorm = "batch_normalization_{}_primitive_desc_create".format
        forward_pd = self._create(
            "primitive_desc",
            bnorm("forward"),
            *(self._engine, c_int(FORWARD_TRAINING), desc, desc, eps, flags, None),
        )
        backward_pd = self._create(
            "primitive_desc",
            bnorm("backward"),
            *(self._engine, c_int(BACKWARD), desc, desc, desc, eps, flags, forward_pd, None),
        )
        memory = {
            key: self._memory(array, desc if array.ndim > 1 else vector)
            for key, array in self._arrays.items()
        }
        inputs = (SRC, MEAN, VARIANCE, SCALE)
        if relu:
            memory[WORKSPACE] = self._workspace(forward_pd)
            inputs += (WORKSPACE,)
        return {
            "forward": self._executor(forward_pd, memory, (*inputs, SHIFT, DST)),
            "backward": self._executor(
                backward_pd, memory, (*inputs, DIFF_DST, DIFF_SRC, DIFF_SCALE, DIFF_SHIFT)
            ),
        }

    def results(self, verbs):
        verbs["forward"]()
        verbs["backward"]()
        return [self._arrays[key] for key in (DST, DIFF_SRC, DIFF_SCALE, DIFF_SHIFT)]

    def _executor(self, descriptor, memory, keys):
        primitive = self._create("primitive", "primitive_create", descriptor)
        args = (ExecArg * len(keys))(*(ExecArg(key, memory[key]) for key in keys))
        execute, wait = self._dnnl.dnnl_primitive_execute, self._dnnl.dnnl_stream_wait
        execute.argtypes = [c_void_p, c_void_p, c_int, POINTER(ExecArg)]
        wait.argtypes = [c_void_p]
        stream, count = self._stream, len(keys)

        def run():
            if execute(primitive, stream, count, args) or wait(stream):
                raise RuntimeError("oneDNN could not execute the primitive")

        return run

    def _memory(self, array, desc):
        address = c_void_p(array.ctypes.data)
        return self._create("memory", "memory_create", desc, self._engine, address)

    def _workspace(self, descriptor):
        """Memory of oneDNN's own for the mask of the ReLU."""
        query = self._dnnl.dnnl_primitive_desc_query_md
        query.restype, query.argtypes = c_void_p, [c_void_p, c_int, c_int]
        desc = c_void_p(query(descriptor, WORKSPACE_DESCRIPTION, 0))
        return self._create("memory", "memory_create", desc, self._engine, ALLOCATE)

    def _description(self, dims, strides):
        vector = c_int64 * 12  # DNNL_MAX_NDIMS
        return self._create(
            "memory_desc",
            "memory_desc_create_with_strides",
            *(c_int(len(dims)), vector(*dims), c_int(F32), vector(*strides)),
        )

    def _create(self, kind, function, *arguments):
        handle = c_void_p()
        self._call(function, byref(handle), *arguments)
        self._handles.append((kind, handle))
        return handle

    def _release(self):
        """Destroy the previous case's objects, the youngest first."""
        while self._handles:
            kind, handle = self._handles.pop()
            self._call(f"{kind}_destroy", handle)

    def _call(self, function, *arguments):
        status = getattr(self._dnnl, f"dnnl_{function}")(*arguments)
        if status:
            raise RuntimeError(f"dnnl_{function} returned status {status}")


def dims_and_strides(case):
    """Describe a case's memory in oneDNN's logical order: examples, channels, height, width.

    oneDNN has no (features, examples) layout; one image of features channels and height 1 is
    the same memory.
    """
    if case.layout == "nchw":
        n, c, h, w = case.shape
        return (n, c, h, w), (c * h * w, h * w, w, 1)
    if case.layout == "nhwc":
        n, h, w, c = case.shape
        return (n, c, h, w), (h * w * c, 1, w * c, c)
    if case.layout == "axis0":
        c, n = case.shape
        return (1, c, 1, n), (c * n, n, n, 1)
    n, c = case.shape
    return (n, c), (c, 1)

"""The machine's streaming limits: streaming.c, compiled on the spot and called by ctypes."""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from problem import aligned_copy, aligned_empty

SOURCE = Path(__file__).with_name("streaming.c")
LINE = 64


def compile_streaming():
    """Compile streaming.c for this processor and load it; ImportError where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "streaming.so"
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run(
                [*command, str(SOURCE), "-o", str(library)],
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise ImportError("no C compiler (cc)") from None
        except subprocess.CalledProcessError as error:
            raise ImportError(f"cc failed: {error.stderr.strip()}") from None
        return ctypes.CDLL(str(library))


class Streaming:
    """Reads and copies an array of the case's size, in the same rounds as the libraries."""

    tolerance = None  # it computes nothing

    def __init__(self, threads):
        library = compile_streaming()
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._read, self._copy = library.stream_read, library.stream_copy
        self._read.argtypes = [pointer, size, ctypes.c_int]
        self._read.restype = ctypes.c_float
        self._copy.argtypes = [pointer, pointer, size, ctypes.c_int]
        self._copy.restype = None
        self.threads = threads

    def bind(self, problem):
        floats = -(-problem.case.nbytes // LINE) * (LINE // 4)
        source = aligned_copy(np.ones(floats, np.float32))
        target = aligned_empty(source.shape, source.dtype)
        target[...] = 0
        lines = source.nbytes // LINE
        self._copy(source.ctypes.data, target.ctypes.data, lines, self.threads)
        if not np.array_equal(source, target):
            raise AssertionError("stream_copy did not copy")
        # The arrays live as long as the closures that hold them.
        return {
            "read": lambda: self._read(source.ctypes.data, lines, self.threads),
            "copy": lambda: self._copy(source.ctypes.data, target.ctypes.data, lines, self.threads),
        }

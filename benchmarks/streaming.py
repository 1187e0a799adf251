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
    """Streams arrays of the case's size, in the same rounds as the libraries.

    read, copy: one array in, and one out: what a forward has.
    read two, add: two arrays in, and their sum out: what a backward has.
    """

    tolerance = None  # it computes nothing

    def __init__(self, threads):
        library = compile_streaming()
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._read, self._copy = library.stream_read, library.stream_copy
        self._add = library.stream_add
        self._read.argtypes = [pointer, size, ctypes.c_int]
        self._read.restype = ctypes.c_float
        self._copy.argtypes = [pointer, pointer, size, ctypes.c_int]
        self._add.argtypes = [pointer, pointer, pointer, size, ctypes.c_int]
        self._copy.restype = self._add.restype = None
        self.threads = threads

    def bind(self, problem):
        floats = -(-problem.case.nbytes // LINE) * (LINE // 4)
        first, second = (aligned_copy(np.full(floats, k, np.float32)) for k in (1, 2))
        target = aligned_empty(first.shape, first.dtype)
        a, b, c = (array.ctypes.data for array in (first, second, target))
        lines = first.nbytes // LINE

        def read_two():
            self._read(a, lines, self.threads)
            self._read(b, lines, self.threads)

        verbs = {
            "read": lambda: self._read(a, lines, self.threads),
            "copy": lambda: self._copy(a, c, lines, self.threads),
            "read two": read_two,
            "add": lambda: self._add(a, b, c, lines, self.threads),
        }
        self._arrays = first, second, target
        for verb, expected in (("copy", 1), ("add", 3)):
            target[...] = 0
            verbs[verb]()
            if not (target == expected).all():
                raise AssertionError(f"{verb} did not write what it should")
        return verbs

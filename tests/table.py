"""The functions of the C API as ctypes calls them, without the GIL: what `bn_cy.h` declares."""

import ctypes
import re
from pathlib import Path

import numpy as np

from bn_cy import capi

HEADER = Path(capi.get_include(), "bn_cy.h").read_text()
CAPSULE = re.search(r'#define BN_CY_CAPSULE "(.*)"', HEADER)[1].encode()
MEAN, VAR, STATISTICS = 0, 2, 6
OK, NO_MEMORY, INVALID = 0, -1, -2

NUMBERS = {"double": ctypes.c_double, "Py_ssize_t": ctypes.c_ssize_t, "int": ctypes.c_int}


def declared():
    """Return the types of each function's arguments, by its name, in the order of the table."""
    functions = re.findall(r"int \(\*(\w+)\)\((.*?)\);", HEADER.replace("\\\n", ""), re.DOTALL)
    return {
        name: [
            ctypes.c_void_p if "*" in argument else NUMBERS[argument.split()[0]]
            for argument in arguments.split(",")
        ]
        for name, arguments in functions
    }


def import_capsule(name):
    """Return the address in a capsule, as the macro of the header gets it."""
    function = ctypes.pythonapi.PyCapsule_Import
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    return function(name, 0)


class Functions:
    """Those for a dtype, as attributes; each takes arrays for pointers, and None for NULL."""

    def __init__(self, dtype):
        types = declared()
        addresses = (ctypes.c_void_p * (2 * len(types))).from_address(import_capsule(CAPSULE))
        first = len(types) if np.dtype(dtype) == np.float64 else 0
        for (name, arguments), address in zip(types.items(), addresses[first:], strict=False):
            function = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(address)
            setattr(self, name, self.with_arrays(function))

    @staticmethod
    def with_arrays(function):
        def call(*arguments):
            return function(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))

        return call

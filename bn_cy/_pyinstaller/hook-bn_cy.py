"""Compiled modules import what PyInstaller does not see: each other, and the kernels by name."""

from PyInstaller.utils.hooks import collect_submodules

hiddenimports = [
    *collect_submodules("bn_cy", filter=lambda name: not name.startswith("bn_cy._pyinstaller")),
    # What the compiled modules take of Python's own.
    *("contextlib", "operator", "os", "typing", "numpy"),
]
# For drawings alone: an application that draws imports it itself.
excludedimports = ["matplotlib"]

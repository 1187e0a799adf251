"""Print the path of every Python from 3.10 on that this machine has and that can build a wheel.

One path a line, oldest first, one Python for each minor version. What is left out is said on
standard error.
"""

import os
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10, "")

PROBE = """
import os, sys, sysconfig
from importlib.util import find_spec
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
lacks = [word for word, there in [("C headers", os.path.exists(headers)),
                                  ("ensurepip", find_spec("ensurepip"))] if not there]
print(sys.version_info[0], sys.version_info[1], getattr(sys, "abiflags", ""), sep=",")
print(" and ".join(lacks))
"""


def candidates():
    """List what may be a Python: on PATH, and under pyenv whether it is on PATH or not."""
    found = [
        path
        for folder in os.get_exec_path()
        for path in [Path(folder, "python3"), *sorted(Path(folder).glob("python3.[0-9]*"))]
        if not path.name.endswith("-config")
    ]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return found + sorted(pyenv.glob("versions/*/bin/python"))


def probe(path):
    """Return (major, minor, abiflags) of a Python that can build a wheel, or None."""
    command = [path, "-c", PROBE]
    try:
        output = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None  # a launcher with no Python behind it, or a Python 2
    version, lacks = output.split("\n")[:2]
    major, minor, abiflags = version.split(",")
    version = int(major), int(minor), abiflags
    if version < OLDEST:
        return None
    if lacks:
        print(f"left out: {path} has no {lacks}", file=sys.stderr)
        return None
    return version


pythons = {}
for path in candidates():
    if version := probe(path):
        pythons.setdefault(version, path)
for version in sorted(pythons):
    print(pythons[version])

"""What the benchmark ran on: processor, caches and versions.

Nothing of bn_cy is imported here: the peers' processes read this module, too, and would get its
settings of the OpenMP runtime.
"""

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

CPU = Path("/sys/devices/system/cpu")
DISTRIBUTIONS = ("bn_cy", "numpy", "torch", "jax", "onednn", "onednn-cpu-gomp")


def describe():
    """Return the machine's description, as it goes into the results."""
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions():
    """Return the version of every library that is installed, by distribution."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cache_bytes(level):
    """Return the size of a core's cache of `level`, 0 where the system does not say."""
    for index in sorted(CPU.glob("cpu0/cache/index*")):
        if int((index / "level").read_text()) == level:
            kilobytes = (index / "size").read_text().strip().removesuffix("K")
            return int(kilobytes) << 10
    try:
        return max(0, os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE"))
    except (ValueError, OSError):
        return 0


def cpus_for(threads):
    """Choose `threads` of the CPUs this process may use, no core twice while there are others."""
    available = sorted(os.sched_getaffinity(0))
    first_of_core, siblings, seen = [], [], set()
    for cpu in available:
        path = CPU / f"cpu{cpu}/topology/thread_siblings_list"
        core = path.read_text() if path.exists() else str(cpu)
        (siblings if core in seen else first_of_core).append(cpu)
        seen.add(core)
    return set((first_of_core + siblings)[:threads])


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""How batch norm scales: over ranks of MPI, measured and modelled, and over threads of one process.

    python benchmarks/scaling.py --plot docs/scaling.png --table scaling.md

Measured here: a training step of `SyncBatchNorm` and the part of it in MPI, on 1 to 4 ranks; the
batch norm and the streaming limits on 1 thread and more. Fitted to 2 ranks: latency and bandwidth.
Modelled: the exchange on up to 10,000 ranks, by these two numbers and by those of common
interconnects. It needs mpi4py and an mpiexec (pip install mpich).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import machine
import measure
import numpy as np

RANKS = (1, 2, 3, 4)
WORKER = Path(__file__).with_name("ranks.py")
TIMEOUT = 300
ROUNDS = 20  # on threads
THREAD_CASES = [cases.parse_case(name) for name in ("rows-4096x256", "rows-16384x1024")]
THREAD_CASES += [cases.parse_case(name) for name in ("nchw-32x64x56x56", "nhwc-32x28x28x256")]
MODELLED = 1024  # features
# Seconds of a message of no length, and bytes a second: typical figures, none of them measured.
INTERCONNECTS = {
    "InfiniBand, 200 Gb/s": (1.5e-6, 25e9),
    "Ethernet, 25 Gb/s": (15e-6, 3e9),
    "Ethernet, 10 Gb/s": (30e-6, 1.2e9),
}
HERE = "shared memory of this machine, as fitted"
COLOURS = {HERE: "#777777"} | dict(
    zip(INTERCONNECTS, ("#1f5fa8", "#2f8f5b", "#c8501e"), strict=True)
)


# --- the model ----------------------------------------------------------------------------


def alltoall(ranks, nbytes, latency, bandwidth):
    """Seconds of an Alltoall of `nbytes` from each rank, by the better of two algorithms.

    In pairs every rank sends ranks - 1 messages; by Bruck's algorithm one for each power of two,
    with half of everything in it.
    """
    steps = math.ceil(math.log2(ranks))
    pairs = (ranks - 1) * latency + nbytes * (ranks - 1) / ranks / bandwidth
    return min(pairs, steps * (latency + nbytes / 2 / bandwidth))


def allgather(ranks, nbytes, latency, bandwidth):
    """Seconds of an Allgather that gives each rank `nbytes`: messages that double."""
    return math.ceil(math.log2(ranks)) * latency + nbytes * (ranks - 1) / ranks / bandwidth


def exchange(ranks, features, latency, bandwidth):
    """Seconds of the two exchanges of a training step as `SyncBatchNorm` makes them."""
    numbers = 2 * ranks * math.ceil(features / ranks)
    there = alltoall(ranks, 8 * (numbers + ranks), latency, bandwidth)
    return 2 * (there + allgather(ranks, 8 * numbers, latency, bandwidth))


def gathered(ranks, features, latency, bandwidth):
    """Seconds of the same by an Allgather alone, which brings everything to every rank."""
    return 2 * allgather(ranks, 8 * ranks * (2 * features + 1), latency, bandwidth)


def fit(records):
    """Return latency and bandwidth from the runs on 2 ranks; None where noise makes one negative.

    Two have a processor each on nearly every machine, and both algorithms of an Alltoall are one.

    For given messages the model is linear in the latency and in the seconds a byte takes. Errors
    are relative, so that short messages count as much as long ones.
    """
    chosen = [r for r in records if r["ranks"] == 2]
    shapes = [(r["ranks"], r["features"]) for r in chosen]
    seconds = np.array([r["exchange"] for r in chosen])
    latencies = [exchange(*shape, 1.0, math.inf) for shape in shapes]
    per_byte = [exchange(*shape, 0.0, 1.0) for shape in shapes]
    terms = np.array([latencies, per_byte]).T / seconds[:, None]
    (latency, of_byte), *_ = np.linalg.lstsq(terms, np.ones(len(chosen)), rcond=None)
    return (float(latency), float(1 / of_byte)) if min(latency, of_byte) > 0 else None


# --- measuring ----------------------------------------------------------------------------


def on_ranks(ranks, seconds):
    """Run ranks.py on so many ranks; return its records."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    mpiexec = shutil.which("mpiexec", path=folders)
    if not mpiexec:
        sys.exit("scaling.py needs mpiexec: pip install mpi4py mpich")
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", str(WORKER), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        sys.exit(f"scaling.py: {' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def on_threads(threads, seconds):
    """Time the cases and the streaming of their arrays with so many threads."""
    records = []
    with measure.workers(["bn_cy out=", "streaming"], threads) as (libraries, absent):
        if absent:
            sys.exit(f"scaling.py: {', '.join(absent.values())}")
        for case in THREAD_CASES:
            with measure.data(case, 0) as folder:
                ours, streaming = (
                    quickest(libraries[name], case, folder, seconds)
                    for name in ("bn_cy out=", "streaming")
                )
            limit = sum(cases.limit_seconds(v, least_reads(case, v), streaming) for v in ours)
            record = {"case": case.name, "threads": threads, "limit": limit}
            records.append({**record, "seconds": sum(ours.values())})
    return records


def quickest(worker, case, folder, seconds):
    """Return the seconds of each verb in the fastest of many short rounds, as ranks.py does."""
    worker.bind(case, folder)
    return {
        verb: min(worker.time(verb, seconds / ROUNDS) for _ in range(ROUNDS))
        for verb in worker.verbs()
    }


def least_reads(case, verb):
    return cases.compulsory_reads(case, verb, machine.cache_bytes(2))


# --- the report ---------------------------------------------------------------------------


def tables(results):
    """Return what was measured and fitted, as Markdown."""
    lines = [
        "| features | ranks | BatchNorm, us | SyncBatchNorm, us | in MPI | exchange alone, us |"
    ]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for r in sorted(results["ranks"], key=lambda r: (r["features"], r["ranks"])):
        alone, step, exchange = (f"{1e6 * r[name]:.3g}" for name in ("alone", "step", "exchange"))
        cells = r["features"], r["ranks"], alone, step, f"{r['mpi'] / r['step']:.0%}", exchange
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", describe_fit(results["fit"]), ""]
    lines += ["| case | threads | forward and backward, us | times faster | streaming |"]
    lines += ["|---|---:|---:|---:|---:|"]
    first = {r["case"]: r for r in results["threads"] if r["threads"] == 1}
    for r in sorted(results["threads"], key=lambda r: (r["case"], r["threads"])):
        ours, limit = (first[r["case"]][name] / r[name] for name in ("seconds", "limit"))
        micro = f"{1e6 * r['seconds']:.0f}"
        lines.append(f"| {r['case']} | {r['threads']} | {micro} | {ours:.2f} | {limit:.2f} |")
    return "\n".join(lines)


def describe_fit(fitted):
    if fitted is None:
        return "Not fitted: too much else was running for a latency and a bandwidth."
    return f"Fitted: {1e6 * fitted[0]:.2g} us a message, {fitted[1] / 1e9:.2g} GB/s."


def plot(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_measured(axes[0, 0], results)
    draw_fit(axes[0, 1], results)
    draw_model(axes[1, 0], results)
    draw_threads(axes[1, 1], results)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.legend(fontsize=7)
    figure.suptitle(f"{results['machine']['processor']}, {results['machine']['cpus']} processors")
    figure.savefig(path, dpi=110)


def draw_measured(ax, results):
    for ranks in RANKS:
        chosen = [r for r in results["ranks"] if r["ranks"] == ranks]
        shares = [r["mpi"] / r["step"] for r in chosen]
        ax.semilogx([r["features"] for r in chosen], shares, "o-", label=f"{ranks} ranks")
    ax.set_title("Measured: share of MPI in a step of SyncBatchNorm, 32 rows a rank")
    ax.set_xlabel("features")
    ax.set_ylim(0, 1)


def draw_fit(ax, results):
    for ranks in RANKS[1:]:
        chosen = [r for r in results["ranks"] if r["ranks"] == ranks]
        features = [r["features"] for r in chosen]
        (line,) = ax.loglog(
            features, [1e6 * r["exchange"] for r in chosen], "o", label=f"{ranks} ranks, measured"
        )
        if results["fit"] is None:
            continue
        model = [1e6 * exchange(ranks, f, *results["fit"]) for f in features]
        ax.loglog(features, model, "--", color=line.get_color(), label=f"{ranks} ranks, model")
    ax.set_title("Measured and fitted: the two exchanges of a step")
    ax.set_xlabel("features")
    ax.set_ylabel("microseconds")


def draw_model(ax, results):
    ranks = np.unique(np.geomspace(2, 10_000, 60).astype(int)).tolist()
    here = {HERE: results["fit"]} if results["fit"] else {}
    for name, figures in {**here, **INTERCONNECTS}.items():
        for way, style, label in ((exchange, "-", name), (gathered, ":", None)):
            model = [1e6 * way(p, MODELLED, *figures) for p in ranks]
            ax.loglog(ranks, model, style, color=COLOURS[name], label=label)
    ax.plot([], [], ":", color="black", label="by an Allgather alone")
    ax.set_title(f"Model, not measured: the two exchanges of a step, {MODELLED} features")
    ax.set_xlabel("ranks")
    ax.set_ylabel("microseconds")


def draw_threads(ax, results):
    for case in THREAD_CASES:
        chosen = [r for r in results["threads"] if r["case"] == case.name]
        threads = [r["threads"] for r in chosen]
        for name, style in (("seconds", "o-"), ("limit", "x:")):
            faster = [chosen[0][name] / r[name] for r in chosen]
            label = case.name + (", streaming" if name == "limit" else "")
            (line,) = ax.plot(threads, faster, style, label=label)
            line.set_color(f"C{THREAD_CASES.index(case)}")
    ax.set_title("Measured: times faster than one thread")
    ax.set_xlabel("threads")
    ax.set_xticks(threads)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="of each measurement (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the tables")
    options = parser.parse_args(arguments)
    cpus = len(os.sched_getaffinity(0))
    results = {"machine": machine.describe(), "versions": machine.versions()}
    results["ranks"] = [r for ranks in RANKS for r in on_ranks(ranks, options.seconds)]
    results["fit"] = fit(results["ranks"])
    results["threads"] = [r for n in range(1, cpus + 1) for r in on_threads(n, options.seconds)]
    print(tables(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.table:
        options.table.write_text(tables(results) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()

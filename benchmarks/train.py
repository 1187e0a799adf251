"""Times a training step of the networks of networks.py."""

from cases import Case
from measure import data, measure, workers
from networks import NETWORKS
from worker import Absent

CASES = [
    *(Case("rows", shape) for shape in [(60, 100), (256, 1024)]),
    *(Case("nchw", shape) for shape in [(64, 1, 8, 8), (32, 3, 32, 32)]),
]
AGREEMENT = 1e-3  # relative difference of the losses after as many steps as below
STEPS = 5


def run(threads, plan, seed, progress):
    """Time the steps of every network that is installed; return a record a case."""
    records = []
    with workers(NETWORKS, threads) as (libraries, absent):
        if "step bn_cy" in absent:
            raise Absent(absent["step bn_cy"])
        for case in CASES:
            progress(f"training step, {case.name}, {threads} threads")
            with data(case, seed) as folder:
                losses = {}
                for name, worker in libraries.items():
                    worker.bind(case, folder)
                    losses[name] = [worker.value("step") for _ in range(STEPS)][-1]
                _check_agreement(case, losses)
                seconds, _ = measure(case, libraries, folder, plan)
            steps = {name: of_verb["step"] for name, of_verb in seconds.items()}
            records.append({"case": case.name, "threads": threads, "seconds": steps})
    return records


def _check_agreement(case, losses):
    if max(losses.values()) - min(losses.values()) > AGREEMENT * max(losses.values()):
        raise RuntimeError(f"{case.name}: the losses after {STEPS} steps differ: {losses}")


def describe(records):
    lines = ["a training step, microseconds (ReLU, SGD with momentum; examples/mlp.py and cnn.py)"]
    for r in records:
        ours = r["seconds"]["step bn_cy"]
        others = "; ".join(
            f"{name.removeprefix('step ')} {1e6 * s:.0f} ({s / ours:.2f} of ours)"
            for name, s in r["seconds"].items()
            if name != "step bn_cy"
        )
        lines.append(f"{r['case']}, {r['threads']} threads: bn_cy {1e6 * ours:.0f}; {others}")
    return "\n".join(lines)

"""Times batch norm with what follows it in one pass, against separate passes and fused peers.

A case is measured with a ReLU and with a residual and a ReLU after it, and in the same rounds
without, so that the price of what follows is a ratio of neighbours.
"""

import dataclasses

import measure
from cases import FOLLOWED
from report import VERBS, duration, geometric_mean, total
from worker import Absent

BARE = "bn_cy bare"
CHANNELS_LAST = ("rows", "nhwc")  # layouts
OURS = ("bn_cy", "bn_cy out=", BARE)
# What each is compared with: fresh outputs with fresh ones, given ones with given ones.
COUNTERPART = {
    "bn_cy, then NumPy": "bn_cy out=",
    "torch": "bn_cy",
    "torch.compile": "bn_cy",
    "jax": "bn_cy",
    "onednn": "bn_cy out=",
}


def run(cases, peers, threads, plan, seed, progress, write):
    """Return a record for every case with what follows it; `write` gets the lines as they come."""
    records = []
    wanted = [
        name for name in COUNTERPART if name.partition(".")[0] in ("bn_cy, then NumPy", *peers)
    ]
    with measure.workers([*OURS, *wanted], threads) as (libraries, absent):
        if "bn_cy" in absent:
            raise Absent(absent["bn_cy"])
        for why in absent.values():
            write(f"absent: {why}")
        peers = [name for name in wanted if name in libraries]
        write("\n" + header(peers))
        for case in cases:
            for after in FOLLOWED:
                followed = dataclasses.replace(case, after=after)
                progress(f"{followed.name}, {threads} threads")
                with measure.data(followed, seed) as folder:
                    seconds, errors = measure.measure(followed, libraries, folder, plan)
                records.append(
                    {
                        "case": case.name,
                        "after": after,
                        "threads": threads,
                        "seconds": seconds,
                        "errors": errors,
                    }
                )
                write(line(records[-1], peers))
    return records


def price(record, verb):
    """Return the time with what follows over the time of the bare batch norm."""
    return record["seconds"]["bn_cy out="][verb] / record["seconds"][BARE][verb]


def ratio(record, peer):
    """Return how many times as long a peer takes, forward and backward together."""
    return total(record["seconds"][peer]) / total(record["seconds"][COUNTERPART[peer]])


def header(peers):
    columns = "".join(f" {peer:>14}" for peer in peers)
    return f"{'case, threads':<34} {'us out=':>15} {'of bare':>11}{columns}"


def line(record, peers):
    seconds = record["seconds"]
    label = f"{record['case']}+{record['after']}, {record['threads']}"
    given = "/".join(duration(seconds["bn_cy out="][verb]) for verb in VERBS)
    prices = "/".join(f"{price(record, verb):.2f}" for verb in VERBS)
    cells = [f"{ratio(record, peer):.2f}" if peer in seconds else "-" for peer in peers]
    return f"{label:<34} {given:>15} {prices:>11}" + "".join(f" {cell:>14}" for cell in cells)


def summary(records):
    """Yield rows (after, what, geometric mean, worst, worst case)."""
    for after in dict.fromkeys(r["after"] for r in records):
        chosen = [r for r in records if r["after"] == after]
        for verb in VERBS:
            values = {r["case"]: price(r, verb) for r in chosen}
            yield _row(after, f"{verb}: time, relative to the bare batch norm", values, max)
        for peer in COUNTERPART:
            values = {r["case"]: ratio(r, peer) for r in chosen if peer in r["seconds"]}
            if values:
                yield _row(after, f"{peer}: time, relative to ours", values, min)
            if peer == "onednn":  # as in report.py: elsewhere it has no fast way
                values = {case: of for case, of in values.items() if case.startswith(CHANNELS_LAST)}
                if values:
                    what = "onednn, rows and NHWC: time, relative to ours"
                    yield _row(after, what, values, min)


def _row(after, what, values, worst_of):
    worst = worst_of(values, key=values.get)
    return after, what, geometric_mean(values.values()), values[worst], worst


def describe(records):
    lines = []
    for threads in sorted({r["threads"] for r in records}):
        chosen = [r for r in records if r["threads"] == threads]
        count = len({r["case"] for r in chosen})
        lines.append(f"batch norm and what follows it, {threads} threads, {count} cases:")
        lines.append(f"{'':<10}{'':<46}{'geo. mean':>10}{'worst':>8}  worst case")
        for after, what, mean, worst, case in summary(chosen):
            lines.append(f"{after:<10}{what:<46}{mean:>10.2f}{worst:>8.2f}  {case}")
        lines.append("")
    return "\n".join(lines)


def markdown(records):
    """Return the table of docs/performance.md, of the largest number of threads."""
    threads = max(r["threads"] for r in records)
    lines = ["| after the batch norm | | geometric mean | worst case |", "|---|---|---|---|"]
    for after, what, mean, worst, case in summary([r for r in records if r["threads"] == threads]):
        lines.append(f"| {after} | {what} | {mean:.2f} | {worst:.2f} ({case}) |")
    return "\n".join(lines)

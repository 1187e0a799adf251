"""The figures as text: one line a case, the summary, and the tables of docs/performance.md."""

import math

from cases import LARGE, limit_seconds
from peers import COUNTERPART, LAYER

VERBS = ("forward", "backward")
LIMIT = "streaming, 32 MB and more"
OF_LAYER = "function, time of layer's"
BUSY = 0.3  # load average from which others are warned of


def total(seconds):
    return sum(seconds[verb] for verb in VERBS)


def ratio(record, peer, verb=None):
    """Return how many times faster bn_cy is than `peer`: in `verb`, or in both together."""
    seconds = record["seconds"]
    pick = total if verb is None else lambda of_verb: of_verb[verb]
    return pick(seconds[peer]) / pick(seconds[COUNTERPART[peer]])


def fraction_of_limit(record, verb=None, library="bn_cy out="):
    """Return the streaming limit's time over ours: 1 is the speed of the memory bus.

    Outputs are given, as they are to the streaming copy.
    """
    verbs = VERBS if verb is None else (verb,)
    streaming = record["seconds"]["streaming"]
    limit = sum(limit_seconds(v, record["compulsory_reads"][v], streaming) for v in verbs)
    return limit / sum(record["seconds"][library][v] for v in verbs)


def rate(record, verb, library="bn_cy out="):
    """Return the compulsory traffic in GB/s."""
    moved = (record["compulsory_reads"][verb] + 1) * record["bytes"]
    return moved / record["seconds"][library][verb] / 1e9


def share_of_layer(record, verb):
    """Return the function's time over the layer's: 1 is a layer that costs nothing."""
    return record["seconds"]["bn_cy"][verb] / record["seconds"][LAYER][verb]


def peers_in(records):
    return [peer for peer in COUNTERPART if any(peer in r["seconds"] for r in records)]


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def duration(seconds):
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def describe_run(results):
    """Return the header: what ran where."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    busy = f"load average before the run {machine['load_before']}"
    lines = [
        f"{machine['processor']}, {machine['cpus']} CPUs, "
        f"L2 {_size(machine['l2_bytes'])} a core, L3 {_size(machine['l3_bytes'])}; "
        f"{machine['system']}, Python {machine['python']}",
        f"{versions}; seed {results['seed']}; {busy}",
    ]
    if machine["load_before"] > BUSY:
        lines.append("WARNING: other programs are running; these figures will not be repeatable")
    return "\n".join(lines)


def describe_choice(chosen, known):
    """Return what a run without options does: seven cases of its kind take two minutes."""
    minutes = round(2 * chosen / 7)
    return f"{chosen} cases, about {minutes} minutes; --cases all times all {known}"


def _size(nbytes):
    return f"{nbytes / 2**20:.3g} MB" if nbytes else "unknown"


def describe_streaming(rows):
    """Return the table of the streaming limits: GB/s by size of the array and threads."""
    lines = ["streaming, GB/s      array   threads     read   read + write (non-temporal)"]
    for row in rows:
        read, copy = row["bytes"] / row["read"] / 1e9, 2 * row["bytes"] / row["copy"] / 1e9
        lines.append(f"{_size(row['bytes']):>26} {row['threads']:>9} {read:>8.1f} {copy:>8.1f}")
    return "\n".join(lines)


def header(peers):
    columns = "".join(f" {peer + ' f/b/both':>19}" for peer in peers)
    return (
        f"{'case, threads':<28} {'us fwd/bwd':>15} {'us out=':>15} {'us layer':>15} {'GB/s':>11} "
        f"{'of limit':>9}"
        f"{columns}"
    )


def line(record, peers):
    """Return one case's line; a star marks arrays large enough for the streaming limit."""
    seconds = record["seconds"]
    label = f"{record['case']}{'*' if record['bytes'] >= LARGE else ''}, {record['threads']}"
    text = f"{label:<28}"
    for library in ("bn_cy", "bn_cy out=", LAYER):
        text += f" {'/'.join(duration(seconds[library][v]) for v in VERBS):>15}"
    text += f" {'/'.join(f'{rate(record, v):.1f}' for v in VERBS):>11}"
    limits = [f"{fraction_of_limit(record, v):.2f}" for v in VERBS if "streaming" in seconds]
    text += f" {'/'.join(limits) or '-':>9}"
    for peer in peers:
        verbs = (*VERBS, None)
        cell = "/".join(f"{ratio(record, peer, v):.2f}" for v in verbs if peer in seconds)
        text += f" {cell or '-':>19}"
    return text


def summary(records, threads):
    """Return rows (against, verb, geometric mean, worst ratio, worst case)."""
    records = [r for r in records if r["threads"] == threads]
    rows = []
    for peer in peers_in(records):
        timed = [r for r in records if peer in r["seconds"]]
        for verb in (None, *VERBS):
            rows.append(_row(peer, verb, timed, lambda r, p=peer, v=verb: ratio(r, p, v)))
        if peer == "onednn" and any(r["layout"] in ("rows", "nhwc") for r in timed):
            inner = [r for r in timed if r["layout"] in ("rows", "nhwc")]
            rows.append(_row("onednn, rows and NHWC", None, inner, lambda r: ratio(r, "onednn")))
    if all(LAYER in r["seconds"] for r in records):
        for verb in VERBS:
            rows.append(_row(OF_LAYER, verb, records, lambda r, v=verb: share_of_layer(r, v)))
    large = [r for r in records if r["bytes"] >= LARGE and "streaming" in r["seconds"]]
    if large:
        for verb in (None, *VERBS):
            rows.append(_row(LIMIT, verb, large, lambda r, v=verb: fraction_of_limit(r, v)))
    return rows


def _row(against, verb, records, figure):
    values = {r["case"]: figure(r) for r in records}
    worst = min(values, key=values.get)
    return against, verb or "both", geometric_mean(values.values()), values[worst], worst


def describe_summary(records):
    lines = []
    for threads in sorted({r["threads"] for r in records}):
        count = sum(r["threads"] == threads for r in records)
        lines.append(f"times faster, {threads} threads, {count} cases:")
        lines.append(f"{'against':<27}{'':<10}{'geo. mean':>10}{'worst':>8}  worst case")
        for against, verb, mean, worst, case in summary(records, threads):
            lines.append(f"{against:<27}{verb:<10}{mean:>10.2f}{worst:>8.2f}  {case}")
        lines.append("")
    return "\n".join(lines)


def markdown(results):
    """Return the tables of docs/performance.md, of the largest number of threads in the results."""
    records = results["cases"]
    threads = max(r["threads"] for r in records)
    records = [r for r in records if r["threads"] == threads]
    peers = peers_in(records)
    versions, machine = results["versions"], results["machine"]
    lines = [
        f"{machine['processor']}, {threads} threads, {len(records)} cases, float32 unless named "
        "otherwise, training forward and backward; medians. "
        + ", ".join(f"{name} {v}" for name, v in versions.items())
        + ".",
        "",
        "| against | times faster, geometric mean | worst case |",
        "|---|---|---|",
    ]
    for against, verb, mean, worst, case in summary(records, threads):
        if verb == "both":
            lines.append(f"| {against} | {mean:.2f} | {worst:.2f} ({case}) |")
    lines += [
        "",
        "| case | bn_cy fwd / bwd, us | " + " | ".join(peers) + " |",
        "|---|---|" + "---|" * len(peers),
    ]
    for r in records:
        ours = " / ".join(duration(r["seconds"]["bn_cy"][v]) for v in VERBS)
        cells = [f"{ratio(r, p):.1f}" if p in r["seconds"] else "-" for p in peers]
        lines.append(f"| {r['case']} | {ours} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

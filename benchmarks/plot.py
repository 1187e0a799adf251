"""The picture: how many times faster than each peer, case by case."""

from report import peers_in, ratio

TITLES = {
    "rows": "rows (examples, features)",
    "axis0": "(features, examples)",
    "nchw": "NCHW (examples, channels, height, width)",
    "nhwc": "NHWC (examples, height, width, channels)",
}
COLOURS = {"numpy": "#4c78a8", "torch": "#e45756", "jax": "#54a24b", "onednn": "#b279a2"}
LABELS = {"numpy": "NumPy formula", "torch": "PyTorch", "jax": "JAX", "onednn": "oneDNN"}


def plot(results, path):
    """Draw the ratios of forward and backward together into the file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = results["cases"]
    threads = max(r["threads"] for r in records)
    records = [r for r in records if r["threads"] == threads]
    peers = peers_in(records)
    groups = {
        layout: [r for r in records if r["layout"] == layout]
        for layout in TITLES
        if any(r["layout"] == layout for r in records)
    }
    figure, axes = plt.subplots(
        len(groups),
        figsize=(9, 2 + 0.24 * (len(records) + 2 * len(groups))),
        sharex=True,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [len(group) + 0.5 for group in groups.values()]},
    )
    for ax, (layout, group) in zip(axes[:, 0], groups.items(), strict=True):
        _draw_group(ax, TITLES[layout], group, peers)
    _scale(axes[-1, 0], [ratio(r, p) for r in records for p in peers if p in r["seconds"]])
    axes[-1, 0].set_xlabel("times faster (1 = as fast)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        f"How many times faster bn_cy is: training forward + backward, {threads} threads\n"
        f"{results['machine']['processor']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_group(ax, title, group, peers):
    places = range(len(group))[::-1]
    ax.axvline(1, color="black", linewidth=1.2)
    for peer in peers:
        points = [
            (ratio(r, peer), y) for r, y in zip(group, places, strict=True) if peer in r["seconds"]
        ]
        ax.scatter(
            *zip(*points, strict=True), s=42, color=COLOURS[peer], label=LABELS[peer], zorder=3
        )
    names = [r["case"].partition("-")[2].replace("x", " x ") for r in group]
    ax.set_yticks(places, names, fontsize=8)
    ax.set_ylim(-0.7, len(group) - 0.3)
    ax.set_title(title, fontsize=9, loc="left")
    ax.grid(axis="x", which="major", alpha=0.35)
    ax.grid(axis="y", alpha=0.15)
    ax.spines[["top", "right"]].set_visible(False)


def _scale(ax, ratios):
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    ax.set_xscale("log")
    ax.set_xlim(min(0.8, *ratios) * 0.9, max(2, *ratios) * 1.15)
    low, high = ax.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
    ax.minorticks_off()

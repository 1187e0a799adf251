"""Four experiments on why batch norm works, on handwritten digits and one least-squares problem.

noise      noise after every batch norm, as far from mean 0 and variance 1 as any drift
landscape  how the loss and its gradient change along the gradient
shift      how a layer's gradient changes when the layers below it make their step
length     gradient descent on a weight whose length does not count

They repeat, at the size of scikit-learn's digits, what Santurkar and others, "How Does Batch
Normalization Help Optimization?" (2018), and Kohler and others, "Exponential convergence rates for
Batch Normalization" (2018), have measured or proved. docs/why_it_works.md tells the story.

Prints a table and draws a PNG for each. Ctrl-C ends the run: experiments that are done are kept.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlp import MLP, SGD, Linear, ReLU, Sigmoid, SoftmaxCrossEntropy, train_step
from probes import Meter, Noise, along_gradient, covariate_shift

try:
    from matplotlib.figure import Figure
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    from bn_cy import BatchNorm, batchnorm_backward, batchnorm_forward
except ModuleNotFoundError as error:
    sys.exit(f'why_it_works.py needs {error.name}: pip install ".[examples]"')

from train_digits import (
    CLASSES,
    COLOURS,
    MOMENTUM,
    NAMES,
    TARGET,
    WEIGHT_STD,
    HelpFormatter,
    Parser,
    batches,
    integer,
    load_data,
    mean_and_spread,
)

BATCH = 60
QUICK = 10  # how many times fewer steps --quick makes
AHEAD = np.geomspace(0.5, 4, 8)  # places looked at along the gradient, in learning rates

# Everything is in doubles: differences of gradients are measured.
DTYPE = np.float64


# --- networks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A form of network: its hidden layers, and the deviation of the first weights."""

    title: str
    depth: int
    width: int
    activation: type | None
    gain: float  # weights have the variance gain / inputs; 0: WEIGHT_STD squared

    def std(self, inputs):
        return np.sqrt(self.gain / inputs) if self.gain else WEIGHT_STD


KINDS = {
    "sigmoid": Kind("3 layers of 100 sigmoids", 3, 100, Sigmoid, 0),
    "relu": Kind("5 layers of 64 ReLUs", 5, 64, ReLU, 2),
    "linear": Kind("10 linear layers of 64", 10, 64, None, 1),
}


def build(kind, batch_norm, seed, *, noise=False, track=False):
    """Build a network whose first weights depend on the kind and the seed alone."""
    kind, rng, noise_rng = KINDS[kind], *(np.random.default_rng([seed, i]) for i in (0, 2))
    layers, inputs = [], 64
    for _ in range(kind.depth):
        std = kind.std(inputs)
        layers.append(
            Linear(inputs, kind.width, rng=rng, std=std, bias=not batch_norm, dtype=DTYPE)
        )
        if batch_norm:
            # A network that diverges is a result here, and no error.
            options = {"track_running_stats": track, "on_nonfinite": "update", "dtype": DTYPE}
            layers.append(BatchNorm(kind.width, **options))
        if noise:
            layers.append(Noise(noise_rng))
        if kind.activation:
            layers.append(kind.activation())
        inputs = kind.width
    layers.append(Linear(inputs, CLASSES, rng=rng, std=kind.std(inputs), dtype=DTYPE))
    return MLP(layers)


def mini_batches(data, seed, steps):
    """Yield (step, x, labels) of the training images."""
    x, _, labels, _ = data
    for step, index in zip(range(steps), batches(len(x), BATCH, seed), strict=False):
        yield step, x[index], labels[index]


def name_of(batch_norm, noise=False):
    return NAMES[batch_norm] + (", noise" if noise else "")


# --- 1: noise -----------------------------------------------------------------------------

NETWORKS_WITH_NOISE = [("sigmoid", 0.1), ("relu", 0.03), ("relu", 0.1)]
VARIANTS = [(False, False), (False, True), (True, False), (True, True)]  # batch norm, noise


def train_with_noise(kind, rate, variant, seed, data, steps):
    """Return rows of (step, test accuracy, change of the means, change of the deviations).

    The changes are those of what enters the last hidden layer's activation, from one step to the
    next, averaged over its units: of the mean in deviations, of the deviation as a ratio.
    """
    batch_norm, noise = variant
    network = build(kind, batch_norm, seed, noise=noise, track=True)
    meter = Meter()
    network.layers.insert(-2, meter)
    loss, optimizer = SoftmaxCrossEntropy(), SGD(network, rate, MOMENTUM)
    rows, before = [], None
    for step, x, labels in mini_batches(data, seed, steps):
        train_step(network, loss, optimizer, x, labels)
        now = meter.mean, meter.std
        if step % 10 == 9:
            of_mean = np.mean(np.abs(now[0] - before[0]) / before[1])
            of_std = np.mean(np.abs(np.log(now[1] / before[1])))
            rows.append((step + 1, accuracy(network, data), of_mean, of_std))
        before = now
    return np.array(rows)


def accuracy(network, data):
    network.eval()
    right = network.forward(data[1]).argmax(axis=1) == data[3]
    network.train()
    return np.mean(right)


def table_noise(results):
    yield (
        "network",
        "rate",
        "",
        "test accuracy %",
        "steps to 90 %",
        "change of mean",
        "of deviation",
    )
    for (kind, rate, variant), runs in results.items():
        first = [steps_to_target(run) for run in runs]
        reached = [step for step in first if step is not None]
        steps = mean_and_spread(reached, ".0f") if reached else "never"
        if 0 < len(reached) < len(first):
            steps += f" ({len(reached)} of {len(first)})"
        yield (
            KINDS[kind].title,
            f"{rate:g}",
            name_of(*variant),
            mean_and_spread(100 * runs[:, -1, 1], ".1f"),
            steps,
            mean_and_spread(runs[:, :, 2].mean(axis=1), ".2f"),
            mean_and_spread(runs[:, :, 3].mean(axis=1), ".2f"),
        )


def steps_to_target(run):
    return next((int(row[0]) for row in run if row[1] >= TARGET), None)


def draw_noise(figure, results):
    axes = figure.subplots(2, len(NETWORKS_WITH_NOISE), sharex=True, sharey="row")
    for (kind, rate, variant), runs in results.items():
        upper, lower = axes[:, NETWORKS_WITH_NOISE.index((kind, rate))]
        batch_norm, noise = variant
        style = {"color": COLOURS[batch_norm], "linestyle": "--" if noise else "-"}
        band(upper, runs[0, :, 0], runs[:, :, 1], label=name_of(*variant), **style)
        band(lower, runs[0, :, 0], runs[:, :, 2], **style)
        upper.set_title(f"{KINDS[kind].title}, rate {rate:g}")
        lower.set_xlabel("training step")
    axes[0, 0].set_ylabel("test accuracy")
    axes[1, 0].set_ylabel("change of the means, a step")
    axes[1, 0].set_yscale("symlog", linthresh=0.1)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


# --- 2: the landscape ---------------------------------------------------------------------

LANDSCAPES = [("relu", 0.1), ("linear", 0.03), ("relu", 0.01), ("linear", 0.01)]
MEASURES = ["range of the loss", "change of the gradient", "the same per distance"]


def train_and_look(kind, rate, batch_norm, seed, data, steps):
    """Return rows of (step, lowest loss, highest loss, change of gradient, smoothness) ahead."""
    network, loss = build(kind, batch_norm, seed), SoftmaxCrossEntropy()
    optimizer, rows = SGD(network, rate, 0), []
    for step, x, labels in mini_batches(data, seed, steps):
        if step % 10 == 0:
            losses, changes, smoothness = along_gradient(network, loss, x, labels, rate * AHEAD)
            rows.append((step, losses.min(), losses.max(), changes.max(), smoothness.max()))
        train_step(network, loss, optimizer, x, labels)
    return np.array(rows)


def table_landscape(results):
    """Medians over the steps, and their spread over the seeds."""
    yield "network", "rate", "", *MEASURES
    for (kind, rate, batch_norm), runs in results.items():
        measures = runs[:, :, 2] - runs[:, :, 1], runs[:, :, 3], runs[:, :, 4]
        cells = (mean_and_spread(np.median(m, axis=1), ".3g") for m in measures)
        yield KINDS[kind].title, f"{rate:g}", NAMES[batch_norm], *cells


def draw_landscape(figure, results):
    axes = figure.subplots(3, len(LANDSCAPES), sharex=True, sharey="row")
    for (kind, rate, batch_norm), runs in results.items():
        column = axes[:, LANDSCAPES.index((kind, rate))]
        steps, colour = runs[0, :, 0], COLOURS[batch_norm]
        low, high = np.median(runs[:, :, 1:3], axis=0).T
        column[0].fill_between(
            steps, low, high, color=colour, alpha=0.5, linewidth=0, label=NAMES[batch_norm]
        )
        for ax, measure in zip(column[1:], (runs[:, :, 3], runs[:, :, 4]), strict=True):
            band(ax, steps, measure, color=colour)
            ax.set_yscale("log")
        column[0].set_ylim(0, 5)  # of the plain network at the larger rate the tops are cut
        column[0].set_title(f"{KINDS[kind].title}, rate {rate:g}")
        column[-1].set_xlabel("training step")
    for ax, name in zip(axes[:, 0], MEASURES, strict=True):
        ax.set_ylabel(name)
    axes[0, 0].legend()


# --- 3: internal covariate shift ------------------------------------------------------------

SHIFT_RATES = [0.01, 0.03, 0.1, 0.3, 1.0]
SHIFT_KINDS = ["relu", "linear"]


def train_and_compare(kind, rate, batch_norm, seed, data, steps):
    """Return medians over steps and layers of cosine and distance, and the mean of last losses."""
    network, loss = build(kind, batch_norm, seed), SoftmaxCrossEntropy()
    optimizer, rows, losses = SGD(network, rate, 0), [], []
    for step, x, labels in mini_batches(data, seed, steps):
        if step % 10 == 0:
            rows.append(covariate_shift(network, loss, x, labels, rate))
        losses.append(train_step(network, loss, optimizer, x, labels))
    return *np.median(rows, axis=(0, 2)), np.mean(losses[-10:])


def best_rate(results, kind, batch_norm):
    """The rate with the lowest last loss, over all seeds."""
    return min(
        SHIFT_RATES,
        key=lambda rate: np.nan_to_num(results[kind, rate, batch_norm][:, 2].mean(), nan=np.inf),
    )


def table_shift(results):
    yield "network", "", "rate", "cosine", "distance", "last loss"
    for (kind, rate, batch_norm), runs in results.items():
        best = " (best)" if rate == best_rate(results, kind, batch_norm) else ""
        if np.isfinite(runs).all():
            cells = (mean_and_spread(column, ".2f") for column in runs.T)
        else:
            diverged = np.count_nonzero(~np.isfinite(runs).all(axis=1))
            cells = f"diverges ({diverged} of {len(runs)})", "", ""
        yield KINDS[kind].title, NAMES[batch_norm], f"{rate:g}{best}", *cells


def draw_shift(figure, results):
    axes = figure.subplots(2, len(SHIFT_KINDS), sharex=True, sharey="row")
    for i, kind in enumerate(SHIFT_KINDS):
        for batch_norm in NAMES:
            runs = np.array([results[kind, rate, batch_norm] for rate in SHIFT_RATES])
            best = SHIFT_RATES.index(best_rate(results, kind, batch_norm))
            for ax, column in zip(axes[:, i], (0, 1), strict=True):
                mean, spread = runs[:, :, column].mean(axis=1), runs[:, :, column].std(axis=1)
                style = {"color": COLOURS[batch_norm], "capsize": 3}
                ax.errorbar(SHIFT_RATES, mean, spread, label=NAMES[batch_norm], **style)
                ax.plot(SHIFT_RATES[best], mean[best], "o", color=COLOURS[batch_norm], markersize=9)
                ax.set_xscale("log")
        axes[0, i].set_title(KINDS[kind].title)
        axes[1, i].set_xlabel("learning rate")
    axes[0, 0].set_ylabel("cosine of the two gradients")
    axes[1, 0].set_ylabel("their distance, relative")
    axes[0, 0].plot([], [], "o", color="0.4", markersize=9, label="lowest last loss")
    axes[0, 0].legend()


# --- 4: length and direction ----------------------------------------------------------------

CONDITION = 1000.0
INPUTS, EXAMPLES = 20, 1000
HIGHEST = 1e3  # a loss above the least that is drawn; what diverges is drawn there
DESCENT_RATES = np.geomspace(0.01, 1000, 21)


class LeastSquares:
    """Gaussian inputs whose covariance has eigenvalues from 1 / CONDITION to 1, and a target."""

    def __init__(self, seed):
        rng = np.random.default_rng([seed, 3])
        rotation, _ = np.linalg.qr(rng.normal(size=(INPUTS, INPUTS)))
        scales = np.sqrt(np.geomspace(1 / CONDITION, 1, INPUTS))
        self.x = rng.normal(size=(EXAMPLES, INPUTS)) * scales @ rotation
        self.x -= self.x.mean(axis=0)
        self.y = self.x @ rng.normal(size=(INPUTS, 1)) + 0.1 * rng.normal(size=(EXAMPLES, 1))
        self.y -= self.y.mean()
        self.start = rng.normal(size=(INPUTS, 1))
        self.start /= np.std(self.x @ self.start)  # then batch norm changes nothing at the start
        self.least = self.loss(self.x @ np.linalg.lstsq(self.x, self.y, rcond=None)[0])

    def loss(self, out):
        return np.mean((out - self.y) ** 2) / 2

    def gradients(self, w, gamma):
        """Return the output and the gradients of w and gamma; without batch norm gamma is None."""
        u = self.x @ w
        if gamma is None:
            return u, self.x.T @ (u - self.y) / EXAMPLES, None
        out, cache = batchnorm_forward(u, gamma, eps=0)
        du, dgamma, _ = batchnorm_backward((out - self.y) / EXAMPLES, cache)
        return out, self.x.T @ du, dgamma


def descend(problem, rate, batch_norm, steps):
    """Return rows of (loss above the least, length of w, cosine of w and its gradient)."""
    w, gamma = problem.start.copy(), np.ones(1) if batch_norm else None
    rows = []
    for _ in range(steps):
        out, dw, dgamma = problem.gradients(w, gamma)
        lengths = np.linalg.norm(w), np.linalg.norm(dw)
        rows.append(
            (problem.loss(out) - problem.least, lengths[0], np.sum(w * dw) / np.prod(lengths))
        )
        w -= rate * dw
        if batch_norm:
            gamma -= rate * dgamma
    return np.array(rows)


def descend_at_every_rate(batch_norm, seed, data, steps):
    """Return the rows at each of the rates; the images are not looked at."""
    problem = LeastSquares(seed)
    return [descend(problem, rate, batch_norm, steps) for rate in DESCENT_RATES]


def best_of(descents):
    """Return the index of the rate that comes down lowest."""
    return np.argmin(np.nan_to_num(descents[:, -1, 0], nan=np.inf))


def usable(descents):
    """The descents that came down to a thousandth of the loss above the least, by rising rates."""
    return [rows for rows in descents if rows[-1, 0] <= rows[0, 0] / 1000]


def growth(rows):
    """How much longer the weight has become."""
    return rows[-1, 1] / rows[0, 1]


def table_length(results):
    yield (
        "",
        "best rate",
        "log10 of excess loss",
        "largest |cosine|",
        f"rates of {len(DESCENT_RATES)} to 1/1000",
        "growth of w at the largest",
    )
    for (batch_norm,), runs in results.items():
        rates = [DESCENT_RATES[best_of(descents)] for descents in runs]
        best = [descents[best_of(descents)] for descents in runs]
        good = [usable(descents) for descents in runs]
        largest = [growth(descents[-1]) for descents in good if descents]
        yield (
            NAMES[batch_norm],
            mean_and_spread(rates, ".2g"),
            mean_and_spread([np.log10(rows[-1, 0] / rows[0, 0]) for rows in best], ".2f"),
            f"{max(np.abs(rows[:, 2]).max() for rows in best):.0e}",
            mean_and_spread([len(descents) for descents in good], ".1f"),
            mean_and_spread(largest, ".2f") if largest else "",
        )


def draw_length(figure, results):
    left, middle, right = figure.subplots(1, 3)
    for (batch_norm,), runs in results.items():
        style = {"color": COLOURS[batch_norm], "label": NAMES[batch_norm]}
        best = np.array([descents[best_of(descents)] for descents in runs])
        steps, ends = np.arange(best.shape[1]), runs[:, :, -1, 0]
        band(left, steps, best[:, :, 0], **style)
        band(middle, DESCENT_RATES, np.where(ends < HIGHEST, ends, HIGHEST), **style)
        band(right, steps, best[:, :, 1] / best[:, :1, 1], **style)
    for ax in (left, middle):
        ax.set_yscale("log")
    middle.set_xscale("log")
    middle.set_ylim(top=HIGHEST)
    left.set_title("loss above the least, each at its best rate")
    middle.set_title(f"the same after {len(steps)} steps, by rate")
    right.set_title("length of w, relative to the start")
    for ax, name in zip((left, middle, right), ("step", "learning rate", "step"), strict=True):
        ax.set_xlabel(name)
    left.legend()


# --- all of them ----------------------------------------------------------------------------


def band(ax, steps, runs, **style):
    """Draw the median over the seeds, and a band from the lowest to the highest."""
    ax.plot(steps, np.median(runs, axis=0), **style)
    low, high = runs.min(axis=0), runs.max(axis=0)
    ax.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


@dataclass(frozen=True)
class Experiment:
    """What is run, told and drawn under one name."""

    claim: str
    steps: int
    settings: list  # each a tuple, the first arguments of `measure`
    measure: Callable  # (*setting, seed, data, steps) -> an array of numbers
    table: Callable  # {setting: array, the seeds first} -> rows of cells
    draw: Callable  # (figure, the same)
    size: tuple


EXPERIMENTS = {
    "noise": Experiment(
        "Santurkar et al., figure 2: noise after each batch norm, and it trains as well; the same "
        "noise without batch norm, and it does not.",
        600,
        [(*network, variant) for network in NETWORKS_WITH_NOISE for variant in VARIANTS],
        train_with_noise, table_noise, draw_noise, (13, 6),
    ),
    "landscape": Experiment(
        "Santurkar et al., figure 4: along the gradient the loss varies less, and the gradient is "
        "steadier, with batch norm.",
        200,
        [(*network, batch_norm) for network in LANDSCAPES for batch_norm in NAMES],
        train_and_look, table_landscape, draw_landscape, (15, 8),
    ),
    "shift": Experiment(
        "Santurkar et al., figure 3: batch norm does not reduce the change of a layer's gradient "
        "by the step of the layers below; often it is larger.",
        200,
        [
            (kind, rate, batch_norm)
            for kind, batch_norm, rate in itertools.product(SHIFT_KINDS, NAMES, SHIFT_RATES)
        ],
        train_and_compare, table_shift, draw_shift, (10, 6),
    ),
    "length": Experiment(
        "Kohler et al.: batch norm separates the length of a weight from its direction, which can "
        "make gradient descent faster.",
        1000, [(False,), (True,)], descend_at_every_rate, table_length, draw_length, (15, 4.5),
    ),
}  # fmt: skip


def print_table(rows):
    rows = [tuple(str(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def run(experiment, seeds, steps, data, bar):
    """Return the measurements of every setting, an array with the seeds along the first axis."""
    results = {setting: [] for setting in experiment.settings}
    for setting, runs in results.items():
        for seed in range(seeds):
            runs.append(experiment.measure(*setting, seed, data, steps))
            bar.update()
    return {setting: np.array(runs) for setting, runs in results.items()}


def perform(name, data, args):
    """Run one experiment, print its table and draw its figure."""
    experiment = EXPERIMENTS[name]
    seeds, steps = (1, experiment.steps // QUICK) if args.quick else (args.seeds, experiment.steps)
    total = seeds * len(experiment.settings)
    bar = tqdm(total=total, desc=name, unit="run", disable=args.quiet)
    # One thread is as fast as two for matrices this small; see train_digits.py. A network that
    # diverges is a result.
    with bar, threadpool_limits(1, user_api="blas"), np.errstate(all="ignore"):
        results = run(experiment, seeds, steps, data, bar)
    print(f"\n{name}: {experiment.claim}\n")
    print_table(experiment.table(results))
    figure = Figure(figsize=experiment.size, layout="constrained")
    experiment.draw(figure, results)
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    path = args.folder / f"why_{name}.png"
    figure.savefig(path, dpi=80)
    print(f"\nMean ± standard deviation; seeds: {seeds}. Picture: {path}", flush=True)


def folder(text):
    path = Path(text)
    if not path.is_dir():
        raise ValueError
    return path


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--only",
        choices=EXPERIMENTS,
        nargs="+",
        metavar="NAME",
        default=list(EXPERIMENTS),
        help="experiments to run",
    )
    parser.add_argument("--seeds", type=integer(1), metavar="N", default=5, help="runs of each")
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed and one {QUICK}th of the steps"
    )
    parser.add_argument(
        "--folder", type=folder, default=Path("."), help="where the pictures go; it must exist"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    data = [array.astype(DTYPE) if array.ndim == 2 else array for array in load_data()]
    for name in args.only:
        try:
            perform(name, data, args)
        except KeyboardInterrupt:
            print(f"\nCut off by Ctrl-C in {name}.")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

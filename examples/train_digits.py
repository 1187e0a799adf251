"""Train a network on handwritten digits with and without batch normalization.

The experiment of Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift" (2015), section 4.1, at the size of
scikit-learn's digits: two networks of sigmoid layers start from the same weights and
see the same mini-batches, and one has a BatchNorm before every sigmoid.

Prints a table and draws a PNG. Ctrl-C ends the training: what is done is kept and drawn.
"""

import argparse
import itertools
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mlp import MLP, SGD, Linear, Sigmoid, SoftmaxCrossEntropy, train_step

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    from bn_cy import BatchNorm
except ModuleNotFoundError as error:
    sys.exit(f'train_digits.py needs {error.name}: pip install ".[examples]"')

CLASSES = 10
TRAIN_SIZE = 1347  # three quarters of the 1797 images
TARGET = 0.9  # a network that classifies this part of the test images right has trained
PERCENTILES = (15, 50, 85)
POINTS = 100  # measurements in a run
MOMENTUM = 0.9
WEIGHT_STD = 0.1  # "small random Gaussian values" in the paper; here about 1/sqrt(inputs)

NAMES = {False: "without batch norm", True: "with batch norm"}
COLOURS = {False: "#c8501e", True: "#1f5fa8"}


# --- the command line ---------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Report a bad argument in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the defaults, and the description as it is written."""


def integer(low, high=math.inf):
    """Return an argparse type for whole numbers from `low` to `high`."""
    wanted = f"a whole number, {low} or more" + (f", at most {high}" if high < math.inf else "")

    def parse(text):
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected {wanted}; got {text!r}")
        return int(text)

    return parse


def learning_rate(text):
    """Parse a positive, finite number."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text!r}")
    return rate


def png_path(text):
    """Parse the path of a PNG; make sure now that it can be written after the training."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png; got {text!r}")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path


def parser_of(description, *, rates, seeds, steps, output):
    """Return a parser with the options that the examples share, and these defaults."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--rates",
        type=learning_rate,
        nargs="+",
        metavar="RATE",
        default=rates,
        help=f"learning rates of SGD with momentum {MOMENTUM}; both networks get each of them",
    )
    parser.add_argument(
        "--seeds",
        type=integer(1),
        metavar="N",
        default=seeds,
        help="runs at each learning rate, each with initial weights and batches of its own",
    )
    parser.add_argument(
        "--steps", type=integer(1), metavar="N", default=steps, help="mini-batches in a run"
    )
    parser.add_argument(
        "--batch-size",
        type=integer(2, TRAIN_SIZE),
        metavar="N",
        default=60,
        help="images in a mini-batch",
    )
    parser.add_argument(
        "--output", type=png_path, metavar="FILE", default=output, help="the picture"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser


def parse_arguments(argv):
    parser = parser_of(
        __doc__, rates=[0.03, 0.1, 0.3, 1.0, 3.0], seeds=5, steps=1000, output="train_digits.png"
    )
    parser.add_argument(
        "--hidden",
        type=integer(1),
        nargs="+",
        metavar="UNITS",
        default=[100, 100, 100],
        help="sigmoid units of each hidden layer",
    )
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))
    return args


# --- the experiment -----------------------------------------------------------------------


def load_data():
    """Return x_train, x_test, labels_train, labels_test; pixels from 0 to 1."""
    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return train_test_split(x, labels, train_size=TRAIN_SIZE, stratify=labels, random_state=0)


def build_network(widths, batch_norm, seed):
    """Build an MLP whose initial weights depend on `seed` alone, not on `batch_norm`."""
    rng = np.random.default_rng([seed, 0])
    *hidden, last = itertools.pairwise(widths)
    layers = []
    for n_in, n_out in hidden:
        layers.append(Linear(n_in, n_out, rng=rng, std=WEIGHT_STD, bias=not batch_norm))
        if batch_norm:
            # A network that diverges is a result here, and no error.
            layers.append(BatchNorm(n_out, on_nonfinite="update"))
        layers.append(Sigmoid())
    layers.append(Linear(*last, rng=rng, std=WEIGHT_STD))
    return MLP(layers)


def batches(n, size, seed):
    """Yield the indices of mini-batches without end, in a new order after every epoch."""
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


@dataclass
class Run:
    """What was measured while one network trained."""

    batch_norm: bool
    rate: float
    seed: int
    rows: list = field(default_factory=list)  # (step, test accuracy, *percentiles)
    seconds: float = 0.0  # in training steps alone

    @property
    def accuracy(self):
        """The test accuracy at the last measurement."""
        return self.rows[-1][1]

    @property
    def steps_to_target(self):
        """The first measured step at `TARGET` or above, or NaN."""
        return next((step for step, accuracy, *_ in self.rows if accuracy >= TARGET), math.nan)


class Trainer:
    """Trains one network and keeps the measurements in its `run`."""

    def __init__(self, run, widths):
        self.run = run
        self.network = build_network(widths, run.batch_norm, run.seed)
        self.loss = SoftmaxCrossEntropy()
        self.optimizer = SGD(self.network, run.rate, MOMENTUM)

    def step(self, x, labels):
        start = time.perf_counter()
        train_step(self.network, self.loss, self.optimizer, x, labels)
        self.run.seconds += time.perf_counter() - start

    def measure(self, step, x, labels):
        """Record the test accuracy and the spread of the input of a last hidden sigmoid."""
        *below, sigmoid, last = self.network.layers
        self.network.eval()
        u = MLP(below).forward(x)
        logits = last.forward(sigmoid.forward(u))
        self.network.train()
        accuracy = np.mean(logits.argmax(axis=1) == labels)
        self.run.rows.append((step, accuracy, *np.percentile(u[:, 0], PERCENTILES)))


def interval(steps):
    """Return the number of steps from one measurement to the next."""
    return math.ceil(steps / POINTS)


def train_pair(pair, data, args, bar):
    """Train the two runs of `pair` side by side, on the same batches."""
    x_train, x_test, labels_train, labels_test = data
    widths = [x_train.shape[1], *args.hidden, CLASSES]
    trainers = [Trainer(run, widths) for run in pair]
    indices = batches(len(x_train), args.batch_size, pair[0].seed)
    for step in range(args.steps + 1):
        if step % interval(args.steps) == 0 or step == args.steps:
            for trainer in trainers:
                trainer.measure(step, x_test, labels_test)
            progress = (f"{run.accuracy:.0%} {NAMES[run.batch_norm]}" for run in pair)
            bar.set_postfix_str(", ".join(progress), refresh=False)
        if step < args.steps:
            batch = next(indices)
            for trainer in trainers:
                trainer.step(x_train[batch], labels_train[batch])
            bar.update()


def train_all(data, args):
    """Train a pair for every seed and rate; return the pairs up to where Ctrl-C stopped them."""
    pairs = []
    total = args.seeds * len(args.rates) * args.steps
    bar = tqdm(total=total, unit="step", mininterval=0.5, disable=args.quiet)
    # One thread is as fast as two for matrices this small, and where another program keeps a
    # processor busy BLAS threads wait for one another: steps ten times slower were measured.
    # A network that diverges is a result, which its accuracy tells; it needs no warning.
    with bar, threadpool_limits(1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
        try:
            for seed, rate in itertools.product(range(args.seeds), args.rates):
                bar.set_description(f"seed {seed}, rate {rate:g}")
                pairs.append([Run(batch_norm, rate, seed) for batch_norm in (False, True)])
                train_pair(pairs[-1], data, args, bar)
        except KeyboardInterrupt:
            pass
    return [pair for pair in pairs if all(run.rows for run in pair)]


# --- the report ---------------------------------------------------------------------------


@dataclass
class Summary:
    """The runs of one network at one learning rate, which differ by their seeds."""

    batch_norm: bool
    rate: float
    runs: list

    def __post_init__(self):
        self.accuracies = np.array([run.accuracy for run in self.runs])
        steps = np.array([run.steps_to_target for run in self.runs])
        self.steps_to_target = steps[~np.isnan(steps)]

    @property
    def trains(self):
        """Whether every run ended at the target or above."""
        return bool(np.all(self.accuracies >= TARGET))

    @property
    def merit(self):
        """Larger is better: seeds at the target, then fewer steps to it, then accuracy."""
        reached = len(self.steps_to_target) / len(self.runs)
        mean_steps = self.steps_to_target.mean() if reached else 0.0
        return reached, -mean_steps, self.accuracies.mean()

    def row(self):
        """Return the cells of the table."""
        count = len(self.runs)
        reached = len(self.steps_to_target)
        steps = mean_and_spread(self.steps_to_target, ".0f") if reached else "never"
        if 0 < reached < count:
            steps += f" ({reached} of {count})"
        return (
            f"{self.rate:g}",
            NAMES[self.batch_norm],
            count,
            mean_and_spread(100 * self.accuracies, ".1f"),
            steps,
            f"{np.mean([run.seconds for run in self.runs]):.2f}",
        )


def mean_and_spread(values, spec):
    mean = f"{np.mean(values):{spec}}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values):{spec}}"


def summarize(pairs):
    """Return {(batch_norm, rate): Summary}, the rates in rising order."""
    groups = {}
    for run in itertools.chain(*pairs):
        groups.setdefault((run.batch_norm, run.rate), []).append(run)
    keys = sorted(groups, key=lambda key: (key[1], key[0]))
    return {key: Summary(*key, groups[key]) for key in keys}


def best(summaries, batch_norm):
    """Return the summary of one network at its best rate."""
    return max((s for s in summaries.values() if s.batch_norm == batch_norm), key=lambda s: s.merit)


def print_table(summaries, steps):
    line = "{:>5}  {:18}  {:>5}  {:>15}  {:>21}  {:>7}".format
    print(line("rate", "network", "seeds", "test accuracy %", f"steps to {TARGET:.0%}", "seconds"))
    for summary in summaries.values():
        print(line(*summary.row()))
    print(
        "Mean ± standard deviation over the seeds. Test accuracy: after the last step. Steps:\n"
        f"measured every {interval(steps)}. Seconds: of one run, in the training steps alone."
    )


def print_conclusion(summaries):
    print(
        f"\nA rate trains if every seed ends at {TARGET:.0%} or more; the best gets there soonest."
    )
    for batch_norm, name in NAMES.items():
        trained = [s.rate for s in summaries.values() if s.batch_norm == batch_norm and s.trains]
        largest = f"{max(trained):g}" if trained else "none"
        rate, *_, steps, _ = best(summaries, batch_norm).row()
        print(
            f"{name + ':':19} largest rate that trains: {largest}; "
            f"best rate: {rate} (steps to {TARGET:.0%}: {steps})"
        )


def print_cut_off(pairs, finished, args):
    total = args.seeds * len(args.rates)
    if finished:
        what = f"{len(finished)} of {total} pairs of runs are finished, and they alone are shown."
    else:
        step = pairs[0][-1].rows[-1][0]
        what = f"the first of {total} pairs of runs is shown up to step {step} of {args.steps}."
    print(f"\nCut off by Ctrl-C: {what}")


# --- the picture --------------------------------------------------------------------------


def draw_accuracy(ax, summary, is_best):
    """Draw the mean over the seeds and a band of one standard deviation about it."""
    steps = [row[0] for row in summary.runs[0].rows]
    accuracy = np.array([[row[1] for row in run.rows] for run in summary.runs])
    mean, spread = accuracy.mean(axis=0), accuracy.std(axis=0)
    colour = COLOURS[summary.batch_norm]
    label = f"{NAMES[summary.batch_norm]}, rate {summary.rate:g}"
    if is_best:
        label += " (its best)"
    ax.plot(steps, mean, "-" if is_best else "--", color=colour, label=label)
    ax.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def draw_accuracies(ax, summaries, rates):
    """Draw each network at its own best rate and, dashed, at the other's."""
    for batch_norm in NAMES:
        for rate in sorted(set(rates.values())):
            draw_accuracy(ax, summaries[batch_norm, rate], rate == rates[batch_norm])
    ax.set_title("Accuracy on the test images: mean and standard deviation over the seeds")
    ax.axhline(TARGET, color="0.4", linewidth=1, linestyle=":", label=f"{TARGET:.0%}")
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend()


def draw_percentiles(ax, run):
    """Draw how the input of a sigmoid is spread over the test images, step by step."""
    steps, _, low, middle, high = np.array(run.rows).T
    colour = COLOURS[run.batch_norm]
    ax.plot(steps, high, color=colour, linewidth=0.8)
    ax.plot(steps, middle, color=colour, linewidth=1.8)
    ax.plot(steps, low, color=colour, linewidth=0.8)
    ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.set_title(f"Input of a last hidden unit, {NAMES[run.batch_norm]}, rate {run.rate:g}")
    ax.set_ylabel("15th, 50th, 85th percentile")


def draw(summaries, args):
    """Draw the figure of the paper's section 4.1 into `args.output`."""
    rates = {batch_norm: best(summaries, batch_norm).rate for batch_norm in NAMES}
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplot_mosaic([["accuracy", False], ["accuracy", True]], width_ratios=[3, 2])
    draw_accuracies(axes["accuracy"], summaries, rates)
    # Both at one rate, at which the plain network trains.
    for batch_norm in NAMES:
        draw_percentiles(axes[batch_norm], summaries[batch_norm, rates[False]].runs[0])
    axes[True].sharey(axes[False])
    for ax in axes.values():
        ax.set_xlabel(f"training step (mini-batches of {args.batch_size})")
        ax.margins(x=0.01)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)


def main(argv=None):
    args = parse_arguments(argv)
    data = load_data()
    print(
        f"{len(data[0])} images to train, {len(data[1])} to test; {len(args.rates)} learning rates"
        f" x {args.seeds} seeds x {len(NAMES)} networks, {args.steps} steps each",
        flush=True,
    )
    pairs = train_all(data, args)
    if not pairs:
        print("Cut off before the first measurement: there is nothing to draw.")
        return 130
    finished = [pair for pair in pairs if pair[-1].rows[-1][0] == args.steps]
    summaries = summarize(finished or pairs)
    print_table(summaries, args.steps)
    print_conclusion(summaries)
    cut_off = len(finished) < args.seeds * len(args.rates)
    if cut_off:
        print_cut_off(pairs, finished, args)
    draw(summaries, args)
    print(f"\nPicture: {args.output}")
    return 130 if cut_off else 0


if __name__ == "__main__":
    sys.exit(main())

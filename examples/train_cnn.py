"""Train a residual convolutional network on handwritten digits, with and without batch norm.

The network of cnn.py on scikit-learn's digits, images of 8x8 pixels, twice: in one network
`bn_cy.BatchNorm` does a batch norm, the addition of the skip connection and the ReLU in one
pass, in the other a bias takes the place of the batch norm. Both start from the same weights,
see the same mini-batches and get the same learning rates, and each is judged at its best one.

Prints a table and draws a PNG. Ctrl-C ends the training: what is done is kept and drawn.
"""

import itertools
import math
import sys
import time
from functools import partial

import numpy as np
from cnn import Bias, build
from mlp import SGD, SoftmaxCrossEntropy, train_step

try:
    from matplotlib.figure import Figure
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    from bn_cy import BatchNorm
except ModuleNotFoundError as error:
    sys.exit(f'train_cnn.py needs {error.name}: pip install ".[examples]"')

from train_digits import (
    COLOURS,
    MOMENTUM,
    NAMES,
    TARGET,
    Run,
    batches,
    draw_accuracies,
    integer,
    load_data,
    mean_and_spread,
    parser_of,
    print_cut_off,
    summarize,
)

# A network that diverges is a result here, and no error.
BATCH_NORMS = {False: Bias, True: partial(BatchNorm, on_nonfinite="update")}
AXES = {"nchw": 1, "nhwc": -1}  # where each layout has the channels
SHAPES = {"nchw": (-1, 1, 8, 8), "nhwc": (-1, 8, 8, 1)}  # of the images
POINTS = 16  # measurements in a run: two an epoch with the defaults


# --- the command line ---------------------------------------------------------------------


def parse_arguments(argv):
    parser = parser_of(
        __doc__, rates=[0.01, 0.03, 0.1, 0.3], seeds=3, steps=176, output="train_cnn.png"
    )
    parser.add_argument(
        "--widths",
        type=integer(1),
        nargs="+",
        metavar="CHANNELS",
        default=[16, 32],
        help="channels of each residual block; a block of another width than the one before "
        "halves the image",
    )
    parser.add_argument(
        "--layout",
        choices=AXES,
        default="nhwc",
        help="order of the images in memory; the networks differ by rounding alone",
    )
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))
    return args


# --- the experiment -----------------------------------------------------------------------


def load_images(layout):
    """Return x_train, x_test, labels_train, labels_test, the first two as images."""
    x_train, x_test, *labels = load_data()
    return x_train.reshape(SHAPES[layout]), x_test.reshape(SHAPES[layout]), *labels


def build_network(args, batch_norm, seed):
    """Build a network whose initial weights depend on `seed` alone, not on `batch_norm`."""
    rng = np.random.default_rng([seed, 0])
    return build(BATCH_NORMS[batch_norm], args.widths, rng=rng, axis=AXES[args.layout])


class Trainer:
    """Trains one network and keeps in its `run` rows of step, test accuracy, training loss."""

    def __init__(self, run, args):
        self.run = run
        self.network = build_network(args, run.batch_norm, run.seed)
        self.loss = SoftmaxCrossEntropy()
        self.optimizer = SGD(self.network, run.rate, MOMENTUM)
        self.losses = []  # since the last measurement

    def step(self, x, labels):
        start = time.perf_counter()
        self.losses.append(train_step(self.network, self.loss, self.optimizer, x, labels))
        self.run.seconds += time.perf_counter() - start

    def measure(self, step, x, labels):
        self.network.eval()
        logits = self.network.forward(x)
        self.network.train()
        accuracy = np.mean(logits.argmax(axis=1) == labels)
        loss = float(np.mean(self.losses)) if self.losses else math.nan
        self.run.rows.append((step, accuracy, loss if math.isfinite(loss) else math.nan))
        self.losses = []


def interval(steps):
    """Return the number of steps from one measurement to the next."""
    return math.ceil(steps / POINTS)


def train_pair(pair, data, args, bar):
    """Train the two runs of `pair` side by side, on the same batches."""
    x_train, x_test, labels_train, labels_test = data
    trainers = [Trainer(run, args) for run in pair]
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
    # As in train_digits.py: no warnings of a network that diverges, and one thread, here for BLAS
    # and for bn_cy, whose two threads took nine times as long where another program kept one busy.
    with bar, threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        try:
            for seed, rate in itertools.product(range(args.seeds), args.rates):
                bar.set_description(f"seed {seed}, rate {rate:g}")
                pairs.append([Run(batch_norm, rate, seed) for batch_norm in (False, True)])
                train_pair(pairs[-1], data, args, bar)
        except KeyboardInterrupt:
            pass
    return [pair for pair in pairs if all(run.rows for run in pair)]


# --- the report ---------------------------------------------------------------------------


def final_losses(summary):
    """Return the training loss of every seed at its last measurement."""
    return np.array([run.rows[-1][2] for run in summary.runs])


def best(summaries, batch_norm):
    """Return the summary of one network at its best rate, in which the test has no say."""

    def mean_loss(summary):
        loss = final_losses(summary).mean()
        return math.inf if np.isnan(loss) else loss

    return min((s for s in summaries.values() if s.batch_norm == batch_norm), key=mean_loss)


def row(summary):
    """Return the cells of the table: those of train_digits.py, and the loss."""
    rate, name, count, accuracy, steps, seconds = summary.row()
    loss = mean_and_spread(final_losses(summary), ".3f")
    return rate, name, count, loss, accuracy, steps, seconds


def print_table(summaries, steps):
    line = "{:>5}  {:18}  {:>5}  {:>13}  {:>15}  {:>17}  {:>7}".format
    names = "rate", "network", "seeds", "training loss", "test accuracy %"
    print(line(*names, f"steps to {TARGET:.0%}", "seconds"))
    for summary in summaries.values():
        print(line(*row(summary)))
    print(
        "Mean ± standard deviation over the seeds. Training loss: of the mini-batches after the\n"
        "last measurement but one. Test accuracy: after the last step. Steps: measured every "
        f"{interval(steps)}.\nSeconds: of one run, in the training steps alone."
    )


def print_conclusion(summaries):
    print("\nEach network has a best rate of its own, that of its lowest training loss.")
    for batch_norm, name in NAMES.items():
        rate, _, _, loss, accuracy, *_ = row(best(summaries, batch_norm))
        print(
            f"{name + ':':19} best rate: {rate} (training loss: {loss}, "
            f"test accuracy %: {accuracy})"
        )


# --- the picture --------------------------------------------------------------------------


def draw_loss(ax, summary, is_best):
    """Draw the mean over the seeds and a band from the lowest to the highest."""
    steps = [step for step, _, _ in summary.runs[0].rows]
    loss = np.array([[loss for _, _, loss in run.rows] for run in summary.runs])
    colour = COLOURS[summary.batch_norm]
    ax.plot(steps, loss.mean(axis=0), "-" if is_best else "--", color=colour)
    ax.fill_between(steps, loss.min(axis=0), loss.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def draw(summaries, args):
    """Draw each network at its own best rate and, dashed, at the other's, into `args.output`."""
    rates = {batch_norm: best(summaries, batch_norm).rate for batch_norm in NAMES}
    figure = Figure(figsize=(13, 5), layout="constrained")
    losses, accuracies = figure.subplots(1, 2, sharex=True, width_ratios=[4, 5])
    for batch_norm in NAMES:
        for rate in sorted(set(rates.values())):
            draw_loss(losses, summaries[batch_norm, rate], rate == rates[batch_norm])
    losses.set_title("Loss on the training images: mean and range over the seeds")
    if any(np.isfinite(line.get_ydata()).any() for line in losses.lines):
        losses.set_yscale("log")  # which needs a value
    draw_accuracies(accuracies, summaries, rates)
    for ax in (losses, accuracies):
        ax.set_xlabel(f"training step (mini-batches of {args.batch_size})")
        ax.margins(x=0.01)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)


def main(argv=None):
    args = parse_arguments(argv)
    data = load_images(args.layout)
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

"""Train a network on handwritten digits on several ranks, four images on each.

A batch norm over four images is a bad one: its statistics are noisy, and if every rank has
digits of its own they say more about the rank than about the data. Three networks start from
the same weights and see the same batches; they differ in who shares statistics:

    local         nobody: each rank has its own
    ghost         pairs of ranks
    synchronized  all ranks, as if the batch were on one

The batch of a step goes to the ranks as it comes, or sorted by digit: then each rank sees few
classes at a time, as it does where data stay where they were collected.

Run it under mpiexec; it prints a table and draws a PNG:

    pip install ".[examples,mpi]" mpich
    mpiexec -n 8 python -m mpi4py examples/train_distributed.py
"""

import itertools
import sys
from dataclasses import dataclass, field

import numpy as np
import train_digits as digits
from mlp import MLP, SGD, SoftmaxCrossEntropy

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from mpi4py import MPI
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'train_distributed.py needs {error.name}: pip install ".[examples,mpi]" mpich')

from bn_cy import BatchNorm, SyncBatchNorm, recalibrate

IMAGES = 4  # on a rank
PAIR = 2  # ranks that share statistics under "ghost"
WIDTHS = [64, 100, 100, 100, digits.CLASSES]
ORDERS = {False: "as they come", True: "sorted by digit"}
COLOURS = {"local": "#c8501e", "ghost": "#8a8a8a", "synchronized": "#1f5fa8"}


def parse_arguments(argv, rank):
    parser = digits.Parser(description=__doc__, formatter_class=digits.HelpFormatter)
    if rank > 0:  # what is wrong is said once
        parser.error = lambda message: parser.exit(2)
    parser.add_argument(
        "--rate", type=digits.learning_rate, default=0.1, help="learning rate of SGD with momentum"
    )
    parser.add_argument(
        "--seeds", type=digits.integer(1), metavar="N", default=3, help="runs of each network"
    )
    parser.add_argument(
        "--steps", type=digits.integer(1), metavar="N", default=200, help="batches in a run"
    )
    parser.add_argument(
        "--output",
        type=digits.png_path if rank == 0 else str,
        metavar="FILE",
        default="train_distributed.png",
        help="the picture",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


# --- a network on several ranks -----------------------------------------------------------


def build_network(seed, comm):
    """Build the network of train_digits.py, with statistics of all ranks of `comm`."""
    network = digits.build_network(WIDTHS, True, seed)
    for i, layer in enumerate(network.layers):
        if isinstance(layer, BatchNorm):
            network.layers[i] = SyncBatchNorm(
                layer.num_features, comm=comm, on_nonfinite=layer.on_nonfinite
            )
    return network


def norms(network):
    """Yield the batch norms, and the network below each."""
    for i, layer in enumerate(network.layers):
        if isinstance(layer, BatchNorm):
            yield layer, MLP(network.layers[:i])


def average(comm, arrays):
    """Replace arrays by their means over the ranks, in one message."""
    flat = np.concatenate([array.ravel() for array in arrays])
    comm.Allreduce(MPI.IN_PLACE, flat)
    flat /= comm.Get_size()
    parts = np.split(flat, np.cumsum([array.size for array in arrays])[:-1])
    for array, part in zip(arrays, parts, strict=True):
        array[...] = part.reshape(array.shape)


def train_step(network, loss, optimizer, comm, x, labels):
    """One step on this rank's images: gradients are averaged, so all ranks take the same step."""
    loss.forward(network.forward(x), labels)
    network.backward(loss.backward())
    average(comm, [grad for layer in network.layers for grad in layer.grads.values()])
    optimizer.step()


def accuracy(network, x, labels):
    """In eval mode, which needs no other rank."""
    network.eval()
    logits = network.forward(x)
    network.train()
    return np.mean(logits.argmax(axis=1) == labels)


# --- the experiment -----------------------------------------------------------------------


@dataclass
class Run:
    """What rank 0 measured while one network trained."""

    name: str
    by_digit: bool
    rows: list = field(default_factory=list)  # (step, test accuracy)
    recalibrated: float = np.nan  # test accuracy at the end, with exact statistics


def own_part(whole, labels, comm, by_digit):
    """Return this rank's part of a step's batch."""
    if by_digit:
        whole = whole[np.argsort(labels[whole], kind="stable")]
    start = comm.Get_rank() * IMAGES
    return whole[start : start + IMAGES]


def train(run, seed, data, comm, group, args, bar):
    """Train one network; its statistics are shared within `group`."""
    x_train, x_test, labels_train, labels_test = data
    network, loss = build_network(seed, group), SoftmaxCrossEntropy()
    optimizer = SGD(network, args.rate, digits.MOMENTUM)
    indices = digits.batches(len(x_train), IMAGES * comm.Get_size(), seed)
    for step in range(args.steps + 1):
        if step % digits.interval(args.steps) == 0 or step == args.steps:
            # Averages of averages: it changes no later measurement.
            average(comm, [layer.running_mean for layer, _ in norms(network)])
            average(comm, [layer.running_var for layer, _ in norms(network)])
            if comm.Get_rank() == 0:
                run.rows.append((step, accuracy(network, x_test, labels_test)))
        if step < args.steps:
            own = own_part(next(indices), labels_train, comm, run.by_digit)
            train_step(network, loss, optimizer, comm, x_train[own], labels_train[own])
            bar.update()
    if comm.Get_rank() == 0:
        network.eval()
        for layer, below in norms(network):
            recalibrate(layer, [below.forward(x_train)])
        run.recalibrated = accuracy(network, x_test, labels_test)


def train_all(data, comm, args):
    """Train every network for every order and seed."""
    rank, size = comm.Get_rank(), comm.Get_size()
    groups = {
        "local": comm.Split(rank),
        "ghost": comm.Split(rank // PAIR),
        "synchronized": comm,
    }
    cases = list(itertools.product(range(args.seeds), ORDERS, groups))
    runs = []
    total = len(cases) * args.steps
    bar = tqdm(total=total, unit="step", mininterval=0.5, disable=args.quiet or rank > 0)
    with bar, threadpool_limits(1), np.errstate(over="ignore", invalid="ignore"):
        for seed, by_digit, name in cases:
            bar.set_description(f"{size} ranks, seed {seed}, {name}, {ORDERS[by_digit]}")
            runs.append(Run(name, by_digit))
            train(runs[-1], seed, data, comm, groups[name], args, bar)
    return runs


# --- the report ---------------------------------------------------------------------------


def select(runs, name, by_digit):
    return [run for run in runs if (run.name, run.by_digit) == (name, by_digit)]


def percent(values):
    return digits.mean_and_spread(100 * np.array(values), ".1f")


def print_table(runs, size):
    line = "{:16}  {:12}  {:>14}  {:>15}  {:>12}".format
    print(line("images", "statistics", "images in them", "test accuracy %", "recalibrated"))
    shared = {"local": IMAGES, "ghost": PAIR * IMAGES, "synchronized": size * IMAGES}
    for by_digit, name in itertools.product(ORDERS, COLOURS):
        chosen = select(runs, name, by_digit)
        print(
            line(
                ORDERS[by_digit],
                name,
                shared[name],
                percent([run.rows[-1][1] for run in chosen]),
                percent([run.recalibrated for run in chosen]),
            )
        )
    print(
        f"{size} ranks with {IMAGES} images each. Mean ± standard deviation over the seeds, after "
        "the last step:\nwith running statistics averaged over the ranks, and recalibrated, with "
        "those of all training images."
    )


def draw(runs, size, args):
    figure = Figure(figsize=(13, 5), layout="constrained")
    for ax, (by_digit, order) in zip(
        figure.subplots(1, 2, sharey=True), ORDERS.items(), strict=True
    ):
        for name, colour in COLOURS.items():
            rows = np.array([run.rows for run in select(runs, name, by_digit)])
            steps, (mean, spread) = rows[0, :, 0], (rows[:, :, 1].mean(0), rows[:, :, 1].std(0))
            ax.plot(steps, mean, color=colour, label=name)
            ax.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
        ax.set_title(f"Images of a batch on the ranks {order}")
        ax.set_xlabel("step")
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.grid(alpha=0.25)
    figure.axes[0].set_ylabel("accuracy on the test images")
    figure.axes[0].legend(title="statistics")
    figure.suptitle(f"{size} ranks with {IMAGES} images each, learning rate {args.rate:g}")
    figure.savefig(args.output, dpi=110)


def main(argv=None, comm=MPI.COMM_WORLD):
    args = parse_arguments(argv, comm.Get_rank())
    size = comm.Get_size()
    if size < PAIR:
        sys.exit("train_distributed.py needs two ranks or more: mpiexec -n 8 python -m mpi4py ...")
    runs = train_all(digits.load_data(), comm, args)
    if comm.Get_rank() == 0:
        print_table(runs, size)
        draw(runs, size, args)
        print(f"\nPicture: {args.output}")


if __name__ == "__main__":
    main()

"""The layers of bn_cy.torch beside those of torch.nn, forward and backward, eager.

    python benchmarks/torch_module.py

Both take turns on the same tensors; the times are medians of the turns. On a machine that is shared
they vary by a tenth and more.
"""

import argparse
import statistics
import time

import torch

import bn_cy.torch

SIZES = [
    (32, 64),
    (128, 128),
    (256, 512),
    (1024, 1024),
    (32, 64, 14, 14),
    (32, 64, 56, 56),
]
SLOT = 0.02  # seconds of a turn


def modules(shape):
    """Return the two layers for inputs of a shape."""
    theirs = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    ours = bn_cy.torch.replace(theirs(shape[1]))
    return {"torch": theirs(shape[1]), "bn_cy": ours}


def step(module, x, dout):
    """Compute a forward and a backward, as in a training step."""
    module.zero_grad()
    x.grad = None
    module(x).backward(dout)


def seconds(module, x, dout, repetitions):
    """Return what a step takes."""
    start = time.perf_counter()
    for _ in range(repetitions):
        step(module, x, dout)
    return (time.perf_counter() - start) / repetitions


def measure(shape, rounds, channels_last):
    """Return the median seconds of a step, by layer."""
    x, dout = torch.randn(shape), torch.randn(shape)
    if channels_last:
        x, dout = (t.to(memory_format=torch.channels_last) for t in (x, dout))
    x.requires_grad_()
    layers = modules(shape)
    for module in layers.values():  # the first steps take longer, and are no measure
        seconds(module, x, dout, 20)
    first = {name: seconds(module, x, dout, 3) for name, module in layers.items()}
    repetitions = {name: max(1, int(SLOT / once)) for name, once in first.items()}
    found = {name: [] for name in layers}
    for _ in range(rounds):
        for name, module in layers.items():
            found[name].append(seconds(module, x, dout, repetitions[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--threads", type=int, help="of both (default: those of PyTorch)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bn_cy.set_num_threads(torch.get_num_threads())
    print(
        f"torch {torch.__version__}, bn_cy {bn_cy.__version__}, {torch.get_num_threads()} threads"
    )
    print("| input | torch.nn, us | bn_cy.torch, us | ratio |\n|---|---|---|---|")
    cases = [(shape, False) for shape in SIZES]
    cases += [(shape, True) for shape in SIZES if len(shape) == 4]
    for shape, channels_last in cases:
        took = measure(shape, arguments.rounds, channels_last)
        name = f"{shape}{', channels last' if channels_last else ''}"
        theirs, ours = 1e6 * took["torch"], 1e6 * took["bn_cy"]
        print(f"| {name} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()

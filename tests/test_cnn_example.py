"""The residual network: gradients, layouts, what goes into bn_cy, and train_cnn.py as it is run."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from test_examples import EXAMPLES, assert_png, interrupted, numerical_gradient

import bn_cy

sys.path.append(str(EXAMPLES))

import cnn
import mlp

SCRIPT = EXAMPLES / "train_cnn.py"
TINY = ["--rates", "0.1", "--seeds", "1", "--steps", "4", "--widths", "4", "6", "--quiet"]

AXES = pytest.mark.parametrize("axis", [1, -1])
BatchNorm = partial(bn_cy.BatchNorm, dtype=np.float64)
Bias = partial(cnn.Bias, dtype=np.float64)


class Unfused(mlp.Layer):
    """What can stand in the place of `bn_cy.BatchNorm`: the same in three passes.

    `margin` is how far from ReLU's kink its inputs were, `spread` their deviation, at the least.
    """

    def __init__(self, features, *, axis, relu):
        self.batch_norm = BatchNorm(features, axis=axis)
        self.params, self.grads = self.batch_norm.params, self.batch_norm.grads
        self.relu = relu

    def forward(self, x, residual=None):
        self.added = residual is not None
        self.spread = np.sqrt(bn_cy.moments(x, axis=self.batch_norm.axis).var.min())
        u = self.batch_norm.forward(x)
        if self.added:
            u = u + residual
        self.margin = np.abs(u).min() if self.relu else np.inf
        self.positive = u > 0 if self.relu else np.ones(u.shape, bool)
        return u * self.positive

    def backward(self, dout):
        dresidual = dout * self.positive
        dx = self.batch_norm.backward(dresidual)
        return (dx, dresidual) if self.added else dx

    def train(self, mode=True):
        self.batch_norm.train(mode)


def images(rng, n, channels, height, width, axis):
    """Return images whose values, for a seed, do not depend on `axis`."""
    x = rng.normal(size=(n, channels, height, width))
    return np.ascontiguousarray(np.moveaxis(x, 1, axis))


def twins(make, axis, shape, rng):
    """Return a network with `bn_cy.BatchNorm`, its `Unfused` twin, and an input.

    Numerical gradients hold for it: no input of a ReLU is so close to the kink that they step
    over it, and no input of a batch norm so close to constant that 1/std is far from a line.
    """
    for _ in range(1000):
        x, seed = images(rng, *shape, axis), rng.integers(2**32)
        fused, unfused = (
            make(batchnorm, rng=np.random.default_rng(seed)) for batchnorm in (BatchNorm, Unfused)
        )
        for ours, theirs in zip(fused.layers, unfused.layers, strict=True):
            for name, param in ours.params.items():
                param += 0.1 * rng.normal(size=param.shape)  # gamma is not 1, nor beta 0
                theirs.params[name][...] = param
        unfused.forward(x)
        layers = [layer for layer in unfused.layers if isinstance(layer, Unfused)]
        if all(layer.margin > 0.005 and layer.spread > 0.2 for layer in layers):
            return fused, unfused, x
    raise AssertionError("no such input")


def assert_gradient(computed, function, x):
    expected = numerical_gradient(function, x, h=1e-4)
    size = max(1, np.abs(expected).max())  # the function rounds its sum, however flat it is
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-9 * size)


def assert_gradients(network, x, dout):
    """Compare all the gradients of sum(dout * y) with numerical ones."""

    def function():
        return np.sum(dout * network.forward(x))

    function()
    dx = network.backward(dout)
    layers = getattr(network, "layers", [network])
    grads = [dict(layer.grads) for layer in layers]
    assert_gradient(dx, function, x)
    for layer, layer_grads in zip(layers, grads, strict=True):
        assert layer_grads.keys() == layer.params.keys()
        for name, param in layer.params.items():
            assert_gradient(layer_grads[name], function, param)


# --- the layers ---------------------------------------------------------------------------


CONVOLUTIONS = pytest.mark.parametrize(
    ("size", "stride", "height", "width"),
    [(3, 1, 4, 5), (3, 2, 4, 5), (1, 1, 2, 3), (1, 2, 4, 5), (5, 3, 4, 3), (3, 2, 1, 1)],
)


def convolution(rng, size, stride, axis):
    return cnn.Conv2d(2, 3, rng=rng, size=size, stride=stride, axis=axis, dtype=np.float64)


def convolve(x, weight, stride):
    """Convolve images (examples, channels, height, width) in loops."""
    n, channels, height, width = x.shape
    size, _, _, n_out = weight.shape
    y = np.zeros((n, n_out, -(-height // stride), -(-width // stride)))
    for m, o, i, j in np.ndindex(y.shape):
        for a, b, c in np.ndindex(size, size, channels):
            row, column = stride * i + a - size // 2, stride * j + b - size // 2
            if 0 <= row < height and 0 <= column < width:
                y[m, o, i, j] += x[m, c, row, column] * weight[a, b, c, o]
    return y


@AXES
@CONVOLUTIONS
def test_convolution_is_the_sum_it_claims(size, stride, height, width, axis, rng):
    layer = convolution(rng, size, stride, axis)
    x = images(rng, 2, 2, height, width, axis)
    expected = convolve(np.moveaxis(x, axis, 1), layer.params["weight"], stride)
    y = layer.forward(x)
    np.testing.assert_allclose(np.moveaxis(y, axis, 1), expected, rtol=0, atol=1e-13)


@AXES
@CONVOLUTIONS
def test_convolution_gradients(size, stride, height, width, axis, rng):
    layer = convolution(rng, size, stride, axis)
    x = images(rng, 2, 2, height, width, axis)
    assert_gradients(layer, x, rng.normal(size=layer.forward(x).shape))


@AXES
def test_pool_takes_the_mean_and_its_gradient(axis, rng):
    pool, x = cnn.GlobalAveragePool(axis), images(rng, 2, 3, 4, 5, axis)
    expected = np.moveaxis(x, axis, 1).reshape(2, 3, 20).mean(axis=2)
    np.testing.assert_allclose(pool.forward(x), expected, rtol=0, atol=1e-14)
    assert_gradients(pool, x, rng.normal(size=(2, 3)))


@AXES
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_bias_follows_its_formula(axis, relu, added, rng):
    bias = Bias(3, axis=axis, relu=relu)
    bias.params["beta"][:] = beta = rng.normal(size=3)
    x, residual, dout = (images(rng, 2, 3, 4, 5, axis) for _ in range(3))
    y = bias.forward(x, residual=residual) if added else bias.forward(x)
    u = np.moveaxis(x, axis, -1) + beta + (np.moveaxis(residual, axis, -1) if added else 0)
    u = np.moveaxis(u, -1, axis)
    np.testing.assert_array_equal(y, np.maximum(u, 0) if relu else u)
    du = dout * (u > 0) if relu else dout
    gradients = bias.backward(dout)
    for gradient in gradients if added else [gradients]:
        np.testing.assert_array_equal(gradient, du)
    expected = np.moveaxis(du, axis, 0).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose(bias.grads["beta"], expected, rtol=0, atol=1e-13)


# --- blocks and the network ---------------------------------------------------------------


BLOCKS = pytest.mark.parametrize(
    ("n_in", "n_out", "stride"),
    [(2, 2, 1), (2, 3, 1), (2, 2, 2), (2, 3, 2)],
    ids=["no projection", "channels", "stride", "channels and stride"],
)


@AXES
@BLOCKS
def test_block_gradients(n_in, n_out, stride, axis, rng):
    make = partial(cnn.ResidualBlock, n_in, n_out, stride=stride, axis=axis, dtype=np.float64)
    block, _, x = twins(make, axis, (2, n_in, 4, 3), rng)
    projections = [layer for layer in block.skip.layers if isinstance(layer, cnn.Conv2d)]
    assert len(projections) == ((n_in, stride) != (n_out, 1))
    assert_gradients(block, x, rng.normal(size=block.forward(x).shape))


def network(batchnorm, axis, rng):
    """Build a network with a block without a projection and one with."""
    return cnn.build(batchnorm, (2, 3), rng=rng, classes=3, axis=axis, dtype=np.float64)


@AXES
def test_network_gradients(axis, rng):
    fused, unfused, x = twins(partial(network, axis=axis), axis, (3, 1, 4, 4), rng)
    dout = rng.normal(size=(3, 3))
    assert_gradients(fused, x, dout)
    # A layer that stands in for bn_cy's gives the same.
    np.testing.assert_allclose(unfused.forward(x), fused.forward(x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(unfused.backward(dout), fused.backward(dout), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batchnorm", [BatchNorm, Bias], ids=["batch norm", "bias"])
def test_layouts_give_the_same_numbers(batchnorm, rng):
    first, last = (network(batchnorm, axis, np.random.default_rng(7)) for axis in (1, -1))
    x, dout = images(rng, 5, 1, 6, 7, axis=1), rng.normal(size=(5, 3))
    x_last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(last.forward(x_last), first.forward(x), rtol=0, atol=1e-12)
    dx, dx_last = first.backward(dout), last.backward(dout)
    np.testing.assert_allclose(np.moveaxis(dx_last, -1, 1), dx, rtol=0, atol=1e-12)
    for one, other in zip(first.layers, last.layers, strict=True):
        for name, grad in one.grads.items():
            np.testing.assert_allclose(other.grads[name], grad, rtol=0, atol=1e-12)


@AXES
def test_batch_norm_gets_arrays_that_it_need_not_copy(axis, rng):
    seen = []

    class Watched(bn_cy.BatchNorm):
        def forward(self, x, *, residual=None):
            y = super().forward(x, residual=residual)
            seen.extend(array for array in (x, residual, y) if array is not None)
            return y

        def backward(self, dout):
            seen.append(dout)
            return super().backward(dout)

    net = cnn.build(Watched, (2, 3), rng=rng, axis=axis)
    x = images(rng, 4, 1, 5, 6, axis).astype(np.float32)
    labels, loss = rng.integers(0, 10, 4), mlp.SoftmaxCrossEntropy()
    mlp.train_step(net, loss, mlp.SGD(net, 0.1), x, labels)
    assert len(seen) == 6 * 3 + 2  # batch norms; residuals of the blocks
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in seen)


def test_sgd_moves_every_parameter_and_modes_reach_every_layer(rng):
    net = cnn.build(bn_cy.BatchNorm, (2, 2, 3), rng=rng)
    names = [name for layer in net.layers for name in layer.params]
    # The stem; two convolutions a block; the projection; the last layer has weights and a bias.
    assert names.count("weight") == 1 + 3 * 2 + 1 + 1
    assert names.count("gamma") == names.count("beta") == 1 + 3 * 2 + 1
    before = [param.copy() for layer in net.layers for param in layer.params.values()]
    x, labels = images(rng, 8, 1, 4, 4, 1).astype(np.float32), rng.integers(0, 10, 8)
    mlp.train_step(net, mlp.SoftmaxCrossEntropy(), mlp.SGD(net, 0.1), x, labels)
    after = [param for layer in net.layers for param in layer.params.values()]
    assert not any(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    batch_norms = [layer for layer in net.layers if isinstance(layer, bn_cy.BatchNorm)]
    net.eval()
    assert not any(layer.training for layer in batch_norms)
    net.train()
    assert all(layer.training for layer in batch_norms)


@AXES
def test_blocks_halve_images_where_the_width_changes(axis, rng):
    net = cnn.build(bn_cy.BatchNorm, (2, 2, 3, 5), rng=rng, axis=axis)
    x = images(rng, 2, 1, 8, 6, axis).astype(np.float32)
    shapes = []
    for stage in net.stages:
        x = stage.forward(x)
        if isinstance(stage, cnn.ResidualBlock):
            shapes.append(np.moveaxis(x, axis, 1).shape)
    assert shapes == [(2, 2, 8, 6), (2, 2, 8, 6), (2, 3, 4, 3), (2, 5, 2, 2)]
    assert x.shape == (2, 10)


def test_all_batch_norms_have_a_relu_but_that_of_a_projection(rng):
    block = cnn.ResidualBlock(2, 3, bn_cy.BatchNorm, rng=rng)
    layers = [*block.path.layers, block.join, *block.skip.layers]
    assert [layer.relu for layer in layers if isinstance(layer, bn_cy.BatchNorm)] == [
        True, True, False
    ]  # fmt: skip


def test_weights_have_the_deviation_of_he(rng):
    weight = cnn.Conv2d(50, 60, rng=rng).params["weight"]
    assert weight.dtype == np.float32
    assert weight.std() == pytest.approx((2 / (9 * 50)) ** 0.5, rel=0.03)


# --- train_cnn.py -------------------------------------------------------------------------


@pytest.fixture
def train_cnn():
    for module in ("matplotlib", "sklearn", "threadpoolctl", "tqdm"):
        pytest.importorskip(module)
    import train_cnn

    return train_cnn


def command(*arguments):
    return [sys.executable, "-W", "error::RuntimeWarning", str(SCRIPT), *arguments]


def table(stdout):
    """Return the cells of every row: rate, network, seeds, loss, accuracy, steps, seconds."""
    lines = stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("rate")) + 1
    last = next(i for i, line in enumerate(lines) if line.startswith("Mean"))
    return [[cell.strip() for cell in line.split("  ") if cell] for line in lines[first:last]]


@pytest.mark.usefixtures("train_cnn")
def test_tiny_run_prints_a_table_and_draws(tmp_path):
    done = subprocess.run(
        command(*TINY), cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert [row[:3] for row in rows] == [
        ["0.1", "without batch norm", "1"], ["0.1", "with batch norm", "1"]
    ]  # fmt: skip
    for *_, loss, accuracy, _, seconds in rows:
        assert 0 < float(loss) < 10
        assert 0 <= float(accuracy) <= 100
        assert float(seconds) >= 0
    assert done.stdout.endswith("Picture: train_cnn.png\n")
    assert_png(tmp_path / "train_cnn.png")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_batch_norm_learns_and_a_huge_rate_is_no_error(
    train_cnn, layout, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["--rates", "0.1", "1e30", "--seeds", "2", "--steps", "60", "--widths", "8"]
    assert train_cnn.main([*arguments, "--quiet", "--layout", layout]) == 0
    out = capsys.readouterr().out
    plain, normalized, diverged, _ = table(out)
    assert float(normalized[3].split()[0]) < float(plain[3].split()[0])
    assert float(normalized[4].split()[0]) > 30  # 10 % is chance
    assert diverged[3] == "nan ± nan"
    assert "best rate: 1e+30" not in out
    assert_png(tmp_path / "train_cnn.png")


def test_both_networks_start_from_the_same_weights(train_cnn):
    args = train_cnn.parse_arguments([])

    def weights(batch_norm, seed):
        layers = train_cnn.build_network(args, batch_norm, seed).layers
        return [layer.params["weight"] for layer in layers if "weight" in layer.params]

    for plain, normalized, other in zip(
        weights(False, 3), weights(True, 3), weights(True, 4), strict=True
    ):
        np.testing.assert_array_equal(plain, normalized)
        assert not np.array_equal(normalized, other)


@pytest.mark.usefixtures("train_cnn")
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send")
def test_interrupt_keeps_and_draws_what_is_done(tmp_path):
    stdout = interrupted(command("--steps", "1000000", "--output", "cut.png"), tmp_path)
    assert "Cut off by Ctrl-C: the first of 12 pairs" in stdout
    assert_png(tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "0"], "--steps"),
        (["--seeds", "many"], "--seeds"),
        (["--rates", "0.1", "nan"], "--rates"),
        (["--batch-size", "1"], "--batch-size"),
        (["--widths", "8", "0"], "--widths"),
        (["--layout", "chwn"], "--layout"),
        (["--output", "picture.pdf"], "--output"),
        (["--output", os.path.join("missing", "picture.png")], "missing"),
        (["--wrong"], "--wrong"),
    ],
)
def test_bad_arguments_get_one_line(train_cnn, arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_cnn.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert word in err
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_named_in_one_line(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')\n")
    done = subprocess.run(
        command(*TINY),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == 'train_cnn.py needs matplotlib: pip install ".[examples]"\n'

"""The layer beside PyTorch's modules, in the same process."""

import re

import beside
import exact
import numpy as np
import pytest
from exact import arrays_within, error

from bn_cy import BatchNorm, batchnorm_backward, batchnorm_forward
from bn_cy._openmp import SPINS

torch = pytest.importorskip("torch")

MODULES = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
SHAPES = [(20, 6), (5, 6, 9), (4, 6, 5, 3)]
TOLERANCE = 1e-11


def twins(features, ndim, affine=True, **options):
    """Return a float64 layer and the PyTorch module that it should follow."""
    layer = BatchNorm(features, scale=affine, shift=affine, dtype=np.float64, **options)
    return layer, MODULES[ndim](features, affine=affine, dtype=torch.float64, **options)


def batch(rng, shape):
    """Return a random x of three rows up to the shape's (dx of two nearly vanishes), and dout."""
    shape = (int(rng.integers(3, shape[0] + 1)), *shape[1:])
    return 3 * exact.ordinary(rng, shape, dtype=np.float64) + 1, rng.standard_normal(shape)


def step_of_layer(layer, x, dout, rate):
    """Return y, dx and the gradients of the parameters, after a step of gradient descent."""
    y, dx = layer(x), layer.backward(dout)
    gradients = [gradient.copy() for gradient in layer.grads.values()]
    for name, parameter in layer.params.items():
        parameter -= rate * layer.grads[name]
    return [y, dx, *gradients]


def step_of_module(module, x, dout, rate):
    """Return the same from PyTorch."""
    x = torch.tensor(x, requires_grad=True)
    module.zero_grad()
    y = module(x)
    y.backward(torch.tensor(dout))
    gradients = [parameter.grad.numpy().copy() for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= rate * parameter.grad
    return [y.detach().numpy(), x.grad.numpy(), *gradients]


def assert_same_state(layer, module):
    """Assert that the state dicts have the same keys in the same order and the same values."""
    ours, theirs = layer.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert np.shape(ours[key]) == tuple(value.shape)
        assert error(ours[key], value.numpy()) <= TOLERANCE, key


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, None])
def test_thirty_mixed_steps(rng, momentum, shape, affine):
    layer, module = twins(6, len(shape), affine, momentum=momentum)
    for step in range(30):
        training = bool(step == 0 or rng.random() < 0.6)
        layer.train(training)
        module.train(training)
        x, dout = batch(rng, shape)
        ours = step_of_layer(layer, x, dout, 0.01)
        theirs = step_of_module(module, x, dout, 0.01)
        for actual, expected in zip(ours, theirs, strict=True):
            assert error(actual, expected) <= TOLERANCE, f"step {step}"
        assert_same_state(layer, module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("added", [False, True])
def test_relu_and_residual(rng, added, shape, training):
    layer, module = twins(6, len(shape))
    layer.relu = True
    layer.gamma[:] = rng.uniform(-1, 1, 6)
    layer.beta[:] = rng.uniform(-1, 1, 6)
    module.load_state_dict({k: torch.from_numpy(v) for k, v in layer.state_dict().items()})
    layer.train(training)
    module.train(training)
    x, dout = batch(rng, shape)
    skip = rng.standard_normal(x.shape)
    theirs = [torch.tensor(array, requires_grad=True) for array in (x, skip)]
    z = module(theirs[0]) + theirs[1] if added else module(theirs[0])
    z.relu().backward(torch.tensor(dout))
    y, gradients = layer(x, residual=skip if added else None), layer.backward(dout)
    pairs = [(y, z.relu().detach()), (layer.dgamma, module.weight.grad)]
    pairs.append((layer.dbeta, module.bias.grad))
    pairs.append((gradients[0] if added else gradients, theirs[0].grad))
    if added:
        pairs.append((gradients[1], theirs[1].grad))
    for ours, expected in pairs:
        assert error(ours, expected.numpy()) <= TOLERANCE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_running_statistics(rng, shape, training):
    layer, module = twins(6, len(shape), track_running_stats=False)
    layer.train(training)
    module.train(training)
    x, dout = batch(rng, shape)
    theirs = step_of_module(module, x, dout, 0.01)
    for actual, expected in zip(step_of_layer(layer, x, dout, 0.01), theirs, strict=True):
        assert error(actual, expected) <= TOLERANCE
    assert_same_state(layer, module)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_pytorch_loads_our_state(rng, affine, track):
    layer, module = twins(6, 2, affine, track_running_stats=track)
    for _ in range(3):
        step_of_layer(layer, *batch(rng, (20, 6)), 0.01)
    module.load_state_dict({key: torch.as_tensor(v) for key, v in layer.state_dict().items()})
    assert_same_state(layer, module)
    x = batch(rng, (20, 6))[0]
    y = module.eval()(torch.tensor(x)).detach().numpy()
    assert error(layer.eval()(x), y) <= TOLERANCE


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_we_load_the_state_of_pytorch(rng, affine, track):
    layer, module = twins(6, 2, affine, track_running_stats=track)
    for _ in range(3):
        step_of_module(module, *batch(rng, (20, 6)), 0.01)
    layer.load_state_dict(module.state_dict())
    assert_same_state(layer, module)
    before = layer.state_dict()
    for value in module.state_dict().values():
        value.fill_(42)
    assert all(np.array_equal(before[key], value) for key, value in layer.state_dict().items())


def test_state_of_a_float32_module(rng):
    module = torch.nn.BatchNorm1d(6)
    module(torch.tensor(rng.standard_normal((20, 6), np.float32)))
    layer = BatchNorm(6)
    layer.load_state_dict(module.state_dict())
    assert_same_state(layer, module)
    module.load_state_dict({key: torch.as_tensor(v) for key, v in layer.state_dict().items()})
    assert_same_state(layer, module)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tensors_as_input(rng, memory_format):
    array = exact.ordinary(rng, (4, 6, 5, 3))
    x = torch.tensor(array).to(memory_format=memory_format)
    dout = torch.tensor(rng.standard_normal(array.shape, np.float32)).to(
        memory_format=memory_format
    )
    gamma, beta = (torch.tensor(values) for values in exact.parameters(rng, 6))
    y, cache = batchnorm_forward(x, gamma, beta)
    assert type(y) is np.ndarray
    assert error(y, exact.forward(array, gamma, beta)) <= 5e-7
    assert any(np.shares_memory(held, x.numpy()) for held in arrays_within(cache))
    dx, dgamma, _ = batchnorm_backward(dout, cache)
    expected_dx, expected_dgamma, _ = exact.backward(dout, array, gamma)
    assert error(dx, expected_dx) <= 5e-7
    assert error(dgamma, expected_dgamma) <= 5e-7


@pytest.mark.parametrize("ours_first", [True, False])
def test_two_users_of_openmp_in_turn(run, ours_first):
    """Whichever was imported first, and in a fork."""
    run(
        """
        def theirs(x):
            tensor = torch.tensor(x, requires_grad=True)
            y = torch.nn.BatchNorm1d(64, dtype=torch.float64)(tensor)
            (y**2).sum().backward()
            return tensor.grad.numpy()
        """,
        start=beside.imports("import torch", ours_first),
        rest=beside.IN_TURN,
    )


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_shared_runtime_spins_as_who_came_first_wants(python, ours_first):
    """PyTorch's wheel and a build of ours use one libgomp: the first import sets it up."""
    order = "bn_cy, torch" if ours_first else "torch, bn_cy"
    told = python("-c", f"import {order}", OMP_DISPLAY_ENV="verbose").stderr
    spins = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told)
    if len(spins) == 1:
        assert (spins == [SPINS]) == ours_first
    else:  # a wheel of ours brings its own
        assert SPINS in spins


def test_a_tensor_over_a_result_holds_its_memory(rng):
    x = exact.ordinary(rng, (2000, 64))
    y, _ = batchnorm_forward(x)
    for make in (torch.from_numpy, torch.as_tensor, torch.from_dlpack):
        tensor = make(batchnorm_forward(x)[0])[3:]
        for _ in range(5):
            batchnorm_forward(x + 1)
        assert np.array_equal(tensor.numpy(), y[3:])

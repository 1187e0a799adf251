"""The specification of BatchNormalization by ONNX, in 80 bits, on the shapes of its nine cases.

The stored data of the nine are checked in `peers/test_onnx.py`, which needs the onnx package. Four
of them are made for the operator (NumPy's legacy generator, seeded with 0, draws x, scale, bias,
mean and var, in that order), and are drawn likewise here; of the five converted from PyTorch's
modules the values are drawn afresh. momentum is the weight of the old value there, and the running
variance is the biased one.
"""

from typing import NamedTuple

import exact
import numpy as np
import pytest
from exact import error

from bn_cy import BatchNorm, batchnorm_forward, moments, normalize


class Case(NamedTuple):
    """The inputs and attributes of a BatchNormalization node."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    epsilon: float = 1e-5
    momentum: float = 0.9


def node_cases():
    """Return the inputs of the example and of the epsilon case, drawn as ONNX draws them."""
    random = np.random.RandomState(0)

    def draw(**attributes):
        x = random.randn(2, 3, 4, 5).astype(np.float32)
        scale, bias, mean = (random.randn(3).astype(np.float32) for _ in range(3))
        return Case(x, scale, bias, mean, random.rand(3).astype(np.float32), **attributes)

    return {"example": draw(), "epsilon": draw(epsilon=1e-2)}


PYTORCH_CASES = {
    "BatchNorm1d_3d_input_eval": ((4, 5, 3), 1e-5),
    "BatchNorm2d_eval": ((2, 3, 6, 6), 1e-5),
    "BatchNorm2d_momentum_eval": ((2, 3, 6, 6), 1e-3),
    "BatchNorm3d_eval": ((2, 3, 4, 4, 4), 1e-5),
    "BatchNorm3d_momentum_eval": ((2, 3, 4, 4, 4), 1e-3),
}


def pytorch_case(rng, name):
    """Return the named case with random values: a trained module's are as random."""
    shape, epsilon = PYTORCH_CASES[name]
    x = rng.standard_normal(shape, np.float32)
    scale, bias, mean = rng.standard_normal((3, shape[1]), np.float32)
    var = rng.uniform(0.1, 2, shape[1]).astype(np.float32)
    return Case(x, scale, bias, mean, var, epsilon)


def layer_of(case):
    """Return the layer that the node is."""
    layer = BatchNorm(case.x.shape[1], eps=case.epsilon, momentum=1 - case.momentum, unbiased=False)
    keys = {"weight": case.scale, "bias": case.bias}
    running = {"running_mean": case.mean, "running_var": case.var, "num_batches_tracked": 0}
    layer.load_state_dict({**keys, **running})
    return layer


def check_inference(case):
    """Assert that function and layer give the node's y when training_mode is 0."""
    given = case.mean, case.var, case.scale, case.bias, case.epsilon
    expected = exact.normalize(case.x, *given)
    y = normalize(case.x, *given)
    assert y.dtype == np.float32
    assert error(y, expected) <= 5e-7
    assert error(layer_of(case).eval()(case.x), expected) <= 5e-7


def check_training(case):
    """Assert that functions and layer give the node's y, running_mean and running_var."""
    _, mean, var = exact.statistics(case.x)
    old = np.longdouble(case.momentum)
    running_mean = case.mean * old + mean * (1 - old)
    running_var = case.var * old + var * (1 - old)
    expected = exact.forward(case.x, case.scale, case.bias, case.epsilon)

    y, _ = batchnorm_forward(case.x, case.scale, case.bias, case.epsilon)
    assert error(y, expected) <= 5e-7
    batch = moments(case.x)
    assert error(case.mean * old + batch.mean * (1 - old), running_mean) <= 5e-7
    assert error(case.var * old + batch.var * (1 - old), running_var) <= 5e-7

    layer = layer_of(case)
    assert error(layer(case.x), expected) <= 5e-7
    assert error(layer.running_mean, running_mean) <= 5e-7
    assert error(layer.running_var, running_var) <= 5e-7


@pytest.mark.parametrize("name", ["example", "epsilon"])
def test_node(name):
    check_inference(node_cases()[name])


@pytest.mark.parametrize("name", ["example", "epsilon"])
def test_node_in_training_mode(name):
    check_training(node_cases()[name])


@pytest.mark.parametrize("name", PYTORCH_CASES)
def test_pytorch_converted(rng, name):
    check_inference(pytorch_case(rng, name))


def test_example_of_the_older_versions():
    # Published up to version 9 of the operator with these constants.
    x = np.array([[[[-1, 0, 1]], [[2, 3, 4]]]], np.float32)
    pairs = np.array([[1, 1.5], [0, 1], [0, 3], [1, 1.5]], np.float32)
    check_inference(Case(x, *pairs))
    check_training(Case(x, *pairs))

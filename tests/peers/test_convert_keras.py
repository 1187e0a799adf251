"""`convert.from_keras` and `to_keras` beside Keras 3, on its PyTorch backend by default."""

import os
import warnings

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, error

from bn_cy import BatchNorm, convert

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip(os.environ["KERAS_BACKEND"])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Keras imports
    keras = pytest.importorskip("keras")

LAYOUTS = [((9, 6), -1), ((4, 5, 3, 6), -1), ((4, 6, 5, 3), 1)]


def built(shape, **options):
    """Return a layer of Keras that has its weights."""
    layer = keras.layers.BatchNormalization(**options)
    layer.build(shape)
    return layer


def compare(rng, ours, theirs, shape):
    """Assert that both evaluate alike, train alike, and then evaluate alike again."""
    for training in (False, True, False):
        x = exact.ordinary(rng, shape, ours.axis)
        y = keras.ops.convert_to_numpy(theirs(x, training=training))
        assert error(ours.train(training)(x), y) <= 2e-6
    mean, var = theirs.get_weights()[-2:]
    assert error(ours.running_mean, mean) <= 1e-6
    assert error(ours.running_var, var) <= 1e-6


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_from_keras(rng, shape, axis, scale, shift):
    theirs = built(shape, scale=scale, center=shift, axis=axis, momentum=0.7, epsilon=1e-2)
    theirs.set_weights([rng.uniform(0.5, 2, 6) for _ in theirs.get_weights()])
    form = {"scale": scale, "shift": shift, "axis": axis}
    ours = convert.from_keras(theirs.get_weights(), momentum=0.7, eps=1e-2, **form)
    compare(rng, ours, theirs, shape)


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_to_keras(rng, shape, axis, scale, shift):
    form = {"scale": scale, "shift": shift, "axis": axis, "unbiased": False}
    ours = exact.trained(rng, BatchNorm(6, momentum=0.3, eps=1e-2, **form))
    theirs = built(
        shape,
        momentum=1 - ours.momentum,
        epsilon=ours.eps,
        axis=ours.axis,
        scale=ours.gamma is not None,
        center=ours.beta is not None,
    )
    theirs.set_weights(convert.to_keras(ours))
    compare(rng, ours, theirs, shape)


def test_the_defaults_that_the_docs_name(rng):
    theirs = built((9, 6))
    assert (theirs.momentum, theirs.epsilon, theirs.axis) == (0.99, 1e-3, -1)
    ours = convert.from_keras(theirs.get_weights(), momentum=0.99, eps=1e-3)
    np.testing.assert_array_equal(ours.running_mean, np.zeros(6))
    np.testing.assert_array_equal(ours.running_var, np.ones(6))
    compare(rng, ours, theirs, (9, 6))

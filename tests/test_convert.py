"""Layers from data laid out as PyTorch, Keras and ONNX lay them out, without any of the three.

What each does in a training step is written out here in 80-bit arithmetic; the libraries
themselves are asked in `peers/`.
"""

import copy
import doctest
import sys
from types import SimpleNamespace

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, error

import bn_cy
from bn_cy import BatchNorm, convert

FEATURES = 5


def values(rng, dtype=np.float32):
    """Return a gamma, beta, mean and variance."""
    parameters = rng.uniform(0.5, 2, (2, FEATURES)) * rng.choice([-1, 1], (2, FEATURES))
    mean, var = rng.normal(0, 2, FEATURES), rng.uniform(0.1, 3, FEATURES)
    return [array.astype(dtype) for array in (*parameters, mean, var)]


def check(rng, layer, given, old_weight, eps, *, unbiased, axis=1):
    """Assert that the layer evaluates and trains as one with these values.

    `old_weight` is that of the running statistics, None where all batches weigh alike.
    """
    gamma, beta, mean, var = given
    assert layer.eps == eps
    assert layer.axis == axis
    shape = [4, 3, 6]
    shape[axis] = FEATURES
    x = exact.ordinary(rng, tuple(shape), axis)
    expected = exact.normalize(x, mean, var, gamma, beta, eps, axis)
    assert error(copy.deepcopy(layer).eval()(x), expected) <= 5e-7
    count, batch_mean, batch_var = exact.statistics(x, axis)
    batch_var = batch_var * count / (count - 1) if unbiased else batch_var
    if old_weight is None:
        old_weight = np.longdouble(layer.num_batches_tracked) / (layer.num_batches_tracked + 1)
    y = layer.train()(x)
    assert error(y, exact.forward(x, gamma, beta, eps, axis)) <= 5e-7
    new_weight = 1 - np.longdouble(old_weight)
    assert error(layer.running_mean, old_weight * mean + new_weight * batch_mean) <= 1e-6
    assert error(layer.running_var, old_weight * var + new_weight * batch_var) <= 1e-6


# PyTorch


def torch_state(given, prefix="", tracked=7):
    """Return what state_dict() gives."""
    keys = ("weight", "bias", "running_mean", "running_var")
    state = {prefix + key: value for key, value in zip(keys, given, strict=True)}
    return state | {f"{prefix}num_batches_tracked": np.array(tracked)}


class Tensor:
    """What is used of a tensor of PyTorch, which NumPy cannot read before it is detached."""

    def __init__(self, array, dtype=None):
        self.array, self.dtype, self.detached = array, dtype or f"torch.{array.dtype}", False

    def detach(self):
        twin = Tensor(self.array, self.dtype)
        twin.detached = True
        return twin

    def cpu(self):
        return self

    def float(self):
        twin = Tensor(self.array.astype(np.float32))
        twin.detached = self.detached
        return twin

    def __array__(self, dtype=None, copy=None):
        if not self.detached or self.dtype == "torch.bfloat16":
            raise TypeError("no array")
        return self.array


class Module:
    """What is used of a module of PyTorch."""

    def __init__(self, state, children=(), **attributes):
        self.state, self.children = state, dict(children)
        self.__dict__.update(attributes)

    def state_dict(self):
        return self.state

    def get_submodule(self, name):
        head, _, rest = name.partition(".")
        child = self.children[head]
        return child.get_submodule(rest) if rest else child


class BatchNorm2d(Module):
    """A batch norm, by its name and that of its module."""

    __module__ = "torch.nn.modules.batchnorm"


class InstanceNorm2d(Module):
    """None, with the same attributes."""

    __module__ = "torch.nn.modules.instancenorm"


class OtherBatchNorm(Module):
    """Somebody else's, whose attributes may mean something else."""


def test_from_the_state_of_pytorch(rng):
    given = values(rng)
    layer = convert.from_torch(torch_state(given))
    assert (layer.dtype, layer.num_batches_tracked, layer.training) == (np.float32, 7, True)
    check(rng, layer, given, 0.9, 1e-5, unbiased=True)


def test_from_one_layer_of_a_network(rng):
    given = values(rng)
    state = torch_state(given, "features.1.") | torch_state(values(rng), "features.10.")
    state["features.0.weight"] = np.ones((2, 3))
    layer = convert.from_torch(state, prefix="features.1.")
    check(rng, layer, given, 0.9, 1e-5, unbiased=True)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_from_a_module_of_pytorch(rng, training, momentum):
    given = values(rng)
    state = {key: Tensor(value) for key, value in torch_state(given).items()}
    module = BatchNorm2d(state, eps=1e-2, momentum=momentum, training=training)
    network = Module({}, {"features": Module({}, {"1": module})})
    found = [convert.from_torch(module)]
    found += [convert.from_torch(network, prefix) for prefix in ("features.1.", "features.1")]
    for layer in found:
        assert (layer.training, layer.momentum) == (training, momentum)
        old_weight = None if momentum is None else 0.7
        check(rng, layer, given, old_weight, 1e-2, unbiased=True)
    for value, kept in zip(state.values(), [*given, 7], strict=True):
        np.testing.assert_array_equal(value.array, kept)


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("tracked", [True, False])
def test_what_a_state_of_pytorch_lacks_the_layer_lacks(rng, tracked, scale, shift):
    has = {"weight": scale, "bias": shift}
    state = {k: v for k, v in torch_state(values(rng)).items() if has.get(k, tracked)}
    if not state:
        with pytest.raises(KeyError, match="missing"):
            convert.from_torch(state)
        return
    layer = convert.from_torch(state)
    assert (layer.gamma is not None, layer.beta is not None) == (scale, shift)
    assert layer.track_running_stats == tracked
    assert layer.state_dict().keys() == state.keys()
    state.pop("num_batches_tracked", None)
    assert convert.from_torch(state).num_batches_tracked == 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (">f8", np.float64),
    ],
)
def test_dtypes(rng, dtype, expected):
    given = [value.astype(dtype) for value in values(rng)]
    for layer in (
        convert.from_torch(torch_state(given)),
        convert.from_keras(given, momentum=0.9, eps=1e-3),
        convert.from_onnx(node(), dict(zip(NAMES, given, strict=True))),
    ):
        assert layer.dtype == layer.gamma.dtype == expected
        assert layer.running_mean.dtype == np.float64
        np.testing.assert_array_equal(layer.gamma, given[0])
        np.testing.assert_array_equal(layer.running_var, given[3])


def test_bfloat16_becomes_float32(rng):
    given = [value.astype(np.float16) for value in values(rng)]
    state = {k: Tensor(v, "torch.bfloat16") for k, v in torch_state(given).items()}
    state["num_batches_tracked"] = Tensor(np.array(3))
    layer = convert.from_torch(state)
    assert layer.dtype == np.float32
    np.testing.assert_array_equal(layer.beta, given[1])


@pytest.mark.parametrize(
    ("change", "prefix", "message"),
    [
        (lambda s: s.pop("a.running_var"), "a.", r"missing: \['running_var'\], unexpected: none"),
        (lambda s: s.update({"a.gain": 1}), "a.", r"missing: none, unexpected: \['gain'\]"),
        (
            lambda s: s,
            "b.",
            r"'b\.'.*missing: \['running_mean', 'running_var'\].*batch norms: \['a\.'\]",
        ),
        (lambda s: s, "", r"unexpected: \['a.bias', .*batch norms: \['a\.'\]"),
        (lambda s: [s.pop(k) for k in list(s)], "", "prefixes of batch norms: none"),
    ],
)
def test_states_with_other_keys_are_refused(rng, change, prefix, message):
    state = torch_state(values(rng), "a.")
    change(state)
    with pytest.raises(KeyError, match=message):
        convert.from_torch(state, prefix)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bias", np.ones(4), r"'a\.weight': \(5,\), 'a\.bias': \(4,\)"),
        ("weight", np.ones((5, 3)), r"'a\.weight': \(5, 3\)"),
        ("running_var", np.full(5, -1.0), r"a\.running_var must not be negative"),
        ("running_mean", np.full(5, np.nan), r"a\.running_mean must be finite"),
        ("weight", np.ones(5, complex), r"a\.weight must be of real numbers"),
        ("weight", np.ma.ones(5), r"a\.weight must have no mask"),
        ("num_batches_tracked", np.array(0.5), "num_batches_tracked must be one integer"),
        ("num_batches_tracked", np.ones(2, int), "num_batches_tracked must be one integer"),
    ],
)
def test_states_with_unfit_values_are_refused(rng, key, value, message):
    state = torch_state(values(rng), "a.") | {f"a.{key}": value}
    with pytest.raises((TypeError, ValueError), match=message):
        convert.from_torch(state, "a.")


def test_modules_that_are_no_batch_norm_are_refused(rng):
    attributes = {"eps": 1e-5, "momentum": 0.1, "training": True}
    with pytest.raises(TypeError, match="batch norm of PyTorch, got InstanceNorm2d"):
        convert.from_torch(InstanceNorm2d(torch_state(values(rng)), **attributes))
    with pytest.raises(TypeError, match="got Module; in a network prefix= names the layer"):
        convert.from_torch(Module({}, {"1": BatchNorm2d({}, **attributes)}))
    with pytest.raises(TypeError, match="batch norm of PyTorch, got OtherBatchNorm"):
        convert.from_torch(OtherBatchNorm(torch_state(values(rng)), **attributes))
    for thing in (np.ones(5), BatchNorm(5)):
        kind = type(thing).__name__
        with pytest.raises(TypeError, match=f"module of PyTorch or a state dict, got {kind}"):
            convert.from_torch(thing)


@pytest.mark.parametrize("module", [False, True])
def test_a_prefix_that_is_no_text_is_refused(rng, module):
    state = torch_state(values(rng))
    given = BatchNorm2d(state, eps=1e-5, momentum=0.1, training=True) if module else state
    with pytest.raises(TypeError, match=r"prefix must be a str, .*got NoneType"):
        convert.from_torch(given, None)
    with pytest.raises(TypeError, match="state must have keys of str, got the int 0"):
        convert.from_torch({0: np.ones(5)})


# Keras


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("axis", [-1, 1])
def test_from_keras_and_back(rng, axis, scale, shift):
    given = values(rng)
    present = [scale, shift, True, True]
    weights = [value for value, has in zip(given, present, strict=True) if has]
    options = {"scale": scale, "shift": shift} | ({"axis": 1} if axis == 1 else {})
    layer = convert.from_keras(weights, momentum=0.99, eps=1e-3, **options)
    assert layer.momentum == 0.01
    back = convert.to_keras(layer)
    assert len(back) == len(weights)
    for array, weight in zip(back, weights, strict=True):
        np.testing.assert_array_equal(array, weight)
    back[-1][:] = 9
    np.testing.assert_array_equal(layer.running_var, given[3])
    given = [value if has else None for value, has in zip(given, present, strict=True)]
    check(rng, layer, given, 0.99, 1e-3, unbiased=False, axis=axis)


def test_unfit_weights_of_keras_are_refused(rng):
    given = values(rng)
    with pytest.raises(
        ValueError, match=r"4 arrays \['gamma', .*'moving_variance'\], got 3.*shift"
    ):
        convert.from_keras(given[1:], momentum=0.99, eps=1e-3)
    with pytest.raises(ValueError, match=r"'gamma': \(5,\), 'beta': \(4,\)"):
        convert.from_keras([given[0], given[1][:4], *given[2:]], momentum=0.99, eps=1e-3)
    with pytest.raises(ValueError, match=r"momentum must be from 0 to 1, got 1\.5"):
        convert.from_keras(given, momentum=1.5, eps=1e-3)
    for momentum in (None, "0.9"):
        with pytest.raises(TypeError, match=f"momentum must be a number, got {momentum!r}"):
            convert.from_keras(given, momentum=momentum, eps=1e-3)
    with pytest.raises(ValueError, match="moving_variance must not be negative"):
        convert.from_keras([*given[:3], -given[3]], momentum=0.9, eps=1e-3)
    with pytest.raises(TypeError, match="layer must be a BatchNorm, got NoneType"):
        convert.to_keras(None)
    with pytest.raises(RuntimeError, match="no running statistics"):
        convert.to_keras(BatchNorm(5, track_running_stats=False))


# ONNX

NAMES = ["bn.scale", "bn.B", "bn.mean", "bn.var"]


def node(*, outputs=("Y",), op_type="BatchNormalization", inputs=("X", *NAMES), **attributes):
    """Return what is used of a NodeProto; it keeps numbers in float32."""
    given = [
        SimpleNamespace(name=name, f=float(np.float32(value)), i=int(value))
        for name, value in attributes.items()
    ]
    return SimpleNamespace(op_type=op_type, input=inputs, output=outputs, attribute=given)


@pytest.mark.parametrize(
    ("attributes", "momentum", "eps"),
    [({}, 0.9, 1e-5), ({"epsilon": 1e-3, "momentum": 0.8}, 0.8, 1e-3)],
)
def test_from_onnx(rng, attributes, momentum, eps):
    given = values(rng)
    layer = convert.from_onnx(node(**attributes), dict(zip(NAMES, given, strict=True)))
    assert layer.training is False
    assert (layer.eps, layer.momentum) == (eps, {0.9: 0.1, 0.8: 0.2}[momentum])
    check(rng, layer, given, momentum, eps, unbiased=False)


@pytest.mark.parametrize(
    ("case", "training"),
    [
        ({"training_mode": 1, "outputs": ("Y", "mean", "var")}, True),
        ({"training_mode": 1}, True),
        ({"training_mode": 0}, False),
        ({"training_mode": 0, "outputs": ("Y", "mean", "var")}, False),
        ({"outputs": ("Y", "", "")}, False),
        ({"outputs": ("Y", "mean", "var", "saved_mean", "saved_var")}, True),
        ({"spatial": 1}, False),
    ],
)
def test_nodes_that_train(rng, case, training):
    initializers = dict(zip(NAMES, values(rng), strict=True))
    assert convert.from_onnx(node(**case), initializers).training is training


def test_inputs_of_a_node_may_be_the_same_initializer():
    one, zero = np.ones(5, np.float32), np.zeros(5, np.float32)
    merged = convert.from_onnx(
        node(inputs=("X", "one", "zero", "zero", "one")), {"one": one, "zero": zero}
    )
    for name, values in zip(convert.STATE, (one, zero, zero, one), strict=True):
        np.testing.assert_array_equal(merged.state_dict()[name], values)
    merged.gamma *= 2
    assert np.all(merged.running_var == 1) and np.all(one == 1)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"op_type": "InstanceNormalization"}, "BatchNormalization, got InstanceNormalization"),
        ({"spatial": 0}, "spatial=0"),
        ({"momentum": 1.5}, r"momentum must be from 0 to 1, got 1\.5"),
        ({"inputs": ("X", "bn.scale")}, "inputs X, scale, B, input_mean, input_var, got"),
        ({"inputs": ("X", *NAMES[:3], "elsewhere")}, r"missing: \['elsewhere'\]"),
    ],
)
def test_unfit_nodes_are_refused(rng, case, message):
    with pytest.raises((KeyError, ValueError), match=message):
        convert.from_onnx(node(**case), dict(zip(NAMES, values(rng), strict=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": -1}, "axis 1, and the layer along -1"),
        ({"relu": True}, "relu=True"),
        ({"momentum": None, "unbiased": False}, "momentum=None"),
        ({"unbiased": True}, "unbiased=True"),
        ({"track_running_stats": False}, "no running statistics"),
    ],
)
def test_layers_that_onnx_does_not_have_are_refused(options, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        convert.to_onnx(BatchNorm(5, **options))


ONNX = SimpleNamespace(
    helper=SimpleNamespace(
        make_node=lambda op_type, inputs, outputs, **attributes: node(
            op_type=op_type, inputs=inputs, outputs=outputs, **attributes
        )
    ),
    numpy_helper=SimpleNamespace(
        from_array=lambda array, name: SimpleNamespace(name=name, array=array, data_type=1),
        to_array=lambda tensor: tensor.array,
    ),
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
def test_to_onnx_and_back(rng, monkeypatch, scale, shift, training):
    monkeypatch.setitem(sys.modules, "onnx", ONNX)
    form = {"eps": 1e-3, "momentum": 0.3, "dtype": np.float64, "unbiased": False}
    layer = exact.trained(rng, BatchNorm(FEATURES, scale=scale, shift=shift, **form))
    made, initializers = convert.to_onnx(layer.train(training), prefix="a.")
    assert made.output == ["a.Y", "a.running_mean", "a.running_var"][: 3 if training else 1]
    assert made.input == ["a.X", *(tensor.name for tensor in initializers)]
    again = convert.from_onnx(made, initializers)
    assert (again.training, again.momentum, again.dtype) == (training, 0.3, np.float64)
    given = layer.gamma, layer.beta, layer.running_mean.copy(), layer.running_var.copy()
    check(rng, again, given, 0.7, 1e-3, unbiased=False)
    frozen = convert.to_onnx(layer.train().freeze())
    assert convert.from_onnx(*frozen).training is False
    layer.momentum = None
    assert convert.from_onnx(*convert.to_onnx(layer.eval())).momentum == 0.1


def test_onnx_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match="to_onnx needs onnx: pip install onnx"):
        convert.to_onnx(BatchNorm(5).eval())


# The module


def test_examples_in_docstrings():
    failed, attempted = doctest.testmod(convert)
    assert (failed, attempted > 5) == (0, True)


def test_the_module_is_there_on_demand():
    assert bn_cy.convert is convert

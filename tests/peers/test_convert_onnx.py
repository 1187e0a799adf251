"""`convert.from_onnx` and `to_onnx` beside ONNX's reference evaluator and onnxruntime."""

import exact
import numpy as np
import pytest
from exact import COMBINATIONS, error

from bn_cy import BatchNorm, convert

onnx = pytest.importorskip("onnx")

SHAPE = (4, 6, 5, 3)
STATISTICS = ("running_mean", "running_var")


def trained(rng, **options):
    """Return a layer as ONNX has them, with random parameters and running statistics."""
    form = {"unbiased": False, "momentum": 0.3, "eps": 1e-3}
    return exact.trained(rng, BatchNorm(6, **form | options))


def model_of(node, initializers, opset=15):
    """Return a checked model of one node."""
    kind, shapes = initializers[0].data_type, {"X": SHAPE, node.output[0]: SHAPE}

    def values(names):
        return [
            onnx.helper.make_tensor_value_info(name, kind, shapes.get(name, SHAPE[1:2]))
            for name in names
        ]

    graph = onnx.helper.make_graph([node], "one", values(["X"]), values(node.output), initializers)
    versions = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def evaluate(model, x):
    """Return what the reference evaluator gives."""
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, {"X": x})


def compare_training(layer, model, x):
    """Assert that y and the running statistics are alike after a step of training."""
    y, *running = evaluate(model, x)
    assert error(layer(x), y) <= 2e-6
    for name, statistic in zip(STATISTICS, running, strict=True):
        assert error(getattr(layer, name), statistic) <= 1e-6


@pytest.mark.parametrize(("scale", "shift"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("opset", [14, 15])
def test_to_onnx(rng, opset, dtype, scale, shift):
    layer = trained(rng, scale=scale, shift=shift, dtype=dtype).eval()
    x = exact.ordinary(rng, SHAPE, dtype=dtype)
    (y,) = evaluate(model_of(*convert.to_onnx(layer), opset), x)
    assert error(layer(x), y) <= 2e-6
    compare_training(layer.train(), model_of(*convert.to_onnx(layer), opset), x)


@pytest.mark.parametrize("opset", [9, 14, 15])
def test_inference_in_onnxruntime(rng, opset):
    runtime = pytest.importorskip("onnxruntime")
    layer = trained(rng, unbiased=True, momentum=None).freeze()  # evaluates in training mode, too
    model = model_of(*convert.to_onnx(layer), opset).SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = exact.ordinary(rng, SHAPE)
    assert error(layer(x), session.run(None, {"X": x})[0]) <= 2e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(rng, dtype, training):
    layer = trained(rng, dtype=dtype).train(training)
    for name in STATISTICS:
        setattr(layer, name, getattr(layer, name).astype(dtype))  # as ONNX will have them
    node, initializers = convert.to_onnx(layer, prefix="block.")
    assert list(node.input)[:2] == ["block.X", "block.scale"]
    for source in (initializers, {tensor.name: tensor for tensor in initializers}):
        again = convert.from_onnx(node, source)
        assert repr(again) == repr(layer)
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[key], value)


@pytest.mark.parametrize("attributes", [{}, {"epsilon": 1e-2, "momentum": 0.8}])
def test_from_onnx(rng, attributes):
    names = ["X", "a", "b", "c", "d"]
    arrays = dict(zip(names[1:], rng.uniform(0.5, 2, (4, 6)).astype(np.float32), strict=True))
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    x = exact.ordinary(rng, SHAPE)

    node = onnx.helper.make_node("BatchNormalization", names, ["Y"], **attributes)
    layer = convert.from_onnx(node, arrays)
    assert error(layer(x), evaluate(model_of(node, tensors), x)[0]) <= 2e-6

    outputs = ["Y", "mean", "var"]
    node = onnx.helper.make_node(
        "BatchNormalization", names, outputs, training_mode=1, **attributes
    )
    compare_training(convert.from_onnx(node, tensors), model_of(node, tensors), x)


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16"])
def test_half_precision(rng, kind):
    layer = trained(rng).eval()
    node, initializers = convert.to_onnx(layer)
    narrow = [
        onnx.helper.make_tensor(
            tensor.name, onnx.TensorProto.DataType.Value(kind), tensor.dims, values.tolist()
        )
        for tensor, values in zip(
            initializers, map(onnx.numpy_helper.to_array, initializers), strict=True
        )
    ]
    again = convert.from_onnx(node, narrow)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again.gamma, layer.gamma, rtol=2**-8)

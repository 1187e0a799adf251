"""The nine BatchNormalization cases that ONNX publishes with its package, on the stored data."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from bn_cy import BatchNorm, normalize

onnx = pytest.importorskip("onnx")

NODE_CASES = [
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
]
CONVERTED_CASES = [
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
]


def node_case(name):
    """Return the operator, its inputs and the expected outputs, as ONNX's generator makes them."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other operators' cases
        cases = {case.name: case for case in collect_testcases("BatchNormalization")}
    inputs, outputs = cases[name].data_sets[0]
    return cases[name].model.graph.node[0], inputs, outputs


def converted_case(name):
    """Return the same from the files of a converted PyTorch module."""
    folder = Path(onnx.__file__).parent / "backend/test/data/pytorch-converted" / name
    graph = onnx.load(folder / "model.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    (node,) = graph.node
    arrays[node.input[0]] = read(folder / "test_data_set_0/input_0.pb")
    return node, [arrays[i] for i in node.input], [read(folder / "test_data_set_0/output_0.pb")]


def read(path):
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def run(node, x, scale, bias, mean, var):
    """Do what the operator says; ONNX's momentum weighs the old statistics, and var is biased."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    eps = given.get("epsilon", 1e-5)
    if not given.get("training_mode", 0):
        return [normalize(x, mean, var, scale, bias, eps)]
    layer = BatchNorm(len(scale), eps=eps, momentum=1 - given.get("momentum", 0.9), unbiased=False)
    state = {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict({**state, "num_batches_tracked": 0})
    return [layer(x), layer.running_mean, layer.running_var]


@pytest.mark.parametrize("name", NODE_CASES + CONVERTED_CASES)
def test_published_case(name):
    case = node_case if name in NODE_CASES else converted_case
    node, inputs, outputs = case(name)
    assert node.op_type == "BatchNormalization"
    results = run(node, *inputs)
    assert len(results) == len(outputs)
    for result, expected in zip(results, outputs, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6)

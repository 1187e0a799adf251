"""Layers of PyTorch, Keras and ONNX as `bn_cy.BatchNorm`, and back.

What they mean by the same words is not the same, and is converted here:

- momentum weighs the new batch in PyTorch and here, and the old value in Keras and ONNX;
- the running variance is divided by n - 1 in PyTorch, and by n in Keras and ONNX (`unbiased`);
- the features lie along axis 1 in PyTorch and ONNX, and along the last one in Keras.

None of the three has to be installed, but for `to_onnx`. Parameters of half precision become
float32, and those of float64 stay so. Running statistics are float64 in every `bn_cy.BatchNorm`.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_cy._arguments import as_plain
from bn_cy._attributes import checked_tracked, checked_weight, fitted
from bn_cy._state import check_prefix, entries_under
from bn_cy.layer import BatchNorm

__all__ = ["from_keras", "from_onnx", "from_torch", "to_keras", "to_onnx"]

Array = NDArray[Any]

STATE = ("weight", "bias", "running_mean", "running_var")
ONNX_INPUTS = ("scale", "B", "input_mean", "input_var")  # after X, in the order of STATE
NAMED = 5  # layers that an error names


def from_torch(module_or_state: Any, prefix: str = "") -> BatchNorm:
    """Return the layer of a ``torch.nn.BatchNorm*d``, or of its state dict.

    Parameters
    ----------
    module_or_state : torch.nn.Module, or mapping of str to tensor or array
        A module; or what its ``state_dict()`` gives, or ``numpy.load`` or
        ``safetensors.numpy.load_file`` has read.
    prefix : str, optional
        Where the layer is in a network, such as "features.1.".

    Returns
    -------
    BatchNorm
        With the module's eps, momentum and mode. **A state has none of these**: the layer then has
        PyTorch's defaults, eps = 1e-5 and momentum = 0.1, and is in training mode; assign
        ``layer.eps`` if the network was built with another one.

    Raises
    ------
    AttributeError
        If a network has nothing of this name.
    KeyError
        If a key is missing or unknown.
    TypeError, ValueError
        If it is no batch norm, or a value does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_cy import convert
    >>> statistics = {"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)}
    >>> state = {"fc.weight": np.ones((2, 3)), "bn.weight": np.full(2, 7.0, "f4"), **statistics}
    >>> layer = convert.from_torch(state, prefix="bn.")
    >>> layer.gamma, layer.beta
    (array([7., 7.], dtype=float32), None)
    """
    if isinstance(module_or_state, Mapping):
        return _from_torch_state(module_or_state, prefix)
    if not hasattr(module_or_state, "get_submodule"):
        got = type(module_or_state).__name__
        raise TypeError(f"expected a module of PyTorch or a state dict, got {got}")
    check_prefix(prefix)
    name = prefix.removesuffix(".")
    module = module_or_state.get_submodule(name) if name else module_or_state
    # Instance norm has the same attributes, and is another function.
    if not any(_is_batch_norm(kind) for kind in type(module).__mro__):
        raise TypeError(
            f"expected a batch norm of PyTorch, got {type(module).__name__}; "
            'in a network prefix= names the layer, as in prefix="features.1."'
        )
    layer = _from_torch_state(module.state_dict(), "", eps=module.eps, momentum=module.momentum)
    return layer.train(module.training)


def from_keras(
    weights: Sequence[Any],
    *,
    momentum: float,
    eps: float,
    scale: bool = True,
    shift: bool = True,
    axis: int = -1,
) -> BatchNorm:
    """Return the layer of a ``keras.layers.BatchNormalization``.

    Parameters
    ----------
    weights : sequence of arrays of shape (features,)
        What its ``get_weights()`` gives: ``[gamma, beta, moving_mean, moving_variance]``.
    momentum, eps : float
        Its ``momentum``, which weighs the old value (0.99 by default), and its ``epsilon`` (1e-3 by
        default).
    scale, shift : bool, optional
        Its ``scale`` and ``center``: whether gamma and beta are among the weights.
    axis : int, optional
        Its ``axis``.

    Returns
    -------
    BatchNorm
        In training mode, as new layers are. Its running variance is divided by n.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_cy import convert
    >>> weights = [np.ones(2, "f4"), np.zeros(2, "f4"), np.full(2, 5.0), np.full(2, 3.0)]
    >>> layer = convert.from_keras(weights, momentum=0.99, eps=1e-3)
    >>> layer.momentum, layer.running_mean
    (0.01, array([5., 5.]))
    """
    there = {"gamma": scale, "beta": shift, "moving_mean": True, "moving_variance": True}
    names = [name for name, has in there.items() if has]
    if len(weights) != len(names):
        raise ValueError(
            f"weights must be the {len(names)} arrays {names}, got {len(weights)}; scale=False and "
            "shift=False say that there is no gamma and no beta"
        )
    keys = [key for key, has in zip(STATE, there.values(), strict=True) if has]
    values = list(zip(keys, names, weights, strict=True))
    weight = _complement(checked_weight("momentum", momentum))
    return _layer(values, eps=eps, momentum=weight, unbiased=False, axis=axis)


def to_keras(layer: BatchNorm) -> list[Array]:
    """Return the weights of a ``keras.layers.BatchNormalization``, for its ``set_weights``.

    Parameters
    ----------
    layer : BatchNorm
        The layer. What is no weight goes to Keras's constructor: ``momentum=1 - layer.momentum``,
        ``epsilon=layer.eps``, ``axis=layer.axis``, and ``scale=False`` or ``center=False`` where
        gamma or beta is None. A ReLU becomes a layer of its own.

    Returns
    -------
    list of arrays of shape (features,)
        ``[gamma, beta, moving_mean, moving_variance]``, as far as the layer has them: copies.

    Raises
    ------
    RuntimeError
        If the layer has no running statistics.

    Examples
    --------
    >>> import bn_cy
    >>> from bn_cy import convert
    >>> convert.to_keras(bn_cy.BatchNorm(1, shift=False))
    [array([1.], dtype=float32), array([0.]), array([1.])]
    """
    state = _tracked_state(layer)
    return [state[key] for key in STATE if key in state]


def from_onnx(node: Any, initializers: Mapping[str, Any] | Sequence[Any]) -> BatchNorm:
    """Return the layer of a BatchNormalization node.

    Parameters
    ----------
    node : onnx.NodeProto
        The node, or anything with its fields.
    initializers : mapping of str to array or onnx.TensorProto, or sequence of onnx.TensorProto
        Where the node's scale, B, mean and variance are found by their names:
        ``model.graph.initializer``.

    Returns
    -------
    BatchNorm
        With features along axis 1, and a running variance divided by n. It is in training mode if
        the node is, and else in eval mode.

    Raises
    ------
    KeyError
        If an initializer is missing.
    TypeError, ValueError
        If the node is another one, or a value does not fit.

    See Also
    --------
    to_onnx : the other way.
    """
    if node.op_type != "BatchNormalization":
        raise ValueError(f"node must be a BatchNormalization, got {node.op_type}")
    given = {attribute.name: attribute for attribute in node.attribute}
    if "spatial" in given and not given["spatial"].i:
        raise ValueError("node must have one mean per channel, got spatial=0, one per place")
    if isinstance(initializers, Mapping):
        values = initializers
    else:
        values = {tensor.name: tensor for tensor in initializers}
    names = list(node.input)[1:]
    if len(names) != len(ONNX_INPUTS):
        raise ValueError(f"node must have the inputs X, {', '.join(ONNX_INPUTS)}, got {node.input}")
    missing = [name for name in names if name not in values]
    if missing:
        raise KeyError(f"initializers must have {names}, missing: {missing}")
    momentum = _as_written(given["momentum"].f) if "momentum" in given else 0.9
    layer = _layer(
        [(key, name, values[name]) for key, name in zip(STATE, names, strict=True)],
        eps=_as_written(given["epsilon"].f) if "epsilon" in given else 1e-5,
        momentum=_complement(checked_weight("momentum", momentum)),
        unbiased=False,
    )
    if "training_mode" in given:
        return layer.train(bool(given["training_mode"].i))
    # Before version 14 of the operator more than one output is what makes a node train.
    return layer.train(any(node.output[1:]))


def to_onnx(layer: BatchNorm, *, prefix: str = "") -> tuple[Any, list[Any]]:
    """Return a BatchNormalization node, and its initializers.

    Parameters
    ----------
    layer : BatchNorm
        With features along axis 1. In eval mode, or frozen, it becomes a node of inference, for any
        version of the operator from 9 on; in training mode one that trains, from 14 on.
    prefix : str, optional
        What all names begin with, so that several layers fit into one graph.

    Returns
    -------
    node : onnx.NodeProto
        It reads ``X`` and writes ``Y``, and in training also ``running_mean`` and ``running_var``.
    initializers : list of onnx.TensorProto
        ``scale``, ``B``, ``input_mean`` and ``input_var``, of the layer's dtype. A float32 mean
        loses digits: where means are 10,000 standard deviations, y has three digits left.

    Raises
    ------
    ModuleNotFoundError
        If onnx is missing.
    RuntimeError
        If the layer has no running statistics.
    ValueError
        If ONNX has no such layer: features along another axis, a ReLU, and, in training, momentum
        None or a running variance divided by n - 1.

    See Also
    --------
    from_onnx : the other way.
    """
    state = _tracked_state(layer)
    training = layer.training and not layer.frozen
    _check_for_onnx(layer, training)
    try:
        from onnx import helper, numpy_helper
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"to_onnx needs {error.name}: pip install onnx", name=error.name
        ) from error
    inputs = [prefix + name for name in ("X", *ONNX_INPUTS)]
    outputs = [prefix + name for name in ("Y", "running_mean", "running_var")]
    attributes: dict[str, Any] = {"epsilon": layer.eps}
    if layer.momentum is not None:
        attributes["momentum"] = _complement(layer.momentum)
    if training:
        attributes["training_mode"] = 1
    node = helper.make_node(
        "BatchNormalization", inputs, outputs if training else outputs[:1], **attributes
    )
    neutral = {"weight": np.ones(layer.num_features), "bias": np.zeros(layer.num_features)}
    arrays = [np.asarray((neutral | state)[key], layer.dtype) for key in STATE]
    return node, [numpy_helper.from_array(*pair) for pair in zip(arrays, inputs[1:], strict=True)]


def _is_batch_norm(kind: type) -> bool:
    """Tell whether a class is one of PyTorch's own batch norms."""
    return kind.__module__.startswith("torch.nn.") and "BatchNorm" in kind.__name__


def _from_torch_state(state: Mapping[str, Any], prefix: str, **options: Any) -> BatchNorm:
    """Return the layer that has the keys with this prefix."""
    own = entries_under(prefix, state)
    statistics = {*STATE[2:], "num_batches_tracked"}
    missing = set(STATE[2:]) - own.keys() if own.keys() & statistics or not own else set()
    unexpected = own.keys() - {*STATE} - statistics
    if missing or unexpected:
        there = [key.removesuffix("running_mean") for key in state if key.endswith("running_mean")]
        raise KeyError(
            f"state must have the keys of a batch norm and no others beginning with {prefix!r}; "
            f"missing: {sorted(missing) or 'none'}, unexpected: {sorted(unexpected) or 'none'}; "
            f"prefixes of batch norms: {there[:NAMED] or 'none'}"
        )
    keys = [key for key in STATE if key in own]
    layer = _layer([(key, prefix + key, own[key]) for key in keys], **options)
    if "num_batches_tracked" in own:
        tracked = _as_array("num_batches_tracked", own["num_batches_tracked"])
        layer.num_batches_tracked = checked_tracked(tracked)
    return layer


def _layer(values: Iterable[tuple[str, str, Any]], **options: Any) -> BatchNorm:
    """Return a layer with these values, each with the key of our state and its name elsewhere."""
    named = {key: (name, _as_array(name, value)) for key, name, value in values}
    shapes = {name: array.shape for name, array in named.values()}
    _, first = next(iter(named.values()))
    if first.ndim != 1 or len(set(shapes.values())) > 1:
        raise ValueError(f"a batch norm has one value per feature of each, got the shapes {shapes}")
    layer = BatchNorm(
        len(first),
        scale="weight" in named,
        shift="bias" in named,
        track_running_stats="running_mean" in named,
        dtype=np.float64 if first.dtype.itemsize > 4 else np.float32,
        **options,
    )
    for key, array in layer._state_arrays().items():
        name, value = named[key]
        array[...] = fitted(key, value, array, name)
    return layer


def _as_array(name: str, values: Any) -> Array:
    """Return an array, or a tensor of PyTorch or ONNX, as an array with a dtype of NumPy."""
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        return np.asarray(tensor.float() if "bfloat16" in str(tensor.dtype) else tensor)
    if hasattr(values, "data_type"):
        from onnx import numpy_helper

        values = numpy_helper.to_array(values)
    array: Array = as_plain(name, values)
    return array.astype(np.float32) if "bfloat16" in array.dtype.name else array


def _tracked_state(layer: BatchNorm) -> dict[str, Array]:
    """Return the state of a layer with running statistics."""
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer must be a BatchNorm, got {type(layer).__name__}")
    if not layer.track_running_stats:
        raise RuntimeError("this layer has no running statistics, which Keras and ONNX need")
    return layer.state_dict()


def _check_for_onnx(layer: BatchNorm, training: bool) -> None:
    """Refuse what a BatchNormalization node cannot say."""
    if layer.axis != 1:
        raise ValueError(f"ONNX has the features along axis 1, and the layer along {layer.axis}")
    if layer.relu:
        raise ValueError(
            "ONNX's batch norm has no ReLU, and the layer has relu=True: convert it with "
            "layer.relu = False, and add a Relu node"
        )
    if training and layer.momentum is None:
        raise ValueError(
            "ONNX's batch norm has no momentum=None: convert the layer in eval mode, or give it "
            "a momentum"
        )
    if training and layer.unbiased:
        raise ValueError(
            "ONNX divides the running variance by n, and the layer, with unbiased=True, by n - 1: "
            "convert it in eval mode, or with layer.unbiased = False"
        )


def _complement(momentum: float) -> float:
    """Return the other weight of the two, as a person would: 0.1 for 0.9."""
    return float(1 - Decimal(str(float(momentum))))


def _as_written(value: float) -> float:
    """Return the shortest number that is this one in float32: ONNX keeps 1e-5 as 9.99999974e-06."""
    return float(str(np.float32(value)))

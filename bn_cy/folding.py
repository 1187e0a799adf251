"""Batch norm in evaluation as a part of the linear layer or the convolution beside it.

In evaluation batch norm is ``x*scale + shift``, feature by feature (`BatchNorm.affine`). So the
weights beside it can take it over, and it costs nothing. For ``x @ W + b``, with W of the shape
(inputs, outputs)::

    fold       ((x @ W + b) - mean)*scale + beta = x @ (W*scale) + ((b - mean)*scale + beta)
    fold_next  (x*scale + shift) @ W + b         = x @ (scale[:, None]*W) + (shift @ W + b)

A convolution is such a product at every place of the image.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_cy._arguments import as_flag, as_index, as_plain, as_real
from bn_cy.layer import BatchNorm

__all__ = ["fold", "fold_next"]

Array = NDArray[Any]

# The axis of W's outputs, and that of its inputs beside it: x @ W and Keras, PyTorch.
CONVENTIONS = {-1: -2, 0: 1}


def fold(
    W: ArrayLike, b: ArrayLike | None, layer: BatchNorm, *, axis: int | None = None
) -> tuple[Array, Array]:
    """Fold a batch norm in eval mode into the linear layer or the convolution before it.

    Parameters
    ----------
    W : array of floats, two dimensions or more
        The weight of the layer before: (inputs, outputs) for ``x @ W``, (height, width, inputs,
        outputs) in Keras, (outputs, inputs, ...) in PyTorch.
    b : array of shape (outputs,), or None
        Its bias.
    layer : BatchNorm
        With `W`'s outputs as its features. Its mode does not matter, and it is left as it is.
    axis : int, optional
        Where `W` has its outputs: -1 for ``x @ W`` and in Keras, 0 in PyTorch, and 1 in PyTorch's
        transposed convolutions. **By default the last axis or the first, whichever has the length
        of layer.num_features**; if both have it, as in a square matrix, there is no default.

    Returns
    -------
    W, b : new arrays of W's dtype
        The weight and the bias of a layer that does the work of both. They are computed in float64.

    Raises
    ------
    RuntimeError
        If the layer has no running statistics.
    TypeError, ValueError
        If a shape or a dtype does not fit, if `axis` is needed, or if the layer has a ReLU.

    See Also
    --------
    fold_next : into the layer after it.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> layer = bn_cy.BatchNorm(3, eps=0, dtype=np.float64).eval()
    >>> layer.running_mean, layer.running_var = [1.0, 2.0, 3.0], [4.0, 1.0, 0.25]
    >>> x, W = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0, 5.0], [1.0, 3.0, 2.0]])
    >>> layer(x @ W)
    array([[ 1.,  4., 12.]])
    >>> W, b = bn_cy.fold(W, None, layer)
    >>> x @ W + b
    array([[ 1.,  4., 12.]])
    """
    W, (scale, _), state = _checked_weight(W), _checked_affine(layer), layer.state_dict()
    axis = _checked_axis(W, axis, len(scale))
    # b may be near the mean, and b*scale + shift would then be a difference of large numbers.
    centred = _checked_bias(b, len(scale)) - state["running_mean"]
    folded = centred * scale + state.get("bias", 0.0)
    return (W * _along(axis, scale, W)).astype(W.dtype), folded.astype(W.dtype)


def fold_next(
    layer: BatchNorm,
    W: ArrayLike,
    b: ArrayLike | None,
    *,
    axis: int | None = None,
    unpadded: bool = False,
) -> tuple[Array, Array]:
    """Fold a batch norm in eval mode into the linear layer or the convolution after it.

    Parameters
    ----------
    layer : BatchNorm
        With `W`'s inputs as its features, and nothing but a reshape between it and `W`. Its mode
        does not matter, and it is left as it is.
    W : array of floats, two dimensions or more
        The weight of the layer after: (inputs, outputs) for ``x @ W``, (height, width, inputs,
        outputs) in Keras, (outputs, inputs, ...) in PyTorch.
    b : array of shape (outputs,), or None
        Its bias.
    axis : int, optional
        Where `W` has its **outputs**, as in `fold`: -1, with the inputs before them, or 0, with the
        inputs after them. By default the one with which the inputs are as many as the layer's
        features; if it is so with both, as in a square matrix, there is no default.
    unpadded : bool, optional
        True states that a convolution has no padding. Beyond the border it would see 0, where the
        batch norm does not give 0 but has not been: no bias makes up for that. So a kernel larger
        than 1 is refused without this, unless the shift is 0. (What can be done in the place of
        zeros is padding each feature of x with ``-shift/scale``.)

    Returns
    -------
    W, b : new arrays of W's dtype
        The weight and the bias of a layer that does the work of both. They are computed in float64.

    Raises
    ------
    RuntimeError
        If the layer has no running statistics.
    TypeError, ValueError
        If a shape or a dtype does not fit, if `axis` or `unpadded` is needed, or if the layer has a
        ReLU.

    See Also
    --------
    fold : into the layer before it.

    Examples
    --------
    >>> import numpy as np
    >>> import bn_cy
    >>> layer = bn_cy.BatchNorm(2, eps=0, dtype=np.float64).eval()
    >>> layer.running_mean, layer.running_var = [1.0, 2.0], [4.0, 1.0]
    >>> x, W = np.array([[3.0, 5.0]]), np.array([[1.0, 0.0, 5.0], [1.0, 3.0, 2.0]])
    >>> layer(x) @ W
    array([[ 4.,  9., 11.]])
    >>> W, b = bn_cy.fold_next(layer, W, None)
    >>> x @ W + b
    array([[ 4.,  9., 11.]])
    """
    W, (scale, shift) = _checked_weight(W), _checked_affine(layer)
    outputs, inputs = _checked_axes(W, axis, len(scale))
    others = tuple(i for i in range(W.ndim) if i != outputs)
    unpadded = as_flag("unpadded", unpadded)
    if not unpadded and shift.any() and any(W.shape[i] > 1 for i in others if i != inputs):
        raise ValueError(
            f"W of shape {W.shape} is a convolution that may see padding, which the layer's shift "
            "does not reach: pass unpadded=True if it has none"
        )
    folded = _checked_bias(b, W.shape[outputs]) + np.sum(W * _along(inputs, shift, W), axis=others)
    return (W * _along(inputs, scale, W)).astype(W.dtype), folded.astype(W.dtype)


def _along(axis: int, values: Array, W: Array) -> Array:
    """Reshape values so that they broadcast along an axis of W."""
    shape = [1] * W.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _checked_affine(layer: BatchNorm) -> tuple[Array, Array]:
    """Return the layer's scale and shift, which are all of it if it has no ReLU."""
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer must be a BatchNorm, got {type(layer).__name__}")
    if layer.relu:
        raise ValueError(
            "a layer with relu=True cannot be folded, as weights hold no ReLU; into the layer "
            "before it goes with layer.relu = False and a ReLU of its own after the folded one"
        )
    return layer.affine()


def _checked_weight(W: ArrayLike) -> Array:
    """Return a weight as an array of floats."""
    array: Array = as_plain("W", W)
    if array.dtype.kind != "f":
        raise TypeError(f"W must be of floats, got {array.dtype}")
    if array.ndim < 2:
        raise ValueError(f"W must have two dimensions or more, got shape {array.shape}")
    return array


def _checked_bias(b: ArrayLike | None, outputs: int) -> Array:
    """Return a bias with one value for each output, in float64; zeros for None."""
    array: Array = np.zeros(outputs) if b is None else as_real("b", b).astype(np.float64)
    if array.shape != (outputs,):
        raise ValueError(f"b must have shape ({outputs},), as W's outputs, got {array.shape}")
    return array


def _checked_axis(W: Array, axis: int | None, features: int) -> int:
    """Return the axis along which W has the features as its outputs, counted from 0."""
    if axis is None:
        axis = _only(W, features, "outputs", {outputs: outputs for outputs in CONVENTIONS})
        return axis % W.ndim
    axis = as_index("axis", axis)
    if not -W.ndim <= axis < W.ndim:
        raise ValueError(f"axis must be one of W's, of shape {W.shape}, got {axis}")
    if W.shape[axis] != features:
        raise ValueError(f"W must have {features} outputs along axis {axis}, got shape {W.shape}")
    return axis % W.ndim


def _checked_axes(W: Array, axis: int | None, features: int) -> tuple[int, int]:
    """Return the axes of W's outputs and of its inputs, which are the features, from 0."""
    conventions = {outputs % W.ndim: inputs for outputs, inputs in CONVENTIONS.items()}
    if axis is None:
        outputs = _only(W, features, "inputs", CONVENTIONS) % W.ndim
    else:
        index = as_index("axis", axis)
        outputs = index % W.ndim
        if outputs not in conventions or not -W.ndim <= index < W.ndim:
            raise ValueError(f"axis must be -1 or 0, got {axis}")
    inputs = conventions[outputs] % W.ndim
    if W.shape[inputs] != features:
        raise ValueError(
            f"W must have {features} inputs along axis {inputs}, beside the outputs along axis "
            f"{outputs}, got shape {W.shape}"
        )
    return outputs, inputs


def _only(W: Array, features: int, what: str, places: dict[int, int]) -> int:
    """Return the only convention by which W has the features; `places` are their axes in each."""
    fitting = [axis for axis, place in places.items() if W.shape[place] == features]
    if not fitting:
        raise ValueError(
            f"W must have {features} {what} along axis {places[-1]}, as x @ W has them, or along "
            f"axis {places[0]}, as PyTorch has them, got shape {W.shape}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"W of shape {W.shape} may have its outputs along the last axis, as in x @ W, or along "
            "the first, as in PyTorch: pass axis=-1 or axis=0"
        )
    return fitting[0]

"""The attributes of a layer: properties that check, and arrays that keep their place."""

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_cy import _calls
from bn_cy._arguments import as_flag, as_index, as_real
from bn_cy._layout import as_number, copy_all

Array = NDArray[Any]

POLICIES = ("raise", "skip", "update")  # for a batch with NaN or infinity
NAMED = 5  # features that an error names


class Arrays(dict):
    """Arrays by name that keep their place: what is assigned is checked and copied into them.

    So an optimizer may hold the arrays, or assign what it computes.
    """

    def __setitem__(self, name, value):
        """Copy a value into the array of this name."""
        current = self[name]
        if value is current:  # as it is after `arrays[name] -= ...`
            check_values(name, name, current)
            return
        array = fitted(name, value, current)
        if not current.flags.writeable:
            raise ValueError(f"{name} cannot be assigned: the layer's array is read-only")
        current[...] = array

    def update(self, *values, **more):
        """Assign several: all or none."""
        values = dict(*values, **more)
        copy_all(
            [fitted(name, value, self[name]).copy() for name, value in values.items()],
            [self[name] for name in values],
        )

    def __reduce__(self):
        """Make copies and pickles plain dictionaries: they are no layer's."""
        return dict, (dict(self),)

    def _refuse(self, *_):
        raise TypeError(f"the arrays {list(self)} keep their place: assign values to them")

    __delitem__ = clear = pop = popitem = setdefault = __ior__ = _refuse


def entry(store, key, doc, name=None):
    """Return a property that reads and assigns an entry of one of the layer's dictionaries.

    Errors call it by its name, if that is not the key.
    """

    def get(layer):
        return getattr(layer, store).get(key)

    def assign(layer, value):
        entries = getattr(layer, store)
        if key not in entries:
            raise AttributeError(f"this layer has no {name or key}")
        entries[key] = value

    return property(get, assign, doc=doc)


def checked(name, check, doc):
    """Return a property that stores what `check` returns for a new value."""
    private = f"_{name}"
    return property(
        operator.attrgetter(private),
        lambda layer, value: setattr(layer, private, check(value)),
        doc=doc,
    )


def flag(name, doc):
    """Return a property that stores True or False, by its own name, as it is in pickles."""
    return property(
        lambda layer: vars(layer)[name],
        lambda layer, value: vars(layer).update({name: as_flag(name, value)}),
        doc=doc,
    )


def fixed(name, doc, instead):
    """Return a property that cannot be assigned, and says what to do instead."""

    def refuse(layer, value):
        raise AttributeError(f"{name} of a layer cannot be assigned: {instead}")

    return property(operator.attrgetter(f"_{name}"), refuse, doc=doc)


def fitted(name: str, value: Any, current: Array, called: str | None = None) -> Array:
    """Return a value as an array that can take the place of the layer's own of this name.

    Errors name it as it is called elsewhere, if that is given.
    """
    called = called or name
    array = np.require(as_real(called, value), current.dtype, ["C", "W", "A"])
    if array.shape != current.shape:
        raise ValueError(f"{called} must have shape {current.shape}, got {array.shape}")
    check_values(name, called, array)
    return array


def check_values(name, called, array):
    """Refuse statistics that no batch has."""
    if name.startswith("running_"):
        check_finite(called, array)
    if name == "running_var":
        _calls.check_variance(called, array)


def check_finite(name, array):
    """Refuse statistics that are NaN or infinite."""
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise ValueError(f"{name} must be finite, got {array[wrong[0]]} {places(wrong)}")


def places(features):
    """Name some features by their numbers."""
    shown = ", ".join(map(str, features[:NAMED]))
    more = ", ..." if len(features) > NAMED else ""
    return f"at {len(features)} of the features: {shown}{more}"


def checked_eps(eps):
    """Return an eps as a float."""
    return _calls.checked_eps(eps)


def checked_axis(axis):
    """Return an axis as an integer."""
    return as_index("axis", axis)


def checked_policy(policy):
    """Return what to do with a batch that is not finite."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"on_nonfinite must be one of {', '.join(POLICIES)}, got {policy!r}")
    return policy


def checked_relu(relu):
    """Return whether a ReLU follows."""
    return as_flag("relu", relu)


def checked_momentum(momentum):
    """Return a momentum from 0 to 1, or None."""
    return None if momentum is None else checked_weight("momentum", momentum)


def checked_weight(name: str, value: Any) -> float:
    """Return a weight, from 0 to 1."""
    weight = as_number(name, value)
    if not 0 <= weight <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    return weight


def checked_tracked(value: Any) -> int:
    """Return num_batches_tracked as an int."""
    number = value
    if type(value) is not int:  # of any length
        array = as_real("num_batches_tracked", value)
        number = array.item() if array.size == 1 else -1
    if not 0 <= number < 2**63 or number % 1 != 0:
        raise ValueError(
            f"num_batches_tracked must be one integer, 0 or more and below 2^63, got {value!r}"
        )
    return int(number)

"""What of a layer is kept: its state under PyTorch's names, pickles and copies."""

import copyreg
from copy import deepcopy
from typing import Any

import numpy as np

from bn_cy._attributes import Arrays, checked_tracked, fitted
from bn_cy._forks import give_lock
from bn_cy._layout import copy_all

__all__ = ["Stateful"]

PICKLE_VERSION = 3  # 1: without ghost_batch_size; until 2 VERSION was "version"
VERSION = "_pickle_version"  # its key beside the attributes, those of a subclass, too


class Stateful:
    """The part of `BatchNorm` that saves and restores its parameters and running statistics."""

    def reset_running_stats(self):
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        fresh, arrays = [np.zeros((), np.int64)], [self._tracked]
        if self._running:
            fresh += [np.zeros(self._num_features), np.ones(self._num_features)]
            arrays += [self.running_mean, self.running_var]
        with self._lock:
            copy_all(fresh, arrays)

    def state_dict(self):
        """Return copies of the parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict
            ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``num_batches_tracked``,
            as far as the layer has them.
        """
        arrays = self._state_arrays()
        if self._running:
            arrays["num_batches_tracked"] = self._tracked
        with self._lock:
            return {name: array.copy() for name, array in arrays.items()}

    def load_state_dict(self, state, *, prefix=""):
        """Load what `state_dict` of this class or of ``torch.nn.BatchNorm*d`` gave: all or nothing.

        Parameters
        ----------
        state : mapping of str to array
            With the keys of this layer's own `state_dict`; ``num_batches_tracked`` may be absent,
            and is then 0.
        prefix : str, optional
            What stands before the layer's keys in the state of a network, such as "layers.1.".
            Keys that begin otherwise are not looked at.

        Raises
        ------
        KeyError
            If a key is missing or unknown.
        TypeError, ValueError
            If `state` is no such mapping, or `prefix` no str; if a value has another shape, or is
            not of real numbers, if a statistic is not finite or a variance negative, or if an array
            of the layer is read-only. The layer is unchanged.
        """
        arrays = self._state_arrays()
        own = entries_under(prefix, state)
        check_keys(own, arrays.keys(), {"num_batches_tracked"} if self._running else set(), prefix)
        loaded = [fitted(name, own[name], array).copy() for name, array in arrays.items()]
        for name, array in arrays.items():
            if not array.flags.writeable:
                raise ValueError(f"{name} cannot be loaded: the layer's array is read-only")
        if self._running:
            arrays["num_batches_tracked"] = self._tracked
            loaded.append(np.array(checked_tracked(own.get("num_batches_tracked", 0)), np.int64))
        with self._lock:
            copy_all(loaded, list(arrays.values()))

    def __getstate__(self):
        """Everything but the cached batch and the lock, with copies of the arrays."""
        slots = {name: getattr(self, name) for name in slots_of(self) if hasattr(self, name)}
        state = {**self.__dict__, **slots, VERSION: PICKLE_VERSION, "_cache": None}
        del state["_lock"]
        state["_params"] = deepcopy(self._params)
        state["grads"] = deepcopy(state.pop("_grads"))  # its name in every pickle
        with self._lock:  # a forward updates these
            state["_tracked"], state["_running"] = deepcopy((self._tracked, self._running))
        return state

    def __setstate__(self, state):
        """Restore a layer; ValueError if a later version of bn_cy has written it."""
        state = dict(state)
        version = state.pop(VERSION if VERSION in state else "version", None)
        if version == 1:
            state["_ghost_batch_size"] = None
        elif version not in (2, PICKLE_VERSION):
            raise ValueError(
                f"this {type(self).__name__} was pickled in version {version} of its format, "
                f"and this bn_cy reads versions up to {PICKLE_VERSION}"
            )
        state["_grads"] = state.pop("grads")
        for name in slots_of(self) & state.keys():
            setattr(self, name, state.pop(name))
        arrays = {name: Arrays(state[name]) for name in ("_params", "_running")}
        self.__dict__.update(state, **arrays)
        give_lock(self)

    def _state_arrays(self):
        arrays = {
            "weight": self.gamma,
            "bias": self.beta,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: array for name, array in arrays.items() if array is not None}


def slots_of(layer):
    """Return the names of the __slots__ that a subclass has beside the dictionary."""
    return set(copyreg._slotnames(type(layer)))


def entries_under(prefix: str, state: Any) -> dict[str, Any]:
    """Return the entries of a state whose keys begin with a prefix, by the rest of the key."""
    check_prefix(prefix)
    if not hasattr(state, "keys"):
        raise TypeError(
            "state must be a mapping of str to array, as state_dict returns, got "
            f"{type(state).__name__}"
        )
    for key in state:
        if not isinstance(key, str):
            raise TypeError(f"state must have keys of str, got the {type(key).__name__} {key!r}")
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def check_prefix(prefix: Any) -> None:
    """Refuse a prefix that is no text."""
    if not isinstance(prefix, str):
        kind = type(prefix).__name__
        raise TypeError(f'prefix must be a str, such as "layers.1.", or "" for none, got {kind}')


def check_keys(own, needed, optional, prefix):
    """Refuse a state in which a key is missing or unknown."""
    missing, unexpected = needed - own.keys(), own.keys() - needed - optional
    if not missing and not unexpected:
        return

    def named(keys):
        return sorted(prefix + key for key in keys) or "none"

    if own or not prefix:
        fault = f"missing: {named(missing)}, unexpected: {named(unexpected)}"
    else:
        fault = f"no key begins with {prefix!r}"
    wanted = [prefix + key for key in (*needed, *optional)]
    raise KeyError(f"state must have the keys {wanted}; {fault}")

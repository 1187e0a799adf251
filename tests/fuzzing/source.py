"""Random decisions, each an integer: so hypothesis can take the place of the seeded generator."""

import random

import numpy as np


class Source:
    """Decisions made of integers; the least one is the simplest."""

    def integer(self, low, high):
        """Return an integer from low to high, both included."""
        raise NotImplementedError

    def pick(self, options):
        """Return one of some options; the first is the simplest."""
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent):
        """Return True so often, which is less simple than False."""
        return self.integer(0, 99) >= 100 - percent

    def generator(self):
        """Return a generator for the contents of an array."""
        return np.random.default_rng(self.integer(0, 2**32 - 1))


class Seeded(Source):
    """The decisions of one call of a run: they depend on no other call."""

    def __init__(self, seed, call):
        self._random = random.Random(f"{seed} {call}")

    def integer(self, low, high):
        return self._random.randint(low, high)

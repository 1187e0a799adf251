"""One call, from its decisions to a verdict."""

import contextlib

import numpy as np

import bn_cy
from bn_cy import functional
from fuzzing import memory, refusals
from fuzzing.calls import FrozenStep, Moments, Normalize, Pieces, Step
from fuzzing.compare import Report
from fuzzing.layer import Layer, Seen
from fuzzing.problem import BUDGETS, SMALL, Problem

CALLS = (Step, Moments, Normalize, FrozenStep, Pieces, Layer)
HUGE = 1 << 60


class Trial:
    """What was drawn, what came of it.

    Parameters
    ----------
    source : Source
        The decisions.
    budgets : dict
        Values that a call may have, beside how often, in percent, at the most.
    kinds : sequence of subclasses of Call
        What may be called.
    spoilt : int
        How often, in percent, an argument is spoilt.
    """

    @np.errstate(all="ignore")
    def __init__(self, source, budgets=BUDGETS, kinds=CALLS, spoilt=10):
        self.report = Report()
        spoilt = source.chance(spoilt)
        kind = source.pick(kinds)
        self.name = kind.__name__
        self.call = kind(Problem(source, SMALL if spoilt else budgets))
        self.chosen, self.others = draw_settings(source), draw_settings(source)
        twice = source.chance(25)
        if self.call.refused:
            self.refuse(self.call.refused, self.make)
        elif spoilt and self.call.problem.features:
            self.spoil(source)
        else:
            self.hold(twice)

    @property
    def idle(self):
        """Whether nothing could have been wrong."""
        return not (self.report.checked or self.report.refused or self.report.faults)

    def make(self):
        """Make the call; return its outputs."""
        p = self.call.problem
        memory.litter(p.size * p.dtype.itemsize, p.features * p.dtype.itemsize, p.features * 8)
        with settings(*self.chosen):
            return self.call.run()

    def hold(self, twice):
        """Hold a call against the truth, and on request against itself."""
        got = self.make()
        self.unchanged(*self.call.outs)
        before = bits(got)
        self.call.check(got, self.report)
        if twice:
            self.call.problem.restore()
            self.chosen = self.others
            after = bits(self.make())
            different = [name for name in before if before[name] != after[name]]
            self.report.exactly(f"outputs with other bits by {self.others}", different, [])

    def unchanged(self, *outs):
        for name in self.call.problem.changed(*outs):
            self.report.fault(f"{name} was changed")

    def spoil(self, source):
        """Spoil an argument: the call must be refused."""
        if isinstance(self.call, Layer):
            return self.spoil_layer(source)
        name, spoil = source.pick(refusals.ways_of(self.call))
        spoil(self.call, source)
        self.refuse(name, self.make)

    def refuse(self, name, make):
        self.name = "refused"
        refusals.refused(make, name, self.report)
        self.unchanged()

    def spoil_layer(self, source):
        layer = self.call.made()
        step = self.call.steps[0]
        layer.on_nonfinite = "skip"
        layer.train(step.mode == "train")(step.x)
        before, cache, grads = Seen.state(layer), layer.cache, dict(layer.grads)
        name, make = refusals.spoil_layer(layer, np.array(step.x, self.call.problem.dtype), source)
        self.refuse(name, make)
        after = Seen.state(layer)
        kept = {key: np.array(value).tobytes() for key, value in before.items()}
        now = {key: np.array(value).tobytes() for key, value in after.items()}
        self.report.exactly("state after a refusal", now, kept)
        self.report.exactly("cache after a refusal", layer.cache is cache, True)
        self.report.exactly("gradients after a refusal", layer.grads, grads)


@contextlib.contextmanager
def settings(threads, stream):
    """Use so many threads, and write outputs of so many bytes past the cache; None: as usual."""
    usual = functional._stream_from(0)
    functional._stream_from(usual if stream is None else stream)
    bn_cy.set_num_threads(threads)
    try:
        yield
    finally:
        functional._stream_from(usual)
        bn_cy.set_num_threads(None)


def draw_settings(source):
    return source.pick((1, 2, 3, 4, 5, 6, 7, 8)), source.pick((None, 0, HUGE))


def bits(outputs):
    """Return the bytes of all outputs by name."""
    return {
        name: np.ascontiguousarray(value).tobytes()
        for name, value in outputs.items()
        if isinstance(value, np.ndarray)
    }

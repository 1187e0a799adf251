"""The layer: a few steps in any mode, each held against its truth from the state before it."""

import numpy as np

import bn_cy
from fuzzing.calls import Call
from fuzzing.truth import HALF_ULP, SMALLEST, Expected, Truth, opened

wide = np.longdouble
MODES = ("train", "train", "eval", "freeze", "apart")  # apart: update=False


class Drawn:
    """The arrays of one step, and in 80 bits what may be written over."""

    def __init__(self, problem, number, modes):
        p = problem
        self.mode = p.source.pick(modes)
        self.x = p.batch(f"x{number}")
        p.alike |= self.mode in ("eval", "freeze")
        self.residual = p.residual(f"residual{number}")
        self.dout = p.dout(f"dout{number}")
        self.out = p.output(f"residual{number}", name=f"out{number}")
        self.dx_out = p.output(f"dout{number}", name=f"dx{number}")
        self.rows, self.upstream = p.rows(self.x), p.rows(self.dout)
        self.added = None if self.residual is None else p.rows(self.residual)


class Seen:
    """What a step returned, and the state before and after it."""

    def __init__(self, layer):
        self.before = self.state(layer)
        self.raised = None
        self.gradients = {}

    @staticmethod
    def state(layer):
        return layer.state_dict() | {"num_batches_tracked": layer.num_batches_tracked}


class Layer(Call):
    def draw(self):
        p, source = self.problem, self.problem.source
        tracks = p.count == 1 or not source.chance(10)
        self.options = {
            "eps": p.eps,
            "momentum": source.pick((0.1, None, 1.0, 0.0, 0.7)),
            "scale": not source.chance(15),
            "shift": not source.chance(15),
            "track_running_stats": tracks,
            "unbiased": not source.chance(30),
            "axis": p.axis,
            "dtype": source.pick((p.dtype, p.dtype, np.dtype("f4"), np.dtype("f8"))),
            "relu": source.chance(30),
            "on_nonfinite": source.pick(("raise", "skip", "update")),
        }
        rng = p.generator
        self.state = {
            "gamma": rng.uniform(-2, 2, p.features),
            "beta": rng.standard_normal(p.features),
            "running_mean": rng.standard_normal(p.features),
            "running_var": rng.uniform(0, 2, p.features),
        }
        modes = MODES if p.count != 1 else ("eval", "freeze")
        if not tracks:
            modes = ("train", "eval", "apart")
        self.steps = [Drawn(p, i, modes) for i in range(source.integer(1, 3))]
        self.outs = tuple(out for step in self.steps for out in (step.out, step.dx_out))

    @property
    def refused(self):
        return None if self.problem.features else "num_features"

    def made(self):
        layer = bn_cy.BatchNorm(self.problem.features, **self.options)
        for name, value in self.state.items():
            if getattr(layer, name) is not None:
                setattr(layer, name, value)
        return layer

    def run(self):
        layer, got = self.made(), {}
        self.seen = []
        for i, step in enumerate(self.steps):
            seen = self.step(layer, step)
            self.seen.append(seen)
            arrays = {**seen.gradients, **seen.after}
            got |= {f"{i}.{name}": value for name, value in arrays.items()}
        return got

    def step(self, layer, step):
        layer.unfreeze().train(step.mode != "eval")
        if step.mode == "freeze":
            layer.freeze()
        seen = Seen(layer)
        try:
            y = layer(step.x, out=step.out, residual=step.residual, update=step.mode != "apart")
        except FloatingPointError as error:
            seen.raised = error
        else:
            dx = layer.backward(step.dout, out=step.dx_out)
            dx, dresidual = dx if isinstance(dx, tuple) else (dx, None)
            seen.gradients = {
                "y": y,
                "dx": dx,
                "dresidual": dresidual,
                "dgamma": layer.dgamma,
                "dbeta": layer.dbeta,
            }
        seen.after = Seen.state(layer)
        return seen

    def check(self, got, report):
        for step, seen in zip(self.steps, self.seen, strict=True):
            self.check_step(step, seen, report)

    def check_step(self, step, seen, report):
        p = self.problem
        if not p.size:
            report.exactly("an empty batch was counted", self.moved(seen), [])
            return self.check_empty(seen.gradients, report)
        tracks = self.options["track_running_stats"]
        measured = not tracks or step.mode in ("train", "apart")
        self.rows, self.relu = step.rows, self.options["relu"]
        self.gamma, self.beta = (seen.before.get(name) for name in ("weight", "bias"))
        given = None if measured else (seen.before["running_mean"], seen.before["running_var"])
        truth = Truth(step.rows, p.eps, p.dtype, given)
        self.check_state(step, seen, truth, report)
        if seen.raised is None:
            self.check_gradients(step, seen.gradients, truth, report)

    def moved(self, seen):
        """Name what a step has changed of the state."""
        return [name for name, value in seen.after.items() if not same(value, seen.before[name])]

    def check_state(self, step, seen, truth, report):
        counted = self.options["track_running_stats"] and step.mode == "train"
        bad = not np.all(np.isfinite(truth.var.astype(float)))
        policy = self.options["on_nonfinite"]
        report.exactly("raised", seen.raised is not None, counted and bad and policy == "raise")
        if not counted or (bad and policy != "update"):
            report.exactly("state that changed", self.moved(seen), [])
            return
        tracked = seen.before["num_batches_tracked"] + 1
        report.exactly("num_batches_tracked", seen.after["num_batches_tracked"], tracked)
        momentum = self.options["momentum"]
        weight = wide(1) / tracked if momentum is None else wide(momentum)
        factor = wide(truth.count) / (truth.count - 1) if self.options["unbiased"] else 1
        moments = truth.expected_mean(), truth.expected_var()
        for name, one, by in zip(
            ("running_mean", "running_var"), moments, (1, factor), strict=True
        ):
            expected = averaged(wide(seen.before[name]), one, by, weight)
            self.check_array(name, seen.after[name], expected, report, float)

    def check_gradients(self, step, got, truth, report):
        self.check_y(got["y"], truth, report, step.added)
        for name, out in (("y", step.out), ("dx", step.dx_out)):
            if out is not None:
                report.exactly(f"{name} is out", got[name] is out, True)
        dout = opened(step.upstream, self.problem.rows(got["y"]), self.relu)
        dtype = self.options["dtype"]
        for name, one in zip(("dbeta", "dgamma"), truth.expected_sums(dout), strict=True):
            absent = self.beta is None if name == "dbeta" else self.gamma is None
            report.exactly(f"{name} is absent", got[name] is None, absent)
            if not absent:
                self.check_array(
                    name, got[name], cast(one, self.problem.dtype, dtype), report, dtype
                )
        self.check_array("dx", got["dx"], truth.expected_dx(dout, self.scale), report)
        if step.residual is not None:
            self.check_residual(got["dresidual"], dout, report)


def same(one, other):
    return np.array_equal(one, other, equal_nan=True)


def averaged(before, batch, factor, weight):
    """(1 - weight)*before + weight*factor*batch; a weight of 0 or 1 forgets the other one."""
    if weight == 0:
        return Expected(before, np.zeros_like(before))
    new = factor * batch.value
    if weight == 1:
        return Expected(new, factor * batch.bound + HALF_ULP * np.abs(new), slack=batch.slack)
    value = (1 - weight) * before + weight * new
    bound = weight * factor * batch.bound + 4 * HALF_ULP * (np.abs(before) + np.abs(new))
    return Expected(value, bound, slack=batch.slack + SMALLEST, infinities=False)


def cast(expected, dtype, to):
    """A gradient in x's dtype, in that of the layer."""
    rounded = expected.value.astype(dtype)
    expected.value = np.where(np.isfinite(rounded), expected.value, rounded)
    limits = np.finfo(to)
    expected.bound = expected.bound + limits.eps * np.abs(expected.value)
    expected.slack = expected.slack + limits.smallest_subnormal
    expected.contract = max(expected.contract, 2 * float(limits.eps))
    return expected

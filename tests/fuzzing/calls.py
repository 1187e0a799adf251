"""The public functions and the layer: what a call is made with, and what it must return."""

import numpy as np

import bn_cy
from fuzzing.truth import Truth, opened

wide = np.longdouble


class Call:
    """A call: drawn by `__init__`, made by `run`, whose outputs by name go to `check`."""

    def __init__(self, problem):
        self.problem = problem
        self.outs = ()  # the arrays that are given to be written
        self.draw()

    def draw(self):
        """Draw the arguments, and keep in 80 bits what may be written over."""
        raise NotImplementedError

    def run(self):
        """Make the call; return its outputs by name."""
        raise NotImplementedError

    def check(self, got, report):
        """Hold the outputs against the truth."""
        raise NotImplementedError

    @property
    def refused(self):
        """The argument by which the call must be refused as it was drawn, or None."""
        return None

    def draw_batch(self, affine=True):
        p = self.problem
        self.x = p.batch()
        self.rows = p.rows(self.x)
        self.relu = p.source.chance(30)
        if affine:
            self.gamma, self.beta = p.parameter("gamma"), p.parameter("beta")

    def draw_statistics(self):
        """Given ones: those of the batch, others, or none to speak of."""
        p = self.problem
        rng = p.generator
        mean, var = rng.standard_normal(p.features), rng.uniform(0, 4, p.features)
        kind = p.source.pick(("batch", "batch", "other", "other", "zeros", "nan"))
        if kind == "batch" and p.size:
            half = np.asarray(self.rows[:, : 1 + p.count // 2], float)
            mean, var = half.mean(axis=1), half.var(axis=1)
            mean[~np.isfinite(mean)], var[~np.isfinite(var)] = 0, 1
        if kind == "zeros":
            var[rng.random(p.features) < 0.5] = 0
        if kind == "nan":
            p.source.pick((mean, var))[rng.random(p.features) < 0.2] = np.nan
        self.mean, self.var = p.per_feature("mean", mean), p.per_feature("var", var)
        # Of another dtype they may be others, too: a variance that became 0 as an integer.
        given = np.asarray(self.var, float)
        p.alike |= kind != "batch" or not np.allclose(given, var, rtol=0.5, atol=0)

    def parameter(self, value, absent):
        """A gamma or a beta as the kernels round it, in 80 bits, a row for each feature."""
        p = self.problem
        value = np.full(p.features, absent) if value is None else np.asarray(value)
        return value.astype(p.dtype).astype(wide)[:, None]

    @property
    def scale(self):
        return self.parameter(self.gamma, 1)

    @property
    def shift(self):
        return self.parameter(self.beta, 0)

    def truth(self, frozen=False):
        p = self.problem
        given = None
        if frozen:
            given = [np.asarray(a).astype(float) for a in (self.mean, self.var)]
        return Truth(self.rows, p.eps, p.dtype, given)

    def check_array(self, name, got, expected, report, dtype=None):
        """One that has x's shape, or a value per feature."""
        p = self.problem
        dtype = np.dtype(dtype or p.dtype)
        shape = p.shape if np.ndim(expected.value) == 2 else (p.features,)
        report.exactly(f"{name}.dtype", got.dtype, dtype)
        report.exactly(f"{name}.shape", got.shape, shape)
        report.written(name, got)
        got = p.rows(got) if shape == p.shape and np.ndim(expected.value) == 2 else got
        report.close(name, np.asarray(got, wide), expected, dtype)

    def check_statistics(self, got, truth, report):
        self.check_array("mean", got["mean"], truth.expected_mean(), report, float)
        self.check_array("var", got["var"], truth.expected_var(), report, float)
        report.exactly("negative variances", int((got["var"] < 0).sum()), 0)

    def check_y(self, got, truth, report, residual=None):
        expected = truth.expected_y(self.scale, self.shift, residual, self.relu)
        self.check_array("y", got, expected, report)

    def check_parameters(self, got, truth, dout, report, dtype=None):
        """dgamma and dbeta, or the two sums."""
        expected = truth.expected_sums(dout)
        for name, one in zip(("dbeta", "dgamma"), expected, strict=True):
            if got[name] is not None:
                self.check_array(name, got[name], one, report, dtype)

    def check_residual(self, got, dout, report):
        """dresidual is made of dout's own bits."""
        same = np.array_equal(self.problem.rows(got), dout, equal_nan=True)
        report.exactly("dresidual is dout where y > 0", same, True)

    def check_empty(self, got, report):
        """Of a batch without values: what is a value per feature is 0."""
        for name, array in got.items():
            if isinstance(array, np.ndarray) and array.size:
                report.exactly(name, bool(array.any()), False)


class Moments(Call):
    def draw(self):
        self.draw_batch(affine=False)

    def run(self):
        return bn_cy.moments(self.x, axis=self.problem.axis)._asdict()

    def check(self, got, report):
        report.exactly("count", got["count"], self.problem.count)
        if not self.problem.size:
            return self.check_empty(got, report)
        self.check_statistics(got, self.truth(), report)


class Normalize(Call):
    def draw(self):
        p = self.problem
        self.draw_batch()
        self.draw_statistics()
        self.residual = p.residual()
        self.added = None if self.residual is None else p.rows(self.residual)
        self.out = p.output("x", "residual")
        self.outs = (self.out,)

    def arguments(self):
        p = self.problem
        return (self.x, self.mean, self.var, self.gamma, self.beta, p.eps), {
            "axis": p.axis,
            "out": self.out,
            "relu": self.relu,
            "residual": self.residual,
        }

    def run(self):
        arguments, more = self.arguments()
        return {"y": bn_cy.normalize(*arguments, **more)}

    def check(self, got, report):
        if self.out is not None:
            report.exactly("y is out", got["y"] is self.out, True)
        self.check_y(got["y"], self.truth(frozen=True), report, self.added)


class Step(Normalize):
    """A forward and its backward."""

    frozen = False

    def draw(self):
        p = self.problem
        self.draw_batch()
        if self.frozen:
            self.draw_statistics()
        self.residual = p.residual()
        self.added = None if self.residual is None else p.rows(self.residual)
        self.out = p.output("residual")
        self.dout = p.dout()
        self.upstream = p.rows(self.dout)
        self.dx_out = p.output("dout", name="dx")
        self.outs = (self.out, self.dx_out)

    @property
    def refused(self):
        p = self.problem
        return "x" if p.size and p.count == 1 and not self.frozen else None  # no variance

    def forward(self):
        if self.frozen:
            arguments, more = self.arguments()
            return bn_cy.frozen_forward(*arguments, **more)
        p = self.problem
        return bn_cy.batchnorm_forward(
            self.x,
            self.gamma,
            self.beta,
            p.eps,
            axis=p.axis,
            out=self.out,
            relu=self.relu,
            residual=self.residual,
        )

    def run(self):
        y, cache = self.forward()
        dx, dgamma, dbeta, *rest = bn_cy.batchnorm_backward(self.dout, cache, out=self.dx_out)
        got = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        got |= {"mean": cache.mean, "var": cache.var, "count": cache.count}
        return got | ({"dresidual": rest[0]} if rest else {})

    def check(self, got, report):
        report.exactly("dgamma is absent", got["dgamma"] is None, self.gamma is None)
        report.exactly("dbeta is absent", got["dbeta"] is None, self.beta is None)
        report.exactly("dresidual is there", "dresidual" in got, self.residual is not None)
        for name, out in (("y", self.out), ("dx", self.dx_out)):
            if out is not None:
                report.exactly(f"{name} is out", got[name] is out, True)
        if not self.problem.size:
            return self.check_empty({**got, "mean": None, "var": None}, report)
        truth = self.truth(self.frozen)
        report.exactly("count", got["count"], truth.count)
        self.check_statistics(got, truth, report)
        self.check_y(got["y"], truth, report, self.added)
        dout = opened(self.upstream, self.problem.rows(got["y"]), self.relu)
        self.check_parameters(got, truth, dout, report)
        self.check_array("dx", got["dx"], truth.expected_dx(dout, self.scale), report)
        if self.residual is not None:
            self.check_residual(got["dresidual"], dout, report)


class FrozenStep(Step):
    frozen = True


class Pieces(Call):
    """gradient_sums, then input_gradient, with given statistics."""

    def draw(self):
        p = self.problem
        self.draw_batch()
        self.draw_statistics()
        self.dout = p.dout()
        self.upstream = p.rows(self.dout)
        self.sums = p.source.pick(("own", "other"))
        rng = p.generator
        self.others = [
            p.per_feature(f"sum{i}", p.count * rng.standard_normal(p.features)) for i in range(2)
        ]
        self.count = p.source.pick((p.count or 1, 2 * p.count + 1, 1e6, np.inf))
        self.out = p.output("dout")
        self.outs = (self.out,)

    def run(self):
        p = self.problem
        statistics, relu = (self.x, self.mean, self.var), {"axis": p.axis, "relu": self.relu}
        y = bn_cy.normalize(*statistics, self.gamma, self.beta, p.eps, **relu)
        dbeta, dgamma = bn_cy.gradient_sums(
            self.dout, *statistics, p.eps, gamma=self.gamma, beta=self.beta, **relu
        )
        sums = (dbeta, dgamma) if self.sums == "own" else self.others
        dx = bn_cy.input_gradient(
            self.dout,
            *statistics,
            self.gamma,
            p.eps,
            *sums,
            self.count,
            out=self.out,
            beta=self.beta,
            **relu,
        )
        return {"y": y, "dbeta": dbeta, "dgamma": dgamma, "dx": dx}

    def check(self, got, report):
        if self.out is not None:
            report.exactly("dx is out", got["dx"] is self.out, True)
        if not self.problem.size:
            return self.check_empty(got, report)
        truth = self.truth(frozen=True)
        self.check_y(got["y"], truth, report)
        dout = opened(self.upstream, self.problem.rows(got["y"]), self.relu)
        self.check_parameters(got, truth, dout, report, float)
        sums = (got["dbeta"], got["dgamma"]) if self.sums == "own" else self.others
        sums = [np.asarray(array).astype(float) for array in sums]
        expected = truth.expected_dx(dout, self.scale, sums, self.count)
        self.check_array("dx", got["dx"], expected, report)

"""The fuzzer of `fuzzing`: short runs of it, by hypothesis too, and the faults that it must see."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzzing import memory
from fuzzing.calls import FrozenStep, Moments, Normalize, Pieces, Step
from fuzzing.layer import Layer
from fuzzing.source import Seeded, Source
from fuzzing.trial import Trial
from hypothesis import given, settings
from hypothesis import strategies as st

import bn_cy

COMMAND = Path(fuzz.__file__)
CALLS = 300
FEW = {80: 60, 100: 600}  # values of a call, beside how often
SEEN = 0.7  # of the calls with a fault that can fail report it, at the least: about 0.95 do


class Decisions(Source):
    """Decisions of hypothesis, which finds the simplest ones that fail."""

    def __init__(self, data):
        self._data = data

    def integer(self, low, high):
        return self._data.draw(st.integers(low, high))


@given(st.data())
@settings(max_examples=100)
def test_calls_that_hypothesis_draws(data):
    trial = Trial(Decisions(data), FEW)
    assert not trial.report.faults


def test_calls_of_a_seed(request):
    seed = request.config.option.seed
    tally = fuzz.make_calls(seed, range(CALLS))
    fuzz.show(seed, tally)
    assert fuzz.is_good(tally, CALLS)


# Faults that are planted: each must be reported


class Planted:
    """A function of bn_cy whose results are spoilt by `fault`, which tells whether it did."""

    def __init__(self, monkeypatch, name, fault):
        self.function, self.fault, self.count = getattr(bn_cy, name), fault, 0
        monkeypatch.setattr(bn_cy, name, self)

    def __call__(self, *arguments, **more):
        results = self.function(*arguments, **more)
        self.count += bool(self.fault(results, *arguments))
        return results


def share_reported(rng, text, kind, planted, spoilt=0, wanted=40):
    """Return how many of the calls with a fault, and that can fail, report it by a text."""
    seed = int(rng.integers(2**32))
    seen = []
    for call in range(50 * wanted):
        before = planted.count
        trial = Trial(Seeded(seed, call), FEW, [kind], spoilt)
        if planted.count > before and not trial.idle:
            seen.append(any(text in fault for fault in trial.report.faults))
        if len(seen) == wanted:
            return np.mean(seen)
    raise AssertionError(f"only {len(seen)} calls had the fault")


def largest(array):
    """Return the place of the largest finite value, or None where there is none but 0."""
    sizes = np.where(np.isfinite(array), np.abs(array), 0)
    at = np.unravel_index(np.argmax(sizes), array.shape) if array.size else None
    return at if array.size and sizes[at] > 0 else None


def off_by_little(array):
    at = largest(array)
    if at is not None:
        array[at] *= array.dtype.type(1.001)
    return at is not None


def never_written(array):
    if array.size:
        array[(-1,) * array.ndim] = memory.poisoned((), array.dtype)
    return array.size


def not_a_number(array):
    at = largest(array)
    if at is not None:
        array[at] = np.nan
    return at is not None


RESULTS = [
    (Step, "batchnorm_forward", 0, "y: "),
    (Step, "batchnorm_backward", 0, "dx: "),
    (FrozenStep, "frozen_forward", 0, "y: "),
    (FrozenStep, "batchnorm_backward", 0, "dx: "),
    (Normalize, "normalize", None, "y: "),
    (Moments, "moments", 1, "mean: "),
    (Moments, "moments", 2, "var: "),
    (Pieces, "gradient_sums", 0, "dbeta: "),
    (Pieces, "gradient_sums", 1, "dgamma: "),
    (Pieces, "input_gradient", None, "dx: "),
]


@pytest.mark.parametrize("spoil", [off_by_little, never_written, not_a_number])
@pytest.mark.parametrize(("kind", "name", "result", "text"), RESULTS)
def test_one_wrong_value_is_seen(rng, monkeypatch, kind, name, result, text, spoil):
    def fault(results, *arguments):
        return spoil(results if result is None else results[result])

    planted = Planted(monkeypatch, name, fault)
    assert share_reported(rng, text, kind, planted) >= SEEN


@pytest.mark.parametrize(("result", "text"), [(1, "dgamma: "), (2, "dbeta: "), (3, "dresidual ")])
def test_a_wrong_gradient_is_seen(rng, monkeypatch, result, text):
    def fault(results, *arguments):
        there = len(results) > result and results[result] is not None
        return there and off_by_little(results[result])

    planted = Planted(monkeypatch, "batchnorm_backward", fault)
    assert share_reported(rng, text, Step, planted) >= SEEN


def test_an_input_that_is_changed_is_seen(rng, monkeypatch):
    def fault(results, x, *others):
        changed = isinstance(x, np.ndarray) and x.size and x.flags.writeable
        if changed:
            x[(0,) * x.ndim] = 12345
        return changed

    planted = Planted(monkeypatch, "moments", fault)
    assert share_reported(rng, "x was changed", Moments, planted) == 1


def test_a_write_beside_the_output_is_seen(rng):
    for layout in (memory.plain(2), memory.plain(2)._replace(steps=(1, 2))):
        held = memory.Held(rng.standard_normal((3, 4)), layout)
        held.array[...] = 5
        assert held.is_unchanged(held.array)
        for place in (0, memory.MARGIN - 1, len(held.raw) - 1):
            held.raw[place] ^= 1
            assert not held.is_unchanged(held.array)
            held.raw[place] ^= 1


def test_bits_that_differ_the_second_time_are_seen(rng, monkeypatch):
    def fault(results, *arguments):
        at = largest(results[0])
        if at is not None and planted.count % 2:
            results[0][at] = np.nextafter(results[0][at], results[0].dtype.type(0))
        return at is not None

    planted = Planted(monkeypatch, "batchnorm_forward", fault)
    share = share_reported(rng, "with other bits", Step, planted, wanted=100)
    assert share > 0.1  # a quarter of all calls is made twice


class Lenient:
    """A function that does not refuse what it should, or does it wrongly."""

    def __init__(self, monkeypatch, name, way):
        self.function, self.way, self.count = getattr(bn_cy, name), way, 0
        monkeypatch.setattr(bn_cy, name, self)

    def __call__(self, *arguments, out=None, **more):
        try:
            return self.function(*arguments, out=out, **more)
        except (TypeError, ValueError) as error:
            self.count += 1
            return self.way(out, error)


def accept(out, error):
    return None


def name_nothing(out, error):
    raise ValueError("this is wrong")


@pytest.mark.parametrize(
    ("way", "text"), [(accept, "was not refused"), (name_nothing, "is named in")]
)
def test_what_is_not_refused_by_name_is_seen(rng, monkeypatch, way, text):
    planted = Lenient(monkeypatch, "normalize", way)
    assert share_reported(rng, text, Normalize, planted, spoilt=100) == 1


def test_a_refusal_that_changes_the_output_is_seen(rng, monkeypatch):
    def write_and_refuse(out, error):
        if isinstance(out, np.ndarray) and out.size and out.flags.writeable:
            out[...] = 3
        else:
            planted.count -= 1
        raise error

    planted = Lenient(monkeypatch, "normalize", write_and_refuse)
    assert share_reported(rng, "was changed", Normalize, planted, spoilt=100) == 1


def test_a_wrong_state_of_the_layer_is_seen(rng, monkeypatch):
    def moved(layer):
        if layer.running_mean is not None:
            layer.running_mean *= 1.0001
        return layer.running_mean is not None

    def counted(layer):
        layer.num_batches_tracked += 1
        return True

    for fault, text in ((moved, "running_mean"), (counted, "num_batches_tracked")):
        planted = wrong_layer(monkeypatch, fault)
        assert share_reported(rng, text, Layer, planted) >= SEEN


def wrong_layer(monkeypatch, fault):
    """Plant a layer that does something more in each forward."""

    class Wrong(bn_cy.BatchNorm):
        count = 0

        def __call__(self, *arguments, **more):
            y = super().forward(*arguments, **more)
            Wrong.count += fault(self)
            return y

    monkeypatch.setattr(bn_cy, "BatchNorm", Wrong)
    return Wrong


# The command


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


def test_the_command(request):
    done = run("--calls", 60, "--seed", request.config.option.seed, "--jobs", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^60 calls of seed \d+ in .*: \d+ could not have failed, 0 failed$", done.stdout, re.M
    )


def test_a_fault_is_printed_with_the_command_that_repeats_it(rng, monkeypatch, capsys):
    Planted(monkeypatch, "moments", lambda results, *_: never_written(results.mean))
    seed = int(rng.integers(2**32))
    tally = fuzz.make_calls(seed, range(80))
    # Of an empty batch, which has no mean, the fault is another one.
    call = next(call for call, _, texts in tally.faults if "never written" in str(texts))
    assert fuzz.main(["--seed", str(seed), "--only", str(call)]) == 1
    printed = capsys.readouterr().out
    assert f"python tests/fuzz.py --seed {seed} --only {call}\n" in printed
    assert "mean: 1 of" in printed


def test_an_exception_that_nobody_can_catch_is_a_fault(monkeypatch):
    class Broken:
        def __del__(self):
            raise IndexError("out of bounds")

    Planted(monkeypatch, "moments", lambda *_: Broken() is None)
    tally = fuzz.make_calls(1, range(40))
    assert tally.failed
    assert all("out of bounds" in texts[0] for _, _, texts in tally.faults)


def test_a_call_that_ends_the_process_is_a_fault(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, bn_cy\nbn_cy.moments = lambda *_, **__: os.abort()\n"
    )
    done = run("--calls", 30, "--jobs", 2, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert re.search(r"call \d+ \(died\): python tests/fuzz.py --seed \d+ --only \d+", done.stdout)


def test_too_many_calls_that_cannot_fail_are_a_failure(capsys):
    tally = fuzz.Tally()
    tally.names["Step"], tally.idle = 1000, 101
    assert not fuzz.is_good(tally, 1000)
    tally.idle = 99
    assert fuzz.is_good(tally, 1000)

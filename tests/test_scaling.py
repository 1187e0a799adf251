"""benchmarks/scaling.py: its model, its fit and its words. Nothing here is timed."""

import itertools
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are in the repository only", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import scaling  # noqa: E402

FEATURES = (64, 256, 1024, 4096, 16384)


def records(latency, bandwidth, noise=lambda: 1.0):
    """Return what would be measured if the model were true."""
    return [
        {
            "ranks": ranks,
            "features": features,
            "step": 3e-3,
            "alone": 1e-3,
            "mpi": 6e-4,
            "exchange": noise() * scaling.exchange(ranks, features, latency, bandwidth)
            if ranks > 1
            else 1e-6,
        }
        for ranks, features in itertools.product(scaling.RANKS, FEATURES)
    ]


def test_two_ranks_swap_halves():
    # To one other rank goes half of 2C numbers, and a count; there and back, forward and backward.
    seconds = scaling.exchange(2, 100, latency=1.0, bandwidth=8.0)
    assert seconds == pytest.approx(2 * (1 + 101 + 1 + 100))


def test_latency_grows_with_the_logarithm_and_traffic_does_not_grow():
    for ranks in (2, 64, 1024):
        assert scaling.exchange(ranks, 10**6, 1.0, math.inf) == 4 * math.log2(ranks)
    assert scaling.exchange(1000, 10**6, 0, 8.0) < 2 * scaling.exchange(2, 10**6, 0, 8.0)
    assert scaling.gathered(1000, 10**6, 0, 8.0) > 900 * scaling.gathered(2, 10**6, 0, 8.0)


def test_more_ranks_than_features_still_have_one_each():
    assert scaling.exchange(10_000, 1, 1.0, 1e9) == scaling.exchange(10_000, 9_999, 1.0, 1e9)


def test_the_fit_finds_latency_and_bandwidth(rng):
    found = scaling.fit(records(3e-6, 5e9))
    assert found == pytest.approx((3e-6, 5e9))
    found = scaling.fit(records(3e-6, 5e9, noise=lambda: rng.uniform(0.95, 1.05)))
    assert found == pytest.approx((3e-6, 5e9), rel=0.1)


def test_more_than_two_ranks_are_not_fitted():
    measured = records(3e-6, 5e9)
    for record in measured:
        record["exchange"] *= 100 if record["ranks"] > 2 else 1
    assert scaling.fit(measured) == pytest.approx((3e-6, 5e9))


def test_noise_is_not_passed_for_a_bandwidth():
    measured = records(3e-6, 5e9)
    for record in measured:
        record["exchange"] = 1 / record["features"]
    assert scaling.fit(measured) is None
    assert scaling.describe_fit(None).startswith("Not fitted")


@pytest.mark.parametrize("fitted", [True, False])
def test_tables_and_picture(tmp_path, fitted):
    pytest.importorskip("matplotlib")
    measured = records(3e-6, 5e9)
    threads = [
        {"case": case.name, "threads": n, "seconds": 4e-3 / n, "limit": 3e-3 / n**0.5}
        for case, n in itertools.product(scaling.THREAD_CASES, (1, 2))
    ]
    results = {
        "machine": {"processor": "of a test", "cpus": 2},
        "ranks": measured,
        "fit": scaling.fit(measured) if fitted else None,
        "threads": threads,
    }
    text = scaling.tables(results)
    assert ("Fitted: 3 us a message, 5 GB/s." in text) == fitted
    assert "| 64 | 1 | 1e+03 | 3e+03 | 20% | 1 |" in text
    assert "| rows-4096x256 | 2 | 2000 | 2.00 | 1.41 |" in text
    scaling.plot(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

"""`python -m bn_cy`: its report, and that each of its checks finds what it is for."""

import os
import time

import pytest

import bn_cy
from bn_cy import __main__ as self_test
from bn_cy import _digests

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads to OpenMP after the test."""
    yield
    bn_cy.set_num_threads(None)


def test_the_report_of_a_sound_build(python):
    result = python("-m", "bn_cy")
    assert result.returncode == 0, result.stdout + result.stderr
    *_, gradients, digests, fork, blank, last = result.stdout.splitlines()
    assert [line.split()[0] for line in (gradients, digests, fork)] == list(self_test.CHECKS)
    assert blank == ""
    config = bn_cy.show_config(mode="dicts")
    facts = ("version", "numpy", "python", "platform", "compiler", "variant")
    assert all(config[name] in last for name in facts)
    assert last.endswith(f"{config['threads']} threads | self-test passed")
    for name in config["built"]:
        assert (f"{name} not run" in digests) == (name != config["variant"])


def test_an_unknown_argument_is_refused(python):
    result = python("-m", "bn_cy", "--quick")
    assert result.returncode == 2
    assert "--quick" in result.stderr


@pytest.mark.parametrize("position", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
def test_a_gradient_that_is_wrong_is_found(monkeypatch, position):
    right = bn_cy.batchnorm_backward

    def wrong(dout, cache):
        gradients = list(right(dout, cache))
        gradients[position] = gradients[position] * 1.0001
        return gradients

    monkeypatch.setattr(bn_cy, "batchnorm_backward", wrong)
    with pytest.raises(self_test.Failure, match="finite differences, seed"):
        self_test.check_gradients()


def test_another_digest_is_found(monkeypatch):
    *lines, last = _digests.committed()
    name = last.partition("\t")[0]
    monkeypatch.setattr(_digests, "committed", lambda: [*lines, last[:-1] + "x"])
    with pytest.raises(self_test.Failure, match=f"1 threads in {name}$"):
        self_test.check_digests()


@needs_fork
def test_a_child_that_computes_something_else_is_found(monkeypatch):
    monkeypatch.setattr(_digests, "digest", lambda *arrays: os.getpid())
    with pytest.raises(self_test.Failure, match="child"):
        self_test.check_fork()


@needs_fork
def test_a_child_that_hangs_is_found(monkeypatch):
    parent, digest = os.getpid(), _digests.digest
    monkeypatch.setattr(self_test, "PATIENCE", 0.2)

    def hanging(*arrays):
        if os.getpid() != parent:
            time.sleep(60)
        return digest(*arrays)

    monkeypatch.setattr(_digests, "digest", hanging)
    with pytest.raises(self_test.Failure, match="hangs"):
        self_test.check_fork()


def test_a_failure_ends_in_status_1_and_is_in_the_last_line(monkeypatch, capsys):
    def broken():
        raise RuntimeError("planted")

    monkeypatch.setattr("sys.argv", ["bn_cy"])
    monkeypatch.setattr(self_test, "CHECKS", {"sound": lambda: "fine", "broken": broken})
    assert self_test.main() == 1
    *_, sound, found, _, last = capsys.readouterr().out.splitlines()
    assert sound.split() == ["sound", "fine"]
    assert found.split() == ["broken", "FAILED:", "RuntimeError:", "planted"]
    assert last.endswith("self-test FAILED: broken")


def test_the_generator_does_not_depend_on_numpy():
    """The first numbers of splitmix64 with the seed 0, as its author's C gives them."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    counter = _digests.Integers(0)
    counter.count = 1  # the C adds before it hashes
    assert counter.bits(3).tolist() == expected

"""Calls of every public function, drawn at random, against 80-bit arithmetic.

    source.py    random decisions: seeded, or hypothesis's
    values.py    what arrays hold: ordinary numbers, and all those on which formulas go wrong
    memory.py    how arrays lie in memory, and what may have been written there
    problem.py   shapes at the boundaries of the kernels, and the arrays of a call
    truth.py     what a call must return, and how far off each value may be
    compare.py   outputs held against the truth
    calls.py     the public functions and the layer, each with its arguments
    refusals.py  the same with one argument spoilt
    trial.py     one call from decisions to verdict

A room uses only those above it. `tests/fuzz.py` is the command, `tests/test_fuzz.py` the tests.
"""

"""The mutants of `tools/schemata.py`: behind its switch each is the fault that it says it is."""

from pathlib import Path

import pytest
from tools import schemata

SOURCE = """\
LIMIT = 4


def clipped_sum(values, least=0, most=3.5):
    total, k = 0, -1
    for i in range(1, len(values), 1):
        if values[i] is None or not (
            least < values[i]  # a comment
        ):
            continue
        elif values[i] not in (8, 9) and i % 2 == 0:
            total += min(values[i], most)
    while k < len(values) // 3:
        k += 1
        if k == LIMIT:
            break
    return total * 2 - k if total else None
"""
VALUES = [[], [1], [2, None, 3, 5, 1, 1], [1, 8, 8, 8, -1, 2, 2.5, 9, 4, 9, 1, 0, 7, 7, 4, 3]]

CYTHON = """\
cdef enum:
    LINE = 16

cdef inline floating last(const floating *row, Py_ssize_t width) noexcept nogil:
    cdef double scratch[LINE * 2]
    cdef Py_ssize_t k = width - 1, j
    if floating is float:
        return <float>row[k]
    for j in range(k, -1, -1):
        scratch[j] = (<const double *>row)[j]
    return -row[k]
"""


class Endless(Exception):
    pass


def outcomes(source, chosen=0):
    """Return what a source computes with a mutant in force: values, or the kind of an error."""
    calls = 0

    def size(values):
        nonlocal calls
        calls += 1
        if calls > 1000:
            raise Endless
        return len(values)

    names = {"_mutant": lambda number: number == chosen, "len": size}
    try:
        exec(source, names)
    except Exception as error:
        return type(error)
    found = []
    for values in VALUES:
        calls = 0
        try:
            found.append(names["clipped_sum"](values))
        except Exception as error:
            found.append(type(error))
    return found


MUTANTS = schemata.mutants_of("source.py", SOURCE)
NUMBERED = list(enumerate(MUTANTS, 1))
REWRITTEN = schemata.rewrite(SOURCE, NUMBERED)


def test_without_a_mutant_nothing_changes():
    assert outcomes(REWRITTEN) == outcomes(SOURCE)


@pytest.mark.parametrize(("number", "mutant"), NUMBERED)
def test_a_mutant_is_the_edited_source(number, mutant):
    assert outcomes(REWRITTEN, number) == outcomes(
        schemata.edited(SOURCE, 0, len(SOURCE), mutant.edits)
    )


def test_most_mutants_of_the_sample_change_what_it_computes():
    changed = [number for number, _ in NUMBERED if outcomes(REWRITTEN, number) != outcomes(SOURCE)]
    assert len(changed) > 0.7 * len(MUTANTS) > 30


def test_what_the_compiler_resolves_is_left_alone():
    mutants = schemata.mutants_of("source.pxi", CYTHON)
    assert [mutant.after for mutant in mutants] == [
        "cdef Py_ssize_t k = width + 1, j",
        "cdef Py_ssize_t k = width - 2, j",
        "cdef Py_ssize_t k = width - 0, j",
        "for j in range(k, 1, -1):",
        "for j in range(k, -2, -1):",
        "for j in range(k, -0, -1):",
        "pass",
        "return row[k]",
    ]
    assert {mutant.function for mutant in mutants} == {"last"}


@pytest.mark.parametrize(
    "path",
    sorted(Path(__file__).parents[1].glob("bn_cy/**/*.p[yx][xi]")),
    ids=lambda path: path.name,
)
def test_a_mutant_has_a_name_of_its_own(path):
    """By which its reason is found."""
    names = [str(mutant) for mutant in schemata.mutants_of(path.name, path.read_text())]
    assert len(set(names)) == len(names)

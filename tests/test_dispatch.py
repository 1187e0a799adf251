"""The choice of the kernels' variant."""

import pytest

from bn_cy import _dispatch


def test_best_variant_is_taken_unless_another_is_forced():
    assert _dispatch.choose_variant("", ["v3", "v2"]) == "v3"
    assert _dispatch.choose_variant("v2", ["v3", "v2"]) == "v2"


@pytest.mark.parametrize("word", ["v5", "V3", "avx2"])
def test_unknown_words_are_errors(word):
    with pytest.raises(ImportError, match=f"BN_CY_ISA.*v3, v2.*{word}"):
        _dispatch.choose_variant(word, ["v3", "v2"])


def test_a_variant_that_does_not_run_here_is_an_error():
    with pytest.raises(ImportError, match="BN_CY_ISA"):
        _dispatch.choose_variant("v4", ["v3", "v2"])


@pytest.mark.parametrize(
    ("built", "levels", "expected"),
    [
        (["v2", "v3", "v4"], ["v3", "v2"], ["v3", "v2"]),
        (["v2"], ["v4", "v3", "v2"], ["v2"]),
        (["plain"], [], ["plain"]),
        (["plain"], ["v2"], ["plain"]),
    ],
)
def test_variants_that_were_built_and_run_here(built, levels, expected):
    assert _dispatch.supported_variants(built, levels) == expected


@pytest.mark.parametrize(
    ("built", "levels", "lacking"),
    [(["v2", "v3", "v4"], [], "SSE4.2"), (["v3", "v4"], ["v2"], "AVX2")],
)
def test_a_processor_that_runs_none_of_the_variants(built, levels, lacking):
    with pytest.raises(ImportError, match=f"built for x86-64-{', '.join(built)}.*lacks.*{lacking}"):
        _dispatch.supported_variants(built, levels)

"""What a test needs of the build that it runs on."""

import pytest

from bn_cy import show_config

optimized = pytest.mark.skipif(
    not {"-O0", "-O1"}.isdisjoint(show_config(mode="dicts")["flags"].split()),
    reason="a sanitizer's memory, and the stack of a special build, have sizes of their own",
)

"""What a test needs of the build that it runs on."""

import pytest

from bn_cy import show_config

optimized = pytest.mark.skipif(
    "-O1" in show_config(mode="dicts")["flags"],
    reason="a sanitizer's memory, and the stack of a special build, have sizes of their own",
)

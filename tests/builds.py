"""What a test needs of the build that it runs on."""

import pytest

from bn_cy import show_config

without_sanitizer = pytest.mark.skipif(
    "-fsanitize=" in show_config(mode="dicts")["flags"],
    reason="a sanitizer's allocator and its stack frames have sizes of their own",
)

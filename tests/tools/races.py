"""The committed digests with 1 to 7 threads: what the thread sanitizer watches.

    python tests/tools/races.py

in a build and an environment as `.ci/run` makes them. The sanitizer ends it with exit status 66
where two threads met at an address, of which one wrote, and neither waited for the other.
"""

import bn_cy
from bn_cy import _digests

assert "-fsanitize=thread" in bn_cy.show_config(mode="dicts")["flags"]
expected = _digests.committed()
for threads in (1, 2, 3, 7):
    assert list(_digests.lines_of(0, threads)) == expected, f"other bits with {threads} threads"
print(f"{len(expected)} lines of digests with 1 to 7 threads")

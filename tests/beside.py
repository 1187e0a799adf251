"""Programs that compute with bn_cy and with another library that has OpenMP threads, in turn."""


def imports(theirs, ours_first):
    """Return the imports, in one order or the other."""
    lines = ["import bn_cy", theirs]
    return "\n".join(
        ["import os, warnings", *(lines if ours_first else lines[::-1]), "import numpy as np", DATA]
    )


DATA = """
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork of a process with threads
x = np.random.default_rng({seed}).standard_normal((20000, 64))
layer = bn_cy.BatchNorm(64, dtype=np.float64)


def ours():
    return layer(x), layer.backward(x)
"""

# `theirs` computes from x with their threads. A child may use ours: it has a single thread.
IN_TURN = """
def same(results, expected):
    return all(np.array_equal(*pair) for pair in zip(results, expected, strict=True))


for count in (2, 1, 3):
    bn_cy.set_num_threads(count)
    expected, their_expected = ours(), theirs(x)
    for _ in range(5):
        assert same(ours(), expected)
        assert np.allclose(theirs(x), their_expected, rtol=1e-9)
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if same(ours(), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert same(ours(), expected)
    assert np.allclose(theirs(x), their_expected, rtol=1e-9)
print("done")
"""

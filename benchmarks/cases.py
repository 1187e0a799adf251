"""The cases of the benchmark, once, and the memory traffic that a case cannot avoid."""

import dataclasses
import math
from dataclasses import dataclass

# Where the features are, by layout; NHWC and NCHW data have four dimensions, the others two.
FEATURE_AXIS = {"rows": 1, "axis0": 0, "nchw": 1, "nhwc": 3}
GROUPS = {"mlp": ("rows",), "cnn": ("nchw", "nhwc"), "axis0": ("axis0",)}
CACHE_LINE = 64
ARRAYS = {"forward": 1, "backward": 2}  # that a verb reads
STREAMED = {"forward": ("read", "copy"), "backward": ("read two", "add")}  # see streaming.py
FOLLOWED = ("relu", "add+relu")  # what may follow the batch norm, by name
LARGE = 32_000_000  # bytes; arrays from here on are held against the streaming limit


@dataclass(frozen=True)
class Case:
    """One array shape, with its features along `axis`.

    layout: "rows" (examples, features), "axis0" (features, examples), "nchw" or "nhwc".
    after: what follows the batch norm, of FOLLOWED; none for the bare one.
    """

    layout: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    after: str = ""

    @property
    def name(self):
        suffix = "" if self.dtype == "float32" else f"-{self.dtype}"
        after = f"+{self.after}" if self.after else ""
        return f"{self.layout}-{'x'.join(map(str, self.shape))}{suffix}{after}"

    @property
    def bare(self):
        return dataclasses.replace(self, after="")

    @property
    def adds(self):
        """Whether a residual is added."""
        return self.after.startswith("add")

    @property
    def group(self):
        return next(group for group, layouts in GROUPS.items() if self.layout in layouts)

    @property
    def axis(self):
        return FEATURE_AXIS[self.layout]

    @property
    def features(self):
        return self.shape[self.axis]

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * (8 if self.dtype == "float64" else 4)


def parse_case(name):
    """Make a Case of a name such as ``rows-256x512`` or ``nchw-32x64x56x56+relu``."""
    bare, _, after = name.partition("+")
    layout, _, dims = bare.partition("-")
    dims, _, dtype = dims.partition("-")
    shape = tuple(int(d) if d.isdecimal() else 0 for d in dims.split("x"))
    known = layout in FEATURE_AXIS and dtype in ("", "float32", "float64")
    known = known and after in ("", *FOLLOWED)
    if not known or min(shape) < 1 or len(shape) != (4 if layout in GROUPS["cnn"] else 2):
        raise ValueError(
            f"unknown case {name!r}: expected few, all, {', '.join(GROUPS)}, or a layout "
            "(rows, axis0, nchw, nhwc) and a shape, such as rows-256x512 or nchw-32x64x56x56"
        )
    case = Case(layout, shape, dtype or "float32", after)
    if case.size == case.features:
        raise ValueError(f"case {name!r} has one value per feature, which training refuses")
    return case


MLP = [
    Case("rows", shape)
    for shape in [
        (32, 64),
        (64, 128),
        (128, 128),
        (2, 8192),
        (256, 512),
        (64, 4096),
        (3136, 256),
        (1024, 1024),
        (4096, 256),
        (65536, 64),
        (1_000_000, 8),
        (16384, 1024),
    ]
]

# The distinct inputs of ResNet-50's batch norm layers: (side of the image, channels).
RESNET50 = [
    (112, 64),
    (56, 64),
    (56, 128),
    (56, 256),
    (28, 128),
    (28, 256),
    (28, 512),
    (14, 256),
    (14, 512),
    (14, 1024),
    (7, 512),
    (7, 2048),
]
CNN = [Case("nchw", (32, channels, side, side)) for side, channels in RESNET50]
CNN += [Case("nhwc", (32, side, side, channels)) for side, channels in RESNET50]

AXIS0 = [Case("axis0", shape) for shape in [(100, 60), (64, 4096), (512, 256), (1024, 16384)]]

ALL = MLP + CNN + AXIS0

# One or two of each kind, in and past the cache: with all peers, about two minutes.
FEW = [
    Case("rows", (32, 64)),
    Case("rows", (256, 512)),
    Case("rows", (4096, 256)),
    Case("nchw", (32, 64, 56, 56)),
    Case("nchw", (32, 256, 14, 14)),
    Case("nhwc", (32, 28, 28, 128)),
    Case("axis0", (512, 256)),
]


def select(words):
    """Return the cases that a comma-separated list of groups and names stands for."""
    chosen = []
    for word in words.split(","):
        if word == "few":
            chosen += FEW
        elif word == "all" or word in GROUPS:
            chosen += [case for case in ALL if word in ("all", case.group)]
        else:
            chosen.append(parse_case(word))
    return list(dict.fromkeys(chosen))


def share_of_one_feature(case):
    """Return the bytes of the smallest block of features that can be read by itself.

    Where a feature's values are contiguous (NCHW, axis0) that is one feature. In rows of
    features memory comes in cache lines, so it is one line of features times all rows.
    """
    itemsize = case.nbytes // case.size
    examples = case.size // case.features
    if case.layout in ("rows", "nhwc"):
        return examples * min(CACHE_LINE, case.features * itemsize)
    return examples * itemsize


def compulsory_reads(case, verb, l2):
    """Return how many arrays of x's size `verb` must read from memory; it writes one more.

    Training needs a feature's sums before it can write the feature's first result, so x
    (for the backward pass x and dout) is passed over twice. The second pass costs no traffic
    where one feature's share of the data, the least that can be worked on at a time, still
    lies in the core's own cache, of which half is counted because code, output and the other
    core's traffic want room too. Otherwise everything is read twice, whoever writes the loops.
    A last-level cache that holds the arrays changes nothing in the number of reads: it changes
    their speed, and that of the streaming which they are held against.
    """
    arrays = ARRAYS[verb]
    return arrays if arrays * share_of_one_feature(case) <= l2 / 2 else 2 * arrays


def compulsory_bytes(case, verb, l2):
    """Return the bytes `verb` must move: its reads and the one array that it writes."""
    return (compulsory_reads(case, verb, l2) + 1) * case.nbytes


def limit_seconds(verb, reads, streaming):
    """Return the time the machine needs to stream `reads` arrays in and one out.

    What is streamed are as many arrays as `verb` has: the last pass over them is paired with
    the write, any before only reads.
    """
    read, write = STREAMED[verb]
    return (reads // ARRAYS[verb] - 1) * streaming[read] + streaming[write]

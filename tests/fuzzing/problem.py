"""The arrays of a call: shapes at the boundaries of the kernels, contents, places in memory."""

import numpy as np

from fuzzing import memory, values

# Sizes at which the kernels take another path (bn_cy/kernels/*.pxi), each with its neighbours:
# vectors, GROUP, LANES, FEW, NARROW, CELL_ROWS, MANY, SLIM, WIDTH, CHUNK, STRETCH, LONG.
EDGES = (2, 4, 8, 16, 32, 49, 64, 128, 256, 512, 1024, 2048, 8192, 16384, 24576)
# Values that a call may have, beside how often: threads, cells and merged rows begin at 24,000.
BUDGETS = {60: 600, 82: 3000, 93: 12_000, 99: 60_000, 100: 300_000}
# What shapes are of: few features of many values where threads are to share them.
KINDS = ("rows", "rows", "rows", "long", "images", "images", "runs")
MANY_VALUES = ("rows", "long", "long", "images", "few runs", "few runs")
LIMITS = {("long", "features"): 9, ("images", "inner"): 64, ("runs", "outer"): 40}
LIMITS |= {("few runs", "features"): 2, ("few runs", "outer"): 9}
SMALL = {60: 30, 100: 300}


def draw_size(source, most):
    """Draw a size up to `most`, at a boundary more often than not."""
    edges = [edge for edge in EDGES if edge <= most]
    if edges and source.chance(60):
        return min(most, max(1, source.pick(edges) + source.pick((0, 1, -1))))
    return int(2 ** (source.integer(0, int(64 * np.log2(most))) / 64)) if most > 1 else most


def draw_budget(source, budgets):
    roll = source.integer(1, 100)
    return next(size for percent, size in budgets.items() if roll <= percent)


def split(source, size):
    """Cut a size into one axis or two, whose product is about as large."""
    if size < 4 or not source.chance(40):
        return [size]
    first = source.integer(1, int(size**0.5))
    return [first, size // first]


def draw_shape(source, budgets):
    """Return a shape of two to five axes, and which of them is the features'."""
    budget = draw_budget(source, budgets)
    kind = source.pick(MANY_VALUES if budget > 100_000 else KINDS)
    parts = {}
    order = {
        "rows": ("features", "outer"),
        "long": ("features", "outer"),
        "images": ("inner", "features", "outer"),
        "runs": ("outer", "inner", "features"),
        "few runs": ("features", "outer", "inner"),
    }
    for part in order[kind]:
        most = max(1, min(budget, LIMITS.get((kind, part), budget)))
        whole = (kind, part) == ("few runs", "inner")
        parts[part] = most - source.integer(0, 20) if whole else draw_size(source, most)
        budget //= parts[part]
    if source.chance(2):
        parts[source.pick(list(parts))] = 0
    outer = split(source, parts["outer"])
    if kind.endswith("runs") and source.chance(40):
        outer = []
    inner = split(source, parts["inner"]) if "inner" in parts else []
    return (*outer, parts["features"], *inner), len(outer)


class Problem:
    """The arrays of one call by name, each held in a memory of its own."""

    def __init__(self, source, budgets=BUDGETS):
        self.source = source
        self.dtype = np.dtype(source.pick((np.float32, np.float32, np.float64)))
        self.shape, axis = draw_shape(source, budgets)
        self.place = axis
        self.axis = axis - len(self.shape) if source.chance(30) else axis
        self.features = self.shape[axis]
        self.size = int(np.prod(self.shape))
        self.count = int(np.prod([size for i, size in enumerate(self.shape) if i != axis]))
        self.eps = source.pick((1e-5, 1e-5, 0.0, 1e-3, 1e-12, 1.0))
        self.layout = self._layout()  # often that of all arrays of the call
        self.alike = False  # whether terms of dgamma may round alike: see `values`
        self.held = {}

    @property
    def generator(self):
        return self.source.generator()

    def _layout(self, **more):
        return memory.draw_layout(self.source, len(self.shape), self.dtype.itemsize, **more)

    def hold(self, name, array, layout=None):
        """Keep an array in a layout of its own; return it there."""
        self.held[name] = memory.Held(array, layout or memory.plain(array.ndim))
        return self.held[name].array

    def fill(self, name, kinds, repeated=True):
        """Hold an array of x's shape with contents of one of some kinds."""
        kind = self.source.pick(kinds)
        rows = kind(self.generator, self.source, (self.features, self.count), self.dtype.char)
        others = [size for i, size in enumerate(self.shape) if i != self.place]
        rows = rows.astype(self.dtype).reshape(self.features, *others)
        array = np.moveaxis(rows, 0, self.place)
        layout = self._layout(repeated=repeated)
        if not (layout.repeated or self.source.chance(40)):
            layout = self.layout
        if name.startswith("x"):
            self.alike = kind in values.ALIKE or bool(layout.repeated)
        return self.hold(name, array, layout)

    def batch(self, name="x"):
        return self.fill(name, values.BATCHES)

    def dout(self, name="dout"):
        kinds = values.CENTRED if self.alike else values.CENTRED + values.GRADIENTS
        return self.fill(name, kinds, repeated=not self.alike)

    def residual(self, name="residual"):
        return self.fill(name, values.RESIDUALS) if self.source.chance(30) else None

    def output(self, *others, name="out"):
        """Draw an `out`: none, one of its own, or one of the arrays that may be written over."""
        others = [name for name in others if name in self.held]
        others = [name for name in others if self._can_be_written(self.held[name].array)]
        if others and self.source.chance(25):
            return self.held[self.source.pick(others)].array
        if not self.source.chance(40):
            return None
        layout = self._layout(output=True)
        return self.hold(name, memory.poisoned(self.shape, self.dtype), layout)

    def _can_be_written(self, array):
        return array.flags.writeable and array.dtype.isnative

    def parameter(self, name, low=-2.0):
        """Draw a gamma or a beta, often absent."""
        if self.source.chance(25):
            return None
        rng = self.generator
        array = rng.uniform(low, 2, self.features)
        special = self.source.pick((None, None, None, "zeros", "large", "small"))
        if special == "zeros":
            array[rng.random(self.features) < 0.3] = 0
        elif special:
            array *= {"large": 1e4, "small": 1e-4}[special]
        return self.per_feature(name, array)

    def per_feature(self, name, array):
        """Hold one value per feature, of any type of real numbers, or give a list of them."""
        kinds = ["f8", "f8", ">f8", "list"]
        kinds += ["f4", "f4"] if np.all(np.abs(array) < 1e37) else []
        kinds += ["f2", "i4"] if np.all(np.abs(array) < 6e4) else []
        kind = self.source.pick(kinds)
        if kind == "list":
            return array.tolist()
        array = array.astype(kind)
        step = self.source.pick((1, 1, 2, -1))
        native = array.astype(array.dtype.newbyteorder("="))
        layout = memory.plain(1, self.source.pick((0, 0, array.itemsize, 1)))
        return self.hold(
            name, native, layout._replace(steps=(step,), swapped=not array.dtype.isnative)
        )

    def rows(self, array):
        """See an array as (features, values), in 80 bits."""
        rows = np.moveaxis(np.asarray(array), self.place, 0)
        return rows.reshape(self.features, self.count).astype(np.longdouble)

    def changed(self, *outs):
        """Name the arrays that are not as they were, the values of outputs aside."""
        return [
            name
            for name, held in self.held.items()
            if not held.is_unchanged(next((out for out in outs if out is held.array), None))
        ]

    def restore(self):
        for held in self.held.values():
            held.restore()

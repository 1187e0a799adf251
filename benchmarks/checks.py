"""What the cases do not show: call overhead, recycled outputs, scaling, dtypes, memory.

Every check prints its figure beside what is aimed at; none stops the run.
"""

from cases import ARRAYS, Case, limit_seconds
from measure import data, measure, workers
from report import VERBS, total
from worker import Absent

SMALL = Case("rows", (32, 64))
BIG = [Case("rows", (16384, 1024)), Case("nchw", (32, 64, 90, 90)), Case("axis0", (1024, 16384))]
PAIRS = [(case, Case(case.layout, case.shape, "float64")) for case in BIG]
GROWING = [Case("rows", (256 * 4**k, 1024)) for k in range(6)]  # 1 MB to 1 GB
LIBRARIES = ("bn_cy", "bn_cy out=", "bn_cy layer", "bn_cy eval", "streaming")


def planned(threads, quick):
    """Return the cases for each number of threads: with 1 only what scaling is judged by."""
    cases = [SMALL, *BIG, *(double for _, double in PAIRS), *_growing(quick)]
    plan = {threads: list(dict.fromkeys(cases))}
    return plan if threads == 1 else {1: BIG, **plan}


def _growing(quick):
    return GROWING[:4] if quick else GROWING


def run(threads, plan, seed, quick, progress):
    """Measure with 1 and with `threads` threads; return rows (check, figure, aim)."""
    times = {}
    for count, cases in planned(threads, quick).items():
        with workers(LIBRARIES, count) as (libraries, absent):
            if absent:
                raise Absent("the checks need " + ", ".join(map(" ".join, absent.items())))
            for case in cases:
                progress(f"checks, {case.name}, {count} threads")
                with data(case, seed) as folder:
                    times[case, count], _ = measure(case, _wanted(case, libraries), folder, plan)
    return [
        *_calls(times, threads),
        *_big(times, threads),
        *_memory(threads, seed),
        *_linear(times, threads, _growing(quick)),
    ]


def _wanted(case, libraries):
    """Leave out what no check reads, so that a gigabyte is held once."""
    names = ("bn_cy out=",) if case in GROWING and case not in BIG else LIBRARIES
    return {name: libraries[name] for name in names}


def _calls(times, threads):
    of = times[SMALL, threads]
    for library, aim in (("bn_cy", 4), ("bn_cy layer", 6)):
        for verb in VERBS:
            figure = f"{1e6 * of[library][verb]:.2f} us"
            yield f"{library}, {verb}, {SMALL.name}", figure, f"at most {aim} us"


def _big(times, threads):
    for case, double in PAIRS:
        of = times[case, threads]
        given = total(of["bn_cy out="])
        name = case.name
        yield f"fresh / out=, {name}", f"{total(of['bn_cy']) / given:.2f}", "at most 1.15"
        rate = given / total(times[double, threads]["bn_cy out="])
        yield f"float64 / float32 element rate, {name}", f"{rate:.2f}", "at least 0.5"
        speed = of["streaming"]["copy"] / of["bn_cy eval"]["eval"]
        yield f"eval / streaming copy speed, {name}", f"{speed:.2f}", "1"
        if threads > 1:
            yield (
                f"{threads} threads / 1 thread, {name}",
                f"{total(times[case, 1]['bn_cy out=']) / given:.2f}",
                f"streaming: {_sum(times[case, 1]) / _sum(of):.2f}",
            )


def _sum(of_library):
    """Add up the streaming that forward and backward of a large array amount to."""
    streaming = of_library["streaming"]
    return sum(limit_seconds(verb, 2 * arrays, streaming) for verb, arrays in ARRAYS.items())


def _memory(threads, seed):
    """Look for temporaries, those kept for later calls too: a new process each time."""
    for case in BIG:
        with workers(["bn_cy out="], threads) as (libraries, _), data(case, seed) as folder:
            peak = libraries["bn_cy out="].peak_bytes(case, folder)
        share = peak / case.nbytes - len(VERBS)  # y and dx are given
        yield f"temporary memory / x, {case.name}", f"{share:.3f}", "far below 1"


def _linear(times, threads, cases):
    per_element = [1e9 * total(times[case, threads]["bn_cy out="]) / case.size for case in cases]
    figures = ", ".join(
        f"{case.nbytes >> 20} MB: {ns:.2f}" for case, ns in zip(cases, per_element, strict=True)
    )
    yield "ns an element, forward and backward", figures, "linear outside the cache"


def describe(rows):
    width = max(len(check) for check, *_ in rows)
    return "\n".join(f"{check:<{width}}  {figure}  (aim: {aim})" for check, figure, aim in rows)

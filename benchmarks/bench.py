"""Time bn_cy against other libraries and against the memory bus of this machine.

Every library runs in a process of its own, in turn, several rounds; times are medians. Its
result is checked against a float64 reference before it is timed. Without options a few cases are
timed, in about two minutes; `--cases all` times all. Libraries that are not installed are left out;
`pip install ".[peers]"` brings them. Ctrl-C ends the run: what is done is printed and written.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDS = 'bench.py needs {}: pip install ".[bench]"'  # in the root of the checkout
try:
    import cases
    import checks
    import fused
    import machine
    import measure
    import report
    import train
    from peers import LAYER, OURS, PEERS
    from plot import plot
    from tqdm import tqdm
    from worker import Absent, WrongResult
except ModuleNotFoundError as error:
    sys.exit(NEEDS.format(error.name))

STREAMING_CASES = [cases.Case("rows", (256 * 4**k, 1024)) for k in range(5)]  # 1 to 256 MB


def main(arguments=None):
    options = parse(arguments)
    if options.table:
        results = load_results(options.table)
        if results["cases"]:
            print(report.markdown(results))
        if results["fused"]:
            print(fused.markdown(results["fused"]))
        return
    results = start_results(arguments, options)
    try:
        run(options, results)
    except KeyboardInterrupt:
        print("interrupted: what follows is what was done", file=sys.stderr)
        finish(options, results)
        sys.exit(130)
    except (Absent, WrongResult, RuntimeError) as error:
        sys.exit(f"bench.py: {error}")
    finish(options, results)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        type=_cases,
        help="few, mlp, cnn, axis0, all, or names such as rows-256x512, nchw-32x64x56x56; "
        "comma-separated (default: few, or none with --train or --checks)",
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        default=list(PEERS),
        help=f"comma-separated, of {', '.join(PEERS)} (default: all)",
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        default=[len(os.sched_getaffinity(0))],
        help="comma-separated counts (default: one per CPU)",
    )
    parser.add_argument("--quick", action="store_true", help="shorter and fewer rounds")
    parser.add_argument(
        "--fused", action="store_true", help="time the cases with a ReLU and a residual instead"
    )
    parser.add_argument("--train", action="store_true", help="time a training step")
    parser.add_argument(
        "--checks", action="store_true", help="call overhead, scaling, memory and the like"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random data (default: 0)")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=_picture, metavar="FILE.png", help="draw the ratios")
    parser.add_argument(
        "--table", type=Path, metavar="FILE.json", help="print results as Markdown, run nothing"
    )
    options = parser.parse_args(arguments)
    if options.cases is None:
        options.cases = [] if options.train or options.checks else cases.FEW
    if options.seed < 0:
        parser.error("argument --seed: expected 0 or more")
    return options


def _cases(text):
    try:
        return cases.select(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _peers(text):
    names = text.split(",") if text else []
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name!r}, known: {', '.join(PEERS)}")
    return names


def _threads(text):
    available = len(os.sched_getaffinity(0))
    counts = [int(count) if count.isdecimal() else 0 for count in text.split(",")]
    if not all(1 <= count <= available for count in counts):
        raise argparse.ArgumentTypeError(
            f"expected counts from 1 to {available}, the CPUs this process may use; got {text!r}"
        )
    return counts


def _output(text):
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _picture(text):
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(NEEDS.format("matplotlib"))
    return _output(text)


def load_results(path):
    try:
        results = json.loads(path.read_text())
        results = {"fused": [], **results}
        if results["cases"] or results["fused"]:
            return results
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"bench.py: cannot read results from {path}: {error}")
    sys.exit(f"bench.py: {path} holds no cases")


def start_results(arguments, options):
    words = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "benchmarks/bench.py", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "seed": options.seed,
        "versions": machine.versions(),
        "absent": {},
        "streaming": [],
        "cases": [],
        "fused": [],
        "train": [],
        "checks": [],
    }


def run(options, results):
    """Fill `results`, printing every case as it is done."""
    plan = measure.QUICK if options.quick else measure.Plan()
    of_cases = len(options.cases) * (len(cases.FOLLOWED) if options.fused else 1)
    steps = len(options.threads) * (of_cases + len(train.CASES) * options.train)
    if options.checks:
        checked = checks.planned(max(options.threads), options.quick)
        steps += sum(len(group) for group in checked.values())
    with tqdm(total=steps, unit="case", disable=None) as bar:

        def progress(text):
            bar.set_description_str(text)
            bar.update()

        bar.write(report.describe_run(results))
        if options.cases == cases.FEW:
            bar.write(report.describe_choice(of_cases, len(cases.ALL)))
        for threads in options.threads if options.cases else ():
            if options.fused:
                results["fused"] += fused.run(
                    options.cases, options.peers, threads, plan, options.seed, progress, bar.write
                )
            else:
                run_cases(options, results, threads, plan, bar, progress)
        for threads in options.threads if options.train else ():
            results["train"] += train.run(threads, plan, options.seed, progress)
        if options.checks:
            results["checks"] = checks.run(
                max(options.threads), plan, options.seed, options.quick, progress
            )


def run_cases(options, results, threads, plan, bar, progress):
    names = [*OURS, LAYER, *options.peers, "streaming"]
    with measure.workers(names, threads) as (libraries, absent):
        if "bn_cy" in absent:
            raise Absent(absent["bn_cy"])
        results["absent"] |= absent
        for why in absent.values():
            bar.write(f"absent: {why}")
        if "streaming" in libraries:
            rows = stream(libraries["streaming"], threads, plan)
            results["streaming"] += rows
            bar.write("\n" + report.describe_streaming(rows))
        peers = [name for name in options.peers if name in libraries]
        bar.write("\n" + report.header(peers))
        for case in options.cases:
            progress(f"{case.name}, {threads} threads")
            with measure.data(case, options.seed) as folder:
                seconds, errors = measure.measure(case, libraries, folder, plan)
            record = measure.record(case, threads, seconds, errors, results["machine"])
            results["cases"].append(record)
            bar.write(report.line(record, peers))


def stream(worker, threads, plan):
    """Measure the streaming limits over several array sizes."""
    rows = []
    for case in STREAMING_CASES:
        worker.bind(case, None)
        times = {verb: worker.time(verb, plan.slot) for verb in worker.verbs()}
        rows.append({"bytes": case.nbytes, "threads": threads, **times})
    return rows


def finish(options, results):
    """Print the summary and write the files asked for."""
    if results["cases"]:
        print("\n" + report.describe_summary(results["cases"]))
    if results["fused"]:
        print("\n" + fused.describe(results["fused"]))
    if results["train"]:
        print(train.describe(results["train"]))
    if results["checks"]:
        print(checks.describe(results["checks"]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot and results["cases"]:
        plot(results, options.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # a second one, or one before there was anything to tell
        sys.exit(130)

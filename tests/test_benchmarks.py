"""The benchmark command: its cases, its arithmetic and its words. Nothing here is timed."""

import ast
import graphlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are in the repository only", allow_module_level=True)
pytest.importorskip("tqdm")
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
import cases  # noqa: E402
import fused  # noqa: E402
import networks  # noqa: E402
import peers  # noqa: E402
import problem  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
import worker  # noqa: E402
from cases import Case  # noqa: E402

MB = 1 << 20
SMALL = [
    Case("rows", (7, 5)),
    Case("axis0", (5, 7)),
    Case("nchw", (2, 5, 3, 4)),
    Case("nhwc", (2, 3, 4, 5)),
    Case("rows", (9, 3), "float64"),
]
FOLLOWED = [replace(case, after=after) for case in SMALL for after in cases.FOLLOWED]


@pytest.fixture(autouse=True)
def _thread_count_of_this_process_stays(monkeypatch):
    monkeypatch.setattr("bn_cy.set_num_threads", lambda n: None)


def test_no_circle_of_imports():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    imports = {}
    for name in names:
        nodes = list(ast.walk(ast.parse((BENCHMARKS / f"{name}.py").read_text())))
        plain = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        chosen = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        imports[name] = names & {*plain, *chosen}
    assert imports["measure"] == {"cases", "client", "problem", "worker"}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_the_cases_are_distinct_and_their_names_parse():
    assert len({case.name for case in cases.ALL}) == len(cases.ALL) == 40
    assert [cases.parse_case(case.name) for case in cases.ALL] == cases.ALL
    assert all(cases.parse_case(case.name) == case for case in [*SMALL, *FOLLOWED])
    assert cases.parse_case("nhwc-2x3x4x5+add+relu").adds


def test_groups_partition_the_cases():
    groups = [case for group in cases.GROUPS for case in cases.select(group)]
    assert sorted(case.name for case in groups) == sorted(case.name for case in cases.ALL)
    assert cases.select("all") == cases.ALL
    assert cases.select("few") == cases.FEW
    assert {case.layout for case in cases.FEW} == {case.layout for case in cases.ALL}
    assert set(cases.FEW) < set(cases.ALL)
    assert cases.select("rows-32x64,mlp")[:2] == [Case("rows", (32, 64)), Case("rows", (64, 128))]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_size_and_bytes_are_the_arrays(case):
    x = np.empty(case.shape, case.dtype)
    assert (case.size, case.nbytes, case.features) == (x.size, x.nbytes, 5 if x.size > 27 else 3)


@pytest.mark.parametrize(
    ("case", "l2", "forward", "backward"),
    [
        (Case("rows", (1024, 1024)), 0, 2, 4),
        # One line of features by 8192 rows is half a megabyte, twice that with dout.
        (Case("rows", (8192, 1024)), MB, 1, 4),
        (Case("nhwc", (8, 32, 32, 1024)), 2 * MB, 1, 2),
        # Of 8 features no line of 16 can be read.
        (Case("rows", (16384, 8)), MB, 1, 4),
        # One feature of 32 x 56 x 56 values is 392 kB.
        (Case("nchw", (32, 64, 56, 56)), MB, 1, 4),
        (Case("axis0", (1024, 16384)), 2**18, 1, 2),
    ],
)
def test_compulsory_reads(case, l2, forward, backward):
    assert cases.compulsory_reads(case, "forward", l2) == forward
    assert cases.compulsory_reads(case, "backward", l2) == backward
    assert cases.compulsory_bytes(case, "forward", l2) == (forward + 1) * case.nbytes


STREAMING = {"read": 2.0, "copy": 3.0, "read two": 5.0, "add": 7.0}


def test_the_limit_pairs_the_last_pass_with_the_write():
    assert [cases.limit_seconds("forward", reads, STREAMING) for reads in (1, 2)] == [3.0, 5.0]
    assert [cases.limit_seconds("backward", reads, STREAMING) for reads in (2, 4)] == [7.0, 12.0]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_package_and_the_formula_pass_the_check_of_results(case, tmp_path):
    data = problem.create(case, seed=1)
    problem.save(data, tmp_path)
    for library in (peers.BnCy, peers.BnCyOut, peers.BnCyLayer, peers.BnCyEval, peers.NumPy):
        timed = library(threads=1)
        results = timed.results(timed.bind(problem.load(case, tmp_path)))
        errors = problem.relative_errors(case, tmp_path, results)
        assert max(errors.values()) <= timed.tolerance, (library, errors)


@pytest.mark.parametrize("case", FOLLOWED, ids=lambda case: case.name)
def test_what_follows_passes_the_check_of_results(case, tmp_path):
    problem.save(problem.create(case, seed=1), tmp_path)
    for library in (peers.BnCy, peers.BnCyOut, peers.BnCyLayer, peers.BnCyThenNumPy):
        timed = library(threads=1)
        results = timed.results(timed.bind(problem.load(case, tmp_path)))
        errors = problem.relative_errors(case, tmp_path, results)
        assert len(errors) == 4 + case.adds
        assert max(errors.values()) <= timed.tolerance, (library, errors)


def test_no_gradient_arrives_where_rounding_decides_about_the_relu():
    case = Case("rows", (4000, 5), after="add+relu")
    p = problem.create(case, seed=1)
    y, *_, dresidual = problem.reference(p, range(5))
    near = (y > 0) & (y < problem.KINK)
    assert near.any()
    assert not dresidual[near].any()


def test_the_price_of_what_follows_and_the_worst_of_it():
    def made_up(case, after, price, ratio):
        ours = {"forward": price, "backward": 2 * price}
        bare = {"forward": 1.0, "backward": 1.0}
        theirs = {"forward": price * ratio, "backward": 2 * price * ratio}
        seconds = {"bn_cy": ours, "bn_cy out=": ours, fused.BARE: bare, "torch": theirs}
        return {"case": case, "after": after, "threads": 2, "seconds": seconds, "errors": {}}

    records = [made_up("rows-2x2", "relu", 1, 2), made_up("rows-9x9", "relu", 4, 8)]
    rows = {row[:2]: row[2:] for row in fused.summary(records)}
    assert rows["relu", "forward: time, relative to the bare batch norm"] == (
        pytest.approx(2),
        4,
        "rows-9x9",
    )
    assert rows["relu", "backward: time, relative to the bare batch norm"] == (
        pytest.approx(4),
        8,
        "rows-9x9",
    )
    assert rows["relu", "torch: time, relative to ours"] == (pytest.approx(4), 2, "rows-2x2")
    assert len(rows) == 3
    line = "| relu | torch: time, relative to ours | 4.00 | 2.00 (rows-2x2) |"
    assert line in fused.markdown(records)
    for record, theirs in zip(records, (3, 5), strict=True):
        record["seconds"]["onednn"] = {"forward": theirs, "backward": 2 * theirs}
    records.append(made_up("axis0-9x9", "relu", 1, 2))
    records[-1]["seconds"]["onednn"] = {"forward": 100, "backward": 200}
    rows = {row[:2]: row[2:] for row in fused.summary(records)}
    what = "onednn, rows and NHWC: time, relative to ours"
    assert rows["relu", what] == (pytest.approx((3 * 5 / 4) ** 0.5), 1.25, "rows-9x9")


@pytest.mark.parametrize("case", [train.CASES[0], train.CASES[2]], ids=lambda case: case.name)
def test_the_networks_that_are_timed_learn_alike(case):
    p = problem.create(case, seed=1)
    losses = []
    for batchnorm in (networks.fused, networks.bare, networks.staged):
        step = networks.NumPyNetwork(batchnorm).bind(p)["step"]
        losses.append([step() for _ in range(3)])
    assert losses[0][2] < losses[0][0]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)


def test_a_wrong_result_is_not_timed(tmp_path):
    class Wrong(peers.BnCy):
        def results(self, verbs):
            y, dx, dgamma, dbeta = super().results(verbs)
            return y, dx, dgamma, dbeta + np.float32(0.01)

    problem.save(problem.create(SMALL[0], seed=1), tmp_path)
    with pytest.raises(worker.WrongResult, match=r"rows-7x5: relative L2 error of dbeta"):
        worker.Server(Wrong(threads=1)).bind(SMALL[0].name, tmp_path)


def test_only_some_features_of_a_very_large_array_are_checked(monkeypatch):
    monkeypatch.setattr(problem, "CHECKED", 8 * 100)
    chosen = problem.checked_features(Case("rows", (100, 64)))
    assert (len(chosen), chosen[0], chosen[-1]) == (8, 0, 63)


def made_up_record(name, ours, theirs, nbytes=1000):
    of_ours = (*peers.OURS, peers.LAYER)
    seconds = {library: {"forward": ours, "backward": ours} for library in of_ours}
    seconds |= {peer: {"forward": theirs, "backward": 2 * theirs} for peer in peers.PEERS}
    return {
        "case": name,
        "group": "mlp",
        "layout": "rows",
        "bytes": nbytes,
        "threads": 2,
        "compulsory_reads": {"forward": 1, "backward": 2},
        "seconds": seconds | {"streaming": {verb: ours / 10 * s for verb, s in STREAMING.items()}},
        "errors": {},
    }


@pytest.fixture
def results():
    return {
        "machine": {"processor": "Abacus", "cpus": 2, "l2_bytes": MB, "l3_bytes": 0},
        "versions": {"bn_cy": "1", "torch": "2"},
        "seed": 0,
        "absent": {},
        "cases": [
            made_up_record("rows-2x2", ours=1e-6, theirs=2e-6),
            made_up_record("rows-9x9", ours=1e-3, theirs=8e-3, nbytes=cases.LARGE),
        ],
    }


def test_summary_has_the_geometric_mean_and_the_worst_case(results):
    rows = {row[:2]: row[2:] for row in report.summary(results["cases"], threads=2)}
    # Ratios of 2 and 8 forward, half as much again for both together.
    assert rows["torch", "forward"] == (pytest.approx(4), pytest.approx(2), "rows-2x2")
    assert rows["torch", "both"] == (pytest.approx(6), pytest.approx(3), "rows-2x2")
    # Only the large array: a copy in 3 and an addition in 7 tenths of the time of each of ours.
    assert rows[report.LIMIT, "both"] == (
        pytest.approx(0.5),
        pytest.approx(0.5),
        "rows-9x9",
    )


def test_table_is_made_from_the_json(results, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    bench.main(["--table", str(path)])
    table = capsys.readouterr().out
    assert "| torch | 6.00 | 3.00 (rows-2x2) |" in table
    assert "| rows-9x9 | 1000 / 1000 | 12.0 | 12.0 | 12.0 | 12.0 |" in table


@pytest.mark.parametrize("name", ["0.1.0", "0.1.0-fused"])
def test_the_page_has_the_tables_of_the_results(name, capsys):
    bench.main(["--table", str(BENCHMARKS / "results" / f"{name}.json")])
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text("utf-8").splitlines()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in page] == []


def test_plot_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    bench.plot(results, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "rnn"], "unknown case 'rnn'"),
        (["--cases", "rows-0x4"], "unknown case 'rows-0x4'"),
        (["--cases", "nchw-32x64"], "unknown case 'nchw-32x64'"),
        (["--cases", "rows-1x4"], "one value per feature"),
        (["--peers", "abacus"], "unknown peer 'abacus'"),
        (["--threads", "0"], "expected counts from 1"),
        (["--threads", "two"], "expected counts from 1"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--seed", "-1"], "expected 0 or more"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"cases": []}'])
def test_results_that_cannot_be_read_are_named(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"results\.json"):
        bench.main(["--table", str(path)])


def quick_run(path, *arguments):
    """Run the command on a small case; return its results and its output."""
    arguments = ["--cases", "rows-8x3", "--threads", "1", "--quick", *arguments]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench.py", *arguments, "--json", path],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=path.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_the_command_times_and_writes(tmp_path):
    results, output = quick_run(tmp_path / "results.json", "--peers", "numpy")
    (record,) = results["cases"]
    assert {"bn_cy", "bn_cy out=", "numpy"} <= set(record["seconds"])
    assert max(record["errors"]["bn_cy"].values()) <= 1e-6
    assert "rows-8x3, 1" in output


def test_the_command_times_what_follows(tmp_path):
    results, output = quick_run(tmp_path / "results.json", "--fused", "--peers", "")
    records = results["fused"]
    assert [record["after"] for record in records] == list(cases.FOLLOWED)
    assert all(max(r["errors"]["bn_cy, then NumPy"].values()) <= 1e-6 for r in records)
    assert "rows-8x3+add+relu, 1" in output
    bench.main(["--table", str(tmp_path / "results.json")])


def started(folder, *arguments, **environment):
    """Start the command as a terminal does, whose Ctrl-C reaches the whole group."""
    return subprocess.Popen(
        [sys.executable, BENCHMARKS / "bench.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts():
    """Undo that whoever started the tests, in the background of a shell, ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_run_without_options_is_short_and_says_so(tmp_path):
    process = started(tmp_path, "--peers", "numpy")
    try:
        lines = [process.stdout.readline() for _ in range(5)]
        assert any("7 cases, about 2 minutes; --cases all times all 40" in line for line in lines)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.parametrize("seconds", [0, 0.3, 1, 3])
def test_an_interrupt_ends_the_run_in_one_line(seconds, tmp_path):
    process = started(tmp_path, "--cases", "few", "--threads", "1", "--json", "results.json")
    process.stdout.readline()  # the machine: the run has begun
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "interrupted: what follows is what was done\n"
    assert "cases" in json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize(
    ("module", "arguments"), [("tqdm", []), ("matplotlib", ["--plot", "x.png"])]
)
def test_a_missing_extra_is_named_in_one_line(module, arguments, tmp_path):
    code = f"import sys; sys.modules[{module!r}] = None; sys.path.insert(0, {str(BENCHMARKS)!r})"
    code += f"; import bench; bench.main({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(f'bench.py needs {module}: pip install ".[bench]"')

"""The graph: its numbers, its texts, its check of itself, its drawing, and what it refuses."""

import doctest
import importlib
import importlib.resources
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bn_cy
from bn_cy import reference
from bn_cy.graph import draw, page, sequential, steps, trace
from bn_cy.graph.__main__ import main

EPS = 1e-3
SHAPES_AND_AXES = [((5, 3), 1), ((3, 5), 0), ((4, 3, 2), 1), ((2, 3, 2, 2), -3), ((2, 2, 2, 3), -1)]
MODULES = ["trace", "sequential"]  # that have examples

over_shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES_AND_AXES)


def problem(rng, shape=(5, 3), axis=1, dtype=np.float64):
    """Draw x, gamma, beta and dout."""
    features = shape[axis]
    x, dout = (rng.normal(size=(2, *shape)) + 0.3).astype(dtype)
    gamma, beta = (rng.normal(size=(2, features)) + 0.3).astype(dtype)
    return x, gamma, beta, dout


def passes(x, gamma, beta, dout, axis=1):
    """Run the reference, and return everything that it leaves in the cache."""
    cache = reference.staged_forward(x, gamma, beta, EPS, axis=axis)[1]
    reference.staged_backward(dout, cache)
    return cache


# Numbers


@over_shapes
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_and_gradients_are_those_of_the_reference(rng, shape, axis, dtype):
    arrays = problem(rng, shape, axis, dtype)
    t, cache = trace(*arrays, EPS, axis=axis), passes(*arrays, axis=axis)
    assert [node.name for node in t.nodes] == [name for name in cache if f"d{name}" in cache]
    for node in t.nodes:
        np.testing.assert_array_equal(node.value, cache[node.name], strict=True)
        np.testing.assert_array_equal(node.gradient, cache[f"d{node.name}"], strict=True)
        assert node.gradient.shape == node.value.shape
        for name, gradient in (node.arriving | node.leaving).items():
            np.testing.assert_array_equal(gradient, cache[name], strict=True)
    for name in ("out", "dx", "dgamma", "dbeta", "dout"):
        np.testing.assert_array_equal(getattr(t, name), cache[name], strict=True)
    assert t.count == arrays[0].size // 3


def test_what_arrives_at_a_node_adds_up_to_its_gradient(rng):
    for node in trace(*problem(rng)).nodes:
        np.testing.assert_array_equal(sum(node.arriving.values()), node.gradient)


def test_gradients_meet_at_two_places(rng):
    t = trace(*problem(rng))
    assert [(m.node, m.name, [*m.parts]) for m in t.meetings] == [
        ("xmu", "dxmu", ["dxmu1", "dxmu2"]),
        ("x", "dx", ["dx1", "dx2"]),
    ]
    for meeting in t.meetings:
        first, second = meeting.parts.values()
        assert np.abs(first).min() > 0
        assert np.abs(second).min() > 0
        np.testing.assert_array_equal(meeting.total, first + second)


def test_edges_lead_both_ways(rng):
    t = trace(*problem(rng))
    forward = [edge for edge in t.edges if edge.direction == "forward"]
    backward = [edge for edge in t.edges if edge.direction == "backward"]
    assert len(t.edges) == len(forward) + len(backward) == 2 * 13
    assert {(e.source, e.target) for e in forward} == {(e.target, e.source) for e in backward}
    for edge in forward:
        assert edge.name == edge.source
        np.testing.assert_array_equal(edge.value, t.nodes[edge.source].value)
    for edge in backward:
        np.testing.assert_array_equal(edge.value, t.nodes[edge.source].leaving[edge.name])
        np.testing.assert_array_equal(edge.value, t.nodes[edge.target].arriving[edge.name])
    # Each pass in the order in which it is run: nothing leaves before everything has arrived.
    for edges in (forward, backward):
        sources = [edge.source for edge in edges]
        for k, edge in enumerate(edges):
            assert edge.target not in sources[:k]


@over_shapes
def test_three_paths_add_up_to_the_gradient_of_an_entry(rng, shape, axis):
    x, gamma, beta, dout = problem(rng, shape, axis)
    t = trace(x, gamma, beta, dout, EPS, axis=axis)
    xhat, dxhat = (
        np.moveaxis(t.nodes["xhat"].value, axis, -1),
        np.moveaxis(dout, axis, -1) * gamma,
    )
    n = x.size // 3
    for index in np.ndindex(xhat.shape):
        *i, f = index
        paths = t.paths(i[0] if len(i) == 1 else i, f)
        ivar, others = t.nodes["ivar"].value[f], tuple(range(x.ndim - 1))
        assert paths.direct == pytest.approx(ivar * dxhat[index])
        assert paths.mean == pytest.approx(-ivar * dxhat.sum(axis=others)[f] / n)
        spread = (dxhat * xhat).sum(axis=others)[f]
        assert paths.variance == pytest.approx(-ivar * xhat[index] * spread / n)
        assert sum(paths) == pytest.approx(np.moveaxis(t.dx, axis, -1)[index])


def test_the_trace_keeps_its_numbers(rng):
    x, gamma, beta, dout = problem(rng)
    t = trace(x, gamma, beta, dout, EPS)
    kept = {node.name: (node.value.copy(), node.gradient.copy()) for node in t.nodes}
    for array in (x, gamma, beta, dout):
        array[...] = 0
    for node in t.nodes:
        np.testing.assert_array_equal(node.value, kept[node.name][0])
        np.testing.assert_array_equal(node.gradient, kept[node.name][1])


def test_a_node_is_found_by_name_and_by_place(rng):
    nodes = trace(*problem(rng)).nodes
    assert nodes["mu"] is nodes[3]
    assert nodes[-1].name == "out"
    assert [node.step for node in nodes] == [0, 0, 0, *range(1, 10)]
    with pytest.raises(KeyError, match="no node 'sigma': the nodes are x, gamma"):
        nodes["sigma"]


# Texts


def test_formulas_compute_what_they_say(rng):
    t = trace(*problem(rng), EPS)
    names = {node.name: node.value for node in t.nodes}
    scope = names | {"n": 5, "eps": EPS, "sum": lambda rows: np.sum(rows, axis=0), "sqrt": np.sqrt}
    for node in t.nodes[3:]:
        name, formula = node.formula.split(" = ")
        assert name == node.name
        np.testing.assert_allclose(eval(formula, scope), node.value, rtol=1e-14)


def test_rules_and_local_gradients_compute_what_leaves(rng):
    arrays = problem(rng)
    t = trace(*arrays, EPS)
    scope = passes(*arrays) | {"n": 5, "sum": lambda rows: np.sum(rows, axis=0)}
    for step in steps.STEPS:
        node = t.nodes[step.name]
        assert [*node.local_gradient.items()] == [(wire.source, wire.local) for wire in step.wires]
        for wire in step.wires:
            leaving = node.leaving[wire.gradient]
            assert np.broadcast_to(eval(wire.rule, scope), leaving.shape) == pytest.approx(leaving)
            # What was broadcast forward is summed backward.
            chain = node.gradient * eval(wire.local, scope)
            chain = chain.sum(axis=0) if chain.ndim > leaving.ndim else chain
            assert np.broadcast_to(chain, leaving.shape) == pytest.approx(leaving)


@over_shapes
def test_table_has_every_step_with_its_numbers(rng, shape, axis):
    t = trace(*problem(rng, shape, axis), EPS, axis=axis)
    lines = repr(t).splitlines()
    assert max(map(len, lines)) <= 100
    assert str(t) == repr(t)

    def numbers(start):
        (line,) = [line[4:] for line in lines if line[4:].startswith(start)]
        return line.split(") ")[-1].split()

    def first(array):
        row = np.moveaxis(array, axis, -1).reshape(-1, 3)[0] if array.ndim > 1 else array
        return [f"{value:.4g}" for value in row]

    for node in t.nodes[3:]:
        assert numbers(node.formula) == first(node.value)
    for edge in t.edges:
        if edge.direction == "backward":
            assert numbers(f"{edge.name} = ") == first(edge.value)
    for meeting in t.meetings:
        assert numbers(f"{meeting.name} = ") == first(meeting.total)


def test_table_of_many_features_stops_after_three(rng):
    lines = repr(trace(*problem(rng, (4, 6)))).splitlines()
    assert all(line.endswith(" ...") for line in lines if "(6,)" in line or "(4, 6)" in line[30:])


# The check


@over_shapes
def test_check_finds_every_gradient_right(rng, shape, axis):
    t = trace(*problem(rng, shape, axis), EPS, axis=axis)
    errors = t.check()
    assert [*errors] == [node.name for node in t.nodes]
    for node in t.nodes:
        assert errors[node.name] <= 1e-9 * (1 + np.abs(node.gradient).max()), node.name


@pytest.mark.parametrize(
    "name", [name for step in steps.STEPS for name in [step.name]] + ["x", "gamma", "beta"]
)
def test_check_finds_a_wrong_gradient(rng, name):
    t = trace(*problem(rng), EPS)
    gradient = t.nodes[name].gradient
    place = (-1,) * gradient.ndim
    wrong = gradient.copy()
    wrong[place] += 1e-3
    object.__setattr__(t.nodes[name], "gradient", wrong)
    errors = t.check()
    assert errors[name] == pytest.approx(1e-3, rel=1e-3)
    assert max(error for other, error in errors.items() if other != name) < 1e-7


def test_check_steps_by_the_scale_of_each_feature(rng):
    x, gamma, beta, dout = problem(rng, (6, 4))
    scale = np.array([1e-6, 1.0, 1e6, 1.0])
    t = trace(x * scale + [0, 1e4, 0, 0], gamma, beta, dout, 0)
    values = {node.name: node.value for node in t.nodes} | {"eps": 0.0}
    numeric = steps.numeric_gradient("x", values, dout)
    tolerance = 1e-8 / scale
    tolerance[1] = 1e-6  # the offset costs the sums of x four digits
    assert (np.abs(numeric - t.dx) < tolerance).all()


def test_check_of_float32_shows_its_rounding(rng):
    t = trace(*problem(rng, dtype=np.float32), EPS)
    assert t.dx.dtype == np.float32
    assert 1e-9 < max(t.check().values()) < 1e-2


# The order of sums that the page has


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-12)])
def test_sequential_steps_are_those_of_the_reference(rng, dtype, tolerance):
    arrays = problem(rng, (7, 3), dtype=dtype)
    results, cache = sequential.steps(*arrays, EPS), passes(*arrays)
    assert results.keys() == cache.keys() - {"axis"}
    for name, value in results.items():
        assert value.dtype == dtype
        assert value.shape == cache[name].shape
        np.testing.assert_allclose(value, cache[name], rtol=tolerance, atol=tolerance)


def test_sequential_sums_run_from_the_first_row_to_the_last():
    x = np.array([[1.0], [2.0**-24], [2.0**-24]], np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    assert sequential.steps(x, one, zero, x)["dbeta"][0] == 1  # each half ulp is lost
    assert sequential.steps(x[::-1], one, zero, x[::-1])["dbeta"][0] > 1


def test_sequential_variances_fail_in_their_order(rng):
    x = rng.normal(size=(50, 4)).astype(np.float32)

    def errors(offset):
        moved = x + np.float32(offset)
        exact = moved.astype(np.float64).var(axis=0)
        return {
            name: np.abs(v / exact - 1).max() for name, v in sequential.variances(moved).items()
        }

    assert max(errors(1).values()) < 1e-4
    far, farther = errors(1e4), errors(1e6)
    assert far["one_pass"] > 1e-2 > far["two_pass"]
    assert farther["two_pass"] > 1e-4 > farther["shifted"]


# The drawing


def test_drawing_has_every_node_and_every_label(rng):
    t = trace(*problem(rng), EPS)
    ax = t.draw()
    texts = [text.get_text() for text in ax.texts]
    assert {node.name for node in t.nodes} == draw.PLACES.keys()
    for node in t.nodes:
        assert node.formula.replace(" = ", "\n= ") in texts
    colours = {text.get_text(): text.get_color() for text in ax.texts}
    for edge in t.edges:
        label = f"{edge.name} {list(edge.value.shape)}\n{np.linalg.norm(edge.value):.3g}"
        assert colours[label] == (draw.FORWARD if edge.direction == "forward" else draw.BACKWARD)
    assert draw.FORWARD != draw.BACKWARD


def test_drawing_takes_axes(rng):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert trace(*problem(rng)).draw(ax) is ax
    assert ax.texts


def test_without_matplotlib_the_error_names_the_extra(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib"):
        trace(*problem(rng)).draw()


# The page; what it does in a browser is in tests/browser


def embedded(path):
    """Return what the page was given as JSON."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json".*?>(.*?)</script>', text)[1])


@over_shapes
def test_page_holds_the_numbers_and_the_graph(rng, tmp_path, shape, axis):
    x, gamma, beta, dout = problem(rng, shape, axis)
    trace(x, gamma, beta, dout, EPS, axis=axis).to_html(tmp_path / "graph.html")
    graph = embedded(tmp_path / "graph.html")
    rows = {
        name: np.moveaxis(array, axis, -1).reshape(-1, 3)
        for name, array in (("x", x), ("dout", dout))
    }
    for name, array in (rows | {"gamma": gamma, "beta": beta}).items():
        np.testing.assert_array_equal(graph["numbers"][name], array)
    assert graph["numbers"]["eps"] == EPS
    assert graph["float32"] is False
    assert {node["name"] for node in graph["nodes"]} == draw.PLACES.keys()
    assert len(graph["wires"]) == 13


def test_page_is_one_file_that_fetches_nothing(rng, tmp_path):
    trace(*problem(rng)).to_html(str(tmp_path / "graph.html"))
    text = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert "{{" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", text)


@pytest.mark.parametrize("shape", [(65, 3), (5, 17)])
def test_page_refuses_more_than_it_can_show(rng, tmp_path, shape):
    with pytest.raises(
        ValueError, match=f"64 examples of 16 features, got {shape[0]} of {shape[1]}"
    ):
        trace(*problem(rng, shape)).to_html(tmp_path / "graph.html")
    assert not (tmp_path / "graph.html").exists()


def test_limits_of_the_page_are_those_of_its_script():
    script = (importlib.resources.files("bn_cy.graph") / "assets" / "state.js").read_text("utf-8")
    assert f"LIMITS = {{ rows: {page.MAX_EXAMPLES}, features: {page.MAX_FEATURES} }}" in script


# The command line


def test_command_writes_the_page_of_random_numbers(tmp_path):
    command = [sys.executable, "-m", "bn_cy.graph", "--rows", "4", "--features", "2"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert first.returncode == 0, first.stderr
    assert "dxmu = dxmu1 + dxmu2" in first.stdout
    seed = re.search(r"--seed (\d+)", first.stdout)[1]
    numbers = embedded(tmp_path / "graph.html")["numbers"]
    assert np.shape(numbers["x"]) == (4, 2)
    main(["--rows", "4", "--features", "2", "--seed", seed, "--out", str(tmp_path / "again.html")])
    assert embedded(tmp_path / "again.html")["numbers"] == numbers


def test_the_page_of_the_docs_is_what_the_command_writes(tmp_path):
    main(["--seed", "7", "--out", str(tmp_path / "graph.html")])
    page = (Path(__file__).parents[1] / "docs" / "graph.html").read_text("utf-8")
    assert (tmp_path / "graph.html").read_text("utf-8") == page


@pytest.mark.parametrize("head", ["", "height,weight\n", '"height, cm",""\n'])
def test_command_reads_a_file(tmp_path, capsys, head):
    file = tmp_path / "batch.csv"
    file.write_text(head + "1.5,2\n\n-3,4e-1\n0.25,6\n", encoding="utf-8")
    main(["--csv", str(file), "--eps", "0.5", "--out", str(tmp_path / "page.html")])
    numbers = embedded(tmp_path / "page.html")["numbers"]
    assert numbers["x"] == [[1.5, 2], [-3, 0.4], [0.25, 6]]
    assert numbers["eps"] == 0.5
    assert len(set(np.ravel(numbers["dout"]))) > 1  # ones would hide mistakes
    errors = re.findall(r"^    (\w+) +(\d.\de.\d+)$", capsys.readouterr().out, re.M)
    assert [name for name, _ in errors] == [*steps.INPUTS, *(step.name for step in steps.STEPS)]
    assert max(float(error) for _, error in errors) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "missing.csv"], "missing.csv"),
        (["--csv", "words.csv"], "words.csv, line 3: 'two' is no number"),
        (["--csv", "hole.csv"], "hole.csv, line 1: '' is no number"),
        (["--csv", "ragged.csv"], "ragged.csv, line 2: expected 3 numbers, got 2"),
        (["--csv", "names.csv"], "names.csv holds no numbers"),
        (["--csv", "holes.csv"], "x must be finite, got nan"),
        (["--rows", "0"], "--rows and --features must be at least 1"),
        (["--rows", "65"], "64 examples of 16 features, got 65 of 3"),
        (["--eps", "-1"], "eps must be finite and not negative"),
    ],
)
def test_command_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("words.csv").write_text("a,b\n\n1,two\n", encoding="utf-8")
    Path("hole.csv").write_text("1,,3\n4,5,6\n7,8,9\n", encoding="utf-8")
    Path("ragged.csv").write_text("1,2,3\n4,5\n6,7\n", encoding="utf-8")
    Path("names.csv").write_text("a,b\n", encoding="utf-8")
    Path("holes.csv").write_text("1,2\nnan,4\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not Path("graph.html").exists()


# What is refused

GOOD = {
    "x": np.arange(15.0).reshape(5, 3) ** 2,
    "gamma": np.ones(3),
    "beta": np.zeros(3),
    "dout": np.eye(5, 3),
}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": np.ones(3)}, ValueError, r"x must have two dimensions or more, got shape \(3,\)"),
        ({"x": np.ones((5, 3), int)}, TypeError, "x must be of float32 or float64, got int64"),
        (
            {"x": np.ones((5, 3), complex)},
            TypeError,
            "x must be an array of real numbers, got complex",
        ),
        ({"x": np.ma.ones((5, 3))}, TypeError, "x must have no mask, got MaskedArray"),
        ({"x": np.ones((0, 3))}, ValueError, r"x must have at least one value, got shape \(0, 3\)"),
        ({"x": np.full((5, 3), np.nan)}, ValueError, "x must be finite, got nan"),
        (
            {"gamma": np.ones(4)},
            ValueError,
            r"gamma must have shape \(3,\), one value per feature, got \(4,\)",
        ),
        (
            {"beta": np.ones((5, 3))},
            ValueError,
            r"beta must have shape \(3,\), one value .* got \(5, 3\)",
        ),
        ({"beta": None}, TypeError, "beta must be an array of real numbers, got object"),
        ({"dout": np.ones(3)}, ValueError, r"dout must have shape \(5, 3\), that of x, got \(3,\)"),
        ({"dout": np.full((5, 3), np.inf)}, ValueError, "dout must be finite, got inf"),
        ({"eps": -1}, ValueError, "eps must be finite and not negative, got -1"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
        ({"eps": "0.5"}, TypeError, "eps must be a number, got '0.5'"),
        ({"eps": 10**400}, ValueError, "eps must be finite and not negative, got 1000"),
        ({"x": GOOD["x"] * 1e200}, ValueError, "x must have variances that float64 holds, got inf"),
        (
            {"x": np.ones((5, 3), np.float32), "eps": 1e-50},
            ValueError,
            "eps must not be 0 in float32 .* feature 0 of x",
        ),
        ({"axis": 2}, ValueError, r"axis must be from -2 to 1 for x of shape \(5, 3\), got 2"),
        ({"axis": 1.0}, TypeError, "axis must be an integer, got 1.0"),
        ({"x": np.ones((5, 3)), "eps": 0}, ValueError, "eps must not be 0 .* feature 0 of x"),
    ],
)
def test_bad_arguments_are_refused_by_name(given, error, message):
    with pytest.raises(error, match=message):
        trace(**(GOOD | given))


def test_a_batch_in_the_other_byte_order_is_taken(rng):
    arguments = problem(rng, (4, 3))
    swapped = arguments[0].astype(arguments[0].dtype.newbyteorder())
    assert np.array_equal(trace(swapped, *arguments[1:]).nodes["x"].gradient,
                          trace(*arguments).nodes["x"].gradient)  # fmt: skip


def test_lists_and_whole_parameters_are_taken():
    t = trace([[1.0, 2.0], [3.0, 5.0]], [1, 2], [0, 0], [[1, 0], [0, 0]])
    assert t.nodes["gamma"].value.dtype == np.float64


def test_paths_wants_an_index_for_every_axis_of_the_batch(rng):
    t = trace(*problem(rng, (2, 3, 2, 2)))
    with pytest.raises(ValueError, match=r"i must have 3 indices, .* got 1"):
        t.paths(1, 0)
    with pytest.raises(IndexError):
        t.paths((0, 0, 0), 3)


# The modules


def test_graph_is_imported_on_demand():
    assert bn_cy.graph is importlib.import_module("bn_cy.graph")
    with pytest.raises(AttributeError, match="'bn_cy' has no attribute 'graphs'"):
        bn_cy.graphs  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(
        importlib.import_module(f"bn_cy.graph.{module}"), extraglobs={"np": np}
    )
    assert not result.failed


@pytest.mark.parametrize("name", bn_cy.graph.__all__)
def test_public_names_are_documented(name):
    assert inspect.getdoc(getattr(bn_cy.graph, name))

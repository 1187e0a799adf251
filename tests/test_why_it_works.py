"""The probes against what is known by hand, and why_it_works.py run as its users run it."""

import subprocess
import sys

import numpy as np
import pytest
from test_examples import EXAMPLES, assert_gradient, assert_png, numerical_gradient

import bn_cy

sys.path.append(str(EXAMPLES))

import mlp
import probes

SCRIPT = EXAMPLES / "why_it_works.py"


class Quadratic:
    """A layer with a weight w, and a loss w^T A w / 2 + b^T w, whose gradient is A w + b."""

    def __init__(self, rng, size=6):
        A = rng.normal(size=(size, size))
        self.A, self.b = A @ A.T, rng.normal(size=size)
        self.layers = [self]
        self.params, self.grads = {"weight": rng.normal(size=size)}, {}

    def forward(self, *_):
        """As the network and as the loss."""
        w = self.params["weight"]
        return w @ self.A @ w / 2 + self.b @ w

    def backward(self, *_):
        self.grads["weight"] = self.A @ self.params["weight"] + self.b


@pytest.fixture
def network(rng):
    return mlp.MLP(
        [
            mlp.Linear(4, 5, rng=rng, std=1.0, bias=False, dtype=np.float64),
            bn_cy.BatchNorm(5, dtype=np.float64),
            mlp.Sigmoid(),
            mlp.Linear(5, 3, rng=rng, std=1.0, dtype=np.float64),
        ]
    )


@pytest.fixture
def batch(rng):
    return rng.normal(size=(8, 4)), rng.integers(0, 3, 8)


def vector(network):
    return np.concatenate([layer.params[name].ravel() for layer, name in probes.slots(network)])


# The probes


def test_the_gradient_is_one_vector_in_the_order_of_the_parameters(network, batch):
    loss = mlp.SoftmaxCrossEntropy()
    value, gradient = probes.gradient(network, loss, *batch)
    assert value == loss.forward(network.forward(batch[0]), batch[1])
    parts = [
        numerical_gradient(
            lambda: loss.forward(network.forward(batch[0]), batch[1]), layer.params[name]
        ).ravel()
        for layer, name in probes.slots(network)
    ]
    np.testing.assert_allclose(gradient, np.concatenate(parts), rtol=0, atol=1e-9)


def test_what_is_moved_comes_back(network, rng):
    before = vector(network)
    direction = rng.normal(size=before.size)
    with probes.moved(network, direction):
        np.testing.assert_allclose(vector(network), before + direction, rtol=1e-15)
    np.testing.assert_array_equal(vector(network), before)
    with pytest.raises(KeyError), probes.moved(network, direction):
        raise KeyError
    np.testing.assert_array_equal(vector(network), before)


def test_the_layers_below_one_move_alone(network, rng):
    before = vector(network)
    direction = rng.normal(size=before.size)
    below = before.copy()
    below[:30] += direction[:30]  # weight, gamma and beta; the last layer has 18 more
    with probes.moved(network, direction, below=3):
        np.testing.assert_array_equal(vector(network), below)


def test_along_the_gradient_of_a_quadratic(rng):
    """The gradient changes by A times the distance, and the loss by a parabola."""
    problem, rates = Quadratic(rng), np.array([0.1, 0.2, 0.7])
    g = problem.A @ problem.params["weight"] + problem.b
    losses, changes, per_distance = probes.along_gradient(problem, problem, None, None, rates)
    stretch = np.linalg.norm(problem.A @ g)
    np.testing.assert_allclose(changes, rates * stretch, rtol=1e-9)
    np.testing.assert_allclose(per_distance, stretch / np.linalg.norm(g), rtol=1e-9)
    parabola = problem.forward() - rates * (g @ g) + rates**2 * (g @ problem.A @ g) / 2
    np.testing.assert_allclose(losses, parabola, rtol=1e-9, atol=1e-9)


def test_covariate_shift_is_that_of_its_definition(network, batch):
    loss, rate = mlp.SoftmaxCrossEntropy(), 0.5
    (cosine,), (distance,) = probes.covariate_shift(network, loss, *batch, rate)
    probes.gradient(network, loss, *batch)
    before = network.layers[3].grads["weight"]
    for layer in network.layers[:2]:
        for name, param in layer.params.items():
            param -= rate * layer.grads[name]
    probes.gradient(network, loss, *batch)
    after = network.layers[3].grads["weight"]
    norm = np.linalg.norm
    assert cosine == pytest.approx(np.sum(before * after) / norm(before) / norm(after), rel=1e-12)
    assert distance == pytest.approx(norm(after - before) / norm(before), rel=1e-9)
    assert 0 < cosine < 1


def test_without_a_step_there_is_no_shift(network, batch):
    cosines, distances = probes.covariate_shift(network, mlp.SoftmaxCrossEntropy(), *batch, 0.0)
    np.testing.assert_allclose(cosines, 1, rtol=1e-14)
    np.testing.assert_array_equal(distances, 0)


def test_noise_has_a_mean_and_a_scale_of_its_own_at_every_step(rng):
    noise, zeros, ones = probes.Noise(rng), np.zeros((4000, 50)), np.ones((4000, 50))
    shifts, again = noise.forward(zeros).mean(axis=0), noise.forward(zeros).mean(axis=0)
    assert np.abs(shifts).max() <= 0.5 + 0.02
    assert np.abs(shifts).max() > 0.3
    assert np.abs(again - shifts).max() > 0.1
    scales = (noise.forward(ones), noise.backward(ones))[1].mean(axis=0)
    assert 0.98 <= scales.min() < 1.1 < scales.max() <= 1.27
    noise.train(False)
    assert noise.forward(ones) is ones


def test_the_gradient_of_noise(rng):
    noise = probes.Noise(rng)
    x, dout = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    state = rng.bit_generator.state

    def function():
        rng.bit_generator.state = state
        return np.sum(dout * noise.forward(x))

    function()
    assert_gradient(noise.backward(dout), function, x)


def test_a_meter_changes_nothing(rng):
    meter, x = probes.Meter(), rng.normal(size=(6, 4))
    assert meter.forward(x) is x
    assert meter.backward(x) is x
    np.testing.assert_array_equal(meter.mean, x.mean(axis=0))
    np.testing.assert_array_equal(meter.std, x.std(axis=0))


# The script


@pytest.fixture
def why():
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    import why_it_works

    return why_it_works


@pytest.mark.parametrize("kind", ["sigmoid", "relu", "linear"])
def test_networks_of_a_seed_start_from_the_same_weights(why, kind):
    built = [why.build(kind, batch_norm, 3, noise=noise) for batch_norm, noise in why.VARIANTS]
    depth = why.KINDS[kind].depth
    for network in built:
        weights = [layer.params["weight"] for _, layer in probes.weights(network)]
        assert len(weights) == depth + 1
        for weight, (_, layer) in zip(weights, probes.weights(built[0]), strict=True):
            np.testing.assert_array_equal(weight, layer.params["weight"])
        count = {type(layer).__name__: 0 for layer in network.layers}
        for layer in network.layers:
            count[type(layer).__name__] += 1
    assert count["BatchNorm"] == count["Noise"] == depth  # the last has both


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_of_the_least_squares(why, batch_norm, rng):
    problem = why.LeastSquares(seed=int(rng.integers(1000)))
    w, gamma = problem.start.copy(), rng.uniform(1, 2, 1) if batch_norm else None
    _, dw, dgamma = problem.gradients(w, gamma)
    assert_gradient(dw, lambda: problem.loss(problem.gradients(w, gamma)[0]), w)
    if batch_norm:
        assert_gradient(dgamma, lambda: problem.loss(problem.gradients(w, gamma)[0]), gamma)
        assert np.abs(w.T @ dw).max() < 1e-13 * np.linalg.norm(w) * np.linalg.norm(dw)
        for scaled, gradient in [(3 * w, dw / 3)]:
            np.testing.assert_allclose(problem.gradients(scaled, gamma)[1], gradient, atol=1e-12)


def test_the_least_loss_is_the_least(why):
    problem = why.LeastSquares(seed=0)
    eigenvalues = np.linalg.eigvalsh(problem.x.T @ problem.x / len(problem.x))
    assert 300 < eigenvalues[-1] / eigenvalues[0] < 3000
    rows = why.descend(problem, 1.0, False, 300)
    assert (rows[:, 0] > 0).all()
    assert (np.diff(rows[:, 0]) < 0).all()
    both = [why.descend(problem, 1.0, batch_norm, 1)[0, 0] for batch_norm in (False, True)]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


def test_steps_to_the_target(why):
    run = [(10, 0.5), (20, 0.91), (30, 0.8)]
    assert why.steps_to_target(run) == 20
    assert why.steps_to_target(run[:1]) is None


@pytest.mark.usefixtures("why")
def test_a_quick_run_prints_a_table_and_draws_for_each(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", str(SCRIPT), "--quick", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("noise", "landscape", "shift", "length"):
        assert f"\n{name}: " in done.stdout
        assert_png(tmp_path / f"why_{name}.png")
    assert done.stdout.count("Picture: ") == 4


def test_ctrl_c_keeps_what_is_done(why, monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    shift = why.EXPERIMENTS["shift"]
    monkeypatch.setitem(
        why.EXPERIMENTS, "shift", why.Experiment(**{**vars(shift), "measure": interrupt})
    )
    arguments = ["--quick", "--quiet", "--folder", str(tmp_path), "--only", "length", "shift"]
    assert why.main(arguments) == 130
    assert "Cut off by Ctrl-C in shift." in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["why_length.png"]


@pytest.mark.parametrize(
    "arguments", [["--only", "luck"], ["--seeds", "0"], ["--folder", "missing"], ["--wrong"]]
)
def test_bad_arguments_get_one_line(why, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        why.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert arguments[0] in err

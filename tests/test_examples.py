"""The examples: the layers' gradients, and train_digits.py run as its users run it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bn_cy

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

import mlp  # noqa: E402

SCRIPT = EXAMPLES / "train_digits.py"
TINY = ["--rates", "0.1", "--seeds", "1", "--steps", "20", "--hidden", "8", "8", "8"]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"


def numerical_gradient(function, x, h=3e-4):
    """Return the gradient of a scalar function of the array x, by 4th-order differences."""
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        values = []
        for k in (-2, -1, 1, 2):
            x[i] = kept + k * h
            values.append(function())
        x[i] = kept
        gradient[i] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    return gradient


def assert_gradient(computed, function, x):
    expected = numerical_gradient(function, x)
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def linear(rng, bias):
    return mlp.Linear(4, 3, rng=rng, std=1.0, bias=bias, dtype=np.float64)


LAYERS = {
    "linear": lambda rng: linear(rng, True),
    "linear without bias": lambda rng: linear(rng, False),
    "sigmoid": lambda rng: mlp.Sigmoid(),
    "relu": lambda rng: mlp.ReLU(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients(name, rng):
    layer = LAYERS[name](rng)
    # Away from 0, where ReLU has no derivative.
    x = rng.choice([-1.0, 1.0], (6, 4)) * rng.uniform(0.1, 2.0, (6, 4))
    dout = rng.normal(size=layer.forward(x).shape)

    def function():
        return np.sum(dout * layer.forward(x))

    layer.forward(x)
    assert_gradient(layer.backward(dout), function, x)
    assert layer.grads.keys() == layer.params.keys()
    for key, param in layer.params.items():
        assert_gradient(layer.grads[key], function, param)


def test_loss_gradient(rng):
    loss = mlp.SoftmaxCrossEntropy()
    logits, labels = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    loss.forward(logits, labels)
    assert_gradient(loss.backward(), lambda: loss.forward(logits, labels), logits)


def test_network_gradients_through_batch_norm(rng):
    network = mlp.MLP(
        [
            mlp.Linear(4, 5, rng=rng, std=1.0, bias=False, dtype=np.float64),
            bn_cy.BatchNorm(5, dtype=np.float64),
            mlp.Sigmoid(),
            mlp.Linear(5, 3, rng=rng, std=1.0, dtype=np.float64),
        ]
    )
    loss = mlp.SoftmaxCrossEntropy()
    x, labels = rng.normal(size=(8, 4)), rng.integers(0, 3, 8)

    def function():
        return loss.forward(network.forward(x), labels)

    function()
    dx = network.backward(loss.backward())
    grads = [{key: grad.copy() for key, grad in layer.grads.items()} for layer in network.layers]
    assert_gradient(dx, function, x)
    for layer, layer_grads in zip(network.layers, grads, strict=True):
        assert layer_grads.keys() == layer.params.keys()
        for key, param in layer.params.items():
            assert_gradient(layer_grads[key], function, param)


def test_activations_follow_their_formulas(rng):
    x = rng.normal(size=(6, 4))
    np.testing.assert_allclose(mlp.Sigmoid().forward(x), 1 / (1 + np.exp(-x)), rtol=1e-14)
    np.testing.assert_array_equal(mlp.ReLU().forward(x), np.maximum(x, 0))


def test_extreme_inputs_stay_finite():
    sigmoid, loss = mlp.Sigmoid(), mlp.SoftmaxCrossEntropy()
    np.testing.assert_array_equal(sigmoid.forward(np.float32([-1e30, 0, 1e30])), [0, 0.5, 1])
    logits = np.float32([[1e30, 0], [0, -1e30]])
    assert loss.forward(logits, np.array([0, 0])) == 0
    assert np.isfinite(loss.backward()).all()


def test_sgd_follows_the_formula(rng):
    network = mlp.MLP([linear(rng, True), linear(rng, True)])
    optimizer = mlp.SGD(network, rate=0.3, momentum=0.8)
    slots = [(layer, key) for layer in network.layers for key in layer.params]
    expected = [layer.params[key].copy() for layer, key in slots]
    velocity = [np.zeros_like(param) for param in expected]
    for _ in range(4):
        for i, (layer, key) in enumerate(slots):
            grad = layer.grads[key] = rng.normal(size=expected[i].shape)
            velocity[i] = 0.8 * velocity[i] - 0.3 * grad
            expected[i] = expected[i] + velocity[i]
        optimizer.step()
    for (layer, key), param in zip(slots, expected, strict=True):
        np.testing.assert_allclose(layer.params[key], param, rtol=1e-13, atol=1e-13)


def test_network_stays_float32_and_switches_modes(rng):
    batch_norm = bn_cy.BatchNorm(5)
    layers = [mlp.Linear(4, 5, rng=rng, std=1.0, bias=False), batch_norm, mlp.ReLU()]
    network, loss = (
        mlp.MLP([*layers, mlp.Linear(5, 3, rng=rng, std=1.0)]),
        mlp.SoftmaxCrossEntropy(),
    )
    x, labels = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 3, 8)
    mlp.train_step(network, loss, mlp.SGD(network, 0.1), x, labels)
    assert network.forward(x).dtype == np.float32
    assert network.backward(loss.backward()).dtype == np.float32
    assert {p.dtype for layer in network.layers for p in layer.params.values()} == {x.dtype}
    network.eval()
    assert not batch_norm.training
    network.train()
    assert batch_norm.training


# --- train_digits.py ----------------------------------------------------------------------


@pytest.fixture
def train_digits():
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    import train_digits

    return train_digits


def command(*arguments):
    return [sys.executable, "-W", "error::RuntimeWarning", str(SCRIPT), *arguments]


def run(*arguments, cwd):
    return subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, encoding="utf-8", timeout=60
    )


def assert_png(path):
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    assert content.endswith(PNG_END)


def test_both_networks_start_from_the_same_weights(train_digits):
    def weights(batch_norm, seed):
        network = train_digits.build_network([4, 6, 5, 3], batch_norm, seed)
        return [layer.params["weight"] for layer in network.layers if "weight" in layer.params]

    for plain, normalized, other in zip(
        weights(False, 3), weights(True, 3), weights(True, 4), strict=True
    ):
        np.testing.assert_array_equal(plain, normalized)
        assert not np.array_equal(normalized, other)


def test_a_linear_before_batch_norm_has_no_bias(train_digits):
    plain, normalized = (train_digits.build_network([4, 6, 5, 3], bn, 0) for bn in (False, True))
    assert [sorted(layer.params) for layer in plain.layers if layer.params] == [
        ["bias", "weight"]
    ] * 3
    assert [sorted(layer.params) for layer in normalized.layers if layer.params] == [
        ["weight"], ["beta", "gamma"], ["weight"], ["beta", "gamma"], ["bias", "weight"]
    ]  # fmt: skip


def test_table_names_what_trains_and_what_is_best(train_digits, capsys):
    def run(rate, seed, *accuracies):
        rows = [(10 * i, accuracy, -1.0, 0.0, 1.0) for i, accuracy in enumerate(accuracies)]
        return train_digits.Run(True, rate, seed, rows)

    runs = [
        run(0.1, 0, 0.1, 0.5, 0.9), run(0.1, 1, 0.1, 0.8, 0.95),  # both reach 90 % at step 20
        run(0.5, 0, 0.1, 0.9, 0.92), run(0.5, 1, 0.1, 0.7, 0.98),  # at 10 and 20: the best
        run(2.0, 0, 0.1, 0.99, 0.99), run(2.0, 1, 0.1, 0.1, 0.1),  # only one does
    ]  # fmt: skip
    summaries = train_digits.summarize([runs])
    assert [s.trains for s in summaries.values()] == [True, True, False]
    assert train_digits.best(summaries, True).rate == 0.5
    train_digits.print_table(summaries, steps=20)
    rows = [line.split()[4:] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [" ".join(row) for row in rows] == [
        "2 92.5 ± 2.5 20 ± 0 0.00",
        "2 95.0 ± 3.0 15 ± 5 0.00",
        "2 54.5 ± 44.5 10 (1 of 2) 0.00",
    ]


def test_batches_use_every_image_once_an_epoch(train_digits):
    batches = train_digits.batches(12, 4, seed=0)
    epochs = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(*epochs)


@pytest.mark.usefixtures("train_digits")
def test_tiny_run_prints_a_table_and_draws(tmp_path):
    done = run(*TINY, "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  0.1")]
    assert [row[1] for row in rows] == ["without", "with"]
    assert all(0 <= float(row[5]) <= 100 for row in rows)
    assert done.stdout.endswith("Picture: train_digits.png\n")
    assert_png(tmp_path / "train_digits.png")


def interrupted(command, folder):
    """Send a command Ctrl-C when there is something to draw; return its output."""
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    with process:
        # The progress bar names the accuracy as soon as there is something to draw.
        shown = ""
        while "with batch norm" not in shown:
            character = process.stderr.read(1)
            assert character, shown
            shown += character
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    return stdout


@pytest.mark.usefixtures("train_digits")
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send")
def test_interrupt_keeps_and_draws_what_is_done(tmp_path):
    stdout = interrupted(command("--steps", "1000000", "--output", "cut.png"), tmp_path)
    assert "Cut off by Ctrl-C: the first of 25 pairs" in stdout
    assert_png(tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "-5"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--seeds", "0"], "--seeds"),
        (["--rates"], "--rates"),
        (["--rates", "0.1", "0"], "--rates"),
        (["--rates", "nan"], "--rates"),
        (["--rates", "inf"], "--rates"),
        (["--batch-size", "1"], "--batch-size"),
        (["--batch-size", "1348"], "--batch-size"),
        (["--hidden", "100", "0"], "--hidden"),
        (["--output", "picture.pdf"], "--output"),
        (["--output", os.path.join("missing", "picture.png")], "missing"),
        (["--output", "."], "--output"),
        (["--wrong"], "--wrong"),
    ],
)
def test_bad_arguments_get_one_line(train_digits, arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_digits.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert word in err
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_named_in_one_line(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')\n")
    done = subprocess.run(
        command(*TINY),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == 'train_digits.py needs matplotlib: pip install ".[examples]"\n'

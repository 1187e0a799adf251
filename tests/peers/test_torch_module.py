"""`bn_cy.torch` beside PyTorch's own batch norm, and what PyTorch does to any module.

PyTorch's own tests bring inputs for its modules (module_db) and its function (op_db): these are
run, too.
"""

import copy
import doctest
import io
import pickle
import sys
import weakref

import exact
import numpy as np
import pytest
from exact import error

import bn_cy

torch = pytest.importorskip("torch")

# These import expecttest, which PyTorch's own tests want.
from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

import bn_cy.torch  # noqa: E402

nn = torch.nn
TWINS = {
    nn.BatchNorm1d: bn_cy.torch.BatchNorm1d,
    nn.BatchNorm2d: bn_cy.torch.BatchNorm2d,
    nn.BatchNorm3d: bn_cy.torch.BatchNorm3d,
}
SHAPES = {
    nn.BatchNorm1d: [(20, 6), (5, 6, 9)],
    nn.BatchNorm2d: [(4, 6, 5, 3)],
    nn.BatchNorm3d: [(4, 6, 5, 3, 2)],
}
CASES = [(cls, shape) for cls, shapes in SHAPES.items() for shape in shapes]
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 1.0},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"eps": 0.1, "dtype": torch.float64},
]
compiled = pytest.mark.filterwarnings("default::DeprecationWarning")  # PyTorch's, of torch.jit


def batch(rng, shape, dtype=np.float32):
    """Return a random x and dout as tensors."""
    x = 3 * exact.ordinary(rng, shape, dtype=dtype) + 1
    return torch.tensor(x), torch.tensor(rng.standard_normal(shape).astype(dtype))


def twins(rng, cls, **options):
    """Return a module of PyTorch with random parameters, and ours with its state."""
    theirs = cls(6, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(rng.uniform(0.5, 2, 6)))
    ours = TWINS[cls](6, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(module, x, dout):
    """Return y, dx and the gradients of the parameters."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dout)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def assert_same_state(ours, theirs):
    """Assert that the states have the same keys, dtypes and nearly the same values."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours.state_dict(), theirs.state_dict())


# The numbers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("cls", "shape"), CASES)
def test_steps_and_state_are_those_of_pytorch(rng, cls, shape, options):
    theirs, ours = twins(rng, cls, **options)
    dtype = np.float64 if options.get("dtype") else np.float32
    for training in (True, True, False, True, False):
        theirs.train(training)
        ours.train(training)
        x, dout = batch(rng, shape, dtype)
        assert_close(step(ours, x, dout), step(theirs, x, dout))
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_results_have_the_bits_of_the_layer(rng, training, dtype):
    module = bn_cy.torch.BatchNorm(64, dtype=dtype).train(training)
    layer = bn_cy.BatchNorm(64, dtype=str(dtype).removeprefix("torch."))
    layer.load_state_dict(module.state_dict())
    layer.train(training)
    x, dout = (1000 + tensor.to(dtype) for tensor in batch(rng, (50, 64, 7)))
    y, dx, dgamma, dbeta = step(module, x, dout)
    assert np.array_equal(y, layer(x.numpy()))
    assert np.array_equal(dx, layer.backward(dout.numpy()))
    assert np.array_equal(dgamma, layer.dgamma)
    assert np.array_equal(dbeta, layer.dbeta)


def test_a_mean_far_from_zero_costs_no_digits(rng):
    x = torch.tensor(exact.ordinary(rng, (2000, 6)) + 10000)
    y = bn_cy.torch.BatchNorm(6)(x).detach()
    assert error(y, exact.forward(x)) <= 2e-7


def test_running_statistics_are_rounded_once(rng):
    x, _ = batch(rng, (50, 6))
    module = bn_cy.torch.BatchNorm(6, momentum=0.3)
    module(x)
    count, mean, var = bn_cy.moments(x)
    momentum, kept = np.longdouble(0.3), 1 - np.longdouble(0.3)
    assert np.array_equal(module.running_mean, (momentum * mean).astype(np.float32))
    unbiased = kept + momentum * var * count / (count - 1)
    assert np.array_equal(module.running_var, unbiased.astype(np.float32))


def test_the_first_of_batches_that_weigh_alike_forgets_the_initial_values(rng):
    x = torch.tensor(exact.ordinary(rng, (50, 6))) * 1e-9
    module = bn_cy.torch.BatchNorm(6, momentum=None)
    module(x)
    count, mean, var = exact.statistics(x)
    assert error(module.running_mean, mean) <= 1e-7
    assert error(module.running_var, var * count / (count - 1)) <= 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_finite_are_as_in_pytorch(rng, value):
    theirs, ours = twins(rng, nn.BatchNorm1d)
    x, _ = batch(rng, (20, 6))
    x[3, 2] = value
    y, expected = ours(x).detach(), theirs(x).detach()
    others = [0, 1, 3, 4, 5]
    assert_close(y[:, others], expected[:, others])
    if not np.isfinite(value):
        assert y[:, 2].isnan().all() and expected[:, 2].isnan().all()
    assert ours.running_var[2].isfinite() == theirs.running_var[2].isfinite()
    assert ours.num_batches_tracked == 1


# Gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize(("cls", "shape"), CASES)
def test_gradcheck(rng, cls, shape, options, training):
    _, ours = twins(rng, cls, dtype=torch.float64, **options)
    ours.train(training)
    x, _ = batch(rng, (3, *shape[1:]), np.float64)
    x.requires_grad_()

    def function(x, *values):
        names = [name for name, _ in ours.named_parameters()]
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *ours.parameters()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight and bias", "x and bias"])
def test_gradients_of_some_alone(rng, wanted, training):
    theirs, ours = twins(rng, nn.BatchNorm1d)
    x, dout = batch(rng, (20, 6))
    found = []
    for module in (ours, theirs):
        module.train(training)
        inputs = {"x": x.clone(), "weight": module.weight, "bias": module.bias}
        for name, tensor in inputs.items():
            tensor.requires_grad_(name in wanted)
        y = module(inputs["x"])
        y.backward(dout)
        assert [tensor.grad is not None for tensor in inputs.values()] == [
            name in wanted for name in inputs
        ]
        found.append([tensor.grad for tensor in inputs.values() if tensor.grad is not None])
    assert_close(*found)


def test_parameters_of_another_dtype_than_the_input(rng):
    ours = bn_cy.torch.BatchNorm(6)
    x, dout = batch(rng, (20, 6), np.float64)
    y, dx, dgamma, dbeta = step(ours, x, dout)
    assert y.dtype == dx.dtype == torch.float64
    assert dgamma.dtype == dbeta.dtype == torch.float32
    assert error(y, exact.forward(x)) <= 1e-14
    assert error(dgamma, exact.backward(dout, x)[1]) <= 2e-7


def test_a_gradient_that_is_expanded(rng):
    theirs, ours = twins(rng, nn.BatchNorm2d)
    x, _ = batch(rng, (4, 6, 5, 3))
    weight = torch.tensor(rng.standard_normal((1, 6, 1, 1), np.float32)).expand(4, 6, 5, 3)
    assert_close(step(ours, x, weight), step(theirs, x, weight))


def test_a_second_derivative_is_refused_by_name(rng):
    ours = bn_cy.torch.BatchNorm(6, dtype=torch.float64)
    x, _ = batch(rng, (20, 6), np.float64)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ours(x).pow(3).sum(), x, create_graph=True)
    assert_close(dx, torch.autograd.grad(ours(x).pow(3).sum(), x)[0])
    with pytest.raises(NotImplementedError, match=r"bn_cy\.torch has no second derivative"):
        dx.sum().backward()


def test_a_second_derivative_through_x_alone_is_refused_too(rng):
    ours = bn_cy.torch.BatchNorm(6, affine=False)
    x, dout = batch(rng, (20, 6))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ours(x), x, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dx.sum().backward()


def test_transforms_of_torch_func_are_refused_by_name(rng):
    x, _ = batch(rng, (20, 6))

    def loss(x):
        return bn_cy.torch.batch_norm(x, None, None, training=True).sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(loss)(x)


def test_an_input_that_was_changed_in_place_is_noticed(rng):
    x, dout = batch(rng, (20, 6))
    x = x.requires_grad_() * 1
    y = bn_cy.torch.BatchNorm(6)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dout)


def test_a_graph_serves_two_backwards_where_it_is_retained(rng):
    ours = bn_cy.torch.BatchNorm(6)
    x, dout = batch(rng, (20, 6))
    x.requires_grad_()
    y = ours(x)
    y.backward(dout, retain_graph=True)
    once = x.grad.clone()
    y.backward(dout)
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dout)


def test_a_graph_lets_the_batch_go_after_its_backward(rng):
    memory = exact.ordinary(rng, (2000, 64))
    held = weakref.ref(memory)
    y = bn_cy.torch.BatchNorm(64)(torch.from_numpy(memory))
    del memory
    assert held() is not None
    y.backward(torch.ones_like(y))
    assert held() is None
    assert y.grad_fn is not None


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing(rng, training):
    theirs, ours = twins(rng, nn.BatchNorm1d)
    x, dout = batch(rng, (20, 6))
    found = []
    for module in (ours, theirs):
        module.train(training)
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=False)
        y.backward(dout)
        found.append([y, leaf.grad, module.weight.grad, module.bias.grad])
    assert_close(*found)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_counts_as_pytorch_does(rng, momentum):
    """The forward that is computed again ends by an exception, once all tensors are saved."""
    x, dout = batch(rng, (20, 6))
    states = []
    for module in twins(rng, nn.BatchNorm1d, momentum=momentum):
        for k in range(3):
            leaf = (x + k).requires_grad_()
            torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=False).backward(dout)
        states.append(module.state_dict())
    theirs, ours = states
    assert ours["num_batches_tracked"] == theirs["num_batches_tracked"]
    for name in ("running_mean", "running_var"):
        assert_close([ours[name]], [theirs[name]])


def test_a_refused_batch_is_not_counted(rng):
    module = bn_cy.torch.BatchNorm1d(5)
    for x in (torch.ones(4, 3), torch.ones(1, 5), torch.ones(4, 5, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError)):
            module(x)
    assert module.num_batches_tracked == 0
    assert not module.running_mean.any()


@compiled
def test_forward_derivatives_are_refused_with_and_without_gradients(rng):
    x, tangent = batch(rng, (20, 6))
    module = bn_cy.torch.BatchNorm1d(6)
    for grad in (True, False):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            with pytest.raises(NotImplementedError):
                module(dual)


def test_saved_tensors_that_hooks_copy(rng):
    ours = bn_cy.torch.BatchNorm(6)
    x, dout = batch(rng, (20, 6))
    expected = step(ours, x, dout)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.tensor):
        found = step(ours, x, dout)
    assert_close(found, expected)


# Memory


def tensors_of(x):
    """Yield x in all the ways that tensors lie in memory, with whether it is dense."""
    yield x, True
    yield x.to(memory_format=torch.channels_last), True
    yield x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3), True
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield wide[..., ::2], False
    yield x[:1].expand(4, -1, -1, -1), False


def test_every_memory_format_is_kept(rng):
    x, _ = batch(rng, (4, 6, 5, 3))
    for tensor, dense in tensors_of(x):
        theirs, ours = twins(rng, nn.BatchNorm2d)
        _, dout = batch(rng, (4, 6, 5, 3))
        found = step(ours, tensor, dout)
        assert_close(found, step(theirs, tensor, dout))
        if dense:
            assert found[0].stride() == found[1].stride() == tensor.stride()


def test_no_copy_of_x_is_made(rng):
    x, _ = batch(rng, (4, 6, 5, 3))
    for tensor, dense in tensors_of(x):
        if dense:
            y = bn_cy.torch.BatchNorm2d(6)(tensor.requires_grad_())
            cache = y.grad_fn.saved_tensors[-1].cache
            arrays = exact.arrays_within(cache)
            assert any(np.shares_memory(held, tensor.detach().numpy()) for held in arrays)


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4, 4), (3, 6, 0, 2)])
def test_an_empty_batch(rng, shape):
    cls = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    theirs, ours = twins(rng, cls)
    x, dout = batch(rng, shape)
    y, dx, dgamma, dbeta = step(ours, x, dout)
    assert y.shape == dx.shape == shape
    assert not dgamma.any() and not dbeta.any()
    theirs(x)
    assert_same_state(ours, theirs)


# What is refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match=f"got {dtype}"):
        bn_cy.torch.BatchNorm(6)(torch.ones(4, 6).to(dtype))


def test_a_tensor_on_a_gpu_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = bn_cy.torch.BatchNorm(6)
    with FakeTensorMode(), pytest.raises(ValueError, match="on the CPU, got cuda:0"):
        module(torch.empty(4, 6, device="cuda:0"))


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1)])
def test_one_value_per_channel_is_refused_as_by_pytorch(shape):
    ours = bn_cy.torch.BatchNorm1d(6)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours_says:
        ours(torch.ones(shape))
    with pytest.raises(ValueError, match="more than 1 value per channel") as theirs_says:
        nn.BatchNorm1d(6)(torch.ones(shape))
    assert str(ours_says.value) == str(theirs_says.value)
    assert ours.num_batches_tracked == 0
    assert ours.eval()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("training", [True, False])
def test_another_number_of_channels_is_refused(training, channels, affine):
    ours = bn_cy.torch.BatchNorm(6, affine=affine).train(training)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"shape \((1|5),"):
        ours(torch.randn(4, channels))
    assert_close(ours.state_dict(), before)


@pytest.mark.parametrize("cls", TWINS.values())
def test_other_dimensions_are_refused_as_by_pytorch(cls):
    with pytest.raises(ValueError, match="expected"):
        cls(6)(torch.ones(2, 6, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="two dimensions"):
        bn_cy.torch.BatchNorm(6)(torch.ones(6))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_rows_of_other_dtypes_and_shapes_are_named(name, dtype, training):
    rows = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
    wrong = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f"^{name} must be of .*, got {dtype}$"):
        bn_cy.torch.batch_norm(torch.ones(4, 3), **rows | {name: wrong}, training=training)
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(3,\), .* got \(5,\)$"):
        bn_cy.torch.batch_norm(torch.ones(4, 3), **rows | {name: torch.ones(5)}, training=training)


def test_statistics_that_are_missing_are_refused():
    x, row = torch.randn(4, 6), torch.ones(6)
    with pytest.raises(ValueError, match="both be given"):
        bn_cy.torch.batch_norm(x, row, None, training=True)
    with pytest.raises(ValueError, match="must be given where training is False"):
        bn_cy.torch.batch_norm(x, None, None)


# What PyTorch does to modules


@pytest.mark.parametrize("training", [True, False])
def test_copies_and_pickles(rng, training):
    _, ours = twins(rng, nn.BatchNorm2d)
    x, dout = batch(rng, (4, 6, 5, 3))
    ours.train(training)
    ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    expected = None
    for other in (
        copy.deepcopy(ours),
        copy.copy(copy.deepcopy(ours)),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is bn_cy.torch.BatchNorm2d
        assert other.training == training
        found = step(other, x, dout)
        expected = expected or found
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_states_go_both_ways_through_a_file(rng, options):
    theirs, ours = twins(rng, nn.BatchNorm1d, **options)
    x, _ = batch(rng, (20, 6), np.float64 if options.get("dtype") else np.float32)
    ours(x)
    for source, target in ((ours, theirs), (theirs, ours)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
        assert_same_state(ours, theirs)
        assert repr(ours) == repr(theirs)


@compiled
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_torch_compile_keeps_it_and_its_bits(rng, options, memory_format):
    torch._dynamo.reset()
    _, eager = twins(rng, nn.BatchNorm2d, **options)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        eager.train(training)
        compiled.train(training)
        x, dout = (t.to(memory_format=memory_format) for t in batch(rng, (4, 6, 5, 3)))
        found, expected = step(compiled, x, dout), step(eager, x, dout)
        assert all(map(torch.equal, found, expected))
        assert found[0].stride() == expected[0].stride()
        assert all(map(torch.equal, module.state_dict().values(), eager.state_dict().values()))


@compiled
def test_torch_compile_with_the_default_backend(rng):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 6), bn_cy.torch.BatchNorm1d(6), nn.ReLU())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    x, _ = batch(rng, (20, 5))
    dout = torch.tensor(rng.standard_normal((20, 6), np.float32))
    assert_close(step(compiled, x, dout), step(model, x, dout))
    assert_close(compiled._orig_mod.state_dict(), model.state_dict())


@compiled
@pytest.mark.parametrize("gaps", [False, True])
def test_operators_are_sound(rng, gaps):
    ops = torch.ops.bn_cy
    x = torch.tensor(rng.standard_normal((4, 10, 6), np.float32)).transpose(1, 2)
    x = (x[..., ::2] if gaps else x).requires_grad_()
    rows = [torch.tensor(rng.uniform(0.5, 2, 6).astype(np.float32)) for _ in range(4)]
    weight, bias = (row.requires_grad_() for row in rows[2:])
    for given in ((None, None), rows[:2]):
        torch.library.opcheck(ops.batch_norm.default, (x, *given, weight, bias, 1e-5))
    mean, var = (row.double() for row in rows[:2])
    torch.library.opcheck(ops.track.default, (*rows[:2], mean, var, 20, 0.1))
    dout = torch.ones_like(x)
    for frozen in (True, False):
        arguments = (dout, x.detach(), weight.detach(), mean, var, 1e-5, frozen)
        torch.library.opcheck(ops.batch_norm_backward.default, arguments)


@compiled
def test_export(rng):
    model = nn.Sequential(nn.Linear(5, 6), bn_cy.torch.BatchNorm1d(6)).eval()
    x, _ = batch(rng, (20, 5))
    program = torch.export.export(model, (x,))
    assert "bn_cy.batch_norm" in program.graph_module.code
    assert torch.equal(program.module()(x), model(x))


def test_meta_tensors_have_shapes_alone():
    module = bn_cy.torch.BatchNorm2d(6, device="meta")
    y = module(torch.empty(4, 6, 5, 3, device="meta").to(memory_format=torch.channels_last))
    assert y.shape == (4, 6, 5, 3)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("module", ["modules", "exchange"])
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(sys.modules[f"bn_cy.torch.{module}"])
    assert failed == 0 < attempted


# replace


class Network(nn.Module):
    """One with a batch norm that is used twice, one in a list, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.again = self.first[1]
        self.rows = nn.ModuleList([nn.BatchNorm1d(6), nn.Identity()])
        self.frozen = nn.BatchNorm3d(6, affine=False).eval()

    def forward(self, x):
        x = self.again(self.first(x)).relu()
        x = self.frozen(x[..., None])[..., 0]
        return self.rows[0](x.mean(dim=(2, 3)))


def test_replace_keeps_all_but_the_computation(rng):
    theirs = Network()
    ours = copy.deepcopy(theirs)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    parameters = [id(parameter) for parameter in ours.parameters()]
    buffers = [id(buffer) for buffer in ours.buffers()]
    seen = []
    ours.again.register_forward_hook(lambda module, *_: seen.append(module))
    assert bn_cy.torch.replace(ours) is ours
    assert [type(m).__name__ for m in ours.modules()] == [
        type(m).__name__ for m in theirs.modules()
    ]
    norms = [m for m in ours.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == 3 and all(isinstance(m, bn_cy.torch.BatchNorm) for m in norms)
    assert ours.again is ours.first[1]
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]
    assert [id(parameter) for parameter in ours.parameters()] == parameters
    assert [id(buffer) for buffer in ours.buffers()] == buffers
    for _ in range(3):
        x = torch.tensor(rng.standard_normal((8, 3, 7, 7), np.float32))
        dout = torch.tensor(rng.standard_normal((8, 6), np.float32))
        for model, steps in ((ours, optimizer), (theirs, reference)):
            steps.zero_grad()
            model(x).backward(dout)
            steps.step()
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    assert seen == [ours.again] * 6
    assert bn_cy.torch.replace(ours) is ours


@pytest.mark.parametrize("cls", TWINS)
def test_replace_of_one_alone(cls):
    module = cls(6)
    replaced = bn_cy.torch.replace(module)
    assert type(replaced) is TWINS[cls]
    assert isinstance(replaced, cls)


class Own(nn.BatchNorm2d):
    """A subclass, which might compute anything."""


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.LazyBatchNorm2d(), r"model\.1 .*LazyBatchNorm2d.* run a batch"),
        (lambda: Own(6), r"model\.1 .*Own"),
    ],
)
def test_replace_names_what_it_leaves(make, named):
    model = nn.Sequential(nn.BatchNorm1d(6), make())
    with pytest.raises(TypeError, match=named):
        bn_cy.torch.replace(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_lazy_one_that_has_seen_a_batch_is_replaced():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(4, 6))
    assert type(bn_cy.torch.replace(model)[0]) is bn_cy.torch.BatchNorm1d


# What PyTorch tests its own with


def cases_of_modules():
    """Yield PyTorch's own inputs of its batch norm modules."""
    for info in module_db:
        if info.module_cls not in TWINS:
            continue
        for dtype in info.dtypes:
            if dtype not in (torch.float32, torch.float64):
                continue
            for training in (True, False):
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=True, training=training
                )
                for k, given in enumerate(inputs):
                    name = f"{info.name}-{given.desc or k}-{dtype}-{training}".replace("torch.", "")
                    yield pytest.param(info.module_cls, given, dtype, training, id=name)


@pytest.mark.parametrize(("cls", "given", "dtype", "training"), list(cases_of_modules()))
def test_inputs_of_the_tests_of_modules(cls, given, dtype, training):
    made = given.constructor_input
    theirs, ours = (c(*made.args, **made.kwargs, dtype=dtype) for c in (cls, TWINS[cls]))
    theirs.train(training)
    ours.train(training)
    (x,) = given.forward_input.args
    dout = torch.randn(x.shape, dtype=dtype)
    assert_close(step(ours, x, dout), step(theirs, x, dout))
    assert_same_state(ours, theirs)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(ours, (x,))


def test_errors_of_the_tests_of_modules():
    infos = [info for info in module_db if info.module_cls in TWINS]
    assert len(infos) == 3
    for info in infos:
        for wrong in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            given = wrong.module_error_input
            made = given.constructor_input
            module = TWINS[info.module_cls](*made.args, **made.kwargs)
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                module(*given.forward_input.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_the_tests_of_the_function(dtype):
    info = next(info for info in op_db if info.name == "nn.functional.batch_norm")
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.input.dim() < 2:
            continue  # PyTorch lets an empty tensor without channels pass
        found = []
        for function in (bn_cy.torch.batch_norm, nn.functional.batch_norm):
            x = sample.input.detach().requires_grad_()
            rows = [None if a is None else a.detach().clone() for a in sample.args]
            for row in rows[2:]:
                if row is not None:
                    row.requires_grad_()
            y = function(x, *rows, **sample.kwargs)
            torch.manual_seed(count)
            y.backward(torch.randn_like(y))
            found.append([y, x.grad, *rows, *(row.grad for row in rows[2:] if row is not None)])
        assert_close(*found, equal_nan=True)
        count += 1
    assert count >= 7

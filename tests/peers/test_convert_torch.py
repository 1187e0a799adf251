"""`convert.from_torch` beside the modules of PyTorch that it takes."""

import copy

import exact
import numpy as np
import pytest
from exact import error

from bn_cy import convert

torch = pytest.importorskip("torch")

SHAPE = (4, 6, 5, 3)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def trained(rng, dtype=torch.float64, **options):
    """Return a module with random parameters and the statistics of a batch."""
    torch.manual_seed(int(rng.integers(2**32)))
    module = torch.nn.BatchNorm2d(6, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module(torch.randn(SHAPE))
    return module.to(dtype)


def compare(rng, layer, module):
    """Assert that both evaluate alike, train alike, and then evaluate alike again."""
    layer, module = copy.deepcopy(layer), copy.deepcopy(module).double()
    assert (layer.eps, layer.momentum) == (module.eps, module.momentum)
    for training in (False, True, False):
        layer.train(training)
        module.train(training)
        x = exact.ordinary(rng, SHAPE, dtype=np.float64)
        assert error(layer(x), module(torch.tensor(x)).detach().numpy()) <= 1e-11
    assert layer.state_dict().keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert error(layer.state_dict()[key], value.numpy()) <= 1e-11


@pytest.mark.parametrize(
    ("affine", "track_running_stats"), [(True, True), (True, False), (False, True)]
)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_modules(rng, training, momentum, affine, track_running_stats):
    form = {"affine": affine, "track_running_stats": track_running_stats}
    module = trained(rng, eps=1e-2, momentum=momentum, **form).train(training)
    layer = convert.from_torch(module)
    assert layer.training == training
    compare(rng, layer, module)


def test_a_module_that_has_nothing_does_not_say_how_many_features():
    module = torch.nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    with pytest.raises(KeyError, match="missing"):
        convert.from_torch(module)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoints_of_networks(rng, dtype, tmp_path):
    module = trained(rng, dtype)
    layers = [torch.nn.Conv2d(6, 6, 3), module, torch.nn.InstanceNorm2d(6, affine=True)]
    network = torch.nn.ModuleDict({"features": torch.nn.Sequential(*layers)})
    torch.save(network.state_dict(), tmp_path / "checkpoint.pt")
    for source in (network, torch.load(tmp_path / "checkpoint.pt")):
        layer = convert.from_torch(source, prefix="features.1.")
        assert layer.dtype == (np.float64 if dtype == torch.float64 else np.float32)
        compare(rng, layer, module)
    with pytest.raises(TypeError, match="got InstanceNorm2d"):
        convert.from_torch(network, prefix="features.2.")
    with pytest.raises(AttributeError, match="9"):
        convert.from_torch(network, prefix="features.9.")


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
def test_kinds_of_batch_norm(kind):
    assert convert.from_torch(getattr(torch.nn, kind)(6)).num_features == 6

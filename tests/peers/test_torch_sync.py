"""`bn_cy.torch.SyncBatchNorm`: processes over gloo against one layer on the whole batch.

Each test starts its processes on this machine. They find each other by a file, and none outlives
the timeout, whatever it waits for.
"""

import copy
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bn_cy.torch  # noqa: E402

nn = torch.nn
SECONDS = 120  # for all processes of a test; it is spent on imports

START = """
import datetime, os, sys
import numpy as np
import torch
import torch.distributed as dist
import bn_cy.torch

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", f"file://{folder}/meeting", rank=rank, world_size=size,
    timeout=datetime.timedelta(seconds=60),
)
problems = torch.load(f"{folder}/problems.pt")
data = problems[0]

def shard(tensor, rows=data["rows"]):
    stops = [0, *np.cumsum(rows)]
    return tensor[stops[rank] : stops[rank + 1]].clone()

def step(module, x, dout):
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dout)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]

def give(results):
    torch.save(results, f"{folder}/{rank}.pt")
"""

# Together, and at once: PyTorch's threads of a group may end a process that cleans up at its exit.
END = """
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


@pytest.fixture
def processes(tmp_path):
    """Return a function that runs a program in some processes, and returns what each of them gives.

    Those that are still there after a time are ended, and the test fails.
    """

    def run(program, *problems):
        torch.save(problems, tmp_path / "problems.pt")
        size = len(problems[0]["rows"])
        (tmp_path / "meeting").unlink(missing_ok=True)
        file = tmp_path / "program.py"
        file.write_text(f"{START}\n{textwrap.dedent(program)}\n{END}")
        started = [
            subprocess.Popen(
                [sys.executable, file, str(rank), str(size), tmp_path],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=SECONDS)[0] for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert [process.returncode for process in started] == [0] * size, "\n".join(said)
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(size)]

    return run


def state_of(rng, features, dtype):
    """Return a state with random parameters."""
    module = bn_cy.torch.BatchNorm(features, dtype=dtype)
    for parameter in module.parameters():
        parameter.data[:] = torch.tensor(rng.uniform(0.5, 2, features))
    return module.state_dict()


def problem(rng, rows, dtype=torch.float64, spatial=(), momentum=0.1):
    """Return the data of a test: a state, two batches of some rows a rank, and their gradients."""
    shape = (2, sum(rows), 6, *spatial)
    x, dout = (torch.tensor(rng.standard_normal(shape)).to(dtype) for _ in range(2))
    state = state_of(rng, 6, dtype)
    return {"rows": rows, "x": 3 * x + 1, "dout": dout, "state": state, "momentum": momentum}


STEPS = """
found = []
for data in problems:
    module = bn_cy.torch.SyncBatchNorm(6, momentum=data["momentum"], dtype=data["x"].dtype)
    module.load_state_dict(data["state"])
    results = []
    for x, dout in zip(data["x"], data["dout"]):
        module.zero_grad()
        x, dout = (shard(tensor, data["rows"]) for tensor in (x, dout))
        results.append([tensor.clone() for tensor in step(module, x, dout)])
    found.append((results, module.state_dict()))
give(found)
"""


def close(actual, expected, tolerance):
    """Tell whether the L2 error of a tensor is small."""
    return torch.linalg.norm(actual - expected) <= tolerance * torch.linalg.norm(expected)


SHARDS = [[[5, 8], [1, 2], [0, 9]], [[7, 2, 4], [3, 0, 1], [0, 0, 5]]]


@pytest.mark.parametrize("shards", SHARDS, ids=["two", "three"])
def test_processes_against_the_whole_batch(rng, processes, shards):
    problems = [problem(rng, rows, momentum=m) for rows in shards for m in (0.1, None)]
    found = processes(STEPS, *problems)
    for data, *of_ranks in zip(problems, *found, strict=True):
        whole = bn_cy.torch.BatchNorm(6, momentum=data["momentum"], dtype=torch.float64)
        whole.load_state_dict(data["state"])
        for k, (x, dout) in enumerate(zip(data["x"], data["dout"], strict=True)):
            x = x.clone().requires_grad_()
            whole.zero_grad()
            y = whole(x)
            y.backward(dout)
            results = [results[k] for results, _ in of_ranks]
            assert close(torch.cat([y for y, *_ in results]), y.detach(), 1e-12)
            assert close(torch.cat([dx for _, dx, *_ in results]), x.grad, 1e-12)
            for j, parameter in enumerate(whole.parameters()):
                assert close(sum(result[2 + j] for result in results), parameter.grad, 1e-12)
        for _, state in of_ranks:
            assert all(torch.equal(state[key], of_ranks[0][1][key]) for key in state)
            for key, value in whole.state_dict().items():
                assert close(state[key].double(), value.double(), 1e-12), key


def test_a_run_repeats_bit_for_bit(rng, processes):
    problems = [problem(rng, [7, 2, 4], dtype, (3, 4)) for dtype in (torch.float32, torch.float64)]
    first, second = (processes(STEPS, *problems) for _ in range(2))
    for of_rank, again in zip(first, second, strict=True):
        for (results, state), (results_again, state_again) in zip(of_rank, again, strict=True):
            for once, twice in zip(results, results_again, strict=True):
                assert all(map(torch.equal, once, twice))
            assert all(map(torch.equal, state.values(), state_again.values()))


def test_parts_far_apart_and_far_from_zero(rng, processes):
    data = problem(rng, [40, 60], momentum=1.0)
    data["x"] += 1e6 * torch.tensor(rng.standard_normal(6))
    data["x"][:, :40] += 1000
    x = data["x"][1].numpy().astype(np.longdouble)
    for ((_, state),) in processes(STEPS, data):
        assert np.abs(state["running_mean"].numpy() / x.mean(axis=0) - 1).max() <= 1e-14
        assert np.abs(state["running_var"].numpy() / x.var(axis=0) * 99 / 100 - 1).max() <= 1e-9


def test_distributed_data_parallel(rng, processes):
    """Which averages the gradients over the processes: the whole batch's loss, divided by two."""
    program = """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(6, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ).double()
    bn_cy.torch.replace(model, sync=True)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, dout in zip(data["x"], data["dout"]):
        optimizer.zero_grad()
        (parallel(shard(x)) * shard(dout)[:, :1, 1:-1, 1:-1]).sum().backward()
        optimizer.step()
    give(model.state_dict())
    """
    data = problem(rng, [3, 5], spatial=(5, 4))
    found = processes(program, data)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double()
    bn_cy.torch.replace(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, dout in zip(data["x"], data["dout"], strict=True):
        optimizer.zero_grad()
        ((model(x) * dout[:, :1, 1:-1, 1:-1]).sum() / 2).backward()
        optimizer.step()
    for state in found:
        for key, value in model.state_dict().items():
            assert close(state[key].double(), value.double(), 1e-10), key


def test_eval_wants_nobody_else(rng, processes):
    program = """
    module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
    module.load_state_dict(data["state"])
    module.eval()
    calls = 3 if rank == 0 else 0
    give([step(module, data["x"][0], data["dout"][0]) for _ in range(calls)])
    """
    data = problem(rng, [4, 0])
    found = processes(program, data)
    whole = bn_cy.torch.BatchNorm(6, dtype=torch.float64).eval()
    whole.load_state_dict(data["state"])
    assert torch.equal(found[0][2][0], whole(data["x"][0]).detach())
    assert found[1] == []


def test_torch_compile_leaves_it_out_of_its_graphs(rng, processes):
    program = """
    module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager")
    x, dout = shard(data["x"][0]), shard(data["dout"][0])
    results = [step(compiled, x, dout) for _ in range(2)][1]
    nodes = torch._dynamo.explain(module)(x).op_count
    give((results, nodes))
    """
    data = problem(rng, [4, 3])
    found = processes(program, data)
    y = bn_cy.torch.BatchNorm(6, dtype=torch.float64)(data["x"][0]).detach()
    assert close(torch.cat([results[0] for results, _ in found]), y, 1e-12)
    assert all(nodes <= 1 for _, nodes in found)  # the count of batches, if any


def test_groups_are_apart(rng, processes):
    program = """
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    module = bn_cy.torch.SyncBatchNorm(6, process_group=groups[rank // 2], dtype=torch.float64)
    give(step(module, shard(data["x"][0]), shard(data["dout"][0])))
    """
    data = problem(rng, [4, 3, 5])
    found = processes(program, data)
    x = data["x"][0]
    for parts, ranks in ((x[:7], [0, 1]), (x[7:], [2])):
        y = bn_cy.torch.BatchNorm(6, dtype=torch.float64)(parts).detach()
        assert close(torch.cat([found[rank][0] for rank in ranks]), y, 1e-12)


def test_nobody_waits_in_a_backward_that_the_input_does_not_want(rng, processes):
    program = """
    module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
    y = module(shard(data["x"][0]))
    if rank == 0:
        y.backward(shard(data["dout"][0]))
    give([p.grad for p in module.parameters()])
    """
    found = processes(program, problem(rng, [4, 3]))
    assert all(gradient is not None for gradient in found[0])
    assert found[1] == [None, None]


def test_under_checkpointing(rng, processes):
    """Which computes the forward again in the backward, and gives each saved tensor out once."""
    program = """
    from torch.utils.checkpoint import checkpoint

    module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
    module.load_state_dict(data["state"])

    def again(x):
        return checkpoint(module, x, use_reentrant=False)

    again.parameters = module.parameters
    found = []
    for call in (module, again):
        module.zero_grad()
        results = step(call, shard(data["x"][0]), shard(data["dout"][0]))
        found.append([tensor.clone() for tensor in results])
    give(found)
    """
    for once, again in processes(program, problem(rng, [4, 3])):
        assert len(once) == 4
        assert all(map(torch.equal, once, again))


REFUSALS = [
    ("x = None if rank == 1 else x", TypeError, "input must be a tensor, got NoneType.*in rank 1"),
    ("x = x[:, :5] if rank == 1 else x", ValueError, "6 channels.*in rank 1"),
    ("x = x[:, 0] if rank == 1 else x", ValueError, "6 channels.*in rank 1"),
    ("x = x.half() if rank == 1 else x", TypeError, "got torch.float16.*in rank 1"),
    ("x = x.half() if rank == 0 else x[:, :5]", TypeError, "got torch.float16.*in rank 0"),
    ("x = x.float() if rank == 1 else x", TypeError, "got float64, float32"),
    ("x = x.requires_grad_(rank == 1)", ValueError, r"in the ranks \[1\] alone"),
    ("x = x[:1] if rank == 1 else x[:0]", ValueError, "more than 1 value per channel"),
    ("module.eps = 0.0 if rank == 1 else 1e-5", ValueError, "eps must be positive.*in rank 1"),
]


def test_what_is_wrong_in_one_process_is_raised_in_all(rng, processes):
    """And all can go on: the next batch is normalized."""
    program = f"""
    found = []
    for change in {[change for change, *_ in REFUSALS]}:
        module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
        names = dict(x=shard(data["x"][0]), module=module, rank=rank)
        exec(change, names)
        try:
            module(names["x"])
        except Exception as error:
            raised = error
        module.eps = 1e-5
        module(shard(data["x"][1]))
        found.append((type(raised), str(raised), int(module.num_batches_tracked)))
    give(found)
    """
    found = processes(program, problem(rng, [4, 3]))
    assert found[0] == found[1]
    for (_, kind, message), (raised, said, tracked) in zip(REFUSALS, found[0], strict=True):
        assert raised is kind
        assert re.search(message, said)
        assert tracked == 1


def test_an_input_that_was_changed_in_one_process_is_raised_in_all(rng, processes):
    program = """
    module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
    x = shard(data["x"][0]).requires_grad_() * 1
    y = module(x)
    if rank == 1:
        x.add_(1)
    try:
        y.backward(shard(data["dout"][0]))
    except RuntimeError as error:
        give(str(error))
    """
    found = processes(program, problem(rng, [4, 3]))
    assert found[0] == found[1]
    assert "modified by an inplace operation" in found[0]
    assert "in rank 1" in found[0]


def test_a_second_derivative_is_refused_by_name(rng, processes):
    program = """
    module = bn_cy.torch.SyncBatchNorm(6, dtype=torch.float64)
    x = shard(data["x"][0]).requires_grad_()
    try:
        torch.autograd.grad(module(x).sum(), x, create_graph=True)
    except NotImplementedError as error:
        give(str(error))
    """
    for said in processes(program, problem(rng, [4, 3])):
        assert "SyncBatchNorm has no second derivative" in said


# Without a group


def test_without_a_group_it_is_the_layer(rng):
    x = torch.tensor(rng.standard_normal((20, 6), np.float32), requires_grad=True)
    sync, alone = bn_cy.torch.SyncBatchNorm(6), bn_cy.torch.BatchNorm(6)
    for training in (True, False):
        assert torch.equal(sync.train(training)(x), alone.train(training)(x))
        assert all(map(torch.equal, sync.state_dict().values(), alone.state_dict().values()))


def test_it_has_the_arguments_of_pytorch_and_its_state():
    group = object()
    ours = bn_cy.torch.SyncBatchNorm(6, 0.1, None, False, True, group, "cpu", torch.float64)
    theirs = nn.SyncBatchNorm(6, 0.1, None, False, True, group, "cpu", torch.float64)
    assert repr(ours) == repr(theirs)
    assert ours.process_group is theirs.process_group
    ours.load_state_dict(theirs.state_dict())
    assert bn_cy.torch.SyncBatchNorm(6, bias=False).bias is None


def test_replace_makes_it():
    group = object()
    model = nn.Sequential(
        nn.BatchNorm1d(6), bn_cy.torch.BatchNorm2d(6), nn.SyncBatchNorm(6, process_group=group)
    )
    plain = bn_cy.torch.replace(copy.copy(nn.Sequential(*map(copy.copy, model))))
    assert [type(module).__name__ for module in plain] == [
        "BatchNorm1d",
        "BatchNorm2d",
        "SyncBatchNorm",
    ]
    other = object()
    bn_cy.torch.replace(model, sync=True, process_group=other)
    assert all(type(module) is bn_cy.torch.SyncBatchNorm for module in model)
    assert [module.process_group for module in model] == [other, other, group]
    bn_cy.torch.replace(model)
    assert type(model[0]) is bn_cy.torch.SyncBatchNorm
    assert copy.deepcopy(bn_cy.torch.SyncBatchNorm(6)).process_group is None

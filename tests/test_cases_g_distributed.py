"""Cases G1 to G3: DistributedDataParallel, sharded parameters, DataParallel's replicas; each in this process alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _compare import assert_path, assert_same, block, buffers, image, network, some_kernels, step, watched
from torch import nn

import fastres

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@distributed
@pytest.mark.filterwarnings("ignore:.*strides.*:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("option", ["static_graph", "broadcast_buffers", "gradient_as_bucket_view"])
def test_g1_distributed_data_parallel(process_group, option, when):
    """Swapped before or after wrapping. Buffers that are written in place, as broadcasts do, are seen."""
    models = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = block(stride=2)
        if fuse and when == "before":
            fastres.fuse_(model)
        model = nn.parallel.DistributedDataParallel(model, **{option: option != "broadcast_buffers"})
        if fuse and when == "after":
            fastres.fuse_(model)
        models.append(model)
    eager, fused = models
    for mode in ("train", "train", "inference"):
        x = image()
        with watched() as seen:
            got = step(fused, x, mode)
        assert_path(seen, "fast")
        assert_same(got, step(eager, x, mode))
    for model in models:
        with torch.no_grad():
            torch._foreach_mul_([b for b in model.buffers() if b.is_floating_point()], 1.5)
    assert_same(step(fused, x, "inference"), step(eager, x, "inference"))


def fully_sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@distributed
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("shard", [fully_sharded, fsdp1])
def test_g2_sharded_parameters(process_group, shard):
    """The parameters are gathered before the block runs: statistics, outputs and the next step are eager's."""
    models = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = block(stride=2)
        if fuse:
            fastres.fuse_(model)
        models.append((shard(model), []))
    x = image()
    for model, losses in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses.append(model(x).norm().item())
    assert models[1][1] == pytest.approx(models[0][1], rel=1e-4)
    assert_same(buffers(models[1][0]), buffers(models[0][0]))


@distributed
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_g2_swap_after_fully_shard(process_group):
    """The block is left alone, and the report says so."""
    model = block()
    fully_sharded(model)
    report = fastres.fuse_(model)
    assert report.fused == 0 and all("FSDP manages" in row.reason for row in report.rows)


def replica_of(model):
    """What DataParallel makes for each device: copies of the modules, whose parameters are plain attributes, tensors
    with a history; buffers too."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(copied, name, copies[child])
        for name, p in module._parameters.items():
            if p is not None:
                setattr(copied, name, p * 1)
            else:
                copied._parameters[name] = None
        for name, b in module._buffers.items():
            copied._buffers[name] = None if b is None else b.clone()
    return copies[model]


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_g3_replicas(mode):
    """Gradients reach the parameters of the model, statistics stay with the replica."""
    outcomes = []
    inputs = [image(3, size=32) for _ in range(3)]
    for fuse in (False, True):
        torch.manual_seed(0)
        model = network().train(mode == "train")
        if fuse:
            fastres.fuse_(model)
        with watched() as seen, torch.set_grad_enabled(mode != "inference"):
            replicas = [replica_of(model) for _ in inputs]
            assert all(isinstance(m, fastres.fuse.FusedModule) for m in (replicas[0], replicas[0].layer1[0])) == fuse
            results = [replica(x) for replica, x in zip(replicas, inputs, strict=True)]
            y = torch.cat(results)
        if mode != "inference":
            y.square().mean().backward()
        if fuse:
            assert_path(seen, "fast")
        outcomes.append(
            {"y": y}
            | {f"{name}.grad": p.grad for name, p in model.named_parameters()}
            | buffers(model)
            | {f"replica {name}": b for name, b in buffers(replicas[0]).items()}
        )
    assert_same(*outcomes[::-1])


def test_g3_replicas_in_threads():
    model = network().eval()
    fastres.fuse_(model)
    inputs = [(image(3, size=32),) for _ in range(3)]
    with torch.no_grad():
        want = [model(*x) for x in inputs]
        replicas = [replica_of(model) for _ in inputs]

    def run(i):
        with torch.no_grad():
            return replicas[i](*inputs[i])

    with ThreadPoolExecutor(3) as pool:
        for i, got in enumerate(pool.map(run, [0, 1, 2] * 3)):
            torch.testing.assert_close(got, want[i % 3], rtol=1e-4, atol=1e-5)

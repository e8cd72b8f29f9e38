"""The cache of large buffers (csrc/cpu/buffers.cpp): results stay what they are while anything refers to them, and the
memory comes back afterwards."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

import fastres
from fastres import functional, models
from fastres.kernels import extension

if not extension.available():
    pytest.skip(f"compiled kernels are not loaded: {extension.load_error()}", allow_module_level=True)

OPS = torch.ops.fastres_cpu
NHWC = torch.channels_last
SHAPE = (4, 32, 64, 64)  # 2 MB
NBYTES = 4 * 32 * 64 * 64 * 4
NO_LIMIT = 2**40


@pytest.fixture(autouse=True)
def empty_cache():
    gc.collect()
    OPS.empty_cache()
    yield
    OPS.set_cache_limit(NO_LIMIT)
    gc.collect()
    OPS.empty_cache()


def nhwc(*shape):
    return torch.randn(shape).contiguous(memory_format=NHWC)


def add(a, b):
    return OPS.add_act(a, b, False)


def large():
    """A tensor in a buffer of the cache, and an ordinary one of the same values."""
    a, b = nhwc(*SHAPE), nhwc(*SHAPE)
    y = add(a, b)
    return y, a + b


def overwrite_freed_buffers():
    """Every free buffer of the size of `large` is handed out and written to."""
    zeros = torch.zeros(SHAPE).contiguous(memory_format=NHWC)
    return [add(zeros, zeros) for _ in range(4)]


def batch_norm_args(channels):
    return torch.zeros(channels), torch.ones(channels), torch.rand(channels) + 0.5, torch.randn(channels)


def outputs(x, weight):
    """Fused results of different sizes, all of 1 MB at least, and what eager gives."""
    args, pool = batch_norm_args(x.shape[1]), nhwc(x.shape[0], 64, *x.shape[2:])
    pool_args = batch_norm_args(64)
    pairs = [
        (functional.bn_act(x, *args), F.relu(F.batch_norm(x, *args))),
        (functional.add_act(x, x), F.relu(x + x)),
        (functional.conv_bias_act(x, weight, None, padding=1), F.relu(F.conv2d(x, weight, padding=1))),
        (functional.conv_bias_act(x, weight, None, stride=2), F.relu(F.conv2d(x, weight, stride=2))),
        (functional.bn_act_maxpool(pool, *pool_args), F.max_pool2d(F.relu(F.batch_norm(pool, *pool_args)), 3, 2, 1)),
    ]
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    grad = nhwc(x.shape[0], weight.shape[0], *x.shape[2:])
    with fastres.use_kernels("cpu"):
        y = functional.conv_bn_act(leaf, leaf_weight, None, None, training=True, act="identity", padding=1)
        got = torch.autograd.grad(y, (leaf, leaf_weight), grad)
    want_y = F.batch_norm(F.conv2d(leaf, leaf_weight, padding=1), None, None, training=True)
    want = torch.autograd.grad(want_y, (leaf, leaf_weight), grad)
    return [*pairs, (y.detach(), want_y.detach()), *zip(got, want, strict=True)]


def test_no_two_live_tensors_share_memory():
    alive = []
    for i in range(6):
        x, weight = nhwc(4, 32, 64, 60 + 4 * (i % 2)), nhwc(72, 32, 3, 3) / 17
        alive += outputs(x, weight)
        alive = alive[: 4 * i] + alive[4 * i + 2 :]  # buffers of some come back in between
    assert len(alive) > 30 and sum(got.nbytes >= 2**20 for got, _ in alive) > 20
    ranges = sorted((got.data_ptr(), got.data_ptr() + got.nbytes) for got, _ in alive)
    for (_, end), (start, _) in zip(ranges, ranges[1:], strict=False):
        assert end <= start
    for got, want in alive:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_large_weight_gradients_stay_valid():
    """They are as large as activations, and live as long as the optimiser wants."""
    x, weight = nhwc(2, 256, 7, 7), nhwc(256, 256, 3, 3) / 48
    args = ([1, 1], [1, 1], [1, 1], 1, True)
    grad = OPS.conv_backward_weight(x, x, weight.shape, *args)
    kept = grad.clone()
    for _ in range(3):
        OPS.conv_backward_weight(nhwc(2, 256, 7, 7), x, weight.shape, *args)
        OPS.conv_backward_input(x, weight, x.shape, *args)
    assert grad.nbytes >= 2**20 and torch.equal(grad, kept)


def test_memory_comes_back():
    a, b = nhwc(*SHAPE), nhwc(*SHAPE)
    assert OPS.cached_bytes() == 0
    y, z = add(a, b), add(a, b)
    assert OPS.cached_bytes() == 0
    del y
    one = OPS.cached_bytes()
    assert NBYTES <= one <= NBYTES * 9 // 8
    del z
    assert OPS.cached_bytes() == 2 * one
    y = add(a, b)
    assert OPS.cached_bytes() == one  # one of them is used again
    OPS.empty_cache()
    assert OPS.cached_bytes() == 0
    torch.testing.assert_close(y, a + b)


def test_a_buffer_is_used_again():
    y, _ = large()
    place = y.data_ptr()
    del y
    y, want = large()
    assert y.data_ptr() == place
    assert torch.equal(y, want)


def test_small_tensors_stay_with_the_ordinary_allocator():
    a = nhwc(1, 32, 64, 64)
    y = add(a, a)
    del y
    assert OPS.cached_bytes() == 0


def test_limit():
    y, _ = large()
    del y
    assert OPS.cached_bytes() > 0
    OPS.set_cache_limit(0)
    assert OPS.cached_bytes() == 0
    y, want = large()
    assert torch.equal(y, want)
    del y
    assert OPS.cached_bytes() == 0
    OPS.set_cache_limit(NBYTES * 5 // 2)
    alive = [large()[0] for _ in range(4)]
    del alive
    assert 2 * NBYTES <= OPS.cached_bytes() <= NBYTES * 5 // 2
    OPS.set_cache_limit(NO_LIMIT)
    alive = [large()[0] for _ in range(4)]
    del alive
    assert OPS.cached_bytes() >= 4 * NBYTES


@pytest.fixture
def one_thread():
    """How many buffers are used at once depends on how the threads meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model():
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10).to(memory_format=NHWC)
    fastres.fuse_(model)
    return model


def test_steady_state_of_inference(one_thread):
    model, x = small_model().eval(), nhwc(8, 3, 128, 128)
    kept = []
    with torch.no_grad():
        for _ in range(6):
            model(x)
            kept.append(OPS.cached_bytes())
    assert kept[1] > 0 and kept[1:] == kept[1:2] * 5


def test_steady_state_of_training(one_thread):
    model, x = small_model(), nhwc(8, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept = []
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        kept.append(OPS.cached_bytes())
    assert kept[2] > 0 and kept[2:] == kept[2:3] * 4


def test_steady_state_of_changing_shapes(one_thread):
    """Buffers of sizes that no longer fit go back to the system."""
    model = small_model().eval()
    most = []
    with torch.no_grad():
        for _ in range(4):
            most.append(0)
            for size in (64, 72, 80, 96):
                model(nhwc(8, 3, size, size))
                most[-1] = max(most[-1], OPS.cached_bytes())
    assert most[1] > 0 and most[3] == most[2] <= most[1] * 5 // 4


def loaded(y):
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


COPIES = {
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "save and load": loaded,
    "deepcopy": copy.deepcopy,
    "clone": torch.clone,
    "numpy": lambda y: torch.from_numpy(y.numpy().copy("K")),
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_copies(how):
    y, want = large()
    other = how(y)
    assert other.data_ptr() != y.data_ptr()
    y.zero_()
    del y
    busy = overwrite_freed_buffers()
    assert torch.equal(other, want) and other.stride() == want.stride()
    assert all(not t.any() for t in busy)


VIEWS = {
    "slice": lambda t: t[1:3, 4:, ::2],
    "permute": lambda t: t.permute(0, 2, 3, 1),
    "flat": lambda t: t.permute(0, 2, 3, 1).reshape(-1)[-5:],
    "detach": lambda t: t.detach(),
    "numpy": lambda t: t.numpy(),
    "numpy slice": lambda t: t.numpy()[2:, :3],
    "dlpack": lambda t: torch.from_dlpack(t),
    "storage": lambda t: torch.empty(0).set_(t.untyped_storage(), 0, (t.numel(),)) if t._base is None else t,
    "view of a view": lambda t: t.unflatten(1, (4, 8))[:, 1].select(0, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_outlive_their_base(view):
    y, want = large()
    part, want = view(y), torch.as_tensor(view(want)).clone()
    before = OPS.cached_bytes()
    del y
    gc.collect()
    assert OPS.cached_bytes() == before  # the view holds the buffer
    busy = overwrite_freed_buffers()
    assert torch.equal(torch.as_tensor(part), want)
    del busy
    before = OPS.cached_bytes()
    del part
    gc.collect()
    assert OPS.cached_bytes() - before >= NBYTES


def test_in_place_operations():
    y, want = large()
    for t in (y, want):
        t.mul_(2).add_(1).relu_()
        t[1:, ::3] = 0
        torch.nn.functional.dropout(t, 0.0, inplace=True)
        torch.add(t, t, out=t)
        t.transpose_(2, 3)
    assert torch.equal(y, want)


def test_resize():
    """To fewer values as any tensor; not to more, which PyTorch says."""
    y, want = large()
    y.resize_(2, *SHAPE[1:])
    want.resize_(2, *SHAPE[1:])
    assert torch.equal(y, want)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(8, *SHAPE[1:])
    assert torch.equal(y[:2], want)


def test_shared_memory():
    y, want = large()
    y.share_memory_()
    assert y.is_shared() and torch.equal(y, want)
    busy = overwrite_freed_buffers()
    assert torch.equal(y, want)
    y.fill_(1)
    assert all(not t.any() for t in busy)
    del y


def test_gradients_flow_through():
    x = nhwc(*SHAPE).requires_grad_()
    y = functional.add_act(x, x)
    z = (y * y).sum()
    del y  # autograd holds what it saved
    busy = overwrite_freed_buffers()
    z.backward()
    torch.testing.assert_close(x.grad, 8 * x.detach().clamp(min=0))
    assert all(not t.any() for t in busy)


def test_deleted_by_another_thread():
    alive = [large() for _ in range(3)]
    got = [y for y, _ in alive]
    del alive
    before = OPS.cached_bytes()
    thread = threading.Thread(target=got.clear)
    thread.start()
    thread.join()
    assert OPS.cached_bytes() - before >= 3 * NBYTES


def test_made_and_deleted_by_many_threads():
    wrong = []

    def work(seed):
        value = torch.full(SHAPE, float(seed)).contiguous(memory_format=NHWC)
        held = []
        for i in range(40):
            held.append((add(value, value * i), seed * (1 + i)))
            if len(held) > 3:
                y, want = held.pop(i % 3)
                if not (y == want).all():
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 4 * NBYTES <= OPS.cached_bytes() <= 4 * 6 * NBYTES * 9 // 8

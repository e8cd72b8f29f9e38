"""Fused networks in several Python threads, and how many threads the kernels use."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from threading import Barrier

import pytest
import torch
from _convolution import nhwc
from torch import nn

import fastres
from fastres import models

WORKERS = 4


def network(block=models.BasicBlock):
    """A fused network of four blocks, with statistics as after some training."""
    model = models.ResNet(block, [1, 1, 1, 1], num_classes=5, width_per_group=16 if block is models.Bottleneck else 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low, high in ((module.weight, 0.5, 1.5), (module.bias, -1, 1), (module.running_mean, -1, 1)):
                nn.init.uniform_(t, low, high)
            nn.init.uniform_(module.running_var, 0.5, 2)
    fastres.fuse_(model)
    return model.to(memory_format=torch.channels_last)


def networks():
    return [network(block) for block in (models.BasicBlock, models.Bottleneck) * (WORKERS // 2)]


def together(jobs):
    """The results of the jobs, run in as many threads at once."""
    start = Barrier(len(jobs))

    def run(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def assert_equal(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"tensor {i}"


def inference(model, images):
    with torch.inference_mode():
        return [model(x) for x in images]


def training(model, images, steps=3):
    """Losses, gradients and state after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(images[step % len(images)])
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 5)
        loss.backward()
        optimizer.step()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return [*found, *(t.clone() for t in model.state_dict().values())]


@pytest.fixture
def model():
    return network().eval()


@pytest.fixture
def images():
    return [nhwc(n, 3, size, size) for n, size in ((1, 64), (2, 48), (1, 64), (1, 64), (2, 33))]


def test_inference_of_one_model(model, images):
    """From its first call on, when weights are folded and packed, to its replayed ones."""
    want = inference(deepcopy(model), images)
    for _ in range(3):
        for got in together([lambda: inference(model, images)] * WORKERS):
            assert_equal(got, want)


def test_inference_of_several_models(images):
    models = [model.eval() for model in networks()]
    want = [inference(deepcopy(model), images) for model in models]
    for got, alone in zip(together([lambda m=m: inference(m, images) for m in models]), want, strict=True):
        assert_equal(got, alone)


def test_training_of_several_models(images):
    models = networks()
    want = [training(deepcopy(model), images[1::3]) for model in models]
    for got, alone in zip(together([lambda m=m: training(m, images[1::3]) for m in models]), want, strict=True):
        assert_equal(got, alone)


def test_gradients_of_one_model(model, images):
    """With running statistics: those of a batch would be written by all threads, as in eager."""
    parameters = list(model.parameters())

    def gradients():
        return [g for x in images for g in torch.autograd.grad(model(x).square().sum(), parameters)]

    want = gradients()
    for got in together([gradients] * WORKERS):
        assert_equal(got, want)


def test_inference_beside_training(model, images):
    other = network(models.Bottleneck)
    want, trained = inference(model, images), training(deepcopy(other), images[1::3])
    *inferred, got = together([lambda: inference(model, images)] * 2 + [lambda: training(other, images[1::3])])
    assert_equal(got, trained)
    for result in inferred:
        assert_equal(result, want)


def test_number_of_threads_of_each_python_thread(model, images):
    want = inference(model, images)

    def with_threads(count):
        torch.set_num_threads(count)
        return inference(model, images)

    before = torch.get_num_threads()
    try:
        for got in together([lambda n=n: with_threads(n) for n in (1, 2, 3)]):
            assert_equal(got, want)
    finally:
        torch.set_num_threads(before)


#: Prints how many threads the process had after eager work and after ours; and for how many clock ticks others than the
#: main thread ran while one was allowed and the main thread ran for 15.
COUNT = """if True:
    import os, sys
    sys.path.insert(0, {tests!r})
    import torch, fastres
    from test_convolution_threads import network, training
    from _convolution import nhwc

    def ticks():
        \"\"\"Processor time of the main thread and of all others.\"\"\"
        found = {{}}
        for task in os.listdir("/proc/self/task"):
            fields = open(f"/proc/self/task/{{task}}/stat").read().rpartition(")")[2].split()
            found[int(task)] = int(fields[11]) + int(fields[12])
        main = found.pop(os.getpid())
        return main, sum(found.values())

    def work():
        training(model, images)
        with torch.no_grad():
            model.eval()(images[0])
        model.train()

    torch.set_num_threads({allowed})
    images, model, eager = [nhwc(2, 3, 64, 64)], network(), fastres.unfuse_(network())
    training(eager, images)
    after_eager = len(os.listdir("/proc/self/task"))
    work()
    after_ours = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(1)
    work()
    main, others = ticks()
    while ticks()[0] < main + 15:
        work()
    print(after_eager, after_ours, ticks()[1] - others)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize("allowed", [1, 2])
def test_no_threads_but_those_of_torch(allowed):
    code = COUNT.format(tests=str(Path(__file__).parent), allowed=allowed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after_eager, after_ours, others = map(int, done.stdout.split())
    assert after_ours == after_eager, "a pool of its own"
    assert others <= 2, f"other threads ran for {others} ticks while one thread was allowed"

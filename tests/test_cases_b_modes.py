"""Cases B1 to B7: training and eval, frozen statistics and weights, inference mode."""

import copy
from functools import partial

import _torchvision
import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    batch_norms,
    block,
    check,
    image,
    kinds,
    libraries,
    modes,
    network,
    some_kernels,
    step,
    watched,
)

import fastres
from fastres import folding
from fastres.kernels import extension


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


@pytest.fixture
def vision():
    module, reason = _torchvision.load()
    if module is None:
        pytest.skip(reason)
    return module


@libraries
@kinds
def test_b1_train_and_eval_in_turn(library, kind):
    """Nothing is kept from one mode to the other: an optimizer step and new statistics lie between."""
    eager = block(library, kind, stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, fused)]
    for mode in ("inference", "train", "inference", "eval", "train", "train", "inference"):
        x = image()
        want = step(eager, x, mode)
        with watched() as seen:
            got = step(fused, x, mode)
        assert_path(seen, "fast")
        assert_same(got, want)
        if mode == "train":
            for optimizer in optimizers:
                optimizer.step()


@pytest.mark.parametrize("training", [True, False], ids=["batch_norms_train", "batch_norms_eval"])
def test_b1_batch_norms_mode_decides(training):
    """bn.training, not the block's: some people freeze, some adapt."""

    def oppose(model):
        model.train(not training)
        for bn in batch_norms(model):
            bn.train(training)

    fused = check(block(stride=2), image(), after=oppose)
    assert all(int(bn.num_batches_tracked) == int(training) for bn in batch_norms(fused))


@libraries
@kinds
def test_b2_batch_norm_in_eval_inside_a_training_model(library, kind):
    def freeze(model):
        for bn in batch_norms(model):
            bn.eval()

    model = block(library, kind, stride=2).train()
    fused = check(model, image(), after=freeze, steps=2)
    assert all(p.grad is not None for p in fused.parameters())
    assert all(int(bn.num_batches_tracked) == 0 for bn in batch_norms(fused))


@pytest.mark.parametrize("frozen", ["bn1", "bn2", "bn3"])
def test_b2_one_of_the_batch_norms_in_eval(frozen):
    check(block(stride=2).train(), image(), after=lambda model: getattr(model, frozen).eval())


def test_b2_stem_in_eval():
    check(network().train(), image(3, size=32), after=lambda model: model.bn1.eval())


@libraries
@kinds
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_b3_affine_without_gradient(library, kind, frozen, mode):
    """Batch statistics and updates still happen; the frozen parameters have no gradient."""

    def freeze(model):
        for bn in batch_norms(model):
            bn.weight.requires_grad_(frozen == "bias")
            bn.bias.requires_grad_(frozen == "weight")

    check(block(library, kind, stride=2), image(), mode, after=freeze)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_b3_convolutions_without_gradient(mode):
    check(
        block(stride=2),
        image(),
        mode,
        after=lambda model: [m.weight.requires_grad_(False) for m in (model.conv1, model.conv3)],
    )


@modes
def test_b4_frozen_batch_norm(vision, mode):
    """torchvision's: four buffers, an eps of its own, no gradient. Batch norm stays frozen in training."""
    model = block("torchvision", stride=2, norm_layer=partial(vision.ops.misc.FrozenBatchNorm2d, eps=1e-2))
    for module in model.modules():
        if isinstance(module, vision.ops.misc.FrozenBatchNorm2d):
            (
                module.weight.uniform_(0.5, 1.5),
                module.bias.normal_(),
                module.running_mean.normal_(),
                module.running_var.uniform_(0.5, 2),
            )
    eager, fused = model, copy.deepcopy(model)
    report = fastres.fuse_(fused)
    x = image()
    want = step(eager, x, mode)
    with watched() as seen:
        got = step(fused, x, mode)
    assert_path(seen, "fast")
    assert_same(got, want)
    assert {name.split(".")[-2] for name in got if name.endswith("grad") and name != "x.grad"} <= {"weight"}
    assert all(row.fused for row in report.rows)


class FrozenBatchNorm2d(torch.nn.Module):
    """Hugging Face's: its eps is in the code."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        self.code_eps = eps

    def forward(self, x):
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + self.code_eps).rsqrt()
        return x * scale + (bias - mean * scale)


@modes
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_b4_frozen_batch_norm_of_another_library(mode, eps):
    """With an eps that is found nowhere but in the code it is taken if it is Hugging Face's, else called."""
    model = block(stride=2, norm_layer=partial(FrozenBatchNorm2d, eps=eps))
    check(model, image(), mode)
    report = fastres.fuse_(model)
    assert all(row.fused for row in report.rows if row.kind == "bn") == (eps == 1e-5)
    assert eps == 1e-5 or "does not compute" in str(report)


@modes
def test_b4_frozen_batch_norm_in_a_model(vision, mode):
    """As in torchvision.models.detection: resnet_fpn_backbone and its 14 layers of FrozenBatchNorm2d."""
    model = network("torchvision", norm_layer=vision.ops.FrozenBatchNorm2d)
    fused = copy.deepcopy(model)
    fastres.fuse_(fused)
    x = image(3, size=32)
    assert_same(step(fused, x, mode), step(model, x, mode))


needs_folding = pytest.mark.skipif(
    not extension.available(), reason=f"folded weights are kept for the compiled kernels only: {extension.load_error()}"
)


def inference(model, x):
    with torch.no_grad():
        return model.eval()(x)


@needs_folding
def test_b5_folded_weights_are_kept_and_can_be_refused(monkeypatch):
    model, x = block(), image()
    fastres.fuse_(model)
    first = inference(model, x)
    assert all(conv in folding._entries for conv in (model.conv1, model.conv2, model.conv3))
    kept = folding._entries[model.conv1]
    inference(model, x)
    assert folding._entries[model.conv1] is kept
    fastres.refresh_(model)
    assert model.conv1 not in folding._entries
    monkeypatch.setattr(fastres.config, "keep_folded_weights", False)
    with watched() as seen:
        again = inference(model, x)
    assert_path(seen, "fast")
    assert model.conv1 not in folding._entries
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-6)


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()}),
    "to": lambda model: model.to(torch.float64).to(torch.float32).conv1.weight.data.mul_(1.25),
    "train": lambda model: model.train()(image()),
    "data": lambda model: model.conv2.weight.data.mul_(1.25),
    "copy": lambda model: model.bn2.running_var.copy_(torch.rand(4) + 0.5),
}


@needs_folding
@pytest.mark.parametrize("change", CHANGES)
def test_b5_folded_weights_are_never_stale(change):
    """More of them, whole models and the ways that leave no trace, in test_stale_weights.py."""
    eager = block()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    before = inference(fused, x)
    for model in (eager, fused):
        torch.manual_seed(2)
        CHANGES[change](model)
    want, got = inference(eager, x), inference(fused, x)
    assert not torch.allclose(before, want)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@libraries
@kinds
def test_b6_no_grad_in_training(library, kind):
    """Statistics are updated, nothing is kept for backward."""
    eager = block(library, kind, stride=2).train()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.no_grad():
        want = eager(x)
        with watched() as seen:
            got = fused(x)
    assert_path(seen, "fast")
    assert not saved and not got.requires_grad and got.grad_fn is None
    assert_same({"y": got} | dict(fused.named_buffers()), {"y": want} | dict(eager.named_buffers()))
    assert int(fused.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("born", ["outside", "inside"])
def test_b7_inference_mode(born, training):
    """Parameters made outside of inference mode, or in it: those have no version counter."""
    with torch.inference_mode(born == "inside"):
        eager = block(stride=2).train(training)
        fused = copy.deepcopy(eager)
        fastres.fuse_(fused)
    for _ in range(2):
        with torch.inference_mode():
            x = image()
            want = eager(x)
            with watched() as seen:
                got = fused(x)
        assert_path(seen, "fast")
        assert got.is_inference() == want.is_inference()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert int(fused.bn1.num_batches_tracked) == int(eager.bn1.num_batches_tracked)


def test_b7_inference_mode_and_then_gradients():
    """What is folded in inference mode serves outside of it, and does not come in gradients' way."""
    eager = block(stride=2)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x = image()
    with torch.inference_mode():
        fused.eval()(x)
    for mode in ("inference", "eval", "train", "inference"):
        assert_same(step(fused, x, mode), step(eager, x, mode))
    for model in (eager, fused):
        model.eval().requires_grad_(False)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
    assert not fused(x).requires_grad


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_b7_inference_tensor_as_input_of_a_model_that_learns(mode):
    """Eager's error: inference tensors cannot be saved for backward."""
    eager = block().train(mode == "train")
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    with torch.inference_mode():
        x = image()
    errors = []
    for model in (eager, fused):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward") as info:
            model(x)
        errors.append(info.value)
    assert type(errors[0]) is type(errors[1])

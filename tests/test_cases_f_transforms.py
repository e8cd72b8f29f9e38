"""Cases F7 to F10: torch.func, torch.jit, ONNX, torch.compile, torch.export and AOTInductor."""

import copy
import importlib.util
import io
import os
from collections import Counter

import pytest
import torch
from _compare import (
    assert_path,
    assert_same,
    block,
    buffers,
    image,
    kinds,
    libraries,
    network,
    set_mode,
    some_kernels,
    step,
    watched,
)
from torch import nn
from torch.func import functional_call, jacfwd, jacrev, jvp, vmap

import fastres

modes = pytest.mark.parametrize("mode", ["train", "eval"])


@pytest.fixture(autouse=True)
def _kernels():
    with some_kernels():
        yield


def both(kind="BasicBlock", mode="eval", **options):
    eager = set_mode(block(kind=kind, **options), mode)
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    return eager, fused


# F7: torch.func and forward-mode differentiation ----------------------------------------------------------------------


def per_sample_gradients(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p, one):
        return functional_call(model, p, (one[None],)).square().sum()

    return vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)


def forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(model(dual))


def of_weight(model, transform):
    weight, x = model.conv1.weight.detach(), image_of(1)
    return transform(lambda w: functional_call(model, {"conv1.weight": w}, (x,)).sum((1, 2, 3)))(weight)


def image_of(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 8, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)


TRANSFORMS = {
    "vmap": lambda model, x: vmap(lambda one: model(one[None])[0])(x),
    "per-sample gradients": per_sample_gradients,
    "jvp": lambda model, x: jvp(model, (x,), (torch.ones_like(x),)),
    "forward mode": forward_mode,
    "jacrev": lambda model, x: of_weight(model, jacrev),
    "jacfwd": lambda model, x: of_weight(model, jacfwd),
    "hessian-vector product": lambda model, x: jvp(
        torch.func.grad(lambda x: model(x).square().sum()), (x,), (torch.ones_like(x),)
    ),
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
}


@kinds
@modes
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_f7_transforms(kind, mode, transform):
    """The same values as eager's, or the same kind of error: wrapped tensors take the original forward."""
    eager, fused = both(kind, mode, width=8)
    x, results = image_of(2), []
    for model in (eager, fused):
        try:
            with watched() as seen:
                results.append(TRANSFORMS[transform](model, x))
        except Exception as error:
            results.append(error)
    want, got = results
    assert_path(seen, "eager", "torch.func|forward-mode|Functional")
    if isinstance(want, Exception):
        assert type(got) is type(want) and mode == "train", got
        return
    for g, w in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert_same(buffers(fused), buffers(eager))
    with watched() as seen:
        fused(x)
    assert_path(seen, "fast")  # again, without a transform


# F8: TorchScript and ONNX ---------------------------------------------------------------------------------------------


@libraries
@kinds
def test_f8_script(library, kind):
    """An error that names the block and the remedy; the remedy works, and the model is as it was."""
    model = nn.Sequential(block(library, kind, stride=2), nn.ReLU()).eval()
    fastres.fuse_(model)
    x = image()
    for module in (model, model[0]):
        with pytest.raises(RuntimeError, match=rf"Fused{kind}.*fastres\.disabled\(model\)"):
            torch.jit.script(module)
    with watched() as seen:
        want = step(model, x, "inference")
    assert_path(seen, "fast")
    with fastres.disabled(model):
        scripted = torch.jit.script(model)
    assert_same(step(scripted, x, "inference"), want)
    with watched() as seen:
        step(model, x, "inference")
    assert_path(seen, "fast")


@modes
def test_f8_trace(mode):
    """The graph has eager's operators, none of ours."""
    eager, fused = both("Bottleneck", mode)
    x = image()
    graphs = []
    for model in (eager, fused):
        with watched() as seen:
            graphs.append(torch.jit.trace(copy.deepcopy(model), x, check_trace=False))
    assert_path(seen, "eager", "trace")
    want, got = (Counter(node.kind() for node in graph.inlined_graph.nodes()) for graph in graphs)
    assert got == want and not any("fastres" in kind for kind in got)
    if mode == "eval":
        assert_same(step(graphs[1], x, "inference"), step(fused, x, "inference"))


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("onnx", "onnxscript")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
def test_f8_onnx(exporter):
    """A fused model is exported as if it had not been fused, node by node, and stays fused."""
    import onnx

    eager = nn.Sequential(block(kind="Bottleneck", stride=2), nn.Flatten()).eval()
    fused = copy.deepcopy(eager)
    fastres.fuse_(fused)
    x, protos = image(), []
    for model in (eager, fused):
        file = io.BytesIO()
        dynamo = exporter == "torch.export"
        program = torch.onnx.export(model, (x,), None if dynamo else file, dynamo=dynamo, verbose=False)
        protos.append(program.model_proto if dynamo else onnx.load_from_string(file.getvalue()))
    want, got = ([(node.op_type, list(node.input), list(node.output)) for node in p.graph.node] for p in protos)
    assert got == want and len(got) > 7
    with watched() as seen:
        y = step(fused, x, "inference")["y"]
    assert_path(seen, "fast")
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(protos[1].SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})
        torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-4)


# F9: torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_f9_sizes(fresh):
    """fullgraph, and for new batch and image sizes never more compilations than eager's model needs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    sizes = ((2, 8, 10), (3, 12, 14), (5, 16, 9), (4, 11, 13))
    counts = []
    for model in both("BasicBlock", "train"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        plain = copy.deepcopy(model)
        for n, h, w in sizes:
            x = torch.randn(n, 16, h, w).contiguous(memory_format=torch.channels_last)
            got = step(model, x, "train", call=lambda x: compiled(x))  # noqa: B023
            assert_same(got, step(plain, x, "train"))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0] <= 3


def test_f9_ops_in_the_graph(fresh):
    """The compiled graph of a fused block in training: our ops, and statistics written by an op that says so."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    _, fused = both("BasicBlock", "train")
    torch.compile(fused, backend=backend, fullgraph=True)(image())
    (graph,) = graphs
    names = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert names["fastres.conv_bn_act.default"] == names["fastres.update_running_stats_.default"] == 2
    assert int(fused.bn1.num_batches_tracked) == 1


# F10: torch.export ----------------------------------------------------------------------------------------------------


def exported(model, x, strict):
    n, h = torch.export.Dim("n", min=2, max=64), torch.export.Dim("h", min=4, max=64)
    return torch.export.export(model, (x,), dynamic_shapes=({0: n, 2: h},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_f10_export(strict):
    """By default the original forward is exported, plain ATen, for whoever reads it; with strict=True our ops are. For
    other batch and image sizes; in training the statistics move."""
    eager, fused = both("BasicBlock", "train")
    program = exported(fused, image(), strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("fastres" in name for name in names) == strict
    assert_same(buffers(fused), buffers(eager))
    module = program.module()
    for n, h in ((3, 7), (5, 9)):
        x = torch.randn(n, 16, h, 7).contiguous(memory_format=torch.channels_last)
        y, want = module(x), eager(x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    moved = dict(module.named_buffers())
    assert_same(moved, {name: b for name, b in eager.named_buffers() if name in moved})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    torch.testing.assert_close(again(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    os.environ.get("FASTRES_SLOW_TESTS") != "1", reason="compiles for minutes: FASTRES_SLOW_TESTS=1 runs it"
)
@pytest.mark.parametrize("strict", [False, True])
def test_f10_aot_inductor(strict, tmp_path):
    """A package compiled ahead of time, of eager's operators and of ours."""
    import torch._inductor

    eager, fused = both("BasicBlock")
    x = image()
    with torch.no_grad():
        program = torch.export.export(fused, (x,), strict=strict)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), eager(x), rtol=1e-4, atol=1e-5)


def test_f10_network():
    """A whole network with its stem, in evaluation: ATen only."""
    model = network().eval()
    fastres.fuse_(model)
    x = image(3, size=32)
    program = torch.export.export(model, (x,))
    assert not any("fastres" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)

"""What several processes do for test_synchronised.py: every case on its part of a batch, results saved for the test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _distributed import NHWC, WORLDS, check
from torch import Tensor, nn

import fastres
from fastres import functional
from fastres.kernels import extension
from fastres.models.resnet import Bottleneck, ResNet

NCHW = torch.contiguous_format
#: Images of each process.
SPLITS = {2: (5, 3), 3: (4, 0, 2)}


def parts(whole: Tensor, world: int) -> list[Tensor]:
    """The part of each process: for three processes those of two, less two images that nobody has."""
    sizes = SPLITS[world]
    return list(whole[: sum(sizes)].split(sizes))


# One op


#: name: (x's shape, output channels of a convolution or None, its kernel, options)
OPS: dict[str, dict[str, Any]] = {
    "bn_act": {"shape": (8, 17, 5, 3)},
    "bn_act nchw": {"shape": (8, 17, 5, 3), "layout": NCHW},
    "bn_act identity": {"shape": (8, 6, 4, 4), "act": "identity", "residual": False},
    "bn_act plain": {"shape": (8, 6, 4, 4), "residual": False},
    "bn_act large mean": {"shape": (8, 9, 7, 7), "mean": 1e4, "std": 1e-2, "residual": False},
    "bn_act float64": {"shape": (8, 6, 4, 4), "dtype": torch.float64},
    "bn_act bfloat16": {"shape": (8, 16, 6, 6), "dtype": torch.bfloat16},
    "maxpool": {"shape": (8, 10, 9, 7), "residual": False, "maxpool": True},
    "maxpool bfloat16": {"shape": (8, 16, 8, 8), "residual": False, "maxpool": True, "dtype": torch.bfloat16},
    "conv": {"shape": (8, 9, 7, 6), "channels": 12, "kernel": 3, "stride": 2, "residual": False},
    "conv residual": {"shape": (8, 16, 6, 6), "channels": 16, "kernel": 3},
    "conv bias nchw": {"shape": (8, 5, 6, 6), "channels": 7, "kernel": 3, "layout": NCHW, "conv_bias": True},
    "conv float64": {"shape": (8, 5, 6, 6), "channels": 7, "kernel": 3, "dtype": torch.float64},
    "algebraic": {"shape": (8, 16, 8, 8), "channels": 64, "kernel": 1},
    "algebraic identity": {"shape": (8, 6, 8, 8), "channels": 30, "kernel": 1, "act": "identity", "residual": False},
    "algebraic large mean": {"shape": (8, 16, 8, 8), "channels": 64, "kernel": 1, "mean": 1e4, "std": 1e-2},
    # 3 images of 16 pixels: algebraic with 5 and with 4 images, but not with 3, 2 or none
    "algebraic here and there": {"shape": (8, 8, 4, 4), "channels": 32, "kernel": 1},
    "algebraic autocast": {"shape": (8, 16, 8, 8), "channels": 64, "kernel": 1, "autocast": True},
    # without a ReLU: of so few values, those whose sign a rounding turns would be all that counts
    "conv autocast": {"shape": (8, 16, 6, 6), "channels": 16, "kernel": 3, "autocast": True, "act": "identity"},
}


def tensors(case: dict[str, Any], world: int) -> dict[str, Tensor | None]:
    """The inputs of the whole batch, float32; the same in every process."""
    torch.manual_seed(0)
    shape = (sum(SPLITS[world]), *case["shape"][1:])
    channels, k = case.get("channels"), case.get("kernel", 1)
    out = channels or shape[1]
    x = torch.randn(shape, dtype=torch.float64) * case.get("std", 1.0) + case.get("mean", 0.0)
    x += torch.linspace(0, case.get("std", 1.0), shape[0]).reshape(-1, 1, 1, 1)  # processes differ in their means
    weight = torch.rand(out) + 0.5
    weight[0], weight[1] = 0.0, -1.0
    found: dict[str, Tensor | None] = {"x": x, "residual": None, "conv_weight": None, "conv_bias": None}
    if channels:
        found["conv_weight"] = torch.randn(channels, shape[1], k, k) / (shape[1] * k * k) ** 0.5
        found["conv_bias"] = torch.randn(channels) if case.get("conv_bias") else None
    found |= {"weight": weight, "bias": torch.randn(out)}
    stride = case.get("stride", 1)
    size = [(s - 1) // stride + 1 for s in shape[2:]]
    if case.get("residual", True):
        found["residual"] = torch.randn(shape[0], out, *size)
    if case.get("maxpool"):
        size = [(s - 1) // 2 + 1 for s in size]
    found["grad_y"] = torch.randn(shape[0], out, *size)
    return found


def call(case: dict[str, Any], inputs: dict[str, Any], group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y and the running statistics, by fastres.functional."""
    channels = inputs["weight"].numel()
    running = [t.to(inputs["weight"].dtype) for t in (torch.zeros(channels), torch.ones(channels))]
    options = {"training": True, "momentum": 0.3, "act": case.get("act", "relu"), "process_group": group}
    affine = (*running, inputs["weight"], inputs["bias"])
    if inputs["conv_weight"] is not None:
        pads = {"stride": case.get("stride", 1), "padding": case["kernel"] // 2, "conv_bias": inputs["conv_bias"]}
        with torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False)):
            y = functional.conv_bn_act(
                inputs["x"], inputs["conv_weight"], *affine, inputs["residual"], **pads, **options
            )
    elif case.get("maxpool"):
        y = functional.bn_act_maxpool(inputs["x"], *affine, **options)
    else:
        y = functional.bn_act(inputs["x"], *affine, inputs["residual"], **options)
    return y, *running


BATCHED = ("x", "residual", "grad_y")


def leaves(case: dict[str, Any], inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs in a dtype (per-channel ones in float32 at least), asking for gradients."""
    order = case.get("layout", NHWC)
    found: dict[str, Any] = {}
    for name, t in inputs.items():
        if t is not None:
            vector = torch.promote_types(dtype, torch.float32) if name in ("weight", "bias") else dtype
            t = t.to(vector)
            t = t.contiguous(memory_format=order) if t.dim() == 4 else t
            t = t.detach().requires_grad_(name != "grad_y")
        found[name] = t
    return found


def gradients(y: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    names = [name for name, t in inputs.items() if t is not None and name != "grad_y"]
    grads = torch.autograd.grad(y, [inputs[name] for name in names], inputs["grad_y"].to(y.dtype))
    return {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


def run_op(name: str, rank: int, world: int) -> dict[str, Tensor]:
    case = OPS[name]
    whole = tensors(case, world)
    mine = {key: parts(t, world)[rank] if key in BATCHED and t is not None else t for key, t in whole.items()}
    inputs = leaves(case, mine, case.get("dtype", torch.float32))
    with counted() as calls:
        y, mean, var = call(case, inputs, dist.group.WORLD)
        found = gradients(y, inputs)
    assert calls == ["all_gather", "all_reduce"], calls
    return {"y": y.detach(), "running_mean": mean, "running_var": var, **found}


class counted:
    """The collectives called inside the `with` block, by name."""

    def __enter__(self) -> list[str]:
        self.calls: list[str] = []
        self.before = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
        for name, function in self.before.items():
            setattr(dist, name, self._note(name, function))
        return self.calls

    def _note(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return noted

    def __exit__(self, *_: Any) -> None:
        for name, function in self.before.items():
            setattr(dist, name, function)


# A network, trained


def network(seed: int = 0) -> nn.Module:
    """A stem, a projection, an identity shortcut."""
    torch.manual_seed(seed)
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16)
    model.layer3 = model.layer4 = nn.Identity()
    model.layer2 = Bottleneck(256, 64, base_width=16)
    model.fc = nn.Linear(256, 5)
    return model.to(memory_format=NHWC)


def loss_of(model: nn.Module, x: Tensor, target: Tensor, total: int) -> Tensor:
    """Whose gradients, averaged by DDP over the processes, are those of the mean over all images."""
    loss = nn.functional.cross_entropy(model(x), target, reduction="sum") / total
    return loss * dist.get_world_size() if dist.is_initialized() else loss


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], total: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        loss_of(model, x, target, total).backward()
        optimizer.step()


def batches(world: int, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    count = sum(SPLITS[world])
    images = [torch.randn(count, 3, 32, 32).contiguous(memory_format=NHWC) for _ in range(steps)]
    return [(x, torch.randint(5, (count,))) for x in images]


def run_training(when: str, rank: int, world: int) -> dict[str, Tensor]:
    """DDP refuses to take a module with SyncBatchNorm on a CPU, but not its conversion afterwards."""
    model = network()
    if when == "converted after fuse_":
        fastres.fuse_(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    if when == "not fused":
        before = [id(p) for p in model.parameters()]
        fastres.nn.convert_sync_batchnorm(ddp.module)
        assert [id(p) for p in model.parameters()] == before
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(ddp.module)
    if when == "converted before fuse_":
        report = fastres.fuse_(ddp)
        assert report.fused == report.total - 1 and "SyncBatchNorm" in str(report), str(report)  # all but conv1
    mine = [(parts(x, world)[rank], parts(target, world)[rank]) for x, target in batches(world)]
    train(ddp, mine, sum(SPLITS[world]))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    return {name: t.clone() for name, t in model.state_dict().items()}


# The rest


def run_modules(rank: int, world: int) -> dict[str, Tensor]:
    """Cumulative averages, no statistics kept, a group of fewer processes, evaluation."""
    found = {}
    torch.manual_seed(0)
    whole = torch.randn(sum(SPLITS[world]), 6, 4, 4)
    x = parts(whole, world)[rank]
    for name, options in {"cumulative": {"momentum": None}, "not tracked": {"track_running_stats": False}}.items():
        module = fastres.nn.BnAct2d(nn.SyncBatchNorm(6, **options))
        for i in range(2):
            found[f"{name} {i}"] = module(x + i).detach()
        found |= {f"{name} {key}": t.clone() for key, t in module.bn.state_dict().items()}
        found[f"{name} eval"] = module.eval()(x).detach()
    pair = dist.new_group([0, 1])  # every process has to call it
    alone = dist.new_group([2]) if world > 2 else None
    module = fastres.nn.BnAct2d(nn.SyncBatchNorm(6, process_group=pair if rank < 2 else alone))
    found["group"] = module(x).detach()
    return found


def run_compiled(rank: int, world: int) -> dict[str, Tensor]:
    """torch.compile runs what is synchronised as it is, between two graphs."""
    torch.manual_seed(0)
    module = fastres.nn.ConvBnAct2d(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.SyncBatchNorm(8))
    whole = torch.randn(sum(SPLITS[world]), 6, 4, 4)
    found = {}
    for name, function in {"plain": module, "compiled": torch.compile(module, backend="aot_eager")}.items():
        x = parts(whole, world)[rank].clone().requires_grad_()
        y = function(x * 2)
        y.square().sum().backward()
        found |= {name: y.detach(), f"{name} grad": x.grad}
    return found


def run_gradients_of_gradients(rank: int, world: int) -> dict[str, Tensor]:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = functional.bn_act(x, None, None, training=True, process_group=dist.group.WORLD)
    grad = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return {str(error): torch.zeros(0)}
    return {}


#: Without compiled kernels, fused modules run as they are, and SyncBatchNorm refuses CPUs.
MODULES: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    **{
        name: lambda rank, world, name=name: run_training(name, rank, world)
        for name in ("converted before fuse_", "converted after fuse_", "not fused")
    },
    "modules": run_modules,
    "compiled": run_compiled,
}
CASES: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    **{name: lambda rank, world, name=name: run_op(name, rank, world) for name in OPS},
    "gradients of gradients": run_gradients_of_gradients,
    **MODULES,
}


#: What this process found, by case.
RESULTS: dict[str, dict[str, Tensor]] = {}


def find(rank: int, world: int, name: str) -> None:
    if name not in MODULES or extension.available():
        RESULTS[name] = CASES[name](rank, world)


for _name in CASES:
    check(f"synchronised: {_name}", (2,) if _name == "compiled" else WORLDS)(functools.partial(find, name=_name))

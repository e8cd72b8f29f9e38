"""How many bytes of activations an operation reads and writes, counted from shapes: what would pass if no cache kept
anything between two operations. docs/explain.md has the counts as a table.

X is an operation's input, Y its output, each in bytes. Weights, statistics, masks of one bit and autocast's copies are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastres.explain.record import Flow, Served

#: Bytes of an index that max_pool2d writes for each output, in eager and fused.
_EAGER_INDEX, _FUSED_INDEX = 8, 1
#: Ops and parts of ops that convolve; all but the first also normalise.
_CONVOLUTIONS = ("conv_bias_act", "conv_maxpool", "conv_bn_act", "conv1x1_bn_act", "convolution", "conv1x1_statistics")


def eager(kind: str, module: nn.Module, flow: Flow, gradients: bool) -> int:
    """Bytes of one operation by PyTorch, forward and, with `gradients`, backward.

    Args:
        kind: of the operation. module: its module; the block of an addition. flow: of that module.
    """
    x, y = flow.x, flow.y
    forward, backward = {
        "conv": (x + y, _convolution_backward(module, flow)),
        "bn": ((3 if _batch_statistics(module) else 2) * y, 5 * y),
        "act": (2 * y, 3 * y),
        "add": (3 * y, 3 * x if flow.gradient else 0),  # autograd adds the gradients of both branches
        "pool": (x + y + _EAGER_INDEX * flow.values, x + y + _EAGER_INDEX * flow.values),
    }[kind]
    return forward + (backward if gradients else 0)


def fused(kind: str, module: nn.Module, flow: Flow, calls: Sequence[Served], gradients: bool) -> int:
    """Bytes of the same operation inside fused ops.

    Args:
        calls: the kernels that ran for it; for an addition or an activation those at the end of its block.
    """
    forward = [call for call in calls if not call.backward]
    backward = [call for call in calls if call.backward]
    op = _of(forward)
    count = {"conv": _conv, "bn": _bn, "act": _act, "add": _add, "pool": _pool}[kind]
    before, after = count(op, module, flow, forward, backward)
    return before + (after if gradients else 0)


def _of(forward: Sequence[Served]) -> str:
    return next((call.op for call in forward if call.op in _CONVOLUTIONS), forward[0].op if forward else "")


def _conv(
    op: str, module: nn.Module, flow: Flow, forward: Sequence[Served], backward: Sequence[Served]
) -> tuple[int, int]:
    after = _convolution_backward(module, flow)
    if op.startswith("conv1x1"):  # its products also have the centred input as a factor
        after += flow.x
    return flow.x + (0 if op == "conv_maxpool" else flow.y), after


def _bn(
    op: str, module: nn.Module, flow: Flow, forward: Sequence[Served], backward: Sequence[Served]
) -> tuple[int, int]:
    y, statistics = flow.y, _batch_statistics(module)
    again = sum(2 * y for call in backward if call.op == "bn_act")  # the activation computed again, see ops/recompute
    if op in ("conv_bias_act", "conv_maxpool"):
        return 0, again
    if op.startswith("conv1x1"):  # statistics of the convolution's input, a quarter of its output at most
        return (y // 4 if statistics else 0), again
    with_convolution = any(call.kernel == "cpu" and "ATen" not in call.method for call in forward)
    if op == "conv_bn_act" and with_convolution:
        return 2 * y, 5 * y + again
    if op in ("bn_act_maxpool", "bn_add_bn_act"):  # what is made of the normalised values is counted elsewhere
        return (2 if statistics else 1) * y, 3 * y
    return (3 if statistics else 2) * y, 5 * y + again


def _act(
    op: str, module: nn.Module, flow: Flow, forward: Sequence[Served], backward: Sequence[Served]
) -> tuple[int, int]:
    return (flow.y, 2 * flow.y) if op == "bn_add_bn_act" else (0, 0)


def _add(
    op: str, module: nn.Module, flow: Flow, forward: Sequence[Served], backward: Sequence[Served]
) -> tuple[int, int]:
    joined = 0 if not flow.gradient else flow.x if any(call.addend for call in backward) else 3 * flow.x
    if op == "add_act":
        return 3 * flow.y, 3 * flow.y + joined
    if op == "bn_add_bn_act":
        return 0, joined
    return flow.y, (0 if op == "conv_bias_act" else flow.y) + joined  # the residual's gradient is written


def _pool(
    op: str, module: nn.Module, flow: Flow, forward: Sequence[Served], backward: Sequence[Served]
) -> tuple[int, int]:
    index = 0 if op == "conv_maxpool" else _FUSED_INDEX * flow.values
    return flow.y + index, 2 * (flow.y + index)


def _convolution_backward(module: nn.Module, flow: Flow) -> int:
    """Each of both gradients, of x and of the weight, reads the gradient of y and reads or writes what is like x."""
    weight = next(module.parameters(recurse=False), None)
    return (flow.x + flow.y) * (int(flow.gradient) + int(weight is not None and weight.requires_grad))


def _batch_statistics(module: nn.Module) -> bool:
    return module.training or getattr(module, "running_mean", None) is None

"""Random problems for the property tests, and what a result may be off by where sums may cancel by chance."""

from dataclasses import dataclass

import torch
from _convolution import NHWC, Conv
from hypothesis import assume, settings
from hypothesis import strategies as st

from fastres.testing import DTYPES, WINOGRAD, unit_roundoff

NAN = float("nan")


def bounded(examples):
    """The same examples in every run; a failure prints the arguments that the test was called with."""
    return settings(deadline=None, derandomize=True, max_examples=examples)


def guarded(t):
    """t, dense as it was, in the middle of a buffer of NaN, and not on a multiple of 64 bytes."""
    buffer = torch.full((t.numel() + 70,), NAN, dtype=t.dtype)
    return buffer.as_strided(t.shape, t.stride(), 35).copy_(t)


def part(t, *more):
    """t as a part of a tensor that is larger by `more` along its dimensions, and NaN there."""
    large = torch.full([n + m for n, m in zip(t.shape, more, strict=True)], NAN, dtype=t.dtype)
    large = large.contiguous(memory_format=NHWC)
    place = tuple(slice(m - m // 2, m - m // 2 + n) for n, m in zip(t.shape, more, strict=True))
    large[place] = t
    return large[place]


#: How an activation may lie in memory.
FORMS = {
    "NHWC": lambda t: guarded(t.contiguous(memory_format=NHWC)),
    "NCHW": lambda t: guarded(t.contiguous()),
    "some images": lambda t: part(t.contiguous(memory_format=NHWC), 2, 0, 0, 0),
    "some channels": lambda t: part(t, 0, 3, 0, 0),
    "some pixels": lambda t: part(t, 0, 0, 1, 2),
    "height and width exchanged": lambda t: t.transpose(2, 3).contiguous(memory_format=NHWC).transpose(2, 3),
    "one image, expanded": lambda t: guarded(t[:1].contiguous(memory_format=NHWC)).expand(t.shape),
    "one pixel, expanded": lambda t: t[:, :, :1, :1].clone().expand(t.shape),
}
forms = st.sampled_from(sorted(FORMS))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
one_group = st.just(1)
#: One, some, and as many as channels (depthwise, where a group has one channel).
any_groups = st.sampled_from([1, 1, 2, 3, 8, 17, 32])


@st.composite
def convs(draw, groups=one_group):
    """Any geometry; half of them 3x3 with stride 1, and half of those with the channels that Winograd needs."""

    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    g, three = draw(groups), draw(st.booleans())
    kernel, stride, dilation = ((3, 3), (1, 1), (1, 1)) if three else (pair(1, 5), pair(1, 3), pair(1, 3))
    vectors = st.sampled_from([8, 16, 32, 48])
    if g > 1:
        channels = st.one_of(st.integers(1, 5), st.sampled_from([4, 8]))
    else:
        channels = vectors if three and draw(st.booleans()) else st.one_of(st.integers(1, 20), vectors)
    c, k = draw(channels), draw(channels)
    size, images = pair(1, 14), draw(st.integers(1, 3))
    conv = Conv((images, c * g, *size), (k * g, c, *kernel), stride, pair(0, 4), dilation, g)
    assume(all(n + 2 * p > d * (r - 1) for n, p, d, r in zip(size, conv.padding, dilation, kernel, strict=True)))
    return conv


@dataclass(frozen=True)
class Truth:
    """A result in float64, and the norm that it has where the terms of its sums cancel as random ones do."""

    value: torch.Tensor
    norm: float

    @classmethod
    def of(cls, value, absolute, terms):
        """absolute: the same sums of absolute values; terms: how many a sum has."""
        return cls(value, max(float(value.norm()), float(absolute.norm()) / max(terms, 1) ** 0.5))


def assert_close(name, got, truth, witness, *, winograd=False):
    """Within twice eager's error or 16 roundings (4 in half precision: sums run in float32), or what Winograd may be
    off by, relative to truth.norm.

    Not to the norm of the value alone: a few sums whose terms cancel by chance have any relative error.
    """
    assert got.shape == truth.value.shape, name
    error, eager = (float((t.detach().double() - truth.value).norm()) for t in (got, witness))
    roundings = (16 if got.dtype is torch.float32 else 4) * unit_roundoff(got.dtype)
    roundings = max(roundings, WINOGRAD) if winograd and got.dtype is torch.float32 else roundings
    limit = max(2 * eager, roundings * truth.norm, 1e-30)
    assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"

"""Makes a ResNet faster with one call, and shows that its numbers stay: fuse, compare, time, unfuse.

python examples/fuse_a_model.py [--model resnet50] [--quick]
"""

import argparse
import copy
import time

import torch

import fastres


def milliseconds(model, images, repeats):
    with torch.no_grad():
        for _ in range(3):
            model(images)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(images)
            times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="resnet50", help="a model of fastres.models")
parser.add_argument("--quick", action="store_true", help="ResNet-18 and small images: does it work?")
options = parser.parse_args()
name, size, repeats = ("resnet18", 64, 3) if options.quick else (options.model, 224, 15)

torch.manual_seed(0)
eager = fastres.models.create_model(name, fused=False).eval().to(memory_format=torch.channels_last)
images = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)

fused = copy.deepcopy(eager)
print(fastres.fuse_(fused))

with torch.no_grad():
    exact = copy.deepcopy(eager).double()(images.double())
    for label, model in (("eager", eager), ("fused", fused)):
        error = (model(images).double() - exact).norm() / exact.norm()
        print(f"{label}: error against float64 {error:.1e}, median {milliseconds(model, images, repeats):.1f} ms")

fastres.unfuse_(fused)
assert type(fused.layer1[0]) is type(eager.layer1[0])

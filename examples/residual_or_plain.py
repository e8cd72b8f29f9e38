"""Degradation in small: the gradient that reaches the first layer, and the first steps of training, of plain and
residual networks of the same depths and sizes.

    python examples/residual_or_plain.py [--depths 20 56] [--steps 40] [--quick]
"""

import argparse

import torch
from torch.nn import functional as F

from fastres import models
from fastres.train import datasets

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--depths", type=int, nargs="+", default=[20, 56], help="20, 32, 44, 56, 110")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--quick", action="store_true", help="20 layers, two steps: does it work?")
options = parser.parse_args()
depths, steps = ([20], 2) if options.quick else (options.depths, options.steps)
data = datasets.digits()

for kind in ("plain", "resnet"):
    for depth in depths:
        torch.manual_seed(0)
        net = models.create_model(f"{kind}{depth}").to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(steps):
            images, labels = data.train.__getitems__(torch.randint(len(data.train), (64,)).tolist())
            loss = F.cross_entropy(net(images.float() / 255 - 0.3), labels)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                gradient = net.conv1.weight.grad.norm().item()
            optimizer.step()
            losses.append(loss.item())
        last = sum(losses[-10:]) / len(losses[-10:])
        print(f"{kind}{depth}: gradient of the first layer {gradient:.3g}, loss of the last steps {last:.3f}")

"""A network of one's own from fused modules, trained for some steps: no block of the library is needed.

python examples/own_network.py [--steps 150] [--quick]
"""

import argparse

import torch
from torch import nn

from fastres.nn import ConvBnAct2d
from fastres.train import datasets


def conv_bn_relu(inputs, outputs, stride=1):
    return ConvBnAct2d(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + x) in two fused ops."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = conv_bn_relu(channels, channels), conv_bn_relu(channels, channels)

    def forward(self, x):
        return self.second(self.first(x), residual=x)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--quick", action="store_true", help="three steps: does it work?")
options = parser.parse_args()
steps = 3 if options.quick else options.steps

torch.manual_seed(0)
net = nn.Sequential(
    conv_bn_relu(3, 32, 2), Block(32), Block(32),
    conv_bn_relu(32, 64, 2), Block(64), Block(64),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
).to(memory_format=torch.channels_last)  # fmt: skip
data = datasets.digits()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def batch(images, indices):
    pixels, labels = images.__getitems__(indices)
    return (pixels.float() / 255).to(memory_format=torch.channels_last), labels


for step in range(steps):
    pixels, labels = batch(data.train, torch.randint(len(data.train), (64,)).tolist())
    loss = nn.functional.cross_entropy(net(pixels), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
    optimizer.step()
    if step % 25 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

with torch.no_grad():
    pixels, labels = batch(data.test, range(len(data.test)))
    accuracy = (net.eval()(pixels).argmax(1) == labels).float().mean()
print(f"test accuracy {100 * accuracy:.1f} %")

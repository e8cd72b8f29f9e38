"""Transfer learning step by step: a network learns the digits 0 to 4; its frozen features and a linear layer then tell
5 to 9 apart from a few images of each. `fastres transfer` does this with seeds, fine-tuning and a report.

    python examples/transfer_digits.py [--shots 5] [--epochs 4] [--quick]
"""

import argparse

import torch
from torch.nn import functional as F

from fastres import models, transfer
from fastres.train import datasets

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shots", type=int, default=5, help="images of each new class to learn from")
parser.add_argument("--epochs", type=int, default=4, help="passes over the old classes")
parser.add_argument("--quick", action="store_true", help="three steps: does it work?")
options = parser.parse_args()

torch.manual_seed(0)
data = datasets.digits()


def images_of(part, wanted):
    images, labels = part.__getitems__(range(len(part)))
    kept = torch.isin(labels, torch.tensor(wanted))
    return ((images[kept].float() / 255 - 0.3) / 0.35).to(memory_format=torch.channels_last), labels[kept]


# 1. The old task
x, y = images_of(data.train, range(5))
net = models.resnet20(num_classes=5).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
steps = 3 if options.quick else options.epochs * (len(x) // 64)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    batch = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    F.cross_entropy(net(x[batch]), y[batch]).backward()
    optimizer.step()
    schedule.step()

# 2. Features of the new classes, computed once: frozen, fused, batch norms folded into the convolutions
backbone = transfer.feature_extractor(net)
few, few_labels = images_of(data.train, range(5, 10))
chosen = torch.cat([torch.nonzero(few_labels == digit)[: options.shots, 0] for digit in range(5, 10)])
test, test_labels = images_of(data.test, range(5, 10))
with torch.no_grad():
    features, test_features = backbone(few[chosen]), backbone(test)

# 3. A linear layer on them
head = torch.nn.Linear(features.shape[1], 5)
optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100)


def closure():
    optimizer.zero_grad()
    loss = F.cross_entropy(head(features), few_labels[chosen] - 5) + 1e-3 * head.weight.square().sum()
    loss.backward()
    return loss


optimizer.step(closure)
accuracy = (head(test_features).argmax(1) == test_labels - 5).float().mean()
print(f"{options.shots} images of each of 5 new classes: test accuracy {100 * accuracy:.1f} % (guessing: 20 %)")

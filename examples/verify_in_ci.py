"""What a project that uses fastres can run in its own CI: hold every fused block of its model against float64, and
write the certificate. The exit code is 1 if a number is outside of its budget.

    python examples/verify_in_ci.py [--out certificate.json] [--quick]
"""

import argparse
import sys
from pathlib import Path

import torch

import fastres


def make_model():
    """Your model, with your weights."""
    torch.manual_seed(0)
    return fastres.models.resnet20(num_classes=10)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("certificate.json"))
parser.add_argument("--quick", action="store_true", help="inference only, two images: does it work?")
options = parser.parse_args()

images = torch.randn(2 if options.quick else 8, 3, 32, 32)
certificate = fastres.verify(make_model(), images, mode="eval" if options.quick else "train")
print(certificate)
certificate.save(options.out)
if not certificate.ok:
    sys.exit(1)

"""The report of the CUDA kernels finds faults; the seeded bugs of the sanitizers are still bugs of these sources."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import cuda_report  # noqa: E402
import cuda_sanitize  # noqa: E402
from cuda_tools import SOURCES  # noqa: E402

PREFIX = "_ZN7fastres4cuda51_GLOBAL__N__9b1e3100_18_bn_act_backward_cu_9d7ed481"


def test_names_of_kernels():
    code = cuda_report.named(f"{PREFIX}21backward_apply_kernelI13__nv_bfloat16Lb0ELi8EEEvNS0_4ViewE", "sm_80")
    assert (code.name, code.dtype, code.channels_last, code.width) == ("backward_apply_kernel", "bf16", False, 8)
    code = cuda_report.named(f"{PREFIX}18elementwise_kernelI6__halfLi1ENS1_4KeptEEEvlPKT_S7_PS5_T1_", "sm_80")
    assert (code.dtype, code.channels_last, code.width, code.variant) == ("fp16", None, 1, "Kept")
    with pytest.raises(RuntimeError, match="not known to this report"):
        cuda_report.named(f"{PREFIX}11some_kernelIfLb0ELi8EEEvNS0_4ViewE", "sm_80")


def test_faults():
    good = cuda_report.Code("sm_80", "apply_kernel", "fp32", True, 8, "", registers=128, loads=8, stores=4)
    assert not list(good.faults())
    assert not list(replace(good, width=1, registers=40, loads=0, stores=0).faults())
    for change, words in (
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 accesses to local memory"),
        ({"registers": 129}, "129 registers, more than 128"),
        ({"loads": 4}, "4 loads and 4 stores of 16 bytes, not 8 and 4"),
        ({"stores": 0}, "8 loads and 0 stores"),
    ):
        (fault,) = replace(good, **change).faults()
        assert words in fault


@pytest.mark.parametrize("bug", cuda_sanitize.BUGS, ids=lambda bug: bug.name)
def test_seeded_bugs_fit_the_sources(bug):
    assert (SOURCES / bug.file).read_text().count(bug.before) == 1
    seen, left = set(), [bug.kernel]  # what the kernel is compiled of
    while left:
        seen.add(left[-1])
        text = (SOURCES / left.pop()).read_text()
        left += [name for name in re.findall(r'#include "(\S+)"', text) if name not in seen]
    assert bug.file in seen

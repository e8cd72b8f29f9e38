"""Run by torchrun for tests/_distributed.py: every check that is for this number of processes, one after the other.

torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER [NAME ...]
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

import _distributed_fsdp  # noqa: F401
import _distributed_synchronised  # noqa: F401
import _distributed_train  # noqa: F401
import _distributed_wrapped  # noqa: F401
import _synchronised
import torch
from _distributed import CHECKS, SIZES, Agreement

from fastres.train.distributed import world

folder, only = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
with world("cpu") as processes:
    agreement = Agreement(folder, processes.rank, processes.size)
    found: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        if processes.size not in SIZES[name] or only and name not in only:
            continue
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            check(processes.rank, processes.size)
            found[name] = None
        except Exception:  # the test of this check shows it
            found[name] = traceback.format_exc()
        if processes.rank == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {name}{'  FAILED' if found[name] else ''}", flush=True)
        (folder / f"{processes.rank}.json").write_text(json.dumps(found))
        if found[name] and not agreement.reached(name, 20):
            os._exit(1)  # torchrun ends the others, which wait for this one
        elif not found[name]:
            agreement.reached(name, 60)
    torch.save(_synchronised.RESULTS, folder / f"synchronised-{processes.rank}.pt")

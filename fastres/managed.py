"""Who else brings, holds or writes the tensors of a module: FSDP, offload hooks, DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastres.reasons import because


def reason(module: nn.Module, role: str) -> str | None:
    """ "FSDP manages conv1", where another keeps the parameters of the module in this role sharded or elsewhere between
    its calls; or None.

    Weights folded from them would stay in memory, which the manager is there to prevent. So fused code leaves such
    modules alone.
    """
    attributes = module.__dict__
    if "_is_fsdp_managed_module" in attributes:  # set by fully_shard and by FullyShardedDataParallel
        return because("managed", f"FSDP manages {role}")
    hook = attributes.get("_hf_hook")  # accelerate's
    if hook is not None and any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
        return because("managed", f"an offload hook manages {role}")
    return None


def without_fsdp(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before fully_shard mixed FSDPModule in."""
    return cls.__bases__[-1] if cls.__bases__[0].__name__ == "FSDPModule" else cls


def buffers_are_broadcast() -> bool:
    """Whether this is a forward in which DistributedDataParallel wrote buffers. It moves no version counter."""
    if not torch.distributed.is_available():
        return False
    wrapper: Any = nn.parallel.DistributedDataParallel
    active = wrapper._get_active_ddp_module()
    return active is not None and active.will_sync_module_buffers()

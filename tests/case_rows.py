"""The edge cases that fuse_ has to get right, in short, and what of them is not tested yet. The tests of a row are
called by its id: test_a1_... in tests/test_cases_*.py; docs/cases.md lists them (scripts/cases.py)."""

#: Of each section, what it is about, and its rows.
SECTIONS = {
    "A": (
        "Convolution and batch-norm configuration",
        (
            "convolution with a bias",
            "batch norm without weight and bias",
            "batch norm with one of them",
            "no running statistics, or one of two",
            "momentum None: cumulative average",
            "momentum 0, 1, or changed later",
            "num_batches_tracked, or None",
            "unusual eps, or 0",
            "running_var is unbiased, the output biased",
            "one value a channel in training",
            "an empty batch",
            'padding by reflection, replication, wrapping, "same" and "valid"',
            "groups, depthwise, dilation, strides, even kernels",
            "other convolutions, linear layers, lazy modules",
            "channels that do not fit, unbatched inputs",
            "weights of batch norm that are 0 or negative",
            "tiny or huge variance; a fold that overflows",
            "a large mean with a small variance",
        ),
    ),
    "B": (
        "Modes and freezing",
        (
            "eval and train by turns",
            "batch norm in eval inside a training model",
            "frozen weights of batch norm",
            "FrozenBatchNorm2d of several libraries",
            "folded weights never go stale",
            "no_grad in training mode",
            "inference_mode",
            "layers between batch norm and addition",
            "activations: which are fused",
        ),
    ),
    "C": (
        "Structure",
        (
            "a convolution shared, or used elsewhere",
            "one batch norm twice in a forward",
            "a module under two names",
            "a convolution's output used elsewhere",
            "no folding across an activation",
            "in-place activations whose input has other users",
            "subclassed blocks",
            "subclassed batch norms",
            "shortcuts of several kinds",
            "residuals of another shape, dtype or layout",
            "blocks of other libraries",
            "swapped twice, nested, wrapped, averaged",
        ),
    ),
    "D": (
        "Hooks, state, copies",
        (
            "hooks on children, global hooks",
            "parametrizations, weight norm, pruning",
            "deepcopy, pickle, torch.save",
            "state_dict: keys, order, metadata, both ways",
            "optimizers made before and after the swap",
            "averages of weights, update_bn",
            "functional_call, stack_module_state",
            "children converted after the swap",
            "un-swapping gives every bit back",
            "repr, named_modules, FLOP counters",
            "exact types and names",
        ),
    ),
    "E": (
        "Tensors",
        (
            "strided, sliced, expanded tensors",
            "layouts, mixed and ambiguous",
            "NaN and infinities",
            "float64, complex, integers",
            "whole models in half precision",
            "half-precision inputs with float32 parameters",
            "more than 2^31 values",
            "very large batches",
            "several devices",
            "meta and fake tensors",
            "tensor subclasses, FX proxies",
        ),
    ),
    "F": (
        "Autograd and transforms",
        (
            "only some gradients wanted",
            "backward twice",
            "gradients of gradients",
            "saved-tensor hooks, checkpointing of all kinds",
            "checkpointing and running statistics, once on request",
            "an input changed in place after forward",
            "vmap, jacrev, jvp, forward mode",
            "torch.jit, ONNX",
            "torch.compile: fullgraph, new sizes",
            "torch.export, AOTInductor",
            "autocast: nested, cached, backward outside",
            "GradScaler and infinities",
            "deterministic mode",
        ),
    ),
    "G": (
        "System",
        (
            "DistributedDataParallel",
            "sharded parameters",
            "DataParallel's replicas",
            "CUDA graphs",
            "tuning and statistics",
            "streams, threads, fork",
            "no Triton, no compiler, no GPU",
            "a binary of another torch, an unknown GPU",
            "memory: peaks, and nothing held",
        ),
    ),
}

#: Text of every row, by id.
ROWS = {
    f"{letter}{number}": text for letter, (_, rows) in SECTIONS.items() for number, text in enumerate(rows, start=1)
}

#: A row without a test, or the part of a row that its tests leave out: why.
NOT_YET = {
    "A5": "CUDA graph capture needs a GPU; that nothing is read back to the host is tested on the CPU",
    "B4": "torchvision's FrozenBatchNorm2d runs on the eager path and is reported by name; timm's, detectron2's, "
    "mmdet's and Hugging Face's come with the recipes for those libraries",
    "B8": "timm's own blocks come with the timm recipe; tested on a block written as timm writes it",
    "C11": "Hugging Face ResNet, mmcv ConvModule and detectron2 BottleneckBlock have no recipes yet; torchvision's "
    "quantizable blocks are tested",
    "E7": "more than 2^31 values are tested by shape on the meta device; a real tensor of that size needs the memory",
    "E9": "several GPUs need a machine with several; the meta device stands for the second device",
    "F8": "ONNX export is tested where onnx and onnxscript are installed; functions of fastres.functional that a "
    "model calls itself are not unfused",
    "F10": "AOTInductor compiles for minutes: FASTRES_SLOW_TESTS=1 runs its tests",
    "F11": "autocast for CUDA needs a GPU; tests/test_gpu.py has it",
    "G2": "one process on a CPU; ZeRO-3 and accelerate's offloading are not tried",
    "G4": "capture and replay need a GPU, tests/test_gpu.py has them; here nothing is read back, and a warm-up's "
    "statistics are taken back",
    "G6": "streams need a GPU; a forked child that computes with several threads hangs in OpenMP, in PyTorch's own "
    "convolutions as well",
    "G7": "tested on Linux; Windows and macOS have not been tried",
    "G8": "an unknown GPU architecture needs one",
    "G9": "peaks count what operators return; scratch memory inside kernels is measured by benchmarks/memory.py",
}

"""The rows of the edge-case table that fuse_ has to get right, and what of them is not tested yet."""

#: Ids of a section: its letter and the number of its rows.
SECTIONS = {"A": 18, "B": 9, "C": 12, "D": 11, "E": 11}

IDS = [f"{letter}{number}" for letter, count in SECTIONS.items() for number in range(1, count + 1)]

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
}

"""The rows of the edge-case table that fuse_ has to get right, and what of them is not tested yet."""

#: Ids of a section: its letter and the number of its rows.
SECTIONS = {"A": 18, "B": 9, "C": 12, "D": 11, "E": 11}

IDS = [f"{letter}{number}" for letter, count in SECTIONS.items() for number in range(1, count + 1)]

#: A row without a test, or the part of a row that its tests leave out: why.
NOT_YET = {
    "A5": "CUDA graph capture needs a GPU; that nothing is read back to the host is tested on the CPU",
    "E7": "more than 2^31 values are tested by shape on the meta device; a real tensor of that size needs the memory",
    "E9": "several GPUs need a machine with several; the meta device stands for the second device",
}

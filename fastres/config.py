"""Settings of the whole process. Set them directly: `fastres.config.keep_folded_weights = False`."""

#: Keep folded and packed convolution weights between inference calls. False: fold on every call, which is slower, but
#: nothing can go stale.
keep_folded_weights: bool = True

#: Bytes that the kept weights of all models together may take (`fastres.packed_bytes()`), or None for no limit. A
#: convolution whose weights do not fit any more is folded and packed on every call.
max_packed_bytes: int | None = None

#: Let Winograd's F(4x4, 3x3) serve 3x3 convolutions in float32: two to three times as fast, relative error about 1e-6.
winograd: bool = True

#: A file of measured block sizes for Triton kernels (fastres/kernels/triton/tuning.py), or None: a plain function of
#: shape and device decides.
triton_choices: str | None = None

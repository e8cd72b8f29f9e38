"""Settings of the whole process. Set them directly: `fastres.config.keep_folded_weights = False`."""

#: Keep folded and packed convolution weights between inference calls. False: fold on every call, which is slower, but
#: nothing can go stale.
keep_folded_weights: bool = True

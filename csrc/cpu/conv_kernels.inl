// The convolution kernels of conv.h for one instruction set.
#include "conv_storage.inl"
#include "conv_tile.inl"

#include "conv_gemm.inl"
#include "conv_grouped.inl"
#include "conv_pool.inl"
#include "conv_stem.inl"
#include "conv_weight_gradient.inl"
#include "conv_winograd.inl"
#include "conv_winograd_gradient.inl"

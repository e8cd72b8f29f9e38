"""Kernels and the table that says which one serves which op."""

"""Sparse compute: linear layers and convolutions that skip the zeros of their weights, where that is faster."""

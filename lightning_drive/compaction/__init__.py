"""Smaller dense networks: take out of the tensors what pruning has cut off from the input or the output."""

"""Smaller dense networks: remove the channels that pruning has cut off from the input or the output."""

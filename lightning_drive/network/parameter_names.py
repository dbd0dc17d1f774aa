"""Recognise parameters by their names."""


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias: ``"0.bias"``, ``"attention.in_proj_bias"``, ``"bias_ih_l0"``."""
    return "bias" in name.rpartition(".")[-1]

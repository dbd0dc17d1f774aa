"""What the tests of the package rely on."""

from suite import *  # noqa: F403
from suite import _clean_torch, _one_thread  # noqa: F401

"""What the tests of the package rely on."""

from suite import *  # noqa: F403

"""What the tests of the examples rely on."""

from suite import *  # noqa: F403

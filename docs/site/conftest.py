"""What the tests of the documentation rely on."""

from suite import *  # noqa: F403

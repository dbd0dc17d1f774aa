"""``python -m lightning_drive`` is the command ``lightning-drive``."""

import sys

from lightning_drive.command import main

if __name__ == "__main__":
    sys.exit(main())

"""Files: write and read sparse files, and read checkpoints without running code in them."""

"""Files: sparse files, and checkpoints read without running code that is in them."""

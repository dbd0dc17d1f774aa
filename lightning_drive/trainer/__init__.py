"""Everything that touches a running Trainer."""

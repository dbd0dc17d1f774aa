"""Find masks for a module, without Lightning: methods, the rounds that they share, and what can go wrong in them."""

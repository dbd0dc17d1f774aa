"""Find masks for a module without Lightning: methods, the loop that they share, and the diagnosis of its outcome."""

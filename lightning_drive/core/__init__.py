"""Tensors and numbers: settings, schedules, scores, selection, and the processes of a run."""

"""Tensors and numbers: settings, schedules, scores, selection, masks, and the processes of a run."""

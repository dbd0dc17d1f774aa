"""Tensors and numbers: settings, schedules, scores, selection, masks, and what several processes share."""

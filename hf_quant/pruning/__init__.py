"""Pruning: schedules, criteria, structures, masks that hold, and real shrinking."""

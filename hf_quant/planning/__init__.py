"""A recipe laid onto its training without training: steps, phases, sizes, memory, conflicts."""

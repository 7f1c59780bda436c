"""Callbacks for an unmodified `transformers.Trainer`."""

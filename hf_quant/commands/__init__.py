"""The commands of `hf-quant`, one a file."""

"""From float modules to int8 ones: observers, fake-quant, QAT, convert, and post-training quantization."""

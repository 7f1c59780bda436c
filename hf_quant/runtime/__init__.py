"""The int8 modules and the kernels they run on."""

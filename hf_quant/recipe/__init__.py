"""Recipes: one YAML file that says how a model is trained, quantized and measured."""

"""Evaluation: what a model can do, measured on documents it was never trained on."""

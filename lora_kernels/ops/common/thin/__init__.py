"""Passes over x or dy with a rank-wide partner, which the LoRA families share."""

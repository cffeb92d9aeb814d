"""The steps, a file each; `plan.py` has their order and limits."""

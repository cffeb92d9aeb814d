"""Facts about the GPU kernels that need no GPU: executors that record, compile and emulate their
launches; what the code takes, and what it moves.

`python -m bench resources` and `python -m bench traffic` print and save them.
"""

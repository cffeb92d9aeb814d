"""`python -m tools.gpu`, which is `make gpu`: what one GPU says of this package in ten minutes.

Two phases, A (is it right?) and B (how fast is it?), of steps in processes of their own.
docs/gpu.md says what it writes and how to read it.
"""

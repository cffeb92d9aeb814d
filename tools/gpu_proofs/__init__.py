"""Facts about the GPU kernels that need no GPU: executors that record, compile and emulate their
launches, what the code takes, what it moves. `python -m bench resources` and `traffic` print them."""

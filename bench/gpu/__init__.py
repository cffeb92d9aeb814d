"""Facts about the Triton kernels that need no GPU: executors that record, compile and emulate."""

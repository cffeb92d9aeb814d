"""Benchmarks: cases and providers declared once, verified first, timed interleaved."""

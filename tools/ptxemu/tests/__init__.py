"""The emulator's own tests: functions, run by `tests/compiled/test_ptxemu.py` or one file by itself."""

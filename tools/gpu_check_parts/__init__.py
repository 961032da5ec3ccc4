"""The parts of tools/gpu_check.py: each is run by `child` in a process of its own, under `runner`."""

"""Trainer ranks on Megatron-Core: the only package that imports megatron. No ray.

Import nothing of megatron before `parallel.initialize`, which applies the patches; the modules that import it at their
top (`model`, `optimizer`, ...) are imported after that call.
"""

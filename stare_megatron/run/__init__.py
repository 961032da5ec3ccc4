"""A run from its first check to its last file: the only package that knows every other one."""

"""Scaling studies: what accuracy costs, by size and method, fitted to the records of finished runs."""

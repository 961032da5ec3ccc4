"""Environments: what a policy talks to during one episode."""

"""Where model-written Python runs; docs/sandbox.md states what it protects from and what not.

`pool.Sandbox` runs code on this machine, `remote.RemoteSandbox` on a server; `box.open_sandbox` makes the one that
`[sandbox]` asks for. This file stays empty of imports: the processes that run the code import from here.
"""

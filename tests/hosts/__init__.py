"""Hosts of a cluster on one machine, without a shared disk, and what happens when they, their links or a server fail.

`__main__.py` is the command, `machines.py` builds the hosts, `trials.py` is what happens to them, and `relay.py` and
`frames.py` are programs that run between them.
"""

"""Say what this machine has, what a pass and a training would use of it, and what is missing.

    permafrost doctor
    permafrost doctor cluster=existing

Its output is the first thing to paste into a report of a bug. It names no file, no user and no host. Each GPU computes
one convolution. With cluster=existing, the hosts of a running Ray are counted, and no GPU of this machine is touched.

Reads   the versions of packages, /proc, the devices of torch, and with cluster=existing the resources of Ray
Writes  nothing
"""

from permafrost.cli import stage_main

if __name__ == "__main__":
    stage_main("doctor")

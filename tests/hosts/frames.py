"""Link that loses and delays frames, for kernels without the queueing discipline netem.

python -m tests.hosts.frames <interface> <interface> <share lost> <seconds>   pass frames between two interfaces
python -m tests.hosts.frames plain <interface>        have an interface send complete checksums and no large segments
"""

from __future__ import annotations

import fcntl
import heapq
import random
import select
import socket
import struct
import sys
import time
from array import array
from contextlib import suppress

_ALL = 3
_OUTGOING = 4
_ETHTOOL = 0x8946
_SETTINGS = (0x17, 0x1F, 0x24)
"""ethtool's settings of the checksums that are sent, of TCP's segments and of segments in general."""


def send_plainly(interface: str) -> None:
    """Switch off what a network card would do with frames that are sent: a program would read them unfinished."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for setting in _SETTINGS:
            value = array("B", struct.pack("II", setting, 0))
            address, _ = value.buffer_info()
            request = struct.pack("16sP", interface.encode(), address)
            fcntl.ioctl(control.fileno(), _ETHTOOL, request)


def pass_frames(interfaces: list[str], share: float, seconds: float) -> None:
    """Pass frames from each of two interfaces to the other one, for ever."""
    ends = [
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)) for _ in interfaces
    ]
    for end, interface in zip(ends, interfaces, strict=True):
        end.bind((interface, _ALL))
    draw, waiting, number = random.Random(0), [], 0
    while True:
        rest = waiting[0][0] - time.monotonic() if waiting else None
        ready, _, _ = select.select(ends, [], [], None if rest is None else max(rest, 0))
        for end in ready:
            frame, source = end.recvfrom(2**16)
            if source[2] == _OUTGOING or draw.random() < share:
                continue
            number += 1
            other = ends[1 - ends.index(end)]
            heapq.heappush(waiting, (time.monotonic() + seconds, number, frame, other))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, frame, other = heapq.heappop(waiting)
            with suppress(OSError):  # a large segment that was under way before the link was slowed
                other.send(frame)


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        send_plainly(sys.argv[2])
    else:
        pass_frames(sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]))

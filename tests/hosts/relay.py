"""Relay of TCP connections to a port of this host. Killed, it refuses all connections, as a server that is restarted.

python tests/hosts/relay.py <port> <port of the server>

moto's server keeps its objects in memory, so it must not end itself.
"""

import asyncio
import sys
from contextlib import suppress


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Pass bytes on until the source ends."""
    with suppress(OSError):
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()
    sink.close()


async def main(port: int, server: int) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", server)
        await asyncio.gather(pump(reader, requests), pump(answers, writer))

    relay = await asyncio.start_server(connect, "0.0.0.0", port)
    print("relays", flush=True)
    async with relay:
        await relay.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))

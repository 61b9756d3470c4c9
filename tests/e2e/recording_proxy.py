"""A TLS proxy that keeps every byte a silo sends and receives, in clear: what an eavesdropper inside TLS would see."""

import asyncio
import contextlib
import ssl
import threading
from pathlib import Path


class RecordingProxy:
    """Listens on a loopback port with the server's certificate and passes everything on to ``upstream_port``.

    One event loop in one thread moves all bytes: a TLS connection must not be read and written by two threads at once.
    """

    def __init__(self, upstream_port: int, certificate: Path, key: Path, ca_file: Path):
        self._upstream_port = upstream_port
        self._serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._serving.load_cert_chain(certificate, key)
        self._calling = ssl.create_default_context(cafile=str(ca_file))
        self.sent = bytearray()
        self.received = bytearray()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._serving))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Take no more connections."""

        async def stop() -> None:
            self._server.close()

        self._run(stop())

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    async def _serve(self, from_silo: asyncio.StreamReader, to_silo: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(
                "127.0.0.1", self._upstream_port, ssl=self._calling, server_hostname="localhost"
            )
        except OSError:
            to_silo.close()
            return
        await asyncio.gather(
            _pump(from_silo, to_server, self.sent),
            _pump(from_server, to_silo, self.received),
        )


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, record: bytearray) -> None:
    """Pass on and keep what comes, until either end is gone; then close ``target``."""
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            record += data
            target.write(data)
            await target.drain()
    with contextlib.suppress(OSError):
        target.close()

"""Counts what goes over a wire, both ways: a TCP proxy in threads of the test."""

import contextlib
import socket
import threading
from collections.abc import Iterator

PIECE_BYTES = 64 << 10


class CountingProxy:
    """Passes connections to a port of this host on. ``passed_bytes``: both ways together."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.passed_bytes = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                outer = socket.create_connection(("127.0.0.1", self._target_port), 5)
            except OSError:
                inner.close()
                continue
            outer.settimeout(None)
            self._open |= {inner, outer}
            for source, target in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                with self._lock:
                    self.passed_bytes += len(piece)
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # A thread that waits in accept is not woken by closing alone.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._open:
            end.close()
        self._thread.join(5)


@contextlib.contextmanager
def counting(target_port: int) -> Iterator[CountingProxy]:
    proxy = CountingProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()

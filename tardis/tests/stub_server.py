"""In the place of vLLM's server, for tests of what watches it: `python -m stub_server` with vLLM's options.

It answers `/health`, and finishes what is in flight for STUB_SECONDS after SIGTERM. With STUB_DEAF it never listens. It
writes into the file STUB_LOG what it was called with, and that it has finished.
"""

from __future__ import annotations

import argparse
import http.server
import os
import signal
import threading
import time
from pathlib import Path


class Answer(http.server.BaseHTTPRequestHandler):
    """Any GET is well."""

    def do_GET(self) -> None:
        """Say so."""
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    for name in ("--host", "--port", "--shutdown-timeout", "--model", "--middleware"):
        parser.add_argument(name)
    options = parser.parse_args()
    log, told = Path(os.environ["STUB_LOG"]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    log.write_text(f"{options}\n")
    if "STUB_DEAF" not in os.environ:
        server = http.server.ThreadingHTTPServer((options.host, int(options.port)), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    told.wait()
    time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
    with log.open("a") as file:
        file.write("finished\n")


if __name__ == "__main__":
    main()

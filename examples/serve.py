"""Serve a fold over the OpenAI API, ask it something, and stop the server.

    python examples/serve.py FOLDED

FOLDED is what `tardis fold` or fold_llama.py wrote. It runs in an environment with vLLM: see docs/serve.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

PORT = 8123
PATIENCE = 600  #: seconds until the server must answer; the first start compiles


def ask(path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """The answer of the server to a request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait(server: subprocess.Popen[bytes]) -> str:
    """The name of the model, once the server answers."""
    for _ in range(PATIENCE):
        if server.poll() is not None:
            raise SystemExit("the server ended before it was ready; what it printed says why")
        try:
            return ask("/v1/models")["data"][0]["id"]  # type: ignore[index]
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise SystemExit(f"the server did not answer within {PATIENCE} seconds")


def main(folded: str) -> None:
    """Start the server, complete one prompt, and stop it."""
    server = subprocess.Popen([sys.executable, "-m", "tardis_llm", "serve", folded, "--port", str(PORT)])
    try:
        prompt = {"model": wait(server), "prompt": "The city was founded in", "max_tokens": 32, "temperature": 0}
        print(ask("/v1/completions", prompt)["choices"][0]["text"])  # type: ignore[index]
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])

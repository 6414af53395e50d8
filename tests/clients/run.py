"""Other people's clients against a server of ours, in an environment apart. ``make test-clients`` runs it."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.environment import environment  # noqa: E402


def wait(url: str, server: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Until the server at ``url`` takes requests."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    sys.exit("the server did not start; its log is above")


def main() -> int:
    """Serve, run the calls, stop; what pytest returned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a model whose template knows tools")
    parser.add_argument("--environment", type=Path, required=True, help="where the clients are installed")
    parser.add_argument("pytest", nargs="*", help="options of pytest")
    options = parser.parse_args()
    python = environment(options.environment.resolve(), HERE / "requirements.txt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    kvbits = Path(sys.executable).with_name("kvbits")
    command = [kvbits, "serve", options.model, "--served-model-name", "model", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--kv-cache-dtype", "int8", "--kv-cache-memory", "1GiB"], stderr=subprocess.DEVNULL
    )
    try:
        wait(url, server)
        ask = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", HERE]
        ask += ["--confcutdir", HERE, "--override-ini", "python_files=calls_*.py"]
        ask += [HERE, "--url", url, "--served-model", "model"]
        return subprocess.run([*ask, *options.pytest], check=False).returncode
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    sys.exit(main())

"""Process start to first token, with cold and with warm compile caches.

    python -m bench.startup demo:random-qwen3-8b --warm-runs 2 --json bench/results/h200

Each run is `python -m nanodeploy.serve` on a free port, timed from before that process is created until the first
token of the first request has come over HTTP. The cold run starts with an empty cache folder (NANODEPLOY_CACHE); the
warm runs use what it left there. What the disk's page cache holds is as it is: read the libraries, or the weights, once
before, if they are to be in it. Flags that are not its own go to the server.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench.header import ROOT, header, one_line, write_json
from bench.offline import result_path
from nanodeploy import flags
from nanodeploy.phases import table

READY = re.compile(r" at http://([^\s/]+):(\d+): ")
PROMPT = list(range(1, 33))
REQUEST = {"prompt": PROMPT, "max_tokens": 1, "ignore_eos": True, "stream": True}
PATIENCE_S = 60  # for an answer of a server that is ready, and for its end


def timed(server_flags: list[str], cache: str) -> dict[str, Any]:
    """Start one server on the cache folder `cache`: seconds until ready and until the first token, and its phases."""
    command = [sys.executable, "-m", "nanodeploy.serve", *server_flags, "--host", "127.0.0.1", "--port", "0"]
    began = time.monotonic()
    with subprocess.Popen(
        ["env", f"NANODEPLOY_CACHE={cache}", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, map(READY.search, process.stdout)), None)
            if found is None:
                sys.exit(f"the server ended with code {process.wait()} before it was ready.")
            ready = time.monotonic()
            connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=PATIENCE_S)
            first_token(connection)
            done = time.monotonic()
            connection.request("GET", "/server_info")
            info = json.load(connection.getresponse())
            connection.close()
        finally:
            process.terminate()
    return {
        "first_token_s": done - began,
        "ready_s": ready - began,
        "first_request_s": done - ready,
        "phases": info["engine"]["phases"],
        "kernels": info["engine"].get("kernels", {}),
    }


def first_token(connection: http.client.HTTPConnection) -> None:
    """Ask for one token, and return when it is here."""
    body = json.dumps(REQUEST)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    events = []
    while line := reply.readline():
        if line.startswith(b"data: {"):
            events.append(json.loads(line.removeprefix(b"data: ")))
            break
    if reply.status != 200 or not events or not events[0].get("choices"):
        sys.exit(f"the first request failed: {reply.status} {events}")
    reply.read()


def report(name: str, run: dict[str, Any]) -> str:
    """A run as lines: its phases, then their sum."""
    rows = {**run["phases"], "the first request, over HTTP": run["first_request_s"]}
    return "\n".join([f"{name}:", *table(rows, run["first_token_s"], "from process start to first token")])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.startup", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--warm-runs", type=int, default=2)
    parser.add_argument("--json", help="write the results here: a file, or a folder that gets startup-MODEL.json")
    parser.add_argument("--commit", help="commit of this tree, where it travelled without git")
    args, server_flags = parser.parse_known_args(argv)
    config = flags.parse(server_flags, parser.prog)  # complain here, not in the server
    print(one_line(header(commit=args.commit)))
    runs = {}
    with tempfile.TemporaryDirectory(prefix="nanodeploy-startup-") as cache:
        for name in ["cold", *(f"warm {i}" for i in range(args.warm_runs))]:
            runs[name] = timed(server_flags, cache)
            print(report(name, runs[name]), flush=True)
    if args.json:
        path = result_path(args.json, "startup", config)
        write_json(path, {"config": config.to_dict(), "runs": runs}, commit=args.commit)


if __name__ == "__main__":
    main()

"""Process start to first token, with cold and with warm compile caches.

    python -m bench.startup demo:random-qwen3-8b --warm-runs 2 --json out.json

Each run is a new process that imports nanodeploy, builds the engine and generates one token. The cold run starts with
an empty cache folder (NANODEPLOY_CACHE); the warm runs use what it left there. Flags that are not its own go to the
engine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import nanodeploy
from bench.header import ROOT, header, one_line, write_json
from nanodeploy import flags

MARK = "FIRST TOKEN "  # opens the child's line; whatever else it prints is passed on
PROMPT = list(range(1, 33))


def child(engine_flags: list[str]) -> None:
    """The process that is timed: everything up to one token, then its own account as one line of JSON."""
    start = time.perf_counter()
    config = flags.parse(engine_flags, "python -m bench.startup")
    with nanodeploy.LLM(**config.to_dict()) as llm:
        built = time.perf_counter()
        llm.generate([PROMPT], nanodeploy.SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        account = {
            "build_s": built - start,  # imports of torch and the engine, and the engine itself
            "first_token_s": time.perf_counter() - built,
            "phases": llm.info["phases"],
        }
        print(MARK + json.dumps(account), flush=True)


def timed(engine_flags: list[str], cache: str) -> dict[str, Any]:
    """Start one child on the cache folder `cache`; seconds from its start to its first token, and its account."""
    command = ["env", f"NANODEPLOY_CACHE={cache}", sys.executable, "-m", "bench.startup", "--child", *engine_flags]
    start, account = time.perf_counter(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                account = {"total_s": time.perf_counter() - start, **json.loads(line.removeprefix(MARK))}
            else:
                print(line, end="", flush=True)
    if account is None:
        sys.exit(f"the child ended with code {process.returncode} before its first token.")
    return account


def report(name: str, run: dict[str, Any]) -> str:
    """A run as lines: the total, then its phases in seconds."""
    rest = run["total_s"] - run["build_s"] - run["first_token_s"]
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in run["phases"].items())
    return (
        f"{name:8} process start to first token {run['total_s']:.1f} s = interpreter {rest:.1f} + engine "
        f"{run['build_s']:.1f} + first request {run['first_token_s']:.2f}\n         phases (s): {phases}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.startup", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--warm-runs", type=int, default=1)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--commit", help="commit of this tree, where it travelled without git")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, engine_flags = parser.parse_known_args()
    if args.child:
        return child(engine_flags)
    config = flags.parse(engine_flags, parser.prog)  # complain here, not in the child
    print(one_line(header(commit=args.commit)))
    with tempfile.TemporaryDirectory(prefix="nanodeploy-startup-") as cache:
        runs = {"cold": timed(engine_flags, cache)}
        print(report("cold", runs["cold"]), flush=True)
        for i in range(args.warm_runs):
            runs[f"warm {i}"] = timed(engine_flags, cache)
            print(report(f"warm {i}", runs[f"warm {i}"]), flush=True)
    if args.json:
        write_json(args.json, {"config": config.to_dict(), "runs": runs}, commit=args.commit)


if __name__ == "__main__":
    main()

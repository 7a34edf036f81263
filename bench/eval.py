"""Accuracy on the demo's tasks, with weights and KV cache in 16 bits and in FP8: what cheap precision costs.

    python -m bench.eval demo:qwen3-moe demo:deepseek-v3 --markdown docs/DEMO.md --json bench/results/h200

Each model answers the same held-out samples four times, by the offline engine, greedily: as it is, with --quantization
fp8, with --kv_cache_dtype fp8, and with both. An answer is right or wrong as a whole. With n samples a task, a share p
has a standard deviation of sqrt(p (1 - p) / n); the last line of the table compares answer with answer instead.

--markdown writes the table into the file between the lines `<!-- bench.eval -->` and `<!-- end of bench.eval -->`, or
makes a file of it. Models come first; flags that are not its own go to the engine.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.demo import evaluate
from bench.demo.tasks import TASKS, Chat
from bench.demo.tokenizer import prompt
from bench.header import header, one_line, write_json
from nanodeploy import LLM, SamplingParams, flags
from nanodeploy.config import Config

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"quantization": "fp8"},
    {"kv_cache_dtype": "fp8"},
    {"quantization": "fp8", "kv_cache_dtype": "fp8"},
)
MOST_TOKENS = 160  # of an answer; the longest right one has fewer
BEGIN, END = "<!-- bench.eval -->", "<!-- end of bench.eval -->"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Result:
    """One model in one precision."""

    model: str
    weights: str  # "bf16", "fp8"
    cache: str
    accuracy: dict[str, float]  # of each task, and of needles by distance
    answers: list[str]  # of all samples, in an order that is the same for every Result
    seconds: float  # start of the engine and all answers


def answered(llm: LLM, chats: Sequence[Chat]) -> list[str]:
    """Greedy answers as text, without their end tokens."""
    assert llm.tokenizer is not None, "checked by `evaluated`"
    params = SamplingParams(temperature=0, max_tokens=MOST_TOKENS, skip_special_tokens=False)
    prompts = [llm.tokenizer.encode(prompt(chat), add_special_tokens=False) for chat in chats]
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


def evaluated(config: Config, tasks: Mapping[str, evaluate.Make], num: int, seed: int) -> Result:
    """Raises ConfigError where the model or the machine has no such precision."""
    start, answers = time.perf_counter(), []

    def answer(chats: list[Chat]) -> list[str]:
        answers.extend(answered(llm, chats))
        return answers

    with LLM(**config.to_dict()) as llm:
        if llm.tokenizer is None:
            sys.exit(f"{config.model} has no tokenizer.json; the demo's tasks are text.")
        dtype = SHORT[llm.info["config"]["dtype"]]
        accuracy = evaluate.accuracy(answer, tasks, seed, num)
    weights, cache = (
        setting if setting != "auto" else dtype for setting in (config.quantization, config.kv_cache_dtype)
    )
    return Result(config.model, weights, cache, accuracy, answers, time.perf_counter() - start)


def table(results: Sequence[Result]) -> str:
    """In Markdown: a line for each task, a column for each result; the last line compares with the model as it is."""
    lines = [["task", *(f"{Path(r.model.removeprefix('demo:')).name} {r.weights} / {r.cache}" for r in results)]]
    lines.append(["---", *["---:"] * len(results)])
    lines += [[task, *(percent(r.accuracy[task]) for r in results)] for task in results[0].accuracy]
    lines.append(["**all tasks**", *(f"**{percent(mean(r))}**" for r in results)])
    plain = {r.model: r for r in reversed(results)}
    lines.append(["same answer as without FP8", *(percent(alike(r, plain[r.model])) for r in results)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean(result: Result) -> float:
    """Over the tasks; the parts of one that are listed too are in it once."""
    shares = [share for task, share in result.accuracy.items() if task in TASKS]
    return sum(shares) / len(shares)


def alike(result: Result, plain: Result) -> float:
    """The share of samples with the same answer, right or wrong."""
    return sum(a == b for a, b in zip(result.answers, plain.answers, strict=True)) / len(plain.answers)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def put_into(path: Path, text: str) -> None:
    """The text between the file's two marks, or a new file of them. Ends the program if a file lacks the marks."""
    marked = f"{BEGIN}\n{text}\n{END}\n"
    if path.exists():
        before, begin, rest = path.read_text().partition(BEGIN + "\n")
        _, end, after = rest.partition(END + "\n")
        if not (begin and end):
            sys.exit(f"--markdown {path}: wanted the lines {BEGIN} and {END} in it.")
        marked = before + marked + after
    path.write_text(marked)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints with the demo's tokenizer")
    made.add_argument("--num", type=int, default=200, help="held-out samples a task [%(default)s]")
    made.add_argument("--seed", type=int, default=0, help="of the samples")
    made.add_argument("--tasks", default=",".join(TASKS), help="separated by commas [all]")
    made.add_argument("--markdown", type=Path, help="write the table into this file")
    made.add_argument("--json", type=Path, help="write the results to this file, or to eval.json in this folder")
    made.add_argument("--commit", help="commit of this tree, where it travelled without git")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    args, engine_flags = made.parse_known_args(argv)
    names = args.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        made.error(f"--tasks {', '.join(unknown)}: there are {', '.join(TASKS)}")
    if args.num < 1:
        made.error(f"--num {args.num}: wanted 1 or more")
    configs = [flags.parse([model, *engine_flags], made.prog) for model in args.models]
    print(one_line(header(commit=args.commit)), flush=True)
    results = []
    for config in configs:
        for variant in VARIANTS:
            tasks = {name: TASKS[name] for name in names}
            changed = flags.from_mapping({**config.to_dict(), **variant}, made.prog)
            results.append(result := evaluated(changed, tasks, args.num, args.seed))
            print(
                f"{result.model}, weights {result.weights}, cache {result.cache}: {percent(mean(result))} of "
                f"{args.num} samples of {len(names)} tasks, {result.seconds:.1f} s",
                flush=True,
            )
    print(table(results))
    if args.markdown:
        said = f"{args.num} held-out samples of each task. Columns: model, weights / KV cache."
        put_into(args.markdown, f"{said}\n\n{table(results)}")
    if args.json:
        path = args.json if args.json.suffix == ".json" else args.json / "eval.json"
        rows = [{name: value for name, value in vars(r).items() if name != "answers"} for r in results]
        write_json(path, {"num": args.num, "seed": args.seed, "results": rows}, commit=args.commit)


if __name__ == "__main__":
    main()

"""bench.eval: the demo's tasks in 16 and in 8 bits. A whole run on few samples, and its table by hand."""

import json
import random

import pytest

from bench import eval as bench
from bench.demo import evaluate
from bench.demo.tasks import TASKS
from nanodeploy import LLM, catalog
from nanodeploy.errors import ConfigError
from nanodeploy.serve.tokenizer import Tokenizer


def test_a_whole_run(tmp_path, capsys):
    path = tmp_path / "DEMO.md"
    path.write_text(f"before\n{bench.BEGIN}\nan old table\n{bench.END}\nbehind\n")
    own = ["--num", "2", "--tasks", "add,tool", "--markdown", str(path), "--json", str(tmp_path), "--commit", "abc"]
    bench.main(["demo:qwen3", *own, "--device", "cpu", "--num_kvcache_blocks", "64", "--max_model_len", "1024"])
    said = json.loads((tmp_path / "eval.json").read_text())
    assert said["header"]["commit"] == "abc" and (said["num"], said["seed"]) == (2, 0)
    precisions = [(result["weights"], result["cache"]) for result in said["results"]]
    assert precisions == [("fp32", "fp32"), ("fp8", "fp32"), ("fp32", "fp8"), ("fp8", "fp8")]
    for result in said["results"]:  # two-digit sums and calls, which this demo knows in whatever precision
        assert result["accuracy"] == {"add": 1.0, "tool": 1.0} and result["seconds"] > 0
    before, table, behind = path.read_text().partition(bench.BEGIN)[0], path.read_text(), path.read_text()[-7:]
    assert (before, behind) == ("before\n", "behind\n") and "an old table" not in table
    assert "| add " in table and "qwen3 fp8 / fp8" in table and table.count("100.0 %") == 16
    assert "2 samples of 2 tasks" in capsys.readouterr().out


def test_answers_are_those_of_the_samples_in_their_order():
    """One engine, its answers one by one and all at once: each stands beside its own question."""
    tasks = {name: TASKS[name] for name in ("add", "add raw", "tool result")}
    samples = evaluate.samples(tasks, seed=3, n=2)
    with LLM("demo:qwen3", device="cpu", num_kvcache_blocks=64, max_model_len=1024, log_level="error") as llm:
        together = bench.answered(llm, [sample.chat for sample in samples])
        assert together == [bench.answered(llm, [sample.chat])[0] for sample in samples]
    assert together == [sample.answer for sample in samples]


def result(accuracy, answers, model="demo:a", weights="bf16"):
    return bench.Result(model, weights, "bf16", accuracy, answers, seconds=1.0)


def test_the_table():
    plain = result({"add": 1.0, "needle": 0.5, "needle <= 256": 0.0}, ["1", "2", "3", "4"])
    small = result({"add": 0.5, "needle": 0.25, "needle <= 256": 1.0}, ["1", "x", "3", "4"], weights="fp8")
    other = result({"add": 0.0, "needle": 0.0, "needle <= 256": 0.0}, ["a", "b", "c", "d"], model="demo:b")
    lines = bench.table([plain, small, other]).split("\n")
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["task", "a bf16 / bf16", "a fp8 / bf16", "b bf16 / bf16"],
        ["---", "---:", "---:", "---:"],
        ["add", "100.0 %", "50.0 %", "0.0 %"],
        ["needle", "50.0 %", "25.0 %", "0.0 %"],
        ["needle <= 256", "0.0 %", "100.0 %", "0.0 %"],
        ["**all tasks**", "**75.0 %**", "**37.5 %**", "**0.0 %**"],
        ["same answer as without FP8", "100.0 %", "75.0 %", "100.0 %"],
    ]
    assert len({len(line) for line in bench.table([plain, small]).split("\n")}) == 1


def test_a_file_without_the_marks_is_left_alone(tmp_path):
    new, other = tmp_path / "new.md", tmp_path / "other.md"
    bench.put_into(new, "one")
    bench.put_into(new, "two")
    assert new.read_text() == f"{bench.BEGIN}\ntwo\n{bench.END}\n"
    for text in ("# Something else\n", f"{bench.BEGIN}\n", f"{bench.END}\n{bench.BEGIN}\n"):
        other.write_text(text)
        with pytest.raises(SystemExit, match="wanted the lines"):
            bench.put_into(other, "one")
        assert other.read_text() == text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "add,subtrakt"], "subtrakt: there are add, "),
        (["--num", "0"], "--num 0: wanted 1 or more"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_what_cannot_be_asked(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(flags if not flags else ["demo:qwen3", *flags])
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_a_demo_that_is_not_there(capsys):
    with pytest.raises(ConfigError, match="There is no demo:qwen3-mixture"):
        bench.main(["demo:qwen3-mixture", "--num", "1", "--device", "cpu"])


def test_a_model_without_a_tokenizer(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 300}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **sizes, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"no tokenizer\.json"):
        bench.main([str(tmp_path), "--num", "1", "--device", "cpu", "--load_format", "dummy"])


def test_no_right_answer_is_longer_than_what_an_engine_may_write():
    rng, tokenizer = random.Random(0), Tokenizer(catalog.locate("demo:qwen3").tokenizer_dir)
    answers = [make(rng, "test").answer for make in TASKS.values() for _ in range(200)]
    assert max(len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers) < bench.MOST_TOKENS

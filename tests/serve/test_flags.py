"""The command line: every Config field is a flag, every mistake is one line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodeploy import cli, flags
from nanodeploy.config import Config
from nanodeploy.errors import ConfigError


def parse(*argv: str) -> Config:
    return flags.parse(argv, "test")


def test_nothing_given_is_the_default() -> None:
    assert parse() == Config()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["m"], {"model": "m"}),
        (["--model", "m"], {"model": "m"}),
        (["--max-model-len", "32"], {"max_model_len": 32}),
        (["--max_model_len=32"], {"max_model_len": 32}),
        (["--max-model_len=auto"], {"max_model_len": None}),
        (["--seed", "-1", "m"], {"seed": -1, "model": "m"}),
        (["--served-model-name", "a b=c"], {"served_model_name": "a b=c"}),
        (["--kernels=op=mine"], {"kernels": "op=mine"}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--enforce_eager", "--no_enforce_eager"], {"enforce_eager": False}),
        (["--gpu_memory_utilization", "1"], {"gpu_memory_utilization": 1.0}),
        (["--quantization", "fp8"], {"quantization": "fp8"}),
    ],
)
def test_spellings(argv: list[str], expected: dict) -> None:
    assert parse(*argv) == Config(**expected)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_model_length", "4"], "--max_model_length is not a flag. Did you mean --max_model_len?"),
        (["--no_port"], "--no_port is not a flag"),
        (["-p", "80"], "-p is not a flag"),
        (["--port", "x"], "--port x: wanted a whole number"),
        (["--port", "1.5"], "wanted a whole number"),
        (["--port", "70000"], "wanted 0 to 65535"),
        (["--port"], "--port needs a value"),
        (["--port", "--host", "h"], "--port needs a value; --host came instead"),
        (["--dtype", "fp16"], "wanted one of auto, bfloat16, float16, float32"),
        (["--kvcache_block_size", "32"], "wanted one of 16, 64, 256"),
        (["--quantization", "f8"], "wanted one of auto, fp8. Did you mean fp8?"),
        (["--gpu_memory_utilization", "nan"], "wanted 0.01 to 1.0"),
        (["--enforce_eager=true"], "takes no value: write --enforce_eager or --no_enforce_eager"),
        (["a", "b"], "unexpected argument b"),
        (["a", "--model", "b"], "two models"),
        (["--config", "/nonexistent.yaml"], "No such file"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and not out


def test_yaml_lies_under_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max-model-len: 64\nport: 9000\nenforce_eager: true\ngpu_memory_utilization: 1\ntokenizer: null\n")
    config = parse("--config", str(file), "--port", "9001", "--no-enforce-eager")
    assert (config.max_model_len, config.port, config.enforce_eager) == (64, 9001, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "'prot' is not a setting. Did you mean port?"),
        ("port: '1'", "port is '1'; wanted int"),
        ("port: true", "wanted int"),
        ("enforce_eager: 1", "wanted bool"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
        ("dtype: fp16", "wanted one of"),
    ],
)
def test_yaml_mistakes(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words.split()[0]) as error:
        parse("--config", str(tmp_path / "c.yaml"))
    assert words in str(error.value)


def values_of(field: dataclasses.Field) -> st.SearchStrategy:
    extra, (kind, optional) = field.metadata, flags._kind(field.name)
    if "choices" in extra:
        values = st.sampled_from(extra["choices"])
    elif kind is bool:
        values = st.booleans()
    elif kind is int:
        values = st.integers(extra.get("low", -(2**63)), extra.get("high", 2**63))
    elif kind is float:
        values = st.floats(extra.get("low", 0.0), extra.get("high", 1e9))
    else:
        plain = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]))
        values = plain.filter(lambda s: not s.startswith("-") and s.lower() not in flags.AUTO)
    return values | st.none() if optional else values


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional={f.name: values_of(f) for f in dataclasses.fields(Config)}), st.data())
def test_every_config_can_be_written_as_flags(values: dict, data: st.DataObject) -> None:
    argv = []
    for name, value in values.items():
        spelled = name.replace("_", "-") if data.draw(st.booleans()) else name
        if isinstance(value, bool):
            argv.append(f"--{spelled}" if value else f"--no_{spelled}")
        else:
            text = "auto" if value is None else str(value)
            argv += [f"--{spelled}={text}"] if data.draw(st.booleans()) else [f"--{spelled}", text]
    assert parse(*argv) == Config(**values) == flags.from_mapping(values)


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["--version"], []])
def test_help_is_quick_and_loads_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys, time; began = time.perf_counter(); from nanodeploy import cli; code = cli.main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'zmq', 'starlette', 'msgspec'} & sys.modules.keys();"
        "print(time.perf_counter() - began, sorted(heavy)); sys.exit(code)"
    )
    root = Path(__file__).parents[2]
    reply = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=root, timeout=30)
    seconds, _, heavy = reply.stdout.splitlines()[-1].partition(" ")
    assert reply.returncode == 0 and heavy == "[]"
    assert float(seconds) < 0.5
    if "--version" not in argv:
        assert "usage: nanodeploy" in reply.stdout
    if argv[:1] == ["serve"]:
        assert all(f"--{field.name}" in reply.stdout for field in dataclasses.fields(Config))


def test_both_modules_are_the_command() -> None:
    root = Path(__file__).parents[2]
    for module, argv in (("nanodeploy", ["serve", "--prot", "1"]), ("nanodeploy.serve", ["--prot", "1"])):
        reply = subprocess.run(
            [sys.executable, "-m", module, *argv], capture_output=True, text=True, cwd=root, timeout=30
        )
        assert (reply.returncode, reply.stderr) == (
            2,
            "nanodeploy: error: --prot is not a flag. Did you mean --port? See --help.\n",
        )

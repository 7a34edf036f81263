import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodeploy import catalog
from nanodeploy.errors import CheckpointError, ConfigError

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "eos_token_id": 7, "torch_dtype": "bfloat16"}


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "my-qwen3"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN3))
    return path


def test_a_directory(directory):
    files = catalog.locate(str(directory))
    assert files.path == directory and files.config == QWEN3 and files.name == str(directory)
    assert files.tokenizer_dir is None and files.generation_config == {} and not files.dummy
    assert files.eos_token_ids == (7,) and files.dtype_name == "bfloat16"


def test_the_tokenizer_is_the_models_own_or_another(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"--tokenizer .*tokenizer.json"):
        catalog.locate(str(directory), str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert catalog.locate(str(directory), str(tmp_path)).tokenizer_dir == tmp_path
    (directory / "tokenizer.json").write_text("{}")
    assert catalog.locate(str(directory)).tokenizer_dir == directory
    assert catalog.locate(str(directory), str(tmp_path)).tokenizer_dir == tmp_path


@pytest.mark.parametrize(
    ("generation", "wanted"),
    [({}, (7,)), ({"eos_token_id": None}, (7,)), ({"eos_token_id": 9}, (9,)), ({"eos_token_id": [9, 3]}, (9, 3))],
)
def test_generation_config_has_the_last_word_on_the_end_tokens(directory, generation, wanted):
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert catalog.locate(str(directory)).eos_token_ids == wanted


@pytest.mark.parametrize("value", ["7", -1, [1, "2"], True, 1.5])
def test_an_end_token_that_is_none_is_refused(directory, value):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        catalog.locate(str(directory))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\x00\xff"])
def test_damaged_json_names_the_file(directory, name, text):
    (directory / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name):
        catalog.locate(str(directory))


def test_what_is_not_there(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"There is no directory .*Did you mean .*my-qwen3"):
        catalog.locate(str(tmp_path / "my-qwen"))
    with pytest.raises(ConfigError, match="demo:random-qwen3-8b"):
        catalog.locate("Qwen/Qwen3-8B")
    with pytest.raises(ConfigError, match="hub must be downloaded"):
        catalog.locate("someone/something-else")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        catalog.locate(str(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        catalog.locate(str(directory / "config.json"))


def test_another_family_is_refused_with_the_list_of_ours(directory):
    for change in (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ["Qwen3ForSequenceClassification"]},
        {"architectures": None, "model_type": None},
    ):
        (directory / "config.json").write_text(json.dumps({**QWEN3, **change}))
        with pytest.raises(ConfigError, match="Qwen3ForCausalLM"):
            catalog.locate(str(directory))
    assert catalog.family({"model_type": "qwen3"}) == "qwen3"


def test_random_models_of_real_shapes():
    for name in ("demo:random-qwen3-8b", "demo:random-Qwen3-8B"):
        files = catalog.locate(name)
        assert files.dummy and files.path is None and files.config["hidden_size"] == 4096
    assert "demo:random-qwen3-0.6b" in catalog.available()
    for name in catalog.available():
        assert catalog.locate(name).name == name


@given(st.text(alphabet="./\\qwen3-random~\x00 ", max_size=30))
def test_no_demo_name_reaches_outside_the_package(name):
    if f"demo:{name}".lower() not in map(str.lower, catalog.available()):
        with pytest.raises(ConfigError, match="There is no demo:"):
            catalog.locate(f"demo:{name}")


def test_needs_no_torch():
    code = "import sys, nanodeploy.catalog; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

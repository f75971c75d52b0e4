"""The files that vLLM is about to load: which directory, checked when, and what is refused.

Configs and parallel state are vLLM's own, in one process; `test_engine` has the whole engine, and
`test_fuzz_files` many corruptions.
"""

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from vllm.config import LoadConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.utils import get_draft_quant_config

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import checkpoint
from wexpand_plugin.format.checkpoint import WexpandConfig
from wexpand_plugin.serve import files, register
from wexpand_plugin.serve.files import check_directory, local_directory
from wexpand_plugin.serve.params import Parts

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "sound"
    tiny.expanded(path, match="layers.0.mlp")
    return path


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.fixture
def said():
    """What our logger says."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    files.logger.addHandler(handler)
    yield records
    files.logger.removeHandler(handler)


@pytest.fixture(scope="module")
def one_worker(sound, tmp_path_factory):
    """The parallel state of an engine with one worker."""
    from vllm import distributed

    register()
    address = f"file://{tmp_path_factory.mktemp('world') / 'store'}"
    with set_current_vllm_config(engine(sound)):
        distributed.init_distributed_environment(1, 0, address, 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)
    yield
    distributed.cleanup_dist_env_and_memory()


def engine(path: Path, **settings):
    """The config that an engine for `path` has."""
    arguments = dict(skip_tokenizer_init=True, max_model_len=64, dtype="float32")
    return EngineArgs(model=str(path), **arguments | settings).create_engine_config()


def ask(engine) -> None:
    """vLLM asks for the method of a layer that is none of ours, as it does for the first."""
    with set_current_vllm_config(engine):
        engine.quant_config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens")


def damage(path: Path, name: str) -> None:
    """Flip the lowest bit of the first byte of a tensor, in its file."""
    file = checkpoint.tensor_files(path)[name]
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


def edit(path: Path, **values) -> WexpandConfig:
    """Change settings of config.json; returns the config, which says nothing of them."""
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | values))
    return checkpoint.read_config(path)


@pytest.mark.usefixtures("one_worker")
class TestEngine:
    def test_sound_files_are_said_nothing_about(self, sound, said):
        ask(engine(sound))
        assert not said

    def test_damage_is_refused_before_a_weight_is_loaded(self, copy):
        damage(copy, NORM)
        config = engine(copy)
        for _ in range(2):
            with pytest.raises(WexpandError, match=f"{copy}.*{NORM}: damaged"):
                ask(config)

    def test_every_engine_reads_once(self, copy):
        first = engine(copy)
        ask(first)
        damage(copy, NORM)
        ask(first)
        with pytest.raises(WexpandError, match=NORM):
            ask(engine(copy))

    def test_other_load_formats_are_said_to_be_unchecked(self, copy, said):
        damage(copy, NORM)
        config = engine(copy)
        config.load_config = LoadConfig(load_format="tensorizer")
        for _ in range(2):
            ask(config)
        (record,) = said
        assert record.levelno == logging.WARNING
        assert "load format tensorizer" in record.getMessage()

    def test_a_config_from_elsewhere_is_said_to_be_unchecked(self, sound, copy, said):
        config, other = engine(sound), engine(copy)
        values = other.quant_config.checkpoint.model_copy(update={"made_by": {"a": 1}}).seal()
        other.quant_config.checkpoint = values
        config.quant_config = other.quant_config
        ask(config)
        (record,) = said
        assert "quantization_config that is used" in record.getMessage()

    def test_a_draft_is_checked_in_its_own_directory(self, copy):
        """The engine's model is dense, and not looked at; its draft is ours."""
        damage(copy, NORM)
        dense = copy.with_name("dense")
        tiny.dense().save_pretrained(dense)
        speculative = {"model": str(copy), "method": "draft_model", "num_speculative_tokens": 2}
        config = engine(dense, speculative_config=speculative)
        quant_config = get_draft_quant_config(config)
        with set_current_vllm_config(config):
            with pytest.raises(WexpandError, match=f"{copy}.*{NORM}"):
                quant_config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens")


def loaded(copy: Path, name: str):
    """The tensors of linear `name` on their way into a layer, as its files have them."""
    config = checkpoint.read_config(copy)
    parts = Parts(name, [name], 1, config)
    own = {t: f for t, f in checkpoint.tensor_files(copy).items() if t.startswith(f"{name}.")}
    for tensor, value in checkpoint.tensors_of(own):
        parts.loader(tensor.removeprefix(f"{name}."))(None, value)
    return parts


def test_a_layer_names_the_file_of_a_damaged_tensor(copy):
    name = "model.layers.0.mlp.up_proj"
    damage(copy, f"{name}.weight_mask")
    with set_current_vllm_config(engine(copy)):
        with pytest.raises(WexpandError) as refused:
            loaded(copy, name).members()
    file = copy / "model.safetensors"
    assert str(refused.value).startswith(f"{file}: {name}.weight_mask: damaged")


def test_a_layer_whose_files_are_not_known_names_the_tensor(copy):
    name = "model.layers.0.mlp.up_proj"
    damage(copy, f"{name}.weight_mask")
    other = engine(copy)
    other.load_config = LoadConfig(load_format="tensorizer")
    for known in (None, other):
        with set_current_vllm_config(known) if known else contextlib.nullcontext():
            with pytest.raises(WexpandError) as refused:
                loaded(copy, name).members()
        assert str(refused.value).startswith(f"{name}.weight_mask: damaged")


def test_outside_of_an_engine_nothing_is_checked(sound):
    files.check_engine(checkpoint.read_config(sound))


def test_a_model_of_the_hub_is_its_snapshot(sound, tmp_path):
    commit = "0" * 40
    cache = tmp_path / "models--someone--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    snapshot = Path(shutil.copytree(sound, cache / "snapshots" / commit))
    model = engine(sound).model_config
    model.model = "someone/model"
    found = local_directory(model, LoadConfig(download_dir=str(tmp_path)))
    assert found == snapshot
    check_directory(found, checkpoint.read_config(sound))


@pytest.mark.parametrize(
    "load_format", ["auto", "hf", "safetensors", "fastsafetensors", "runai_streamer"]
)
def test_formats_that_read_the_directory(sound, load_format):
    model = engine(sound).model_config
    assert local_directory(model, LoadConfig(load_format=load_format)) == sound


@pytest.mark.parametrize("load_format", ["dummy", "pt", "npcache", "sharded_state", "custom"])
def test_formats_that_do_not(sound, load_format):
    model = engine(sound).model_config
    with pytest.raises(WexpandError, match=load_format):
        local_directory(model, LoadConfig(load_format=load_format))


def test_expanded_linears_are_left_to_their_layers(copy):
    damage(copy, "model.layers.0.mlp.up_proj.weight_mask")
    check_directory(copy, checkpoint.read_config(copy))


def test_settings_edited_on_purpose_are_logged_and_served(copy, said):
    check_directory(copy, edit(copy, max_position_embeddings=32, rope_theta=1e6))
    (record,) = said
    assert "config.json: was changed after it was written" in record.getMessage()


def test_settings_that_the_tensors_do_not_fit_are_refused(copy):
    """vLLM would give the third layer random weights."""
    config = edit(copy, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(WexpandError, match="model.layers.2.*missing"):
        check_directory(copy, config)


def test_settings_of_a_class_that_is_not_known_are_logged(copy, said):
    check_directory(copy, edit(copy, architectures=["Unknown"]))
    assert "whether its tensors fit was not checked" in said[-1].getMessage()


def test_a_directory_without_config_serves(copy):
    """vLLM can be told to read config.json from somewhere else."""
    config = checkpoint.read_config(copy)
    (copy / "config.json").unlink()
    check_directory(copy, config)

"""A whole model through vLLM's own loader, in this process: what is read, checked and refused.

The model is a tiny Llama whose first MLP is expanded. `test_engine` has the whole engine.
"""

import json
import logging
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import tiny
import torch
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import get_draft_quant_config

from wexpand_plugin import __version__
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.serve import config as serve_config
from wexpand_plugin.serve import register
from wexpand_plugin.serve.linear import WexpandLinearMethod

NORM = "model.layers.1.input_layernorm.weight"
MASK = "model.layers.0.mlp.up_proj.weight_mask"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loading") / "sound"
    tiny.expanded(path, match="layers.0.mlp")
    return path


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.fixture
def verify(monkeypatch):
    monkeypatch.setenv("WEXPAND_VERIFY", "1")


@pytest.fixture
def said():
    """What our logger says."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    serve_config.logger.addHandler(handler)
    yield records
    serve_config.logger.removeHandler(handler)


@pytest.fixture(scope="module", autouse=True)
def one_worker(sound, tmp_path_factory):
    """The parallel state of an engine with one worker."""
    from vllm import distributed

    register()
    address = f"file://{tmp_path_factory.mktemp('world') / 'store'}"
    with set_current_vllm_config(engine(sound)):
        distributed.init_distributed_environment(1, 0, address, 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as a worker on CPUs has it
        yield
        distributed.cleanup_dist_env_and_memory()


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each tensor is read, and each file opened, from now on."""
    count: Counter = Counter()

    class Counting:
        def __init__(self, file, *arguments, **settings):
            count[Path(file).name] += 1
            self.handle = safetensors.safe_open(file, *arguments, **settings)

        def __enter__(self):
            self.handle.__enter__()
            return self

        def __exit__(self, *error):
            return self.handle.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def get_tensor(self, name):
            count[name] += 1
            return self.handle.get_tensor(name)

    original = safetensors.safe_open
    for module in list(sys.modules.values()):
        if vars(module).get("safe_open") is original and module is not safetensors:
            monkeypatch.setattr(module, "safe_open", Counting)
    return count


def engine(path: Path, **settings):
    """The config that an engine for `path` has."""
    arguments = dict(skip_tokenizer_init=True, max_model_len=64, dtype="float32")
    return EngineArgs(model=str(path), **arguments | settings).create_engine_config()


def load(path: Path, **settings) -> torch.nn.Module:
    """The model in `path` as a worker loads it."""
    return load_with(engine(path, **settings))


def load_with(found) -> torch.nn.Module:
    with set_current_vllm_config(found):
        loader = get_model_loader(found.load_config)
        return loader.load_model(vllm_config=found, model_config=found.model_config)


def first_layer(found) -> None:
    """vLLM asks for the method of a layer that is none of ours, as it does for the first."""
    with set_current_vllm_config(found):
        found.quant_config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens")


def flip(path: Path, name: str) -> None:
    """Flip the lowest bit of the first byte of a tensor, in its file."""
    file = ModelDir(path).headers[name].file
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


def change(path: Path, name: str, new) -> Path:
    """Replace a tensor by new(tensor); returns its file."""
    file = ModelDir(path).headers[name].file
    tensors = load_file(file)
    tensors[name] = new(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def test_every_tensor_is_read_once(sound, reads, monkeypatch, caplog):
    monkeypatch.setattr("zlib.crc32", None)  # and no checksum is computed
    model = load(sound)
    assert "Attempted to load" not in caplog.text
    tensors = {name: reads.pop(name) for name in ModelDir(sound).headers}
    assert set(tensors.values()) == {1}
    assert reads == {"model.safetensors": 2}  # by vLLM, and by the line above
    methods = {
        name: type(module.quant_method)
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
    }
    ours = {name for name, method in methods.items() if method is WexpandLinearMethod}
    assert ours == {f"model.layers.0.mlp.{name}" for name in ("gate_up_proj", "down_proj")}
    assert {methods[name] for name in methods.keys() - ours} == {UnquantizedLinearMethod}


def test_a_damaged_tensor_of_ours_is_named_with_its_file(copy, reads):
    file = change(copy, MASK, torch.zeros_like)
    reads.clear()
    with pytest.raises(WexpandError) as refused:
        load(copy)
    assert str(refused.value).startswith(f"{file}: {MASK}: ")
    assert reads[file.name] == 2  # by vLLM, and for this error


def test_only_the_tensor_is_named_where_the_files_are_not_known(copy, monkeypatch):
    change(copy, MASK, torch.zeros_like)
    monkeypatch.setattr(serve_config, "_FORMATS", {})
    with pytest.raises(WexpandError, match=f"^{MASK}: "):
        load(copy)


def test_a_checkpoint_of_the_old_layout_is_refused_with_a_sentence(copy):
    values = json.loads((copy / "config.json").read_text())
    quantization = values["quantization_config"]
    del quantization["groups"]
    quantization["linears"] = {}
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="compress or pack the dense model again"):
        engine(copy)


class TestVerify:
    """WEXPAND_VERIFY=1."""

    def test_without_it_values_are_not_checked(self, copy, said):
        flip(copy, NORM)
        load(copy)
        assert not [record for record in said if record.levelno > logging.INFO]

    def test_sound_files_are_said_to_be(self, verify, sound, said):
        load(sound)
        assert sum(f"{sound} is sound" in record.getMessage() for record in said) == 1

    def test_a_flipped_bit_is_refused_before_vllm_reads(self, verify, copy, reads):
        flip(copy, NORM)
        reads.clear()
        with pytest.raises(WexpandError, match=f"{copy}/model.safetensors: {NORM}: damaged"):
            load(copy)
        assert max(reads[name] for name in ModelDir(copy).headers) == 1

    def test_a_flipped_bit_of_any_tensor_is_refused(self, verify, copy):
        for name in ModelDir(copy).headers:
            flip(copy, name)
            with pytest.raises(WexpandError, match=f"{name}: damaged"):
                first_layer(engine(copy))
            flip(copy, name)
        first_layer(engine(copy))

    def test_it_is_done_once(self, verify, copy):
        found = engine(copy)
        first_layer(found)
        flip(copy, NORM)
        first_layer(found)
        with pytest.raises(WexpandError, match=NORM):
            first_layer(engine(copy))

    def test_it_is_done_by_the_first_worker_of_a_machine(self, verify, copy, monkeypatch):
        flip(copy, NORM)
        world = serve_config._first_of_machine
        monkeypatch.setattr(serve_config, "_first_of_machine", lambda: not world())
        first_layer(engine(copy))

    def test_files_that_the_engine_does_not_read_are_said_to_be_unchecked(self, verify, copy, said):
        flip(copy, NORM)
        found = engine(copy)
        found.load_config = LoadConfig(load_format="tensorizer")
        first_layer(found)
        (record,) = said
        assert record.levelno == logging.WARNING
        assert "the files were not checked: load format tensorizer" in record.getMessage()

    def test_a_draft_is_checked_in_its_own_directory(self, verify, copy):
        """The engine's model is dense, and not looked at; its draft is ours."""
        flip(copy, NORM)
        dense = copy.with_name("dense")
        tiny.dense().save_pretrained(dense)
        speculative = {"model": str(copy), "method": "draft_model", "num_speculative_tokens": 2}
        found = engine(dense, speculative_config=speculative)
        found.quant_config = get_draft_quant_config(found)
        with pytest.raises(WexpandError, match=f"{copy}.*{NORM}"):
            first_layer(found)

    def test_a_model_of_the_hub_is_its_snapshot(self, verify, sound, tmp_path):
        commit = "0" * 40
        cache = tmp_path / "models--someone--model"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        snapshot = Path(shutil.copytree(sound, cache / "snapshots" / commit))
        flip(snapshot, NORM)
        found = engine(sound)
        found.load_config = LoadConfig(download_dir=str(tmp_path))
        found.quant_config.maybe_update_config("someone/model", revision="main")
        with pytest.raises(WexpandError, match=f"{snapshot}.*{NORM}"):
            first_layer(found)


def test_outside_of_an_engine_nothing_is_looked_for(sound, verify):
    config = engine(sound).quant_config
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    assert config.model_dir is None


def test_the_compiled_graph_is_kept_under_a_name_of_its_own(sound, monkeypatch):
    """vLLM's hash of an engine's config holds our version, the checkpoint and the layouts."""
    monkeypatch.setenv("WEXPAND_KERNEL", "cpu")
    found, same = engine(sound), engine(sound)
    assert found.compute_hash() == same.compute_hash()
    load_with(found)
    ((name, key),) = found.additional_config.items()
    assert name == f"wexpand {found.quant_config.checkpoint.digest}"
    assert key == [__version__, "cpu ['torch.uint8']"]
    before = found.compute_hash()
    assert before != same.compute_hash()
    found.quant_config.note_layout("another kernel", [])
    assert found.compute_hash() != before


def test_quantization_while_loading_is_for_dense_linears_alone(sound):
    """--quantization-config of vLLM 0.32: what is not ours may be quantized, ours is refused."""
    from vllm.model_executor.layers.quantization import base_config

    if not hasattr(base_config, "resolve_quant_method"):
        pytest.skip("this vLLM has no --quantization-config beside a checkpoint's own")
    found = engine(sound, quantization_config={"targets": {"re:.*o_proj": "fp8_per_tensor"}})
    with set_current_vllm_config(found):
        model = initialize_model(vllm_config=found)
    method = model.model.layers[1].self_attn.o_proj.quant_method
    assert type(method).__name__ == "Fp8PerTensorOnlineLinearMethod"
    assert type(model.model.layers[0].mlp.down_proj.quant_method) is WexpandLinearMethod
    found = engine(sound, quantization_config={"targets": {"re:.*down_proj": "fp8_per_tensor"}})
    with set_current_vllm_config(found):
        with pytest.raises(WexpandError, match="0.mlp.down_proj: .*--quantization-config"):
            initialize_model(vllm_config=found)

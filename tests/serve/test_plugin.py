"""`register`: what every vLLM process on the machine runs, whatever it serves."""

import logging
import pickle
import subprocess
import sys

import pytest
from builders import Checkpoint, Linear, random_pool

from wexpand_plugin import serve
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.serve.config import WexpandConfig

NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture
def unregistered(monkeypatch):
    monkeypatch.setattr(serve, "_registered", False)


def test_entry_point_names_register():
    from importlib.metadata import entry_points

    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "wexpand")
    assert found.load() is serve.register


def test_register_twice():
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    serve.register()
    serve.register()
    assert QUANTIZATION_METHODS.count("wexpand") == 1
    assert get_quantization_config("wexpand").__name__ == "WexpandConfig"


@pytest.mark.parametrize(
    "module", ["vllm.model_executor.layers.quantization", "wexpand_plugin.serve.config"]
)
def test_unknown_vllm_is_logged_and_not_raised(unregistered, monkeypatch, caplog, module):
    monkeypatch.setitem(sys.modules, module, None)  # its import raises ImportError
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        serve.register()
    assert "does not work with this vLLM" in caplog.text
    assert not serve._registered


def test_vllm_that_refuses_the_class_is_logged_and_not_raised(unregistered, monkeypatch, caplog):
    from vllm.model_executor.layers import quantization

    def refuse(_name):
        raise ValueError("no such thing")

    monkeypatch.setattr(quantization, "register_quantization_config", refuse)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        serve.register()
    assert "does not work with this vLLM" in caplog.text


def test_importing_the_plugin_imports_nothing_heavy():
    code = (
        "import sys, wexpand_plugin, wexpand_plugin.serve; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'llmcompressor') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_config_survives_the_way_to_a_worker():
    sent = Checkpoint([Linear(NAME, random_pool(1, 8, 16))]).quant_config()
    got = pickle.loads(pickle.dumps(sent))
    assert got.checkpoint == sent.checkpoint and got.hf_names == sent.hf_names


def test_config_that_was_edited_is_refused():
    values = Checkpoint([Linear(NAME, random_pool(1, 8, 16))]).config.model_dump(mode="json")
    values["groups"][0]["in_features"] = 17
    with pytest.raises(WexpandError, match="changed after it was written"):
        WexpandConfig.from_config(values)

"""Which kernel is chosen, and what is refused rather than served slowly."""

import pytest
import torch

from wexpand_plugin import kernels
from wexpand_plugin.errors import WexpandError

CPU, OTHER = torch.device("cpu"), torch.device("meta")  # a device that no fast kernel runs on
SHAPE = kernels.LayerShape(64, 32, experts=4, sparsity=0.5)


def test_the_reference_is_the_last_resort_on_a_cpu(monkeypatch):
    monkeypatch.delenv("WEXPAND_KERNEL", raising=False)
    kernel, sentence = kernels.choose(CPU, torch.float64, SHAPE)  # a dtype that no fast kernel has
    assert kernel.name == "reference" and "cpu: torch.float64 is not" in sentence


def test_elsewhere_it_has_to_be_asked_for(monkeypatch):
    monkeypatch.delenv("WEXPAND_KERNEL", raising=False)
    with pytest.raises(WexpandError, match="none runs on meta, .*WEXPAND_KERNEL=reference"):
        kernels.choose(OTHER, torch.float64, SHAPE)
    monkeypatch.setenv("WEXPAND_KERNEL", "reference")
    assert kernels.choose(OTHER, torch.float64, SHAPE)[0].name == "reference"


def test_a_forced_kernel_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("WEXPAND_KERNEL", "cpu")
    with pytest.raises(WexpandError, match="WEXPAND_KERNEL: cpu: runs on cpu, not on meta"):
        kernels.choose(OTHER, torch.float32, SHAPE)
    monkeypatch.setenv("WEXPAND_KERNEL", "foo")
    with pytest.raises(WexpandError, match="WEXPAND_KERNEL: 'foo' is not one of cpu, triton"):
        kernels.choose(OTHER, torch.float32, SHAPE)

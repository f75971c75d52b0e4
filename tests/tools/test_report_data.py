"""What the report reads from row maps and names, and that importing it costs nothing."""

import subprocess
import sys

import torch

from wexpand_plugin.tools.report.data import Group, Sharing, common_versions, short_name, users


def test_row_maps_by_hand():
    # neuron 0: all share; 1: all own; 2: experts 0 and 2 share; numbered within the neuron
    row_map = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 2, 0]], dtype=torch.uint8)
    assert users(row_map).tolist() == [[3, 1, 2], [3, 1, 1], [3, 1, 2]]
    sharing = Sharing.of(row_map)
    third = 1 / 3
    expected = torch.tensor([third + 1 + 0.5, third + 1 + 1, third + 1 + 0.5]) / 3
    torch.testing.assert_close(sharing.cost, expected)
    torch.testing.assert_close(sharing.cost.sum() * 3, torch.tensor(6.0))
    torch.testing.assert_close(sharing.users, torch.tensor([4.0, 2.0, 3.0]) / 9)
    torch.testing.assert_close(sharing.versions, torch.tensor([1.0, 1.0, 1.0]) / 3)
    version, count = common_versions(row_map, [5, 90, 6])
    assert version.tolist() == [0, 1, 1] and count.tolist() == [3, 1, 1]
    version, count = common_versions(row_map, [])
    assert version.tolist() == [0, 0, 0] and count.tolist() == [3, 1, 2]


def test_names_and_labels():
    assert short_name("model.layers.3.mlp.up_proj") == "3.mlp.up_proj"
    assert short_name("lm_head") == "lm_head"
    group = Group(["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"], [], [])
    assert group.label == "3.mlp gate_proj up_proj"


def test_importing_it_is_light(root):
    code = (
        "import sys, wexpand_plugin.tools.report\n"
        "heavy = ('matplotlib', 'jinja2', 'transformers', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

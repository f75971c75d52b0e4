"""The report page: complete, self-contained, its numbers those of the modules it speaks of."""

import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser

import pytest
import tiny
import torch

from wexpand_plugin.compress.neuron_scores import (
    FOLDER,
    ModelScores,
    ScoredLinear,
    fingerprint,
    save_scores,
)
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.neurons import neuron_scores
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.report import inputs, measure, write
from wexpand_plugin.tools.report import numbers as report_numbers
from wexpand_plugin.tools.report.data import collect

for needed in ("matplotlib", "jinja2", "datasets", "sklearn"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.slow  # drawing takes a few seconds a page
TOKENS = 600


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the model `dense`, `ours` expanded from it, `pruned`, and `text.jsonl`."""
    folder = tmp_path_factory.mktemp("report")
    tiny.dense().save_pretrained(folder / "dense")
    tiny.expanded(folder / "ours")
    tiny.prune(tiny.dense(), match="mlp", seed=1).save_pretrained(folder / "pruned")
    with (folder / "text.jsonl").open("w") as file:
        for row in tiny.tokens(batch=TOKENS // 50, length=50):
            file.write(json.dumps({"input_ids": row.tolist()}) + "\n")
    return folder


@pytest.fixture(scope="module")
def full(made):
    """The page with all that can be shown."""
    return write(
        made / "ours", made / "full.html", dense=made / "dense", dataset=str(made / "text.jsonl"),
        baseline=made / "pruned", tokens=TOKENS, quiet=True,
    )  # fmt: skip


class _Page(HTMLParser):
    """Everything in a page that a browser could load, and the text it shows."""

    def __init__(self, path):
        super().__init__()
        self.links, self.tags, self.text = [], [], ""
        self.source = path.read_text(encoding="utf8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action", "poster"):
                self.links.append(value)

    def handle_data(self, data):
        self.text += data


def _pngs(page):
    return {file.stem for file in page.with_name(f"{page.stem}-plots").glob("*.png")}


def test_the_page_loads_nothing(full):
    page = _Page(full)
    assert "http" not in page.source and "@import" not in page.source
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.source and len(page.links) == 6
    for link in page.links:
        kind, _, data = link.partition(";base64,")
        svg = b64decode(data, validate=True).decode()
        assert kind == "data:image/svg+xml" and "<script" not in svg
        # a browser loads nothing from inside an image either, but should not have to try
        for reference in re.findall(r'href="(.*?)"', svg) + re.findall(r"url\((.*?)\)", svg):
            assert reference.startswith(("#", "data:image/png;base64,")), reference


def test_everything_is_in_it(full, made):
    page = _Page(full)
    for name in collect(made / "ours").sizes.linears:
        assert name.name in page.text
    for words in ("What it weighs", "Where the budget went", "Tokens per expert",
                  "Wasserstein neurons", "What pruning does", "Who gains", "R²",
                  "read per token", "row map", "LlamaForCausalLM"):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("img") == 6
    assert "Pass --" not in page.text


def test_pngs_are_pictures(full):
    image = pytest.importorskip("PIL.Image")
    assert _pngs(full) == {
        "sizes", "budget", "tokens", "wasserstein", "distributions", "improvement"
    }  # fmt: skip
    for name in _pngs(full):
        file = full.with_name("full-plots") / f"{name}.png"
        with image.open(file) as picture:
            picture.verify()
        with image.open(file) as picture:
            assert min(picture.size) > 150
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 8, "it is blank"


def test_plots_are_dark_on_white_in_a_dark_page_too(full):
    page = _Page(full)
    assert "prefers-color-scheme: dark" in page.source
    for link in page.links:
        svg = b64decode(link.partition(",")[2]).decode()
        background = svg[svg.index('id="patch_1"') :][:300]
        assert re.search("fill: (#ffffff|white)", background)


def test_without_dense_model_it_says_what_to_pass(made, full):
    again = write(made / "ours", made / "plain.html", quiet=True)
    page = _Page(again)
    assert page.text.count("Pass --dense MODEL and --dataset TEXT") == 3
    assert _pngs(again) == {"sizes", "budget", "tokens"}
    # over a fuller one: its plots go
    shutil.copytree(full.with_name("full-plots"), made / "twice-plots")
    assert len(_pngs(made / "twice.html")) == 6
    assert _pngs(write(made / "ours", made / "twice.html")) == _pngs(again)


def test_default_place_and_directory_as_output(made, tmp_path):
    shutil.copytree(made / "ours", tmp_path / "a <b>&")
    page = write(tmp_path / "a <b>&", quiet=True)
    assert page == tmp_path / "a <b>&" / "report.html"
    assert "<h1>a &lt;b&gt;&amp;</h1>" in page.read_text()
    assert write(made / "ours", tmp_path / "new") == tmp_path / "new" / "report.html"
    (tmp_path / "x-plots").touch()
    with pytest.raises(WexpandError, match="x-plots is a file"):
        write(made / "ours", tmp_path / "x.html")


def test_numbers_are_those_of_the_modules(made):
    found = measure.measure(
        collect(made / "ours"), made / "dense", str(made / "text.jsonl"),
        baseline=made / "pruned", tokens=TOKENS, progress=False,
    )  # fmt: skip
    assert found.tokens == TOKENS and found.base == "pruned"
    dense, expanded = tiny.dense(), tiny.expand(tiny.dense())
    pruned = tiny.prune(tiny.dense(), match="mlp", seed=1)
    for name, numbers in found.linears.items():
        seen = []
        handle = dense.get_submodule(name).register_forward_hook(
            lambda module, x, y, seen=seen: seen.append((x[0].flatten(0, -2), y.flatten(0, -2)))
        )
        rows = tiny.tokens(batch=TOKENS // 50, length=50)
        with torch.no_grad():
            dense(rows)
        handle.remove()
        x, y = seen[0]
        weight = dense.get_submodule(name).weight
        torch.testing.assert_close(numbers.wd, neuron_scores(x, weight).wd, rtol=1e-3, atol=1e-4)
        for got, model in ((numbers.expanded, expanded), (numbers.base, pruned)):
            with torch.no_grad():
                rmse = (model.get_submodule(name)(x) - y).square().mean(dim=0).sqrt()
            torch.testing.assert_close(got.float(), rmse, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(numbers.improvement, numbers.base / numbers.expanded)
        top = numbers.entangled
        assert top.wd == numbers.wd.max() and top.neuron == int(numbers.wd.argmax())
        z = (y[:, top.neuron] - y[:, top.neuron].mean()) / y[:, top.neuron].std(correction=0)
        torch.testing.assert_close(top.dense, z, rtol=1e-3, atol=1e-3)
        middle = numbers.median.wd
        assert (numbers.wd < middle).sum() == numbers.wd.numel() // 2


def test_little_memory_means_more_passes(made, monkeypatch):
    ours, text = collect(made / "ours"), str(made / "text.jsonl")
    assert [len(group.linears) for group in ours.groups] == [2, 1, 2, 1]
    once = measure.measure(ours, made / "dense", text, tokens=TOKENS, progress=False)
    monkeypatch.setattr(inputs, "MAX_BYTES", 1)
    monkeypatch.setattr(measure, "MAX_BYTES", TOKENS * 64)
    assert inputs.DenseModel(made / "dense", ours).passes(ours.groups, TOKENS) == 4
    often = measure.measure(ours, made / "dense", text, tokens=TOKENS, progress=False)
    for name, numbers in once.linears.items():
        torch.testing.assert_close(often.linears[name].wd, numbers.wd, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(often.linears[name].expanded, numbers.expanded)


def test_without_baseline_a_neuron_is_compared_with_its_shared_version(made):
    found = measure.measure(
        collect(made / "ours"), made / "dense", str(made / "text.jsonl"), tokens=TOKENS,
        progress=False,
    )  # fmt: skip
    assert found.base == "most used version"
    for numbers in found.linears.values():
        # in the tiny model every second neuron has a version that two experts share
        known = numbers.improvement.isfinite()
        assert known[::2].all() and not known[1::2].any()


def test_full_expansion_and_one_expert(made, tmp_path):
    dataset = str(made / "text.jsonl")
    tiny.expanded(tmp_path / "two", experts=2, sparsity=0.4, seed=3)
    for path, experts, note in (("two", 2, None), ("one", 1, None), ("all", 3, "--baseline")):
        if path != "two":
            model = tiny.expand(tiny.dense(), experts=experts)
            for name, module in list(model.named_modules()):
                if path == "all" and isinstance(module, RoutedLinear):
                    _unshare(model, name)
            _save(model, tmp_path / path)
        page = _Page(
            write(tmp_path / path, dense=made / "dense", dataset=dataset, tokens=TOKENS, quiet=True)
        )
        assert ("Pass --baseline DIR" in page.text) == (note is not None)
        assert ("one expert: each neuron" in page.text) == (experts == 1)
        assert ("Who gains" in page.text) == (experts > 1)
        assert ("full expansion" in page.text) == (path == "all")


def test_clusters_with_biases(made, tmp_path):
    model = tiny.expanded(tmp_path / "ours", experts=1, clusters=40, parents=7)
    text, settings = str(made / "text.jsonl"), dict(baseline=made / "pruned", tokens=TOKENS)
    page = _Page(
        write(tmp_path / "ours", dense=made / "dense", dataset=text, quiet=True, **settings)
    )
    for words in ("Who gains from clusters", "Tokens per cluster", "clusters of tokens per linear",
                  "cluster bias", "one expert: each neuron"):  # fmt: skip
        assert words in page.text
    data = collect(tmp_path / "ours")
    found = measure.measure(data, made / "dense", text, progress=False, **settings)
    name, seen = "model.layers.0.mlp.gate_proj", []
    dense = tiny.dense()
    dense.get_submodule(name).register_forward_hook(
        lambda module, x, y: seen.append((x[0].flatten(0, -2), y.flatten(0, -2)))
    )
    with torch.no_grad():
        dense(tiny.tokens(batch=TOKENS // 50, length=50))
        (x, y), = seen
        rmse = (model.get_submodule(name)(x) - y).square().mean(dim=0).sqrt()
    torch.testing.assert_close(found.linears[name].expanded.float(), rmse, rtol=1e-3, atol=1e-5)


def test_a_baseline_with_biases_of_clusters_is_refused(made, tmp_path):
    tiny.expanded(tmp_path / "ours", experts=1, clusters=8)
    with pytest.raises(WexpandError, match="has biases of clusters; a baseline has one sparse"):
        write(
            made / "ours", dense=made / "dense", dataset=str(made / "text.jsonl"),
            baseline=tmp_path / "ours", tokens=TOKENS, quiet=True,
        )  # fmt: skip


def _unshare(model, name):
    """Give every expert a version of its own of every neuron."""
    old = model.get_submodule(name)
    rows = torch.stack([old.pool.expert(e) for e in range(old.experts)], dim=1).flatten(0, 1)
    row_map = torch.arange(old.experts).repeat(old.out_features, 1).T
    pool = RowPool.pack(rows, row_map.to(torch.uint8).contiguous())
    model.set_submodule(name, RoutedLinear.from_pool(pool, old.router, group=old.group))


def test_what_tuning_did(made, tmp_path):
    one_shot, model = tiny.expand(tiny.dense(), experts=1), tiny.expand(tiny.dense(), experts=1)
    _save(one_shot, tmp_path / "one-shot")
    blocks = {"model.layers.0": [0.2, 0.1], "model.layers.1": [0.3, 0.15], "model.layers.2": []}
    _save(model, tmp_path / "tuned", {"tuned": blocks})
    written = write(
        tmp_path / "tuned", dense=made / "dense", dataset=str(made / "text.jsonl"),
        baseline=tmp_path / "one-shot", tokens=TOKENS, quiet=True,
    )  # fmt: skip
    page = _Page(written)
    for words in ("What tuning did", "Who gains from the rest of the recipe", "one-shot"):
        assert words in page.text, words
    assert {"tuning", "improvement"} <= _pngs(written)
    assert report_numbers.tuned(collect(tmp_path / "tuned")) == [
        ("model.layers.0", 0.2, 0.1), ("model.layers.1", 0.3, 0.15)
    ]  # fmt: skip


def _save(model, path, about=None):
    from wexpand_plugin.hf.saving import wrap_save_pretrained

    wrap_save_pretrained(model, about or {})
    model.save_pretrained(path)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_integer_values(made, tmp_path, sparsity):
    """Full rows, without masks, and sparse ones: scales are bytes of a kind of their own."""
    tiny.prune(tiny.dense(), sparsity).save_pretrained(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "ours", values="int4", quiet=True)
    dataset = str(made / "text.jsonl")
    page = _Page(
        write(tmp_path / "ours", dense=made / "dense", dataset=dataset, tokens=TOKENS, quiet=True)
    )
    assert "int4, groups of 128" in page.text and "scale" in page.text
    assert _pngs(tmp_path / "ours" / "report.html") == {"sizes", "wasserstein", "distributions"}


def test_scores_beside_the_model_are_shown(made, tmp_path):
    model = tiny.dense()
    scored = {}
    for name, linear in tiny.block_linears(model).items():
        x = torch.randn(200, linear.in_features)
        with torch.no_grad():
            scores = neuron_scores(x, linear.weight)
        shape, tag = tuple(linear.weight.shape), fingerprint(linear.weight)
        scored[name] = ScoredLinear(scores, shape, tag, 200)
    shutil.copytree(made / "ours", tmp_path / "ours")
    scores = ModelScores("dense", "LlamaForCausalLM", {"percent": 3.0}, scored, {})
    save_scores(scores, tmp_path / "ours" / FOLDER)
    page = write(tmp_path / "ours")
    assert _pngs(page) == {"sizes", "budget", "tokens", "wasserstein"}
    assert "scores stored beside the model" in _Page(page).text
    assert "self_attn" not in _Page(page).source, "only what was expanded is shown"


def test_what_is_not_ours_is_refused(made, tmp_path):
    with pytest.raises(WexpandError, match="not a model that wexpand wrote"):
        write(made / "dense", tmp_path / "x.html")
    with pytest.raises(WexpandError, match="there is no such file"):
        write(tmp_path, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists() and not (tmp_path / "x-plots").exists()


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(dense="ours"), "give the model as it was before"),
        (dict(dense="missing"), "neither a directory nor the id"),
        (dict(dense="other"), "is not the model that .* was made from: lm_head.weight differs"),
        (dict(dense="wide"), "has no linear .* of shape"),
        (dict(baseline="dense"), "holds no zeros"),
        (dict(baseline="ours"), "has 3 experts"),
        (dict(baseline="wide"), "is .*, not"),
        (dict(dataset="missing.jsonl"), "there is no such file"),
        (dict(dataset="short.jsonl"), "too few"),
        (dict(dense=None), "pass --dense MODEL"),
        (dict(dense=None, baseline=None), "or neither; pass --dense MODEL"),
        (dict(dataset=None, baseline=None), "or neither; pass --dataset TEXT"),
        (dict(tokens=0), "tokens: 0"),
    ],
)
def test_wrong_input(made, tmp_path, options, problem):
    if not (made / "other").exists():
        tiny.dense(seed=5).save_pretrained(made / "other")
        tiny.prune(tiny.dense(intermediate_size=64)).save_pretrained(made / "wide")
        (made / "short.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    values = dict(dense="dense", dataset="text.jsonl", baseline="pruned", tokens=TOKENS) | options
    for key in ("dense", "dataset", "baseline"):
        if values[key] is not None:
            values[key] = str(made / values[key])
    with pytest.raises(WexpandError, match=problem):
        write(made / "ours", tmp_path / "x.html", quiet=True, **values)
    assert not (tmp_path / "x.html").exists()

"""What cannot be compressed is refused before calibration, by name; a failure leaves nothing."""

import re

import pytest
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from test_modifier import calibration, logits, run, tiny
from tiny import VOCAB, dense, tokenizer
from two_ranks import together

from wexpand_plugin.compress.announce import warn_unserved
from wexpand_plugin.compress.checks import refuse_small
from wexpand_plugin.compress.curve import curve
from wexpand_plugin.compress.modifier import SparseExpansionModifier
from wexpand_plugin.compress.packing import PackModifier
from wexpand_plugin.compress.scoring import NeuronScoringModifier
from wexpand_plugin.compress.targets import target_linears
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.hf.linear import RoutedLinear, replaceable
from wexpand_plugin.method.settings import Settings

MODIFIERS = [
    SparseExpansionModifier(sparsity=0.5, num_experts=2, ignore=["lm_head"]),
    NeuronScoringModifier(),
    PackModifier(),
]


def apply(modifiers, model, **arguments):
    modifiers = modifiers if isinstance(modifiers, list) else [modifiers]
    return oneshot(
        model=model, dataset=calibration(), recipe=[m.model_copy(deep=True) for m in modifiers],
        processor=tokenizer(), max_seq_length=64, num_calibration_samples=24, **arguments,
    )  # fmt: skip


@pytest.fixture
def no_calibration(monkeypatch):
    """What is refused at initialize is refused before the pipeline starts."""

    def pipeline(*args, **kwargs):
        pytest.fail("calibration began")

    monkeypatch.setattr("llmcompressor.pipelines.CalibrationPipeline.from_modifiers", pipeline)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("modifier", MODIFIERS, ids=lambda m: type(m).__name__)
def test_weights_that_are_not_finite(modifier, value, tmp_path, no_calibration):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("Llama", tmp_path))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(WexpandError, match=r"^model.layers.1.mlp.up_proj.weight: holds NaN"):
        apply(modifier, str(tmp_path))


def test_a_broken_weight_that_is_no_target_is_left_alone(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("Llama", tmp_path))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path)
    run(tmp_path, targets=["re:.*layers.0.mlp.*"], size_budget=2.0)


def moe(kind, path):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, intermediate_size=48,
    )  # fmt: skip
    if kind == "mixtral":
        sizes |= dict(num_local_experts=4)
    else:
        sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("modifier", [MODIFIERS[0], MODIFIERS[2]], ids=lambda m: type(m).__name__)
def test_unrolled_experts_are_refused_with_what_to_ignore(modifier, tmp_path, no_calibration):
    with pytest.raises(WexpandError) as refused:
        apply(modifier, str(moe("qwen3_moe", tmp_path)))
    assert str(refused.value).startswith("model.layers.0.mlp.experts.0.")
    assert r"ignore: ['re:.*\.experts\..*']" in str(refused.value)


def test_experts_of_a_mixture_stay_dense_in_a_plan(tmp_path):
    """As in the recipe; what the host would save under other names is refused there, too."""
    (tmp_path / "text.txt").write_text("t3 t4 t5 " * 20)
    for kind in ("qwen3_moe", "mixtral"):
        tokenizer().save_pretrained(moe(kind, tmp_path / kind))
    where = str(tmp_path / "text.txt")
    found = curve(str(tmp_path / "qwen3_moe"), where, samples=2, max_seq_length=8)
    names = found.points[0].linears
    assert len(names) == 8 and not any("experts" in name for name in names)
    assert 0.1 < found.share < 0.5
    with pytest.raises(WexpandError, match="unrolls the experts of a MixtralForCausalLM"):
        curve(str(tmp_path / "mixtral"), where, samples=2, max_seq_length=8)


def test_what_two_modifiers_mean_is_refused(tmp_path, no_calibration):
    """Before a linear is quantised twice, or a second modifier finds nothing left to do."""
    tiny("Llama", tmp_path)
    scheme = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    ours = SparseExpansionModifier(sparsity=0.5, num_experts=1, targets=["re:.*mlp.*"])
    with pytest.raises(WexpandError, match="proj: another modifier of the recipe quantises it"):
        apply([scheme, ours], str(tmp_path))
    with pytest.raises(WexpandError, match="mlp.gate_proj: two SparseExpansionModifiers of"):
        apply([ours, ours], str(tmp_path))


def test_linears_that_torch_does_not_have(tmp_path):
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(WexpandError, match="c_attn: is a Conv1D of transformers, as all linears"):
        target_linears(transformers.GPT2LMHeadModel(config), ["Linear"], ["re:.*lm_head"])


def test_routers_are_no_linears_though_derived_from_one():
    """They return more than a product; Falcon's linears compute what torch's do, in other words."""
    config = transformers.PhimoeConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, vocab_size=VOCAB, pad_token_id=0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = target_linears(model, ["Linear"], ["lm_head"])
    assert isinstance(model.model.layers[0].mlp.router, torch.nn.Linear)
    assert len(found) == 4 and all("self_attn" in name for name in found)
    read = torch.nn.MultiheadAttention(4, 2).out_proj  # its weight is read, it is never called
    assert isinstance(read, torch.nn.Linear) and not replaceable(read)


@pytest.mark.parametrize("kind", ["Bloom", "Falcon", "GPTNeoX"])
def test_what_vllm_will_not_load_is_said(kind, said):
    config = getattr(transformers, f"{kind}Config")(hidden_size=16, num_attention_heads=2)
    config.num_hidden_layers, config.vocab_size = 1, VOCAB
    model = transformers.AutoModelForCausalLM.from_config(config)
    warn_unserved(model, target_linears(model, ["Linear"], ["re:.*lm_head", "re:.*embed_out"]))
    assert len(said) == (kind != "GPTNeoX") and all("query_key_value: vLLM does" in s for s in said)


def test_a_pattern_that_is_none():
    for targets, ignore in ((["re:("], []), (["Linear"], ["re:("])):
        with pytest.raises(WexpandError, match=r"'re:\(' should be a regular expression .*missing"):
            target_linears(torch.nn.Sequential(torch.nn.Linear(2, 2)), targets, ignore)


def test_the_rest_of_a_mixture_can_be_expanded(tmp_path):
    path = moe("qwen3_moe", tmp_path / "dense")
    model = run(path, tmp_path / "out", ignore=["lm_head", r"re:.*\.experts\..*"])
    assert sum(isinstance(m, RoutedLinear) for m in model.modules()) == 8
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    dense = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    experts = [name for name in dense if ".experts." in name]
    assert len(experts) == 4
    for name in experts:
        assert torch.equal(again.state_dict()[name], dense[name])


def test_a_mixture_that_the_host_saves_under_other_names_is_refused(tmp_path, no_calibration):
    with pytest.raises(WexpandError, match="unrolls the experts of a MixtralForCausalLM"):
        run(moe("mixtral", tmp_path), targets=["re:.*self_attn.*"])


def test_a_budget_of_the_model_is_compared_with_the_model(tmp_path, no_calibration):
    """One that its largest linears alone would not meet is met by all of them together."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("Llama", tmp_path))
    targets = target_linears(model, ["Linear"], ["lm_head"])
    shapes = {n: (linear.weight.shape, torch.float32) for n, linear in targets.items()}
    least = {}
    for scope in ("layer", "model"):
        keys = dict(sparsity=0.5, num_experts=4, budget_scope=scope)
        with pytest.raises(WexpandError) as refused:
            refuse_small(shapes, Settings(size_budget=0.1, **keys))
        least[scope] = float(re.search(r"is below (\d\.\d+)", str(refused.value))[1])
        whose = "of the 14 linears" if scope == "model" else "proj alone"
        assert whose in str(refused.value)
        refuse_small(shapes, Settings(size_budget=least[scope] + 0.001, **keys))
    assert least["model"] < least["layer"]


def test_few_tokens_for_each_expert_are_said(tmp_path, said):
    dense(intermediate_size=96).save_pretrained(tmp_path)
    few = "about 72 tokens for each of 2 experts, fewer than the 96 inputs of a linear"
    for samples in (4, 3):
        assert not any(few in line for line in said)
        run(tmp_path, num_experts=2, data=calibration(samples, 48))
    assert any(few in line for line in said)


def test_what_needs_all_rows_in_one_process(tmp_path):
    path = str(tiny("Llama", tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    for modifier in MODIFIERS[1:]:
        state = type("State", (), {"model": model})
        for found in together(lambda rank, m=modifier, s=state: m.initialize(s)):
            assert str(found).startswith(f"{type(modifier).__name__}: 2 processes (torchrun) are")


@pytest.mark.parametrize("modifier", MODIFIERS, ids=lambda m: type(m).__name__)
def test_a_run_does_not_begin_with_the_warnings_of_one_that_failed(modifier, tmp_path, monkeypatch):
    path = str(tiny("Llama", tmp_path))
    said: list[str] = []

    def fail(*args, **kwargs):
        raise RuntimeError("stopped in the middle")

    sink = logger.add(said.append, level="WARNING", format="{message}")
    try:
        with create_session():
            with monkeypatch.context() as broken:
                broken.setattr(type(modifier), "on_calibration_end", fail)
                with pytest.raises(RuntimeError, match="in the middle"):
                    apply(modifier, path)
            said.clear()
            apply(SparseExpansionModifier(sparsity=0.5, num_experts=1, ignore=["lm_head"]), path)
    finally:
        logger.remove(sink)
    assert not [line for line in said if "finalizing" in line or "stay dense" in line], said
    assert not [line for line in said if "not scored" in line], said

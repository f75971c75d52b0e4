"""The loss that weight errors add, predicted from one backward pass and measured."""

import pytest
import torch
from scipy.stats import spearmanr
from tiny import block_linears, dense, tokens

from wexpand_plugin.compress import sensitivity as measuring
from wexpand_plugin.compress.plan_batches import plan_batches
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.inputs import record_inputs
from wexpand_plugin.method.sensitivity import added_loss, output_errors


def output_sensitivity(model, linears, batches, seed):
    batches = plan_batches(batches, torch.device("cpu"))
    return measuring.output_sensitivity(model, linears, batches, seed)


def divergence(model, ids, expected) -> float:
    """Loss on labels of the dense model's own predictions, over its least, nats per token."""
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.log_softmax(-1)
    return float((expected.exp() * (expected - log_p)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_predicts_the_loss_that_small_errors_add(kind):
    model, ids = dense(kind).eval(), tokens(48, 24)
    linears = block_linears(model)
    batches = [{"input_ids": part} for part in ids.split(8)]
    sensitivity = output_sensitivity(model, linears, batches, seed=0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
    (inputs,) = record_inputs(list(linears.values()), [lambda: model(input_ids=ids)])
    generator = torch.Generator().manual_seed(0)
    predicted, measured = [], []
    for number, (name, linear) in enumerate(linears.items()):
        size = (0.01, 0.02, 0.04)[number % 3]
        weight, rows = linear.weight.detach().clone(), inputs[linear].flatten(0, 1)
        change = torch.randn(weight.shape, generator=generator) * size * weight.std()
        hessian = rows.t() @ rows / len(rows)
        errors = output_errors(change, hessian)
        torch.testing.assert_close(errors, (rows @ change.t()).square().mean(0))
        predicted.append(added_loss(change, hessian, sensitivity[name]))
        with torch.no_grad():
            linear.weight += change
            measured.append(divergence(model, ids, expected))
            linear.weight.copy_(weight)
    assert spearmanr(predicted, measured).statistic > 0.9
    ratios = torch.tensor(predicted) / torch.tensor(measured)
    assert 0.5 < float(ratios.log().mean().exp()) < 2
    # all at once: costs add up
    with torch.no_grad():
        generator.manual_seed(0)
        for number, linear in enumerate(linears.values()):
            size = (0.01, 0.02, 0.04)[number % 3]
            linear.weight += (
                torch.randn(linear.weight.shape, generator=generator) * size * linear.weight.std()
            )
    assert 0.5 < sum(predicted) / divergence(model, ids, expected) < 2


def test_errors_of_neurons_that_go_together():
    """A low-rank change of the weight moves all outputs at once; what the diagonal alone says of
    it is wrong by far."""
    model, ids = dense("llama").eval(), tokens(48, 24)
    linears = {n: m for n, m in block_linears(model).items() if "layers.1" in n}
    batches = [{"input_ids": part} for part in ids.split(2)]
    sensitivity = output_sensitivity(model, linears, batches, seed=0)
    other = output_sensitivity(model, linears, batches, seed=1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
    (inputs,) = record_inputs(list(linears.values()), [lambda: model(input_ids=ids)])
    right, wrong = [], []
    generator = torch.Generator().manual_seed(0)
    for name, linear in linears.items():
        weight, rows = linear.weight.detach().clone(), inputs[linear].flatten(0, 1)
        hessian = rows.t() @ rows / len(rows)
        known = sensitivity[name]
        strongest = torch.linalg.svd(other[name].gradients.float(), full_matrices=False).Vh[0]
        change = torch.outer(strongest, torch.randn(weight.shape[1], generator=generator)) * 0.03
        predicted = added_loss(change, hessian, known)
        apart = float((output_errors(change, hessian) * known.squares).sum()) / 2
        with torch.no_grad():
            linear.weight += change
            measured = divergence(model, ids, expected)
            linear.weight.copy_(weight)
        right.append(predicted / measured)
        wrong.append(apart / measured)
    # errors of different tokens, still taken as independent, go together as well
    assert all(0.3 < ratio < 3 for ratio in right)
    assert 0.5 < float(torch.tensor(right).log().mean().exp()) < 2
    assert min(wrong) < 0.4


def test_padding_counts_for_nothing():
    model, ids = dense("llama"), tokens(4, 16)
    linears = block_linears(model)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    cut = output_sensitivity(
        model, linears, [{"input_ids": ids[:, :9], "attention_mask": mask[:, :9]}], seed=0
    )
    masked = output_sensitivity(
        model, linears, [{"input_ids": ids, "attention_mask": mask}], seed=0
    )
    for name in linears:
        torch.testing.assert_close(
            masked[name].squares, cut[name].squares, rtol=1e-3, atol=1e-8
        )


def test_leaves_the_model_as_it_was_and_says_what_is_not_finite():
    model, ids = dense("llama"), tokens(2, 8)
    linears = block_linears(model)
    first = output_sensitivity(model, linears, [{"input_ids": ids}], seed=0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    second = output_sensitivity(model, linears, [{"input_ids": ids}], seed=0)
    assert all(torch.equal(first[name].squares, second[name].squares) for name in linears)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(WexpandError, match="predictions on the calibration text are not finite"):
        output_sensitivity(model, linears, [{"input_ids": ids}], seed=0)

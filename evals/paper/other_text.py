"""(e) Calibrated on one kind of text, evaluated on another: what of the experts' gain is left?

    python -m evals.paper.other_text [--model DIR] [--data FOLDER] [--seeds 3] [--quick]

MLP linears are pruned to 80% with one mask and with 16 experts, calibrated on each kind of text,
and both are measured on held-out text of every kind: the loss of the model, and the error of each
linear by itself. Then token by token: is the error larger where an input is far from the centroid
of its cluster, and do experts lose to one mask there? The distance is relative to the root mean
square of the cluster's calibration tokens. Of a model whose every third block is looked at,
this looks at every sixth.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from wexpand_plugin.method.clusters import Router

from .frame import experiment
from .inputs import Recorded, block_of, record
from .pictures import COLOURS, curve, per_model
from .pruning import cluster_hessians, experts, hessian, routed_errors, stacked
from .study import CLUSTERS, Study, cluster
from .verdicts import Claim

__all__ = ["CAPTION", "QUESTION", "claims", "distances", "draw", "measure"]

QUESTION = "Do experts help on text of another kind than they were calibrated on?"
CAPTION = (
    "Above: what experts gain over one mask, in nats per token, calibrated on the text "
    "of the row and measured on that of the column (mean over seeds). Below: RMSE of one mask over "
    "that of the experts by the token's distance to its centroid, tenth by tenth of the held-out "
    "tokens of all texts, a line for each calibration text. On SmolLM2 every sixth block."
)
SPARSITY = 0.8
TENTHS = 10


def distances(x: Tensor, labels: Tensor, seen: Tensor, seen_labels: Tensor) -> Tensor:
    """How far tokens `x` [tokens, in] are from the mean of the tokens `seen` of their cluster, over
    the root mean square distance of those themselves: [tokens]; NaN where none was seen."""
    found = x.new_full((len(x),), torch.nan)
    for number in labels.unique():
        own = seen[seen_labels == number]
        if len(own):
            centre = own.mean(dim=0)
            usual = (own - centre).square().sum(dim=1).mean().sqrt()
            tokens = labels == number
            found[tokens] = (x[tokens] - centre).norm(dim=1) / usual
    return found


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, without ties in mind."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@contextmanager
def forwards(routed: list[tuple[nn.Linear, Any]]) -> Iterator[None]:
    """Linears that compute something else for a while."""
    for linear, forward in routed:
        linear.forward = forward
    try:
        yield
    finally:
        for linear, _ in routed:
            del linear.forward


def expanded(router: Router, own: Tensor, x: Tensor) -> Tensor:
    """Outputs [..., rows] of the expert of each input [..., in]; `own` [clusters, rows, in]."""
    flat = x.reshape(-1, x.shape[-1])
    zero = own.new_zeros(own.shape[1:])
    return routed_errors(zero, own, flat, router.route(flat)).view(*x.shape[:-1], -1)


def tokenwise(
    weight: Tensor, one: Tensor, own: Tensor, router: Router, seen: Recorded, tests: list[Tensor]
) -> dict[str, Any]:
    """Errors of one group on tokens of each text, and by distance."""
    seen_labels = router.route(seen.x)
    far, base, routed, size, ratios = [], [], [], [], []
    for x in tests:
        labels = router.route(x)
        far.append(distances(x, labels, seen.x, seen_labels))
        base.append((x @ (one - weight).t()).square().sum(dim=1))
        routed.append(routed_errors(weight, own, x, labels).square().sum(dim=1))
        size.append((x @ weight.t()).square().sum(dim=1))
        ratios.append(float((base[-1].sum() / routed[-1].sum()).sqrt()))
    known = torch.cat(far).isfinite()
    distance, a, b, whole = (torch.cat(v)[known] for v in (far, base, routed, size))
    order = distance.argsort().tensor_split(TENTHS)
    return {
        "ratios": ratios,
        "relative error": spearman(distance, b / whole),
        "ratio": spearman(distance, a / b),
        "by distance": [float((a[part] / b[part]).log().mean().div(2).exp()) for part in order],
    }


@torch.no_grad()
def measure(study: Study, seed: int) -> dict[str, Any]:
    """For each kind of calibration text: losses and errors on each kind of held-out text."""
    kinds, network = study.kinds, study.network
    # four times the work of others: of a large model every sixth block
    step = study.every if study.every == 1 else 2 * study.every
    groups = [group for group in study.groups if block_of(group.names[0]) % step == 0]
    tests = {
        kind: record(network, groups, study.rows(kind, "held out", study.held_out_tokens, 0))
        for kind in kinds
    }
    found: dict[str, Any] = {"dense": {kind: study.loss(kind) for kind in kinds}}
    for kind in kinds:
        plain, routed, rows = [], [], []
        recorded = record(network, groups, study.rows(kind, "train", study.tokens, seed))
        for number, seen in enumerate(recorded):
            weight, router = stacked(seen.group), cluster(seen.x, seed)
            one = experts(weight, hessian(seen.x)[None], SPARSITY)[0]
            labels = router.route(seen.x)
            own = experts(weight, cluster_hessians(seen.x, labels, CLUSTERS), SPARSITY)
            rows.append(
                tokenwise(weight, one, own, router, seen, [tests[k][number].x for k in kinds])
            )
            at = 0
            for linear in seen.group.linears:
                part = slice(at, at := at + len(linear.weight))
                forward = partial(nn.functional.linear, weight=one[part], bias=linear.bias)
                plain.append((linear, forward))
                routed.append((linear, partial(expanded, router, own[:, part])))
        with forwards(plain):
            losses = {"one mask": {k: study.loss(k) for k in kinds}}
        with forwards(routed):
            losses["experts"] = {k: study.loss(k) for k in kinds}
        ratios = zip(*(row["ratios"] for row in rows), strict=True)
        found[kind] = losses | {
            "rmse ratio": dict(zip(kinds, map(mean, ratios), strict=True)),
            "distance and relative error": mean(row["relative error"] for row in rows),
            "distance and ratio": mean(row["ratio"] for row in rows),
            "by distance": [mean(v) for v in zip(*(r["by distance"] for r in rows), strict=True)],
        }
    return found


def gains(one: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Nats that experts gain over one mask, by calibration and held-out text."""
    kinds = list(one["dense"])
    return {
        (a, b): one[a]["one mask"][b] - one[a]["experts"][b] for a in kinds for b in kinds
    }


def claims(found: list[dict[str, Any]]) -> list[Claim]:
    """Of all pairs of texts."""
    home, away, least, far, lost = [], [], [], [], []
    for one in found:
        pairs, kinds = gains(one), list(one["dense"])
        home.append(min(pairs[kind, kind] for kind in kinds))
        kept = [pairs[a, b] for a in kinds for b in kinds if a != b]
        away.append(mean(kept) / mean(pairs[kind, kind] for kind in kinds))
        least.append(min(kept))
        far.append(mean(one[kind]["distance and relative error"] for kind in kinds))
        lost.append(mean(one[kind]["by distance"][-1] for kind in kinds))
    return [
        Claim("Experts gain on text of the same kind",
              "least gain over one mask, of all texts, in nats", home, 0.0),
        Claim("Half of that is left on other kinds",
              "mean gain on other kinds, of that on the same", away, 0.5),
        Claim("They never lose on other kinds",
              "least gain over all pairs of kinds, in nats", least, 0.0),
        Claim("The error is larger far from the centroid",
              "rank correlation of distance and relative error, over tokens", far, 0.1),
        Claim("They gain for the farthest tenth, too",
              "RMSE of one mask over the experts', tokens farthest from their centroid", lost, 1.0),
    ]  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """A matrix of gains, and the improvement by distance."""
    figure.set_figheight(4.8)
    axes = figure.subplots(2, len(found), squeeze=False)
    for (model, seeds), (above, below) in per_model(found, axes):
        kinds, pairs = list(seeds[0]["dense"]), [gains(one) for one in seeds]
        matrix = [[mean(p[a, b] for p in pairs) for b in kinds] for a in kinds]
        most = max(abs(v) for row in matrix for v in row)
        above.imshow(matrix, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                above.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
        above.set_xticks(range(len(kinds)), kinds, fontsize=6)
        above.set_yticks(range(len(kinds)), kinds, fontsize=6)
        above.set(title=model, xlabel="measured on", ylabel="calibrated on")
        for kind, colour in zip(kinds, COLOURS, strict=False):
            runs = [dict(enumerate(one[kind]["by distance"], 1)) for one in seeds]
            curve(below, runs, "o-", color=colour, label=kind)
        below.axhline(1, color="black", linewidth=0.8)
        below.set(xlabel="tenth of tokens, by distance to centroid", ylabel="improvement")
        below.legend(frameon=False, fontsize=6)


if __name__ == "__main__":
    experiment(__file__)

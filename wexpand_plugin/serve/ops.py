"""The operation that a forward of an expanded layer calls, and the router alone, for a layer whose
input is split over workers.

Both are opaque to torch.compile: routing and kernel stay out of the graph, whatever the kernel
does. They have a torch library of their own, so their names clash with nobody's, and they never
synchronise with a GPU unless the kernel does.
"""

from functools import cache

import torch
from torch import Tensor

from .. import kernels
from ..format.clusters import ClusterBias, expert_of

__all__ = ["routed_linear", "router_logits"]

_library = torch.library.Library("wexpand", "DEF")
_library.define(
    "routed_linear(Tensor x, Tensor[] layout, Tensor? router_weight, Tensor? router_bias, "
    "int parents, Tensor? clusters, Tensor? cluster_expert, int experts, Tensor? bias, "
    "Tensor? cluster_bias, Tensor? cluster_bias_scale, int out_features, str kernel) -> Tensor"
)
_library.define("router_logits(Tensor x, Tensor router_weight, str kernel) -> Tensor")
_kernel = cache(kernels.get)


def _run(
    x: Tensor,
    layout: list[Tensor],
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    parents: int,
    clusters: Tensor | None,
    cluster_expert: Tensor | None,
    experts: int,
    bias: Tensor | None,
    cluster_bias: Tensor | None,
    cluster_bias_scale: Tensor | None,
    out_features: int,
    kernel: str,
) -> Tensor:
    x, own, biases = x.contiguous(), _kernel(kernel), None
    if clusters is None and router_weight is not None and router_bias is not None:
        clusters = own.route(x, router_weight, router_bias, parents)
    chosen = None if clusters is None else expert_of(clusters, cluster_expert, experts)
    if cluster_bias is not None and cluster_bias_scale is not None:
        biases = ClusterBias(cluster_bias, cluster_bias_scale)
    return own.run(x, chosen, layout, out_features, bias, clusters, biases)


def _logits(x: Tensor, router_weight: Tensor, kernel: str) -> Tensor:
    return _kernel(kernel).logits(x, router_weight)


def _fake_logits(x, router_weight, kernel):
    return x.new_empty(x.shape[0], router_weight.shape[0], dtype=torch.float32)


def _fake(x, *arguments):
    return x.new_empty(x.shape[0], arguments[-2])


# registered without torch.library.custom_op, whose Python wrapper costs tens of microseconds a call
_library.impl("routed_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("wexpand::routed_linear", _fake, lib=_library)
_library.impl("router_logits", _logits, "CompositeExplicitAutograd")
torch.library.register_fake("wexpand::router_logits", _fake_logits, lib=_library)

router_logits = torch.ops.wexpand.router_logits.default
"""float32 [tokens, rows] = x [tokens, in] times the router's weight [rows, in], transposed."""

routed_linear = torch.ops.wexpand.routed_linear.default
"""y [tokens, out] = each token of x [tokens, in] times its expert's weights, plus `bias` [out] and
the bias of its cluster.

`layout` is what `kernels.<kernel>.prepare` made of a pool with so many `experts`. A token's cluster
is `clusters` [tokens] if given, else the choice of the router (weight, bias and parents, as in
`format.router`), else the only one there is; `format.clusters` says what follows from it.

Biases are added in here and not in the graph: the result is then one buffer, as a dense linear's,
and what follows may take views of it. (Where a bias added in the graph was followed by a split and
an in-place rotary embedding, Inductor's code read past the end of a buffer.)
"""

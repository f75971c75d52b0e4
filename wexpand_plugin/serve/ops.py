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

__all__ = ["routed_linear", "router_logits"]

_library = torch.library.Library("wexpand", "DEF")
_library.define(
    "routed_linear(Tensor x, Tensor[] layout, Tensor? router_weight, Tensor? router_bias, "
    "Tensor? experts, Tensor? bias, int out_features, str kernel) -> Tensor"
)
_library.define("router_logits(Tensor x, Tensor router_weight, str kernel) -> Tensor")
_kernel = cache(kernels.get)


def _run(
    x: Tensor,
    layout: list[Tensor],
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    experts: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    kernel: str,
) -> Tensor:
    if experts is None and router_weight is not None and router_bias is not None:
        experts = (_logits(x, router_weight, kernel) + router_bias).argmax(dim=1)
    y = _kernel(kernel).run(x.contiguous(), experts, layout, out_features)
    return y if bias is None else y.add_(bias)


def _logits(x: Tensor, router_weight: Tensor, kernel: str) -> Tensor:
    return _kernel(kernel).logits(x, router_weight)


def _fake_logits(x, router_weight, kernel):
    return x.new_empty(x.shape[0], router_weight.shape[0], dtype=torch.float32)


def _fake(x, layout, router_weight, router_bias, experts, bias, out_features, kernel):
    return x.new_empty(x.shape[0], out_features)


# registered without torch.library.custom_op, whose Python wrapper costs tens of microseconds a call
_library.impl("routed_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("wexpand::routed_linear", _fake, lib=_library)
_library.impl("router_logits", _logits, "CompositeExplicitAutograd")
torch.library.register_fake("wexpand::router_logits", _fake_logits, lib=_library)

router_logits = torch.ops.wexpand.router_logits.default
"""float32 [tokens, experts] = x [tokens, in] times the router's map [experts, in], transposed."""

routed_linear = torch.ops.wexpand.routed_linear.default
"""y [tokens, out] = each token of x [tokens, in] times its expert's weights, plus `bias` [out].

`layout` is what `kernels.<kernel>.prepare` made. A token's expert is `experts` [tokens] if given,
else the router's choice, else the only one there is.

The bias is added in here and not in the graph: the result is then one buffer, as a dense linear's,
and what follows may take views of it. (Where a bias added in the graph was followed by a split and
an in-place rotary embedding, Inductor's code read past the end of a buffer.)
"""

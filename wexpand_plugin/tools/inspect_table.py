"""An inspection as text, for the terminal."""

from .inspect import Inspection, LinearInspection, is_number

__all__ = ["readable_bytes", "table"]


def readable_bytes(count: float) -> str:
    """A count of bytes in decimal units, with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.0f} GB"


def table(found: Inspection) -> str:
    """One line per linear, then totals."""
    width = max((len(linear.name) for linear in found.linears), default=4)
    balance = any(linear.balance is not None for linear in found.linears)
    clusters = any(linear.clusters > linear.experts for linear in found.linears)
    values = found.ours and len({linear.values for linear in found.linears}) > 1
    lines = [
        f"{'linear':{width}}  {'out x in':>13}  {'clusters  ' * clusters}experts  versions  "
        f"{'  values  ' * values}zeros    stored  x dense  per token" + "  balance" * balance
    ]
    lines += [_row(linear, width, balance, clusters, values) for linear in found.linears]
    kinds = ", ".join(f"{k} {readable_bytes(b)}" for k, b in found.bytes_by_kind().items() if b)
    dense, count = found.dense_bytes, len(found.linears)
    lines.append("")
    if not found.ours:
        lines.append("not a model that wexpand wrote: its linears are dense")
    if count and dense:
        weights = sum(linear.in_features * linear.out_features for linear in found.linears)
        kind = "" if values else f" in {found.linears[0].values.partition(',')[0]}"
        lines += [
            f"{count} linears{kind}, {found.sparsity:.1%} zeros: "
            f"{readable_bytes(found.linear_bytes)} stored, {found.linear_bytes / dense:.2f} x "
            f"dense, {8 * found.linear_bytes / weights:.2f} bits per weight ({kinds})",
            f"one token reads {readable_bytes(found.bytes_per_token)} of them, "
            f"{found.bytes_per_token / dense:.2f} x dense",
        ]
    chosen = found.made("dial").get("linears")
    chosen = set(chosen) if isinstance(chosen, dict) else set()
    if left := sorted(chosen - {linear.name for linear in found.linears}):
        some = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
        lines.append(f"{len(left)} more stay dense, which the size asked for counts too: {some}")
    losses = {k: v for k, v in found.made("predicted_loss").items() if is_number(v)}
    if losses:
        lines.append(
            f"predicted to add {sum(losses.values()):.3g} nats per token, before tuning; the most "
            f"in {max(losses, key=losses.__getitem__)}"
        )
    lines.append(f"all tensors: {readable_bytes(found.disk_bytes)} on disk")
    return "\n".join(lines)


def _row(
    linear: LinearInspection,
    width: int,
    with_balance: bool,
    with_clusters: bool,
    with_values: bool,
) -> str:
    size = f"{linear.out_features} x {linear.in_features}"
    balance = f"{'-':>9}" if linear.balance is None else f"{linear.balance:9.2f}"
    clusters = f"{linear.clusters:8}  " if with_clusters else ""
    values = f"{linear.values.partition(',')[0]:>8}  " if with_values else ""
    return (
        f"{linear.name:{width}}  {size:>13}  {clusters}{linear.experts:7}  {linear.versions:8}  "
        f"{values}{linear.sparsity:5.1%}  {readable_bytes(linear.stored_bytes):>8}  "
        f"{linear.stored_bytes / linear.dense_bytes:7.2f}  "
        f"{readable_bytes(linear.bytes_per_token):>9}{balance if with_balance else ''}"
    )

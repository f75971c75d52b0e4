"""The page: plots and numbers put into `page.html.jinja`, which holds the words.

One HTML file that loads nothing, and the same plots as PNG files in a folder beside it. What
cannot be shown says which option would show it.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import WexpandError

if TYPE_CHECKING:
    from .data import ReportData
    from .measure import Measurement

__all__ = ["write"]

PERCENT = 3.0
"""the share of a linear's neurons that is called Wasserstein neurons, as in the paper"""
FIGURES = ("sizes", "curve", "settings", "budget", "tokens", "tuning", "wasserstein",
           "distributions", "improvement")  # fmt: skip


def write(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    dense: str | Path | None = None,
    dataset: str | None = None,
    baseline: str | Path | None = None,
    tokens: int = 8192,
    context: int = 256,
    quiet: bool = False,
) -> Path:
    """Write the report about the model in `directory`; return the HTML file.

    :param output: HTML file, or a directory for `report.html`; by default in `directory`. The PNG
        files go to a folder beside it, `report-plots` for `report.html`
    :param dense: the model before compression (directory or hub id), for what its neurons do
    :param dataset: text to run it on, not the calibration text: file, saved data set or hub id
    :param baseline: the same model pruned without experts, to compare with; by default each
        neuron's most used row version, where experts share versions. Best with the same
        `mask_structure`: others give some neurons more weights than others
    :param tokens, context: of the text, how much is used, in rows of what length
    :raises WexpandError: not a model of ours; a model, text or baseline that does not fit
    """
    for library in ("jinja2", "matplotlib"):  # missing ones are said before any work
        import_module(library)
    from .data import collect

    if tokens < 1 or context < 2:
        raise WexpandError(f"tokens: {tokens} should be 1 or more, context: {context} 2 or more")
    given = {"--dense MODEL": dense, "--dataset TEXT": dataset}
    missing = [option for option, value in given.items() if value is None]
    wanted = " and ".join(missing)
    if baseline is not None and wanted:
        raise WexpandError(f"baseline: {baseline} can only be compared on some text; pass {wanted}")
    if len(missing) == 1:
        raise WexpandError(f"report: needs {' and '.join(given)}, or neither; pass {wanted}")
    data = collect(directory)
    page = _target(data.directory, output)
    measured = None
    if dense is not None and dataset is not None:
        from .measure import measure

        measured = measure(
            data, dense, dataset, baseline=baseline, tokens=tokens, context=context,
            progress=not quiet,
        )  # fmt: skip
    folder = _plots(page)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    values = {
        "data": data,
        "measured": measured,
        "options": wanted,
        "percent": PERCENT,
        **_shown(data, measured, folder),
    }
    page.write_text(_render(values), encoding="utf8")
    return page


def _plots(page: Path) -> Path:
    return page.with_name(f"{page.stem}-plots")


def _target(directory: Path, output: str | Path | None) -> Path:
    path = directory if output is None else Path(output)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        path = path / "report.html"
    for folder in (path.parent, _plots(path)):
        if folder.exists() and not folder.is_dir():
            raise WexpandError(f"output: {folder} is a file, where the report needs a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _shown(data: "ReportData", measured: "Measurement | None", folder: Path) -> dict[str, Any]:
    """The plots that can be drawn, by name, and the numbers that their sentences and tables hold.

    PNG files are written to `folder`. Numbers without a meaning here are None.
    """
    from . import dial_plots, neuron_plots, numbers, plots
    from .style import save, styled

    figures, routed = {"sizes": plots.sizes(data)}, data.clusters > 1
    counted = [group for group in data.groups if sum(group.tokens)] if routed else []
    wd = _wasserstein(data, measured)
    compared = measured is not None and measured.base is not None
    tuned, chosen = numbers.tuned(data), dial_plots.chosen(data)
    with styled():
        if chosen:
            figures |= {"curve": dial_plots.curve(data), "settings": dial_plots.settings(data)}
        if data.experts > 1:
            figures["budget"] = plots.budget(data)
        if counted:
            figures["tokens"] = plots.tokens(counted, data.unit)
        if tuned:
            figures["tuning"] = plots.tuning(tuned)
        if wd:
            figures["wasserstein"] = neuron_plots.wasserstein(wd, PERCENT)
        if measured is not None:
            name = f"{data.unit}s" if routed else "compressed model"
            figures["distributions"] = neuron_plots.distributions(measured, name)
        if measured is not None and compared:
            figures["improvement"] = neuron_plots.improvement(measured, PERCENT)
        drawn = {name: save(figure, name, folder) for name, figure in figures.items()}
    return {
        "plots": drawn,
        "panels": plots.PANELS,
        "chosen": chosen,
        "counted": counted,
        "tuned": tuned,
        "wd": wd,
        "budget": numbers.budget(data),
        "shares": numbers.shares(counted) if counted else None,
        "spread": numbers.spread(wd) if wd else None,
        "gain": numbers.gain(measured, PERCENT) if measured is not None and compared else None,
        "rows": numbers.rows(data, measured, PERCENT),
    }


def _wasserstein(data: "ReportData", measured: "Measurement | None") -> dict[str, Any]:
    """WD of the neurons of each linear: measured, or from the scores stored beside the model."""
    if measured is not None:
        return {name: linear.wd for name, linear in measured.linears.items()}
    from ...compress.neuron_scores import FOLDER, load_scores

    if not (data.directory / FOLDER).is_dir():
        return {}
    scored = load_scores(data.directory).linears
    ours = [linear.name for linear in data.linears if linear.name in scored]
    return {name: scored[name].scores.wd for name in ours or scored}


def _render(values: dict[str, Any]) -> str:
    import jinja2

    from ... import __version__
    from ..inspect_table import readable_bytes

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": readable_bytes,
        "percent": "{:.0%}".format,
        "percent1": "{:.1%}".format,
        "two": "{:.2f}".format,
        "three": "{:.3f}".format,
    }
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf8")
    return environment.from_string(template).render(values, version=__version__)

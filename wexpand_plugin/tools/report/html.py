"""The page: sections of a plot and its words, put into `page.html.jinja`.

One HTML file that loads nothing, and the same plots as PNG files in a folder beside it. What
cannot be shown says which option would show it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import WexpandError

if TYPE_CHECKING:
    from .data import ReportData
    from .measure import Measurement

__all__ = ["Section", "write"]

PERCENT = 3.0
"""the share of a linear's neurons that is called Wasserstein neurons, as in the paper"""
FIGURES = ("sizes", "budget", "tokens", "wasserstein", "distributions", "improvement")


@dataclass(frozen=True)
class Section:
    """A plot, or a note why there is none."""

    title: str
    text: str
    """What is seen and what it means; in a section without a plot, how to get one."""
    name: str = ""
    """of the PNG file, without .png"""
    svg: str = ""


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
    # before any work: what is not installed
    import jinja2
    import matplotlib  # noqa: F401

    from .data import collect

    if tokens < 1 or context < 2:
        raise WexpandError(f"tokens: {tokens} should be 1 or more, context: {context} 2 or more")
    missing = {"--dense MODEL": dense, "--dataset TEXT": dataset}
    wanted = " and ".join(option for option, value in missing.items() if value is None)
    if baseline is not None and wanted:
        raise WexpandError(f"baseline: {baseline} can only be compared on some text; pass {wanted}")
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
    values = _values(data, measured, _sections(data, measured, wanted, folder))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf8")
    page.write_text(environment.from_string(template).render(values), encoding="utf8")
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


def _sections(
    data: "ReportData", measured: "Measurement | None", wanted: str, folder: Path
) -> list[Section]:
    from . import neuron_plots, plots, words
    from .style import save, styled

    found: list[Section] = []

    def add(name: str, title: str, text: str, figure: Any = None) -> None:
        svg = "" if figure is None else save(figure, name, folder)
        found.append(Section(title, text, name if svg else "", svg))

    with styled():
        add("sizes", "What it weighs", words.sizes(data), plots.sizes(data))
        if data.experts > 1:
            add("budget", "Where the budget went", words.budget(data), plots.budget(data))
            counted = [group for group in data.groups if sum(group.tokens)]
            figure = plots.tokens(counted) if counted else None
            add("tokens", "Tokens per expert", words.tokens(data, counted), figure)
        else:
            add("budget", "Where the budget went", words.ONE_EXPERT)
        title = "Wasserstein neurons"
        if scores := _scores(data, measured):
            figure = neuron_plots.wasserstein(scores, PERCENT)
            add("wasserstein", title, words.wasserstein(scores, measured, PERCENT), figure)
        else:
            add("wasserstein", title, words.pass_options(wanted, "the WD of every neuron"))
        title = "What pruning does to a neuron"
        if measured is None:
            what = "the outputs of neurons before and after"
            add("distributions", title, words.pass_options(wanted, what))
        else:
            blue = "experts" if data.experts > 1 else "sparse model"
            figure = neuron_plots.distributions(measured, blue)
            add("distributions", title, words.distributions(measured, blue), figure)
        if data.experts == 1:
            return found
        title = "Who gains from experts"
        if measured is None:
            what = "which neurons gain the most"
            add("improvement", title, words.pass_options(wanted, what))
        elif measured.base is None:
            add("improvement", title, words.NO_BASE)
        else:
            figure = neuron_plots.improvement(measured, PERCENT)
            add("improvement", title, words.improvement(measured, PERCENT), figure)
    return found


def _scores(data: "ReportData", measured: "Measurement | None") -> dict[str, Any]:
    """WD of the neurons of each linear: measured, or from the scores stored beside the model."""
    from ...compress.neuron_scores import FOLDER, load_scores

    if measured is not None:
        return {name: linear.wd for name, linear in measured.linears.items()}
    if not (data.directory / FOLDER).is_dir():
        return {}
    scored = load_scores(data.directory).linears
    ours = [linear.name for linear in data.linears if linear.name in scored]
    return {name: scored[name].scores.wd for name in ours or scored}


def _values(
    data: "ReportData", measured: "Measurement | None", sections: list[Section]
) -> dict[str, Any]:
    """What the template asks for."""
    from ... import __version__
    from . import words

    return {
        "name": data.directory.resolve().name,
        "about": words.about(data),
        "tiles": words.tiles(data),
        "sections": sections,
        "kinds": words.kind_rows(data),
        "linears": words.linear_rows(data, measured, PERCENT),
        "settings": words.settings(data),
        "version": __version__,
    }

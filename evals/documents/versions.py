"""What the package is tested with and what it declares, from the files that say so."""

import tomllib

from .fill import ROOT
from .results import results, table

__all__ = ["TABLES"]


def compatibility() -> str:
    """Tested and declared versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["compress"], *extras["serve"], *extras["eval"]]
    pins = dict(
        line.strip().split("==")
        for line in (ROOT / ".ci" / "pins.txt").read_text(encoding="utf8").splitlines()
        if "==" in line
    )
    run = results("demo")["versions"]

    def declared(name: str) -> str:
        return next(w[len(name) :] for w in wanted if w.startswith(f"{name}>")).replace(",", ", ")

    transformers = [run[half]["transformers"] for half in ("compress", "serve")]
    return table(
        ["", "tested", "declared"],
        [
            ["Python", run["python"], project["requires-python"]],
            *(
                [label, pins[name], declared(name)]
                for label, name in (("torch", "torch"), ("llm-compressor", "llmcompressor"),
                                    ("vLLM", "vllm"), ("lm-eval", "lm-eval"))
            ),
            ["transformers", " and ".join(transformers), "as llm-compressor and vLLM ask"],
        ],
    )  # fmt: skip


TABLES = (compatibility,)

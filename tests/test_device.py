"""The stages of a run on a device that is not the CPU: nothing stays behind, and the numbers are the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from far import FAR, Far, far_away
from test_pipeline import SMALL, numbers
from tiny_models import tiny_base, tiny_model

from crosstrace.core.errors import UserError
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.stages import recall as recall_stage
from crosstrace.models import loading
from crosstrace.trace import cpu_kernel
from crosstrace.training.evaluation import recall

LESS = {
    "facts.people": "16", "strategies": "{mixed: [{name: mixed, batch: {bio: 4, qa: 8}, steps: 2}]}",
    "eval.known_examples": "6",
    "trace.measures": "[abs]", "trace.check": "false", "analysis.draws": "2", "interventions.seeds": "1",
    "interventions.questions": "4", "train.checkpoint_every": "2", "train.recall_examples": "6",
    "mechanism": "{parts: [gradients, representations, signature, lens, positions], facts: 4, together: 4, "
    "draws: 1, questions: 2, steps: 1, alone: 1, seeds: 1, signature: 2}",
}  # fmt: skip


def test_what_is_far_does_not_mix() -> None:
    with far_away():
        x = torch.ones(3, device=FAR)
        assert isinstance(x, Far) and (x + 1).device == FAR and x.cpu().device.type == "cpu" and float(x.sum()) == 3
        with pytest.raises(RuntimeError, match="on the CPU"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError):
            x.numpy()
        model = tiny_model("llama", torch.float32, tied=True).to(FAR)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert next(model.parameters()).device == FAR


@pytest.mark.long
def test_all_stages_compute_where_they_are_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but training: where that happens is the Trainer's business."""
    base = tiny_base(layers=1)  # on a device that is only played each operation takes a millisecond
    experiment = config.override(config.loads(SMALL, "SMALL"), LESS | {"model.name": str(base)})
    monkeypatch.setenv(cpu_kernel.SWITCH, "off")  # whose last digits are others
    near, far = tmp_path / "near", tmp_path / "far"
    pipeline.run(experiment, near, quiet=True, stages=["data", "train"])
    shutil.copytree(near, far)
    pipeline.run(experiment, near, "resume", quiet=True)
    seen = set()

    def asked(model, *rest, **options):
        seen.add(next(model.parameters()).device)
        return recall(model, *rest, **options)

    with far_away():
        monkeypatch.setattr(loading, "device", lambda name=None: FAR)
        monkeypatch.setattr(recall_stage, "recall", asked)
        pipeline.run(experiment, far, "resume", quiet=True)
    assert seen == {FAR}
    assert numbers(near) == numbers(far)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.device().type == loading.device("cpu").type == "cpu"
    with pytest.raises(UserError, match="finds no GPU here"):
        loading.device("cuda")

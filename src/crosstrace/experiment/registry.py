"""The stages of a run, in their order."""

from __future__ import annotations

from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.analyze import ANALYZE
from crosstrace.experiment.stages.intervene import INTERVENE
from crosstrace.experiment.stages.mechanism import MECHANISM
from crosstrace.experiment.stages.recall import EVAL
from crosstrace.experiment.stages.retain import RETAIN
from crosstrace.experiment.stages.trace import TRACE
from crosstrace.experiment.stages.train import TRAIN

OF_MODELS: dict[str, Stage] = {
    stage.name: stage for stage in (TRAIN, EVAL, TRACE, ANALYZE, INTERVENE, MECHANISM, RETAIN)
}
STAGES = ("data", *OF_MODELS, "report")  # the first and the last are of the whole run
OF_STEPS = {"data": "data", "known": "data", "report": "report"} | {
    step: stage.name for stage in OF_MODELS.values() for step in stage.steps
}  # the first word of a step's name -> its stage

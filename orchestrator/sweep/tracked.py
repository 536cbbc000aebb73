"""A sweep in MLflow: one parent run, and a nested run for each trial.

Only the driver writes, one run after the other, so workers need not reach the tracking store, and a SQLite file sees
one writer. A nested run is made when its trial is over: none is left running by a driver that dies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.mlflow_store import open_client, store_errors
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.records import Trial
from orchestrator.sweep.space import shown
from orchestrator.tracking import open_tracker

_NOTES = "nested_runs"
_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class TrackedTrials:
    """Of one sweep, in all its attempts."""

    def __init__(
        self, uri: str, *, experiment: str, parent_run_id: str, folder: RunFolder, tags: Mapping[str, str]
    ) -> None:
        self._uri, self._experiment, self._parent, self._folder = uri, experiment, parent_run_id, folder
        self._tags = tags

    def keep(self, trial: Trial) -> None:
        """Write one down, once; of an earlier attempt, put it under this attempt's parent."""
        known: dict[str, str] = self._folder.recall(_NOTES, {})
        if trial.id in known:
            with store_errors(self._uri):
                open_client(self._uri).set_tag(known[trial.id], "mlflow.parentRunId", self._parent)
            return
        tracker = open_tracker(
            self._uri,
            experiment=self._experiment,
            run_name=trial.point.words,
            parent_run_id=self._parent,
            params=_params(trial),
            tags={**self._tags, "trial": trial.id, "reused": ",".join(trial.reused), "problem": trial.problem},
        )
        for epoch, utility in enumerate(trial.curve, start=1):
            tracker.log_metrics(epoch, {"validation_utility": utility})
        tracker.log_metrics(0, _metrics(trial))
        tracker.log_json(trial.to_json(), "trial.json")
        tracker.finish(_STATUS[trial.status])
        if trial.status != "failed":  # it is tried again by the next attempt, as a run of its own
            self._folder.remember(**{_NOTES: {**known, trial.id: tracker.run_id}})


def _params(trial: Trial) -> dict[str, Any]:
    return {name: shown(value) for name, value in trial.point.to_json().items()}


def _metrics(trial: Trial) -> dict[str, float]:
    values = {name: value for name, value in trial.values.items() if math.isfinite(value)}
    values |= {f"{task}/test_{name}": value for task, m in trial.test.items() for name, value in m.items()}
    values |= {f"excess/{leak['feature']}-{leak['target']}": leak["excess"] for leak in trial.leaks if leak["excess"]}
    return values | {f"seconds/{part}": seconds for part, seconds in trial.seconds.items()}

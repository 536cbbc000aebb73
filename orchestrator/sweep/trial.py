"""One trial: modules and heads on a shared encoder, attacked, and described by the numbers that trials are compared by.

Runs in whatever process a sweep starts for it, on whatever node: what it needs comes as arguments or from the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.assembly import SessionPlan, TrainingData, cache_key
from orchestrator.consumer import rebuild_head
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.ceiling import measure_ceilings
from orchestrator.evaluation.collect import features_through, released_features
from orchestrator.evaluation.leakage import TaskFeatures, evaluate_leakage
from orchestrator.evaluation.report import LeakageReport
from orchestrator.feature_cache import FeatureCache
from orchestrator.memory import keep_freed_memory
from orchestrator.models.modules import rebuild_module
from orchestrator.network import NetworkConfig, freeze
from orchestrator.privacy.bounded.keyed_noise import NoiseKey
from orchestrator.release import NoisePlan
from orchestrator.runs.observer import SilentObserver
from orchestrator.runs.phase_two import SessionResult, run_session
from orchestrator.session import EpochReport
from orchestrator.settings.train import TrainSettings
from orchestrator.shaping import Secret
from orchestrator.sweep.recipe import Encoder, Need, Recipe, encoder_file
from orchestrator.sweep.records import Trial, trial_file, weights_file
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.space import Point
from orchestrator.sweep.store import Store
from tasks.transforms import to_tensor

SCRATCH: Final = "METAMORPHOSIS_SCRATCH"
"""Environment variable: where a worker keeps what may be lost, when the sweep's storage is a URL."""
_WIRE_BYTES: Final = 2
"""Of a coordinate: features are sent in float16."""
_TIMED: Final = 30

Tell = Callable[[int, float], None]
"""Called after every epoch with its number, from 1, and the utility on the validation subset."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all trials of a sweep have in common. Plain data, but for the images: it travels to workers once."""

    settings: SweepSettings
    store: Store
    attacked: bool
    """Whether leakage is measured."""
    keeps_weights: bool
    secrets: Mapping[str, Secret]
    """What bounded features are not to tell."""


def run_trial(study: Study, data: TrainingData, point: Point, *, number: str, tell: Tell | None = None) -> Trial:
    """Train, attack, and write down what was found. The record is the last thing that is written."""
    return _TrialRun(study, data, point, number, tell or (lambda epoch, utility: None)).run()


class _TrialRun:
    def __init__(self, study: Study, data: TrainingData, point: Point, number: str, tell: Tell) -> None:
        self.study, self.data, self.point, self.number, self.tell = study, data, point, number, tell
        self.settings: TrainSettings = study.settings.training_of(point)
        self.seconds: dict[str, float] = {}
        self.curve: list[float] = []

    def run(self) -> Trial:
        keep_freed_memory()
        torch.set_num_threads(self.study.settings.runtime.threads)
        started = time.perf_counter()
        recipe = Recipe.of(self.study.settings, Need.of(self.point), self.data)
        encoder = Encoder.from_state(self.study.store.read_state(encoder_file(recipe.key), kind=Encoder.KIND))
        network = self.settings.task_privacy.network(self.settings.network)
        net = freeze(network.build_encoder(seed=0))
        net.load_state_dict(dict(encoder.weights))
        with self._timed("features"):
            u, found = self._universal(net)
        with _noise(network, run=self.number) as noise:
            plan = self._plan(network, encoder, noise)
            with self._timed("training"):
                session = run_session(plan, self.study.settings.runtime.in_a_trial, _EpochTeller(self))
            features = self._features(session, network, u, noise)
        reused = ["encoder", *(["features"] if found else [])]
        ceilings = self._ceilings(recipe, u, reused)
        with self._timed("attacks"):
            report = self._attack(features) if self.study.attacked else None
        trial = self._record(session, network, encoder, report, net, reused, ceilings, started)
        if self.study.keeps_weights:
            self.study.store.write_state(weights_file(trial.id), _weights(session), kind=KIND_OF_WEIGHTS)
        self.study.store.write_json(trial_file(trial.id), trial.to_json())
        return trial

    def _universal(self, net: nn.Module) -> tuple[NDArray[np.float16], bool]:
        """u of every image, and whether this node had it already."""
        cache = FeatureCache(self._cache_root)
        key = cache_key(net, fingerprint=self.data.fingerprint, image_size=self.data.image_size)
        u = cache.encoder_features(
            net, self.data.images, key=key, normalisation=self.data.normalisation, mirrored=False
        )
        return u, cache.misses == 0

    @property
    def _cache_root(self) -> Path:
        return scratch(self.study.settings) / "features"

    def _plan(self, network: NetworkConfig, encoder: Encoder, noise: NoisePlan | None) -> SessionPlan:
        """As train.py makes it, but that nothing is published."""
        private = self.settings.private
        assert private is not None
        fixed = {} if encoder.private_module is None else {private: encoder.private_module}
        tasks = [task for task in self.data.specs if task not in fixed]
        return SessionPlan(
            data=dataclasses.replace(
                self.data,
                labels={task: self.data.labels[task] for task in tasks},
                specs={task: self.data.specs[task] for task in tasks},
            ),
            network=network,
            config=self.settings.training,
            dissimilarity=self.settings.task_privacy.dissimilarity,
            seed=self.point.seed,
            encoder=encoder.weights,
            fixed_modules=fixed,
            cache_root=self._cache_root,
            device=self.settings.runtime.device,
            threads=self.settings.runtime.threads,
            noise=noise,
            shaping=self.settings.task_privacy.shaping(self.study.secrets),
        )

    def _features(
        self, session: SessionResult, network: NetworkConfig, u: NDArray[np.float16], noise: NoisePlan | None
    ) -> dict[str, TaskFeatures]:
        """Of every task that is sold, as its tenant would get them."""
        found = {}
        config = network.module_config(self.data.image_size)
        for task in self.settings.tasks:
            if task in session.quarantined:
                continue
            module = rebuild_module(config, session.module_weights(task))
            head = session.heads[task]
            given = TaskFeatures(
                spec=self.data.specs[task],
                features=features_through(freeze(module), u, self.data.rows),
                head=rebuild_head(dict(head.config), {k: torch.as_tensor(v) for k, v in head.state.items()}),
                channel=config.channel,
            )
            if noise is not None:
                given = released_features(given, NoiseKey.load(noise.key), version=noise.run, images=self.data)
            found[task] = given
        return found

    def _attack(self, features: Mapping[str, TaskFeatures]) -> LeakageReport | None:
        """The quick suite, scored on the validation rows: choices are made by its outcome."""
        if not features:
            return None
        scored = {
            task: dataclasses.replace(given, features=_scored(given.features)) for task, given in features.items()
        }
        labels = {task: _scored(by_subset) for task, by_subset in self.data.labels.items()}
        return evaluate_leakage(scored, labels, self.data.specs, budget=attackers(), seed=self.point.seed)

    def _ceilings(self, recipe: Recipe, u: NDArray[np.float16], reused: list[str]) -> dict[str, float]:
        """What attackers read of the universal feature; measured by the first trial of an encoder, read by the others.

        Two that begin at once may both measure it. They find the same.
        """
        if not self.study.settings.ceilings:
            return {}
        name = f"ceilings/{recipe.key}.json"
        known = self.study.store.read_json(name)
        if known is not None:
            reused.append("ceilings")
            return known
        rows = self.data.rows
        universal = _scored({subset: u[rows[subset]].astype(np.float32) for subset in ("attacker", "validation")})
        with self._timed("ceilings"):
            measured = measure_ceilings(
                universal,
                {task: _scored(by_subset) for task, by_subset in self.data.labels.items()},
                self.data.specs,
                budget=attackers(),
                seed=self.point.seed,
                image_accuracy={},
            )
        found = {ceiling.target: ceiling.accuracy for ceiling in measured if ceiling.accuracy is not None}
        self.study.store.write_json(name, found)
        return found

    def _record(
        self,
        session: SessionResult,
        network: NetworkConfig,
        encoder: Encoder,
        report: LeakageReport | None,
        net: nn.Module,
        reused: list[str],
        ceilings: Mapping[str, float],
        started: float,
    ) -> Trial:
        size, sold = self.data.image_size, [t for t in self.settings.tasks if t not in session.quarantined]
        worst = None if report is None else report.worst
        epsilon = encoder.guarantee.epsilon
        steps = math.ceil(len(self.data.rows["train"]) / self.settings.training.batch_size) * session.trained_epochs
        values = {
            "utility": self._utility({task: session.validation[task].metrics for task in sold}),
            "epsilon": math.inf if epsilon is None else epsilon,
            "bytes": float(_WIRE_BYTES * math.prod(network.task_shape(size))),
            "head_mb": max((_megabytes(session.heads[task].state) for task in sold), default=math.nan),
            "step_time": self.seconds["training"] / max(1, steps),
            "latency": _latency(net, network, self.data),
        }
        if self.study.attacked:
            excess = None if worst is None else worst.excess
            values["leakage"] = math.nan if excess is None else excess
        self.seconds["all"] = time.perf_counter() - started
        return Trial(
            id=self.number,
            point=self.point,
            status="done" if len(sold) == len(self.settings.tasks) else "failed",
            problem="; ".join(f"{task} is in quarantine: {why}" for task, why in session.quarantined.items()),
            values=values,
            test={task: dict(session.test[task].metrics) for task in sold},
            validation={task: dict(session.validation[task].metrics) for task in sold},
            leaks=[] if report is None else [_leak(row) for row in report.rows],
            ceilings=dict(ceilings),
            curve=list(self.curve),
            reused=reused,
            seconds=dict(self.seconds),
            node=platform.node(),
        )

    def _utility(self, metrics: Mapping[str, Mapping[str, float]]) -> float:
        """Mean over the tasks that are sold; NaN where one of them was stopped."""
        if set(metrics) < set(self.settings.tasks):
            return math.nan
        return float(np.mean([metrics[task][self.data.specs[task].metrics[0]] for task in self.settings.tasks]))

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - started


KIND_OF_WEIGHTS: Final = "sweep trial"


class _EpochTeller(SilentObserver):
    """Tells whoever watches the trial how each epoch went."""

    def __init__(self, run: _TrialRun) -> None:
        self._run = run

    def on_epoch(self, report: EpochReport) -> None:
        """The utility so far."""
        run = self._run
        utility = run._utility({t: e.metrics for t, e in report.validation.items() if t in run.settings.tasks})
        run.curve.append(utility)
        run.tell(report.epoch, utility)


def attackers() -> AttackBudget:
    """Who looks for what a feature's tenant did not buy: enough to compare trials, and to claim nothing."""
    return AttackBudget.preset("quick")


def scratch(settings: SweepSettings) -> Path:
    """What this node need not compute twice: in the storage folder, or where that is a URL on the node's own disk."""
    if not settings.runtime.is_remote:
        return settings.runtime.local.storage_path
    given = os.environ.get(SCRATCH)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"metamorphosis-{os.getuid()}"


@contextlib.contextmanager
def _noise(network: NetworkConfig, *, run: str) -> Iterator[NoisePlan | None]:
    """The noise of a trial's bounded features, under a key that is gone with it: nothing of a trial is released."""
    if network.module_config(_ANY_SIZE).channel is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "trial.key"
        NoiseKey.generate().save(key)
        yield NoisePlan(key=key, run=run)


_ANY_SIZE: Final = 64


def _scored(by_subset: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The attackers' own subset, and the validation subset in the place of the test subset."""
    return {"attacker": by_subset["attacker"], "test": by_subset["validation"]}


def _leak(row: Any) -> dict[str, Any]:
    best = row.best
    return {
        "feature": row.feature,
        "target": row.target,
        "leak": row.leak,
        "by": None if best is None else best.attack,
        "chance": row.chance,
        "floor": row.floor.accuracy,
        "excess": row.excess,
        "crashed": [summary.attack for summary in row.attacks if summary.crashed],
    }


def _megabytes(state: Mapping[str, Any]) -> float:
    return float(sum(np.asarray(value).nbytes for value in state.values())) / 1e6


def _latency(net: nn.Module, network: NetworkConfig, data: TrainingData) -> float:
    """Seconds of one image through encoder and module, the median of some; on this process's threads."""
    module = freeze(next(iter(network.build_modules(["timed"], data.image_size, seed=0).values())))
    x = to_tensor(data.images[:1], data.normalisation)
    times: list[float] = []
    with torch.no_grad():
        for _ in range(_TIMED):
            started = time.perf_counter()
            module(net(x))
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def _weights(session: SessionResult) -> dict[str, Any]:
    """Of all tasks, so that the trial can be published."""
    return {
        task: {
            "module": session.module_weights(task),
            "head": {name: np.asarray(value) for name, value in head.state.items()},
            "head_config": json.dumps(dict(head.config)),
            "epochs": session.trained_epochs,
        }
        for task, head in session.heads.items()
    }

"""A sweep on Ray Tune: the shell around `dispatch.Dispatcher`, as `train_job` is around an encoder's training.

Tune runs each trial as an actor where there is room, and stops those that ASHA gives up. What is tried next, what is
reused and what is over is the dispatcher's, whose memory is the store: Tune's own experiment folder is never read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from orchestrator.assembly import TrainingData
from orchestrator.cluster import cluster_cpus, use_gpu
from orchestrator.encoder_training import EncoderResult
from orchestrator.errors import ConfigError, MetaMorphosisError
from orchestrator.states import plain_state, tensor_state
from orchestrator.sweep.dispatch import Dispatcher, Signal
from orchestrator.sweep.records import failure_file, trial_id
from orchestrator.sweep.settings import SweepRuntime
from orchestrator.sweep.space import Point
from orchestrator.sweep.store import Store
from orchestrator.sweep.trial import Study, run_trial
from orchestrator.train_job import EncoderJob, train_encoder_here

_UTILITY: Final = "utility"
_EPOCH: Final = "epoch"
_RETRIES: Final = 2
"""Of a training whose process dies. It takes the same steps again, which were charged already."""
_ENVIRONMENT: Final = {
    # Ctrl-C is the command's; Tune would go on to the end of the step.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Neither CSV nor TensorBoard: results are the sweep's own, and go to MLflow.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The newer output prints even when it is told to be quiet.
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PAUSE_S: Final = 0.05


def trial_resources(runtime: SweepRuntime) -> dict[str, float]:
    """What each trial, and each training of an encoder, reserves."""
    gpus = runtime.trial_gpus
    if gpus is None:
        gpus = 1.0 if use_gpu(runtime.device) else 0.0
    return {"CPU": runtime.trial_cpus, **({"GPU": gpus} if gpus else {})}


def check_cluster(runtime: SweepRuntime) -> None:
    """Raise `ConfigError` where the sweep cannot run on this cluster: Ray would wait for ever, or lose results."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    wanted = trial_resources(runtime)
    if not any(all(node["Resources"].get(k, 0.0) >= v for k, v in wanted.items()) for node in nodes):
        largest = max((node["Resources"].get("CPU", 0.0) for node in nodes), default=0.0)
        raise ConfigError(
            f"no node has room for a trial ({', '.join(f'{v:g} {k}' for k, v in wanted.items())}; the largest has "
            f"{largest:g} CPUs): lower --trial-cpus or --trial-gpus"
        )
    if len(nodes) > 1 and not runtime.is_remote:
        raise ConfigError(
            f"the Ray cluster has {len(nodes)} nodes, and --storage {runtime.shared} is a path, which each of them "
            "takes for its own disk: give a URL that all of them reach, as s3://bucket/folder or gs://bucket/folder; "
            "or file:///folder, if that is a file system that is mounted on all of them"
        )


def room_for(runtime: SweepRuntime) -> int:
    """How many trials the cluster's CPUs take at a time; at least 1."""
    return max(1, int(cluster_cpus() // runtime.trial_cpus))


class RayTrainer:
    """Encoders as Ray remote functions, each where there is room."""

    def __init__(self, data: TrainingData, runtime: SweepRuntime) -> None:
        self._data, self._resources = ray.put(data), trial_resources(runtime)
        self.width = room_for(runtime)

    def start(self, job: EncoderJob) -> Future[EncoderResult]:
        """Hand it to the cluster. The images are there already."""
        labels, specs = job.data.labels, job.data.specs
        small = dataclasses.replace(job, data=dataclasses.replace(job.data, images=job.data.images[:0], rows={}))
        run: Any = ray.remote(_train).options(
            num_cpus=self._resources["CPU"], num_gpus=self._resources.get("GPU", 0), max_retries=_RETRIES
        )
        answer: Future[Any] = run.remote(self._data, small, labels, specs).future()
        return _translated(answer)


def _translated(answer: Future[Any]) -> Future[EncoderResult]:
    """With tensors in place of arrays, and our own errors in place of Ray's around them."""
    future: Future[EncoderResult] = Future()

    def done(_: Future[Any]) -> None:
        error = answer.exception()
        if error is None:
            found = answer.result()
            if isinstance(found, MetaMorphosisError):
                future.set_exception(found)
            else:
                future.set_result(EncoderResult(**tensor_state(found)))
        else:
            future.set_exception(error)

    answer.add_done_callback(done)
    return future


def _train(data: TrainingData, job: EncoderJob, labels: Any, specs: Any) -> Any:
    whole = dataclasses.replace(job, data=dataclasses.replace(data, labels=labels, specs=specs))
    try:
        result = train_encoder_here(whole)
    except MetaMorphosisError as error:
        return error  # no accident: it would happen again
    return plain_state({f.name: getattr(result, f.name) for f in dataclasses.fields(result)})


class DispatchSearcher(Searcher):
    """Tune's search algorithm: asks the dispatcher what to try, and tells it what is over."""

    def __init__(self, dispatcher: Dispatcher, *, limit: int | None, asha_epochs: int | None) -> None:
        super().__init__(metric=_UTILITY, mode="max")
        self._dispatcher, self._limit, self._asha_epochs = dispatcher, limit, asha_epochs
        self._points: dict[str, Point] = {}
        self._curves: dict[str, list[float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it was given into its folder, to be restored from there. Nothing ever is."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """The space is the dispatcher's."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """A trial whose encoder is there; None: ask again."""
        if self._limit is not None and len(self._points) >= self._limit:
            return None
        point = self._dispatcher.next()
        if point is Signal.END:
            return Searcher.FINISHED
        if point is Signal.WAIT or not isinstance(point, Point):
            time.sleep(_PAUSE_S)
            return None
        self._points[trial_id] = point
        return {"point": point.to_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch ended."""
        self._curves.setdefault(trial_id, []).append(float(result[_UTILITY]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """It is over, one way or the other."""
        point, curve = self._points.pop(trial_id), self._curves.pop(trial_id, [])
        if result is not None and _UTILITY in result and len(curve) < int(result.get(_EPOCH, 0)):
            curve.append(float(result[_UTILITY]))
        early = self._asha_epochs is not None and not error and len(curve) < self._asha_epochs
        self._dispatcher.done(point, curve=curve, stopped=early)

    def save(self, checkpoint_path: str) -> None:
        """The store is its memory."""
        Path(checkpoint_path).write_text("the sweep's store is the memory of this search\n")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to read."""


def run_on_tune(study: Study, data: TrainingData, dispatcher: Dispatcher, *, name: str) -> None:
    """Run trials until the dispatcher has no more."""
    settings = study.settings
    epochs = settings.training.epochs
    searcher = DispatchSearcher(
        dispatcher, limit=settings.runtime.concurrency, asha_epochs=epochs if settings.asha else None
    )
    scheduler = None
    if settings.asha:
        scheduler = ASHAScheduler(
            time_attr=_EPOCH, metric=_UTILITY, mode="max", max_t=epochs + 1, grace_period=max(1, epochs // 4)
        )
    trainable = tune.with_resources(
        tune.with_parameters(_tune_trial, study=study, data=data), trial_resources(settings.runtime)
    )
    with _environment(), _experiment(study.store) as (path, filesystem):
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                # A trial's process goes on with the next one, and keeps its CPU while it waits for it: with a single
                # CPU the encoder that all wait for would never be trained.
                reuse_actors=room_for(settings.runtime) > 1,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()


@contextlib.contextmanager
def _experiment(store: Store) -> Iterator[tuple[str, Any]]:
    """Where Tune keeps its own notes: beside the sweep's, since its workers write there too."""
    import fsspec
    import pyarrow.fs

    folder = store.folder
    if folder is not None:
        yield str(folder / "tune"), None
        return
    filesystem, path = fsspec.core.url_to_fs(store.within("tune").root)
    yield path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Tune's own switches, for as long as it runs; and no notices of its own."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    loggers = {name: logging.getLogger(name).level for name in ("ray.tune", "ray.train", "ray.air")}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _tune_trial(config: dict[str, Any], *, study: Study, data: TrainingData) -> None:
    """What Tune's actor runs."""
    point = Point.from_json(config["point"])
    number = trial_id(point)

    def tell(epoch: int, utility: float) -> None:
        tune.report({_EPOCH: epoch, _UTILITY: utility})

    try:
        run_trial(study, data, point, number=number, tell=tell)
    except Exception as error:
        # Tune would try again, and keep a pickled trace; what went wrong is said, and is an answer.
        study.store.write_json(failure_file(number), {"problem": f"{type(error).__name__}: {error}"})

"""Phase 1 as a Ray Train job: the shell around `EncoderTraining`.

The worker reports once an epoch, with a checkpoint; if it dies, Ray Train starts another, which goes on from the last
one. Noise and batches are functions of the plan's secret seed and the step, so steps that are done again are the same
steps, not further ones.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.assembly import TrainingData
from orchestrator.encoder_training import EncoderEpoch, EncoderResult, EncoderTraining, EncoderTrainingConfig
from orchestrator.errors import CheckpointError, MetaMorphosisError, PartyLostError
from orchestrator.inputs import ImageInputs
from orchestrator.memory import keep_freed_memory
from orchestrator.network import NetworkConfig, pick_device
from orchestrator.privacy.plan import DpPlan
from orchestrator.sampling import derive_seed

_KIND = "encoder-training"
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class EncoderJob:
    """All that one phase-1 training needs."""

    data: TrainingData
    network: NetworkConfig
    config: EncoderTrainingConfig
    plan: DpPlan | None
    surrogate_head: str
    seed: int
    device: str = "auto"
    threads: int | None = None

    def build(self) -> EncoderTraining:
        """The training, ready for step 0, with this process set to the job's threads."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = pick_device(self.device)
        return EncoderTraining(
            config=self.config,
            plan=self.plan,
            surrogate_head=self.surrogate_head,
            network=self.network,
            image_size=self.data.image_size,
            specs=self.data.specs,
            inputs=ImageInputs(
                self.data.images,
                self.data.rows,
                normalisation=self.data.normalisation,
                flip=self.data.flip,
                seed=derive_seed(self.seed, "encoder-inputs"),
                device=device,
            ),
            labels=self.data.labels,
            seed=self.seed,
            device=device,
        )


Progress = Callable[[int, int, EncoderEpoch | None], None]
"""Called with (steps done, steps in all, the epoch that just ended or None)."""


def train_encoder_here(job: EncoderJob, *, progress: Progress | None = None) -> EncoderResult:
    """Phase 1 in this process."""
    training = job.build()
    for _ in range(job.config.epochs):
        epoch = training.run_epoch()
        if progress is not None:
            progress(training.step, training.total_steps, epoch)
    return training.result()


def train_encoder(job: EncoderJob, *, storage: Path, name: str, progress: Progress | None = None) -> EncoderResult:
    """Phase 1 as a Ray Train job on the cluster that this process is connected to. Blocks until it is done."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestrator.actors import progress_board
    from orchestrator.cluster import cluster_cpus, use_gpu

    board = progress_board()
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": ray.put(job), "board": board},
        scaling_config=ScalingConfig(
            num_workers=1, use_gpu=use_gpu(job.device), resources_per_worker={"CPU": min(1.0, cluster_cpus())}
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    result = _fit(trainer, board, progress)
    if result.checkpoint is None:
        raise CheckpointError("the encoder training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        return _load_result(Path(folder))


def _fit(trainer: Any, board: Any, progress: Progress | None) -> Any:
    """Run the trainer in a thread: in the main one Ray Train would take over Ctrl-C. Meanwhile progress is shown."""
    import ray

    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    thread = threading.Thread(target=run, name="encoder-training", daemon=True)
    thread.start()
    while True:
        finished = not thread.is_alive()
        for message in ray.get(board.take.remote()):
            if isinstance(message, MetaMorphosisError):
                outcome["error"] = message
            elif progress is not None:
                progress(*message)
        if finished:
            break
        time.sleep(_POLL_S)
    if "error" in outcome:
        raise _cause(outcome["error"])
    return outcome["result"]


def _cause(error: BaseException) -> BaseException:
    """Our own error inside Ray Train's, or a lost party."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error]:
        found: BaseException | None = failure
        while found is not None:
            if isinstance(found, MetaMorphosisError):
                return found
            found = getattr(found, "cause", None) or found.__cause__
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    return PartyLostError(f"the encoder training failed: {type(error).__name__}: {str(error).strip()[-2000:]}")


def _train_loop(config: dict[str, Any]) -> None:
    """What the Ray Train worker runs."""
    import ray

    try:
        _train(ray.get(config["job"]), config["board"])
    except MetaMorphosisError as error:
        # Ray Train would start the worker again, and fail again: the driver is told instead, and the job ends.
        ray.get(config["board"].post.remote(error))


def _train(job: EncoderJob, board: Any) -> None:
    from ray import train

    keep_freed_memory()
    training = job.build()
    resume = train.get_checkpoint()
    if resume is not None:
        with resume.as_directory() as folder:
            _load_training(training, Path(folder))
    while training.step < training.total_steps:
        epoch = training.run_epoch()
        board.post.remote((training.step, training.total_steps, epoch))
        with tempfile.TemporaryDirectory() as folder:
            _save_training(training, Path(folder))
            train.report(
                {"epoch": epoch.epoch, "epsilon": epoch.epsilon_spent},
                checkpoint=train.Checkpoint.from_directory(folder),
            )


def _save_training(training: EncoderTraining, folder: Path) -> None:
    from orchestrator.checkpoint import save_state

    save_state(folder / "training", training.state_dict(), kind=_KIND)
    if training.step < training.total_steps:
        return
    result = training.result()
    save_state(
        folder / "result",
        {f.name: getattr(result, f.name) for f in dataclasses.fields(result)},
        kind=_KIND,
    )


def _load_training(training: EncoderTraining, folder: Path) -> None:
    from orchestrator.checkpoint import load_state

    training.load_state_dict(load_state(folder / "training", kind=_KIND))


def _load_result(folder: Path) -> EncoderResult:
    from orchestrator.checkpoint import load_state

    return EncoderResult(**load_state(folder / "result", kind=_KIND))

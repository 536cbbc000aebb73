"""Phase 1 as a Ray Train job: the shell around `EncoderTraining`.

Every worker holds the whole network and takes its share of each batch; their clipped sums are added up, with one draw
of noise (`orchestrator.shard`). If one of them dies, Ray Train starts all of them again, and they go on from the newest
whole checkpoint, as a run does that is resumed after its driver died. Noise and batches are functions of the plan's
secret seed and the step, so steps that are done again are the same steps, not further ones.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from orchestrator.assembly import TrainingData, cached_inputs, comparable, fixed_network
from orchestrator.checkpoints import Checkpoints
from orchestrator.encoder_training import (
    EncoderEpoch,
    EncoderResult,
    EncoderTraining,
    EncoderTrainingConfig,
    PublicExamples,
)
from orchestrator.errors import MetaMorphosisError, PartyLostError
from orchestrator.inputs import ImageInputs
from orchestrator.memory import keep_freed_memory
from orchestrator.models.modules import ModuleConfig
from orchestrator.module_training import ModuleTraining
from orchestrator.network import NetworkConfig, freeze, pick_device
from orchestrator.privacy.dissimilarity import DissimilarityConfig
from orchestrator.privacy.plan import DpPlan
from orchestrator.sampling import derive_seed
from orchestrator.shard import WHOLE, Shard
from orchestrator.states import plain_state, tensor_state

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
    workers: int = 1
    """Ray Train workers that share each batch."""
    restarts: int = 3
    """How often workers that die are started again."""
    checkpoints: Checkpoints | None = None
    """Where it saves, and what it goes on from if something is there; None: not at all."""
    checkpoint_steps: int | None = None
    """Save after so many steps, and at the end of every epoch."""
    public: TrainingData | None = None
    """With public_head: what the head learns from."""
    head_weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """With frozen_head: the head; None for a random one."""
    name: str = "encoder"
    """What is trained, in words and in the names of files."""

    def build(self, shard: Shard = WHOLE) -> EncoderTraining:
        """The training, ready for its next step, with this process set to the job's threads."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = pick_device(self.device)
        training = self._training(
            device,
            config=self.config,
            plan=self.plan,
            surrogate_head=self.surrogate_head,
            network=self.network,
            image_size=self.data.image_size,
            specs=self.data.specs,
            labels=self.data.labels,
            seed=self.seed,
            device=device,
            shard=shard,
        )
        saved = self.checkpoints.newest() if self.checkpoints is not None else None
        if saved is not None:
            training.load_state_dict(saved[1])
        return training

    def _training(self, on: torch.device, **common: Any) -> EncoderTraining:
        return EncoderTraining(
            inputs=_images(self.data, on, seed=derive_seed(self.seed, "encoder-inputs")),
            public=None if self.public is None else self._public_examples(self.public, on),
            head_weights=self.head_weights,
            **common,
        )

    def _public_examples(self, public: TrainingData, on: torch.device) -> PublicExamples:
        inputs = _images(public, on, seed=derive_seed(self.seed, "public-inputs"))
        return PublicExamples(inputs=inputs, labels={task: public.labels[task]["train"] for task in self.data.specs})

    def steps(self, training: EncoderTraining, *, tell: Tell) -> None:
        """Train to the end, with checkpoints on the way."""
        while training.step < training.total_steps:
            training.train_step()
            epoch = training.ended_epoch()
            if training.shard.first:
                tell((training.step, training.total_steps, epoch))
                due = self.checkpoint_steps is not None and training.step % self.checkpoint_steps == 0
                if self.checkpoints is not None and (epoch is not None or due):
                    complaint = self.checkpoints.try_save(training.step, training.state_dict())
                    if complaint is not None:
                        tell(complaint)


@dataclass(frozen=True, kw_only=True)
class ModuleJob(EncoderJob):
    """All that one training of modules under DP needs; see `orchestrator.module_training`."""

    encoder: Mapping[str, Tensor] = field(repr=False)
    """Weights of the frozen encoder."""
    dissimilarity: DissimilarityConfig
    fixed_modules: Mapping[str, tuple[ModuleConfig, Mapping[str, Tensor]]] = field(repr=False)
    """Modules to be kept apart from."""
    cache_root: Path
    """Where the feature cache is."""

    def _training(self, on: torch.device, **common: Any) -> EncoderTraining:
        encoder = self.network.build_encoder(seed=self.seed)
        encoder.load_state_dict(dict(self.encoder))
        seed = derive_seed(self.seed, "modules")
        return ModuleTraining(
            inputs=cached_inputs(self.data, freeze(encoder).to(on), on, cache_root=self.cache_root, seed=seed),
            dissimilarity=self.dissimilarity,
            fixed=fixed_network(comparable(self.fixed_modules, self.network, self.data.image_size), None, on),
            feature_shape=self.network.task_shape(self.data.image_size),
            channel=self.network.module_config(self.data.image_size).channel,
            **common,
        )


def _images(data: TrainingData, on: torch.device, *, seed: int) -> ImageInputs:
    return ImageInputs(data.images, data.rows, normalisation=data.normalisation, flip=data.flip, seed=seed, device=on)


News: TypeAlias = "tuple[int, int, EncoderEpoch | None] | str"
"""(steps done, steps in all, the epoch that just ended or None), or something to tell in words."""
Tell: TypeAlias = Callable[[News], None]

Progress = Callable[[int, int, EncoderEpoch | None], None]
"""Called with (steps done, steps in all, the epoch that just ended or None)."""


def train_encoder_here(
    job: EncoderJob, *, progress: Progress | None = None, note: Callable[[str], None] | None = None
) -> EncoderResult:
    """Phase 1 in this process. ``note`` is told what there is to say in words."""
    training = job.build()
    job.steps(training, tell=lambda news: _pass_on(news, progress, note))
    return training.result()


def train_encoder(
    job: EncoderJob,
    *,
    storage: Path,
    name: str,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> EncoderResult:
    """Phase 1 as a Ray Train job on the cluster that this process is connected to. Blocks until it is done."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestrator.actors import progress_board
    from orchestrator.cluster import cluster_cpus, use_gpu

    board = progress_board()
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": ray.put(job), "board": board},
        scaling_config=ScalingConfig(
            num_workers=job.workers,
            use_gpu=use_gpu(job.device),
            resources_per_worker={"CPU": min(1.0, round(cluster_cpus() / job.workers, 2))},
        ),
        run_config=RunConfig(
            name=name, storage_path=str(storage), failure_config=FailureConfig(max_failures=job.restarts)
        ),
    )
    _fit(trainer, board, lambda news: _pass_on(news, progress, note))
    result = ray.get(board.result.remote())
    if result is None:
        raise PartyLostError(f"the training of the {job.name} ended without a result")
    return EncoderResult(**tensor_state(result))


def _pass_on(news: News, progress: Progress | None, note: Callable[[str], None] | None) -> None:
    if isinstance(news, str):
        if note is not None:
            note(news)
    elif progress is not None:
        progress(*news)


def _fit(trainer: Any, board: Any, tell: Tell) -> None:
    """Run the trainer in a thread: in the main one Ray Train would take over Ctrl-C. Meanwhile progress is shown."""
    import ray

    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            trainer.fit()
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
            else:
                tell(message)
        if finished:
            break
        time.sleep(_POLL_S)
    if "error" in outcome:
        raise _cause(outcome["error"])


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
    """What each Ray Train worker runs."""
    import ray
    from ray import train

    board = config["board"]
    if ray.get(board.failed.remote()):
        return  # Ray Train started the workers again after an error that is no accident: the driver knows of it
    context = train.get_context()
    shard = Shard(rank=context.get_world_rank(), size=context.get_world_size())
    try:
        _train(ray.get(config["job"]), board, shard)
    except MetaMorphosisError as error:
        # Ray Train would start the workers again, and they would fail again: the driver is told, and the job ends.
        ray.get(board.post.remote(error))
        if shard.size > 1:
            raise  # the others wait for this one


def _train(job: EncoderJob, board: Any, shard: Shard) -> None:
    import ray

    keep_freed_memory()
    training = job.build(shard)
    if training.step and shard.first:
        board.post.remote(f"the training of the {job.name} goes on after step {training.step}")
    job.steps(training, tell=board.post.remote)
    if shard.first:
        result = training.result()
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        ray.get(board.finish.remote(plain_state(fields)))

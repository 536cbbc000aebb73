"""A whole evaluation with made-up numbers, in the true types."""

import dataclasses

from orchestrator.catalog_records import EncoderRecord, TaskRecord
from orchestrator.evaluation.attacks.base import AttackResult
from orchestrator.evaluation.attacks.hijack import HijackConfig, HijackReport, HijackRun, Reconstruction
from orchestrator.evaluation.budget import AttackBudget
from orchestrator.evaluation.evaluation import Evaluation
from orchestrator.evaluation.floors import Floor
from orchestrator.evaluation.membership import MembershipResult
from orchestrator.evaluation.reconstruction.budget import ReconstructionBudget
from orchestrator.evaluation.reconstruction.metrics import Scores
from orchestrator.evaluation.reconstruction.report import (
    ReconstructionReport,
    ReconstructionResult,
    ReconstructionRow,
    ReconstructionSummary,
)
from orchestrator.evaluation.report import CLAIM_ATTACKS, AttackSummary, LeakageReport, LeakageRow
from orchestrator.evaluation.subject import Subject
from orchestrator.privacy.guarantee import Guarantee
from tasks.spec import TaskSpec


def guarantee(epsilon=8.0, mode="surrogate_then_freeze", task_privacy="ssim dissimilarity, square, omega 0.001"):
    if epsilon is None:
        return Guarantee(mode="none", n_train=300, excludes=("encoder",), task_privacy=task_privacy)
    return Guarantee(
        mode=mode,
        n_train=300,
        covers=("encoder",),
        excludes=("heads",),
        epsilon=epsilon,
        delta=1e-3,
        accountant="prv",
        noise_multiplier=0.8,
        sample_rate=0.1,
        steps=100,
        mechanisms=((0.8, 0.1, 100),),
        max_grad_norm=1.2,
        task_privacy=task_privacy,
    )


def encoder_record(*, epsilon=8.0, mode="surrogate_then_freeze", split_index=5, fingerprint="ab" * 32):
    return EncoderRecord(
        version="3",
        backbone="resnet18",
        split_index=split_index,
        image_size=32,
        feature_shape=(64, 8, 8),
        data_fingerprint=fingerprint,
        normalisation={"mean": [0.5] * 3, "std": [0.5] * 3},
        flip=False,
        data={"private": "who"},
        guarantee=guarantee(epsilon, mode).to_json(),
        weights_sha256="cd" * 32,
        run_id="run",
        created="2026-01-01T00:00:00+00:00",
    )


def task_record(task, *, private=False, omega=0.001, promise=None):
    promise = promise or guarantee()
    return TaskRecord(
        spec=TaskSpec(name=task, target=task, classes=("no", "yes")),
        private=private,
        encoder_version="3",
        version="3.1",
        module_config={"kind": "cross_sec"},
        head_config={},
        module_sha256="ef" * 32,
        head_sha256="01" * 32,
        metrics={"accuracy": 0.9},
        guarantee=promise.to_json(),
        guarantee_text=promise.statement(),
        run_id="run",
        created="2026-01-01T00:00:00+00:00",
        dissimilarity=None if omega is None else {"omega": omega, "similarity": "ssim", "similarity_mode": "square"},
    )


def summary(attack, accuracy, *, seeds=3):
    crashed = AttackResult(attack=attack, seed=0, crashed="MemoryError: no room")
    right = round(1000 * (accuracy or 0))
    whole = [
        AttackResult(attack=attack, seed=s, correct=right, total=1000, accuracy=right / 1000) for s in range(seeds)
    ]
    return AttackSummary(attack=attack, results=tuple(whole) if accuracy is not None else (crashed,))


def row(feature, target, accuracy, *, swap=0.5, crashed=()):
    attacks = tuple(summary(attack, None if attack in crashed else accuracy) for attack in CLAIM_ATTACKS)
    return LeakageRow(
        feature=feature,
        target=target,
        n_test=1000,
        swap=swap,
        swap_perm=swap,
        attacks=attacks,
        chance=0.5,
        chance_balanced=0.5,
        target_bits=1.0,
        floor=Floor(0.5, 0.5),
    )


def leakage(*, own=0.9, leak=0.97, crashed=()):
    return LeakageReport(
        rows=(
            row("pose", "eyes", leak, crashed=crashed),
            row("pose", "who", 0.48),
            row("eyes", "pose", 0.7),
            row("eyes", "who", 0.6),
        ),
        own={"pose": own, "eyes": own, "who": 0.8},
        private=frozenset({"who"}),
        targets=("pose", "eyes", "who"),
        budget=AttackBudget.preset("full").only(CLAIM_ATTACKS),
        seed=0,
    )


def scores(psnr, ssim):
    return Scores(n=100, psnr=psnr, ssim=ssim, ssim_low=ssim, ssim_high=ssim, ms_ssim=ssim, l1=0.1)


def reconstruction(*, ssim=0.93, examples=None, originals=None):
    result = ReconstructionResult(
        attack="decoder", seed=0, scores=scores(27.0, ssim), mean_image=scores(13.0, 0.3), examples=examples
    )
    found = ReconstructionRow(
        feature="encoder",
        mean_image=scores(13.0, 0.3),
        nearest_image=scores(18.0, 0.7),
        attacks=(ReconstructionSummary(attack="decoder", results=(result,)),),
        targets=(),
    )
    budget = ReconstructionBudget.preset("quick")
    return ReconstructionReport(rows=(found,), budget=budget, seed=0, originals=originals)


def hijack():
    def closeness(psnr):
        return Reconstruction(n=10, mse=0.01, psnr=psnr, ssim=0.4)

    runs = (
        HijackRun(guard=False, steps=400, stopped=None, private=closeness(19.3), own=closeness(24.0), others={}),
        HijackRun(guard=True, steps=4, stopped="no labels", private=closeness(9.1), own=closeness(24.0), others={}),
    )
    return HijackReport(
        task="pose",
        encoder="live",
        image_size=32,
        feature_shape=(64, 8, 8),
        steps=400,
        attack=HijackConfig(),
        mean_image=closeness(13.6),
        decoder=closeness(28.0),
        runs=runs,
    )


def member(auc=0.51, low=0.47, tpr=0.012, tpr_low=0.004):
    return MembershipResult(
        attack="loss",
        seed=0,
        members=300,
        others=300,
        auc=auc,
        auc_low=low,
        auc_high=0.6,
        tpr=tpr,
        tpr_low=tpr_low,
        tpr_high=0.05,
    )


def subject(**encoder):
    omega = encoder.pop("omega", 0.001)
    tasks = {"pose": task_record("pose", omega=omega), "eyes": task_record("eyes", omega=omega)}
    return Subject(
        catalog="faces",
        encoder=encoder_record(**encoder),
        tasks={**tasks, "who": task_record("who", private=True, omega=omega)},
        data_name="faces",
        sizes={"train": 300, "validation": 60, "attacker": 120, "test": 120},
        account=None,
        command="python pipelines/evaluate.py --catalog faces",
        created="2026-01-02T00:00:00+00:00",
        versions={"python": "3.11.0", "torch": "2.11.0"},
    )


def evaluation(**changes):
    whole = Evaluation(
        subject=subject(),
        budget="full",
        leakage=leakage(),
        reconstruction=reconstruction(),
        membership={"pose": (member(),), "eyes": (member(),)},
        hijack=(hijack(),),
        seconds={"leakage": 61.0},
    )
    return dataclasses.replace(whole, **changes)

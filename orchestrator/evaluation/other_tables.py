"""Reconstruction, membership and hijacking as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orchestrator.evaluation.attacks.hijack import HijackReport, Reconstruction
from orchestrator.evaluation.membership import FALSE_POSITIVE_RATE, MembershipResult
from orchestrator.evaluation.reconstruction.metrics import Scores
from orchestrator.evaluation.reconstruction.report import ReconstructionReport, ReconstructionRow, ReconstructionSummary
from orchestrator.report.sheet import CRASHED, NOT_MEASURED, Mark, Sheet, percent

_WORDS = frozenset({"feature", "from", "task", "attack", "guard", "encoder", "stopped"})
_MEASURES = (("psnr", ".1f"), ("ssim", ".3f"), ("ms_ssim", ".3f"), ("l1", ".3f"), ("perceptual_proxy", ".3f"))


def reconstruction_sheet(report: ReconstructionReport) -> Sheet:
    """Every attacker on every feature, below what needs no feature; R3's answers in a column for each target."""
    targets = list(dict.fromkeys(target.target for row in report.rows for target in row.targets))
    rows = [cells for row in report.rows for cells in _reconstruction_rows(row, targets)]
    proxy = "perceptual proxy"
    names = ["feature", "from", "PSNR dB", "SSIM", "MS-SSIM", "L1", proxy, *targets]
    if not targets:  # without a network that was trained on images, there is nothing to take that distance in
        names.remove(proxy)
        rows = [cells[: len(names)] for cells in rows]
    seen = (
        f" {proxy}: a distance in a network that was trained in this run; not LPIPS. The last columns: how often "
        "networks that were trained on images recognise the attribute in what came back, "
        "in %, beside real test images and what needs no image."
        if targets
        else " Nobody looked at what the images show, so nothing is claimed."
    )
    alone = any(summary.from_answer is not None for row in report.rows for summary in row.attacks)
    taught = "of the answer: the same attack, taught from that answer in place of the feature. " if alone else ""
    return Sheet(
        title="Images got back from a feature",
        names=names,
        rows=rows,
        words=_WORDS,
        repeated=frozenset({"feature"}),
        note="Test images; PSNR and SSIM for pixels in [0, 1]. mean image: the same guess for every image. class "
        "mean: the mean image of the class that the task's own head names, so what is no better than it took nothing "
        f"from the feature but the answer. {taught}nearest image: the best that any look-up among the attacker's "
        "images can do. encoder: the universal feature, which no tenant receives." + seen,
    )


def membership_sheet(found: Mapping[str, Sequence[MembershipResult]]) -> Sheet:
    """One row a task and attack."""
    rows = [
        [
            task,
            result.attack,
            *(
                (CRASHED, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)
                if result.crashed is not None
                else (
                    f"{result.auc:.3f}",
                    f"{result.auc_low:.3f} to {result.auc_high:.3f}",
                    percent(result.tpr),
                    f"{percent(result.tpr_low)} to {percent(result.tpr_high)}",
                )
            ),
        ]
        for task, results in found.items()
        for result in results
    ]
    n = next((r.members for results in found.values() for r in results if r.crashed is None), 0)
    return Sheet(
        title="Who was in the training set",
        names=["task", "attack", "AUC", "AUC, 95 %", "TPR", "TPR, 95 %"],
        rows=rows,
        words=_WORDS,
        repeated=frozenset({"task"}),
        note=f"Encoder, module and head as one classifier, asked about {n} training and {n} test images. AUC .5 is "
        f"chance; TPR: members found, in %, with {100 * FALSE_POSITIVE_RATE:.0f} % of the others taken for members, "
        "which is what chance would find.",
    )


def hijack_sheet(reports: Sequence[HijackReport]) -> Sheet:
    """Each session with the malicious consumer, below what it could have without hijacking."""
    rows: list[list[str]] = []
    marks: list[Mark] = []
    for report in reports:
        for name, known in (("(mean image)", report.mean_image), ("(decoder, no hijacking)", report.decoder)):
            rows.append([report.encoder, name, *_closeness(known), NOT_MEASURED])
            marks.append("")
        for run in report.runs:
            stopped = f"at step {run.steps}" if run.stopped else "no"
            rows.append([report.encoder, "on" if run.guard else "off", *_closeness(run.private), stopped])
            marks.append("good" if run.stopped else "bad")
    steps = max((report.steps for report in reports), default=0)
    return Sheet(
        title="A tenant that sends false gradients",
        names=["encoder", "guard", "PSNR dB", "SSIM", "stopped"],
        rows=rows,
        marks=marks,
        words=_WORDS,
        repeated=frozenset({"encoder"}),
        note=f"Feature-space hijacking for {steps} steps: how close the tenant comes to the training images. frozen: "
        "only its own module follows its gradients; live: the encoder does too. (decoder, no hijacking): what it would "
        "read if it could have images of its own encoded.",
    )


def _closeness(found: Reconstruction) -> tuple[str, str]:
    return f"{found.psnr:.1f}", f"{found.ssim:.3f}"


def _reconstruction_rows(row: ReconstructionRow, targets: Sequence[str]) -> list[list[str]]:
    of = {target.target: target for target in row.targets}
    empty = [NOT_MEASURED] * len(_MEASURES)
    rows = []
    if row.targets:
        real = [percent(of[t].real) if t in of else NOT_MEASURED for t in targets]
        without = [percent(of[t].baseline) if t in of else NOT_MEASURED for t in targets]
        rows += [[row.feature, "real images", *empty, *real], [row.feature, "no image", *empty, *without]]
    unseen = [NOT_MEASURED] * len(targets)
    rows.append([row.feature, "mean image", *_numbers(row.mean_image), *unseen])
    if row.class_mean is not None:
        rows.append([row.feature, "class mean", *_numbers(row.class_mean), *unseen])
    rows.append([row.feature, "nearest image", *_numbers(row.nearest_image), *unseen])
    attacks = [(summary.attack.replace("_", " "), summary) for summary in row.attacks]
    alone = [(f"{name} of the answer", s.from_answer) for name, s in attacks if s.from_answer is not None]
    for name, summary in [*alone, *attacks]:
        if not summary.completed:
            rows.append([row.feature, name, CRASHED, *empty[1:], *unseen])
            continue
        seen = [percent(summary.recognised(t)) if t in of else NOT_MEASURED for t in targets]
        note = f" ({summary.crashed} {CRASHED})" if summary.crashed else ""
        rows.append([row.feature, name + note, *_numbers(summary), *seen])
    return rows


def _numbers(of: Scores | ReconstructionSummary) -> list[str]:
    values = [of.mean(m) if isinstance(of, ReconstructionSummary) else float(getattr(of, m)) for m, _ in _MEASURES]
    return [
        NOT_MEASURED if math.isnan(value) else format(value, number)
        for value, (_, number) in zip(values, _MEASURES, strict=True)
    ]

"""An evaluation as a page: the guarantee first, then what was found, then every table with how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.evaluation.bounded import BoundedFeature, bounded_sheet
from orchestrator.evaluation.evaluation import Evaluation
from orchestrator.evaluation.membership import FALSE_POSITIVE_RATE, MembershipResult
from orchestrator.evaluation.other_tables import hijack_sheet, membership_sheet, reconstruction_sheet
from orchestrator.evaluation.report import CLAIM_MARGIN, LeakageReport, LeakageRow
from orchestrator.evaluation.subject import Subject
from orchestrator.evaluation.tables import sheets
from orchestrator.privacy.accounting import rounded_up
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.report.page import Finding, Page, Picture, Section, Statement
from orchestrator.report.sheet import Sheet, percent

_QUICK = (
    "This was a quick look: few kinds of attackers, trained once. A stronger attacker may read more, so nothing here "
    "may be called private; --budget full is what a claim takes."
)
_WHITE_BOX = (
    "Attackers who know the weights imitate a bounded feature without its noise, and compare that with the feature as "
    "it was released, noise included. It is the best guess that they have of it."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was drawn, by where it belongs."""

    leakage: tuple[Picture, ...] = ()
    projection: tuple[Picture, ...] = ()
    reconstruction: tuple[Picture, ...] = ()
    curves: tuple[Picture, ...] = field(default=())


def page_of(evaluation: Evaluation, figures: Figures) -> Page:
    """The whole report."""
    subject, encoder = evaluation.subject, evaluation.subject.encoder
    return Page(
        title=f"What the features of {subject.data_name} give away",
        subtitle=f"Encoder {encoder.version} of the catalog {subject.catalog}, {len(subject.sold)} task(s) sold: "
        f"{', '.join(subject.sold) or 'none'}. Evaluated {subject.created[:10]}.",
        statements=_statements(subject),
        findings=tuple(_findings(evaluation)),
        sections=tuple(_sections(evaluation, figures)),
        facts=tuple(_facts(evaluation)),
        footer="Every number is also in evaluation.json, beside this page.",
    )


def tables_of(evaluation: Evaluation) -> list[Sheet]:
    """Every table, in the order of the page."""
    found: list[Sheet] = []
    if evaluation.leakage is not None:
        found += sheets(evaluation.leakage, alone=evaluation.alone)
    if evaluation.bounded:
        found.append(bounded_sheet(evaluation.bounded))
    if evaluation.reconstruction is not None:
        found.append(reconstruction_sheet(evaluation.reconstruction))
    if evaluation.membership is not None:
        found.append(membership_sheet(evaluation.membership))
    if evaluation.hijack is not None:
        found.append(hijack_sheet(evaluation.hijack))
    return found


def _statements(subject: Subject) -> tuple[Statement, ...]:
    """The encoder's, and those tasks' that say something else of themselves."""
    guarantee = subject.guarantee
    encoder = Statement(
        subject=f"Encoder {subject.encoder.version}",
        text=guarantee.statement(),
        strength="guaranteed" if guarantee.epsilon is not None else "none",
    )
    by_text: dict[str, list[str]] = {}
    for task, text in subject.statements.items():
        if text != encoder.text:
            by_text.setdefault(text, []).append(task)
    others = [
        Statement(
            subject=f"Task {tasks[0]}" if len(tasks) == 1 else f"Tasks {', '.join(tasks)}",
            text=text,
            strength="guaranteed" if _is_guaranteed(subject.tasks[tasks[0]].guarantee) else "none",
        )
        for text, tasks in by_text.items()
    ]
    return (encoder, *others)


def _is_guaranteed(guarantee: Mapping[str, Any]) -> bool:
    """Whether it promises anything: of weights, or of features."""
    return guarantee["epsilon"] is not None or guarantee.get("channel") is not None


def _findings(evaluation: Evaluation) -> Sequence[Finding]:
    found: list[Finding] = [_bounded_finding(feature, evaluation.leakage) for feature in evaluation.bounded]
    if evaluation.leakage is not None:
        found += _leakage_findings(evaluation.leakage)
    if evaluation.reconstruction is not None:
        found += [
            Finding(text=f"Images got back: {row.sentence}.", mark="good" if row.obfuscated else "bad")
            for row in evaluation.reconstruction.rows
        ]
    if evaluation.membership is not None:
        found += _membership_findings(evaluation.membership)
    for report in evaluation.hijack or ():
        for run in report.runs:
            known = f"{run.private.psnr:.1f} dB, mean image {report.mean_image.psnr:.1f} dB; encoder {report.encoder}"
            if run.guard and run.stopped:
                text = f"The guard stopped a tenant that sends false gradients at step {run.steps} ({known})."
                found.append(Finding(text=text, mark="good"))
            else:
                guard = "Past the guard" if run.guard else "Without the guard"
                text = f"{guard}, a tenant that sends false gradients comes this close to training images: {known}."
                found.append(Finding(text=text, mark="bad" if run.guard else "neutral"))
    if evaluation.budget == "quick":
        found.append(Finding(text=_QUICK, mark="neutral"))
    return found


def _bounded_finding(feature: BoundedFeature, leakage: LeakageReport | None) -> Finding:
    """What the bits of one feature allow, beside what attackers managed."""
    text = (
        f"The feature of {feature.task} carries at most {rounded_up(feature.channel.bits_per_image)} bits of its "
        f"image, whatever the attacker; of images like the test rows at most {rounded_up(feature.bits)} (95 % bound)."
    )
    rows = [row for row in leakage.rows if row.feature == feature.task] if leakage is not None else []
    rows = [row for row in rows if row.bound is not None]
    broken = [row.target for row in rows if row.breaks_bound]
    if broken:
        text += (
            f" An attacker reads {', '.join(broken)} more often than these bits allow, which cannot be: the noise, or "
            "the split of the data, is not what it should be."
        )
    elif rows:
        text += f" So no attacker is right more often than: {'; '.join(map(_allowed, rows))}."
    return Finding(text=text, mark="bad" if broken else "good")


def _allowed(row: LeakageRow) -> str:
    """What the bits allow of one target, beside what was measured."""
    assert row.bound is not None
    like = "" if row.rate_bound is None else f"on images like these {percent(row.rate_bound.accuracy)} %, "
    return f"{row.target} {percent(row.bound.accuracy)} % ({like}measured {percent(row.leak)} %)"


def _leakage_findings(report: LeakageReport) -> list[Finding]:
    found = []
    worst = report.worst
    if worst is not None and worst.excess is not None and worst.best is not None:
        found.append(
            Finding(
                text=f"The worst leak: whoever holds the feature of {worst.feature} reads {worst.target} at "
                f"{percent(worst.leak)} % ({worst.best.attack.replace('_', ' ')}), {100 * worst.excess:+.1f} points "
                f"over what needs no feature ({percent(worst.baseline)} %).",
                mark="bad" if worst.excess > CLAIM_MARGIN else "neutral",
            )
        )
    swaps = [row for row in report.rows if _quiet_swap(row) and (row.excess or 0) > CLAIM_MARGIN]
    if swaps:
        pairs = "; ".join(f"{row.feature} on {row.target}" for row in swaps)
        found.append(
            Finding(
                text=f"The swap test finds nothing where retrained attackers do: {pairs}. Another task's head was "
                "never trained on these features, so it fails on them whether or not they hold the answer.",
                mark="neutral",
            )
        )
    claims = [f"{row.feature} on {row.target}" for row in report.rows if row.chance_claim_allowed]
    text = f"At chance, by every attacker, within {100 * CLAIM_MARGIN:.0f} points: {'; '.join(claims) or 'no pair'}."
    found.append(Finding(text=text, mark="good" if claims else "neutral"))
    crashed = [
        f"{summary.attack} on {row.feature}, for {row.target}"
        for row in (*report.rows, *report.collusion)
        for summary in row.attacks
        if summary.crashed
    ]
    if crashed:
        text = f"{len(crashed)} attacker(s) crashed, which says nothing about privacy: {'; '.join(crashed)}."
        found.append(Finding(text=text, mark="bad"))
    return found


def _quiet_swap(row: LeakageRow) -> bool:
    return row.swap is not None and row.swap <= row.baseline + CLAIM_MARGIN


def _membership_findings(membership: Mapping[str, Sequence[MembershipResult]]) -> list[Finding]:
    found = []
    for task, results in membership.items():
        whole = [result for result in results if result.crashed is None]
        if len(whole) < len(results):
            found.append(Finding(text=f"A membership attack on {task} crashed: nothing follows from it.", mark="bad"))
        best = max(whole, key=lambda result: result.auc, default=None)
        if best is not None:
            chance = f"{100 * FALSE_POSITIVE_RATE:.0f} %"
            found.append(
                Finding(
                    text=f"Membership, {task}: training images are told from others with AUC {best.auc:.3f} "
                    f"({best.attack}; 0.5 is chance), {percent(best.tpr)} % of them at {chance} false positives.",
                    mark="bad" if best.auc_low > 0.5 and best.tpr_low > FALSE_POSITIVE_RATE else "neutral",
                )
            )
    return found


def _sections(evaluation: Evaluation, figures: Figures) -> Sequence[Section]:
    found: list[Section] = []
    subject = evaluation.subject
    if evaluation.leakage is not None:
        found.append(
            Section(
                title="What each feature tells about what its tenant did not buy",
                paragraphs=(
                    "Attackers are trained afresh on each task's feature, for every label that its tenant did not "
                    "buy, on rows that are in no test. Beside them stands the swap test: another task's head on this "
                    "feature, which is how the method was first evaluated. It is at chance for features that hide "
                    "nothing, so it is shown and never relied on.",
                ),
                sheets=tuple(sheets(evaluation.leakage, alone=evaluation.alone)),
                pictures=figures.leakage,
                command=subject.command_for("leakage"),
            )
        )
    if evaluation.bounded:
        found.append(
            Section(
                title="What bounds the features",
                paragraphs=(
                    "A bounded feature is a short vector of known power under Gaussian noise. What such a channel "
                    "carries is known exactly, and with it how often any attacker can be right, the ones that nobody "
                    "has thought of included. The bound is loose: it would let all bits go to one question. The rate "
                    "is what was measured to go through the channel, of images like the test rows; the rate bound "
                    "follows from it, less what the task itself is proven to take, and says nothing of other images.",
                ),
                sheets=(bounded_sheet(evaluation.bounded),),
                command=subject.command_for("leakage"),
            )
        )
    if figures.projection:
        found.append(
            Section(
                title="Where the tasks' features lie",
                paragraphs=(
                    "The features of the same images for every task, drawn by t-SNE. Distance between the corners of "
                    "a triangle has been read as privacy between tasks. It is none: shuffling a feature's channels "
                    "moves it far away and hides nothing from an attacker who is trained on it.",
                ),
                pictures=figures.projection,
                command=subject.command_for("leakage"),
            )
        )
    if evaluation.reconstruction is not None:
        found.append(
            Section(
                title="Whether the image can be got back",
                paragraphs=(
                    *(f"{row.sentence}." for row in evaluation.reconstruction.rows),
                    *((_WHITE_BOX,) if evaluation.bounded else ()),
                ),
                sheets=(reconstruction_sheet(evaluation.reconstruction),),
                pictures=figures.reconstruction,
                command=subject.command_for("reconstruction"),
            )
        )
    if evaluation.membership is not None:
        found.append(
            Section(
                title="Who was in the training set",
                paragraphs=(
                    "Differential privacy is about this: it bounds how much better than chance anyone can do, for the "
                    "weights that it covers. Heads that it does not cover may remember more.",
                ),
                sheets=(membership_sheet(evaluation.membership),),
                command=subject.command_for("membership"),
            )
        )
    if evaluation.hijack is not None:
        found.append(
            Section(
                title="A tenant that sends false gradients",
                paragraphs=(
                    "During training a tenant sends gradients, and may send some that make its feature easy to "
                    "invert. The guard looks whether they follow the tenant's labels. It does not stop a tenant "
                    "that mixes them with as much of the true gradient.",
                ),
                sheets=(hijack_sheet(evaluation.hijack),),
                command=subject.command_for("hijack"),
            )
        )
    if figures.curves:
        found.append(
            Section(
                title="Beside other encoders",
                paragraphs=("Each point is an evaluation of its own, of another encoder on the same images.",),
                pictures=figures.curves,
                command=subject.command,
            )
        )
    return found


def _facts(evaluation: Evaluation) -> Sequence[tuple[str, str]]:
    subject, encoder = evaluation.subject, evaluation.subject.encoder
    sizes = ", ".join(f"{n} {subset}" for subset, n in subject.sizes.items())
    facts = [
        ("Data", f"{subject.data_name}, {encoder.image_size} x {encoder.image_size} pixels; images: {sizes}"),
        ("Fingerprint of the data", encoder.data_fingerprint),
        ("Encoder", f"{encoder.backbone}, split index {encoder.split_index}; published {encoder.created}"),
        ("Shape of the universal feature", " x ".join(str(n) for n in encoder.feature_shape)),
        ("Weights of the encoder, SHA-256", encoder.weights_sha256),
        *((f"Task {task}", _task_facts(subject, task)) for task in subject.tasks),
        *_ledger_facts(subject),
        ("Budget of the attackers", evaluation.budget),
    ]
    if evaluation.leakage is not None:
        budget = evaluation.leakage.budget
        facts.append(("Attackers learn from", f"{' and '.join(budget.subsets)} rows, at most {budget.max_rows}"))
        facts.append(("Seeds", f"{budget.seeds} from {evaluation.leakage.seed}"))
    facts += [("Wall time", ", ".join(f"{part} {s:.0f} s" for part, s in evaluation.seconds.items()))]
    facts += [("Software", ", ".join(f"{name} {version}" for name, version in subject.versions.items()))]
    return facts


def _task_facts(subject: Subject, task: str) -> str:
    record = subject.tasks[task]
    kind = "private, not sold" if record.private else "sold"
    module = record.module_config.get("kind", "unknown")
    channel = record.module_config.get("channel")
    bits = "" if channel is None else f"; {rounded_up(ChannelConfig.from_json(channel).bits_per_image)} bits at most"
    return f"version {record.version}, {kind}; module {module}; {record.spec.answers}{bits}"


def _ledger_facts(subject: Subject) -> list[tuple[str, str]]:
    account = subject.account
    if account is None or account.delta is None:
        return [("Privacy ledger", "no private training of these images is recorded")]
    spent = rounded_up(account.committed(account.delta))
    limit = "no limit" if account.limit is None else f"limit {account.limit[0]:g}"
    trainings = len(account.entries)
    return [("Privacy ledger", f"epsilon {spent} at delta {account.delta:g} in {trainings} training(s); {limit}")]

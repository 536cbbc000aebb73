"""A page with everything in it: what the tests of reports stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.report.figure import picture_of
from orchestrator.report.page import Finding, Page, Picture, Section, Statement
from orchestrator.report.sheet import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOSTILE = "<script>document.title = 'hacked'</script><img src=http://127.0.0.1:9/x onerror=\"alert(1)\">'&amp;"
"""A name of a task, from the column of a file that somebody sent."""
LONG = "attribute_" * 12
COMMAND = "metamorphosis evaluate --attacks suite --output \\\n  report.html"

LEAKS = Sheet(
    title="What each feature tells",
    names=["feature", "target", "own", "best", "by", "bits", "chance", "floor", "ceiling", "swap", "alone", "excess"],
    rows=[
        [feature, target, own, "95.0", "mlp (1 crashed)", "0.71/1.00", "30.2", "40.0", "-", "25.0", "98.1", excess]
        for feature, own in (("pose", "97.4"), ("eyes", "96.1"), (HOSTILE, "88.0"))
        for target, excess in (("smile", "+55.0"), ("glasses", "-0.4"), ("person (private)", "+3.1"), (LONG, "crashed"))
    ],
    marks=["bad", "good", "", "crashed"] * 3,
    note="Test accuracy in %. good: at chance (95 % bound within 2 points).",
    words=frozenset({"feature", "target", "by"}),
    repeated=frozenset({"feature", "own", "alone"}),
)
FAULTS = Sheet(
    title="Parties that were killed",
    names=["party", "what happened", "result"],
    rows=[
        [
            "producer",
            "Restarted from the last checkpoint, and the ledger was charged once for every step.",
            "as before",
        ],
        ["consumer", "Its task was put into quarantine, and the others went on without it.", "as before"],
    ],
    marks=["good", "bad"],
    words=frozenset({"party", "what happened", "result"}),
)


def rising_figure() -> Figure:
    """A line and an image, whose ids matplotlib would draw at random."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1, 2], [0.1, 0.5, 0.6], marker="o", label="accuracy")
    left.legend()
    right.imshow([[0, 1], [2, 3]])
    return figure


def rising_picture() -> Picture:
    """The figure as a picture."""
    return picture_of(rising_figure(), title="Accuracy", caption="By epoch, in 100 %.", alt="A line that rises.")


def example_page() -> Page:
    """Two sections, two tables, two figures."""
    picture = rising_picture()
    return Page(
        title="Leakage report",
        subtitle="Faces, encoder 3f9a",
        statements=(
            Statement(
                subject="Encoder",
                strength="guaranteed",
                text="Image-level (ε, δ) = (3.2, 1e-05) differential privacy, for one image more or less.",
            ),
            Statement(subject="Features", strength="measured", text="Eight attackers were trained on them."),
            Statement(subject="Images at query time", strength="none", text="Nothing is promised about them."),
        ),
        findings=(
            Finding(mark="good", text="No attacker read glasses above chance."),
            Finding(mark="bad", text=f"Smile can be read from the feature of {HOSTILE}."),
            Finding(mark="neutral", text=f"{LONG} was not tested."),
        ),
        sections=(
            Section(
                title="Leakage",
                paragraphs=("The attackers know the architecture.", "They never saw the rows of the test."),
                sheets=(LEAKS,),
                pictures=(picture,),
                command=COMMAND,
            ),
            Section(title="Faults", sheets=(FAULTS,), pictures=(picture,)),
        ),
        facts=(("seed", "0"), ("data set", "sha256:" + 8 * "9f86d081")),
        footer="Made by metamorphosis-ray.",
    )

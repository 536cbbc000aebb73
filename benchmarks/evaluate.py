"""The quick evaluation of the demo: its wall time, and what it saves that attackers share each feature.

digits at 32x32 pixels, k = 5, three tasks sold, as `make demo` trains them. Two figures:

evaluate_cached  attackers of labels on features that were computed once, against the same attackers when each computes
                 its feature from the images first, as a script for one attack would
evaluate_quick   seconds of `pipelines/evaluate.py` as a process, with Ray's start and every figure
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _harness import arguments, finish, paired, ratio, seconds

ROOT = Path(__file__).parent.parent
TARGET_S = 60.0


def main() -> int:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "METAMORPHOSIS_HOME": folder, "PYTHONPATH": str(ROOT)}
        run_command(environment, "train.py", "--preset", "digits")
        run_command(environment, "add_task.py", "digit", "--epochs", "8")
        times = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            run_command(environment, "evaluate.py")
            times.append(time.perf_counter() - started)
        met = [sharing(Path(folder), rounds=options.rounds, to=options.json)]
    value = sorted(times)[len(times) // 2]
    met.append(finish("evaluate_quick", value, TARGET_S, figures={"seconds": times}, to=None))
    return 0 if all(met) else 1


def run_command(environment: dict[str, str], name: str, *flags: str) -> None:
    """In a process of its own, as a user does."""
    command = [sys.executable, str(ROOT / "pipelines" / name), *flags]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own


def sharing(storage: Path, *, rounds: int, to: Path | None) -> bool:
    """Attackers one after another in this process, on shared features and on features of their own."""
    import torch

    from orchestrator.catalog import Catalog
    from orchestrator.evaluation.budget import AttackBudget
    from orchestrator.evaluation.collect import collect
    from orchestrator.evaluation.leakage import evaluate_leakage
    from orchestrator.runs.observer import SilentObserver

    torch.set_num_threads(1)
    catalog = Catalog(f"sqlite:///{storage}/mlflow.db", "digits")

    def features(place: Path) -> Any:
        return collect(catalog, SilentObserver(), encoder_version="latest", data=None, targets=(), storage=place)

    def from_images(job: Any) -> None:
        """What an attacker that shares nothing does before it begins."""
        with tempfile.TemporaryDirectory() as empty:
            features(Path(empty))

    def afresh(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        for job in jobs:
            from_images(job)
            yield work(job)

    published, budget = features(storage), AttackBudget.preset("quick")

    def attack(run: Any) -> None:
        found = published.features, published.labels, published.specs
        evaluate_leakage(*found, budget=budget, seed=0, run=run)

    once = seconds(lambda: from_images(None))
    shared, alone = paired(lambda: attack(map), lambda: attack(afresh), rounds=min(rounds, 2))
    saved = 1 - ratio(shared, alone)
    print(f"features of all tasks: {once:.2f} s; attackers that share them: {min(shared):.1f} s; saved: {saved:.0%}")
    figures = {"shared_s": shared, "alone_s": alone, "features_s": once}
    return finish("evaluate_cached", ratio(shared, alone), 1.0, figures=figures, to=to)


if __name__ == "__main__":
    raise SystemExit(main())

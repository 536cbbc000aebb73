"""One DP-SGD step of the encoder, against the same step without DP: time, and memory at its peak.

ResNet-18, 64x64 images, batch 64, from a given gradient at the cut: forward, backward, AdamW. Beside ours: Opacus's
hooks (per-example gradients of everything) and its ghost clipping (norms first, then a second backward). The ratio that
counts is ours at k = 6. A memory is a fresh process's: its peak during three steps, less what it held before them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from _harness import BATCH, IMAGE_SIZE, arguments, finish, ratio, seconds

SPLITS = (5, 6, 7)
MECHANISM: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.2, "expected_batch_size": BATCH}


def plain(network: Any, optimiser: Any, x: Any, dz: Any) -> Callable[[], None]:
    """Without DP."""

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        network(x).backward(dz)
        optimiser.step()

    return step


def by_engine(kind: Any, network: Any, optimiser: Any, x: Any, dz: Any) -> Callable[[], None]:
    """As `PrivateStep` uses it."""
    import torch

    engine = kind(network, optimiser, generator=torch.Generator().manual_seed(0), **MECHANISM)

    def step() -> None:
        z = engine.forward(x)
        engine.accumulate([z], [dz], len(x))
        engine.apply()
        engine.reset()

    return step


def hooks(*parts: Any) -> Callable[[], None]:
    """Opacus's per-example gradients."""
    from orchestrator.privacy.per_example import PerExampleHooks

    return by_engine(PerExampleHooks, *parts)


def ours(*parts: Any) -> Callable[[], None]:
    """This project's."""
    from orchestrator.privacy.clipping import ClippedGradients

    return by_engine(ClippedGradients, *parts)


def ghost(network: Any, optimiser: Any, x: Any, dz: Any) -> Callable[[], None]:
    """Opacus's norms without gradients, and a second backward for the clipped sum."""
    from orchestrator.privacy.accounting import load_opacus

    load_opacus()
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping

    watched = GradSampleModuleFastGradientClipping(network, max_grad_norm=MECHANISM["max_grad_norm"])
    private = DPOptimizerFastGradientClipping(optimiser, **MECHANISM)

    def step() -> None:
        z = watched(x)
        z.backward(dz, retain_graph=True)
        private.zero_grad()
        factors = watched.get_clipping_coef()
        watched.disable_hooks()
        z.backward(dz * len(x) * factors.view(-1, 1, 1, 1))
        watched.enable_hooks()
        private.step()
        private.zero_grad()

    return step


VARIANTS: dict[str, Callable[..., Callable[[], None]]] = {"plain": plain, "hooks": hooks, "ghost": ghost, "ours": ours}


def build(variant: str, split_index: int) -> Callable[[], None]:
    """The step of a fresh encoder."""
    import torch

    from orchestrator.network import NetworkConfig

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(os.cpu_count() or 1)
    generator = torch.Generator().manual_seed(0)
    config = NetworkConfig(split_index=split_index)
    network = config.build_encoder(seed=0)
    x = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    dz = torch.randn(BATCH, *config.shape(IMAGE_SIZE), generator=generator) / BATCH
    return VARIANTS[variant](network, torch.optim.AdamW(network.parameters(), lr=1e-3), x, dz)


def resident_kib(what: str) -> int:
    """This process's memory now (VmRSS), or at its highest (VmHWM)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(what))


def peak_mib(variant: str, split_index: int) -> float:
    """In a process that did nothing else."""
    from orchestrator.memory import keep_freed_memory

    keep_freed_memory()
    step, before = build(variant, split_index), resident_kib("VmRSS")
    for _ in range(3):
        step()
    return (resident_kib("VmHWM") - before) / 1024


def in_a_fresh_process(variant: str, split_index: int) -> float:
    """`peak_mib`. Not resource.getrusage: its peak is handed down from the parent."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_mib, variant, split_index).result()


def main() -> int:
    options = arguments(__doc__ or "")
    figures: dict[str, Any] = {}
    value = 0.0
    print("        " + "".join(f"{name:>22}" for name in VARIANTS))
    for k in SPLITS:
        steps = {name: build(name, k) for name in VARIANTS}
        for step in steps.values():
            step()
        rounds = [{name: seconds(step, repeat=2) for name, step in steps.items()} for _ in range(options.rounds)]
        times = {name: [one[name] for one in rounds] for name in VARIANTS}
        ratios = {name: ratio(times[name], times["plain"]) for name in VARIANTS}
        peaks = {name: in_a_fresh_process(name, k) for name in VARIANTS}
        figures[f"k{k}"] = {"seconds": times, "ratio": ratios, "peak_mib": peaks}
        cells = (
            f"{1000 * statistics.median(times[name]):5.0f} ms {ratios[name]:4.2f}x {peaks[name]:4.0f} MiB"
            for name in VARIANTS
        )
        print(f"k = {k}   " + "".join(f"{cell:>22}" for cell in cells), flush=True)
        value = ratios["ours"] if k == 6 else value
    return 0 if finish("dp_step", value, 1.5, figures=figures, to=options.json) else 1


if __name__ == "__main__":
    raise SystemExit(main())

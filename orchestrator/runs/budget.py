"""Between a run and the privacy ledger: no private training without a reservation, no private step without a charge."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from orchestrator.privacy.ledger import Account, Ledger, LedgerCharge, Mechanism
from orchestrator.privacy.plan import Charge, DpPlan
from orchestrator.runs.folder import RunFolder
from orchestrator.settings.shared import RuntimeSettings
from tasks.datasets.table import ImageTable


class Budget:
    """One run's part in the ledger of its data set."""

    def __init__(self, table: ImageTable, folder: RunFolder, runtime: RuntimeSettings) -> None:
        self._table, self._folder, self._runtime = table, folder, runtime

    def reserve(self, plan: DpPlan, part: str) -> DpPlan:
        """The plan, its budget set aside and its steps to be charged. Raises `BudgetExceededError`.

        A resumed run takes up the reservation that it had.
        """
        return dataclasses.replace(plan, charge=self._charge(self.set_aside(plan, part)))

    def set_aside(self, plan: DpPlan, part: str) -> int:
        """The number of the plan's reservation, as `reserve` makes it, before anybody charges to it."""
        with self._ledger() as ledger:
            number = ledger.reserve(
                self._table.image_set,
                self._table.name,
                Mechanism(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=plan.steps),
                run=self._folder.run,
                part=part,
                mode=plan.mode,
                delta=plan.delta,
                secret=plan.secret_seed,
            )
        self._folder.remember(reservations={**self._folder.recall("reservations", {}), part: number})
        return number

    def release(self, part: str) -> None:
        """The part has taken its last step. Nothing happens if it was trained without DP."""
        number = self._folder.recall("reservations", {}).get(part)
        if number is not None:
            with self._ledger() as ledger:
                ledger.release(number)

    def outside(self, *notes: str) -> None:
        """What is trained or chosen by looking at the images, and no accountant covers."""
        with self._ledger() as ledger:
            for what in notes:
                ledger.note_outside(self._table.image_set, self._table.name, run=self._folder.run, what=what)

    def _ledger(self) -> Ledger:
        return Ledger(self._runtime.ledger_path)

    def _charge(self, reservation: int) -> Charge:
        here = LedgerCharge(self._runtime.ledger_path, reservation)
        if self._runtime.engine == "process":
            return here
        from orchestrator.actors import RayCharge

        return RayCharge.to(here)


def without_noise(parts: Sequence[str]) -> str:
    """The note of a training without noise."""
    return f"{', '.join(parts)}: trained without noise"


def account_of(table: ImageTable, runtime: RuntimeSettings) -> Account:
    """What the ledger says about a data set."""
    with Ledger(runtime.ledger_path) as ledger:
        return ledger.account(table.image_set)

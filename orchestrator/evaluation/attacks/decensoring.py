"""A5, de-censoring (Song and Shmatikov, ICLR'20; SPEC E.4): translate the feature into one that hides nothing.

Axes: N rows, B examples of a batch, S the side of an image, D coordinates of the attacker's own feature, K classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.evaluation.attacks.base import AttackInput, AttackResult, ImageArray, NotApplicable
from orchestrator.evaluation.attacks.cnn import small_cnn
from orchestrator.evaluation.attacks.fitting import BatchLoss, Fitting, answered, answers, seeded, standardised_maps


@dataclass(frozen=True, kw_only=True, slots=True)
class DecensoringAttack(Fitting):
    """An encoder and a classifier of the attacker's own, trained on its images; then T with T(z_i) close to E(x).

    T is trained on the attacker's rows, to imitate the encoder's feature of the same image and to be read right by the
    classifier, which is held fixed. Of the test rows only z is used: T and the classifier answer.
    """

    name: str = "decensoring"
    width: int = 32
    """Of the attacker's own encoder."""
    translator_width: int = 64
    dropout: float = 0.3

    def __post_init__(self) -> None:
        Fitting.__post_init__(self)  # super() does not work in a dataclass with slots
        self.check_count("width")
        self.check_count("translator_width")

    def run(self, data: AttackInput) -> AttackResult:
        """Train on the training rows, choose on the validation rows, answer for the test rows."""
        started = time.perf_counter()
        if data.train_images is None or data.validation_images is None:
            raise NotApplicable("there are no images of the attacker's rows")
        train_z, validation_z, test_z = standardised_maps(data)
        with seeded(data.seed, data.device):
            encoder, classifier = self._own(data, data.train_images, data.validation_images)
            own = torch.from_numpy(answers(encoder, torch.from_numpy(data.train_images).to(data.device)))
            shape = (train_z.shape[1], train_z.shape[2], train_z.shape[3])
            translator = small_cnn(shape, own.shape[1], width=self.translator_width, dropout=self.dropout)
            network = nn.Sequential(translator.to(data.device), classifier.requires_grad_(False))
            labels = torch.from_numpy(data.train_y).to(data.device)
            best = self.fit(network, data, train_z, validation_z, imitation(train_z, own.to(data.device), labels))
        return answered(self.name, data, network, best, test_z, started=started)

    def _own(self, data: AttackInput, train: ImageArray, validation: ImageArray) -> tuple[nn.Module, nn.Module]:
        """E and the classifier behind it, trained on images."""
        train_x, validation_x = (torch.from_numpy(images).to(data.device) for images in (train, validation))
        side, channels = train_x.shape[1], train_x.shape[3]
        body = small_cnn((channels, side, side), data.n_classes, width=self.width, dropout=self.dropout)
        network = nn.Sequential(_Pixels(train_x), *body).to(data.device)
        self.fit(network, data, train_x, validation_x)
        return network[:-1], network[-1]


def imitation(train_z: Tensor, own_ND: Tensor, labels_N: Tensor) -> BatchLoss:
    """Mean squared distance to the attacker's own feature, in units of its variance, and the classifier's loss."""
    variance = own_ND.var(correction=0).clamp_min(1e-12)

    def loss(network: nn.Module, ids: Tensor) -> Tensor:
        assert isinstance(network, nn.Sequential)
        translated = network[0](train_z[ids])
        distance = functional.mse_loss(translated, own_ND[ids]) / variance
        return distance + functional.cross_entropy(network[1](translated), labels_N[ids])

    return loss


class _Pixels(nn.Module):
    """``(B, S, S, 3)`` bytes to ``(B, 3, S, S)``, standardised by the images that it was made with."""

    mean: Tensor
    std: Tensor

    def __init__(self, images_u8: Tensor) -> None:
        super().__init__()
        # Enough of them for two numbers a channel; all of them as floats could fill the memory.
        some = images_u8[:2048].float()
        self.register_buffer("mean", some.mean(dim=(0, 1, 2)))
        self.register_buffer("std", some.std(dim=(0, 1, 2)).clamp_min(1e-6))

    def forward(self, images_u8: Tensor) -> Tensor:
        """Float maps."""
        return ((images_u8.float() - self.mean) / self.std).permute(0, 3, 1, 2)

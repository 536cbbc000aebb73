"""The producer's network: one encoder, and one metamorphosis module per task behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from orchestrator.models.heads import HeadConfig, build_head
from orchestrator.models.modules import ModuleConfig, build_module
from orchestrator.models.split import build_encoder, feature_shape
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.sampling import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Which networks the parties hold."""

    backbone: str = "resnet18"
    """resnet18, resnet34 or resnet50, with GroupNorm (DP-SGD cannot be combined with BatchNorm)."""
    split_index: int = 6
    """How many of the backbone's ten children are the producer's encoder: 5 gives 64x16x16 features of a 64x64 image,
    6 gives 128x8x8, 7 gives 256x4x4, 8 gives 512x2x2, 9 gives 512x1x1."""
    module: str = "cross_sec"
    """The metamorphosis module g_i: cross_sec (the paper's), sec, conv1x1 or identity."""
    head: str = "backbone"
    """The tenant's head M_i: backbone (the rest of the backbone, the paper's), linear or mlp. With bounded features mlp
    takes the place of backbone."""

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of u, the encoder's output."""
        return feature_shape(self.backbone, self.split_index, image_size)

    def task_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of z, every task's feature."""
        return self.module_config(image_size).feature_shape(self.shape(image_size))

    @property
    def tenant_head(self) -> str:
        """The kind of head that tenants train: `head`, unless the feature does not go into it."""
        return self.head

    def module_config(self, image_size: int) -> ModuleConfig:
        """What builds one task's metamorphosis module."""
        return ModuleConfig(kind=self.module, channels=self.shape(image_size)[0])

    def head_config(self, image_size: int, n_outputs: int, *, kind: str | None = None) -> HeadConfig:
        """What builds one task's head."""
        return HeadConfig(
            kind=kind or self.tenant_head,
            backbone=self.backbone,
            split_index=self.split_index,
            n_outputs=n_outputs,
            feature_shape=self.task_shape(image_size),
        )

    def build_encoder(self, *, seed: int) -> nn.Sequential:
        """E, freshly initialised."""
        return build_encoder(self.backbone, self.split_index, seed=derive_seed(seed, "encoder"))

    def build_modules(self, tasks: Iterable[str], image_size: int, *, seed: int) -> dict[str, nn.Module]:
        """One g_i per task. A task's module does not depend on which others are built beside it."""
        config = self.module_config(image_size)
        return {task: build_module(config, seed=derive_seed(seed, "module", task)) for task in tasks}

    def build_heads(
        self, outputs: Mapping[str, int], image_size: int, *, seed: int, kind: str | None = None
    ) -> dict[str, nn.Module]:
        """One M_i per task, from its number of outputs."""
        return {
            task: build_head(self.head_config(image_size, n, kind=kind), seed=derive_seed(seed, "head", task))
            for task, n in outputs.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundedNetworkConfig(NetworkConfig):
    """The networks of tasks whose features are bounded: short vectors, which the rest of the backbone cannot take."""

    channel: ChannelConfig
    """Of every task; see `orchestrator.privacy.bounded.channel`."""

    @classmethod
    def of(cls, network: NetworkConfig, channel: ChannelConfig) -> BoundedNetworkConfig:
        """The same backbone and modules, with bounded features."""
        return cls(
            backbone=network.backbone,
            split_index=network.split_index,
            module=network.module,
            head=network.head,
            channel=channel,
        )

    @property
    def tenant_head(self) -> str:
        """mlp in place of the rest of the backbone."""
        return "mlp" if self.head == "backbone" else self.head

    def module_config(self, image_size: int) -> ModuleConfig:
        """What builds one task's metamorphosis module."""
        return ModuleConfig(kind=self.module, channels=self.shape(image_size)[0], channel=self.channel)


class Networks(Protocol):
    """Builds the networks of a training. `NetworkConfig` is the one that users choose from."""

    def shape(self, image_size: int) -> tuple[int, ...]:
        """Of the encoder's output for one example."""
        ...

    def build_encoder(self, *, seed: int) -> nn.Module:
        """E, freshly initialised."""
        ...

    def build_modules(self, tasks: Iterable[str], image_size: int, *, seed: int) -> dict[str, nn.Module]:
        """One g_i per task."""
        ...

    def build_heads(
        self, outputs: Mapping[str, int], image_size: int, *, seed: int, kind: str | None = None
    ) -> dict[str, nn.Module]:
        """One M_i per task, from its number of outputs."""
        ...


class FeatureNetwork(nn.Module):
    """``x -> {task: z_i}`` with ``z_i = g_i(E(x))`` (MetaMorphosis, eq. 7).

    Without an encoder the input is taken to be ``u = E(x)`` already, as the feature cache holds it.
    """

    def __init__(self, encoder: nn.Module | None, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder if encoder is not None else nn.Identity()
        self.branches = named_modules(modules)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """One feature per task, from (B, 3, S, S) images or (B, C, H, W) encoder features."""
        u = self.encoder(x)
        return {task_of(name): module(u) for name, module in self.branches.items()}


class LogitNetwork(nn.Module):
    """``x -> {task: logits}``: encoder, module and head as one module, for training wholly under DP."""

    def __init__(self, features: FeatureNetwork, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.features = features
        self.heads = named_modules(heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, n_outputs) logits per task."""
        return self.read(self.features(x))

    def read(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The heads' logits, of a (B, C, H, W) feature each."""
        return {task_of(name): head(features[task_of(name)]) for name, head in self.heads.items()}


_PREFIX = "task_"


def named_modules(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """One submodule per task. The prefix keeps a task called ``keys`` or ``train`` from hiding a method."""
    return nn.ModuleDict({_PREFIX + task: module for task, module in modules.items()})


def named_module(network: nn.Module, task: str) -> nn.Module:
    """g_i in a `FeatureNetwork`."""
    return network.get_submodule(f"branches.{_PREFIX}{task}")


def task_of(name: str) -> str:
    """The task of a submodule that `named_modules` named."""
    return name.removeprefix(_PREFIX)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser is to hold."""
    return [p for p in module.parameters() if p.requires_grad]


def freeze(module: nn.Module) -> nn.Module:
    """Make every parameter constant, and put the module in evaluation mode."""
    module.requires_grad_(False)
    return module.eval()


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the weights, on the CPU, contiguous: what is saved and published."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in module.state_dict().items()}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, and the CPU elsewhere."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)

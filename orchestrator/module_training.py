"""Stage 2 of surrogate_dp_modules: every g_i under DP, against the frozen encoder, with a stand-in head each.

All modules and stand-ins are one network for the private step: an image is clipped once, whatever the number of tasks.
The dissimilarity term takes part: it compares the features of one image with one another, and no two images. The
stand-ins are thrown away, the modules are released, and the tenants' heads are trained on what the modules give.

A bounded feature is read by its stand-in through the noise of its channel. That noise is a function of the step and the
image, never of who else is in the batch: it is part of what one image does, and is clipped with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.encoder_training import EncoderTraining
from orchestrator.network import FeatureNetwork, LogitNetwork, Networks
from orchestrator.privacy.bounded.channel import ChannelConfig
from orchestrator.privacy.coupling import refuse_coupled
from orchestrator.privacy.dissimilarity import Dissimilarity, DissimilarityConfig, dissimilarity_pull
from orchestrator.sampling import derive_seed

_FEATURE: Final = "feature of "


class ModuleTraining(EncoderTraining):
    """Trains modules as `EncoderTraining` trains an encoder. Its inputs are u = E(x), from the feature cache."""

    def __init__(
        self,
        *,
        dissimilarity: DissimilarityConfig,
        fixed: nn.Module | None,
        feature_shape: tuple[int, int, int],
        channel: ChannelConfig | None = None,
        **rest: Any,
    ) -> None:
        """``fixed`` gives the features that are kept apart from, of u; it is never changed.

        ``feature_shape`` is (C, H, W) of a task's feature; ``channel`` is what bounds it, None for a map as it is.
        """
        self._dissimilarity, self._fixed = Dissimilarity(dissimilarity), fixed
        self._shape, self._channel, self._noise_seed = feature_shape, channel, derive_seed(rest["seed"], "module noise")
        self._fixed_features: Mapping[str, Tensor] = {}
        super().__init__(**rest)

    def _build(self, network: Networks, image_size: int, *, seed: int, surrogate: str) -> LogitNetwork:
        outputs = {task: spec.n_outputs for task, spec in self.specs.items()}
        self.encoder = nn.Identity()
        self.modules = network.build_modules(outputs, image_size, seed=seed)
        self.heads = network.build_heads(outputs, image_size, seed=seed, kind=surrogate)
        apart = self._dissimilarity.config.omega > 0
        return _Observed(FeatureNetwork(None, self.modules), self.heads, observed=apart)

    def _refuse_coupled(self) -> None:
        super()._refuse_coupled()
        if self._dissimilarity.config.omega > 0:
            refuse_coupled(
                f"the dissimilarity {self._dissimilarity.config.similarity}",
                lambda z: self._dissimilarity({"a": z[:, 0], "b": z[:, 1]}, fixed=frozenset()).loss,
                (2, *self._shape),
            )

    def _forward(self, x: Tensor) -> Mapping[str, Tensor]:
        if self._fixed is not None and self._dissimilarity.config.omega > 0:
            with torch.no_grad():
                self._fixed_features = dict(self._fixed(x))
        if self._channel is not None:
            ids = self.sampler.ids(self.step)[self.shard.part]
            assert isinstance(self.logits, _Observed)
            self.logits.noise = {task: self._noise(task, ids).to(x.device) for task in self.specs}
        return super()._forward(x)

    def _noise(self, task: str, ids: NDArray[Any]) -> Tensor:
        """(B, C, H, W), of the channel's standard deviation, for the examples of this step."""
        assert self._channel is not None
        seeds = [derive_seed(self._noise_seed, task, self.step, int(example)) for example in ids]
        drawn = [np.random.default_rng(seed).standard_normal(self._shape, dtype=np.float32) for seed in seeds]
        return self._channel.noise * torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, *self._shape), "f4"))

    def _cut_gradients(
        self, outputs: Mapping[str, Tensor], ids: NDArray[Any], *, of: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Of the logits as in phase 1, and omega * dS/dz of the features (MetaMorphosis, eq. 6)."""
        logits = {task: z for task, z in outputs.items() if task in self.specs}
        cut, losses = super()._cut_gradients(logits, ids, of=of)
        features = {name.removeprefix(_FEATURE): z for name, z in outputs.items() if name.startswith(_FEATURE)}
        pull = dissimilarity_pull(self._dissimilarity, features, fixed=self._fixed_features, step=self.step)
        for task, z in features.items():
            cut[_FEATURE + task] = pull.gradients.get(task, torch.zeros_like(z))
        return cut, losses


class _Observed(LogitNetwork):
    """Gives the features beside the logits, where something is to be said about them. Heads read them under noise."""

    def __init__(self, features: FeatureNetwork, heads: Mapping[str, nn.Module], *, observed: bool) -> None:
        super().__init__(features, heads)
        self._observed = observed
        self.noise: Mapping[str, Tensor] = {}
        """Of the next forward in training, by task; it takes no part in evaluation."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, n_outputs) logits per task, and with them (B, C, H, W) features under names of their own."""
        features = self.features(x)
        noise = self.noise if self.training else {}
        logits = self.read({task: z + noise[task] if task in noise else z for task, z in features.items()})
        if not self._observed or not self.training:
            return logits
        return {**logits, **{_FEATURE + task: z for task, z in features.items()}}

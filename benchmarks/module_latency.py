"""What a server takes for an image with the metamorphosis module, against without it (the paper's Table 10).

One 64x64 PNG in, a feature as fp16 safetensors out, ResNet-18 cut at k = 5, 7 and 8, on one core. Without: the identity
in the module's place.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from _harness import IMAGE_SIZE, arguments, finish, paired, ratio


def main() -> int:
    options = arguments(__doc__ or "")
    import torch

    torch.set_num_threads(1)
    ok, figures = True, {}
    for k in (5, 7, 8):
        with_module, without = server(k, "cross_sec"), server(k, "identity")
        ours, theirs = paired(with_module, without, rounds=3 * options.rounds, repeat=20)
        value = ratio(ours, theirs)
        print(f"k = {k}: {1000 * min(ours):.2f} ms with the module, {1000 * min(theirs):.2f} ms without")
        figures[f"k{k}"] = {"with_s": ours, "without_s": theirs, "ratio": value}
        to = None if options.json is None else options.json.with_suffix(f".k{k}.json")
        ok &= finish(f"module_latency k={k}", value, 1.10, figures=figures[f"k{k}"], to=to)
    return 0 if ok else 1


def server(split_index: int, module: str):  # noqa: ANN201 - a closure
    """What a replica does for a request, without HTTP."""
    import torch
    from PIL import Image

    from orchestrator.network import NetworkConfig
    from orchestrator.privacy.bounded.keyed_noise import ImageDigests
    from serve.codec import encode
    from serve.model import EncoderModel, ModuleModel, TaskCard
    from tasks.datasets.table import IMAGENET

    network = dataclasses.replace(NetworkConfig(), split_index=split_index, module=module)
    shape, cpu = network.task_shape(IMAGE_SIZE), torch.device("cpu")
    encoder = EncoderModel(network.build_encoder(seed=0), IMAGENET, device=cpu)
    card = TaskCard(
        task="task",
        version="1",
        classes=("no", "yes"),
        feature_shape=shape,
        bits_per_feature=None,
        epsilon=None,
        delta=None,
        guarantee="",
        created="",
    )
    built = network.build_modules(["task"], IMAGE_SIZE, seed=0)["task"]
    model = ModuleModel(built, card, image_size=IMAGE_SIZE, release=None, device=cpu)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = buffer.getvalue()

    def answer() -> None:
        decoded = model.pixels(image)[None]
        z = model.features(encoder.encode(decoded), ImageDigests.of(decoded))
        encode({"z": z}, precision="fp16")

    return answer


if __name__ == "__main__":
    raise SystemExit(main())

"""GradCAM at every layer of many published architectures, against autograd, and programs of the same networks.

    python -m tests.models.network_layers            # an hour or more; resumes where it stopped
    python -m tests.models.network_layers resnet18   # some of them

Networks have random weights and 10 classes, and see images of 64 pixels. At each layer that `layer=` can name, the
map is that of autograd written out, or the layer is refused with one sentence. At one layer of each network, the maps
are differentiated as in a student's step, and the network is exported in both formats. Results are written to
network_layers.results.json after each network.
"""

import contextlib
import gc
import json
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from permafrost.config.models import Picture
from permafrost.core.errors import UserError
from permafrost.models.explanations import gradcam
from permafrost.models.module import ModuleClassifier
from permafrost_export.portable import ImageProgram, check_program, encode_model, trace
from tests.support.gradcam import gradcam_of_layer

RESULTS = Path(__file__).with_name("network_layers.results.json")
SIDE = 64
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *(
        "mobilenet_v3_large",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "resnet18",
    ),
    *(
        "regnet_y_400mf",
        "resnext50_32x4d",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "vgg11",
    ),
    *("swin_v2_t", "vgg11_bn", "vit_b_16"),
)
TIMM = (
    *("convmixer_768_32", "convnext_atto", "convnextv2_atto", "crossvit_tiny_240"),
    *("cspresnet50", "darknet17", "dla34", "dpn48b", "edgenext_xx_small"),
    *("vit_tiny_patch16_224", "efficientformerv2_s0", "ese_vovnet19b_dw"),
    *("eva02_tiny_patch14_224", "fastvit_t8", "gcvit_xxtiny", "ghostnet_100"),
    *("inception_next_atto", "lcnet_050", "levit_128s", "mambaout_femto", "mixer_s32_224"),
    *("mixnet_s", "mobilenetv4_conv_small", "mobilevit_xxs", "pit_ti_224", "poolformer_s12"),
    *("pvt_v2_b0", "repghostnet_050", "repvgg_a0", "resnest14d", "resnet10t", "rexnet_100"),
    *("skresnet18", "starnet_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224"),
    *("tf_efficientnet_lite0", "tiny_vit_5m_224", "tinynet_e", "visformer_tiny"),
    *("xcit_nano_12_p16_224",),
)
_OPTIONS = {
    "vit_b_16": {"image_size": SIDE},
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
}
_OF_CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_OF_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


def build(source, name):
    """Build a network for images of 64 pixels, where it has an option for that."""
    torch.manual_seed(0)
    if source == "torchvision":
        return getattr(torchvision.models, name)(num_classes=10, **_OPTIONS.get(name, {})).eval()
    try:
        return timm.create_model(name, num_classes=10, img_size=SIDE).eval()
    except (TypeError, AssertionError, RuntimeError, ValueError):
        return timm.create_model(name, num_classes=10).eval()


def has_channels_last(network, layer):
    """Return the layout of a layer's output by its type, or by its proportions for an image of 64x96, or None."""
    module = network.get_submodule(layer)
    if isinstance(module, _OF_CHANNELS_FIRST):
        return False
    if type(module) in _OF_CHANNELS_LAST:
        return True
    shapes = []
    handle = module.register_forward_hook(lambda m, i, output: shapes.append(output.shape))
    # The layer itself may have run in a network of one size.
    with contextlib.suppress(Exception), torch.no_grad():
        network(torch.rand(1, 3, SIDE, SIDE * 3 // 2))
    handle.remove()
    shape = shapes[0] if shapes else (1, 1, 1, 1)
    fits = [2 * columns == 3 * rows for rows, columns in (shape[2:4], shape[1:3])]
    return fits[1] if sum(fits) == 1 else None


def check_layers(network, images):
    """Return what became of each layer: counts, the largest error, and what was neither right nor refused."""
    counts, reasons, wrong, largest, last = Counter(), Counter(), [], 0.0, None
    for layer in [name for name, _ in network.named_modules() if name]:
        try:
            model = ModuleClassifier(network, layer)
            with torch.no_grad():
                output = model(images)
                maps = gradcam(model, output, output.logits.argmax(dim=1, keepdim=True))[:, 0, 0]
        except UserError as error:
            counts["refused"] += 1
            reasons[reason_of(str(error))] += 1
            continue
        except Exception as error:
            wrong.append(f"{layer}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        is_last = has_channels_last(network, layer)
        counts["layout known" if is_last is not None else "layout unknown"] += 1
        if is_last is not None and is_last != model._is_channels_last:
            wrong.append(f"{layer}: channels_last={model._is_channels_last}")
            continue
        logits, expected = gradcam_of_layer(
            network, layer, images, channels_last=model._is_channels_last
        )
        # Before a layer norm, the contributions of one cell sum to rounding, which has no relative error.
        scale = max(float(expected.max()), 1e-4 * float(output.features.abs().amax()))
        error = float((maps - expected).abs().max()) / scale
        logit_error = float(
            (output.logits - logits).abs().max() / logits.abs().max().clamp(min=1e-9)
        )
        largest = max(largest, error, logit_error)
        if not max(error, logit_error) < 1e-3:
            wrong.append(f"{layer}: maps differ by {error:.1e}, logits by {logit_error:.1e}")
        if min(maps.shape[1:]) > 1:
            last = layer
    return {
        "layers": dict(counts),
        "largest_error": largest,
        "refused": dict(reasons),
        "wrong": wrong,
    }, last


_REASONS = {
    r"does not run": "does not run in a forward pass",
    r"runs \d+ times": "runs several times in a forward pass",
    r"instead of features": "output is no grid",
    r"no two neighboring axes": "axes are not rows and columns",
    r"no gradient": "logits do not depend on it",
    r"other logits if": "copied output changes the logits",
    r"must return logits": "network returns no logits",
    r"cannot be run": "cannot be run",
}


def reason_of(message):
    return next(
        (reason for pattern, reason in _REASONS.items() if re.search(pattern, message)),
        message[:200],
    )


def check_step(network, layer, images):
    """Differentiate maps in a step of training."""
    model = ModuleClassifier(network, layer).train()
    output = model(images)
    maps = gradcam(model, output, output.logits.argmax(dim=1, keepdim=True))
    (maps.square().sum() + output.logits.square().sum()).backward()
    network.zero_grad()
    network.eval()


def check_export(network, layer):
    """Return the largest difference of each program from the network, or why there is none."""
    program = ImageProgram(
        ModuleClassifier(network, layer).eval().requires_grad_(False),
        Picture(size=(SIDE, SIDE), frames=(SIDE, SIDE)),
    )
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    found = {}
    try:
        traced = trace(program, images)
    except UserError as error:
        return {"trace": str(error)[:300]}
    for file_format in ("torch", "onnx"):
        try:
            data = encode_model(traced, file_format, "images", {})
            found[file_format] = check_program(data, file_format, program, images)
        except UserError as error:
            found[file_format] = str(error)[:300]
    return found


def attempt(function, *arguments):
    try:
        return function(*arguments) or "right"
    except UserError as error:
        return f"refused: {str(error)[:300]}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:300]}"


def main(names):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for source, known in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in known:
            key = f"{source} {name}"
            if (names and name not in names) or (not names and key in done):
                continue
            started = time.monotonic()
            network = build(source, name)
            images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
            entry, layer = check_layers(network, images)
            if layer is not None:
                entry["layer"] = layer
                entry["step"] = attempt(check_step, network, layer, images)
                entry["export"] = attempt(check_export, network, layer)
            done[key] = entry
            RESULTS.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{key} {time.monotonic() - started:.0f} s {json.dumps(entry)}", flush=True)
            del network
            gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])

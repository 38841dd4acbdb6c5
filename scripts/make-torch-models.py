#!/usr/bin/env python3
"""Makes the ONNX models of exchange/tests/files/torch with PyTorch's own exporters, and records the logits.

    /usr/bin/python3 scripts/make-torch-models.py exchange/tests/files/torch   # Debian's python3-torch
    venv/bin/python scripts/make-torch-models.py exchange/tests/files/torch    # pip install torch onnx onnxscript

Each PyTorch writes the files that its exporter is for, and leaves the other's alone. PyTorch 1.13, as
Debian 12 has it, traces to TorchScript (`script-*.onnx`, operator sets 11 to 17). PyTorch 2.15 goes by way
of torch.export (`dynamo-*.onnx`, operator sets 18 to 23, one with its weights in a second file). Weights and
images are random, of a fixed seed. The logits in `*.json` are PyTorch's own, of the module in eval(), without
the softmax or sigmoid at the end. `scripts/check-onnx.py` shows that onnxruntime agrees.
"""
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROWS = 3
SCRIPT = not hasattr(torch.onnx, "ONNXProgram")


class Net(nn.Module):
    """A network that gives `end` of its logits."""

    def __init__(self, end=nn.Identity()):
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(self.logits(x))


class Lenet(Net):
    """Convolutions and linear layers; `flatten` is how the image becomes a row."""

    def __init__(self, flatten, end=nn.Identity()):
        super().__init__(end)
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.fc1 = nn.Linear(54, 16)
        self.fc2 = nn.Linear(16, 10)
        self.drop = nn.Dropout(0.25)
        self.flatten = flatten

    def logits(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.drop(F.relu(self.fc1(self.flatten(x))))
        return self.fc2(x)


class Block(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = None
        if stride != 1 or inputs != filters:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x):
        short = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += short
        return self.relu(y)


class Resnet(Net):
    """torchvision's ResNet, small."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def logits(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Inverted(nn.Module):
    """torchvision's InvertedResidual."""

    def __init__(self, inputs, filters, stride, top):
        super().__init__()
        wide = 2 * inputs
        self.residual = stride == 1 and inputs == filters
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), top()),
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), top()
            ),
            nn.Conv2d(wide, filters, 1, bias=False),
            nn.BatchNorm2d(filters),
        )

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class Clamp(nn.Module):
    """relu6 in other words."""

    def forward(self, x):
        return torch.clamp(x, 0, 6)


class Mobile(Net):
    """torchvision's MobileNetV2, small; `top` is the activation, and values reach above 6."""

    def __init__(self, top=nn.ReLU6):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), top())
        self.features = nn.Sequential(stem, Inverted(4, 4, 1, top), Inverted(4, 6, 2, top))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 4))

    def logits(self, x):
        x = F.adaptive_avg_pool2d(self.features(8 * x), 1).reshape(x.shape[0], -1)
        return self.classifier(x)


class Dense(Net):
    """A DenseNet: norms before convolutions, concatenations, averages of 2 x 2; images normalised inside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(14), nn.Conv2d(14, 6, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)
        self.norm4, self.classifier = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def logits(self, x):
        x = self.conv0((x - self.mean) / self.std)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        x = self.pool(self.conv3(F.relu(self.norm3(x))))
        return self.classifier(F.relu(self.norm4(x)).mean([2, 3]))


class Smooth(Net):
    """Activations that are no lines: SiLU, GELU, sigmoid and tanh, as modules and in words."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, groups=2)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def logits(self, x):
        x = F.gelu(F.silu(self.conv1(x)))
        x = self.conv2(x)
        x = self.conv3(x * torch.sigmoid(x))
        x = F.avg_pool2d(torch.tanh(self.conv4(x)), 2)
        x = torch.sigmoid(self.fc1(x.flatten(1)))
        return self.fc3(F.gelu(self.fc2(x)))


class Leaky(Net):
    """Leaky ReLU with PyTorch's usual slope, with 0.1, and with a learnt one."""

    def __init__(self):
        super().__init__(nn.Softmax(dim=1))
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 5, 2, 2), nn.LeakyReLU(inplace=True),
            nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.LeakyReLU(0.1),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.PReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3),
        )  # fmt: skip

    def logits(self, x):
        return self.body(x)


class Rows(Net):
    """Linear layers with norms on rows; the rows by view, squeeze and unsqueeze; one output and a sigmoid."""

    def __init__(self):
        super().__init__(nn.Sigmoid())
        self.fc1, self.norm1 = nn.Linear(36, 8), nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 1, bias=False)

    def logits(self, x):
        x = x.squeeze(1).view(-1, 36)
        x = F.hardtanh(self.norm1(self.fc1(x)), 0.0, 6.0)
        return self.fc2(x.unsqueeze(-1).flatten(1))


class Words(Net):
    """What modules do, in functions: padding, ReLU, ReLU6, squares, the largest of an image."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 4, 3, 2), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 3)

    def logits(self, x):
        x = self.conv1(F.pad(x, (0, 1, 1, 0))).clamp(min=0)
        x = F.relu6(self.conv2(4 * x)) ** 2
        return self.fc(torch.flatten(F.adaptive_max_pool2d(self.conv3(x), 1), 1))


def view(x):
    return x.view(x.size(0), -1)


def reshape(x):
    return x.reshape(-1, x.shape[1] * x.shape[2] * x.shape[3])


def flatten(x):
    return torch.flatten(x, 1)


OPEN, FIXED = True, False
GRAY, RGB = [1, 18, 18], [3, 12, 12]
TRAINING = torch.onnx.TrainingMode
# Name, module, images, opset, whether the batch is open, other options of the exporter.
SCRIPTS = [
    ("lenet-view", lambda: Lenet(view, nn.LogSoftmax(1)), GRAY, 11, OPEN, {}),
    ("lenet-flatten", lambda: Lenet(flatten, nn.Softmax(1)), GRAY, 13, FIXED, {}),
    ("lenet-reshape", lambda: Lenet(reshape), GRAY, 12, OPEN, {"do_constant_folding": False}),
    ("lenet-named", lambda: Lenet(nn.Flatten()), GRAY, 14, OPEN, {"keep_initializers_as_inputs": True}),
    ("resnet", Resnet, RGB, 17, OPEN, {}),
    ("resnet-norms", Resnet, RGB, 13, OPEN, {"training": TRAINING.PRESERVE, "do_constant_folding": False}),
    ("mobile", Mobile, RGB, 11, OPEN, {}),
    ("mobile-clamp", lambda: Mobile(Clamp), RGB, 16, FIXED, {"do_constant_folding": False}),
    ("dense", Dense, RGB, 15, OPEN, {"training": TRAINING.PRESERVE, "do_constant_folding": False}),
    ("dense-folded", Dense, RGB, 12, OPEN, {}),
    ("smooth", Smooth, [1, 14, 14], 17, OPEN, {}),
    ("smooth-11", Smooth, [1, 14, 14], 11, FIXED, {}),
    ("leaky", Leaky, [1, 16, 16], 16, OPEN, {}),
    ("rows", Rows, [1, 6, 6], 13, OPEN, {}),
    ("words", Words, [2, 12, 12], 17, OPEN, {}),
    ("training", Rows, [1, 6, 6], 14, OPEN, {"training": TRAINING.TRAINING, "do_constant_folding": False}),
]
DYNAMO = [
    ("lenet-view", lambda: Lenet(view, nn.LogSoftmax(1)), GRAY, 18, OPEN, {}),
    ("lenet-reshape", lambda: Lenet(reshape), GRAY, 20, OPEN, {"optimize": False}),
    ("resnet", Resnet, RGB, None, OPEN, {"external_data": True}),
    ("resnet-norms", Resnet, RGB, 21, FIXED, {"optimize": False}),
    ("mobile", Mobile, RGB, 18, OPEN, {}),
    ("mobile-clamp", lambda: Mobile(Clamp), RGB, 23, FIXED, {}),
    ("dense", Dense, RGB, 20, OPEN, {}),
    ("smooth", Smooth, [1, 14, 14], 20, OPEN, {}),
    ("smooth-18", Smooth, [1, 14, 14], 18, OPEN, {}),
    ("leaky", Leaky, [1, 16, 16], None, OPEN, {}),
    ("rows", Rows, [1, 6, 6], 18, OPEN, {}),
    ("words", Words, [2, 12, 12], 20, OPEN, {}),
]


def made(make):
    """The module in eval(), with weights and statistics as training leaves them."""
    torch.manual_seed(1)
    module = make()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.2, 2.0)
    return module.eval()


def export(module, images, path, opset, batch, options):
    shape = "batch" if batch else None
    names = {"input_names": ["input"], "output_names": ["output"]}
    if SCRIPT:
        axes = {"dynamic_axes": {"input": {0: shape}, "output": {0: shape}} if batch else None}
        torch.onnx.export(module, images, str(path), opset_version=opset, **names, **axes, **options)
        return
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},) if batch else None}
    options = {"external_data": False, "verbose": False, **options}
    torch.onnx.export(module, (images,), str(path), opset_version=opset, dynamo=True, **names, **shapes, **options)
    without_places(path)


def without_places(path):
    """Takes out where each node came from: ten times the rest of a small file, with this machine's paths."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for part in [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""
    path.write_bytes(model.SerializeToString())


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    kind, models = ("script", SCRIPTS) if SCRIPT else ("dynamo", DYNAMO)
    for name, make, shape, opset, batch, options in models:
        path = folder / f"{kind}-{name}.onnx"
        module = made(make)
        # Two figures, so that the file is small.
        images = np.random.default_rng(8).uniform(-1, 1, (ROWS, *shape)).astype(np.float32).round(2)
        images = torch.from_numpy(images)
        with torch.no_grad():
            found = module.logits(images)
        # With one image, an open batch would be taken for a constant.
        export(module, images if batch else images[:1], path, opset, batch, options)
        print(path.name, path.stat().st_size, "bytes", sum(p.numel() for p in module.parameters()), "weights")
        # Training, a normalisation takes the batch's own statistics: that model is there to be refused.
        if options.get("training") == TRAINING.TRAINING:
            continue
        figures = {
            "torch": torch.__version__,
            "shape": shape,
            "images": [[round(float(value), 2) for value in row.ravel()] for row in images],
            "logits": [[float(value) for value in row.ravel()] for row in found],
        }
        path.with_suffix(".json").write_text(json.dumps(figures, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

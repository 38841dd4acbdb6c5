#!/usr/bin/env python3
"""Holds ONNX models against what they should give, under onnxruntime.

    python3 scripts/check-onnx.py model.onnx revealed.onnx      # an original, and what trefoil revealed
    python3 scripts/check-onnx.py FOLDER                        # each NAME.onnx there, and NAME.json beside it

Of two models the logits for random images are compared. A NAME.json holds images and logits: PyTorch's in
exchange/tests/files/torch, the floating-point twin's in what `cargo run -p trefoil-exchange --example
written -- FOLDER` writes. Needs onnx, onnxruntime, numpy. Prints the largest difference of the logits (of
what is before a softmax at the end); exit code 1 above the tolerance. Revealed weights with 16 fraction
bits differ by up to 2^-17.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime

END = ("Softmax", "LogSoftmax", "Sigmoid", "ArgMax", "Identity")


def logits(path, images):
    model = onnx.load(path)
    outputs = {name: node for node in model.graph.node for name in node.output}
    end = model.graph.output[0].name
    while outputs[end].op_type in END:
        end = outputs[end].input[0]
    if end != model.graph.output[0].name:
        model.graph.output.append(onnx.helper.make_tensor_value_info(end, 1, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    info = session.get_inputs()[0]
    shape = [length if isinstance(length, int) else None for length in info.shape[1:]]
    if len(shape) == 3 and shape != list(images.shape[1:]):
        images = images.transpose(0, 2, 3, 1)
    rows = [row.reshape([1, *shape]) for row in images]
    return np.stack([session.run([end], {info.name: row})[0].ravel() for row in rows])


def compare(name, expected, found, tolerance):
    """Whether the logits are far from each other."""
    if expected.shape[1] == 1 and found.shape[1] == 2:  # One output z is there two classes, 0 and z.
        expected = np.concatenate([np.zeros_like(expected), expected], axis=1)
    difference, largest = float(np.abs(expected - found).max()), np.abs(expected).max()
    print(f"{name}: largest difference of {expected.size} logits: {difference:.2e}; largest logit {largest:.2f}")
    return not difference <= tolerance


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=pathlib.Path, help="an ONNX model, or a folder")
    parser.add_argument("revealed", nargs="?", help="its input says the images' shape")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    if args.revealed:
        shape = [d.dim_value for d in onnx.load(args.revealed).graph.input[0].type.tensor_type.shape.dim[1:]]
        images = np.random.default_rng(1).uniform(-1, 1, (16, *shape)).astype(np.float32)
        found = logits(args.revealed, images)
        sys.exit(compare(args.revealed, logits(args.original, images), found, args.tolerance))
    far = []
    for path in sorted(args.original.glob("*.json")):
        figures = json.loads(path.read_text())
        images = np.array(figures["images"], np.float32).reshape([-1, *figures["shape"]])
        found = logits(path.with_suffix(".onnx"), images)
        far.append(compare(path.stem, np.array(figures["logits"], np.float32), found, args.tolerance))
    sys.exit(any(far) or not far)


if __name__ == "__main__":
    main()

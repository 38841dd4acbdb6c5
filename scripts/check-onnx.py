#!/usr/bin/env python3
"""Compares two ONNX models under onnxruntime on random images: an original, and what trefoil revealed.

    python3 scripts/check-onnx.py model.onnx revealed.onnx [--tolerance 1e-3]

Needs onnx, onnxruntime, numpy. Prints the largest difference of the logits (of what is before a softmax
at the end); exit code 1 above the tolerance. Weights with 16 fraction bits differ by up to 2^-17.
"""
import argparse
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("revealed", help="its input says the images' shape")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    shape = [d.dim_value for d in onnx.load(args.revealed).graph.input[0].type.tensor_type.shape.dim[1:]]
    images = np.random.default_rng(1).uniform(-1, 1, (16, *shape)).astype(np.float32)
    original, revealed = logits(args.original, images), logits(args.revealed, images)
    if original.shape[1] == 1:  # One output z is there two classes, 0 and z.
        original = np.concatenate([np.zeros_like(original), original], axis=1)
    difference = float(np.abs(original - revealed).max())
    print(f"largest difference of {original.size} logits: {difference:.2e}; largest logit {np.abs(original).max():.2f}")
    sys.exit(difference > args.tolerance)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes the ONNX models of exchange/tests/files, and records what onnxruntime computes with them.

    python3 scripts/make-onnx-models.py exchange/tests/files

Needs onnx and onnxruntime (PyPI). The keras-*.onnx are exported by Keras itself where keras,
tensorflow-cpu and tf2onnx are installed, and left as they are elsewhere. The others are written with
onnx.helper, in the forms that PyTorch's exporter writes (NCHW, Gemm with transB, names of state_dict)
and in forms that other exporters write. Weights are random, of a fixed seed.
"""
import json
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROWS = 4


class Graph:
    """Nodes and weights, one after the other."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.tensors, self.count = [], [], 0

    def tensor(self, name, array, dtype=np.float32):
        self.tensors.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weights(self, name, *shape):
        fan = max(1, int(np.prod(shape[1:])))
        return self.tensor(name, self.random.normal(size=shape) / np.sqrt(fan))

    def op(self, kind, *reads, **attributes):
        self.count += 1
        output = f"/{kind}_{self.count}_output_0"
        node = helper.make_node(kind, list(reads), [output], name=f"/{kind}_{self.count}", **attributes)
        self.nodes.append(node)
        return output

    def conv(self, name, x, inputs, filters, kernel, **attributes):
        groups = attributes.get("group", 1)
        weight = self.weights(f"{name}.weight", filters, inputs // groups, kernel, kernel)
        bias = self.weights(f"{name}.bias", filters)
        attributes.setdefault("kernel_shape", [kernel, kernel])
        return self.op("Conv", x, weight, bias, **attributes)

    def gemm(self, name, x, inputs, units, **attributes):
        weight = self.weights(f"{name}.weight", units, inputs)
        return self.op("Gemm", x, weight, self.weights(f"{name}.bias", units), transB=1, **attributes)

    def norm(self, name, x, channels, epsilon=1e-5):
        def some(what, low, high):
            return self.tensor(f"{name}.{what}", self.random.uniform(low, high, channels))

        reads = [some("weight", 0.5, 1.5), some("bias", -0.5, 0.5), some("running_mean", -0.5, 0.5)]
        # One variance is tiny, as a channel that hardly changes has it.
        variance = self.random.uniform(0.2, 2, channels)
        variance[0] = 1e-4
        reads.append(self.tensor(f"{name}.running_var", variance))
        return self.op("BatchNormalization", x, *reads, epsilon=epsilon, momentum=0.9)

    def model(self, output, shape, classes, opset, batch="batch"):
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "main_graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, *shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
            self.tensors,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        made.ir_version = 7 if opset < 18 else 10
        onnx.checker.check_model(made)
        return made


def lenet():
    """As PyTorch exports a LeNet: dynamic batch, x.view(x.size(0), -1) with Shape and Gather."""
    g = Graph(1)
    x = g.op("MaxPool", g.op("Relu", g.conv("conv1", "input", 1, 4, 5)), kernel_shape=[2, 2], strides=[2, 2])
    x = g.op("MaxPool", g.op("Relu", g.conv("conv2", x, 4, 6, 5)), kernel_shape=[2, 2], strides=[2, 2])
    batch = g.op("Gather", g.op("Shape", x), g.tensor("zero", 0, np.int64), axis=0)
    batch = g.op("Unsqueeze", batch, axes=[0])
    shape = g.op("Concat", batch, g.op("Constant", value=numpy_helper.from_array(np.array([-1]))), axis=0)
    x = g.op("Relu", g.gemm("fc1", g.op("Reshape", x, shape), 96, 20))
    return g.model(g.op("LogSoftmax", g.gemm("fc2", x, 20, 10), axis=1), [1, 28, 28], 10, 11)


def resnet():
    """A residual net: normalisations, padded max pool, shortcut, global average, opset 18 axes."""
    g = Graph(2)
    x = g.op("Relu", g.norm("bn1", g.conv("conv1", "input", 3, 8, 3, pads=[1] * 4, strides=[2, 2]), 8))
    x = g.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = g.op("Relu", g.norm("layer1.0.bn1", g.conv("layer1.0.conv1", x, 8, 8, 3, pads=[1] * 4), 8))
    y = g.norm("layer1.0.bn2", g.conv("layer1.0.conv2", y, 8, 8, 3, pads=[1] * 4), 8, epsilon=1e-3)
    x = g.op("Relu", g.op("Add", y, x))
    y = g.conv("layer2.0.conv1", x, 8, 12, 3, pads=[1] * 4, strides=[2, 2])
    short = g.conv("layer2.0.downsample.0", x, 8, 12, 1, strides=[2, 2])
    x = g.op("Relu", g.op("Add", y, short))
    x = g.op("ReduceMean", x, g.tensor("axes", [-1, -2], np.int64), keepdims=1)
    x = g.op("Reshape", x, g.tensor("flat", [0, -1], np.int64))
    return g.model(g.gemm("fc", x, 12, 5), [3, 24, 24], 5, 18)


def mobile():
    """Depthwise convolutions, relu6 as Clip with operands, dilation, dropout, a fixed batch of 1."""
    g = Graph(3)
    low, high = g.tensor("low", 0.0), g.tensor("high", 6.0)
    x = g.op("Clip", g.conv("stem", "input", 3, 6, 3, pads=[0, 0, 1, 1], strides=[2, 2]), low, high)
    x = g.op("Clip", g.conv("depthwise", x, 6, 6, 3, pads=[1] * 4, group=6), low, high)
    x = g.conv("pointwise", x, 6, 8, 1)
    x = g.op("LeakyRelu", g.conv("dilated", x, 8, 8, 3, pads=[2] * 4, dilations=[2, 2], group=2), alpha=0.125)
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    x = g.op("Gemm", g.op("Dropout", x), g.weights("head.weight", 8, 4), g.weights("head.bias", 4), alpha=0.5, beta=2.0)
    return g.model(g.op("Softmax", x, axis=-1), [3, 16, 16], 4, 13, batch=1)


def forms():
    """Forms of other exporters: auto_pad, count_include_pad, ceil_mode, Pad, constants, Concat, PRelu."""
    g = Graph(4)
    # x / 2 - 0.25, before the first layer.
    x = g.op("Sub", g.op("Mul", "input", g.tensor("half", 0.5)), g.tensor("quarter", [[[0.25]], [[0.5]]]))
    a = g.conv("a", x, 2, 4, 3, auto_pad="SAME_UPPER", strides=[2, 2])
    b = g.op("Conv", x, g.weights("b.weight", 4, 2, 4, 4), kernel_shape=[4, 4], auto_pad="SAME_LOWER", strides=[2, 2])
    b = g.op("Add", b, g.tensor("b.bias", g.random.normal(size=(1, 4, 1, 1))))
    x = g.op("Relu", g.op("Concat", a, b, axis=1))
    x = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    pads = g.tensor("pads", [0, 0, 1, 0, 0, 0, 0, 1], np.int64)
    x = g.op("PRelu", g.conv("c", g.op("Pad", x, pads), 8, 4, 3), g.tensor("slope", [0.25]))
    x = g.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[1] * 4, count_include_pad=1)
    x = g.op("Identity", g.op("Flatten", x, axis=1))
    x = g.op("MatMul", x, g.weights("dense", 4 * 2 * 2, 3))
    return g.model(g.op("Add", g.tensor("dense.bias", [0.5, -0.5, 0.25]), x), [2, 11, 11], 3, 17)


def pools():
    """Pools over the edges, of values of both signs: pads, ceil_mode, count_include_pad, auto_pad, Pad."""
    g = Graph(9)
    x = g.conv("a", "input", 2, 4, 3, pads=[1] * 4)
    # 13x12 becomes 7x7; the last column of windows is cut.
    edge = dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=1)
    around = g.op("Pad", x, g.tensor("around", [0, 0, 1, 1, 0, 0, 1, 2], np.int64))
    x = g.op(
        "Concat",
        g.op("MaxPool", x, **edge),
        g.op("AveragePool", x, **edge),
        g.op("AveragePool", x, count_include_pad=1, **edge),
        g.op("MaxPool", around, kernel_shape=[3, 3], strides=[2, 2]),
        axis=1,
    )
    x = g.conv("b", x, 16, 3, 1)
    y = g.op("Relu", x)
    all_sides = g.op("Pad", y, g.tensor("all_sides", [0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    two_sides = g.op("Pad", y, g.tensor("two_sides", [0, 0, 1, 1, 0, 0, 0, 0], np.int64))
    three, two = dict(kernel_shape=[3, 3], strides=[2, 2]), dict(kernel_shape=[2, 2], strides=[2, 2])
    x = g.op(
        "Concat",
        g.op("MaxPool", all_sides, **three),
        g.op("AveragePool", all_sides, **three),
        g.op("AveragePool", two_sides, pads=[0, 0, 1, 1], **three),
        g.op("AveragePool", y, auto_pad="SAME_UPPER", **two),
        g.op("MaxPool", x, auto_pad="SAME_LOWER", **two),
        axis=1,
    )
    return g.model(g.gemm("fc", g.op("Flatten", x), 15 * 4 * 4, 4), [2, 13, 12], 4, 13)


def binary():
    """One output and a sigmoid, on pictures that arrive flat."""
    g = Graph(5)
    x = g.op("Reshape", "input", g.tensor("picture", [-1, 1, 8, 8], np.int64))
    x = g.op("Relu", g.conv("conv", x, 1, 3, 3))
    x = g.op("GlobalMaxPool", x)
    x = g.op("Squeeze", x, g.tensor("axes", [2, 3], np.int64))
    return g.model(g.op("Sigmoid", g.gemm("fc", x, 3, 1)), [64], 1, 21)


def keras_models():
    """What Keras itself exports: NHWC with transposes, flattening in that order, Pad, folded norms."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(6)

    def cnn():
        x = image = keras.Input((14, 14, 1))
        x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
        x = layers.ZeroPadding2D(((0, 1), (1, 0)))(x)
        x = layers.Conv2D(6, 3, strides=2)(x)
        x = layers.LeakyReLU(negative_slope=0.25)(x)
        x = layers.Dropout(0.5)(layers.Flatten()(x))
        x = layers.Dense(12, activation="relu")(x)
        return keras.Model(image, layers.Dense(5, activation="softmax")(x))

    def mobile():
        x = image = keras.Input((16, 16, 3))
        x = layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(6, 1, use_bias=False)(y))
        x = layers.Concatenate()([layers.Add()([x, y]), layers.AveragePooling2D(1)(x)])
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(image, layers.Dense(4)(x))

    random = np.random.default_rng(7)
    for name, make in [("keras-cnn", cnn), ("keras-mobile", mobile)]:
        model = make()
        model(np.zeros((1, *model.input_shape[1:]), np.float32))
        for weight in model.weights:
            if weight.name in ("bias", "beta", "moving_mean"):
                weight.assign(random.normal(size=weight.shape) / 4)
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(random.uniform(0.5, 1.5, weight.shape))
        yield name, model


def record(path, model):
    """What onnxruntime computes: the logits, before a softmax or sigmoid at the end."""
    graph = model.graph
    end = graph.output[0].name
    by_output = {name: node for node in graph.node for name in node.output}
    last = by_output[end]
    while last.op_type in ("Softmax", "LogSoftmax", "Sigmoid", "Identity"):
        end = last.input[0]
        last = by_output[end]
    known = {info.name for info in graph.output}
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    if end not in known:
        copy.graph.output.append(helper.make_tensor_value_info(end, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    info = session.get_inputs()[0]
    shape = [length for length in info.shape[1:]]
    # Images of the embedded kind, about 0 to 1 and normalised; four figures fit into a small file.
    images = np.random.default_rng(8).uniform(-1, 1, (ROWS, *shape)).astype(np.float32).round(2)
    rows = [session.run([end], {info.name: row[None]})[0].ravel() for row in images]
    figures = {
        "onnxruntime": onnxruntime.__version__,
        "shape": shape,
        "images": [[round(float(value), 2) for value in row.ravel()] for row in images],
        "logits": [[float(value) for value in row] for row in rows],
    }
    path.write_text(json.dumps(figures, separators=(",", ":")) + "\n")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"torch-lenet": lenet, "torch-resnet": resnet, "torch-mobile": mobile}
    makers |= {"forms": forms, "pools": pools, "binary": binary}
    for name, make in makers.items():
        onnx.save(make(), folder / f"{name}.onnx")
    try:
        for name, model in keras_models():
            model.export(str(folder / f"{name}.onnx"), format="onnx", verbose=False)
    except ImportError as error:
        print(f"the Keras models are left as they are: {error}")
    for path in sorted(folder.glob("*.onnx")):
        record(path.with_suffix(".json"), onnx.load(path))
        print(path.name, path.stat().st_size, "bytes, opset", onnx.load(path).opset_import[0].version)


if __name__ == "__main__":
    main()

//! Small graphs, written node by node: what is refused and with which words, and what no exporter at hand
//! writes but the standard allows.

use ndarray::{Array2, ArrayD};
use prost::Message;
use trefoil_exchange::onnx::proto::{
    Attribute, Dimension, Entry, Graph, Model, Node, Opset, Shape, Tensor, TensorType, Type,
    ValueInfo,
};
use trefoil_exchange::onnx::{self, Understood};
use trefoil_exchange::{ExchangeError, Weights};
use trefoil_models::float;
use trefoil_models::network::{Curve, LayerKind, Network, Window};
use trefoil_protocol::fixed::encode;

const FRAC_BITS: u32 = 24;

fn node(op: &str, reads: &[&str], gives: &str) -> Node {
    Node {
        input: reads.iter().map(|name| (*name).into()).collect(),
        output: vec![gives.into()],
        name: format!("the {gives}"),
        op_type: op.into(),
        ..Node::default()
    }
}

fn with(mut node: Node, name: &str, ints: &[i64]) -> Node {
    node.attribute.push(Attribute {
        name: name.into(),
        i: ints[0],
        ints: ints.to_vec(),
        ..Attribute::default()
    });
    node
}

fn text(mut node: Node, name: &str, value: &'static str) -> Node {
    node.attribute.push(Attribute {
        name: name.into(),
        s: value.as_bytes().into(),
        ..Attribute::default()
    });
    node
}

fn floats(name: &str, dims: &[i64], values: &[f32]) -> Tensor {
    Tensor {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: 1,
        float_data: values.to_vec(),
        ..Tensor::default()
    }
}

fn ints(name: &str, values: &[i64]) -> Tensor {
    Tensor {
        name: name.into(),
        dims: vec![values.len() as i64],
        data_type: 7,
        int64_data: values.to_vec(),
        ..Tensor::default()
    }
}

/// A model on images `[1, 2, 2]` whose output is called "out".
fn model(node: Vec<Node>, initializer: Vec<Tensor>) -> Model {
    let info = |name: &str, lengths: &[i64]| {
        let dim = lengths.iter().map(|value| Dimension {
            value: *value,
            param: String::new(),
        });
        let shape = Some(Shape { dim: dim.collect() });
        let tensor = Some(TensorType {
            elem_type: 1,
            shape,
        });
        ValueInfo {
            name: name.into(),
            ty: Some(Type { tensor }),
        }
    };
    Model {
        opset_import: vec![Opset {
            domain: String::new(),
            version: 20,
        }],
        graph: Some(Graph {
            node,
            initializer,
            input: vec![info("in", &[1, 1, 2, 2])],
            output: vec![info("out", &[1, 4])],
            ..Graph::default()
        }),
        ..Model::default()
    }
}

fn read(node: Vec<Node>, initializer: Vec<Tensor>) -> Result<Understood, ExchangeError> {
    onnx::read(&model(node, initializer).encode_to_vec(), None)
}

fn refused(node: Vec<Node>, initializer: Vec<Tensor>) -> String {
    read(node, initializer)
        .expect_err("it is no model for us")
        .to_string()
}

/// `x / 2 + 1 / 4` for each pixel, called "conv".
fn conv() -> Node {
    node("Conv", &["in", "w", "b"], "conv")
}

fn weights() -> Vec<Tensor> {
    vec![
        floats("w", &[1, 1, 1, 1], &[0.5]),
        floats("b", &[1], &[0.25]),
        floats("two", &[], &[2.0]),
        floats("one", &[], &[1.0]),
        floats("root", &[], &[std::f32::consts::SQRT_2]),
        floats("half", &[], &[0.5]),
    ]
}

const PIXELS: [f32; 4] = [-2.0, -0.25, 0.5, 1.0];

/// What a model gives for an image of [`PIXELS`], beside what is expected of each value of [`conv`].
fn gives(found: &Understood, expected: impl Fn(f64) -> f64) {
    let words = found.weights.iter().map(|(name, array)| {
        let bits = found.network.kept_frac_bits(name, FRAC_BITS as u8);
        let words = array.iter().map(|value| encode(*value, bits.into()));
        let words = words.collect();
        let tensor = trefoil_protocol::Tensor::new(array.shape().to_vec(), words);
        (name.clone(), tensor)
    });
    let words = words.collect();
    let twin = float::Model::from_weights(&found.network, &words, FRAC_BITS).expect("they fit");
    let images = Array2::from_shape_vec((1, 4), PIXELS.to_vec()).expect("one image");
    let logits = twin.logits(images.view()).expect("it fits");
    for (found, pixel) in logits.iter().zip(PIXELS) {
        let expected = expected(f64::from(pixel) / 2.0 + 0.25);
        assert!(
            (f64::from(*found) - expected).abs() < 1e-5,
            "{logits} for {PIXELS:?}"
        );
    }
}

fn kinds(found: &Understood) -> Vec<LayerKind> {
    let layers = found.network.layers.iter();
    layers.map(|layer| layer.kind.clone()).collect()
}

#[test]
fn a_layer_that_several_read_keeps_its_weights_whatever_stands_between() {
    let pool = with(node("MaxPool", &["conv"], "same"), "kernel_shape", &[1, 1]);
    let between = [
        node("Identity", &["conv"], "same"),
        node("Dropout", &["conv"], "same"),
        with(node("Cast", &["conv"], "same"), "to", &[1]),
        node("CastLike", &["conv", "two"], "same"),
        with(node("Transpose", &["conv"], "same"), "perm", &[0, 1, 2, 3]),
        node("Reshape", &["conv", "shape"], "same"),
        node("Pad", &["conv", "none"], "same"),
        node("Sum", &["conv"], "same"),
        with(node("Concat", &["conv"], "same"), "axis", &[1]),
        pool,
    ];
    for between in between {
        let op = between.op_type.clone();
        let mut constants = weights();
        constants.extend([ints("shape", &[-1, 1, 2, 2]), ints("none", &[0; 8])]);
        let nodes = vec![
            conv(),
            between,
            node("Mul", &["same", "two"], "doubled"),
            node("Relu", &["same"], "relu"),
            node("Add", &["doubled", "relu"], "sum"),
            node("Flatten", &["sum"], "out"),
        ];
        let found = read(nodes, constants).unwrap_or_else(|error| panic!("{op}: {error}"));
        gives(&found, |x| 2.0 * x + x.max(0.0));
    }
    // One reader alone: the factor goes into the weights. Who asks for a shape or a type reads nothing.
    let nodes = vec![
        conv(),
        node("Mul", &["conv", "factor"], "doubled"),
        node("Shape", &["conv"], "shape"),
        node("Reshape", &["doubled", "shape"], "shaped"),
        node("CastLike", &["two", "conv"], "factor"),
        node("Flatten", &["shaped"], "out"),
    ];
    let [a, b, c, d, e, f] = nodes.try_into().expect("six");
    let found = read(vec![a, e, b, c, d, f], weights()).expect("it is read");
    assert_eq!(kinds(&found).len(), 1, "{:?}", kinds(&found));
    gives(&found, |x| 2.0 * x);
}

#[test]
fn activations_of_several_nodes_become_one_layer_and_what_only_looks_alike_does_not() {
    let gelu = |product: Vec<Node>| {
        let mut nodes = vec![
            conv(),
            node("Div", &["conv", "root"], "scaled"),
            node("Erf", &["scaled"], "erf"),
            node("Add", &["one", "erf"], "gate"),
        ];
        nodes.extend(product);
        nodes.push(node("Flatten", &["gelu"], "out"));
        read(nodes, weights())
    };
    let orders = [
        // As PyTorch's two exporters and Keras write it, and by a division.
        vec![
            node("Mul", &["conv", "gate"], "twice"),
            node("Mul", &["twice", "half"], "gelu"),
        ],
        vec![
            node("Mul", &["half", "gate"], "part"),
            node("Mul", &["conv", "part"], "gelu"),
        ],
        vec![
            node("Mul", &["half", "conv"], "part"),
            node("Mul", &["gate", "part"], "gelu"),
        ],
        vec![
            node("Mul", &["gate", "conv"], "twice"),
            node("Div", &["twice", "two"], "gelu"),
        ],
    ];
    let single = read(
        vec![
            conv(),
            text(node("Gelu", &["conv"], "gelu"), "approximate", "none"),
            node("Flatten", &["gelu"], "out"),
        ],
        weights(),
    );
    for found in orders.into_iter().map(gelu).chain([single]) {
        let found = found.expect("it is read");
        assert_eq!(kinds(&found)[1..], [LayerKind::Smooth(Curve::Gelu)]);
        gives(&found, |x| Curve::Gelu.value(x));
    }
    // Not the half of it, and not of one value.
    let said = gelu(vec![node("Mul", &["conv", "gate"], "gelu")])
        .expect_err("no GELU")
        .to_string();
    assert!(
        said.contains("\"the erf\" (Erf): this operation is not supported"),
        "{said}"
    );
    let silu = |on: &str| {
        let nodes = vec![
            conv(),
            node("Relu", &["conv"], "relu"),
            node("Sigmoid", &["conv"], "gate"),
            node("Mul", &["gate", on], "silu"),
            node("Add", &["silu", "relu"], "sum"),
            node("Add", &["sum", "gate"], "more"),
            node("Flatten", &["more"], "out"),
        ];
        read(nodes, weights())
    };
    // The sigmoid is read elsewhere too, and is a layer of its own there.
    let found = silu("conv").expect("it is read");
    gives(&found, |x| {
        Curve::Silu.value(x) + x.max(0.0) + Curve::Sigmoid.value(x)
    });
    let said = silu("relu").expect_err("another value").to_string();
    assert!(
        said.contains("node 4 \"the silu\" (Mul): Mul of two layers"),
        "{said}"
    );
    for (op, reads, expected) in [
        ("Max", ["conv", "zero"], LayerKind::Relu),
        ("Max", ["zero", "conv"], LayerKind::Relu),
        ("Pow", ["conv", "two"], LayerKind::Square),
    ] {
        let nodes = vec![
            conv(),
            node(op, &reads, "x"),
            node("Flatten", &["x"], "out"),
        ];
        let mut constants = weights();
        constants.push(floats("zero", &[1], &[0.0]));
        assert_eq!(
            kinds(&read(nodes, constants).expect("it is read"))[1..],
            [expected]
        );
    }
    // A ReLU before a ReLU6 is part of it, unless it is read elsewhere too.
    let capped = |behind: Node| {
        let relu = node("Relu", &["conv"], "relu");
        let cap = node("Clip", &["relu", "zero", "six"], "capped");
        let nodes = vec![conv(), relu, cap, behind, node("Flatten", &["x"], "out")];
        let mut constants = weights();
        constants.extend([floats("zero", &[], &[0.0]), floats("six", &[], &[6.0])]);
        kinds(&read(nodes, constants).expect("it is read"))[1..].to_vec()
    };
    assert_eq!(
        capped(node("Identity", &["capped"], "x")),
        [LayerKind::Relu6]
    );
    assert_eq!(
        capped(node("Add", &["capped", "relu"], "x")),
        [LayerKind::Relu, LayerKind::Relu6, LayerKind::Add]
    );
    let tanh = text(node("Gelu", &["conv"], "out"), "approximate", "tanh");
    let said = refused(vec![conv(), tanh], weights());
    assert!(said.contains("\"tanh\""), "{said}");
}

#[test]
fn what_is_computed_of_constants_is_what_the_standard_says() {
    // Biases as torch.export writes them where there are none: a zero, as often as there are filters.
    let nodes = vec![
        with(node("Shape", &["w"], "filters"), "end", &[1]),
        node("Expand", &["nothing", "filters"], "biases"),
        node("Conv", &["in", "w", "biases"], "conv"),
        node("Cast", &["seven halves"], "whole"),
        node("Sub", &["conv", "whole"], "less"),
        node("Flatten", &["less"], "out"),
    ];
    let mut constants = weights();
    constants.extend([
        floats("nothing", &[], &[0.0]),
        floats("seven halves", &[], &[3.5]),
    ]);
    let [a, b, c, cast, d, e] = nodes.try_into().expect("six");
    let nodes = vec![a, b, c, with(cast, "to", &[7]), d, e];
    // The bias of a quarter is not read.
    gives(&read(nodes, constants).expect("it is read"), |x| {
        x - 0.25 - 3.0
    });

    // Pads as TorchScript writes them: pairs from the last axis on, turned round.
    let nodes = vec![
        node(
            "Slice",
            &["pairs", "last", "before", "rows", "back"],
            "turned",
        ),
        with(node("Transpose", &["turned"], "sides"), "perm", &[1, 0]),
        node("Reshape", &["sides", "flat"], "pads"),
        node("Pad", &["in", "pads"], "padded"),
        with(
            node("Conv", &["padded", "kernel", "b"], "conv"),
            "strides",
            &[2, 2],
        ),
        node("Flatten", &["conv"], "out"),
    ];
    let mut constants = weights();
    constants.extend([
        Tensor {
            dims: vec![4, 2],
            ..ints("pairs", &[1, 0, 2, 0, 0, 0, 0, 0])
        },
        ints("last", &[-1]),
        ints("before", &[i64::MIN + 1]),
        ints("rows", &[0]),
        ints("back", &[-1]),
        ints("flat", &[-1]),
        // The lower right of each window.
        floats("kernel", &[1, 1, 2, 2], &[0.0, 0.0, 0.0, 1.0]),
    ]);
    // Two rows above and a column to the left: windows at (0, 0) and (2, 0) of 4 x 3, one pixel a row.
    let found = read(nodes.clone(), constants.clone()).expect("it is read");
    assert_eq!(found.network.classes, 2, "{}", found.network.to_toml());
    let kernel = found.weights.values().find(|array| array.ndim() == 4);
    assert_eq!(kernel.map(|array| array.shape()), Some(&[1, 1, 4, 3][..]));
    constants[weights().len() + 4] = ints("back", &[0]);
    let said = refused(nodes, constants);
    assert!(said.contains("(Slice): steps of 0"), "{said}");

    let concat = with(node("Concat", &["shape", "two"], "target"), "axis", &[0]);
    let mut constants = weights();
    constants.push(ints("shape", &[-1]));
    let nodes = vec![conv(), concat, node("Reshape", &["conv", "target"], "out")];
    let said = refused(nodes, constants);
    assert!(
        said.contains("(Concat): constants of different numbers of axes"),
        "{said}"
    );
    let expand = node("Expand", &["b", "huge"], "biases");
    let mut constants = weights();
    constants.push(ints("huge", &[1 << 30, 1 << 30]));
    let said = refused(
        vec![expand, node("Conv", &["in", "w", "biases"], "out")],
        constants,
    );
    assert!(
        said.contains("(Expand)") && said.contains("more than"),
        "{said}"
    );
}

#[test]
fn what_would_be_read_as_something_else_is_refused_with_its_place() {
    let flat = node("Flatten", &["x"], "out");
    let behind = |x: Node| vec![conv(), x, flat.clone()];
    let relu = node("Relu", &["conv"], "relu");
    let clip = |low: &str, high: &str| {
        let clip = node("Clip", &["conv", low, high], "x");
        vec![conv(), relu.clone(), clip, flat.clone()]
    };
    let pad = node("Pad", &["conv", "pads"], "padded");
    let cases = [
        (
            behind(with(node("Cast", &["conv"], "x"), "to", &[7])),
            "node 2 \"the x\" (Cast): to something else than floats",
        ),
        (clip("relu", "two"), "(Clip): min is no constant"),
        (clip("", "relu"), "(Clip): max is no constant"),
        (clip("one", "two"), "(Clip): from 1 to 2"),
        (
            behind(node("Max", &["conv", "two"], "x")),
            "(Max): of something else than a layer and 0",
        ),
        (
            behind(node("Pow", &["conv", "one"], "x")),
            "(Pow): other powers than 2",
        ),
        (clip("", ""), "(Clip): from -inf to inf"),
        (
            behind(with(node("Concat", &["conv", "two"], "x"), "axis", &[1])),
            "(Concat): of something else than layers",
        ),
        (
            behind(with(node("Concat", &["conv", "conv"], "x"), "axis", &[2])),
            "(Concat): of something else than layers, along their channels",
        ),
        (
            vec![
                conv(),
                pad.clone(),
                node("Add", &["padded", "two"], "x"),
                flat.clone(),
            ],
            "(Add): behind Pad",
        ),
        (
            vec![conv(), pad, node("Relu", &["padded"], "x"), flat.clone()],
            "(Relu): behind Pad",
        ),
        (
            // The ReLU gives its shape alone, and would be the network's last layer.
            vec![
                conv(),
                node("Flatten", &["conv"], "flat"),
                node("Relu", &["flat"], "relu"),
                node("Shape", &["relu"], "shape"),
                node("Reshape", &["flat", "shape"], "out"),
            ],
            "the output \"out\" is not of the last layer",
        ),
        (
            vec![
                conv(),
                node("Relu", &["conv"], "conv"),
                node("Flatten", &["conv"], "out"),
            ],
            "node 2 \"the conv\" (Relu): gives \"conv\" for the second time",
        ),
        (
            vec![
                node("Conv", &["in", "w"], "two"),
                node("Flatten", &["two"], "out"),
            ],
            "(Conv): gives \"two\" for the second time",
        ),
        (
            behind(node("CastLike", &["conv", "pads"], "x")),
            "(CastLike): to something else than floats",
        ),
        (
            // A half, as an integer, is 0, and the clip a ReLU.
            vec![
                conv(),
                node("CastLike", &["half", "pads"], "zero"),
                node("Clip", &["conv", "zero"], "x"),
                flat.clone(),
            ],
            "(CastLike): to something else than floats",
        ),
    ];
    for (nodes, expected) in cases {
        let mut constants = weights();
        constants.push(ints("pads", &[0, 0, 1, 1, 0, 0, 1, 1]));
        let said = refused(nodes, constants);
        assert!(said.contains(expected), "{said}\n{expected}");
    }
    let file = model(vec![node("Flatten", &["in"], "out")], vec![]).encode_to_vec();
    let said = onnx::read(&file, Some([1, 1 << 20, 1 << 20]))
        .expect_err("too large")
        .to_string();
    assert!(said.contains("more than 16777216 values"), "{said}");
    // A module that was exported while it trained takes each batch's own mean.
    let training = include_bytes!("files/torch/script-training.onnx");
    let said = onnx::read(training, None)
        .expect_err("it is of training")
        .to_string();
    assert!(
        said.starts_with(
            "node 6 \"/norm1/BatchNormalization\" (BatchNormalization): training_mode = 1"
        ),
        "{said}"
    );
}

/// A dense layer of so many units, "z", before these nodes.
fn classifier(units: usize, ends: Vec<Node>) -> Result<Understood, ExchangeError> {
    let mut nodes = vec![
        node("Flatten", &["in"], "flat"),
        node("Gemm", &["flat", "dense"], "z"),
    ];
    nodes.extend(ends);
    let dense = floats("dense", &[4, units as i64], &vec![0.5; 4 * units]);
    read(nodes, vec![dense])
}

#[test]
fn an_end_is_left_out_only_where_it_is_what_a_job_reveals_of_the_classes() {
    let end = |op: &str, axis: &[i64]| match axis {
        [] => node(op, &["z"], "out"),
        axis => with(node(op, &["z"], "out"), "axis", axis),
    };
    let two = |first: &str, second: &str| {
        let last = with(node(second, &["p"], "out"), "axis", &[1]);
        vec![node(first, &["z"], "p"), last]
    };
    for ends in [
        vec![end("Softmax", &[])],
        vec![end("LogSoftmax", &[1])],
        vec![end("ArgMax", &[-1])],
        two("Softmax", "ArgMax"),
        two("LogSoftmax", "ArgMax"),
        two("LogSoftmax", "Softmax"),
    ] {
        let found = classifier(3, ends).expect("it is read");
        assert_eq!(kinds(&found), [LayerKind::Dense { units: 3 }]);
    }
    // Over the batch, or over the one output: whatever the images are, probability 1 or class 0.
    let no_classes = "which has no several classes";
    let unsupported = "this operation is not supported";
    let own = Node {
        domain: "own.operations".into(),
        ..end("Softmax", &[])
    };
    for (units, ends, expected) in [
        (3, vec![end("Softmax", &[0])], no_classes),
        (3, vec![end("ArgMax", &[])], no_classes),
        (3, vec![end("ArgMax", &[2])], "axes [2] of 2 axes"),
        (1, vec![end("Softmax", &[1])], no_classes),
        (1, vec![end("ArgMax", &[1])], no_classes),
        (3, two("Softmax", "Softmax"), unsupported),
        (3, two("Softmax", "LogSoftmax"), unsupported),
        (3, two("ArgMax", "Softmax"), unsupported),
        (3, vec![own], "own.operations"),
    ] {
        let said = classifier(units, ends)
            .expect_err("it is something else")
            .to_string();
        assert!(said.contains(expected), "{said}\n{expected}");
    }
}

#[test]
fn small_files_take_no_long_time_and_no_overflow() {
    // Each sum reads the one before twice.
    let mut nodes = vec![node("Relu", &["in"], "x0")];
    for at in 0..100 {
        let before = format!("x{at}");
        nodes.push(node("Add", &[&before, &before], &format!("x{}", at + 1)));
    }
    nodes.extend([
        node("Pad", &["x100", "pads"], "padded"),
        with(
            node("MaxPool", &["padded"], "pool"),
            "kernel_shape",
            &[2, 2],
        ),
        node("Flatten", &["pool"], "flat"),
        node("Gemm", &["flat", "dense"], "out"),
    ]);
    let constants = vec![
        ints("pads", &[0, 0, 1, 1, 0, 0, 1, 1]),
        floats("dense", &[9, 3], &[0.5; 27]),
    ];
    let found = read(nodes, constants).expect("it is read");
    assert!(
        kinds(&found).contains(&LayerKind::MaxPool(Window {
            size: [2, 2],
            stride: [1, 1],
            pads: [1; 4],
        })),
        "{:?}",
        kinds(&found)
    );

    let many = || node("ConstantOfShape", &["many"], "zeros");
    let cases = [
        (
            vec![many(), node("Unsqueeze", &["two", "zeros"], "out")],
            "16777216 axes; at most 8 axes",
        ),
        (
            vec![many(), node("Unsqueeze", &["in", "zeros"], "out")],
            "16777216 axes; at most 8 axes",
        ),
        (
            vec![many(), node("Reshape", &["in", "zeros"], "out")],
            "to 16777216 axes; at most 8",
        ),
        (
            vec![many(), node("Reshape", &["two", "zeros"], "out")],
            "16777216 axes; at most 8",
        ),
        (
            vec![
                many(),
                node("Slice", &["two", "zeros", "zeros", "zeros"], "out"),
            ],
            "16777216 starts for 0 axes",
        ),
        (
            vec![node("Slice", &["plane", "shape", "shape", "twice"], "out")],
            "(Slice): an axis twice",
        ),
        (
            vec![node("Concat", &["nothing", "nothing"], "out")],
            "shape [4611686018427387904, 0] is not possible",
        ),
    ];
    for (nodes, expected) in cases {
        let mut constants = weights();
        constants.extend([
            ints("many", &[1 << 24]),
            floats("plane", &[1, 2], &[0.0; 2]),
            ints("shape", &[0, 1]),
            ints("twice", &[1, -1]),
            Tensor {
                dims: vec![1 << 62, 0],
                ..floats("nothing", &[], &[])
            },
        ]);
        let said = refused(nodes, constants);
        assert!(said.contains(expected), "{said}\n{expected}");
    }
}

#[test]
fn weights_in_another_file_are_read_from_beside_the_model_and_from_nowhere_else() {
    let entry = |key: &str, value: &str| Entry {
        key: key.into(),
        value: value.into(),
    };
    let stored = |entries: &[(&str, &str)]| {
        let mut constants = weights();
        constants[0].float_data.clear();
        constants[0].data_location = 1;
        constants[0].external_data = entries
            .iter()
            .map(|(key, value)| entry(key, value))
            .collect();
        let nodes = vec![conv(), node("Flatten", &["conv"], "out")];
        model(nodes, constants).encode_to_vec()
    };
    let beside = |name: &str| match name {
        "w.data" => Ok([[9u8; 4], 0.5f32.to_le_bytes()].concat()),
        _ => Err(format!("no file {name}")),
    };
    for whole in [
        &[("location", "w.data"), ("offset", "4"), ("length", "4")][..],
        &[("location", "w.data"), ("offset", "4")],
    ] {
        let found = onnx::read_with(&stored(whole), &beside, None).expect("it is read");
        gives(&found, |x| x);
    }
    let huge = usize::MAX.to_string();
    let cases: [(&[(&str, &str)], &str); 9] = [
        (&[("location", "other.data")], "no file other.data"),
        (
            &[("location", "../w.data")],
            "a file beside the model is possible",
        ),
        (
            &[("location", "/w.data")],
            "a file beside the model is possible",
        ),
        (&[("location", "..")], "a file beside the model is possible"),
        (&[], "a file beside the model is possible"),
        (&[("location", "w.data")], "8 bytes, but shape [1, 1, 1, 1]"),
        (
            &[("location", "w.data"), ("offset", "6")],
            "2 bytes, but shape",
        ),
        (
            &[("location", "w.data"), ("offset", &huge), ("length", &huge)],
            "0 elements",
        ),
        (&[("location", "w.data"), ("offset", "-4")], "offset \"-4\""),
    ];
    for (entries, expected) in cases {
        let said = onnx::read_with(&stored(entries), &beside, None);
        let said = said.expect_err("nothing to read").to_string();
        assert!(
            said.contains("node 1 \"the conv\" (Conv): tensor \"w\": "),
            "{said}"
        );
        assert!(said.contains(expected), "{said}\n{expected}");
    }
    // Each file may be large, and all of them together not.
    let mut many = Model::decode(&stored(&[("location", "0")])[..]).expect("as written");
    let graph = many.graph.as_mut().expect("it has one");
    let tensor = graph.initializer[0].clone();
    graph.initializer = (0..3)
        .map(|at| Tensor {
            name: format!("w{at}"),
            external_data: vec![entry("location", &at.to_string()), entry("length", "4")],
            ..tensor.clone()
        })
        .collect();
    graph.node = vec![
        node("Conv", &["in", "w0"], "c0"),
        node("Conv", &["c0", "w1"], "c1"),
        node("Conv", &["c1", "w2"], "out"),
    ];
    let large = |_: &str| Ok(vec![0u8; 200 << 20]);
    let said = onnx::read_with(&many.encode_to_vec(), &large, None)
        .expect_err("600 MiB")
        .to_string();
    assert!(
        said.contains("tensor \"w2\": files of more than 536870912 bytes in all"),
        "{said}"
    );
    let said = onnx::read(&stored(&[("location", "w.data")]), None)
        .expect_err("alone")
        .to_string();
    assert!(
        said.contains("its values are in another file, \"w.data\""),
        "{said}"
    );
}

#[test]
fn where_an_exporter_found_its_nodes_may_be_long_and_what_is_read_may_not() {
    let field = |tag: u8, content: &[u8]| {
        let mut field = vec![tag << 3 | 2];
        let mut length = content.len();
        while length > 127 {
            field.push((length & 127) as u8 | 128);
            length >>= 7;
        }
        field.push(length as u8);
        field.extend(content);
        field
    };
    let long = vec![b'x'; 3 << 20];
    let file = |tag: u8| {
        let mut found = model(vec![], weights());
        let graph = found.graph.take().expect("it has one");
        let conv = [conv().encode_to_vec(), field(tag, &long)].concat();
        let flat = node("Flatten", &["conv"], "out").encode_to_vec();
        let graph = [graph.encode_to_vec(), field(1, &conv), field(1, &flat)].concat();
        onnx::read(&[found.encode_to_vec(), field(7, &graph)].concat(), None)
    };
    // Documentation, and the name and value of each place.
    for skipped in [6, 9] {
        gives(&file(skipped).expect("it is read"), |x| x);
    }
    let said = file(3).expect_err("a name of megabytes").to_string();
    assert!(said.contains("bytes besides weights"), "{said}");
}

#[test]
fn a_layer_may_be_called_as_the_output_is() {
    let text = "name = \"n\"\ninput = [1, 2, 2]\nclasses = 2\n\
        [[layer]]\nname = \"logits\"\nkind = \"dense\"\n";
    let network = Network::parse(text).expect("valid");
    let array = |shape: &[usize]| ArrayD::from_elem(shape, 0.5);
    let weights = Weights::from([
        ("logits.weight".to_owned(), array(&[4, 2])),
        ("logits.bias".to_owned(), array(&[2])),
    ]);
    let out = onnx::write(&network, &weights).expect("it is written");
    let graph = Model::decode(out.as_slice())
        .expect("it is ONNX")
        .graph
        .expect("a graph");
    let mut outputs: Vec<&String> = graph.node.iter().flat_map(|node| &node.output).collect();
    let count = outputs.len();
    outputs.sort();
    outputs.dedup();
    assert_eq!(outputs.len(), count, "each name is given once");
    assert!(outputs.contains(&&graph.output[0].name), "{outputs:?}");
    let again = onnx::read(&out, None).expect("it is read");
    assert_eq!(again.weights, weights);
}

#[test]
fn a_slope_that_is_not_held_exactly_is_said() {
    let said = |slope: f32| {
        let mut leaky = node("LeakyRelu", &["conv"], "leaky");
        leaky.attribute.push(Attribute {
            name: "alpha".into(),
            f: slope,
            ..Attribute::default()
        });
        let nodes = vec![conv(), leaky, node("Flatten", &["leaky"], "out")];
        let found = read(nodes, weights()).expect("it is read");
        gives(&found, |x| x.max(x * f64::from(slope)));
        found.notes
    };
    assert!(said(0.25).is_empty() && said(0.375).is_empty());
    assert_eq!(
        said(0.01),
        ["layer 2: the slope 0.01 is held as 655 / 2^16"]
    );
}

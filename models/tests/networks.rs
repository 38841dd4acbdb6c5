//! Networks: what is shipped has the shapes it claims; what does not fit is refused with its reason.

use trefoil_models::Network;
use trefoil_models::cost::{self, Work};
use trefoil_models::job::{Loss, PredictOutput, TrainSpec};
use trefoil_models::network::{LayerKind, LayerSpec};
use trefoil_models::programs::{self, Format};
use trefoil_protocol::Program;
use trefoil_protocol::plan::{LinkProfile, Plan};
use trefoil_protocol::program::{Op, Val};

fn shapes(name: &str) -> Vec<(String, Vec<usize>)> {
    let network = Network::builtin(name).expect("shipped networks are valid");
    assert_eq!(network.name, name);
    network
        .layers
        .into_iter()
        .map(|layer| (layer.name, layer.output))
        .collect()
}

fn expect(name: &str, expected: &[(&str, &[usize])]) {
    let expected: Vec<(String, Vec<usize>)> = expected
        .iter()
        .map(|(name, shape)| (name.to_string(), shape.to_vec()))
        .collect();
    assert_eq!(shapes(name), expected, "{name}");
}

#[test]
fn shipped_networks_have_the_stated_shapes() {
    expect(
        "mlp",
        &[
            ("dense1", &[128]),
            ("relu1", &[128]),
            ("dense2", &[128]),
            ("relu2", &[128]),
            ("dense3", &[10]),
        ],
    );
    expect(
        "minionn",
        &[
            ("conv1", &[16, 24, 24]),
            ("maxpool1", &[16, 12, 12]),
            ("relu1", &[16, 12, 12]),
            ("conv2", &[16, 8, 8]),
            ("maxpool2", &[16, 4, 4]),
            ("relu2", &[16, 4, 4]),
            ("dense1", &[100]),
            ("relu3", &[100]),
            ("dense2", &[10]),
        ],
    );
    expect(
        "lenet",
        &[
            ("conv1", &[20, 24, 24]),
            ("maxpool1", &[20, 12, 12]),
            ("relu1", &[20, 12, 12]),
            ("conv2", &[50, 8, 8]),
            ("maxpool2", &[50, 4, 4]),
            ("relu2", &[50, 4, 4]),
            ("dense1", &[500]),
            ("relu3", &[500]),
            ("dense2", &[10]),
        ],
    );
    expect(
        "chameleon",
        &[
            ("conv1", &[5, 14, 14]),
            ("relu1", &[5, 14, 14]),
            ("dense1", &[100]),
            ("relu2", &[100]),
            ("dense2", &[10]),
        ],
    );
    expect(
        "fentec",
        &[("dense1", &[20]), ("square1", &[20]), ("dense2", &[10])],
    );
    expect("logistic", &[("dense1", &[2])]);
    expect("logistic-10", &[("dense1", &[10])]);
    expect(
        "xray",
        &[
            ("conv1", &[8, 14, 14]),
            ("maxpool1", &[8, 7, 7]),
            ("relu1", &[8, 7, 7]),
            ("dense1", &[32]),
            ("relu2", &[32]),
            ("dense2", &[2]),
        ],
    );
    let inputs = |name: &str, dense: &str| {
        let network = Network::builtin(name).expect("shipped");
        network
            .layers
            .iter()
            .find(|layer| layer.name == dense)
            .map(|layer| layer.input.iter().product::<usize>())
    };
    assert_eq!(inputs("minionn", "dense1"), Some(256));
    assert_eq!(inputs("resnet18-224", "conv2"), Some(64 * 56 * 56));
    assert_eq!(inputs("lenet", "dense1"), Some(800));
    assert_eq!(inputs("chameleon", "dense1"), Some(980));
}

#[test]
fn the_canonical_text_of_a_network_is_the_same_network() {
    for name in Network::shipped() {
        let network = Network::builtin(name).expect("shipped");
        let again = Network::parse(&network.to_toml()).expect("canonical text is valid");
        assert_eq!(network, again, "{name}");
        assert_eq!(network.to_toml(), again.to_toml());
    }
}

#[test]
fn a_network_can_be_given_other_classes() {
    let network = Network::builtin("lenet")
        .and_then(|lenet| lenet.with_classes(2))
        .expect("units are open");
    assert_eq!(
        network.parameters().last(),
        Some(&("dense2.bias".to_string(), vec![2]))
    );
}

const HEAD: &str = "name = \"n\"\ninput = [1, 8, 8]\nclasses = 3\n";

fn layers(text: &str) -> String {
    format!("{HEAD}{text}")
}

#[test]
fn relu_moves_behind_the_pool_that_follows_it() {
    let text = layers(
        "[[layer]]\nkind=\"relu\"\n[[layer]]\nkind=\"max_pool\"\nwindow=2\n[[layer]]\nkind=\"dense\"\n",
    );
    let network = Network::parse(&text).expect("valid");
    assert!(matches!(network.layers[0].kind, LayerKind::MaxPool(_)));
    assert_eq!(network.layers[1].kind, LayerKind::Relu);
    assert_eq!(network.layers[1].input, [1, 4, 4]);
}

/// Shapes and divisors as PyTorch's `max_pool2d` and `avg_pool2d` have them, on 8x8.
#[test]
fn pools_have_the_shapes_and_the_divisors_of_pytorch() {
    let pool = |kind: &str, rest: &str| {
        let text = format!("[[layer]]\nkind=\"{kind}\"\n{rest}\n[[layer]]\nkind=\"dense\"\n");
        let network = Network::parse(&layers(&text)).expect("valid");
        network.layers[0].clone()
    };
    for (rest, side) in [
        ("window=3\nstride=2\npadding=1", 4),
        ("window=3\nstride=2", 3),
        ("window=3\nstride=2\nceil_mode=true", 4),
        // A window that would begin behind the image and the border before it is left out.
        ("window=2\nstride=4\npadding=1\nceil_mode=true", 3),
        ("window=2\nstride=9\npadding=1\nceil_mode=true", 1),
        ("window=9\npadding=[1, 1, 0, 0]", 1),
    ] {
        for kind in ["max_pool", "avg_pool"] {
            assert_eq!(pool(kind, rest).output, [1, side, side], "{kind} {rest}");
        }
    }
    let counts = |rest: &str| {
        let rest = format!("window=[3,8]\nstride=[2,1]\n{rest}");
        pool("avg_pool", &rest).counts()
    };
    assert_eq!(counts(""), [24, 24, 24]);
    assert_eq!(counts("ceil_mode=true"), [24, 24, 24, 16]);
    assert_eq!(counts("padding=[1, 0]"), [24; 4]);
    let left_out = "padding=[1, 0]\ncount_include_pad=false";
    assert_eq!(counts(left_out), [16, 24, 24, 24]);
    // The row of zeros counts, what the last window has behind it does not.
    let both = "padding=[1, 0]\nceil_mode=true";
    assert_eq!(counts(both), [24, 24, 24, 24, 16]);
    let neither = format!("{both}\ncount_include_pad=false");
    assert_eq!(counts(&neither), [16, 24, 24, 24, 8]);
    assert!(pool("max_pool", "window=2").counts().is_empty());
}

#[test]
fn errors_name_layer_key_and_both_shapes() {
    let cases = [
        (
            "[[layer]]\nkind=\"conv\"\nfilters=4\nkernel=9\n",
            &["1 (conv)", "[9, 9]", "[1, 8, 8]"][..],
        ),
        (
            "[[layer]]\nkind=\"dense\"\nunits=4\n",
            &["dense1", "[4]", "3 classes"],
        ),
        (
            "[[layer]]\nkind=\"dense\"\nunits=4\n[[layer]]\nkind=\"conv\"\nfilters=4\nkernel=3\n",
            &["2 (conv)", "[channels, height, width]", "[4]"],
        ),
        (
            "[[layer]]\nkind=\"dense\"\nunit=4\n",
            &["1 (dense)", "line 4", "unit"],
        ),
        ("[[layer]]\nkind=\"dens\"\n", &["1 (dens)", "dens"]),
        ("[[layer]]\nunits=4\n", &["1 (no kind)", "kind"]),
        (
            "[[layer]]\nkind=\"relu\"\nslope=1\n",
            &["1 (relu)", "slope"],
        ),
        (
            "[[layer]]\nkind=\"max_pool\"\nwindow=9\n",
            &["1 (max_pool)", "[9, 9]", "[1, 8, 8]"],
        ),
        (
            "[[layer]]\nkind=\"max_pool\"\nwindow=0\n",
            &["window = [0, 0]"],
        ),
        (
            "[[layer]]\nkind=\"max_pool\"\nwindow=3\npadding=3\n",
            &["1 (max_pool)", "padding [3, 3, 3, 3]", "window [3, 3]"],
        ),
        (
            "[[layer]]\nkind=\"avg_pool\"\nwindow=99\npadding=[0, 0, 9, 0]\n",
            &["1 (avg_pool)", "[0, 0, 9, 0]", "[1, 8, 8]"],
        ),
        (
            "[[layer]]\nkind=\"max_pool\"\nwindow=2\ncount_include_pad=true\n",
            &["1 (max_pool)", "count_include_pad"],
        ),
        (
            "[[layer]]\nkind=\"conv\"\nfilters=4\nkernel=2\npadding=\"same\"\n",
            &["odd kernel", "[2, 2]"],
        ),
        (
            "[[layer]]\nkind=\"poly\"\ncoefficients=[1.0]\n",
            &["1 (poly)", "degree 2 to 4"],
        ),
        (
            "[[layer]]\nkind=\"dense\"\nunits=100000000\n",
            &["64 inputs, 100000000 units"],
        ),
        (
            "[[layer]]\nkind=\"conv\"\nfilters=4\nkernel=3\nstride=0\n",
            &["stride = [0, 0]"],
        ),
        (
            "[[layer]]\nkind=\"dense\"\nfrom=\"stem\"\n",
            &["1 (dense)", "stem", "no layer before it"],
        ),
        (
            "[[layer]]\nname=\"a\"\nkind=\"relu\"\n[[layer]]\nname=\"a\"\nkind=\"dense\"\n",
            &["2 (dense)", "\"a\""],
        ),
        (
            "[[layer]]\nname=\"dense1\"\nkind=\"relu\"\n[[layer]]\nkind=\"dense\"\n",
            &["2 (dense)", "dense1"],
        ),
        (
            "[[layer]]\nkind=\"relu\"\n[[layer]]\nkind=\"dense\"\nfrom=\"images\"\n",
            &["1 (relu)", "nobody reads it"],
        ),
        (
            "[[layer]]\nname=\"a\"\nkind=\"conv\"\nfilters=2\nkernel=3\n[[layer]]\nkind=\"add\"\nfrom=[\"a\",\"images\"]\n",
            &["2 (add)", "[1, 8, 8]", "[2, 6, 6]"],
        ),
        ("[[layer]]\nkind=\"concat\"\n", &["1 (concat)", "reads 1"]),
        (
            "[[layer]]\nname=\"a b\"\nkind=\"dense\"\n",
            &["1 (dense)", "a b"],
        ),
        (
            "[[layer]]\nkind=\"dense\"\nfrom=3\n",
            &["1 (dense)", "from"],
        ),
        ("colour = 1\n", &["colour"]),
        ("", &["layer"]),
    ];
    for (text, words) in cases {
        let error = Network::parse(&layers(text)).expect_err(text).to_string();
        for word in words {
            assert!(
                error.contains(word),
                "{text:?} gave {error:?}, which lacks {word:?}"
            );
        }
    }
    let error = Network::builtin("resnet")
        .expect_err("not shipped")
        .to_string();
    assert!(
        error.contains("resnet") && error.contains("lenet"),
        "{error}"
    );
}

/// Large networks are compiled only: what a training step and an inference would cost is known without
/// running them. The numbers of parameters are those of the usual definitions, with a bias for every
/// convolution.
#[test]
fn large_networks_have_plans() {
    for (name, parameters, norms, folded) in [
        ("resnet18", Some(11_178_762), 20, 20),
        ("resnet18-224", Some(11_186_442), 20, 20),
        ("vgg16", Some(14_990_922), 13, 13),
        ("mobilenet", None, 52, 52),
        ("alexnet", None, 2, 0),
    ] {
        let network = Network::builtin(name).expect("shipped");
        let shapes = network.parameters().into_iter();
        let count: usize = shapes
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        if let Some(parameters) = parameters {
            assert_eq!(count, parameters, "{name}");
        }
        assert_eq!(network.statistics().len(), 2 * norms, "{name}");
        let layers = 0..network.layers.len();
        let folds = layers.filter_map(|at| network.folded_into(at)).count();
        assert_eq!(folds, folded, "{name}");
        let spec = TrainSpec {
            batch: 1,
            ..TrainSpec::default()
        };
        for work in [
            Work::Train,
            Work::Predict(PredictOutput::Class),
            Work::Setup,
        ] {
            let plan = cost::plan(&network, &spec, work, LinkProfile::default()).expect("compiles");
            let cost = plan.cost();
            let mb = |bytes: u64| bytes as f64 / 1e6;
            println!(
                "{name}, {count} parameters, {work:?}: {} rounds, {:.1} MB sent by a party, {:.1} MB dealt, \
                 {:.0} MB peak",
                cost.rounds,
                mb(cost.bytes_sent_per_party),
                mb(cost.dealer_bytes),
                mb(cost.peak_memory_bytes)
            );
            assert_eq!(plan.check(), Ok(()), "{name}");
            // Weights are opened at least once; a normalisation at inference opens nothing where it is
            // folded.
            let opened = if matches!(work, Work::Predict(_)) {
                0
            } else {
                16 * count as u64
            };
            assert!(cost.bytes_sent_per_party > opened, "{name} {work:?}");
            let norms = cost
                .layers
                .iter()
                .filter(|layer| layer.name.starts_with("batchnorm"));
            let sent: u64 = norms.map(|layer| layer.bytes_sent_per_party).sum();
            if matches!(work, Work::Predict(_)) {
                assert_eq!(sent == 0, folded > 0, "{name}");
            }
        }
    }
}

#[test]
fn an_activation_takes_the_place_of_all_others_and_of_nothing_else() {
    let lenet = Network::builtin("lenet").expect("shipped");
    let square = lenet.with_activation(&LayerSpec::Square {}).expect("fits");
    let kinds = |network: &Network, kind: &LayerKind| {
        let same = network.layers.iter().filter(|layer| layer.kind == *kind);
        same.count()
    };
    assert_eq!(kinds(&square, &LayerKind::Square), 3);
    assert_eq!(kinds(&square, &LayerKind::Relu), 0);
    assert_eq!(square.layers.len(), lenet.layers.len());
    let back = square.with_activation(&LayerSpec::Relu {}).expect("fits");
    assert_eq!(back, lenet);
    assert_eq!(Network::parse(&square.to_toml()).expect("text"), square);
    assert!(lenet.with_activation(&LayerSpec::Flatten {}).is_err());
    let logistic = Network::builtin("logistic").expect("shipped");
    assert!(logistic.with_activation(&LayerSpec::Relu {}).is_err());
}

#[test]
fn an_approximation_without_sense_is_refused_with_what_is_possible() {
    let parse = |layer: &str| {
        let text = format!(
            "name = \"n\"\ninput = [1, 2, 2]\nclasses = 2\n[[layer]]\nkind = \"approx_relu\"\n{layer}\n\
             [[layer]]\nkind = \"dense\"\n"
        );
        Network::parse(&text)
    };
    for (layer, part) in [
        ("degree = 5", "2 to 4"),
        ("degree = 1", "2 to 4"),
        ("degree = 2\ninterval = [1, 4]", "-16 to -0.5"),
        ("degree = 2\ninterval = [-4, nan]", "0.5 to 16"),
        ("degree = 2\nfit = \"remez\"", "minimax"),
    ] {
        let error = parse(layer).expect_err(layer).to_string();
        assert!(error.contains(part), "{layer}: {error}");
    }
    let learnt = parse("degree = 3\nlearnable = true").expect("valid");
    assert_eq!(learnt.parameters()[0].1, [3, 1]);
}

/// With a softmax at its end a network means the same: the same logits, the same Programs.
#[test]
fn a_softmax_at_the_end_changes_nothing_and_elsewhere_is_refused() {
    let text = |layers: &str| {
        let head = "name = \"n\"\ninput = [1, 3, 3]\nclasses = 3\n";
        Network::parse(&format!("{head}[[layer]]\nkind = \"dense\"\n{layers}"))
    };
    let plain = text("").expect("valid");
    let spec = TrainSpec {
        batch: 4,
        ..TrainSpec::default()
    };
    let format = Format {
        frac_bits: 16,
        ring_bits: 64,
    };
    for kind in ["softmax", "log_softmax"] {
        let layer = format!("[[layer]]\nkind = \"{kind}\"\n");
        let ended = text(&layer).expect("valid");
        assert!(ended.gives_probabilities() && !plain.gives_probabilities());
        let trained = |network: &Network| programs::train(network, &spec, 0.1).expect("builds");
        // Scopes have other names, nothing else.
        let ops = |program: Program| {
            let ops = program.nodes.into_iter().map(|node| (node.op, node.ins));
            ops.collect::<Vec<_>>()
        };
        let same: Vec<_> = ops(trained(&plain));
        let with = ops(trained(&ended));
        let count =
            |all: &[(Op, Vec<Val>)]| all.iter().filter(|(op, _)| *op != Op::Reshape).count();
        assert_eq!(count(&same), count(&with));
        for output in [PredictOutput::Class, PredictOutput::Probabilities] {
            let rounds = |network: &Network| {
                let program = programs::predict(network, format, 2, output).expect("builds");
                Plan::new(&program).cost().bytes_sent_per_party
            };
            assert_eq!(rounds(&plain), rounds(&ended));
        }
        let inside = text(&format!("{layer}[[layer]]\nkind = \"dense\"\n"));
        let error = inside.expect_err("inside").to_string();
        assert!(error.contains("last layer only"), "{error}");
        let squares = TrainSpec {
            loss: Loss::MeanSquaredError,
            ..spec.clone()
        };
        squares.check_for(&plain).expect("logits have any loss");
        let error = squares.check_for(&ended).expect_err("squares").to_string();
        assert!(error.contains("softmax_cross_entropy"), "{error}");
    }
}

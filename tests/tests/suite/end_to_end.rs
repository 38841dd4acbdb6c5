//! Whole experiments with three party processes and a dealer process over QUIC: the secure result
//! equals the plaintext reference bit for bit, and what was counted equals the plan.

use std::path::Path;

use crate::common::{experiment, pictures, run, trefoil};
use serde_json::Value;
use tempfile::TempDir;
use trefoil_models::job::{DatasetRef, JobKind, PredictOutput, TrainSpec};
use trefoil_models::{Network, schedule};
use trefoil_protocol::plan::Plan;

/// Runs `simulate` and gives its JSON.
fn simulate(folder: &TempDir, file: &Path, more: &[&str]) -> Value {
    let json = folder.path().join("report.json");
    let (ok, stdout, stderr) = run(trefoil()
        .arg("simulate")
        .arg(file)
        .arg("--json")
        .arg(&json)
        .args(more));
    assert!(ok, "{stdout}\n{stderr}");
    assert!(
        stdout.contains("secure result equals the plaintext reference: yes"),
        "{stdout}"
    );
    serde_json::from_slice(&std::fs::read(&json).expect("the report is written"))
        .expect("it is JSON")
}

/// Rounds, bytes a party sends, and bytes the dealer sends in a job, by its plans.
fn planned(kind: &JobKind) -> (u64, u64, u64) {
    let schedule = schedule(kind).expect("the job is valid");
    let costs: Vec<_> = schedule
        .programs
        .iter()
        .map(|program| Plan::new(program).cost())
        .collect();
    schedule
        .steps
        .iter()
        .map(|step| &costs[step.program])
        .fold((0, 0, 0), |sum, cost| {
            (
                sum.0 + cost.rounds,
                sum.1 + cost.bytes_sent_per_party,
                sum.2 + cost.dealer_bytes,
            )
        })
}

/// Twenty training steps of batch 8 over QUIC; everything counted equals the plans of the three jobs.
fn twenty_steps(
    network: &str,
    source: &str,
    folder: &TempDir,
    extra: &str,
    train_rows: usize,
    test_rows: usize,
    classes: usize,
) {
    let text = format!(
        "network = {network:?}\n[data]\nsource = {source:?}\nhospitals = 2\ntrain_rows = {train_rows}\ntest_rows = {test_rows}\n\
         preprocess = {{ mean = 0.2, std = 0.3 }}\n[training]\nbatch = 8\nepochs = 1\nlearning_rate = 0.03125\nseed = 7\n{extra}\
         [predict]\nimages = 3\n"
    );
    let file = experiment(folder, "twenty.toml", &text);
    let report = simulate(folder, &file, &[]);
    assert_eq!(report["bit_identical"], true);
    assert_eq!(report["train"]["steps"], 20);
    assert_eq!(report["predict"]["images"], 3);
    let text = Network::builtin(network).expect("shipped").to_toml();
    let spec = TrainSpec {
        batch: 8,
        epochs: 1,
        learning_rate: 0.03125,
        seed: 7,
        ..TrainSpec::default()
    };
    let spec = if extra.is_empty() {
        spec
    } else {
        toml_spec(spec, extra)
    };
    let dataset = DatasetRef {
        name: "simulated".into(),
        train_rows,
        test_rows,
        snapshot: [0; 32],
    };
    let jobs = [
        JobKind::Train {
            network: text.clone(),
            spec: spec.clone(),
            dataset: dataset.clone(),
            evaluate_each_epoch: true,
            save_as: "simulated".into(),
            reveal_weights: true,
        },
        JobKind::Evaluate {
            model: "simulated".into(),
            network: text.clone(),
            frac_bits: spec.frac_bits,
            ring_bits: spec.ring_bits,
            dataset,
            auc: classes == 2,
            calibration: false,
            by_hospital: Vec::new(),
        },
        JobKind::Predict {
            model: "simulated".into(),
            network: text,
            frac_bits: spec.frac_bits,
            ring_bits: spec.ring_bits,
            rows: 3,
            upload: String::new(),
            output: PredictOutput::Class,
        },
    ];
    let [rounds, sent, dealt] = jobs.iter().map(planned).fold([0; 3], |sum, job| {
        [sum[0] + job.0, sum[1] + job.1, sum[2] + job.2]
    });
    assert_eq!(report["rounds"], rounds);
    assert_eq!(report["bytes_sent_per_party"], sent);
    assert_eq!(report["dealer_bytes"], dealt);
}

fn toml_spec(spec: TrainSpec, extra: &str) -> TrainSpec {
    let rounding = match extra.contains("stochastic") {
        true => trefoil_protocol::program::Rounding::Stochastic,
        false => spec.rounding,
    };
    TrainSpec {
        rounding,
        ring_bits: if extra.contains("ring_bits = 48") {
            48
        } else {
            64
        },
        ..spec
    }
}

#[test]
fn twenty_lenet_steps_over_quic_equal_plain_and_cost_what_the_plan_says() {
    let folder = TempDir::new().expect("a temporary folder");
    twenty_steps("lenet", "digits", &folder, "", 160, 40, 10);
}

#[test]
fn twenty_xray_steps_on_pictures_over_quic_equal_plain_and_cost_what_the_plan_says() {
    let folder = TempDir::new().expect("a temporary folder");
    let source = pictures(folder.path(), 160, 40).display().to_string();
    twenty_steps("xray", &source, &folder, "", 160, 40, 2);
}

#[test]
fn logistic_regression_of_two_and_of_ten_classes_equals_plain_over_quic() {
    let folder = TempDir::new().expect("a temporary folder");
    let source = pictures(folder.path(), 160, 40).display().to_string();
    twenty_steps("logistic", &source, &folder, "", 160, 40, 2);
    twenty_steps("logistic-10", "digits", &folder, "", 160, 40, 10);
}

/// One epoch of the shipped experiment: 4,708 real X-rays, 624 of another distribution to judge by.
#[test]
fn logistic_regression_on_chest_x_rays_equals_plain_and_tells_them_apart() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let data = root.join("../shared/data/pneumoniamnist/pneumoniamnist.npz");
    if !data.exists() {
        println!("skipped: pneumonia is not there (docs/data.md)");
        return;
    }
    let folder = TempDir::new().expect("a temporary folder");
    let file = root.join("configs/pneumonia-logistic.toml");
    let data = data.display().to_string();
    let report = simulate(&folder, &file, &["--data", &data, "--epochs", "1"]);
    assert_eq!(report["bit_identical"], true);
    assert_eq!(report["train"]["steps"], 4708 / 64);
    let counts: Vec<Vec<u64>> =
        serde_json::from_value(report["confusion"].clone()).expect("counts");
    let right = counts[0][0] + counts[1][1];
    let close = |name: &str, other: &Value| {
        let [a, b] = [&report[name], other].map(|value| value.as_f64().expect(name));
        assert!((a - b).abs() < 0.01, "{name}: {a}, {b}");
        a
    };
    assert_eq!(report["accuracy"], right as f64 / 624.0);
    close("accuracy", &report["float"]["accuracy"]);
    // Guessing gives one half; docs/benchmarks.md has what twenty epochs give.
    assert!(close("auc", &report["float"]["auc"]) > 0.85, "{report}");
}

#[test]
fn stochastic_rounding_and_the_48_bit_ring_equal_plain_over_quic() {
    let folder = TempDir::new().expect("a temporary folder");
    twenty_steps(
        "chameleon",
        "digits",
        &folder,
        "rounding = \"stochastic\"\nring_bits = 48\nfrac_bits = 16\n",
        160,
        40,
        10,
    );
}

#[test]
fn an_emulated_wide_area_link_takes_fewer_rounds_and_changes_no_result() {
    let folder = TempDir::new().expect("a temporary folder");
    let text = "network = \"fentec\"\n[data]\nsource = \"digits\"\nhospitals = 1\ntrain_rows = 32\ntest_rows = 8\n\
                [training]\nbatch = 16\nepochs = 1\nseed = 3\n[predict]\nimages = 1\noutput = \"probabilities\"\n";
    let file = experiment(&folder, "wan.toml", text);
    let near = simulate(&folder, &file, &[]);
    let far = simulate(&folder, &file, &["--link", "rtt_ms=4,mbit_per_s=300"]);
    for key in ["weights_sha256", "confusion"] {
        assert_eq!(near[key], far[key], "{key}");
    }
    let rounds = |report: &Value| report["rounds"].as_u64().expect("a count");
    assert!(rounds(&far) < rounds(&near), "{far}");
}

#[test]
fn plan_prints_totals_and_layers_as_json() {
    let (ok, stdout, stderr) = run(trefoil().args([
        "plan",
        "--network",
        "lenet",
        "--batch",
        "128",
        "--train",
        "--json",
    ]));
    assert!(ok, "{stderr}");
    let plan: Value = serde_json::from_str(&stdout).expect("JSON");
    for key in [
        "rounds",
        "bytes_sent_per_party",
        "dealer_bytes",
        "multiply_adds",
        "comparisons",
        "peak_memory_bytes",
    ] {
        assert!(plan[key].as_u64().is_some_and(|n| n > 0), "{key}: {plan}");
    }
    // The budget of docs/protocol.md for this step: 115 MB a party, 232 MB dealt.
    assert!(
        plan["bytes_sent_per_party"]
            .as_u64()
            .is_some_and(|n| n <= 115_000_000)
    );
    assert!(
        plan["dealer_bytes"]
            .as_u64()
            .is_some_and(|n| n <= 232_000_000)
    );
    let layers = plan["layers"].as_array().expect("layers");
    assert!(layers.iter().any(|layer| layer["name"] == "conv2"));
}

#[test]
fn plan_compares_activations_on_the_same_network() {
    let (ok, stdout, stderr) = run(trefoil().args([
        "plan",
        "--network",
        "lenet",
        "--batch",
        "16",
        "--train",
        "--compare-activations",
        "--json",
    ]));
    assert!(ok, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    let all = report["activations"].as_array().expect("activations");
    let of = |name: &str, key: &str| {
        let found = all.iter().find(|one| one["name"] == name);
        found.and_then(|one| one[key].as_u64()).expect("a count")
    };
    // What docs/approximations.md says: exact ReLU, fused with its truncation, costs least.
    for key in ["rounds", "bytes_sent_per_party", "comparisons"] {
        assert!(of("relu", key) < of("square", key), "{key}: {report}");
        assert!(of("square", key) < of("degree 2", key), "{key}: {report}");
        assert!(
            of("degree 4", key) < of("degree 4, l.", key),
            "{key}: {report}"
        );
    }
    assert!(of("degree 2", "dealer_bytes") < of("degree 4", "dealer_bytes"));
    let (ok, _, stderr) =
        run(trefoil().args(["plan", "--network", "logistic", "--compare-activations"]));
    assert!(!ok && stderr.contains("no activation"), "{stderr}");
}

#[test]
fn other_layers_momentum_and_revealed_logits_equal_plain_over_quic() {
    let folder = TempDir::new().expect("a temporary folder");
    let network = "name = \"mixed\"\ninput = [1, 28, 28]\nclasses = 10\n\
        [[layer]]\nkind = \"conv\"\nfilters = 3\nkernel = 5\nstride = 2\n\
        [[layer]]\nkind = \"poly\"\ncoefficients = [0.1, 0.5, 0.1]\n\
        [[layer]]\nkind = \"avg_pool\"\nwindow = 2\n\
        [[layer]]\nkind = \"conv\"\nfilters = 4\nkernel = 3\npadding = \"same\"\n\
        [[layer]]\nkind = \"square\"\n\
        [[layer]]\nkind = \"global_avg_pool\"\n\
        [[layer]]\nkind = \"dense\"\nunits = 10\n";
    let network = experiment(&folder, "mixed.toml", network);
    let text = format!(
        "network = {:?}\n[data]\nsource = \"digits\"\nhospitals = 3\ntrain_rows = 40\ntest_rows = 2\n\
         [training]\nbatch = 10\nepochs = 1\nlearning_rate = 0.01\nmomentum = 0.9\nrounding = \"floor\"\n\
         [predict]\nimages = 2\noutput = \"logits\"\n",
        network.display().to_string()
    );
    let file = experiment(&folder, "mixed-run.toml", &text);
    assert_eq!(simulate(&folder, &file, &[])["train"]["steps"], 4);
}

#[test]
fn the_first_fifty_lenet_steps_on_mnist_equal_plain_over_quic() {
    let mnist = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/mnist");
    if !mnist.is_dir() {
        println!("skipped: MNIST is not beside the project (docs/data.md)");
        return;
    }
    let folder = TempDir::new().expect("a temporary folder");
    let text = "network = \"lenet\"\n[data]\nsource = \"mnist\"\ntrain_rows = 6400\ntest_rows = 128\n\
                preprocess = { mean = 0.1307, std = 0.3081 }\n\
                [training]\nbatch = 128\nepochs = 1\nlearning_rate = 0.125\nseed = 1\n";
    let file = experiment(&folder, "fifty.toml", text);
    let report = simulate(&folder, &file, &["--data", &mnist.display().to_string()]);
    assert_eq!(report["train"]["steps"], 50);
}

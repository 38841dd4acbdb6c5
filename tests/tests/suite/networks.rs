//! Networks beyond the small ones with four real processes, from public weights and images: what they
//! reveal equals the plain run, and a party's memory is what `plan` says. And k-nearest-neighbour.

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{experiment, nearest_rows, run, trefoil};
use trefoil_client::data::{embedded_digits, subset};

/// One case of `bench --network`; it fails by itself where a result is not the plain one.
fn case(args: &[&str]) -> Value {
    let folder = TempDir::new().expect("a temporary folder");
    let json = folder.path().join("bench.json");
    let mut command = trefoil();
    command
        .args(["bench", "--network"])
        .args(args)
        .arg("--json");
    let (ok, stdout, stderr) = run(command.arg(&json));
    assert!(ok, "{stdout}\n{stderr}");
    assert!(
        stdout.contains("secure result equals the plain run: yes"),
        "{stdout}"
    );
    let report = std::fs::read(&json).expect("the report is written");
    let report: Value = serde_json::from_slice(&report).expect("JSON");
    report["cases"][0].clone()
}

/// What was said of a party's memory is within a quarter of what the processes took.
fn memory_is_as_said(case: &Value) {
    let bytes = |key: &str| case["party_memory"][key].as_f64().expect(key);
    let ratio = bytes("said_bytes") / bytes("measured_bytes");
    assert!((0.75..=1.25).contains(&ratio), "{ratio}: {case}");
    assert!(bytes("tensor_bytes") < bytes("measured_bytes"), "{case}");
}

#[test]
fn compact_networks_on_retina_sized_images_infer_and_train_as_in_the_clear() {
    for args in [
        &["carenet-96"][..],
        &["carenet-256"],
        &["carenet-96", "--train", "--batch", "2"],
    ] {
        let case = case(args);
        assert!(
            case["rounds"].as_u64().is_some_and(|rounds| rounds > 0),
            "{case}"
        );
        memory_is_as_said(&case);
    }
}

#[test]
fn alexnet_infers_as_in_the_clear_and_takes_the_memory_that_plan_says() {
    let case = case(&["alexnet"]);
    memory_is_as_said(&case);
    let (ok, plan, stderr) = run(trefoil().args(["plan", "--network", "alexnet", "--json"]));
    assert!(ok, "{stderr}");
    let plan: Value = serde_json::from_str(&plan).expect("JSON");
    // The repetition is not another program than the one that is planned.
    for key in ["rounds", "bytes_sent_per_party", "dealer_bytes"] {
        assert_eq!(plan[key], case[key], "{key}");
    }
    let tensors = &case["party_memory"]["tensor_bytes"];
    assert_eq!(&plan["party_tensor_bytes"], tensors);
}

#[test]
fn a_residual_block_with_a_projection_infers_and_trains_as_in_the_clear() {
    let folder = TempDir::new().expect("a temporary folder");
    let conv = |from: &str, kernel: usize, stride: usize| {
        let padding = kernel / 2;
        format!(
            "[[layer]]\nfrom = {from:?}\nkind = \"conv\"\nfilters = 16\nkernel = {kernel}\nstride = {stride}\npadding = {padding}\n"
        )
    };
    let layer = |name: &str, kind: &str| format!("[[layer]]\nname = {name:?}\nkind = {kind:?}\n");
    let text = [
        "name = \"block\"\ninput = [8, 16, 16]\nclasses = 10\n".into(),
        conv("images", 3, 2),
        layer("n1", "batch_norm"),
        layer("r1", "relu"),
        conv("r1", 3, 1),
        layer("branch", "batch_norm"),
        conv("images", 1, 2),
        layer("skip", "batch_norm"),
        "[[layer]]\nfrom = [\"branch\", \"skip\"]\nkind = \"add\"\n".into(),
        layer("r2", "relu"),
        "[[layer]]\nkind = \"global_avg_pool\"\n[[layer]]\nkind = \"dense\"\n".into(),
    ]
    .concat();
    let file = experiment(&folder, "block.toml", &text);
    let file = file.display().to_string();
    case(&[&file]);
    case(&[&file, "--train", "--batch", "4", "--repetitions", "2"]);
}

#[test]
fn the_nearest_rows_of_shared_digits_classify_as_a_direct_count_does() {
    let folder = TempDir::new().expect("a temporary folder");
    let text = "network = \"lenet\"\n[data]\nsource = \"digits\"\nhospitals = 2\ntrain_rows = 150\ntest_rows = 40\n\
                [training]\nbatch = 10\n[predict]\nimages = 4\n";
    let file = experiment(&folder, "knn.toml", text);
    let (ok, stdout, stderr) = run(trefoil().arg("simulate").arg(&file).args(["--knn", "5"]));
    assert!(ok, "{stdout}\n{stderr}");
    assert!(
        stdout.contains("secure result equals the plaintext reference: yes"),
        "{stdout}"
    );
    let digits = embedded_digits().expect("inside the program");
    let first = |of, rows| subset(of, &Vec::from_iter(0..rows)).expect("the digits have them");
    let (train, test) = (first(&digits.train, 150), first(&digits.test, 40));
    let classes = nearest_rows(&train, &test, 5);
    let pairs = classes.iter().zip(&test.labels);
    let right = pairs.filter(|(class, label)| class == label).count();
    assert!((25..40).contains(&right), "{right} of 40 right");
    let printed = |name: &str| {
        let line = stdout.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name}: {stdout}")).trim()
    };
    let percent = format!("{:.2} %", 100.0 * right as f64 / 40.0);
    assert_eq!(printed("test accuracy"), percent);
    assert_eq!(
        printed("by definition on the pixels"),
        format!("{percent}, the same counts")
    );
    assert_eq!(
        printed("classes for hospital-1"),
        format!("{:?}", &classes[..4])
    );
    let (ok, _, stderr) = run(trefoil().arg("simulate").arg(&file).args(["--knn", "16"]));
    assert!(
        !ok && stderr.contains('k') && stderr.contains("1 to 15"),
        "{stderr}"
    );
}

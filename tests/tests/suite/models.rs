//! Models as things, with commands alone: versions, what is known of one and to whom, training that
//! starts from one, early stop, and evaluations that reveal more than a matrix; policies that say no.

use std::process::Command;

use serde_json::{Value, json};

use crate::common::output;
use crate::deployment::{Deployment, PARTIES};
use crate::world::{refused, succeeds};

const PREPROCESS: [&str; 2] = ["--preprocess", "mean=0.1307,std=0.3081"];
const NETWORK: &str =
    "name = \"linear\"\ninput = [1, 28, 28]\nclasses = 10\n[[layer]]\nkind = \"dense\"\n";
/// What the parties' policies say: nearly everything may come out, one name stays.
const POLICY: &str = r#"requesters = ["statistics-office", "st-anna"]
hospital_rows_min = 20

[[policy.rules]]
name = "stays"
verdict = "refuse"
kinds = ["remove"]
models = ["kept"]

[[policy.rules]]
name = "figures"
verdict = "allow"
outputs = ["metrics", "calibration", "hospitals", "validation"]
"#;

fn member(deployment: &Deployment, who: &str, args: &[&str]) -> Command {
    deployment.world.member(who, args)
}

fn share(deployment: &Deployment, who: &str, part: &str, rows: &str) {
    let args = ["share", "--dataset", "digits", "--images", "digits"];
    let mut command = member(deployment, who, &args);
    succeeds(
        command
            .args(["--part", part, "--rows", rows])
            .args(PREPROCESS),
    );
}

/// A training by the analyst; the version that it makes, and what it prints and says.
fn train(deployment: &Deployment, save_as: &str, more: &[&str]) -> (String, String, String) {
    let args = ["train", "--dataset", "digits", "--save-as", save_as];
    let mut command = member(deployment, "office", &args);
    command
        .args(["--batch", "32", "--learning-rate", "0.125"])
        .args(more);
    let (code, stdout, stderr) = output(&mut command);
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    let id = stderr
        .lines()
        .find_map(|line| line.strip_prefix("Job train (")?.get(..16));
    let version = format!("{save_as}@{}", id.expect("the job's hash"));
    (version, stdout, stderr)
}

/// The value on the line that begins with `label`.
fn value(text: &str, label: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    let value = line.unwrap_or_else(|| panic!("{label:?} is not in:\n{text}"));
    value.trim().to_owned()
}

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// What a command prints, which is one JSON value.
fn json(deployment: &Deployment, who: &str, args: &[&str]) -> Value {
    let printed = succeeds(&mut member(deployment, who, args));
    serde_json::from_str(&printed).unwrap_or_else(|err| panic!("{err}:\n{printed}"))
}

/// Two versions, and one that goes on from the first; returns the first.
fn versions(deployment: &Deployment, network: &str) -> String {
    let first_args = [
        "--network",
        network,
        "--reveal-metrics",
        PREPROCESS[0],
        PREPROCESS[1],
    ];
    let (first, trained, _) = train(deployment, "kept", &first_args);
    let accuracy = value(&trained, "epoch 1");
    let (second, _, _) = train(deployment, "kept", &first_args[..2]);
    let list = succeeds(&mut member(deployment, "anna", &["models"]));
    for version in [&first, &second] {
        let digits = version.split_once('@').expect("a version").1;
        contains(&list, &[digits, "statistics-office"]);
    }

    // The one to whom they were revealed sees the figures; nobody else does.
    let show = |who: &str| succeeds(&mut member(deployment, who, &["models", "show", &first]));
    let shown = show("office");
    contains(
        &shown,
        &[
            &accuracy,
            "on 60 rows of digits",
            "linear, 7850 parameters",
            "images of 1 x 28 x 28, tells 10 classes apart",
            "mean=0.1307,std=0.3081",
            "started from   seeded weights",
        ],
    );
    let others = show("anna");
    contains(
        &others,
        &["none were revealed to st-anna", "linear, 7850 parameters"],
    );
    assert!(!others.contains("accuracy"), "{others}");
    let all = json(deployment, "anna", &["models", "--json"]);
    let ids: Vec<&Value> = all
        .as_array()
        .expect("a list")
        .iter()
        .map(|model| &model["version"])
        .collect();
    for (version, id) in [&first, &second].into_iter().zip(ids) {
        let digits = version.split_once('@').expect("a version").1;
        let id = id.as_str().expect("a hash");
        assert!(id.starts_with(digits) && id.len() == 64, "{id}");
    }
    let mine = json(deployment, "office", &["models", "show", &first, "--json"]);
    let snapshot = mine["dataset"]["snapshot"].as_str().expect("a hash");
    assert!(shown.contains(&format!("data set digits, snapshot {}", &snapshot[..16])));
    let percent = mine["figures"][0]["quality"]["accuracy"].as_f64();
    let percent = format!("{:.2} %", 100.0 * percent.expect("a number"));
    assert!(accuracy.contains(&percent), "{accuracy}, {mine}");
    let mut theirs = json(deployment, "anna", &["models", "show", &first, "--json"]);
    assert_eq!(theirs["figures"], json!([]));
    // Beside the figures it is what the list says, to everybody.
    theirs.as_object_mut().expect("an object").remove("figures");
    assert_eq!(theirs, all[0]);
    let network =
        json!({"name": "linear", "parameters": 7850, "input": [1, 28, 28], "classes": 10});
    for (key, expected) in [
        ("name", json!("kept")),
        ("by", json!("statistics-office")),
        ("frac_bits", json!(16)),
        ("network", network),
        ("preparation", json!({"mean": 0.1307, "std": 0.3081})),
        ("imported", json!(false)),
        ("started_from", Value::Null),
        ("missing_at", json!([])),
    ] {
        assert_eq!(theirs[key], expected, "{key}");
    }
    let newest = succeeds(&mut member(
        deployment,
        "office",
        &["models", "show", "kept"],
    ));
    contains(
        &newest,
        &[
            second.split_once('@').expect("a version").1,
            "none were revealed",
        ],
    );

    // Network and preparation are the model's.
    let (third, _, said) = train(deployment, "further", &["--start-from", &first]);
    contains(
        &said,
        &[&format!(
            "starts     from the kept weights of model {first}"
        )],
    );
    let shown = succeeds(&mut member(
        deployment,
        "office",
        &["models", "show", &third],
    ));
    contains(
        &shown,
        &[&format!("started from   {first}"), "mean=0.1307,std=0.3081"],
    );
    let further = json(deployment, "anna", &["models", "show", "further", "--json"]);
    assert_eq!(further["started_from"], json!(first));
    let other = [
        "train",
        "--dataset",
        "digits",
        "--save-as",
        "no",
        "--start-from",
        &first,
    ];
    refused(
        member(deployment, "office", &other).args(["--network", "mlp"]),
        &["--start-from", "another network", "layers"],
    );
    refused(
        member(deployment, "office", &other).args(["--preprocess", "mean=0.5,std=0.5"]),
        &["--preprocess", "mean=0.1307"],
    );
    refused(
        member(deployment, "office", &other).args(["--frac-bits", "18"]),
        &["16 fraction bits"],
    );
    first
}

fn evaluations(deployment: &Deployment, model: &str) {
    let mut evaluate = member(
        deployment,
        "office",
        &["evaluate", model, "--dataset", "digits"],
    );
    evaluate.args(["--calibration", "--by-hospital"]);
    let (code, judged, said) = output(&mut evaluate);
    assert_eq!(code, Some(0), "{judged}\n{said}");
    contains(
        &said,
        &[
            "in ten bins of the predicted class's probability",
            "A CONFUSION MATRIX OF EACH HOSPITAL'S ROWS",
            "(20 rows)",
            "(40 rows)",
        ],
    );
    contains(
        &judged,
        &["st-anna: accuracy", "berta: accuracy", "0.9 to 1.0"],
    );
    let bins = judged.lines().filter(|line| line.contains(" to "));
    let rows = bins.filter_map(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
    assert_eq!(rows.sum::<u64>(), 60, "{judged}");
    let error: f64 = value(&judged, "calibration error")
        .parse()
        .expect("a number");
    assert!((0.0..1.0).contains(&error), "{judged}");
    let shown = succeeds(&mut member(
        deployment,
        "office",
        &["models", "show", model],
    ));
    contains(
        &shown,
        &[&format!("calibration error {error:.4}"), "by job evaluate"],
    );
}

fn early_stop(deployment: &Deployment, network: &str) {
    let args = [
        "--network",
        network,
        "--epochs",
        "40",
        "--early-stop",
        "1",
        "--min-delta",
        "0.05",
        "--validation-rows",
        "50",
    ];
    let (_, trained, said) = train(deployment, "stopped", &args);
    contains(
        &said,
        &[
            "to the three parties and statistics-office: how many of 50 validation rows are right",
            "to the dealer: after which epoch training stops",
        ],
    );
    let right: Vec<u64> = trained
        .lines()
        .filter_map(|line| {
            line.strip_prefix("validation ")?
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()
        })
        .collect();
    // Better is more than 2.5, thus 3 rows.
    let mut best = 0;
    let stop = right.iter().position(|right| {
        let better = best == 0 || *right > best + 2;
        best = if better { *right } else { best };
        !better
    });
    assert_eq!(stop, Some(right.len() - 1), "{trained}");
    let epochs = format!(
        "{} of 40, the model is of epoch {}",
        right.len(),
        right.len() - 1
    );
    assert_eq!(value(&trained, "epochs"), epochs, "{trained}");
    // 350 rows are ten batches of 32.
    assert_eq!(
        value(&trained, "training steps"),
        (10 * right.len()).to_string()
    );
}

fn removals(deployment: &Deployment, first: &str) {
    // The policies keep the name `kept`, from its owner too.
    let rm = |who: &str, model: &str| member(deployment, who, &["models", "rm", model]);
    refused(&mut rm("office", first), &["rule \"stays\"", "kept"]);
    refused(&mut rm("anna", "further"), &["belongs to another member"]);
    refused(&mut rm("office", "no-such"), &["keep no model no-such"]);
    let removed = succeeds(&mut rm("office", "further"));
    contains(&removed, &["removed model further@"]);
    let list = succeeds(&mut member(deployment, "office", &["models"]));
    assert!(
        !list.contains("further") && !list.contains("NOT AT"),
        "{list}"
    );
    assert_eq!(list.matches("kept ").count(), 2, "{list}");
}

#[test]
fn models_have_versions_figures_for_those_who_may_see_them_and_successors() {
    let replaced = "requesters = [\"statistics-office\"]";
    let deployment = Deployment::start_with(replaced, POLICY);
    let network = deployment.world.root.path().join("linear.toml");
    std::fs::write(&network, NETWORK).expect("a network is written");
    let network = network.display().to_string();
    share(&deployment, "anna", "train", "0..400");
    share(&deployment, "anna", "test", "0..20");
    share(&deployment, "berta", "test", "20..60");

    let first = versions(&deployment, &network);
    evaluations(&deployment, &first);
    early_stop(&deployment, &network);
    removals(&deployment, &first);

    // A hospital's few rows stay among the others'.
    let mut anna = member(&deployment, "anna", &["withdraw", "--dataset", "digits"]);
    succeeds(anna.args(["--upload", "2"]));
    share(&deployment, "anna", "test", "0..19");
    let by_hospital = ["evaluate", &first, "--dataset", "digits", "--by-hospital"];
    refused(
        &mut member(&deployment, "office", &by_hospital),
        &["needs 20 test rows (hospital_rows_min), one has 19"],
    );
    for who in PARTIES {
        let log = std::fs::read_to_string(deployment.store(who).join("audit.log"));
        let log = log.expect("the log is readable");
        contains(
            &log,
            &["\"also_to\":\"the three parties\"", "hospital_confusion"],
        );
        assert_eq!(
            log.matches("\"what\":\"model_removed\"").count(),
            1,
            "{log}"
        );
    }
}

//! Bad input gets a clear error that names file, field or peer, and a non-zero exit.

use crate::common::{experiment, pictures, run, trefoil};
use tempfile::TempDir;

fn fails(args: &[&std::ffi::OsStr], parts: &[&str]) {
    let (ok, stdout, stderr) = run(trefoil().args(args));
    assert!(!ok, "{args:?} succeeded: {stdout}");
    for part in parts {
        assert!(
            stderr.contains(part),
            "{args:?}: {part:?} is not in:\n{stderr}"
        );
    }
}

fn simulate_fails(folder: &TempDir, text: &str, parts: &[&str]) {
    let file = experiment(folder, "bad.toml", text);
    fails(&["simulate".as_ref(), file.as_os_str()], parts);
}

#[test]
fn an_unknown_key_names_file_line_and_key() {
    let folder = TempDir::new().expect("a temporary folder");
    simulate_fails(
        &folder,
        "network = \"mlp\"\nepohcs = 2\n[data]\nsource = \"digits\"\n",
        &["bad.toml", "line 2", "epohcs"],
    );
}

#[test]
fn a_missing_experiment_or_network_is_named() {
    let folder = TempDir::new().expect("a temporary folder");
    let missing = folder.path().join("nowhere.toml");
    fails(
        &["simulate".as_ref(), missing.as_os_str()],
        &["nowhere.toml"],
    );
    simulate_fails(
        &folder,
        "network = \"resnet\"\n[data]\nsource = \"digits\"\n",
        &["resnet", "lenet"],
    );
    fails(
        &["plan".as_ref(), "--network".as_ref(), "resnet".as_ref()],
        &["resnet", "lenet"],
    );
}

#[test]
fn a_network_whose_shapes_do_not_fit_names_the_layer() {
    let folder = TempDir::new().expect("a temporary folder");
    let network = folder.path().join("tall.toml");
    let text = "name = \"tall\"\ninput = [1, 28, 28]\nclasses = 10\n[[layer]]\nkind = \"conv\"\nfilters = 4\nkernel = 31\n\
                [[layer]]\nkind = \"dense\"\nunits = 10\n";
    std::fs::write(&network, text).expect("a network is written");
    fails(
        &["plan".as_ref(), "--network".as_ref(), network.as_os_str()],
        &["tall.toml", "layer 1 (conv)", "31", "28"],
    );
    simulate_fails(
        &folder,
        "network = \"xray\"\n[data]\nsource = \"digits\"\n",
        &["xray", "2 classes", "digits"],
    );
}

#[test]
fn a_corrupt_picture_is_named() {
    let folder = TempDir::new().expect("a temporary folder");
    let root = pictures(folder.path(), 8, 4);
    let broken = root.join("train/left/0001.png");
    let bytes = std::fs::read(&broken).expect("a picture");
    std::fs::write(&broken, &bytes[..bytes.len() / 2]).expect("half a picture");
    let text = format!(
        "network = \"xray\"\n[data]\nsource = {:?}\n[training]\nbatch = 4\n",
        root.display().to_string()
    );
    simulate_fails(&folder, &text, &["0001.png"]);
}

#[test]
fn labels_that_do_not_match_the_images_are_named() {
    let folder = TempDir::new().expect("a temporary folder");
    let root = folder.path().join("idx");
    std::fs::create_dir(&root).expect("a folder");
    let digits = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/digits");
    for (from, to) in [
        ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"),
        ("t10k-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("t10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
        ("t10k-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    ] {
        std::fs::copy(digits.join(from), root.join(to)).expect("a copy");
    }
    let text = format!(
        "network = \"mlp\"\n[data]\nsource = {:?}\n",
        root.display().to_string()
    );
    simulate_fails(&folder, &text, &["train-labels", "8000", "2000"]);
}

#[test]
fn a_bad_link_and_bad_numbers_are_explained() {
    let folder = TempDir::new().expect("a temporary folder");
    let (ok, _, stderr) = run(trefoil().args(["simulate", "--link", "rtt_ms=fast"]));
    assert!(!ok && stderr.contains("rtt_ms"), "{stderr}");
    simulate_fails(
        &folder,
        "network = \"mlp\"\n[data]\nsource = \"digits\"\n[training]\nbatch = 0\n",
        &["batch", "0"],
    );
    simulate_fails(
        &folder,
        "network = \"mlp\"\n[data]\nsource = \"digits\"\ntrain_rows = 9000\n",
        &["train_rows", "9000", "8000"],
    );
    simulate_fails(
        &folder,
        "network = \"mlp\"\n[data]\nsource = \"/nowhere/at/all\"\n",
        &["/nowhere/at/all", "docs/data.md"],
    );
}

#[test]
fn a_node_without_its_configuration_says_which_file() {
    fails(
        &[
            "party".as_ref(),
            "--config".as_ref(),
            "/nowhere/party.toml".as_ref(),
        ],
        &["/nowhere/party.toml"],
    );
    fails(
        &[
            "dealer".as_ref(),
            "--config".as_ref(),
            "/nowhere/dealer.toml".as_ref(),
        ],
        &["/nowhere/dealer.toml"],
    );
}

#[test]
fn a_command_whose_output_nobody_reads_ends_quietly() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let ended = trefoil()
        .args(["plan", "--network", "mlp"])
        .stdout(writer)
        .output()
        .expect("the tool starts");
    assert_eq!(ended.status.code(), Some(141));
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
}

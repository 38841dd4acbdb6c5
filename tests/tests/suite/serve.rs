//! Models that leave and come back, and predictions in a serving session, with real processes: the
//! nodes, and the tool for every member.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use trefoil_client::data::{embedded_digits, idx, subset};
use trefoil_cluster::{Cluster, ClusterSpec};

use crate::common::{output, trefoil};

/// What is waited for happens by then, or never.
const LIMIT: Duration = Duration::from_secs(60);
const PREPROCESS: &str = "mean=0.1307,std=0.3081";
const NETWORK: &str =
    "name = \"linear\"\ninput = [1, 28, 28]\nclasses = 10\n[[layer]]\nkind = \"dense\"\n";

pub(crate) struct World {
    pub(crate) cluster: Cluster,
    folder: TempDir,
}

impl World {
    pub(crate) fn start() -> World {
        let spec = ClusterSpec {
            hospitals: vec!["anna".into(), "berta".into()],
            ..ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-under-test"))
        };
        let cluster = Cluster::start(&spec).expect("the cluster starts");
        for member in cluster.members() {
            let [p0, p1, p2] = member.parties;
            let text = format!(
                "consortium = {:?}\n[identity]\ncertificate = \"certificate.der\"\nkey = \"key.der\"\n\
                 [peers]\np0 = \"{p0}\"\np1 = \"{p1}\"\np2 = \"{p2}\"\n",
                cluster.consortium_path()
            );
            std::fs::write(member.folder.join("member.toml"), text).expect("it is written");
        }
        let folder = TempDir::new().expect("a temporary folder");
        std::fs::write(folder.path().join("linear.toml"), NETWORK).expect("it is written");
        let digits = embedded_digits().expect("inside the program");
        let rows: Vec<usize> = (0..40).collect();
        let some = subset(&digits.test, &rows).expect("the digits have them");
        idx::write(folder.path(), "t10k", &some).expect("they are written");
        World { cluster, folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A member's command.
    pub(crate) fn member(&self, who: &str, args: &[&str]) -> Command {
        let mut command = trefoil();
        let home = &self.cluster.member(who).expect("a member").folder;
        command.args(args).env("TREFOIL_HOME", home);
        command
    }

    pub(crate) fn predict(&self, who: &str, model: &str, more: &[&str]) -> Command {
        let mut command = self.member(who, &["predict", model, "--output", "logits"]);
        command.arg("--images");
        command.arg(self.path("t10k-images-idx3-ubyte")).args(more);
        command
    }
}

/// What it prints and what it says.
pub(crate) fn succeeds(command: &mut Command) -> (String, String) {
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{command:?}:\n{stdout}\n{stderr}");
    (stdout, stderr)
}

pub(crate) fn refused(command: &mut Command, part: &str) {
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(1), "{command:?}:\n{stdout}\n{stderr}");
    assert!(stderr.contains(part), "{part:?} is not in:\n{stderr}");
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("it is written")
}

/// Trains `trained`, opens it twice, and brings it back as `imported`.
fn models(world: &World) {
    let share = ["share", "--dataset", "digits", "--images", "digits"];
    for (part, rows) in [("train", "0..200"), ("test", "0..20")] {
        let mut command = world.member("anna", &share);
        command.args(["--preprocess", PREPROCESS, "--part", part, "--rows", rows]);
        succeeds(&mut command);
    }
    let network = world.path("linear.toml").display().to_string();
    let mut train = world.member("analyst", &["train", "--dataset", "digits"]);
    train.args(["--save-as", "trained", "--batch", "50", "--epochs", "2"]);
    train.args(["--network", &network, "--preprocess", PREPROCESS]);
    train.arg("--reveal-weights");
    // Before anything is computed.
    let mut wrong = world.member("analyst", &["train", "--dataset", "digits", "--network"]);
    wrong.args([&network, "--save-as", "lost", "--reveal-weights", "w.bin"]);
    refused(&mut wrong, "are written to .npz, .safetensors and .onnx");
    succeeds(train.arg(world.path("first.npz")));

    let reveal = |file: &str| {
        let mut command = world.member("analyst", &["reveal-model", "trained", "--to"]);
        command.arg(world.path(file));
        command
    };
    let (_, said) = succeeds(&mut reveal("second.npz"));
    assert!(said.contains("THE MODEL'S WEIGHTS"), "{said}");
    let (first, second) = (world.path("first.npz"), world.path("second.npz"));
    assert_eq!(bytes(&first), bytes(&second));
    refused(&mut reveal("second.npz"), "exists");

    let import = |weights: &Path, network: &str| {
        let mut command = world.member("berta", &["import-model", "--save-as", "imported"]);
        command.args(["--network", network, "--preprocess", PREPROCESS]);
        command.arg("--weights").arg(weights);
        command
    };
    refused(
        &mut import(&second, "mlp"),
        "has shape [784, 10], network mlp has",
    );
    let (kept, _) = succeeds(&mut import(&second, &network));
    assert!(kept.contains("imported, kept as shares"), "{kept}");

    let (list, _) = succeeds(&mut world.member("anna", &["models"]));
    let line = |name: &str| {
        let found = list.lines().find(|line| line.starts_with(name));
        found.unwrap_or_else(|| panic!("{list}")).to_owned()
    };
    assert!(line("trained").contains("digits ") && line("trained").contains("analyst"));
    assert!(line("imported").contains("imported") && line("imported").contains("berta"));
}

#[test]
fn a_model_leaves_comes_back_and_serves_two_hospitals_at_once() {
    let world = World::start();
    models(&world);
    // No network, no fraction bits, no preprocessing: the model says all that.
    let (by_job, _) = succeeds(&mut world.predict("anna", "trained", &[]));
    assert_eq!(by_job.lines().count(), 41);
    let (imported, _) = succeeds(&mut world.predict("anna", "imported", &[]));
    assert_eq!(imported, by_job);
    let wrong = ["--preprocess", "mean=0.5,std=0.5"];
    refused(
        &mut world.predict("anna", "trained", &wrong),
        "was made with mean=0.1307,std=0.3081",
    );
    refused(
        &mut world.predict("anna", "trained", &["--network", "mlp"]),
        "was made as another network, linear",
    );

    let mut serve = world.member("analyst", &["serve", "trained", "--detach"]);
    serve.args(["--for", "anna,berta", "--output", "logits"]);
    serve.args(["--duration", "600", "--max-batch", "16"]);
    let (id, said) = succeeds(&mut serve);
    let job = &id[..16];
    assert!(
        said.contains("to each, of its own images: the last layer's outputs"),
        "{said}"
    );
    let start = Instant::now();
    loop {
        let (list, _) = succeeds(&mut world.member("berta", &["serve", "--list"]));
        if list.contains(job) {
            assert!(
                list.contains("serves trained@") && list.contains("(logits)"),
                "{list}"
            );
            break;
        }
        assert!(start.elapsed() < LIMIT, "{list}");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Both at the same time, in the same batches.
    let asking = ["anna", "berta"].map(|who| {
        let mut command = world.predict(who, "trained", &[]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the tool starts")
    });
    for child in asking {
        let done = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{said}");
        assert!(!said.contains("Job predict"), "it asked by a job:\n{said}");
        assert_eq!(String::from_utf8_lossy(&done.stdout), by_job);
    }
    // A job of another kind runs beside it; another output is none that is served.
    let evaluate = ["evaluate", "trained", "--dataset", "digits"];
    let (judged, _) = succeeds(&mut world.member("analyst", &evaluate));
    assert!(judged.contains("test rows            20"), "{judged}");
    let class = ["predict", "trained", "--images"];
    let mut class = world.member("anna", &class);
    class.arg(world.path("t10k-images-idx3-ubyte"));
    let (_, said) = succeeds(&mut class);
    assert!(said.contains("Job predict"), "{said}");
    refused(
        &mut world.predict("analyst", "trained", &["--served", job]),
        "no session",
    );

    refused(
        &mut world.member("anna", &["models", "rm", "trained"]),
        "belongs to another member",
    );
    succeeds(&mut world.member("analyst", &["serve", "--stop", job]));
    let (watched, _) = succeeds(&mut world.member("analyst", &["watch", job]));
    assert!(watched.contains("images served        80"), "{watched}");
    succeeds(&mut world.member("berta", &["models", "rm", "imported"]));
    refused(
        &mut world.predict("anna", "imported", &[]),
        "there is no model imported",
    );
    world.cluster.stop();
}

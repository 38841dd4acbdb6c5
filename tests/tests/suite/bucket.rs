//! Share stores in buckets, against a real server of S3's protocol (`scripts/test-s3` gets and starts
//! one): what is trained is what folders give, byte for byte; withdrawals leave no object; a party
//! that is killed between staging and commit, an object that was changed, a storage that is away.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::deployment::{Deployment, PARTIES, eventually, files};
use crate::world::{LIMIT, ports, refused, succeeds};

const BUCKET: &str = "trefoil-shares";
const PREPROCESS: [&str; 2] = ["--preprocess", "mean=0.1307,std=0.3081"];

/// A server of S3's protocol on loopback that keeps objects in memory.
struct Storage {
    server: Child,
    port: u16,
}

impl Drop for Storage {
    fn drop(&mut self) {
        // It may have ended by itself; both are for a process that was started here.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Storage {
    /// The server that `TREFOIL_TEST_S3` names, with an empty bucket.
    fn start() -> Option<Storage> {
        let Some(program) = std::env::var_os("TREFOIL_TEST_S3") else {
            eprintln!("skipped: no S3 server to test with (scripts/test-s3 brings one)");
            return None;
        };
        let port = ports()[0];
        let storage = Storage {
            server: Storage::serve(Path::new(&program), port),
            port,
        };
        let (status, body) = storage.ask("PUT", &format!("/{BUCKET}"));
        assert_eq!(status, 200, "{body}");
        Some(storage)
    }

    fn serve(program: &Path, port: u16) -> Child {
        let server = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the S3 server starts");
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(start.elapsed() < LIMIT, "the S3 server does not listen");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        server
    }

    /// One request without credentials, which this server does not ask for.
    fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("it listens");
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\
             Content-Length: 0\r\n\r\n"
        )
        .expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("answered");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status.expect("a status line"), body.to_owned())
    }

    /// Names of the objects below a prefix.
    fn objects(&self, prefix: &str) -> Vec<String> {
        let (status, body) = self.ask("GET", &format!("/{BUCKET}?list-type=2&prefix={prefix}"));
        assert_eq!(status, 200, "{body}");
        let keys = body.split("<Key>").skip(1);
        let names = keys.filter_map(|rest| rest.split_once("</Key>"));
        names.map(|(name, _)| name.to_owned()).collect()
    }

    /// Puts something else in an object's place, with the client that comes with the server: it has
    /// to be signed.
    fn overwrite(&self, object: &str) {
        let script = "import boto3, sys\n\
                      s3 = boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1')\n\
                      s3.put_object(Bucket=sys.argv[2], Key=sys.argv[3], Body=b'something else')";
        let program = std::env::var_os("TREFOIL_TEST_S3").expect("the server runs");
        let mut python = Command::new(Path::new(&program).with_file_name("python3"));
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let put = python
            .args(["-c", script, &endpoint, BUCKET, object])
            .output();
        let put = put.expect("Python starts");
        assert!(
            put.status.success(),
            "{}",
            String::from_utf8_lossy(&put.stderr)
        );
    }

    fn config(&self) -> String {
        let port = self.port;
        format!(
            "[store]\nurl = \"s3://{BUCKET}/{{who}}\"\nendpoint = \"http://127.0.0.1:{port}\"\n\
             region = \"us-east-1\"\nplain_http = true\ncache_mb = 1"
        )
    }
}

fn share(deployment: &Deployment, who: &str, dataset: &str, rows: &str) -> Command {
    let args = [
        "share",
        "--dataset",
        dataset,
        "--images",
        "digits",
        "--part",
        "train",
    ];
    let mut command = deployment.world.member(who, &args);
    command.args(["--rows", rows]).args(PREPROCESS);
    command
}

/// Trains on what Anna has shared; the weights' file.
fn trained(deployment: &Deployment, name: &str) -> Vec<u8> {
    let root = deployment.world.root.path();
    let (network, weights) = (root.join("linear.toml"), root.join(format!("{name}.npz")));
    let text =
        "name = \"linear\"\ninput = [1, 28, 28]\nclasses = 10\n[[layer]]\nkind = \"dense\"\n";
    std::fs::write(&network, text).expect("a network is written");
    let args = [
        "train",
        "--dataset",
        "digits",
        "--save-as",
        name,
        "--batch",
        "8",
    ];
    let mut command = deployment.world.member("office", &args);
    command.arg("--detach").arg("--network").arg(&network);
    let id = succeeds(command.arg("--reveal-weights").arg(&weights));
    for who in PARTIES {
        let approve = ["approve", &id[..16], "--yes"];
        succeeds(&mut deployment.world.operator(who, &approve));
    }
    succeeds(&mut deployment.world.member("office", &["watch", &id[..16]]));
    std::fs::read(weights).expect("the weights are revealed")
}

fn chunks(folder: PathBuf) -> usize {
    let named = |path: &PathBuf| path.to_string_lossy().contains("chunk-");
    files(&folder).iter().filter(|path| named(path)).count()
}

#[test]
fn a_training_on_shares_in_buckets_gives_the_weights_of_one_on_folders() {
    let Some(storage) = Storage::start() else {
        return;
    };
    let weights = [String::new(), storage.config()].map(|config| {
        let replaced = if config.is_empty() { "" } else { "[store]" };
        let deployment = Deployment::start_with(replaced, &config);
        succeeds(&mut share(&deployment, "anna", "digits", "0..200"));
        succeeds(&mut share(&deployment, "anna", "digits", "200..300"));
        let at_home = chunks(deployment.store("west").join("datasets"));
        assert_eq!(at_home, if config.is_empty() { 2 } else { 0 });
        let weights = trained(&deployment, "first");
        if !config.is_empty() {
            let doctor = deployment.world.member("west", &["doctor"]);
            let said = crate::common::output(&mut { doctor });
            assert!(said.1.contains("ok       bucket"), "{said:?}");
            buckets_are_kept_apart(&storage, &deployment);
        }
        weights
    });
    assert!(weights[0] == weights[1], "the weights differ");
}

/// Each party's objects are under its own prefix, sealed, and no other party may use it.
fn buckets_are_kept_apart(storage: &Storage, deployment: &Deployment) {
    for who in PARTIES {
        // Two uploads of a chunk and a record each, and whose it is.
        assert_eq!(storage.objects(who).len(), 5, "{who}");
    }
    let path = deployment.world.dir("west").join("party.toml");
    let own = std::fs::read_to_string(&path).expect("readable");
    let other = own.replace(&format!("{BUCKET}/west"), &format!("{BUCKET}/east"));
    std::fs::write(&path, other).expect("written");
    let mut start = deployment.world.operator("west", &["party"]);
    refused(&mut start, &["belongs to the party with the public key"]);
    std::fs::write(&path, own).expect("written");
}

#[test]
fn withdrawals_deaths_and_damage_leave_buckets_and_homes_in_step() {
    let Some(storage) = Storage::start() else {
        return;
    };
    let config = storage.config() + "\nquota_mb_per_hospital = 30";
    let mut deployment = Deployment::start_with("[store]", &config);
    succeeds(&mut share(&deployment, "anna", "digits", "0..200"));
    succeeds(&mut share(&deployment, "berta", "digits", "200..400"));
    let listed = succeeds(&mut deployment.world.operator("west", &["store"]));
    assert!(
        listed.contains("digits,st-anna,1,training,200,1.2"),
        "{listed}"
    );
    // The quota counts what is in the bucket.
    refused(
        &mut share(&deployment, "anna", "digits", "400..8000"),
        &["quota of 30 MB"],
    );

    // A withdrawal leaves nothing of Anna's anywhere.
    let before = PARTIES.map(|who| storage.objects(who).len());
    let args = ["withdraw", "--dataset", "digits"];
    succeeds(&mut deployment.world.member("anna", &args));
    let after = PARTIES.map(|who| storage.objects(who).len());
    assert_eq!(before.map(|objects| objects - 2), after);

    // A party that dies while an upload is on its way: the same command goes on, and is stored once.
    let mut killed = share(&deployment, "anna", "digits", "400..4000");
    let mut killed = killed
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the tool starts");
    let staging = deployment.store("east").join("staging");
    eventually("a staged chunk", || chunks(staging.clone()) >= 1);
    deployment.kill("east");
    killed.wait().expect("it ends");
    deployment.start_node("party", "east");
    succeeds(&mut share(&deployment, "anna", "digits", "400..4000"));
    let objects = PARTIES.map(|who| storage.objects(who));
    let shapes = objects.each_ref().map(Vec::len);
    assert_eq!(shapes, [shapes[0]; 3], "{objects:?}");
    let at_home = ["staging", "datasets"].map(|kind| chunks(deployment.store("east").join(kind)));
    assert_eq!(at_home, [0, 0]);
    let good = trained(&deployment, "good");

    // An object that was changed is found and named, and nothing is trained on it.
    let of_east = |name: &&String| name.contains("chunk-");
    let object = objects[2].iter().find(of_east).expect("a chunk").clone();
    storage.overwrite(&object);
    std::fs::remove_dir_all(deployment.store("east").join("cache")).expect("removed");
    std::fs::create_dir(deployment.store("east").join("cache")).expect("made");
    let args = [
        "train",
        "--dataset",
        "digits",
        "--save-as",
        "bad",
        "--network",
        "mlp",
    ];
    refused(
        &mut deployment.world.member("office", &args),
        &["P2", &format!("s3://{BUCKET}/{object}"), "damaged"],
    );
    assert!(!good.is_empty());

    // A storage that is away: said at the start, with what to do.
    deployment.kill("east");
    drop(storage);
    let mut start = deployment.world.operator("east", &["party"]);
    refused(&mut start, &["s3://", "Is the storage there"]);
}

//! The daemon as a child process: one line out, one line in, and an end with its parent.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use trefoil_consortium::config::{IdentityFiles, Policy};
use trefoil_consortium::host::Listening;
use trefoil_consortium::{Addresses, ConsortiumFile, Core, Member, PartyConfig, identity};

/// A folder with P0's configuration; the other nodes exist by their keys only.
fn write_config(folder: &Path, change: impl Fn(&mut PartyConfig)) -> std::path::PathBuf {
    let mut identities = Vec::new();
    let mut node = |name: &str| {
        let made = identity::generate(name).unwrap();
        if name == "p0" {
            identity::save(&made, &folder.join("cert.der"), &folder.join("key.der")).unwrap();
        }
        let pin = identity::pin(&made).unwrap();
        identities.push(made);
        Member {
            name: name.into(),
            pin,
            address: "127.0.0.1:1".into(),
            transport: Default::default(),
        }
    };
    let core = Core {
        name: "test".into(),
        ring_bits: 64,
        parties: [node("p0"), node("p1"), node("p2")],
        dealer: node("dealer"),
    };
    let consortium = ConsortiumFile::new(core, vec![])
        .signed_by(&identities)
        .unwrap();
    std::fs::write(folder.join("consortium.toml"), consortium.to_toml()).unwrap();
    let mut config = PartyConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        dial_out_only: false,
        home: "home".into(),
        consortium: "consortium.toml".into(),
        log: "info".into(),
        threads: 0,
        resume_wait_s: 0,
        stop_wait_s: 60,
        identity: IdentityFiles {
            certificate: "cert.der".into(),
            key: "key.der".into(),
        },
        peers: Addresses::default(),
        store: Default::default(),
        policy: Policy::default(),
        transport: Default::default(),
    };
    change(&mut config);
    let path = folder.join("party.toml");
    std::fs::write(&path, config.to_toml()).unwrap();
    path
}

fn start(config: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_trefoil-party"))
        .args([config.as_os_str(), "--attached".as_ref()])
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn an_attached_party_says_where_it_listens_and_ends_with_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(&write_config(folder.path(), |_| {}));
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let listening = Listening::parse(&line).unwrap();
    assert_ne!(listening.listening.port(), 0);
    let mut stdin = child.stdin.take().unwrap();
    writeln!(
        stdin,
        r#"{{"addresses":{{"p0":"127.0.0.1:1","p1":"127.0.0.1:1"}}}}"#
    )
    .unwrap();
    let ended = Instant::now();
    drop(stdin);
    let status = child.wait().unwrap();
    assert!(
        ended.elapsed() < Duration::from_secs(5),
        "{:?}",
        ended.elapsed()
    );
    assert!(status.success(), "{status}");
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "one line is all");
    let mut log = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(
        log.contains("its parent has ended") && log.contains("P0"),
        "{log}"
    );
}

fn fails_with(config: &Path) -> String {
    let output = start(config).wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_port_in_use_an_unknown_key_and_an_exposed_key_end_it_with_a_clear_word() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let config = write_config(folder.path(), |config| config.listen = address);
    let err = fails_with(&config);
    assert!(
        err.contains("port is in use") && err.contains(&address.to_string()),
        "{err}"
    );

    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("log =", "lgo =")).unwrap();
    let err = fails_with(&config);
    assert!(
        err.contains("party.toml") && err.contains("lgo") && err.contains("line"),
        "{err}"
    );
    std::fs::write(&config, text).unwrap();

    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let key = folder.path().join("key.der");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        let err = fails_with(&config);
        assert!(err.contains("chmod 600"), "{err}");
    }
}

//! The configuration files: the shipped examples are what they say, mistakes are named.

use std::path::{Path, PathBuf};

use trefoil_consortium::{ConsortiumFile, DealerConfig, MemberConfig, PartyConfig};
use trefoil_transport::Settings;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .join(name)
}

#[test]
fn the_shipped_examples_are_read_and_show_the_defaults() {
    let party = PartyConfig::load(&shipped("party.toml")).unwrap();
    let spin_us = party.transport.spin_us;
    assert_eq!(
        party.transport,
        Settings {
            spin_us,
            ..Settings::default()
        }
    );
    assert_eq!(party.policy.requesters, ["st-anna"]);
    assert!(
        party.home.ends_with("configs/party-home"),
        "{:?} is beside its file",
        party.home
    );

    let dealer = DealerConfig::load(&shipped("dealer.toml")).unwrap();
    assert_eq!(dealer.simulation_coin_seed, None);

    let member = MemberConfig::load(&shipped("member.toml")).unwrap();
    assert_eq!(member.transport, Settings::default());
    assert!(member.identity.key.ends_with("configs/key.der"));

    let consortium = ConsortiumFile::load_unsigned(&shipped("consortium.toml")).unwrap();
    assert_eq!(consortium.members.len(), 2);
    let seen = member.seen_from_here(consortium.clone());
    assert_eq!(seen.core.parties[0].address, "10.0.0.10:7100");
    assert_eq!(seen.core.parties[1], consortium.core.parties[1]);
    assert_eq!(seen.core_hash(), consortium.core_hash());
    assert_eq!(consortium.core.parties[2].name, "east-ministry");
}

#[test]
fn a_configuration_is_read_as_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("party.toml");
    let mut party = PartyConfig::load(&shipped("party.toml")).unwrap();
    std::fs::write(&path, party.to_toml()).unwrap();
    // Paths were anchored at the first file and stay relative to the second.
    for place in [
        &mut party.home,
        &mut party.consortium,
        &mut party.identity.certificate,
        &mut party.identity.key,
    ] {
        *place = folder.path().join(&place);
    }
    assert_eq!(PartyConfig::load(&path).unwrap(), party);
}

#[test]
fn a_members_configuration_is_read_as_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("member.toml");
    let mut member = MemberConfig::load(&shipped("member.toml")).unwrap();
    std::fs::write(&path, member.to_toml()).unwrap();
    for place in [
        &mut member.consortium,
        &mut member.identity.certificate,
        &mut member.identity.key,
    ] {
        *place = folder.path().join(&place);
    }
    assert_eq!(MemberConfig::load(&path).unwrap(), member);
}

fn error_of(name: &str, change: impl Fn(String) -> String) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(
        &path,
        change(std::fs::read_to_string(shipped(name)).unwrap()),
    )
    .unwrap();
    let err = match name {
        "party.toml" => PartyConfig::load(&path).unwrap_err().to_string(),
        "dealer.toml" => DealerConfig::load(&path).unwrap_err().to_string(),
        "member.toml" => MemberConfig::load(&path).unwrap_err().to_string(),
        _ => ConsortiumFile::load_unsigned(&path)
            .unwrap_err()
            .to_string(),
    };
    assert!(err.contains(name), "{err}");
    err
}

/// How an error names the line of a shipped file that holds a key.
fn line_of(name: &str, key: &str) -> String {
    let text = std::fs::read_to_string(shipped(name)).unwrap();
    let at = text.lines().position(|line| line.contains(key)).unwrap();
    format!("line {},", at + 1)
}

#[test]
fn an_unknown_key_is_refused_with_file_line_and_key() {
    let err = error_of("party.toml", |text| {
        text.replace("round_timeout_ms", "round_timeuot_ms")
    });
    assert!(
        err.contains("round_timeuot_ms")
            && err.contains(&line_of("party.toml", "round_timeout_ms")),
        "{err}"
    );
    let err = error_of("dealer.toml", |text| {
        text.replace("consortium =", "consortum =")
    });
    assert!(
        err.contains("consortum") && err.contains(&line_of("dealer.toml", "consortium =")),
        "{err}"
    );
    let err = error_of("consortium.toml", |text| {
        text.replace("role = \"analyst\"", "role = \"boss\"")
    });
    assert!(err.contains("boss") && err.contains("line "), "{err}");
}

#[test]
fn a_value_out_of_its_range_and_a_pin_that_is_none_are_named() {
    let err = error_of("party.toml", |text| {
        text.replace("datagram_bytes = 1_452", "datagram_bytes = 9_000")
    });
    assert!(err.contains("datagram_bytes = 9000"), "{err}");
    let err = error_of("consortium.toml", |text| {
        text.replace(
            "0000000000000000000000000000000000000000000000000000000000000004",
            "12",
        )
    });
    assert!(
        err.contains("64 hexadecimal digits") && err.contains("line"),
        "{err}"
    );
    let err = error_of("consortium.toml", |text| {
        text.replace("ring_bits = 64", "ring_bits = 32")
    });
    assert!(
        err.contains("core.ring_bits") && err.contains("32"),
        "{err}"
    );
}

#[test]
fn a_member_is_told_that_it_has_no_business_with_the_dealer() {
    let err = error_of("member.toml", |text| {
        text.replace("p0 =", "dealer = \"10.0.0.13:7103\"\np0 =")
    });
    assert!(err.contains("does not connect to the dealer"), "{err}");
}

#[test]
fn a_missing_file_is_named() {
    let err = PartyConfig::load(Path::new("nowhere/party.toml"))
        .unwrap_err()
        .to_string();
    assert!(err.contains("nowhere/party.toml"), "{err}");
}

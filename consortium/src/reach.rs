//! Who dials whom, over what, and whether everybody can reach everybody.
//!
//! Of two parties the higher dials, parties dial the dealer, members dial the parties. A node
//! without an address only dials out, so the others leave the dialling to it. A pair of which one
//! uses TCP uses TCP: a listening node takes both.

use trefoil_protocol::party::Peer;
use trefoil_transport::{Identity, Link, Node, Protocol, Settings, TransportError};

use std::net::SocketAddr;

use crate::{Card, ConsortiumFile, Member};

impl Member {
    /// The entry of the institution that a card introduces.
    pub fn of(card: &Card) -> Member {
        Member {
            name: card.id.clone(),
            pin: card.pin,
            address: card.address.clone().unwrap_or_default(),
            transport: card.transport,
        }
    }

    /// Whether nobody can connect to it.
    pub fn dials_out_only(&self) -> bool {
        self.address.is_empty()
    }

    /// Where it is and over what, for people.
    pub fn place(&self) -> String {
        let address = match self.dials_out_only() {
            true => "(only dials out)",
            false => &self.address,
        };
        match self.transport {
            Protocol::Quic => address.into(),
            Protocol::Tcp => format!("{address} tcp"),
        }
    }

    /// The entry's lines in the file. Names, pins and addresses have no character that TOML would
    /// escape.
    pub fn to_lines(&self) -> String {
        let mut lines = format!("name = \"{}\"\npin = \"{}\"\n", self.name, self.pin);
        if !self.dials_out_only() {
            lines += &format!("address = \"{}\"\n", self.address);
        }
        if self.transport != Protocol::Quic {
            lines += &format!("transport = \"{}\"\n", self.transport);
        }
        lines
    }
}

impl ConsortiumFile {
    /// Whether `me` dials `other`.
    pub fn dials(&self, me: Peer, other: Peer) -> bool {
        if self.node(me).dials_out_only() || self.node(other).dials_out_only() {
            return !self.node(other).dials_out_only();
        }
        match (me, other) {
            (Peer::Party(me), Peer::Party(other)) => other < me,
            (Peer::Party(_), Peer::Dealer) => true,
            (Peer::Dealer, _) => false,
        }
    }

    /// Every two that must talk: at least one of them listens. The error names the key in the file.
    pub(crate) fn check_reach(&self) -> Result<(), (String, String)> {
        let mut quiet = Vec::new();
        for (at, node) in self.core.parties.iter().enumerate() {
            if node.dials_out_only() {
                quiet.push((format!("core.parties[{at}].address"), node));
            }
        }
        if self.core.dealer.dials_out_only() {
            quiet.push(("core.dealer.address".to_owned(), &self.core.dealer));
        }
        let refused = |field: &str, node: &Member, other: &str, who: &str| {
            let detail = format!(
                "{} and {other} must talk to each other, and both only dial out: {who}; give {} an \
                 address where it listens",
                node.name, node.name
            );
            Err((field.to_owned(), detail))
        };
        if let [(_, first), (field, second), ..] = &quiet[..] {
            return refused(field, second, &first.name, "neither has an address");
        }
        // The dealer talks to the parties alone.
        let party = quiet
            .iter()
            .find(|(field, _)| field.starts_with("core.parties"));
        match (party, self.members.first()) {
            (Some((field, party)), Some(member)) => {
                let who = "hospitals and analysts connect to every party and never listen";
                refused(field, party, &member.name, who)
            }
            _ => Ok(()),
        }
    }

    /// The settings of a node's own links: its entry may say TCP as well as its configuration.
    pub fn settings_of(&self, me: Peer, settings: &Settings) -> Settings {
        let mut settings = settings.clone();
        settings.protocol = settings.protocol.with(self.node(me).transport);
        settings
    }

    /// Binds a node's endpoint, which listens unless it only dials out; `file` and the node's own
    /// configuration must agree on that, or nobody would connect.
    ///
    /// # Errors
    /// As text: a disagreement, or the endpoint's own.
    ///
    /// # Panics
    /// See [`Node::bind`].
    pub fn bind(
        &self,
        me: Peer,
        identity: &Identity,
        listen: SocketAddr,
        dial_out_only: bool,
        settings: &Settings,
    ) -> Result<Node, BindError> {
        let settings = self.settings_of(me, settings);
        match (dial_out_only, self.node(me).dials_out_only()) {
            (true, true) => Ok(Node::dial_only(identity, listen.ip(), &settings)?),
            (false, false) => Ok(Node::bind(identity, listen, &settings)?),
            (true, false) => Err(BindError::Disagree(format!(
                "dial_out_only = true, but the consortium file gives {me} the address {}: the \
                 others would dial it in vain; remove one of the two",
                self.node(me).address
            ))),
            (false, true) => Err(BindError::Disagree(format!(
                "the consortium file gives {me} no address, so nobody dials it: write \
                 dial_out_only = true in this node's configuration, or an address in the file"
            ))),
        }
    }
}

/// Why a node has no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The consortium file and the node's configuration do not fit.
    #[error("{0}")]
    Disagree(String),
    /// The endpoint.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// What a log says of a new link.
pub(crate) fn linked(link: &Link) -> &'static str {
    match link.protocol() {
        Protocol::Quic => "linked",
        Protocol::Tcp => "linked over tcp",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trefoil_protocol::party::PartyId;

    use crate::file::tests::example;

    const ALL: [Peer; 4] = [
        Peer::Party(PartyId::P0),
        Peer::Party(PartyId::P1),
        Peer::Party(PartyId::P2),
        Peer::Dealer,
    ];

    #[test]
    fn of_every_two_nodes_exactly_one_dials_and_the_other_listens() {
        let mut file = example();
        file.members.clear();
        let mut files = vec![file.clone()];
        for quiet in 0..4 {
            let mut file = file.clone();
            match quiet {
                3 => file.core.dealer.address.clear(),
                party => file.core.parties[party].address.clear(),
            }
            files.push(file);
        }
        for file in files {
            file.check().unwrap();
            for (at, a) in ALL.into_iter().enumerate() {
                for b in ALL.into_iter().skip(at + 1) {
                    assert_ne!(file.dials(a, b), file.dials(b, a), "{a} {b}");
                    let dialled = if file.dials(a, b) { b } else { a };
                    assert!(!file.node(dialled).dials_out_only());
                }
            }
        }
    }

    #[test]
    fn two_that_must_talk_and_only_dial_out_are_refused_with_both_names() {
        let mut file = example();
        file.core.dealer.address.clear();
        file.check().unwrap();
        file.core.parties[1].address.clear();
        let (field, detail) = file.check().unwrap_err();
        assert_eq!(field, "core.dealer.address");
        assert!(
            detail.contains("west") && detail.contains("centre"),
            "{detail}"
        );
        file.core.dealer.address = "centre.example.org:1".into();
        let (field, detail) = file.check().unwrap_err();
        assert_eq!(field, "core.parties[1].address");
        assert!(
            detail.contains("west") && detail.contains("st-anna"),
            "{detail}"
        );
    }

    #[test]
    fn an_entry_reads_back_with_its_transport_and_without_an_address() {
        let mut file = example();
        file.core.dealer.address.clear();
        file.core.parties[0].transport = Protocol::Tcp;
        assert_eq!(
            toml::from_str::<ConsortiumFile>(&file.to_toml()).unwrap(),
            file
        );
        for member in [
            &file.core.dealer,
            &file.core.parties[0],
            &file.core.parties[1],
        ] {
            assert_eq!(
                &toml::from_str::<Member>(&member.to_lines()).unwrap(),
                member
            );
        }
        assert_eq!(file.core.parties[0].place(), "127.0.0.1:1 tcp");
        assert_eq!(file.core_hash(), example().core_hash());
    }

    #[test]
    fn a_node_listens_as_the_file_says_or_does_not_start() {
        let identity = crate::identity::generate("node").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _inside = runtime.enter();
        let listen = "127.0.0.1:0".parse().unwrap();
        let mut file = example();
        let bind = |file: &ConsortiumFile, out| {
            let bound = file.bind(Peer::Dealer, &identity, listen, out, &Settings::default());
            bound.map(drop).map_err(|err| err.to_string())
        };
        bind(&file, false).unwrap();
        assert!(bind(&file, true).unwrap_err().contains("127.0.0.1:4"));
        file.core.dealer.address.clear();
        bind(&file, true).unwrap();
        assert!(
            bind(&file, false)
                .unwrap_err()
                .contains("dial_out_only = true")
        );
    }
}

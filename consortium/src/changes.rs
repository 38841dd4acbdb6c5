//! What has changed between two lists of members, in words: for those who sign, and for logs.

use std::fmt;

use crate::{ConsortiumFile, MemberEntry, MemberRole, hex};

impl fmt::Display for MemberRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemberRole::Hospital => "hospital",
            MemberRole::Analyst => "analyst",
        })
    }
}

impl ConsortiumFile {
    /// What this file's members have become since `old`, a line each.
    pub fn changes_since(&self, old: &ConsortiumFile) -> Vec<String> {
        let before = |member: &&MemberEntry| old.member(member.pin).is_none();
        let after = |member: &&MemberEntry| self.member(member.pin).is_none();
        let gone = old.members.iter().filter(after);
        let gone = gone.map(|member| format!("removes {} {}", member.role, member.name));
        let new = self.members.iter().filter(before);
        let new = new.map(|member| {
            let key = hex(member.pin.as_bytes());
            format!("adds {} {} with the key {key}", member.role, member.name)
        });
        let mut lines: Vec<String> = gone.chain(new).collect();
        for member in &self.members {
            let Some(old) = old.member(member.pin) else {
                continue;
            };
            if (&old.name, old.role) != (&member.name, member.role) {
                lines.push(format!(
                    "makes {} {} the {} {}",
                    old.role, old.name, member.role, member.name
                ));
            }
            let (now, then) = (member.accepted(), old.accepted());
            let added = now.iter().filter(|key| !then.contains(key));
            lines.extend(added.map(|key| format!("accepts for {} the new key {key}", member.name)));
            let dropped = then.iter().filter(|key| !now.contains(key));
            lines.extend(dropped.map(|key| format!("refuses for {} the key {key}", member.name)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use trefoil_transport::Pin;

    use super::*;
    use crate::file::tests::example;

    #[test]
    fn every_change_of_the_members_is_said() {
        let pin = |byte| Pin::from_bytes([byte; 32]);
        let old = example();
        assert_eq!(old.changes_since(&old), Vec::<String>::new());

        let mut new = old.clone();
        new.members
            .push(MemberEntry::new("berta", MemberRole::Hospital, pin(10)));
        assert_eq!(
            new.changes_since(&old)[0],
            format!("adds hospital berta with the key {}", pin(10))
        );
        assert_eq!(old.changes_since(&new), ["removes hospital berta"]);

        let mut rotating = old.clone();
        rotating.members[0].keys = vec![pin(9), pin(11)];
        let accepts = format!("accepts for st-anna the new key {}", pin(11));
        assert_eq!(rotating.changes_since(&old), [accepts]);
        let mut rotated = rotating.clone();
        rotated.members[0].keys = vec![pin(11)];
        let refuses = format!("refuses for st-anna the key {}", pin(9));
        assert_eq!(rotated.changes_since(&rotating), [refuses]);

        let mut other = old.clone();
        other.members[0].role = MemberRole::Analyst;
        assert_eq!(
            other.changes_since(&old),
            ["makes hospital st-anna the analyst st-anna"]
        );
    }
}

//! `trefoil withdraw`: a hospital takes its rows back, at all three parties. It may be run again
//! until all three have deleted; nothing happens twice.

use anyhow::{Result, bail};
use clap::Args;
use trefoil_consortium::check_name;
use trefoil_consortium::wire::{Contribution, Withdrawal};
use trefoil_protocol::party::PartyId;

use super::record::forget_uploads;
use super::{HomeArgs, Member, block_on};
use crate::remote::{RemoteError, Withdrawer};

/// Arguments of `trefoil withdraw`.
#[derive(Debug, Args)]
pub struct WithdrawArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// The data set.
    #[arg(long, value_name = "NAME")]
    dataset: String,
    /// This upload alone, by the number that `trefoil share` and `trefoil dataset` tell; all of this
    /// hospital's without it.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    upload: Option<u64>,
}

/// Deletes this hospital's contributions to a data set.
///
/// # Errors
/// A party did not answer, or refused: the others have deleted, and the command can be run again.
pub fn withdraw(args: &WithdrawArgs) -> Result<()> {
    check_name(&args.dataset).map_err(|err| anyhow::anyhow!("--dataset: {err}"))?;
    let member = Member::load(&args.home)?;
    member.must_be_hospital()?;
    let dataset = args.dataset.as_str();
    let seen = member.config.seen_from_here(member.consortium.clone());
    block_on(async {
        let withdrawer = Withdrawer::new(&member.identity, &seen, &member.config.transport).await?;
        let done = everywhere(&member, &withdrawer, args).await;
        withdrawer.close().await;
        let (what, left) = done?;
        forget_uploads(&member.home, dataset, what)?;
        match args.upload {
            Some(number) => println!(
                "withdrew upload {number} of {} from data set {dataset}",
                member.name()
            ),
            None => println!("withdrew all of {} from data set {dataset}", member.name()),
        }
        if !left.is_empty() {
            let numbers: Vec<String> = left.iter().map(|left| left.number.to_string()).collect();
            println!("  left: uploads {}", numbers.join(", "));
        }
        Ok(())
    })
}

/// Asks all three parties, until they agree.
async fn everywhere(
    member: &Member,
    withdrawer: &Withdrawer,
    args: &WithdrawArgs,
) -> Result<(Withdrawal, Vec<Contribution>)> {
    let dataset = args.dataset.as_str();
    let numbers = withdrawer.next_numbers(dataset).await;
    // A party may have missed an upload, and may be away; the others know its number.
    let known = numbers.iter().flatten().copied().max();
    let Some(next) = known else {
        bail!("no party answered:{}", reasons(&numbers));
    };
    let what = match args.upload {
        None => {
            let answered = numbers
                .each_ref()
                .map(|number| number.as_ref().ok().copied());
            let Some(ends) = ends(answered) else {
                bail!(
                    "at least two parties have to answer before all is withdrawn:{}",
                    reasons(&numbers)
                );
            };
            ends.map(Withdrawal::Below)
        }
        Some(number) if number < next => [Withdrawal::One(number); 3],
        Some(number) => bail!(
            "there is no upload {number} of {} to data set {dataset}: its next one is number {next}{}",
            member.name(),
            reasons(&numbers)
        ),
    };
    if next == 1 && numbers.iter().all(Result::is_ok) {
        bail!(
            "{} has shared nothing with data set {dataset}",
            member.name()
        );
    }
    let answers = withdrawer.withdraw(dataset, what).await;
    let failed = answers.iter().filter(|answer| answer.is_err()).count();
    if failed > 0 {
        let have: Vec<String> = PartyId::ALL
            .into_iter()
            .zip(&answers)
            .filter(|(_, answer)| answer.is_ok())
            .map(|(party, _)| party.to_string())
            .collect();
        let have = match have.is_empty() {
            true => "nobody has deleted anything".into(),
            false => format!("{} deleted its shares", have.join(" and ")),
        };
        bail!(
            "the withdrawal is not complete: {have};{}\n  run the same command again until all three \
             parties have deleted",
            reasons(&answers)
        );
    }
    let mut left = answers.into_iter().flatten();
    let (a, b, c) = (left.next(), left.next(), left.next());
    if a != b || b != c {
        bail!(
            "all three parties have deleted what was withdrawn, and they disagree on what is left of \
             {} in data set {dataset}: an upload is complete at some of them only. `trefoil share` \
             finishes it, or withdraw it too",
            member.name()
        );
    }
    let all = what.into_iter().max_by_key(|what| match what {
        Withdrawal::One(number) | Withdrawal::Below(number) => *number,
    });
    Ok((all.unwrap_or(what[0]), a.unwrap_or_default()))
}

/// Up to which number all is withdrawn at each party, from the next numbers that they name; none where
/// fewer than two do. What two of them name holds for all three, since a party may have missed an
/// upload; what one alone names holds for itself, so that its word spends no numbers at the others.
fn ends(next: [Option<u64>; 3]) -> Option<[u64; 3]> {
    let mut known: Vec<u64> = next.iter().flatten().copied().collect();
    known.sort_unstable();
    let agreed = known.iter().rev().nth(1).copied()?;
    Some(next.map(|own| own.unwrap_or(agreed).max(agreed)))
}

/// What the parties that failed say, a line each.
fn reasons<T>(answers: &[std::result::Result<T, RemoteError>; 3]) -> String {
    let failed = answers.iter().filter_map(|answer| answer.as_ref().err());
    failed.map(|err| format!("\n  {err}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_party_alone_spends_no_numbers_at_the_others() {
        assert_eq!(ends([Some(4), Some(4), Some(4)]), Some([4, 4, 4]));
        // P1 has missed the last upload, P2 names the largest number that there is.
        assert_eq!(
            ends([Some(4), Some(3), Some(u64::MAX)]),
            Some([4, 4, u64::MAX])
        );
        assert_eq!(ends([Some(1), Some(4), Some(4)]), Some([4, 4, 4]));
        // One is away.
        assert_eq!(ends([None, Some(4), Some(4)]), Some([4, 4, 4]));
        assert_eq!(ends([None, Some(3), Some(9)]), Some([3, 3, 9]));
        assert_eq!(ends([None, Some(3), None]), None);
    }
}

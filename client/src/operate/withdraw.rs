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
        None => Withdrawal::Below(next),
        Some(number) if number < next => Withdrawal::One(number),
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
    Ok((what, a.unwrap_or_default()))
}

/// What the parties that failed say, a line each.
fn reasons<T>(answers: &[std::result::Result<T, RemoteError>; 3]) -> String {
    let failed = answers.iter().filter_map(|answer| answer.as_ref().err());
    failed.map(|err| format!("\n  {err}")).collect()
}

//! `trefoil-dealer CONFIG`: the daemon of the dealer.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use trefoil_consortium::DealerConfig;

/// The daemon of the dealer of correlated randomness.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    config: PathBuf,
    /// Run as another program's child: print the address, read the peers' from standard input, and
    /// end when it ends.
    #[arg(long)]
    attached: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = DealerConfig::load(&arguments.config)
        .map_err(anyhow::Error::from)
        .and_then(|config| trefoil_dealer::run(config, arguments.attached));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("trefoil-dealer: {err:#}");
            ExitCode::FAILURE
        }
    }
}

//! The `trefoil` tool. Everything is in the library, so that tests can be the same program.

fn main() -> std::process::ExitCode {
    trefoil_client::cli::main()
}

//! The `trefoil` tool, for the tests of this package.

fn main() -> std::process::ExitCode {
    trefoil_client::cli::main()
}

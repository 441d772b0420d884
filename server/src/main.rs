//! The `absurd` command.

fn main() -> std::process::ExitCode {
    absurd_server::cli::main()
}

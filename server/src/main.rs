//! The `absurd` command: calls [`absurd_server::cli::main`].

fn main() -> std::process::ExitCode {
    absurd_server::cli::main()
}

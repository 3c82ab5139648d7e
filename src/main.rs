//! The `mirrorfs` program: hands over to [`mirrorfs::cli`].

fn main() -> std::process::ExitCode {
    mirrorfs::cli::main()
}

//! `selfie`: self-supervised pretraining of image networks, from the command line.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    selfie_cli::main()
}

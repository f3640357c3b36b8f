//! The binary `selfie`, as a library whose one item is [`main`]: so that the fuzzers in `fuzz/` reach its parsers.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where nobody reads: `screen` doesn't")
)]
#![allow(unreachable_pub, reason = "only `main` is exported: here `pub` says what a module offers to the others")]

mod args;
mod choices;
mod commands;
mod config;
mod data;
mod destination;
mod device;
mod exit;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod halfblocks;
mod log;
mod memory;
mod panic;
mod parity;
mod progress;
mod puzzle;
mod run_folder;
mod screen;
mod shell;
mod signals;
mod statistics;
mod svg;
mod system;
mod training;
mod vectors;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use exit::Exit;

/// Runs the command that was typed.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log::start();
    let exit = panic::guarded(|| {
        run(&cli.command).unwrap_or_else(|error| {
            exit::report(&error);
            Exit::of(&error)
        })
    });
    screen::flush();
    exit.into()
}

fn run(command: &Command) -> anyhow::Result<Exit> {
    match command {
        Command::Demo(arguments) => commands::demo::run(arguments),
        Command::Pretrain(arguments) => commands::pretrain::run(arguments),
        Command::Finetune(arguments) => commands::finetune::run(arguments),
        Command::Fewlabel(arguments) => commands::fewlabel::run(arguments),
        Command::Evaluate(arguments) => commands::evaluate::run(arguments),
        Command::Probe(command) => commands::probe::run(command),
        Command::Embed(arguments) => commands::embed::run(arguments),
        Command::Neighbors(arguments) => commands::neighbors::run(arguments),
        Command::Map(arguments) => commands::map::run(arguments),
        Command::Predict(arguments) => commands::predict::run(arguments),
        Command::Export(arguments) => commands::export::run(arguments),
        Command::Inspect(arguments) => commands::inspect::run(arguments),
        Command::Replay(arguments) => commands::replay::run(arguments),
        Command::Doctor(arguments) => commands::doctor::run(arguments),
        Command::Bench(arguments) => commands::bench::run(arguments),
        Command::Data(command) => commands::data::run(command),
        Command::Config(config) => commands::config::run(config),
    }
}

//! Flags of the commands that look at weights and take them elsewhere.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use selfie_model::Format;

pub(super) const EXPORT_HELP: &str = "\
What is written:
  timm         a folder for timm.create_model(\"local-dir:..\"): model.safetensors, config.json, README.md;
               where PATH ends in .safetensors, that file alone
  onnx         opset 17; in: `images`, float32 [batch, 3, side, side], normalised; out: `logits` [batch, classes] of a
               classifier, and `embedding` [batch, width]; mean, std, size and classes in the metadata
  safetensors  one file with timm's names, and what config.json says in its metadata; `selfie finetune --init` takes it
What a pretraining needs for its puzzle alone stays behind. The lines that load the result are printed.

--check reads what was written again: every tensor bit by bit, and the outputs for two random images against the network
itself, in f64. For ONNX the file's own graph is computed, with its metadata, by the definitions of its operators.

Keys of --json:
  path, format, classes, input, loading, check: null or {tensors, images, distance (relative, of the outputs)}

Examples:
  selfie export runs/fine --to onnx -o fine.onnx --check
  selfie export runs/pre --to timm -o exported/pre
  selfie export runs/fine/state/step-00001200 --to safetensors -o best.safetensors
  selfie export resnetv2_50.safetensors --to onnx -o resnetv2_50.onnx";

/// Flags of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// A run, a checkpoint's or a weights folder, or a .safetensors file with timm's names
    #[arg(value_name = "RUN|FILE")]
    pub source: PathBuf,
    /// For whom
    #[arg(long, value_name = "FORMAT")]
    pub to: To,
    /// The file to write, for timm the folder
    #[arg(short, long, value_name = "PATH")]
    pub out: PathBuf,
    /// Read what was written again, and compare it with the network
    #[arg(long)]
    pub check: bool,
    /// Replace the file if it is there
    #[arg(long, visible_alias = "force")]
    pub overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Threads that --check computes with; 0 takes one per core that this process may use
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

/// A format of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// A folder for timm
    Timm,
    /// An ONNX file
    Onnx,
    /// One safetensors file
    Safetensors,
}

impl From<To> for Format {
    fn from(to: To) -> Self {
        match to {
            To::Timm => Format::Timm,
            To::Onnx => Format::Onnx,
            To::Safetensors => Format::Safetensors,
        }
    }
}

/// Flags of `inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// A run folder, a checkpoint folder or a .safetensors file
    pub path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

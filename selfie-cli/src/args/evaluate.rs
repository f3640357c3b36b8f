//! Flags of `evaluate`.

use std::path::PathBuf;

use clap::Args;

use super::{ConfigFlags, ForEvaluate};

pub(super) const EVALUATE_HELP: &str = "\
What is measured, on the test part:
  top-1, top-5       with Wilson's 95% interval of top-1: where it would lie on other such images
  loss               mean cross-entropy, in nats
  calibration error  by how much the network's confidence differs from its accuracy (expected calibration error, 15 bins of
                     equal width)
  of each class      its accuracy, and what its images were taken for
Of several runs each is measured, then mean and standard deviation (n - 1) over them.

Keys of --json (shares between 0 and 1):
  run, top1, top1_low, top1_high, top5, n (images), loss, calibration_error,
  per_class: [{class, n, accuracy}], confusion: [class][predicted] images
of several runs: n (runs), over_runs: {top1, top5, loss, calibration_error: {mean, std}}, runs: [each as above]

Examples:
  selfie evaluate runs/fine --data photos/
  selfie evaluate runs/fine --data photos/ --matrix confusion.svg
  selfie evaluate runs/table/cells/pre/5%/* --json";

/// Flags of `evaluate`.
#[derive(Debug, Args)]
pub struct Evaluate {
    /// Folders of finetuned runs; of several also the mean
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// Write the confusion matrix, of all runs together: a .svg or .csv file
    #[arg(long, value_name = "FILE")]
    pub matrix: Option<PathBuf>,
    /// Replace that file if it is there
    #[arg(long, visible_alias = "force", requires = "matrix")]
    pub overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub flags: ConfigFlags<ForEvaluate>,
}

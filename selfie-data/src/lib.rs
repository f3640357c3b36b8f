//! Images in, batches out: datasets, label subsets, augmentation draws and the prefetching
//! loader.
//!
//! - [`open`] recognises what lies at a path and gives a [`Dataset`]: u8 RGB images, perhaps labels;
//! - [`audit`] looks at every image before anyone trains on them;
//! - [`LabelBudget`] chooses the few labelled images; [`split_validation`] takes a part off them;
//! - [`EpochStream`] is the endless order of training: one seeded permutation per epoch;
//! - [`TrainLoader`] cuts it into full batches on threads of its own, [`EvalLoader`] walks a split
//!   once. What a batch holds depends on the seed alone, never on threads or time.
//!
//! Images stay u8 until the `augment` operation of the kernels crops, flips and scales them; the
//! loader only draws *how* ([`Draw`]). All randomness comes from an injected counter-based source,
//! [`Draws`], so that one generator serves the data, the CPU and the GPU.
#![forbid(unsafe_code)]

mod audit;
mod augment;
mod bounded;
mod cifar;
mod dataset;
mod downsampled;
mod draws;
mod error;
mod exif;
mod files;
mod folder;
mod foreign;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod gzip;
mod jpeg;
mod labels;
mod left_out;
mod loader;
mod names;
mod npz;
mod parts;
mod pickle;
mod picture;
mod records;
mod shards;
mod stream;
mod synthetic;
mod tar_index;
#[cfg(any(test, fuzzing))]
mod testing;
mod tree;
mod val_labels;

pub use audit::{Audit, AuditConfig, DEFAULT_MIN_SIDE, Leak, Misnamed, PartAudit, Sizes, Spread, Tiny, audit};
pub use augment::{Augment, CROP_PADDING, Draw};
pub use dataset::{Dataset, Geometry, Matched, Need, Split, match_classes, open};
pub use draws::{Draws, Purpose, Seeded};
pub use error::{BadFile, Error, ErrorKind, Result};
pub use files::files;
pub use foreign::Foreign;
pub use labels::{LabelBudget, sample_indices, split_validation, write_labels};
pub use loader::{Batch, DEFAULT_MAX_BAD, EvalLoader, LoaderConfig, TrainLoader, UNLABELLED, allowed_bad};
pub use picture::Image;
pub use stream::EpochStream;

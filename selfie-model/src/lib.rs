//! The networks of Selfie and their training: ResNet-50 v2, patch network, attention pooling, the pretext objective,
//! the classifier, SGD, schedule, trainer and checkpoints, over any [`selfie_kernels::Backend`].
#![forbid(unsafe_code)]

mod attention_pool;
mod batch_negatives;
mod checkpoint;
mod classifier;
mod config;
mod description;
mod draws;
pub mod durable;
mod encoder;
mod error;
mod evaluation;
mod export;
mod features;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod init;
mod input;
mod layers;
mod memory_plan;
mod metrics;
mod network;
mod onnx;
mod parameters;
pub mod probe;
mod recording;
mod replay;
mod resnet;
mod schedule;
mod selfie;
mod state;
mod steps;
mod tensor_file;
mod train_config;
mod trainer;
mod transfer;
mod transformer;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointStore, Difference, Newest, Progress, differences};
pub use classifier::Classifier;
pub use config::{Head, LogitScale, ModelConfig, NamedScale, Negatives, Positions, Preset, Query, Stem};
pub use description::Description;
pub use draws::{PhiloxDraws, evaluation_order, training_order};
pub use encoder::{Encoded, Encoder, EncoderLayers, Layer, Pooling};
pub use error::{Error, ErrorKind, Result};
pub use evaluation::{
    CALIBRATION_BINS, Classification, Classify, Evaluation, Images, classify, evaluate, evaluation_loader,
};
pub use export::{Agreement, Export, Format};
pub use memory_plan::MemoryPlan;
pub use network::{Begin, Build, Inputs, Loss, Metrics, Mode, Network, Purpose, Sizes, Update};
pub use parameters::{Entry, Layout, Parameters, Statistics, Table};
pub use replay::{About as StepAbout, Replay, Replayed, StepBatch, TensorReport};
pub use schedule::{Length, Schedule};
pub use selfie::Selfie;
pub use steps::{Feed, Steps};
pub use tensor_file::TensorFile;
pub use train_config::{DEFAULT_STEPS, TrainConfig};
pub use trainer::{MAX_SKIPPED_IN_A_ROW, StepMetrics, Trainer, training_loader};
pub use weights::{
    About, Fingerprint, Initialized, MODEL_FILE, POOL_FILE, PatchNorm, Resize, find_weights, fingerprint, initialize,
    load_weights, write_weights,
};

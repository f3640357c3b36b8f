//! Numbers and buffers: every operation of a training step, once as a contract and once per backend.
//!
//! The crate knows no network, file or data set. One folder is one operation: `mod.rs` is its contract (formula,
//! dims, arguments, `check`), `cpu.rs` the CPU implementation, `tests.rs` an `f64` oracle, a table of cases and
//! properties. [`Backend`] is the table of contents.
//!
//! Layouts: images and feature maps are `[n, h, w, c]`, filters `[k, r, s, c]`, matrices row-major.

mod conv_dims;
mod cost;
mod dropout;
mod element;
mod error;
mod grad;
mod memory;
mod partials;
mod passes;
mod philox;
mod profile;
#[cfg(test)]
mod testing;

pub mod cpu;
pub mod cuda;

pub mod attention;
pub mod augment;
pub mod bn_commit;
pub mod bn_finalize;
pub mod contrast;
pub mod gemm;
pub mod grad_join;
pub mod norm_relu_conv;
pub mod norm_relu_pool;
pub mod residual_norm;
pub mod sgd;
pub mod softmax_cross_entropy;
pub mod stem_conv;
pub mod stem_pool;
pub mod tokens;

pub use conv_dims::ConvDims;
pub use cost::Cost;
pub use cpu::{Cpu, instruction_set};
pub use cuda::Cuda;
pub use dropout::Dropout;
pub use element::{Element, Scalar, Wide};
pub use error::{Error, Result};
pub use grad::{Affine, Grad};
pub use memory::{Len, Memory, View, ViewMut};
pub use partials::{Partials, partials_room};
pub use philox::{Philox, Purpose};
pub use profile::{Call, Choice, Profile};

/// Everything a device must offer to train: memory, the operations in the element type `T` of activations, and how long
/// each took.
pub trait Backend<T: Element>:
    Memory
    + Profile
    + augment::Augment<T>
    + stem_conv::StemConv<T>
    + stem_pool::StemPool<T>
    + norm_relu_conv::NormReluConv<T>
    + bn_finalize::BnFinalize<T>
    + bn_commit::BnCommit<T>
    + norm_relu_pool::NormReluPool<T>
    + grad_join::GradJoin<T>
    + gemm::Gemm<T>
    + attention::Attention<T>
    + residual_norm::ResidualNorm<T>
    + tokens::Tokens<T>
    + contrast::Contrast<T>
    + softmax_cross_entropy::SoftmaxCrossEntropy<T>
    + sgd::Sgd<T>
{
}

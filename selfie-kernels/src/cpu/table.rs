//! The operations, compiled once in this crate for each element type.
//!
//! A generic function is compiled again by every crate that calls it, and the kernels, each for three instruction sets, are
//! most of what there is to compile. So the generic bodies are reached through a table of function pointers, filled here
//! for `f32`, `bf16` and `f64`: networks, tests and the binary only link them. The contract's `check` runs on the way.

use super::Cpu;
use crate::{Element, Result};

macro_rules! operations {
    ($($module:ident::$operation:ident { $($pass:ident($args:ident)),* })*) => {
        /// Every pass of every operation for the element type `T`.
        #[derive(Debug)]
        pub struct Table<T: Element> {
            $($($pass: for<'a> fn(&Cpu, crate::$module::$args<'a, Cpu, T>) -> Result<()>,)*)*
        }

        impl<T: Element> Table<T> {
            /// To be put into a static of this crate, one for each element type.
            pub(crate) const FILLED: Self = Self { $($($pass: crate::$module::cpu::$pass::<T>,)*)* };
        }

        $(impl<T: Element> crate::$module::$operation<T> for Cpu {
            $(fn $pass(&self, args: crate::$module::$args<'_, Self, T>) -> Result<()> {
                args.check()?;
                (T::on_cpu().$pass)(self, args)
            })*
        })*
    };
}

operations! {
    augment::Augment { augment(Args) }
    stem_conv::StemConv { stem_conv_forward(Forward), stem_conv_backward_filter(BackwardFilter) }
    max_pool::MaxPool { max_pool_forward(Forward), max_pool_backward(Backward) }
    norm_relu_conv::NormReluConv { norm_relu_conv_forward(Forward), norm_relu_conv_backward_data(BackwardData), projection_backward_data(ProjectionBackwardData), norm_relu_conv_backward_filter(BackwardFilter) }
    bn_finalize::BnFinalize { bn_finalize_forward(Forward), bn_finalize_inference(Inference), bn_finalize_backward(Backward) }
    bn_commit::BnCommit { bn_commit(Commit) }
    norm_relu_pool::NormReluPool { norm_relu_pool_forward(Forward), norm_relu_pool_backward(Backward) }
    grad_join::GradJoin { grad_join(Join) }
    gemm::Gemm { gemm_forward(Forward), gemm_backward_data(BackwardData), gemm_backward_weight(BackwardWeight) }
    attention::Attention { attention_forward(Forward), attention_backward(Backward) }
    residual_norm::ResidualNorm { residual_norm_forward(Forward), residual_norm_backward(Backward) }
    tokens::Tokens { tokens_forward(Forward), tokens_backward(Backward) }
    contrast::Contrast { contrast(Args) }
    softmax_cross_entropy::SoftmaxCrossEntropy { softmax_cross_entropy(Args) }
    sgd::Sgd { gradient_norm(Norm), gradient_accumulate(Accumulate), sgd_update(Update) }
}

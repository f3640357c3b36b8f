//! The list of all passes of all operations: each backend implements the traits by one macro over it, and every contract's
//! `check` runs there.

/// Calls a macro with `module::Trait { pass(Arguments), .. }` of every operation; behind a semicolon what the contract makes of
/// these passes already, and a device may do better.
macro_rules! for_each_pass {
    ($implement:ident) => {
        $implement! {
            augment::Augment { augment(Args) }
            stem_conv::StemConv { stem_conv_forward(Forward), stem_conv_backward_filter(BackwardFilter) }
            stem_pool::StemPool { stem_pool_forward(Forward), stem_pool_backward_filter(BackwardFilter) }
            norm_relu_conv::NormReluConv { norm_relu_conv_forward(Forward), norm_relu_conv_backward_data(BackwardData), projection_backward_data(ProjectionBackwardData), norm_relu_conv_backward_filter(BackwardFilter); norm_relu_conv_backward(Backward) }
            bn_finalize::BnFinalize { bn_finalize_forward(Forward), bn_finalize_inference(Inference), bn_finalize_backward(Backward) }
            bn_commit::BnCommit { bn_commit(Commit) }
            norm_relu_pool::NormReluPool { norm_relu_pool_forward(Forward), norm_relu_pool_backward(Backward) }
            grad_join::GradJoin { grad_join(Join) }
            gemm::Gemm { gemm_forward(Forward), gemm_backward_data(BackwardData), gemm_backward_weight(BackwardWeight) }
            attention::Attention { attention_forward(Forward), attention_backward(Backward) }
            residual_norm::ResidualNorm { residual_norm_forward(Forward), residual_norm_backward(Backward) }
            tokens::Tokens { tokens_forward(Forward), tokens_backward(Backward) }
            contrast::Contrast { contrast(Args), contrast_units(Units), contrast_units_backward(UnitsBackward) }
            softmax_cross_entropy::SoftmaxCrossEntropy { softmax_cross_entropy(Args) }
            sgd::Sgd { gradient_norm(Norm), gradient_accumulate(Accumulate), sgd_update(Update) }
        }
    };
}
pub(crate) use for_each_pass;

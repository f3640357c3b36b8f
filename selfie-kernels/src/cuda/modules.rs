//! The kernels as the program carries them: PTX, which `cuda/compile` makes of each `<op>.cu` and the driver compiles for
//! its GPU, once; it keeps what it compiled.

macro_rules! modules {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../cuda/ptx/", $name, ".ptx")))),+]
    };
}

/// Name and PTX of every kernel file.
const MODULES: &[(&str, &str)] = modules![
    "attention",
    "augment",
    "backward_filter",
    "backward_filter_sm90",
    "bn_commit",
    "bn_finalize",
    "contrast",
    "gemm",
    "gemm_sm90",
    "grad_join",
    "norm_relu_conv_backward_data",
    "norm_relu_conv_backward_data_sm90",
    "norm_relu_conv_forward",
    "norm_relu_conv_forward_sm90",
    "norm_relu_pool",
    "residual_norm",
    "sgd",
    "softmax_cross_entropy",
    "stem_conv",
    "stem_pool",
    "tokens",
];
/// Those of the wrappers' own tests.
#[cfg(test)]
const TEST_MODULES: &[(&str, &str)] = modules!["conformance", "conformance_sm90"];
#[cfg(not(test))]
const TEST_MODULES: &[(&str, &str)] = &[];

/// The PTX of `<module>.cu`.
pub(crate) fn image(module: &str) -> Option<&'static str> {
    MODULES.iter().chain(TEST_MODULES).find(|(name, _)| *name == module).map(|(_, ptx)| *ptx)
}

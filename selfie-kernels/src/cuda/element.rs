use crate::Element;
use half::bf16;

/// The types of activations that the kernels are written for.
pub trait CudaElement: Element<Wide = f32> {
    /// How a kernel's name ends.
    #[doc(hidden)]
    const SUFFIX: &'static str;
    /// Distance from 1 to the next larger number of the type that operands of products are rounded to.
    #[doc(hidden)]
    const OPERAND_EPSILON: f64;
}

impl CudaElement for f32 {
    const SUFFIX: &'static str = "f32";
    const OPERAND_EPSILON: f64 = 0.0;
}

impl CudaElement for bf16 {
    const SUFFIX: &'static str = "bf16";
    const OPERAND_EPSILON: f64 = <bf16 as Element>::EPSILON;
}

//! Convolutions on a GPU: each pass is one product, whose arguments, geometry and choice of kernel are in [`product`],
//! those for Hopper in [`hopper`].

mod backward;
mod backward_data;
pub(crate) mod backward_filter;
mod forward;
mod hopper;
mod product;
#[cfg(test)]
mod tests;

pub(crate) use backward::norm_relu_conv_backward;
pub(crate) use backward_data::{norm_relu_conv_backward_data, projection_backward_data};
pub(crate) use backward_filter::norm_relu_conv_backward_filter;
pub(crate) use forward::norm_relu_conv_forward;

use crate::ConvDims;
use crate::cuda::CudaElement;

/// Something that tables of choices have a name for: what a kernel's name has beside the pass.
trait Named {
    fn name(&self) -> String;
}

/// What may do a pass.
#[derive(Debug, Clone, Copy)]
enum Variant<H, O> {
    /// A kernel for Hopper.
    Hopper(H),
    /// One that older devices have, too.
    Older(O),
}

impl<H: Named, O: Named> Named for Variant<H, O> {
    fn name(&self) -> String {
        match self {
            Self::Hopper(variant) => format!("hopper_{}", variant.name()),
            Self::Older(variant) => variant.name(),
        }
    }
}

/// What kernels are chosen by: element type, sizes, images.
fn shape<T: CudaElement>(dims: &ConvDims) -> String {
    format!("{} {dims}, {} images", T::SUFFIX, dims.n)
}

/// The same where a gradient is an operand.
fn shape_with_grad<T: CudaElement>(dims: &ConvDims, kind: &str) -> String {
    format!("{}, {kind} gradient", shape::<T>(dims))
}

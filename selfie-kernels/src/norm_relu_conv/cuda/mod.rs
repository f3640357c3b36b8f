//! Convolutions on a GPU: each pass is one product, whose arguments, geometry and choice of kernel are in [`product`],
//! those for Hopper in [`hopper`].

mod backward;
mod backward_data;
pub(crate) mod backward_filter;
mod forward;
mod hopper;
mod product;

pub(crate) use backward::norm_relu_conv_backward;
pub(crate) use backward_data::{norm_relu_conv_backward_data, projection_backward_data};
pub(crate) use backward_filter::norm_relu_conv_backward_filter;
pub(crate) use forward::norm_relu_conv_forward;

use super::backward_data::ways;
use super::backward_filter::for_hopper;
use super::hopper;
use crate::cuda::CudaElement;
use crate::norm_relu_conv::{Backward, NormReluConv};
use crate::{Cuda, Result};

pub(crate) fn norm_relu_conv_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let (filter, mut data) = args.passes();
    let (_, data_for_hopper) = ways(&mut data)?;
    let Some(both) = hopper::Backward::of::<T>(cuda, data_for_hopper, for_hopper(&filter)) else {
        cuda.norm_relu_conv_backward_filter(filter)?;
        return cuda.norm_relu_conv_backward_data(data);
    };
    let args = Backward { data, dw: filter.dw };
    cuda.pass("norm_relu_conv_backward", args, Backward::cost, |_| both.launch::<T>(cuda))
}

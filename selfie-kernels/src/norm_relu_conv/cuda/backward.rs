use super::backward_data::ways;
use super::backward_filter::for_hopper;
use super::{Named, hopper, shape};
use crate::cuda::CudaElement;
use crate::norm_relu_conv::{Backward, NormReluConv};
use crate::{Cuda, Result};

pub(crate) fn norm_relu_conv_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let (filter, mut data) = args.passes();
    let (_, data_for_hopper) = ways(&mut data)?;
    let mut all = hopper::Backward::ways::<T>(cuda, data_for_hopper, for_hopper(&filter)).into_iter();
    let Some(rule) = all.next() else {
        cuda.norm_relu_conv_backward_filter(filter)?;
        return cuda.norm_relu_conv_backward_data(data);
    };
    let args = Backward { data, dw: filter.dw };
    let pass = "norm_relu_conv_backward";
    cuda.pass(pass, args, Backward::cost, |args| {
        let shape = || shape::<T>(&args.data.dims);
        cuda.choose(pass, shape, rule, all, Named::name).launch::<T>(cuda)
    })
}

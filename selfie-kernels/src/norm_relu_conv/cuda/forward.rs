use super::product::Product;
use crate::cuda::CudaElement;
use crate::norm_relu_conv::Forward;
use crate::{Cuda, Result};

pub(crate) fn norm_relu_conv_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, x, norm, w, residual, y, stats } = args;
    let mut product = Product::forward(dims)?;
    let cut = product.cut();
    let to = &mut product.args;
    to.a = x.into();
    to.coef = norm.address().offset(2 * dims.c * size_of::<f32>());
    to.b = w.into();
    to.add = residual.into();
    to.out = y.into();
    to.sums = stats.map(|stats| stats.make(cut, dims.k)).into();
    product.launch::<T>(cuda, product.way::<T>(cuda))
}

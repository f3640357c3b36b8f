use super::hopper;
use super::product::Product;
use crate::cuda::CudaElement;
use crate::norm_relu_conv::Forward;
use crate::{Cuda, Result};

pub(crate) fn norm_relu_conv_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, x, norm, w, residual, y, stats } = args;
    let mut product = Product::forward(dims)?;
    let stats = stats.map(|stats| stats.make(product.cut(), dims.k)).into();
    let coef = norm.address().offset(2 * dims.c * size_of::<f32>());
    let (x, w, residual, y) = (x.into(), w.into(), residual.into(), y.into());
    let hopper = hopper::Forward { dims, x, coef, w, residual, y, stats };
    if let Some(launched) = hopper.launch::<T>(cuda) {
        return launched;
    }
    let to = &mut product.args;
    (to.a, to.coef, to.b, to.add, to.out, to.sums) = (x, coef, w, residual, y, stats);
    product.launch::<T>(cuda, product.way::<T>(cuda))
}

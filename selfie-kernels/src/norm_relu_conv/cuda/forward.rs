use super::hopper;
use super::product::Product;
use super::{Named, Variant, shape};
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
    let to = &mut product.args;
    (to.a, to.coef, to.b, to.add, to.out, to.sums) = (x, coef, w, residual, y, stats);
    let rule = hopper.rule::<T>(cuda).map_or_else(|| Variant::Older(product.rule::<T>(cuda.facts())), Variant::Hopper);
    let for_hopper = hopper.kernels::<T>(cuda).into_iter().map(Variant::Hopper);
    let all = for_hopper.chain(product.kernels::<T>(cuda.facts()).into_iter().map(Variant::Older));
    match cuda.choose("norm_relu_conv_forward", || shape::<T>(&dims), rule, all, Named::name) {
        Variant::Hopper(kernel) => hopper.launch::<T>(cuda, kernel),
        Variant::Older(kernel) => product.launch::<T>(cuda, kernel),
    }
}

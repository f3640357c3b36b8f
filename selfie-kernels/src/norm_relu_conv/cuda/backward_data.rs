use super::hopper::{self, Mask};
use super::product::{Kernel, Product};
use super::{Named, Variant, shape_with_grad};
use crate::cuda::{Address, CudaElement, Grid, blocks};
use crate::norm_relu_conv::{BackwardData, ProjectionBackwardData};
use crate::{ConvDims, Cuda, Result};

/// `TransposeArgs` of `norm_relu_conv_backward_data.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct TransposeArgs {
    w: Address,
    transposed: Address,
    k: i32,
    taps: i32,
    c: i32,
    unused: i32,
}

pub(crate) fn norm_relu_conv_backward_data<T: CudaElement>(
    cuda: &Cuda,
    mut args: BackwardData<'_, Cuda, T>,
) -> Result<()> {
    let (product, hopper) = ways(&mut args)?;
    launch::<T>(cuda, "norm_relu_conv_backward_data", product, hopper)
}

/// The pass as either kind of kernels takes it.
pub(super) fn ways<T: CudaElement>(args: &mut BackwardData<'_, Cuda, T>) -> Result<(Product, hopper::BackwardData)> {
    let BackwardData { dims, dy, w, x, norm, addend, dz, sums } = args;
    let (dims, dy) = (*dims, *dy);
    let mut product = Product::backward_data(dims)?;
    let sums = sums.make(product.cut(), dims.c).into();
    let [w, x, norm, out] = [w.address(), x.address(), norm.address(), dz.address()];
    // Beyond the map's sides only the first pixel has an addend, whatever the stride.
    let add_step = addend.map_or(1, |addend| addend.stride.min(dims.h.max(dims.w)));
    let add = addend.map(|addend| addend.values).into();
    product.load_grad(dy);
    let to = &mut product.args;
    (to.b, to.x, to.norm, to.add, to.out, to.sums) = (w, x, norm, add, out, sums);
    to.add_step = add_step as i32;
    let mask = Some(Mask { x, norm, add, add_step, sums });
    Ok((product, hopper::BackwardData { dims, dy: dy.into(), w, mask, out }))
}

pub(crate) fn projection_backward_data<T: CudaElement>(
    cuda: &Cuda,
    args: ProjectionBackwardData<'_, Cuda, T>,
) -> Result<()> {
    let ProjectionBackwardData { dims, dy, w, dx } = args;
    let (w, out) = (w.into(), dx.into());
    // As if it had no stride.
    let compact = ConvDims { h: dims.p(), w: dims.q(), stride: 1, ..dims };
    let hopper = hopper::BackwardData { dims: compact, dy: dy.into(), w, mask: None, out };
    let mut product = Product::projection(compact)?;
    product.load_grad(dy);
    (product.args.b, product.args.out) = (w, out);
    launch::<T>(cuda, "projection_backward_data", product, hopper)
}

/// Chooses a kernel for the pass, and queues it.
fn launch<T: CudaElement>(
    cuda: &Cuda,
    pass: &'static str,
    mut product: Product,
    hopper: hopper::BackwardData,
) -> Result<()> {
    let dims = hopper.dims;
    let is_reached = dims.len_filter() * size_of::<T>() <= cuda.workspace_bytes();
    let product_rule = if is_reached { product.rule::<T>(cuda.facts()) } else { Kernel::PLAIN };
    let rule = hopper.rule::<T>(cuda).map_or(Variant::Older(product_rule), Variant::Hopper);
    let products = if is_reached { product.kernels::<T>(cuda.facts()) } else { Vec::new() };
    let for_hopper = hopper.kernels::<T>(cuda).into_iter().map(Variant::Hopper);
    let all = for_hopper.chain(products.into_iter().map(Variant::Older));
    match cuda.choose(pass, || shape_with_grad::<T>(&dims, hopper.dy.kind()), rule, all, Named::name) {
        Variant::Hopper(kernel) => hopper.launch::<T>(cuda, kernel),
        Variant::Older(kernel) => {
            if !kernel.is_plain() {
                transpose_filter::<T>(cuda, product.args.b, &dims)?;
                product.take_transposed(cuda.workspace());
            }
            product.launch::<T>(cuda, kernel)
        }
    }
}

/// The filters as `[c][r][s][k]` in the workspace.
fn transpose_filter<T: CudaElement>(cuda: &Cuda, w: Address, dims: &ConvDims) -> Result<()> {
    let ConvDims { c, k, r, s, .. } = *dims;
    let (k_i32, taps, c_i32) = (k as i32, (r * s) as i32, c as i32);
    let args = TransposeArgs { w, transposed: cuda.workspace(), k: k_i32, taps, c: c_i32, unused: 0 };
    let grid = Grid { blocks: [blocks(c, 32), blocks(k, 32), r * s], threads: 256, shared_bytes: 0 };
    cuda.launch::<T>("norm_relu_conv_backward_data", "conv_transpose_filter", grid, &args)
}

use super::{Activation, BackwardData, BackwardWeight, Forward, GemmDims, Write};
use crate::cuda::{Access, Address, ColumnSums, CudaElement, Grid, blocks};
use crate::{Cuda, Result};

const MODULE: &str = "gemm";

/// `Operand` of `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Operand {
    at: Address,
    stride: u64,
}

/// `Product` of `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Product {
    left: Operand,
    right: Operand,
    rows: u32,
    columns: u32,
    depth: u32,
    part: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardArgs {
    product: Product,
    bias: Address,
    y: Address,
    z: Address,
    access: Access,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct DataArgs {
    product: Product,
    gelu: Address,
    addend: Address,
    dx: Address,
    dx_stride: u64,
    accumulate: u32,
    access: Access,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct WeightArgs {
    product: Product,
    dw: Address,
    access: Access,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ReduceArgs {
    parts: Address,
    sums: Address,
    len: u64,
    count: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct BiasArgs {
    dy: Address,
    parts: Address,
    dbias: Address,
    tickets: Address,
    m: u32,
    n: u32,
    rows: u32,
    unused: u32,
}

/// Which kernel multiplies.
#[derive(Clone, Copy)]
struct Kernel {
    /// Follows the pass in the kernel's name.
    name: &'static str,
    /// Rows and columns of a block's tile.
    tile: usize,
    /// The summed index comes in slices of so many.
    slice: usize,
    threads: usize,
    shared_bytes: usize,
}

/// Takes any shape.
const PLAIN: Kernel = Kernel { name: "", tile: 64, slice: 16, threads: 256, shared_bytes: 0 };
/// Takes operands whose rows are whole, aligned chunks. Its shared memory: four stages of two slices.
const TENSOR_CORES: Kernel =
    Kernel { name: "_mma", tile: 128, slice: 32, threads: 128, shared_bytes: 4 * 2 * 128 * 80 };

impl Kernel {
    fn choose<T: CudaElement>(cuda: &Cuda, product: &Product, row_elements: [u32; 2]) -> Self {
        let chunks = |len: u64| len.is_multiple_of(8);
        let whole =
            |operand: Operand, row: u32| operand.at.is_aligned() && chunks(operand.stride) && chunks(row.into());
        let [left, right] = row_elements;
        let fits = whole(product.left, left) && whole(product.right, right);
        let has_room = TENSOR_CORES.shared_bytes <= cuda.facts().shared_bytes;
        // Only what is rounded as an operand of a product goes through the tensor cores.
        if T::OPERAND_EPSILON > 0.0 && fits && has_room { TENSOR_CORES } else { PLAIN }
    }

    fn tiles(&self, product: &Product) -> usize {
        (product.rows as usize).div_ceil(self.tile) * (product.columns as usize).div_ceil(self.tile)
    }

    fn launch<T: CudaElement>(
        &self,
        cuda: &Cuda,
        pass: &str,
        product: &Product,
        args: &impl bytemuck::NoUninit,
    ) -> Result<()> {
        let parts = product.depth.div_ceil(product.part) as usize;
        let grid = Grid {
            blocks: [self.tiles(product) * parts, 1, 1],
            threads: self.threads,
            shared_bytes: self.shared_bytes,
        };
        cuda.launch::<T>(MODULE, &format!("{pass}{}", self.name), grid, args)
    }
}

impl Product {
    fn new([left, right]: [(Address, usize); 2], [rows, columns, depth]: [usize; 3]) -> Self {
        let operand = |(at, stride): (Address, usize)| Operand { at, stride: stride as u64 };
        let (rows, columns, depth) = (rows as u32, columns as u32, depth as u32);
        Self { left: operand(left), right: operand(right), rows, columns, depth, part: depth }
    }
}

pub(crate) fn gemm_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, x, w, bias, activation, y } = args;
    let GemmDims { m, n, k, x_stride } = dims;
    let product = Product::new([(x.into(), x_stride), (w.into(), k)], [m, n, k]);
    let z = match activation {
        Activation::Identity => Address::NONE,
        Activation::Gelu { z } => z.into(),
    };
    let (bias, y) = (bias.into(), y.into());
    let args = ForwardArgs { product, bias, y, z, access: Access::of([n], [bias, y, z]), unused: 0 };
    Kernel::choose::<T>(cuda, &product, [product.depth; 2]).launch::<T>(cuda, "gemm_forward", &product, &args)
}

pub(crate) fn gemm_backward_data<T: CudaElement>(cuda: &Cuda, args: BackwardData<'_, Cuda, T>) -> Result<()> {
    let BackwardData { dims, dy, w, gelu, addend, write, dx } = args;
    let GemmDims { m, n, k, x_stride } = dims;
    let product = Product::new([(dy.into(), n), (w.into(), k)], [m, k, n]);
    let (gelu, addend, dx) = (gelu.into(), addend.into(), dx.into());
    let args = DataArgs {
        product,
        gelu,
        addend,
        dx,
        dx_stride: x_stride as u64,
        accumulate: u32::from(write == Write::Accumulate),
        access: Access::of([k, x_stride], [gelu, addend, dx]),
    };
    let rows = [product.depth, product.columns];
    Kernel::choose::<T>(cuda, &product, rows).launch::<T>(cuda, "gemm_backward_data", &product, &args)
}

pub(crate) fn gemm_backward_weight<T: CudaElement>(cuda: &Cuda, args: BackwardWeight<'_, Cuda, T>) -> Result<()> {
    let BackwardWeight { dims, x, dy, dw, dbias } = args;
    let GemmDims { m, n, k, x_stride } = dims;
    let (dy, dw): (Address, Address) = (dy.into(), dw.into());
    let mut product = Product::new([(dy, n), (x.into(), x_stride)], [n, k, m]);
    let kernel = Kernel::choose::<T>(cuda, &product, [product.rows, product.columns]);
    product.part = part_of_rows(cuda, &kernel, &product);
    let parts = product.depth.div_ceil(product.part);
    let to = if parts == 1 { dw } else { cuda.workspace() };
    let args = WeightArgs { product, dw: to, access: Access::of([k], [to]), unused: 0 };
    kernel.launch::<T>(cuda, "gemm_backward_weight", &product, &args)?;
    if parts > 1 {
        let args = ReduceArgs { parts: to, sums: dw, len: (n * k) as u64, count: parts, unused: 0 };
        cuda.launch_plain(MODULE, "gemm_reduce", Grid::line(blocks(n * k, 256), 256), &args)?;
    }
    bias_gradient::<T>(cuda, dims, dy, dbias.into())
}

/// Rows of x and dy that one block sums over, so that all multiprocessors have blocks, and the sums of all parts have room.
fn part_of_rows(cuda: &Cuda, kernel: &Kernel, product: &Product) -> u32 {
    // Less would cost more in partial sums than it brings.
    const ROWS: usize = 256;
    let rows = product.depth as usize;
    let room = cuda.workspace_bytes() / (product.rows as usize * product.columns as usize * size_of::<f32>());
    let parts = (2 * cuda.facts().multiprocessors).div_ceil(kernel.tiles(product)).min(rows.div_ceil(ROWS)).min(room);
    rows.div_ceil(parts.max(1)).next_multiple_of(kernel.slice) as u32
}

fn bias_gradient<T: CudaElement>(cuda: &Cuda, dims: GemmDims, dy: Address, dbias: Address) -> Result<()> {
    let sums = ColumnSums::plan(cuda, [dims.m, dims.n], 1, dbias);
    let args = BiasArgs {
        dy,
        parts: sums.parts,
        dbias,
        tickets: cuda.tickets(),
        m: dims.m as u32,
        n: dims.n as u32,
        rows: sums.rows as u32,
        unused: 0,
    };
    cuda.launch::<T>(MODULE, "gemm_bias_gradient", sums.grid, &args)
}

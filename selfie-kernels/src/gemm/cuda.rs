use super::{Activation, BackwardData, BackwardWeight, Forward, GemmDims, Write};
use crate::cuda::{Access, Address, Boxes, ColumnSums, CudaElement, Grid, TensorMap, blocks};
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

/// Both operands as kernels for Hopper copy them.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Maps {
    left: TensorMap,
    right: TensorMap,
}

/// `TileArgs` of `gemm_sm90.cu`, of the forward pass.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ForwardTileArgs {
    maps: Maps,
    to: ForwardArgs,
    unused: [u32; 12],
}

/// The same, of the data's gradient.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct DataTileArgs {
    maps: Maps,
    to: DataArgs,
    unused: [u32; 10],
}

/// The same, of the weights'.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct WeightTileArgs {
    maps: Maps,
    to: WeightArgs,
}

/// Whether the summed index runs along an operand's rows or from row to row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    Along,
    Across,
}

/// A kernel's name without what follows it, and how the operands lie.
#[derive(Debug, Clone, Copy)]
struct Pass {
    name: &'static str,
    left: Depth,
    right: Depth,
}

const FORWARD: Pass = Pass { name: "gemm_forward", left: Depth::Along, right: Depth::Along };
const DATA: Pass = Pass { name: "gemm_backward_data", left: Depth::Along, right: Depth::Across };
const WEIGHT: Pass = Pass { name: "gemm_backward_weight", left: Depth::Across, right: Depth::Across };

/// Which kernel multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    module: &'static str,
    /// Follows the pass in the kernel's name.
    name: &'static str,
    /// Rows and columns of a block's tile.
    tile: [usize; 2],
    /// The summed index comes in slices of so many.
    slice: usize,
    threads: usize,
    shared_bytes: usize,
    /// Blocks of a multiprocessor.
    resident: usize,
}

/// Takes any shape.
const PLAIN: Kernel =
    Kernel { module: MODULE, name: "", tile: [64, 64], slice: 16, threads: 256, shared_bytes: 0, resident: 2 };
/// Takes operands whose rows are whole, aligned chunks. Its shared memory: four stages of two slices.
const TENSOR_CORES: Kernel = Kernel {
    module: MODULE,
    name: "_mma",
    tile: [128, 128],
    slice: 32,
    threads: 128,
    shared_bytes: 4 * 2 * 128 * 80,
    resident: 2,
};
/// The same on Hopper, of which blocks stay and make tile after tile. Its shared memory: four stages of both operands, the
/// sums of eight warps, barriers.
const WIDE: Kernel = Kernel {
    module: "gemm_sm90",
    name: "_wide",
    tile: [128, 256],
    slice: 64,
    threads: 384,
    shared_bytes: 4 * (384 * 128 + 16) + 8 * 16 * 64 * 4,
    resident: 1,
};
/// Reads more of shared memory, but may leave less of the device idle.
const TALL: Kernel = Kernel { name: "_tall", tile: [256, 128], ..WIDE };

impl Kernel {
    /// The one for a product, by the rule or by the device's table.
    fn choose<T: CudaElement>(cuda: &Cuda, pass: Pass, product: &Product) -> Self {
        let chunks = |len: u64| len.is_multiple_of(8);
        let whole = |operand: Operand, depth: Depth, extent: u32| {
            let row = if depth == Depth::Along { product.depth } else { extent };
            operand.at.is_aligned() && chunks(operand.stride) && chunks(row.into())
        };
        let fits = whole(product.left, pass.left, product.rows) && whole(product.right, pass.right, product.columns);
        let has_room = TENSOR_CORES.shared_bytes <= cuda.facts().shared_bytes;
        // Only what is rounded as an operand of a product goes through the tensor cores.
        if T::OPERAND_EPSILON == 0.0 || !fits || !has_room {
            return PLAIN;
        }
        if !cuda.facts().hopper {
            return TENSOR_CORES;
        }
        let rule = Self::for_hopper(product, pass, cuda.facts().multiprocessors);
        let Product { rows, columns, depth, .. } = product;
        let shape = || format!("{} {rows} x {depth}->{columns}", T::SUFFIX);
        let name = |kernel: &Self| kernel.name.trim_start_matches('_').into();
        cuda.choose(pass.name, shape, rule, [WIDE, TALL, TENSOR_CORES], name)
    }

    /// The one that is done first. The weights' gradient is cut along its depth until all multiprocessors have work.
    fn for_hopper(product: &Product, pass: Pass, multiprocessors: usize) -> Self {
        // Cycles of a slice, as its products or its reads take longer.
        let cycles = |kernel: &Self| {
            let tiles = kernel.tiles(product);
            let parts = if pass.left == Depth::Across { (multiprocessors / tiles).max(1) } else { 1 };
            let slice = if kernel.tile == WIDE.tile { 1024 } else { 1152 };
            (tiles * parts).div_ceil(multiprocessors) * slice * (product.depth as usize).div_ceil(parts)
        };
        if cycles(&TALL) < cycles(&WIDE) { TALL } else { WIDE }
    }

    fn tiles(&self, product: &Product) -> usize {
        let [rows, columns] = self.tile;
        (product.rows as usize).div_ceil(rows) * (product.columns as usize).div_ceil(columns)
    }

    /// Queues it with its arguments; `with_maps` makes those of a kernel for Hopper.
    fn launch<T: CudaElement, A: bytemuck::NoUninit>(
        &self,
        cuda: &Cuda,
        pass: Pass,
        product: &Product,
        args: &impl bytemuck::NoUninit,
        with_maps: impl FnOnce(Maps) -> A,
    ) -> Result<()> {
        let works = self.tiles(product) * product.depth.div_ceil(product.part) as usize;
        let stays = self.module != MODULE;
        let blocks = if stays { works.min(cuda.facts().multiprocessors) } else { works };
        let grid = Grid { blocks: [blocks, 1, 1], threads: self.threads, shared_bytes: self.shared_bytes };
        let name = format!("{}{}", pass.name, self.name);
        if !stays {
            return cuda.launch::<T>(self.module, &name, grid, args);
        }
        let [rows, columns] = self.tile;
        let left = product.left.map(cuda, pass.left, [product.rows, product.depth], rows)?;
        let right = product.right.map(cuda, pass.right, [product.columns, product.depth], columns)?;
        cuda.launch::<T>(self.module, &name, grid, &with_maps(Maps { left, right }))
    }
}

impl Operand {
    /// For copies of so many of its extent, and 64 of the depth.
    fn map(&self, cuda: &Cuda, depth: Depth, [extent, deep]: [u32; 2], tile: usize) -> Result<TensorMap> {
        let [extent, deep] = [extent, deep].map(|len| len as usize);
        let (dims, sides) = match depth {
            Depth::Along => ([deep, extent], [WIDE.slice, tile]),
            Depth::Across => ([extent, deep], [WIDE.slice, WIDE.slice]),
        };
        let strides = [2 * self.stride as usize];
        cuda.map_boxes(&Boxes { address: self.at, dims: &dims, strides: &strides, sides: &sides })
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
    let with_maps = |maps| ForwardTileArgs { maps, to: args, unused: [0; 12] };
    Kernel::choose::<T>(cuda, FORWARD, &product).launch::<T, _>(cuda, FORWARD, &product, &args, with_maps)
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
    let with_maps = |maps| DataTileArgs { maps, to: args, unused: [0; 10] };
    Kernel::choose::<T>(cuda, DATA, &product).launch::<T, _>(cuda, DATA, &product, &args, with_maps)
}

pub(crate) fn gemm_backward_weight<T: CudaElement>(cuda: &Cuda, args: BackwardWeight<'_, Cuda, T>) -> Result<()> {
    let BackwardWeight { dims, x, dy, dw, dbias } = args;
    let GemmDims { m, n, k, x_stride } = dims;
    let (dy, dw): (Address, Address) = (dy.into(), dw.into());
    let mut product = Product::new([(dy, n), (x.into(), x_stride)], [n, k, m]);
    let kernel = Kernel::choose::<T>(cuda, WEIGHT, &product);
    product.part = part_of_rows(cuda, &kernel, &product);
    let parts = product.depth.div_ceil(product.part);
    let to = if parts == 1 { dw } else { cuda.workspace() };
    let args = WeightArgs { product, dw: to, access: Access::of([k], [to]), unused: 0 };
    kernel.launch::<T, _>(cuda, WEIGHT, &product, &args, |maps| WeightTileArgs { maps, to: args })?;
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
    let blocks = kernel.resident * cuda.facts().multiprocessors;
    // A block that stays must not come round again for a little.
    let shares = match kernel.resident {
        1 => blocks / kernel.tiles(product),
        _ => blocks.div_ceil(kernel.tiles(product)),
    };
    let parts = shares.min(rows.div_ceil(ROWS)).min(room);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(pass: Pass, sizes: [usize; 3], multiprocessors: usize) -> Kernel {
        let none = (Address::NONE, 0);
        Kernel::for_hopper(&Product::new([none; 2], sizes), pass, multiprocessors)
    }

    /// On an H200, where a tile less for the busiest multiprocessor is worth more than a faster one.
    #[test]
    fn kernels_of_a_transformer() {
        assert_eq!(kernel(FORWARD, [6656, 640, 1024], 132), TALL);
        assert_eq!(kernel(FORWARD, [6656, 3072, 1024], 132), WIDE);
        assert_eq!(kernel(FORWARD, [19456, 1024, 1024], 132), WIDE);
        assert_eq!(kernel(DATA, [6656, 1024, 3072], 132), WIDE);
        assert_eq!(kernel(WEIGHT, [3072, 1024, 6656], 132), WIDE);
        assert_eq!(kernel(WEIGHT, [1024, 640, 6656], 132), TALL);
    }

    /// Those of the cases that the operation's tests run, on the emulated device's multiprocessors.
    #[test]
    fn every_kernel_has_a_case() {
        let kernels = |[m, n, k]: [usize; 3]| {
            [kernel(FORWARD, [m, n, k], 3), kernel(DATA, [m, k, n], 3), kernel(WEIGHT, [n, k, m], 3)]
        };
        assert_eq!(kernels([300, 272, 328]), [WIDE; 3]);
        assert_eq!(kernels([520, 136, 72])[1..], [TALL; 2]);
        assert_eq!(kernels([700, 128, 64])[0], TALL);
    }
}

use super::super::Named;
use super::{Args, Kernel, STEP, TILE_ROWS, Way, lines, matrix, places, takes};
use crate::cuda::{Address, CudaElement, Grid, Windows};
use crate::partials::SUM_ROWS;
use crate::{ConvDims, Cuda, Result};

/// The forward pass's operands; see [`crate::norm_relu_conv::Forward`].
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Forward {
    pub(in super::super) dims: ConvDims,
    pub(in super::super) x: Address,
    /// Scale and shift, `[2, c]`.
    pub(in super::super) coef: Address,
    pub(in super::super) w: Address,
    pub(in super::super) residual: Address,
    pub(in super::super) y: Address,
    pub(in super::super) stats: Address,
}

impl Forward {
    /// The kernel for this shape at these addresses; [`None`] where none takes it.
    pub(in super::super) fn rule<T: CudaElement>(&self, cuda: &Cuda) -> Option<Kernel> {
        Kernel::rule(&self.dims, cuda.facts().shared_bytes).filter(|_| self.is_taken::<T>(cuda))
    }

    /// All that take it.
    pub(in super::super) fn kernels<T: CudaElement>(&self, cuda: &Cuda) -> Vec<Kernel> {
        if self.is_taken::<T>(cuda) { Kernel::all(&self.dims, cuda.facts().shared_bytes) } else { Vec::new() }
    }

    fn is_taken<T: CudaElement>(&self, cuda: &Cuda) -> bool {
        let Self { dims: d, x, coef, w, residual, y, .. } = *self;
        let steps = d.c.is_multiple_of(STEP) && d.k.is_multiple_of(8);
        steps && takes::<T>(cuda, &d, &[x, coef, w, residual, y])
    }

    /// Queues a kernel.
    pub(in super::super) fn launch<T: CudaElement>(&self, cuda: &Cuda, kernel: Kernel) -> Result<()> {
        let Self { dims: d, x, coef, w, residual, y, stats } = *self;
        let (rows, taps) = (d.rows_out(), d.r * d.s);
        // Of a map with a row of channels for each pixel, or for each image.
        let row_pixels = if let Way::Place = kernel.way { d.p() * d.q() } else { 1 };
        let result = |address| places(cuda, address, [rows / row_pixels, row_pixels, d.k], SUM_ROWS);
        let (a, halo_bytes) = match kernel.way {
            Way::Place => (places(cuda, x, [d.n, d.h * d.w, d.c], TILE_ROWS)?, 0),
            Way::Pixel => (matrix(cuda, x, [d.rows_in(), d.c], TILE_ROWS)?, 0),
            Way::Window | Way::Padded => (cuda.map_windows(&Windows { address: x, dims: d, count: TILE_ROWS })?, 0),
            Way::Halo { bytes } | Way::Classes { bytes } => (lines(cuda, x, &d, 1)?, bytes),
        };
        let out = result(y)?;
        let args = Args {
            a,
            b: matrix(cuda, w, [d.k, taps * d.c], kernel.columns)?,
            add: if residual == Address::NONE { out } else { result(residual)? },
            out,
            coef,
            sums: stats,
            rows: rows as i32,
            kc: d.c as i32,
            nc: d.k as i32,
            adds: i32::from(residual != Address::NONE),
            height: d.h as i32,
            width: d.w as i32,
            out_height: d.p() as i32,
            out_width: d.q() as i32,
            step: d.stride as i32,
            pad: d.pad as i32,
            halo_bytes: halo_bytes as u32,
            class_tiles: 0,
            pixels: Address::NONE,
            round: 0,
            places: row_pixels as i32,
            unused: [0; 12],
        };
        let tiles = rows.div_ceil(TILE_ROWS) * d.k.div_ceil(kernel.columns);
        let blocks = tiles.min(cuda.facts().multiprocessors);
        let grid = Grid { blocks: [blocks, 1, 1], threads: kernel.threads(), shared_bytes: kernel.shared_bytes() };
        cuda.launch::<T>("norm_relu_conv_forward_sm90", &format!("conv_forward_hopper_{}", kernel.name()), grid, &args)
    }
}

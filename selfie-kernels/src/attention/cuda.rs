use super::{AttentionDims, Backward, Forward};
use crate::cuda::{Access, Address, CudaElement, DropoutArgs, Grid, blocks};
use crate::{Cuda, Result};

const MODULE: &str = "attention";
/// Queries or keys of a block of the plain kernels, each a warp's.
const WARPS: usize = 4;

/// `Args` of `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    q: Address,
    kv: Address,
    dout: Address,
    out: Address,
    dq: Address,
    dkv: Address,
    weights: Address,
    dropout: DropoutArgs,
    b: u32,
    t_query: u32,
    t: u32,
    heads: u32,
    d: u32,
    scale: f32,
    unit: u32,
    units: u32,
}

impl Args {
    fn new(dims: AttentionDims, q: Address, kv: Address, dropout: DropoutArgs) -> Self {
        let AttentionDims { b, t_query, t, heads, d } = dims;
        Self {
            q,
            kv,
            dout: Address::NONE,
            out: Address::NONE,
            dq: Address::NONE,
            dkv: Address::NONE,
            weights: Address::NONE,
            dropout,
            b: b as u32,
            t_query: t_query as u32,
            t: t as u32,
            heads: heads as u32,
            d: d as u32,
            scale: (1.0 / (d as f64).sqrt()) as f32,
            unit: 0,
            units: (b * heads) as u32,
        }
    }
}

/// A shape that the tensor cores take: `Shape` of `attention.cu`.
#[derive(Clone, Copy)]
struct Tiles {
    /// Of 16 queries and of 16 keys.
    tiles: usize,
    d: usize,
}

/// Tiles of rows `[16, d]`, and of weights `[16, tiles * 16]`, that a head has in shared memory for each of its tiles.
#[derive(Clone, Copy)]
struct Shared {
    rows: usize,
    weights: usize,
}

const FORWARD: Shared = Shared { rows: 3, weights: 0 };
const BACKWARD: Shared = Shared { rows: 4, weights: 2 };

impl Tiles {
    fn choose<T: CudaElement>(dims: AttentionDims, args: &Args) -> Option<Self> {
        let tiles = dims.t_query.max(dims.t).div_ceil(16);
        let fits = T::OPERAND_EPSILON > 0.0 && tiles <= 4 && [16, 32, 64].contains(&dims.d);
        let access = Access::of([], [args.q, args.kv, args.dout, args.out, args.dq, args.dkv]);
        (fits && access == Access::Chunks).then_some(Self { tiles, d: dims.d })
    }

    fn heads_of_block(self) -> usize {
        match self.tiles {
            1 => 4,
            4 => 1,
            _ => 2,
        }
    }

    fn shared_bytes(self, shared: Shared) -> usize {
        let rows = shared.rows * self.tiles * 16 * (self.d * 2 + 16);
        let weights = shared.weights * self.tiles * 16 * (self.tiles * 32 + 16);
        // A byte for each four elements of the dropout, which may begin within four.
        let bits = (self.tiles * self.tiles * 64 + 2).next_multiple_of(16);
        self.heads_of_block() * (rows + weights + bits)
    }

    fn launch<T: CudaElement>(self, cuda: &Cuda, pass: &str, shared: Shared, args: &Args) -> Result<()> {
        let heads = self.heads_of_block();
        let grid = Grid {
            blocks: [blocks(args.units as usize, heads), 1, 1],
            threads: heads * self.tiles * 32,
            shared_bytes: self.shared_bytes(shared),
        };
        cuda.launch::<T>(MODULE, &format!("{pass}_tiles_{}_{}", self.tiles, self.d), grid, args)
    }
}

/// A warp for each of `items` queries or keys.
fn launch_plain<T: CudaElement>(cuda: &Cuda, kernel: &str, items: usize, args: &Args) -> Result<()> {
    cuda.launch::<T>(MODULE, kernel, Grid::line(blocks(items, WARPS), WARPS * 32), args)
}

pub(crate) fn attention_forward<T: CudaElement>(cuda: &Cuda, args: Forward<'_, Cuda, T>) -> Result<()> {
    let Forward { dims, q, kv, dropout, out } = args;
    let args = Args { out: out.into(), ..Args::new(dims, q.into(), kv.into(), dropout.into()) };
    match Tiles::choose::<T>(dims, &args) {
        Some(tiles) => tiles.launch::<T>(cuda, "attention_forward", FORWARD, &args),
        None => launch_plain::<T>(cuda, "attention_forward", dims.b * dims.heads * dims.t_query, &args),
    }
}

pub(crate) fn attention_backward<T: CudaElement>(cuda: &Cuda, args: Backward<'_, Cuda, T>) -> Result<()> {
    let Backward { dims, q, kv, dropout, dout, dq, dkv } = args;
    let (dout, dq, dkv) = (dout.into(), dq.into(), dkv.into());
    let weights = cuda.workspace();
    let args = Args { dout, dq, dkv, weights, ..Args::new(dims, q.into(), kv.into(), dropout.into()) };
    if let Some(tiles) = Tiles::choose::<T>(dims, &args) {
        return tiles.launch::<T>(cuda, "attention_backward", BACKWARD, &args);
    }
    // Heads at a time, so that their weights and the gradients of their scores have room: at most 8 MiB each.
    let group = cuda.workspace_bytes() / (2 * dims.t_query * dims.t * size_of::<f32>());
    let all = dims.b * dims.heads;
    for unit in (0..all).step_by(group) {
        let units = group.min(all - unit);
        let args = Args { unit: unit as u32, units: units as u32, ..args };
        launch_plain::<T>(cuda, "attention_backward_query", units * dims.t_query, &args)?;
        launch_plain::<T>(cuda, "attention_backward_key", units * dims.t, &args)?;
    }
    Ok(())
}

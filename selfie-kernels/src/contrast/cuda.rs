use super::{Args, Gradients, Units, UnitsBackward};
use crate::cuda::{Access, Address, CudaElement, Grid, blocks};
use crate::tokens::cuda::Patches;
use crate::{Cuda, Error, Result};

const MODULE: &str = "contrast";
const THREADS: usize = 256;

/// `Args` of `contrast.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct DeviceArgs {
    patches: Patches,
    u: Address,
    h: Address,
    positions: Address,
    loss: Address,
    du: Address,
    dh: Address,
    dpositions: Address,
    errors: Address,
    tallies: Address,
    tickets: Address,
    u_stride: u64,
    logit_scale: f32,
    dlogit: f32,
    valid: u32,
    image: u32,
    images: u32,
    unused: u32,
}

pub(crate) fn contrast<T: CudaElement>(cuda: &Cuda, args: Args<'_, Cuda, T>) -> Result<()> {
    let Args { dims, valid, logit_scale, u_stride, u, h, order, positions, loss, gradients } = args;
    let (du, dh, dpositions) = gradients.map_or((Address::NONE, Address::NONE, Address::NONE), |gradients| {
        let Gradients { du, dh, dpositions } = gradients;
        (du.into(), dh.into(), dpositions.into())
    });
    // Images at a time, so that their errors have room behind the tallies.
    let tallies = (valid * 2 * size_of::<f64>()).next_multiple_of(256);
    let errors_of_image = (dims.hidden + 1) * dims.hidden * size_of::<f32>();
    let group = valid.min(cuda.workspace_bytes().saturating_sub(tallies) / errors_of_image);
    if group == 0 {
        let reason = format!("no room for the errors of {} hidden patches, {valid} images", dims.hidden);
        return Err(Error::Launch { kernel: MODULE.into(), reason });
    }
    let mut args = DeviceArgs {
        patches: Patches::new(dims, order.into()),
        u: u.into(),
        h: h.into(),
        positions: positions.into(),
        loss: loss.into(),
        du,
        dh,
        dpositions,
        errors: cuda.workspace().offset(tallies),
        tallies: cuda.workspace(),
        tickets: cuda.tickets(),
        u_stride: u_stride as u64,
        logit_scale: logit_scale as f32,
        dlogit: (logit_scale / (valid * dims.hidden) as f64) as f32,
        valid: valid as u32,
        image: 0,
        images: 0,
        unused: 0,
    };
    let kernel = match Access::of([dims.d, u_stride], [args.u, args.h, args.positions, du, dh]) {
        Access::Chunks => "contrast",
        Access::Elements => "contrast_elements",
    };
    let rows = dims.len_positions() / dims.d;
    for image in (0..valid).step_by(group) {
        let images = group.min(valid - image);
        (args.image, args.images) = (image as u32, images as u32);
        cuda.launch::<T>(MODULE, kernel, Grid::line(images, THREADS), &args)?;
        if du != Address::NONE {
            let grid = Grid::line(rows * dims.d.div_ceil(32), THREADS);
            cuda.launch::<T>(MODULE, "contrast_positions", grid, &args)?;
        }
    }
    Ok(())
}

/// `UnitsArgs` of `contrast.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct UnitsArgs {
    patches: Patches,
    u: Address,
    h: Address,
    positions: Address,
    queries: Address,
    keys: Address,
    norms: Address,
    u_stride: u64,
    length: f32,
    unused: u32,
}

pub(crate) fn contrast_units<T: CudaElement>(cuda: &Cuda, args: Units<'_, Cuda, T>) -> Result<()> {
    let Units { dims, temperature, u_stride, u, h, order, positions, queries, keys, norms } = args;
    let args = UnitsArgs {
        patches: Patches::new(dims, order.into()),
        u: u.into(),
        h: h.into(),
        positions: positions.into(),
        queries: queries.into(),
        keys: keys.into(),
        norms: norms.into(),
        u_stride: u_stride as u64,
        length: (1.0 / temperature) as f32,
        unused: 0,
    };
    let kernel = match Access::of([dims.d, u_stride], [args.u, args.h, args.positions, args.queries, args.keys]) {
        Access::Chunks => "contrast_units",
        Access::Elements => "contrast_units_elements",
    };
    // A warp a row.
    let grid = Grid::line(blocks(dims.b * dims.hidden, THREADS / 32), THREADS);
    cuda.launch::<T>(MODULE, kernel, grid, &args)
}

/// `UnitsBackwardArgs` of `contrast.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct UnitsBackwardArgs {
    patches: Patches,
    queries: Address,
    keys: Address,
    dqueries: Address,
    dkeys: Address,
    norms: Address,
    along: Address,
    du: Address,
    dh: Address,
    dpositions: Address,
    u_stride: u64,
    length: f32,
    squared: f32,
}

pub(crate) fn contrast_units_backward<T: CudaElement>(cuda: &Cuda, args: UnitsBackward<'_, Cuda, T>) -> Result<()> {
    let UnitsBackward { dims, temperature, u_stride, order, queries, keys, norms, dqueries, dkeys, along, gradients } =
        args;
    let Gradients { du, dh, dpositions } = gradients;
    let args = UnitsBackwardArgs {
        patches: Patches::new(dims, order.into()),
        queries: queries.into(),
        keys: keys.into(),
        dqueries: dqueries.into(),
        dkeys: dkeys.into(),
        norms: norms.into(),
        along: along.into(),
        du: du.into(),
        dh: dh.into(),
        dpositions: dpositions.into(),
        u_stride: u_stride as u64,
        length: (1.0 / temperature) as f32,
        squared: (temperature * temperature) as f32,
    };
    let places = [args.queries, args.keys, args.dqueries, args.dkeys, args.du, args.dh];
    let kernel = match Access::of([dims.d, u_stride], places) {
        Access::Chunks => "contrast_units_backward",
        Access::Elements => "contrast_units_backward_elements",
    };
    cuda.launch::<T>(MODULE, kernel, Grid::line(dims.b, THREADS), &args)?;
    let rows = dims.len_positions() / dims.d;
    let grid = Grid::line(rows * dims.d.div_ceil(32), THREADS);
    cuda.launch::<T>(MODULE, "contrast_units_positions", grid, &args)
}

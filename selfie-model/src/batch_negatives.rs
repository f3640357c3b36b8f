//! The puzzle against the hidden patches of all images of a batch ([`crate::Negatives::Batch`]): unit vectors, one product of
//! matrices for all logits, cross-entropy, and back. The accuracy stays the puzzle's, among the hidden patches of the same
//! image, so that it means the same with either kind of negatives.

use crate::memory_plan::Ledger;
use crate::state::{Buffer, State};
use crate::{Mode, Purpose};
use selfie_kernels::gemm::{self, GemmDims};
use selfie_kernels::tokens::PatchDims;
use selfie_kernels::{Backend, Element, Memory, Result, contrast, softmax_cross_entropy};
use std::ops::Range;

/// The objective's buffers; a row is a hidden place of an image, and so is a column.
#[derive(Debug)]
pub(crate) struct BatchNegatives<M: Memory, T: Element> {
    dims: PatchDims,
    temperature: f64,
    /// `[rows, d]`: unit vectors over the temperature, unit vectors, and their gradients.
    queries: Buffer<M, T>,
    keys: Buffer<M, T>,
    dqueries: Buffer<M, T>,
    dkeys: Buffer<M, T::Wide>,
    /// `[rows, 2]` and `[rows]`: see [`contrast::Units`] and [`contrast::UnitsBackward`].
    norms: Buffer<M, T::Wide>,
    along: Buffer<M, T::Wide>,
    /// `[rows, rows]`, and their gradient.
    logits: Buffer<M, T>,
    dlogits: Buffer<M, T>,
    /// `[rows]`: of each row its own column.
    targets: Buffer<M, u32>,
    /// `[rows]` zeros, as products want a bias; and its gradient, which nobody reads.
    bias: Buffer<M, T::Wide>,
    dbias: Buffer<M, T::Wide>,
}

/// What a batch is scored by.
pub(crate) struct Puzzle<'a, M: Memory, T: Element> {
    /// Images that count.
    pub(crate) valid: usize,
    /// From one image's u to the next.
    pub(crate) u_stride: usize,
    /// What asks, as [`contrast::Units`] says, and in training where its gradient belongs; there may be room behind.
    pub(crate) u: &'a Buffer<M, T>,
    pub(crate) du: &'a mut Buffer<M, T>,
    /// `[b, n, d]`, and the gradient of which the hidden patches' rows are written.
    pub(crate) h: &'a Buffer<M, T>,
    pub(crate) dh: &'a mut Buffer<M, T>,
    pub(crate) order: &'a Buffer<M, u32>,
    /// Place of the position embeddings in the flat buffers.
    pub(crate) positions: Range<usize>,
}

impl<M: Memory, T: Element> BatchNegatives<M, T> {
    pub(crate) fn new(ledger: &mut Ledger<M>, dims: PatchDims, temperature: f64, purpose: Purpose) -> Result<Self> {
        let rows = dims.b * dims.hidden;
        // Above any memory where the square is none.
        let (units, square) = (rows * dims.d, rows.saturating_mul(rows));
        ledger.scope("objective");
        Ok(Self {
            dims,
            temperature,
            queries: ledger.alloc("queries", units)?,
            keys: ledger.alloc("keys", units)?,
            dqueries: ledger.alloc("dqueries", purpose.trained(units))?,
            dkeys: ledger.alloc("dkeys", purpose.trained(units))?,
            norms: ledger.alloc("norms", 2 * rows)?,
            along: ledger.alloc("along", purpose.trained(rows))?,
            logits: ledger.alloc("logits", square)?,
            dlogits: ledger.alloc("dlogits", purpose.trained(square))?,
            targets: ledger.alloc("targets", rows)?,
            bias: ledger.alloc("bias", rows)?,
            dbias: ledger.alloc("dbias", purpose.trained(rows))?,
        })
    }

    /// Writes what does not change from batch to batch. Once, before the first.
    pub(crate) fn prepare(&mut self, device: &M) -> Result<()> {
        let rows = M::len(&self.targets) as u32;
        device.upload(&(0..rows).collect::<Vec<_>>(), M::all_mut(&mut self.targets))
    }
}

impl<B: Backend<T>, T: Element> BatchNegatives<B, T> {
    /// Loss and accuracy, and in training the gradients of u, of the hidden patches and of the positions.
    pub(crate) fn score(&mut self, state: &mut State<B, T>, puzzle: Puzzle<'_, B, T>) -> Result<()> {
        let Self { dims, temperature, queries, keys, dqueries, dkeys, norms, along, logits, dlogits, .. } = self;
        let (dims, temperature) = (*dims, *temperature);
        let Puzzle { valid, u_stride, u, du, h, dh, order, positions } = puzzle;
        state.device.contrast_units(contrast::Units {
            dims,
            temperature,
            u_stride,
            u: B::view(u, 0..dims.b * u_stride),
            h: B::all(h),
            order: B::all(order),
            positions: B::view(&state.parameters.master, positions.clone()),
            queries: B::all_mut(queries),
            keys: B::all_mut(keys),
            norms: B::all_mut(norms),
        })?;
        // Padding is no negative, either.
        let rows = valid * dims.hidden;
        let product = GemmDims { m: rows, n: rows, k: dims.d, x_stride: dims.d };
        state.device.gemm_forward(gemm::Forward {
            dims: product,
            x: B::view(queries, 0..rows * dims.d),
            w: B::view(keys, 0..rows * dims.d),
            bias: B::view(&self.bias, 0..rows),
            activation: gemm::Activation::Identity,
            y: B::view_mut(logits, 0..rows * rows),
        })?;
        state.device.softmax_cross_entropy(softmax_cross_entropy::Args {
            n: rows,
            valid: rows,
            classes: rows,
            rivals: dims.hidden,
            logits: B::view(logits, 0..rows * rows),
            labels: B::view(&self.targets, 0..rows),
            loss: state.metrics.loss_mut(),
            dlogits: (state.mode == Mode::Train).then(|| B::all_mut(dlogits)),
        })?;
        if state.mode == Mode::Evaluate {
            return Ok(());
        }
        state.device.gemm_backward_data(gemm::BackwardData {
            dims: product,
            dy: B::all(dlogits),
            w: B::all(keys),
            gelu: None,
            addend: None,
            write: gemm::Write::Overwrite,
            dx: B::all_mut(dqueries),
        })?;
        state.device.gemm_backward_weight(gemm::BackwardWeight {
            dims: product,
            x: B::all(queries),
            dy: B::all(dlogits),
            dw: B::all_mut(dkeys),
            dbias: B::all_mut(&mut self.dbias),
        })?;
        state.device.contrast_units_backward(contrast::UnitsBackward {
            dims,
            temperature,
            u_stride,
            order: B::all(order),
            queries: B::all(queries),
            keys: B::all(keys),
            norms: B::all(norms),
            dqueries: B::all(dqueries),
            dkeys: B::all(dkeys),
            along: B::all_mut(along),
            gradients: contrast::Gradients {
                du: B::view_mut(du, 0..dims.b * u_stride),
                dh: B::all_mut(dh),
                dpositions: B::view_mut(&mut state.parameters.gradient, positions),
            },
        })
    }
}

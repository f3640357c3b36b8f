//! The layers that carry parameters. A layer knows its sizes and its ranges in the flat buffers, and owns no memory.

use crate::memory_plan::Ledger;
use crate::state::{Buffer, State};
use crate::{Layout, Mode, Purpose, Table};
use selfie_kernels::norm_relu_conv::{self, Addend};
use selfie_kernels::stem_pool::{self, PoolDims};
use selfie_kernels::{
    Affine, Backend, ConvDims, Element, Grad, Memory, Result, bn_finalize, gemm, partials_room, stem_conv,
};
use std::ops::Range;

/// The names of a network, as its layers add to them.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) parameters: Table,
    pub(crate) statistics: Table,
}

/// What block i - 1 and block i keep, where the blocks' `acts` are used in turn; none before the first block.
pub(crate) fn before_and_own<A>(acts: &mut [A], i: usize) -> (Option<&A>, &mut A) {
    if i == 0 {
        return (None, &mut acts[0]);
    }
    let (before, own) = ((i - 1) % acts.len(), i % acts.len());
    let [before, own] = acts.get_disjoint_mut([before, own]).expect("neighbours of a ring of two or more");
    (Some(before), own)
}

/// The gradient at a layer's output: the owning form of [`Grad`].
pub(crate) enum Dy<'a, M: Memory, T: Element> {
    /// The gradient itself.
    Plain(&'a Buffer<M, T>),
    /// Behind the normalisation that followed: of its output, its input, and what its backward pass left.
    Behind { dz: &'a Buffer<M, T>, x: &'a Buffer<M, T>, norm: &'a BatchNormActs<M, T> },
}

impl<M: Memory, T: Element> Clone for Dy<'_, M, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory, T: Element> Copy for Dy<'_, M, T> {}

impl<M: Memory, T: Element> Dy<'_, M, T> {
    /// As an operation's argument, of `rows * channels` elements.
    pub(crate) fn grad(&self, rows: usize, channels: usize) -> Grad<'_, M, T> {
        match *self {
            Dy::Plain(dy) => Grad::Plain(M::view(dy, 0..rows * channels)),
            Dy::Behind { dz, x, norm } => Grad::Affine(affine(dz, x, norm, rows, channels)),
        }
    }
}

/// The gradient of a normalisation's input, still to be applied.
pub(crate) fn affine<'a, M: Memory, T: Element>(
    dz: &'a Buffer<M, T>,
    x: &'a Buffer<M, T>,
    norm: &'a BatchNormActs<M, T>,
    rows: usize,
    channels: usize,
) -> Affine<'a, M, T> {
    Affine {
        dz: M::view(dz, 0..rows * channels),
        x: M::view(x, 0..rows * channels),
        coef: M::view(&norm.coef, 0..3 * channels),
    }
}

/// Batch normalisation between the operation that emitted its statistics and those that apply it while loading.
#[derive(Debug, Clone)]
pub(crate) struct BatchNorm {
    /// Pixels that are normalised together.
    rows: usize,
    c: usize,
    eps: f64,
    /// Gamma, then beta.
    affine: Range<usize>,
    /// Mean, then variance.
    statistics: Range<usize>,
}

/// What the forward and backward passes of a [`BatchNorm`] leave.
#[derive(Debug)]
pub(crate) struct BatchNormActs<M: Memory, T: Element> {
    /// `[4, c]`: mean, rstd, scale, shift.
    norm: Buffer<M, T::Wide>,
    /// `[3, c]`: a, b, c of the backward pass.
    coef: Buffer<M, T::Wide>,
}

impl<M: Memory, T: Element> BatchNormActs<M, T> {
    /// For up to `c` channels.
    pub(crate) fn new(ledger: &mut Ledger<M>, name: &str, c: usize, purpose: Purpose) -> Result<Self> {
        Ok(Self {
            norm: ledger.alloc(&format!("{name}.norm"), 4 * c)?,
            coef: ledger.alloc(&format!("{name}.coef"), purpose.trained(3 * c))?,
        })
    }

    pub(crate) fn view(&self, c: usize) -> M::View<'_, T::Wide> {
        M::view(&self.norm, 0..4 * c)
    }
}

impl BatchNorm {
    pub(crate) fn new(tables: &mut Tables, name: &str, rows: usize, c: usize, eps: f64) -> Self {
        let gamma = tables.parameters.push(format!("{name}.weight"), &[c], Layout::Plain);
        let beta = tables.parameters.push_behind(format!("{name}.bias"), &[c], Layout::Plain);
        let mean = tables.statistics.push(format!("{name}.running_mean"), &[c], Layout::Plain);
        let variance = tables.statistics.push_behind(format!("{name}.running_var"), &[c], Layout::Plain);
        Self { rows, c, eps, affine: gamma.start..beta.end, statistics: mean.start..variance.end }
    }

    pub(crate) fn channels(&self) -> usize {
        self.c
    }

    /// Elements of room for the partial sums of its input.
    pub(crate) fn partial_len(&self) -> usize {
        partials_room(self.rows, self.c)
    }

    /// From the statistics that the last operation emitted, or from the running ones in evaluation.
    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        acts: &mut BatchNormActs<B, T>,
    ) -> Result<()> {
        let affine = B::view(&state.parameters.master, self.affine.clone());
        let norm = B::view_mut(&mut acts.norm, 0..4 * self.c);
        match state.mode {
            Mode::Train => state.device.bn_finalize_forward(bn_finalize::Forward {
                rows: self.rows,
                c: self.c,
                eps: self.eps,
                stats: &state.partial,
                affine,
                norm,
                batch: B::view_mut(&mut state.statistics.batch, self.statistics.clone()),
            }),
            Mode::Evaluate => state.device.bn_finalize_inference(bn_finalize::Inference {
                c: self.c,
                eps: self.eps,
                running: B::view(&state.statistics.running, self.statistics.clone()),
                affine,
                norm,
            }),
        }
    }

    /// From the sums that the last operation emitted: gradients of gamma and beta, and the affine map of `dx`.
    pub(crate) fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        acts: &mut BatchNormActs<B, T>,
    ) -> Result<()> {
        state.device.bn_finalize_backward(bn_finalize::Backward {
            rows: self.rows,
            c: self.c,
            sums: &state.partial,
            affine: B::view(&state.parameters.master, self.affine.clone()),
            norm: B::view(&acts.norm, 0..4 * self.c),
            daffine: B::view_mut(&mut state.parameters.gradient, self.affine.clone()),
            coef: B::view_mut(&mut acts.coef, 0..3 * self.c),
        })
    }
}

/// Whether a convolution emits the statistics of its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Emit {
    /// A normalisation follows.
    Statistics,
    /// None follows.
    Nothing,
}

/// A convolution without bias.
#[derive(Debug, Clone)]
pub(crate) struct Conv {
    pub(crate) dims: ConvDims,
    filter: Range<usize>,
}

impl Conv {
    pub(crate) fn new(tables: &mut Tables, name: &str, dims: ConvDims) -> Self {
        let shape = [dims.k, dims.c, dims.r, dims.s];
        let filter = tables.parameters.push(format!("{name}.weight"), &shape, Layout::Filter);
        Self { dims, filter }
    }

    /// `y = conv(relu(norm(x))) (+ residual)`.
    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        (x, norm): (&Buffer<B, T>, &BatchNormActs<B, T>),
        residual: Option<&Buffer<B, T>>,
        y: &mut Buffer<B, T>,
        emit: Emit,
    ) -> Result<()> {
        let dims = self.dims;
        state.device.norm_relu_conv_forward(norm_relu_conv::Forward {
            dims,
            x: B::view(x, 0..dims.len_in()),
            norm: norm.view(dims.c),
            w: B::view(&state.parameters.copy, self.filter.clone()),
            residual: residual.map(|residual| B::view(residual, 0..dims.len_out())),
            y: B::view_mut(y, 0..dims.len_out()),
            stats: (emit == Emit::Statistics && state.mode == Mode::Train).then_some(&mut state.partial),
        })
    }

    /// The filter's gradient.
    pub(crate) fn backward_filter<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        (x, norm): (&Buffer<B, T>, &BatchNormActs<B, T>),
        dy: Dy<'_, B, T>,
    ) -> Result<()> {
        let dims = self.dims;
        state.device.norm_relu_conv_backward_filter(norm_relu_conv::BackwardFilter {
            dims,
            x: B::view(x, 0..dims.len_in()),
            norm: norm.view(dims.c),
            dy: dy.grad(dims.rows_out(), dims.k),
            dw: B::view_mut(&mut state.parameters.gradient, self.filter.clone()),
        })
    }

    /// The filter's gradient, and `dz`, that of `norm(x)`, with its sums. `addend` is what a projection that shares `x` sends
    /// back.
    pub(crate) fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        (x, norm): (&Buffer<B, T>, &BatchNormActs<B, T>),
        dy: Dy<'_, B, T>,
        addend: Option<(&Conv, &Buffer<B, T>)>,
        dz: &mut Buffer<B, T>,
    ) -> Result<()> {
        let dims = self.dims;
        let addend = addend.map(|(projection, values)| Addend {
            values: B::view(values, 0..projection.dims.rows_out() * dims.c),
            stride: projection.dims.stride,
        });
        let data = norm_relu_conv::BackwardData {
            dims,
            dy: dy.grad(dims.rows_out(), dims.k),
            w: B::view(&state.parameters.copy, self.filter.clone()),
            x: B::view(x, 0..dims.len_in()),
            norm: norm.view(dims.c),
            addend,
            dz: B::view_mut(dz, 0..dims.len_in()),
            sums: &mut state.partial,
        };
        let dw = B::view_mut(&mut state.parameters.gradient, self.filter.clone());
        state.device.norm_relu_conv_backward(norm_relu_conv::Backward { data, dw })
    }

    /// What a 1x1 projection sends back, at the pixels that it reads.
    pub(crate) fn projection_backward_data<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        dy: Dy<'_, B, T>,
        dx: &mut Buffer<B, T>,
    ) -> Result<()> {
        let dims = self.dims;
        state.device.projection_backward_data(norm_relu_conv::ProjectionBackwardData {
            dims,
            dy: dy.grad(dims.rows_out(), dims.k),
            w: B::view(&state.parameters.copy, self.filter.clone()),
            dx: B::view_mut(dx, 0..dims.rows_out() * dims.c),
        })
    }

    /// `y = conv(x)` of pixels.
    pub(crate) fn stem_forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        y: &mut Buffer<B, T>,
    ) -> Result<()> {
        let dims = self.dims;
        state.device.stem_conv_forward(stem_conv::Forward {
            dims,
            x: B::view(x, 0..dims.len_in()),
            w: B::view(&state.parameters.copy, self.filter.clone()),
            y: B::view_mut(y, 0..dims.len_out()),
            stats: (state.mode == Mode::Train).then_some(&mut state.partial),
        })
    }

    /// The stem filter's gradient.
    pub(crate) fn stem_backward_filter<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        dy: Dy<'_, B, T>,
    ) -> Result<()> {
        let dims = self.dims;
        state.device.stem_conv_backward_filter(stem_conv::BackwardFilter {
            dims,
            x: B::view(x, 0..dims.len_in()),
            dy: dy.grad(dims.rows_out(), dims.k),
            dw: B::view_mut(&mut state.parameters.gradient, self.filter.clone()),
        })
    }

    /// `y = max_pool(conv(x))` of pixels, and its winners; `map` has room for what is pooled.
    pub(crate) fn stem_pool_forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        map: &mut Buffer<B, T>,
        (y, argmax): (&mut Buffer<B, T>, &mut Buffer<B, u8>),
    ) -> Result<()> {
        let dims = self.dims;
        state.device.stem_pool_forward(stem_pool::Forward {
            dims,
            x: B::view(x, 0..dims.len_in()),
            w: B::view(&state.parameters.copy, self.filter.clone()),
            map: B::view_mut(map, 0..dims.len_out()),
            y: B::all_mut(y),
            argmax: B::all_mut(argmax),
            stats: (state.mode == Mode::Train).then_some(&mut state.partial),
        })
    }

    /// The stem filter's gradient, from that of the pooled map.
    pub(crate) fn stem_pool_backward_filter<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        (dy, argmax): (Dy<'_, B, T>, &Buffer<B, u8>),
        map: &mut Buffer<B, T>,
    ) -> Result<()> {
        let dims = self.dims;
        state.device.stem_pool_backward_filter(stem_pool::BackwardFilter {
            dims,
            x: B::view(x, 0..dims.len_in()),
            dy: dy.grad(PoolDims::behind(&dims).rows_out(), dims.k),
            argmax: B::all(argmax),
            map: B::view_mut(map, 0..dims.len_out()),
            dw: B::view_mut(&mut state.parameters.gradient, self.filter.clone()),
        })
    }
}

/// `y = x w^T + bias`: weight `[outputs, inputs]`, then bias.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    inputs: usize,
    outputs: usize,
    weight: Range<usize>,
    bias: Range<usize>,
}

/// Rows of a [`Linear`]'s input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
}

impl Linear {
    pub(crate) fn new(tables: &mut Tables, name: &str, inputs: usize, outputs: usize) -> Self {
        Self::shaped(tables, name, &[outputs, inputs])
    }

    /// With the shape that the weight has in a file: outputs, inputs, and perhaps ones.
    pub(crate) fn shaped(tables: &mut Tables, name: &str, shape: &[usize]) -> Self {
        let weight = tables.parameters.push(format!("{name}.weight"), shape, Layout::Plain);
        let bias = tables.parameters.push(format!("{name}.bias"), &shape[..1], Layout::Plain);
        Self { inputs: shape[1], outputs: shape[0], weight, bias }
    }

    /// The layer of some of the outputs, over the same parameters.
    pub(crate) fn part(&self, outputs: Range<usize>) -> Self {
        let weight = self.weight.start + outputs.start * self.inputs..self.weight.start + outputs.end * self.inputs;
        let bias = self.bias.start + outputs.start..self.bias.start + outputs.end;
        Self { inputs: self.inputs, outputs: outputs.len(), weight, bias }
    }

    fn dims(&self, rows: Rows) -> gemm::GemmDims {
        gemm::GemmDims { m: rows.rows, n: self.outputs, k: self.inputs, x_stride: rows.stride }
    }

    /// Rows that lie side by side.
    pub(crate) fn dense(&self, rows: usize) -> Rows {
        Rows { rows, stride: self.inputs }
    }

    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        rows: Rows,
        x: &Buffer<B, T>,
        y: &mut Buffer<B, T>,
    ) -> Result<()> {
        self.run(state, rows, x, gemm::Activation::Identity, y)
    }

    /// `y = gelu(z)`, `z` kept.
    pub(crate) fn forward_gelu<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        rows: Rows,
        x: &Buffer<B, T>,
        z: &mut Buffer<B, T>,
        y: &mut Buffer<B, T>,
    ) -> Result<()> {
        let z = B::view_mut(z, 0..rows.rows * self.outputs);
        self.run(state, rows, x, gemm::Activation::Gelu { z }, y)
    }

    fn run<'a, B: Backend<T>, T: Element>(
        &self,
        state: &'a State<B, T>,
        rows: Rows,
        x: &'a Buffer<B, T>,
        activation: gemm::Activation<'a, B, T>,
        y: &'a mut Buffer<B, T>,
    ) -> Result<()> {
        let dims = self.dims(rows);
        state.device.gemm_forward(gemm::Forward {
            dims,
            x: B::view(x, 0..dims.len_x()),
            w: B::view(&state.parameters.copy, self.weight.clone()),
            bias: B::view(&state.parameters.master, self.bias.clone()),
            activation,
            y: B::view_mut(y, 0..dims.m * dims.n),
        })
    }

    /// Gradients of weight and bias.
    pub(crate) fn backward_weight<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        rows: Rows,
        x: &Buffer<B, T>,
        dy: &Buffer<B, T>,
    ) -> Result<()> {
        let dims = self.dims(rows);
        let both = B::view_mut(&mut state.parameters.gradient, self.weight.start..self.bias.end);
        let (dw, rest) = B::split_at(both, self.weight.len());
        let (_, dbias) = B::split_at(rest, self.bias.start - self.weight.end);
        state.device.gemm_backward_weight(gemm::BackwardWeight {
            dims,
            x: B::view(x, 0..dims.len_x()),
            dy: B::view(dy, 0..dims.m * dims.n),
            dw,
            dbias,
        })
    }

    /// Gradient of `x`.
    pub(crate) fn backward_data<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        rows: Rows,
        dy: &Buffer<B, T>,
        dx: Dx<'_, B, T>,
    ) -> Result<()> {
        let dims = self.dims(rows);
        state.device.gemm_backward_data(gemm::BackwardData {
            dims,
            dy: B::view(dy, 0..dims.m * dims.n),
            w: B::view(&state.parameters.copy, self.weight.clone()),
            gelu: dx.gelu.map(|z| B::view(z, 0..dims.m * dims.k)),
            addend: dx.addend.map(|addend| B::view(addend, 0..dims.m * dims.k)),
            write: dx.write,
            dx: B::view_mut(dx.to, 0..dims.len_x()),
        })
    }
}

/// Where [`Linear::backward_data`] writes, and what it joins on the way.
pub(crate) struct Dx<'a, B: Memory, T: Element> {
    /// Where `x = gelu(z)`, that `z`.
    pub(crate) gelu: Option<&'a Buffer<B, T>>,
    /// Another gradient of `x`.
    pub(crate) addend: Option<&'a Buffer<B, T>>,
    pub(crate) write: gemm::Write,
    pub(crate) to: &'a mut Buffer<B, T>,
}

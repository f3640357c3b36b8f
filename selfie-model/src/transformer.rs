//! A post-norm transformer block (Devlin et al. 2019, arXiv 1810.04805), for all tokens or for the first one's output alone.

use crate::layers::{Dx, Linear, Rows, Tables};
use crate::memory_plan::Ledger;
use crate::state::{Buffer, State};
use crate::{Layout, Mode, ModelConfig, Purpose};
use selfie_kernels::Dropout;
use selfie_kernels::attention::{self, AttentionDims};
use selfie_kernels::gemm::Write;
use selfie_kernels::residual_norm::{self, NormDims};
use selfie_kernels::{Backend, Element, Memory, Result};
use std::ops::Range;

/// Added to the variance by layer normalisation.
const LAYER_NORM_EPS: f64 = 1e-5;

/// `x1 = norm1(x + drop(proj(attention(q(x), kv(x)))))`, `y = norm2(x1 + drop(fc2(gelu(fc1(x1)))))`.
#[derive(Debug)]
pub(crate) struct Block {
    /// Its number in the network.
    i: usize,
    dims: AttentionDims,
    /// Elements from one query token to the next.
    query_stride: usize,
    ffn: usize,
    /// The first third of `qkv`, and the other two.
    q: Linear,
    kv: Linear,
    proj: Linear,
    norm1: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    norm2: LayerNorm,
    /// On the attention's weights.
    dropout: DropoutSite,
}

/// One dropout of the network.
#[derive(Debug, Clone, Copy)]
struct DropoutSite {
    rate: f32,
    site: u32,
}

impl DropoutSite {
    /// As an operation's argument: none in evaluation.
    fn argument<'a, B: Memory, T: Element>(&self, state: &'a State<B, T>) -> Option<Dropout<'a, B>> {
        Self::of(*self, state.mode, &state.numbers)
    }

    /// The same from the parts of a state, for those who write other parts.
    fn of<M: Memory>(self, mode: Mode, numbers: &Buffer<M, u64>) -> Option<Dropout<'_, M>> {
        let Self { rate, site } = self;
        (mode == Mode::Train && rate > 0.0).then(|| Dropout { rate, site, rng: M::view(numbers, 0..2) })
    }
}

#[derive(Debug)]
pub(crate) struct BlockActs<M: Memory, T: Element> {
    q: Buffer<M, T>,
    kv: Buffer<M, T>,
    /// The attention's output.
    a: Buffer<M, T>,
    norm1: LayerNormActs<M, T>,
    x1: Buffer<M, T>,
    /// Before the GELU, and behind it.
    z: Buffer<M, T>,
    g: Buffer<M, T>,
    norm2: LayerNormActs<M, T>,
    y: Buffer<M, T>,
}

impl<M: Memory, T: Element> BlockActs<M, T> {
    pub(crate) fn new(ledger: &mut Ledger<M>, block: &Block) -> Result<Self> {
        let (query, rows, ffn) = (block.dims.len_query(), block.query_rows(), block.ffn);
        Ok(Self {
            q: ledger.alloc("q", query)?,
            kv: ledger.alloc("kv", block.dims.len_kv())?,
            a: ledger.alloc("a", query)?,
            norm1: LayerNormActs::new(ledger, "norm1", rows, query)?,
            x1: ledger.alloc("x1", query)?,
            z: ledger.alloc("z", rows * ffn)?,
            g: ledger.alloc("g", rows * ffn)?,
            norm2: LayerNormActs::new(ledger, "norm2", rows, query)?,
            y: ledger.alloc("y", query)?,
        })
    }

    /// `[b, t_query, d]`: what the block made of its tokens.
    pub(crate) fn output(&self) -> &Buffer<M, T> {
        &self.y
    }
}

/// Buffers for a block's tokens, free between two blocks.
#[derive(Debug)]
pub(crate) struct Scratch<M: Memory, T: Element> {
    /// A branch's output before it joins the residual, and its gradient.
    branch: Buffer<M, T>,
    /// At even blocks: the gradient at the block's input and before that at the MLP's, then the gradient at its output and
    /// of the attention's output. The other way round at odd blocks, so that one's input is where another's output was.
    gradients: [Buffer<M, T>; 2],
    /// Gradient of the residual.
    dresidual: Buffer<M, T>,
    dq: Buffer<M, T>,
    dkv: Buffer<M, T>,
    /// Gradient before the GELU.
    dz: Buffer<M, T>,
}

impl<M: Memory, T: Element> Scratch<M, T> {
    /// For blocks no larger than this one.
    pub(crate) fn new(ledger: &mut Ledger<M>, largest: &Block, purpose: Purpose) -> Result<Self> {
        let len = largest.dims.len_kv() / 2;
        Ok(Self {
            branch: ledger.alloc("branch", len)?,
            gradients: [
                ledger.alloc("gradient0", purpose.trained(len))?,
                ledger.alloc("gradient1", purpose.trained(len))?,
            ],
            dresidual: ledger.alloc("dresidual", purpose.trained(len))?,
            dq: ledger.alloc("dq", purpose.trained(len))?,
            dkv: ledger.alloc("dkv", purpose.trained(2 * len))?,
            dz: ledger.alloc("dz", purpose.trained(largest.query_rows() * largest.ffn))?,
        })
    }

    /// Gradient at the first block's input, once that has run backward.
    pub(crate) fn input_gradient(&self) -> &Buffer<M, T> {
        &self.gradients[0]
    }

    /// Where the gradient at the last of `blocks` blocks' output belongs.
    pub(crate) fn output_gradient_mut(&mut self, blocks: usize) -> &mut Buffer<M, T> {
        &mut self.gradients[blocks % 2]
    }
}

impl Block {
    /// Block `i` of the attention pooling; with a single query it is the first token.
    pub(crate) fn new(tables: &mut Tables, i: usize, dims: AttentionDims, config: &ModelConfig) -> Self {
        let (name, d, ffn) = (format!("pool.blocks.{i}"), dims.heads * dims.d, config.ffn);
        let dropout = |j| DropoutSite { rate: config.dropout as f32, site: (3 * i + j) as u32 };
        let qkv = Linear::new(tables, &format!("{name}.qkv"), d, 3 * d);
        Self {
            i,
            dims,
            query_stride: if dims.t_query == 1 { dims.t * d } else { d },
            ffn,
            q: qkv.part(0..d),
            kv: qkv.part(d..3 * d),
            proj: Linear::new(tables, &format!("{name}.proj"), d, d),
            norm1: LayerNorm::new(tables, &format!("{name}.norm1"), d, dropout(1)),
            norm2: LayerNorm::new(tables, &format!("{name}.norm2"), d, dropout(2)),
            fc1: Linear::new(tables, &format!("{name}.fc1"), d, ffn),
            fc2: Linear::new(tables, &format!("{name}.fc2"), ffn, d),
            dropout: dropout(0),
        }
    }

    /// Tokens that have a query, of all images.
    fn query_rows(&self) -> usize {
        self.dims.b * self.dims.t_query
    }

    /// The query tokens among `x`.
    fn queries(&self) -> Rows {
        Rows { rows: self.query_rows(), stride: self.query_stride }
    }

    /// All tokens of `x`.
    fn tokens(&self) -> Rows {
        self.kv.dense(self.dims.b * self.dims.t)
    }

    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        x: &Buffer<B, T>,
        acts: &mut BlockActs<B, T>,
        scratch: &mut Scratch<B, T>,
    ) -> Result<()> {
        let BlockActs { q, kv, a, norm1, x1, z, g, norm2, y } = acts;
        let branch = &mut scratch.branch;
        self.q.forward(state, self.queries(), x, q)?;
        self.kv.forward(state, self.tokens(), x, kv)?;
        state.device.attention_forward(attention::Forward {
            dims: self.dims,
            q: B::view(q, 0..self.dims.len_query()),
            kv: B::view(kv, 0..self.dims.len_kv()),
            dropout: self.dropout.argument(state),
            out: B::view_mut(a, 0..self.dims.len_query()),
        })?;
        let rows = self.proj.dense(self.query_rows());
        self.proj.forward(state, rows, a, branch)?;
        self.norm1.forward(state, self.residual(self.query_stride), (x, branch), norm1, x1)?;

        self.fc1.forward_gelu(state, rows, x1, z, g)?;
        self.fc2.forward(state, self.fc2.dense(self.query_rows()), g, branch)?;
        self.norm2.forward(state, self.residual(rows.stride), (x1, branch), norm2, y)
    }

    /// From the gradient of `y` in `scratch`: the parameters' gradients, and there the gradient of `x`.
    pub(crate) fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        x: &Buffer<B, T>,
        acts: &BlockActs<B, T>,
        scratch: &mut Scratch<B, T>,
    ) -> Result<()> {
        let BlockActs { q, kv, a, norm1, x1, z, g, norm2, .. } = acts;
        let Scratch { branch, gradients: [even, odd], dresidual, dq, dkv, dz } = scratch;
        let (dx, dy) = if self.i.is_multiple_of(2) { (even, odd) } else { (odd, even) };
        let rows = self.proj.dense(self.query_rows());
        let dims = self.residual(rows.stride);

        self.norm2.backward(state, dims, norm2, dy, (dresidual, branch))?;
        let fc2_rows = self.fc2.dense(self.query_rows());
        self.fc2.backward_weight(state, fc2_rows, g, branch)?;
        let to_z = Dx { gelu: Some(z), addend: None, write: Write::Overwrite, to: dz };
        self.fc2.backward_data(state, fc2_rows, branch, to_z)?;
        self.fc1.backward_weight(state, rows, x1, dz)?;
        let to_x1 = Dx { gelu: None, addend: Some(dresidual), write: Write::Overwrite, to: dx };
        self.fc1.backward_data(state, rows, dz, to_x1)?;

        self.norm1.backward(state, dims, norm1, dx, (dresidual, branch))?;
        self.proj.backward_weight(state, rows, a, branch)?;
        let to_a = Dx { gelu: None, addend: None, write: Write::Overwrite, to: dy };
        self.proj.backward_data(state, rows, branch, to_a)?;
        state.device.attention_backward(attention::Backward {
            dims: self.dims,
            q: B::view(q, 0..self.dims.len_query()),
            kv: B::view(kv, 0..self.dims.len_kv()),
            dropout: self.dropout.argument(state),
            dout: B::view(dy, 0..self.dims.len_query()),
            dq: B::view_mut(dq, 0..self.dims.len_query()),
            dkv: B::view_mut(dkv, 0..self.dims.len_kv()),
        })?;
        self.q.backward_weight(state, self.queries(), x, dq)?;
        self.kv.backward_weight(state, self.tokens(), x, dkv)?;
        // All tokens' rows first; the query's rows, and round the block the residual's, are added.
        let to_x = Dx { gelu: None, addend: None, write: Write::Overwrite, to: dx };
        self.kv.backward_data(state, self.tokens(), dkv, to_x)?;
        let to_x = Dx { gelu: None, addend: Some(dresidual), write: Write::Accumulate, to: dx };
        self.q.backward_data(state, self.queries(), dq, to_x)
    }

    /// Sizes of a residual norm whose residual has this stride.
    fn residual(&self, x_stride: usize) -> NormDims {
        NormDims { b: self.dims.b, t: self.dims.t_query, d: self.dims.heads * self.dims.d, x_stride }
    }
}

/// Layer normalisation of a residual and its branch.
#[derive(Debug)]
struct LayerNorm {
    /// Gamma, then beta.
    affine: Range<usize>,
    /// On the branch.
    dropout: DropoutSite,
}

#[derive(Debug)]
struct LayerNormActs<M: Memory, T: Element> {
    sum: Buffer<M, T>,
    /// `[rows, 2]`: mean, rstd.
    stats: Buffer<M, T::Wide>,
}

impl<M: Memory, T: Element> LayerNormActs<M, T> {
    fn new(ledger: &mut Ledger<M>, name: &str, rows: usize, len: usize) -> Result<Self> {
        Ok(Self {
            sum: ledger.alloc(&format!("{name}.sum"), len)?,
            stats: ledger.alloc(&format!("{name}.stats"), 2 * rows)?,
        })
    }
}

impl LayerNorm {
    fn new(tables: &mut Tables, name: &str, d: usize, dropout: DropoutSite) -> Self {
        let gamma = tables.parameters.push(format!("{name}.weight"), &[d], Layout::Plain);
        let beta = tables.parameters.push_behind(format!("{name}.bias"), &[d], Layout::Plain);
        Self { affine: gamma.start..beta.end, dropout }
    }

    /// `y = norm(x + dropout(branch))`.
    fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &State<B, T>,
        dims: NormDims,
        (x, branch): (&Buffer<B, T>, &Buffer<B, T>),
        acts: &mut LayerNormActs<B, T>,
        y: &mut Buffer<B, T>,
    ) -> Result<()> {
        state.device.residual_norm_forward(residual_norm::Forward {
            dims,
            eps: LAYER_NORM_EPS,
            x: B::view(x, 0..dims.len_x()),
            branch: B::view(branch, 0..dims.len()),
            dropout: self.dropout.argument(state),
            affine: B::view(&state.parameters.master, self.affine.clone()),
            sum: B::view_mut(&mut acts.sum, 0..dims.len()),
            stats: B::view_mut(&mut acts.stats, 0..2 * dims.rows()),
            y: B::view_mut(y, 0..dims.len()),
        })
    }

    /// Gradients of gamma and beta, of the residual and of the branch.
    fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        dims: NormDims,
        acts: &LayerNormActs<B, T>,
        dy: &Buffer<B, T>,
        (dx, dbranch): (&mut Buffer<B, T>, &mut Buffer<B, T>),
    ) -> Result<()> {
        state.device.residual_norm_backward(residual_norm::Backward {
            dims,
            dy: B::view(dy, 0..dims.len()),
            sum: B::view(&acts.sum, 0..dims.len()),
            stats: B::view(&acts.stats, 0..2 * dims.rows()),
            dropout: DropoutSite::of(self.dropout, state.mode, &state.numbers),
            affine: B::view(&state.parameters.master, self.affine.clone()),
            dx: B::view_mut(dx, 0..dims.len()),
            dbranch: B::view_mut(dbranch, 0..dims.len()),
            daffine: B::view_mut(&mut state.parameters.gradient, self.affine.clone()),
        })
    }
}

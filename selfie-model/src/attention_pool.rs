//! Attention pooling: the visible patches of an image to one vector.
//!
//! Tokens (u0, visible patches with their positions) go through post-norm transformer blocks (Devlin et al. 2019, arXiv 1810.04805);
//! the first token of the last block is the summary. The other outputs of that block have no reader, so it computes
//! query, projection and MLP for the first token only. With a token for each hidden place (`Query::Places`) these are
//! what is read, and the last block is like the others. As a classifier's head it sums up all patches, none of them hidden.

use crate::layers::{Tables, before_and_own};
use crate::memory_plan::Ledger;
use crate::state::{Buffer, State};
use crate::transformer::{Block, BlockActs, Scratch};
use crate::{Layout, ModelConfig, Purpose};
use selfie_kernels::attention::AttentionDims;
use selfie_kernels::tokens::{self, PatchDims, PositionKind};
use selfie_kernels::{Backend, Element, Memory, Result};
use std::ops::Range;

/// u0, positions and blocks: `[b, n, d]` to `[b, q, d]`.
#[derive(Debug)]
pub(crate) struct AttentionPool {
    dims: PatchDims,
    u0: Range<usize>,
    positions: Range<usize>,
    encoder_positions: bool,
    blocks: Vec<Block>,
}

/// What [`AttentionPool`] keeps for the backward pass, and the scratch its blocks share.
#[derive(Debug)]
pub(crate) struct AttentionPoolActs<M: Memory, T: Element> {
    /// `[b, t, d]`.
    tokens: Buffer<M, T>,
    /// Of each block; in evaluation two, used in turn.
    blocks: Vec<BlockActs<M, T>>,
    scratch: Scratch<M, T>,
}

impl AttentionPool {
    pub(crate) fn new(tables: &mut Tables, config: &ModelConfig, dims: PatchDims) -> Self {
        let d = dims.d;
        let u0 = tables.parameters.push("pool.u0", &[d], Layout::Plain);
        let positions = match dims.positions {
            PositionKind::Table => tables.parameters.push("pool.pos", &[dims.n(), d], Layout::Plain),
            PositionKind::RowCol => {
                let rows = tables.parameters.push("pool.row", &[dims.grid, d], Layout::Plain);
                let columns = tables.parameters.push_behind("pool.col", &[dims.grid, d], Layout::Plain);
                rows.start..columns.end
            }
        };
        let t = dims.t();
        let blocks = (0..config.pool_blocks).map(|i| {
            let t_query = if i + 1 == config.pool_blocks && dims.q() == 1 { 1 } else { t };
            let attention = AttentionDims { b: dims.b, t_query, t, heads: config.heads, d: d / config.heads };
            Block::new(tables, i, attention, config)
        });
        let blocks = blocks.collect();
        Self { dims, u0, positions, encoder_positions: config.encoder_positions, blocks }
    }

    /// Place of the position embeddings in the flat buffers.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.positions.clone()
    }

    pub(crate) fn acts<M: Memory, T: Element>(
        &self,
        ledger: &mut Ledger<M>,
        purpose: Purpose,
    ) -> Result<AttentionPoolActs<M, T>> {
        let len = self.dims.b * self.dims.t() * self.dims.d;
        ledger.scope("pool");
        let tokens = ledger.alloc("tokens", len)?;
        let mut blocks = Vec::new();
        match purpose {
            Purpose::Train | Purpose::Accumulate => {
                for (i, block) in self.blocks.iter().enumerate() {
                    ledger.scope(format!("pool.blocks.{i}"));
                    blocks.push(BlockActs::new(ledger, block)?);
                }
            }
            Purpose::Evaluate => {
                for i in 0..self.blocks.len().min(2) {
                    ledger.scope(format!("pool.shared{i}"));
                    blocks.push(BlockActs::new(ledger, &self.blocks[0])?);
                }
            }
        }
        ledger.scope("pool.scratch");
        let scratch = Scratch::new(ledger, &self.blocks[0], purpose)?;
        Ok(AttentionPoolActs { tokens, blocks, scratch })
    }

    /// The summary of each image's visible patches, in [`AttentionPool::summary`].
    pub(crate) fn forward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        h: &Buffer<B, T>,
        order: &Buffer<B, u32>,
        acts: &mut AttentionPoolActs<B, T>,
    ) -> Result<()> {
        let AttentionPoolActs { tokens, blocks, scratch } = acts;
        let master = &state.parameters.master;
        state.device.tokens_forward(tokens::Forward {
            dims: self.dims,
            h: B::all(h),
            order: B::all(order),
            u0: B::view(master, self.u0.clone()),
            positions: self.encoder_positions.then(|| B::view(master, self.positions.clone())),
            x: B::all_mut(tokens),
        })?;
        for (i, block) in self.blocks.iter().enumerate() {
            let (before, acts) = before_and_own(blocks, i);
            let x = before.map_or(&*tokens, BlockActs::output);
            block.forward(state, x, acts, scratch)?;
        }
        Ok(())
    }

    /// Elements from an image's first query to the next image's, in what is handed out.
    pub(crate) fn query_stride(&self) -> usize {
        if self.dims.q() == 1 { self.dims.d } else { self.dims.t() * self.dims.d }
    }

    /// Where the last forward left what it made of the tokens that ask: `[b, q, d]` with [`AttentionPool::query_stride`],
    /// and perhaps room behind.
    pub(crate) fn output<'a, M: Memory, T: Element>(&self, acts: &'a AttentionPoolActs<M, T>) -> &'a Buffer<M, T> {
        acts.blocks[(self.blocks.len() - 1) % acts.blocks.len()].output()
    }

    /// Where the gradient of a training's [`AttentionPool::output`] belongs before [`AttentionPool::backward`].
    pub(crate) fn output_gradient_mut<'a, M: Memory, T: Element>(
        &self,
        acts: &'a mut AttentionPoolActs<M, T>,
    ) -> &'a mut Buffer<M, T> {
        acts.scratch.output_gradient_mut(self.blocks.len())
    }

    /// The part of [`AttentionPool::output`] that counts.
    pub(crate) fn summary<'a, M: Memory, T: Element>(&self, acts: &'a AttentionPoolActs<M, T>) -> M::View<'a, T> {
        M::view(self.output(acts), 0..self.dims.b * self.query_stride())
    }

    /// Both, `[b, query_stride]`, and perhaps room behind.
    pub(crate) fn output_and_gradient<'a, M: Memory, T: Element>(
        &self,
        acts: &'a mut AttentionPoolActs<M, T>,
    ) -> (&'a Buffer<M, T>, &'a mut Buffer<M, T>) {
        let last = &acts.blocks[(self.blocks.len() - 1) % acts.blocks.len()];
        (last.output(), acts.scratch.output_gradient_mut(self.blocks.len()))
    }

    /// All parameters' gradients, and `dh` at the visible patches; the positions' gradient is added to.
    pub(crate) fn backward<B: Backend<T>, T: Element>(
        &self,
        state: &mut State<B, T>,
        order: &Buffer<B, u32>,
        acts: &mut AttentionPoolActs<B, T>,
        dh: &mut Buffer<B, T>,
    ) -> Result<()> {
        let AttentionPoolActs { tokens, blocks, scratch } = acts;
        for (i, block) in self.blocks.iter().enumerate().rev() {
            let (before, acts) = before_and_own(blocks, i);
            let x = before.map_or(&*tokens, BlockActs::output);
            block.backward(state, x, acts, scratch)?;
        }
        let gradient = B::view_mut(&mut state.parameters.gradient, self.u0.start..self.positions.end);
        let (du0, rest) = B::split_at(gradient, self.u0.len());
        let (_, dpositions) = B::split_at(rest, self.positions.start - self.u0.end);
        state.device.tokens_backward(tokens::Backward {
            dims: self.dims,
            order: B::all(order),
            dx: B::all(scratch.input_gradient()),
            dh: B::all_mut(dh),
            du0,
            dpositions_acc: self.encoder_positions.then_some(dpositions),
        })
    }
}
